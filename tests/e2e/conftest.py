from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, speed=20) as running:
        yield running


@pytest.fixture
def broker(tmp_path: Path, stage: Stage) -> Iterator[RunningBroker]:
    with RunningBroker(tmp_path, stage.config(state_dir=tmp_path / "state", bind="127.0.0.1:8770")) as running:
        yield running
