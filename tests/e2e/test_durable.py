"""Leases over kill -9, SIGHUP, a restart and a broken disk; callers that have gone; what computes after an expiry."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.callers import Caller
from tests.waiting import until

GRAPH = {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}


@pytest.fixture
def durable(tmp_path: Path, stage: Stage) -> Iterator[RunningBroker]:
    config = stage.config()
    config["lease"] = {"min_ttl_seconds": 0.5, "confirm_seconds": 1, "quarantine_seconds": 20}
    with RunningBroker(tmp_path, config) as running:
        yield running


def again(broker: RunningBroker, how: str) -> None:
    """The worker or the master is killed, the worker is replaced, or the whole is stopped and started."""
    broker.http.close()
    if broker.process is None:
        raise AssertionError
    old = broker.worker_pid()
    if how == "worker":
        os.kill(old, signal.SIGKILL)
    elif how == "SIGHUP":
        broker.process.send_signal(signal.SIGHUP)
    else:
        broker.stop(signal.SIGKILL if how == "master" else signal.SIGTERM)
        broker.start(wait=False)
    until(lambda: broker.worker_pid() != old and broker.serving_again(), 20)


@pytest.mark.parametrize("how", ["worker", "master", "SIGHUP", "restart"])
def test_a_lease_outlives_its_broker(durable: RunningBroker, how: str) -> None:
    first = durable.acquire(kind="llm", holder="chat")
    durable.release(first.json()["token"])
    lease = durable.acquire(kind="image", holder="imagen", ttl_seconds=60, request_id="r1").json()
    assert durable.renew(lease["token"], ttl_seconds=120).json()["ttl_seconds"] == 120
    before = durable.status()
    again(durable, how)
    found = durable.status()
    (live,) = found["leases"]
    assert [live[key] for key in ("token", "lease_id", "fence", "holder", "ttl_seconds")] == [
        *(lease[key] for key in ("token", "lease_id", "fence", "holder")),
        120,
    ]
    assert durable.acquire(kind="llm", wait_seconds=0).json()["error"]["code"] == "scheduler_timeout"
    assert durable.acquire(kind="image", holder="imagen", request_id="r1").json()["token"] == lease["token"]
    assert durable.renew(lease["token"]).status_code == 200
    assert durable.release(lease["token"]).json() == {"released": True}
    ended = durable.acquire(kind="image", holder="imagen", request_id="r1").json()["error"]
    assert (ended["code"], ended["details"]["reason"]) == ("request_ended", "released")
    assert durable.acquire(kind="llm").json()["fence"] > lease["fence"]
    assert totals(found) == totals(before)
    kinds = [event["type"] for event in durable.status()["events"]]
    assert kinds.count("start") == 2
    assert kinds.index("grant") < kinds.index("start", 1), "the events of the life before are shown"


def totals(status: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(c["name"], c["total_requests"], c["evictions"]) for c in status["consumers"]]


def test_an_expiry_that_was_told_stays_one(durable: RunningBroker) -> None:
    lease = durable.acquire(kind="image", ttl_seconds=0.5).json()
    until(lambda: durable.renew(lease["token"]).status_code == 404 if past(lease) else False)
    again(durable, "worker")
    assert durable.renew(lease["token"]).status_code == 404
    assert durable.status()["leases"] == []


def past(lease: dict[str, Any]) -> bool:
    return str(lease["expires_at"]) < time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time()))


def test_a_consumer_that_left_the_file_keeps_its_lease_and_its_gpu(durable: RunningBroker) -> None:
    lease = durable.acquire(kind="image", holder="imagen").json()
    config = yaml.safe_load(durable.config_file.read_text(encoding="utf-8"))
    del config["consumers"]["comfyui"], config["routing"]["image"]
    durable.config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    again(durable, "restart")
    assert durable.renew(lease["token"]).status_code == 200
    assert durable.acquire(kind="llm", wait_seconds=0).json()["error"]["code"] == "scheduler_timeout"
    assert durable.acquire(consumer="comfyui").json()["error"]["code"] == "consumer_unknown"
    assert {c["name"] for c in durable.status()["consumers"]} == {"ollama", "mvoice", "whisper"}
    durable.release(lease["token"])
    assert durable.acquire(kind="llm").status_code == 200


def test_another_boot_ends_them(durable: RunningBroker) -> None:
    lease = durable.acquire(kind="image", holder="imagen", request_id="r1").json()
    durable.stop()
    with closing(sqlite3.connect(durable.state_dir / "gpumgr.db")) as database, database:
        database.execute("UPDATE lease SET boot_id = 'the boot before'")
    durable.start()
    assert durable.renew(lease["token"]).status_code == 404
    ended = durable.acquire(kind="image", holder="imagen", request_id="r1").json()["error"]["details"]["reason"]
    assert ended == "host_reboot"
    assert durable.acquire(kind="llm").json()["fence"] > lease["fence"]


@pytest.mark.parametrize("content", ["damaged", "newer"])
def test_a_store_that_is_not_ours_is_refused_in_one_sentence(durable: RunningBroker, content: str) -> None:
    durable.stop()
    file = durable.state_dir / "gpumgr.db"
    if content == "damaged":
        file.write_bytes(b"no database" * 1000)
    else:
        with closing(sqlite3.connect(file)) as database:
            database.execute("PRAGMA user_version = 9")
    before = file.read_bytes()
    durable.start(wait=False)
    assert durable.process is not None
    assert durable.process.wait(15) == 2
    last = durable.log().splitlines()[-1]
    assert last.startswith("gpumgr: ")
    assert "move" in last
    assert file.read_bytes() == before


def test_a_full_disk_stops_grants_and_no_lease(durable: RunningBroker) -> None:
    lease = durable.acquire(kind="llm", ttl_seconds=60).json()
    worker = psutil.Process(durable.worker_pid())
    unlimited = worker.rlimit(psutil.RLIMIT_FSIZE)
    worker.rlimit(psutil.RLIMIT_FSIZE, (4096, unlimited[1]))  # every write beyond that fails, as on a full disk
    refused = durable.acquire(kind="tts")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert durable.renew(lease["token"]).status_code == 200
    assert durable.renew(lease["token"], ttl_seconds=300).json()["ttl_seconds"] == 300
    found = durable.status()
    assert found["store"]["ok"] is False
    ready = durable.http.get(f"{durable.url}/readyz", timeout=5)
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "store_unavailable")
    assert "gpumgr.db" in ready.json()["missing"][0]
    assert durable.release(lease["token"]).json() == {"released": True}
    worker.rlimit(psutil.RLIMIT_FSIZE, unlimited)
    until(lambda: durable.status()["store"]["ok"], 10)
    assert durable.acquire(kind="tts").status_code == 200
    again(durable, "worker")
    assert [each["consumer"] for each in durable.status()["leases"]] == ["mvoice"], "the release was written down"


# -- callers that have gone ---------------------------------------------------------------------------------


def lease_body(**body: Any) -> bytes:
    return requests.Request("POST", "http://x", json=body).prepare().body or b""  # type: ignore[return-value]


def asks(broker: RunningBroker, **body: Any) -> Caller:
    """Waits in the queue on a connection of its own."""
    count = len(broker.status()["queue"])
    caller = Caller(broker.port).ask("POST", "/v1/lease", "Content-Type: application/json", body=lease_body(**body))
    until(lambda: len(broker.status()["queue"]) == count + 1)
    return caller


def leave(caller: Caller, how: str) -> None:
    if how == "half-closed":
        caller.sock.shutdown(socket.SHUT_WR)
        return
    if how == "reset":
        caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    caller.leave()


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
def test_a_caller_that_hangs_up_gives_up_its_place(durable: RunningBroker, how: str) -> None:
    lease = durable.acquire(kind="image").json()
    gone, stays = asks(durable, kind="llm", holder="gone"), asks(durable, kind="llm", holder="stays")
    with stays:
        leave(gone, how)
        until(lambda: [entry["holder"] for entry in durable.status()["queue"]] == ["stays"])
        durable.release(lease["token"])
        assert stays.answer().status == 200
    gone.leave()
    events = [event for event in durable.status()["events"] if event["type"] == "withdraw"]
    assert [event["holder"] for event in events] == ["gone"]


def test_a_proxied_caller_that_hangs_up_in_the_queue_is_never_called(durable: RunningBroker, stage: Stage) -> None:
    lease = durable.acquire(kind="image").json()
    with Caller(durable.port) as caller:
        caller.ask("POST", "/v1/tts", "Content-Type: application/json", body=b'{"input": "nobody hears this"}')
        until(lambda: len(durable.status()["queue"]) == 1)
    until(lambda: durable.status()["queue"] == [])
    durable.release(lease["token"])
    assert durable.acquire(kind="stt").status_code == 200
    assert stage.services["mvoice"].ledger.work_calls == 0


def test_a_request_lives_while_one_of_its_callers_does(durable: RunningBroker) -> None:
    lease = durable.acquire(kind="image").json()
    first = asks(durable, kind="llm", request_id="r1")
    with Caller(durable.port) as second:
        body = lease_body(kind="llm", request_id="r1")
        second.ask("POST", "/v1/lease", "Content-Type: application/json", body=body)
        first.leave()
        durable.release(lease["token"])
        assert second.answer().status == 200


def test_one_may_withdraw_and_give_back_by_request_id(durable: RunningBroker) -> None:
    def withdraw(query: str) -> Any:
        return durable.http.delete(f"{durable.url}/v1/lease?{query}", timeout=10)

    held = durable.acquire(kind="image", holder="a", request_id="r1").json()
    with asks(durable, kind="llm", holder="b", request_id="r1") as waiting:
        assert withdraw("request_id=r1").json() == {"withdrawn": False}, "another holder's"
        assert withdraw("request_id=r1&holder=b").json() == {"withdrawn": True}
        assert waiting.answer().error["details"]["reason"] == "withdrawn"
    assert withdraw("request_id=r1&holder=a").json() == {"released": True}
    assert withdraw("request_id=r1&holder=a").json() == {"withdrawn": False}
    assert durable.renew(held["token"]).status_code == 404
    once_more = durable.acquire(kind="llm", holder="b", request_id="r1")
    assert once_more.status_code == 200, "a withdrawn id may be used again"
    for query in ("", "request_id=", "request_id=a&request_id=b", "request_id=a&who=b", "request_id=" + "x" * 129):
        assert withdraw(query).status_code == 400, query


@pytest.mark.parametrize("asks_again", [True, False])
@pytest.mark.parametrize("request_id", [None, "r1"])
def test_a_grant_whose_caller_left_before_the_answer_is_given_back(
    durable: RunningBroker, request_id: str | None, asks_again: bool
) -> None:
    """With a request_id it is kept for a moment, for the retry."""
    named = {} if request_id is None else {"request_id": request_id}
    with closing(sqlite3.connect(durable.state_dir / "gpumgr.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # the grant cannot be written down yet
        caller = Caller(durable.port)
        body = lease_body(kind="llm", **named)
        caller.ask("POST", "/v1/lease", "Content-Type: application/json", body=body)
        until(lambda: [entry["step"] for entry in durable.status()["queue"]] == ["writing the grant down"])
        caller.leave()
        other.execute("ROLLBACK")
    if request_id is not None and asks_again:
        kept = durable.acquire(kind="llm", **named)
        assert kept.status_code == 200
        assert durable.release(kept.json()["token"]).json() == {"released": True}
    assert durable.acquire(kind="image", wait_seconds=10).status_code == 200
    events = durable.status()["events"]
    assert [event["lease_id"] for event in events if event["type"] == "release"] == [
        event["lease_id"] for event in events if event["type"] == "grant"
    ][:1]


# -- quarantine ---------------------------------------------------------------------------------------------


def prompts(url: str) -> tuple[int, int]:
    queue = requests.get(f"{url}/queue", timeout=5).json()
    return len(queue["queue_running"]), len(queue["queue_pending"])


def test_what_an_expired_holder_left_running_is_ended_before_the_next_grant(
    durable: RunningBroker, stage: Stage
) -> None:
    stage.services["comfyui"].render_seconds = 4.0  # type: ignore[attr-defined]
    lease = durable.acquire(kind="image", ttl_seconds=1).json()
    for _ in range(3):
        requests.post(f"{lease['url']}/prompt", json=GRAPH, timeout=5).raise_for_status()
    until(lambda: prompts(lease["url"]) == (1, 2))
    granted = durable.acquire(kind="llm", wait_seconds=30)
    assert granted.status_code == 200
    assert prompts(lease["url"]) == (0, 0)
    assert stage.card.over_commits == 0
    assert stage.services["comfyui"].unloads_while_busy == 0


def test_a_quarantine_survives_a_restart(durable: RunningBroker, stage: Stage) -> None:
    config = yaml.safe_load(durable.config_file.read_text(encoding="utf-8"))
    config["consumers"]["comfyui"]["on_expiry"] = "wait"
    durable.config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    again(durable, "restart")
    stage.services["comfyui"].render_seconds = 60.0  # type: ignore[attr-defined]
    lease = durable.acquire(kind="image", ttl_seconds=0.5).json()
    requests.post(f"{lease['url']}/prompt", json=GRAPH, timeout=5).raise_for_status()

    def in_use() -> Any:
        return next(c["in_use"] for c in durable.status()["consumers"] if c["name"] == "comfyui")

    until(lambda: in_use() == "quarantine", 5)
    again(durable, "worker")
    assert in_use() == "quarantine"
    assert durable.renew(lease["token"]).status_code == 404
    assert durable.acquire(kind="llm", wait_seconds=0.3).json()["error"]["code"] == "scheduler_timeout"


def test_a_holder_that_had_finished_costs_nothing(durable: RunningBroker) -> None:
    durable.acquire(kind="llm", ttl_seconds=0.5)
    assert durable.acquire(kind="tts", wait_seconds=5).status_code == 200
    assert durable.acquire(kind="stt", wait_seconds=5).status_code == 200


def test_a_slow_disk_stops_no_renew(durable: RunningBroker) -> None:
    lease = durable.acquire(kind="image", ttl_seconds=60).json()
    with closing(sqlite3.connect(durable.state_dir / "gpumgr.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # whoever writes now waits
        writer = threading.Thread(target=durable_acquire, args=(durable.url,))
        writer.start()
        for _ in range(20):
            assert requests.post(f"{durable.url}/v1/lease/{lease['token']}/renew", timeout=5).status_code == 200
        other.execute("ROLLBACK")
        writer.join(20)


def durable_acquire(url: str) -> None:
    requests.post(f"{url}/v1/lease", json={"kind": "stt", "wait_seconds": 0}, timeout=20)
