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
    config = stage.config()
    config["consumers"]["ollama"]["unload"] = {"timeout_seconds": 1.5}  # what a test of a lying victim waits for
    with RunningBroker(tmp_path, config) as running:
        yield running
