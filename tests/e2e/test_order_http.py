"""The order with few swaps, over HTTP: gunicorn and the simulated services."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from gpumgr.client import Gpu
from gpumgr.core.quantum import FACTOR, PATIENCE
from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.waiting import until

QUANTUM_SECONDS = 6.0
WHILE_FEW_WAIT = QUANTUM_SECONDS * PATIENCE / FACTOR


@pytest.fixture
def broker(tmp_path: Path, stage: Stage) -> Iterator[RunningBroker]:
    config: dict[str, Any] = stage.config() | {"scheduling": {"policy": "quantum", "quantum_seconds": QUANTUM_SECONDS}}
    config["lease"] = config.get("lease", {}) | {"min_hold_seconds": 0}
    config["routing"]["tts"] = {"consumer": "mvoice", "priority": "interactive"}
    with RunningBroker(tmp_path, config) as running:
        yield running


def waiting(broker: RunningBroker) -> dict[str, dict[str, Any]]:
    return {str(each["holder"]): each for each in broker.status()["queue"]}


class Asking:
    """Callers that wait, each on a thread of its own."""

    def __init__(self, broker: RunningBroker) -> None:
        self._broker = broker
        self.pool = ThreadPoolExecutor()

    def __call__(self, holder: str, **words: Any) -> Future[requests.Response]:
        asked = self.pool.submit(self._broker.acquire, holder=holder, **words)
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
    until(lambda: waiting(broker)["imagen"]["waiting_seconds"] > WHILE_FEW_WAIT, 10)
    broker.release(token)
    token = token_of(image)
    assert set(waiting(broker)) == {"late"}
    broker.release(token)
    assert third.result(20).json()["consumer"] == "ollama"


def test_how_urgent_a_call_is_comes_with_it_or_with_its_kind(broker: RunningBroker) -> None:
    """A voice goes ahead of an image that waits already, unless its caller says that it has time."""
    ask = Asking(broker)
    token = broker.acquire(kind="image").json()["token"]
    ask("job", kind="image")
    said = {"input": "hello"}
    for headers in ({}, {"X-GPU-Priority": "batch"}):
        ask.pool.submit(broker.http.post, f"{broker.url}/v1/tts", json=said, headers=headers, timeout=60)
    until(lambda: len(broker.status()["queue"]) == 3)
    rows = broker.status()["queue"]
    assert [(row["consumer"], row["priority"]) for row in rows if row["holder"] is None] == [
        ("mvoice", "interactive"),
        ("mvoice", "batch"),
    ]
    wrong = broker.http.post(f"{broker.url}/v1/tts", json=said, headers={"X-GPU-Priority": "now"}).json()["error"]
    assert (wrong["code"], wrong["details"]["field"]) == ("invalid_request", "X-GPU-Priority")
    broker.release(token)
    until(lambda: [row["consumer"] for row in broker.status()["leases"]] == ["comfyui"], 20)
    told = [event for event in broker.status()["events"] if event["type"] == "grant"]
    assert [event["holder"] for event in told] == [None, "job"]


def test_a_holder_makes_way_between_two_steps_and_comes_back(broker: RunningBroker) -> None:
    ask = Asking(broker)
    with Gpu(broker.url) as gpu, gpu.lease("image", holder="job", priority="batch") as lease:
        assert lease.yield_turn(0.0) is False, "nobody waits"
        first = lease.grant["lease_id"]
        voice = ask("ada", kind="tts")
        answer = lease.renew()
        assert (answer["yield_requested"], answer["yield_cause"]) == (True, "priority")
        assert "ada waits for mvoice" in answer["yield_reason"]
        given = ask.pool.submit(lease.yield_turn)
        token = token_of(voice)
        until(lambda: "job" in waiting(broker))
        ask("late", kind="image", priority="batch")
        broker.release(token)
        assert given.result(20) is True
        assert not lease.should_yield
        lease.check()
        assert set(waiting(broker)) == {"late"}
        assert lease.grant["lease_id"] != first
    until(lambda: [row["holder"] for row in broker.status()["leases"]] == ["late"], 20)
