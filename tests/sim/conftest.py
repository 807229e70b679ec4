from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import requests

from gpumgr.sim.card import SimulatedCard

T = TypeVar("T")
Aside = Callable[[Callable[[], requests.Response]], "Future[requests.Response]"]


@pytest.fixture
def card() -> SimulatedCard:
    return SimulatedCard()


@pytest.fixture
def aside() -> Iterator[Aside]:
    """Make a request without waiting for its answer. Ask for it before the service, so that it ends after it."""
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit
