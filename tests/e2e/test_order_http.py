"""The order with few swaps, over HTTP: gunicorn and the simulated services."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.waiting import until

QUANTUM_SECONDS = 9.0
WHILE_TWO_WAIT = QUANTUM_SECONDS / 3


@pytest.fixture
def broker(tmp_path: Path, stage: Stage) -> Iterator[RunningBroker]:
    config = stage.config() | {"scheduling": {"policy": "quantum", "quantum_seconds": QUANTUM_SECONDS}}
    with RunningBroker(tmp_path, config) as running:
        yield running


def waiting(broker: RunningBroker) -> dict[str, dict[str, Any]]:
    return {str(each["holder"]): each for each in broker.status()["queue"]}


class Asking:
    """Callers that wait, each on a thread of its own."""

    def __init__(self, broker: RunningBroker) -> None:
        self._broker = broker
        self._pool = ThreadPoolExecutor()

    def __call__(self, holder: str, **words: Any) -> Future[requests.Response]:
        asked = self._pool.submit(self._broker.acquire, holder=holder, **words)
        until(lambda: holder in waiting(self._broker))
        return asked


def token_of(asked: Future[requests.Response]) -> str:
    return str(asked.result(20).json()["token"])


def test_the_resident_keeps_its_turn_until_its_quantum_is_over(broker: RunningBroker) -> None:
    ask = Asking(broker)
    first = broker.acquire(kind="llm").json()
    image, second = ask("imagen", kind="image"), ask("chat", kind="llm")
    broker.release(first["token"])
    token = token_of(second)
    assert set(waiting(broker)) == {"imagen"}
    third = ask("late", kind="llm")
    until(lambda: waiting(broker)["imagen"]["waiting_seconds"] > WHILE_TWO_WAIT, 10)
    broker.release(token)
    token = token_of(image)
    assert set(waiting(broker)) == {"late"}
    broker.release(token)
    assert third.result(20).json()["consumer"] == "ollama"
