"""A caller that hangs up while it waits, where its connection is not a bare one: behind gunicorn's own TLS, and behind
a real nginx, which has to pass the end on.

Whoever has gone leaves the queue, is noted as withdrawn, and is never granted: nobody behind it waits for its TTL.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import RunningBroker
from tests.callers import Caller
from tests.certificates import Certificate, self_signed
from tests.nginx import Nginx
from tests.upstreams import Upstream, answers, whole
from tests.waiting import until

JSON = "Content-Type: application/json"


@dataclass
class Way:
    """How callers reach the broker, and what it has done."""

    raw: Upstream
    broker: RunningBroker
    port: int
    certificate: Certificate | None = None

    def caller(self) -> Caller:
        caller = Caller(self.port)
        if self.certificate is not None:
            caller.sock = self.certificate.client().wrap_socket(caller.sock, server_hostname="127.0.0.1")
        return caller

    def waits(self, ask: Callable[[Caller], Caller]) -> Caller:
        """A caller that stands in the queue."""
        count = len(self.queue())
        caller = ask(self.caller())
        until(lambda: len(self.queue()) == count + 1)
        return caller

    def queue(self) -> list[dict[str, Any]]:
        return list(self.broker.status()["queue"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.broker.status()["events"] if event["type"] == kind]


def config(raw: Upstream) -> dict[str, Any]:
    consumer = {"dialect": "http", "url": raw.url, "vram_resident_mib": 100, "health": {"path": "/health"}}
    return {"gpu": {"probe": "simulated"}, "routing": {"raw": "raw"}, "consumers": {"raw": consumer}}


def behind_tls(directory: Path, stack: ExitStack) -> Way:
    raw, certificate = stack.enter_context(Upstream()), self_signed(directory)
    broker = RunningBroker(directory, config(raw))
    broker.url = broker.url.replace("http:", "https:")
    broker.http.trust_env = False
    broker.http.verify = str(certificate.file)
    stack.callback(broker.__exit__, None, None, None)
    broker.start("--certfile", str(certificate.file), "--keyfile", str(certificate.key))
    return Way(raw, broker, broker.port, certificate)


def behind_nginx(directory: Path, stack: ExitStack) -> Way:
    raw = stack.enter_context(Upstream())
    broker = stack.enter_context(RunningBroker(directory, config(raw)))
    return Way(raw, broker, stack.enter_context(Nginx(broker.port)).port)


@pytest.fixture(scope="module", params=[behind_tls, behind_nginx], ids=["tls", "nginx"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    with ExitStack() as stack:
        yield request.param(tmp_path_factory.mktemp("path"), stack)


@pytest.fixture
def way(shared: Way) -> Iterator[Way]:
    shared.raw.script = answers(whole(b"ok"))
    shared.raw.visits.clear()
    yield shared
    assert shared.broker.status()["leases"] == []
    assert "Traceback" not in shared.broker.log()


def lease(holder: str) -> Callable[[Caller], Caller]:
    body = json.dumps({"kind": "raw", "holder": holder}).encode()
    return lambda caller: caller.ask("POST", "/v1/lease", JSON, body=body)


def proxied(holder: str) -> Callable[[Caller], Caller]:
    return lambda caller: caller.ask("POST", f"/v1/raw/{holder}", body=b"hello")


def leave(caller: Caller, how: str) -> None:
    if how == "half-closed":
        socket.socket.shutdown(caller.sock, socket.SHUT_WR)
        return
    if how == "reset":
        caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    caller.leave()


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
def test_a_caller_that_hangs_up_gives_up_its_place(way: Way, how: str) -> None:
    held = way.broker.acquire(kind="raw").json()
    withdrawn, grants = len(way.events("withdraw")), len(way.events("grant"))
    gone, stays = way.waits(lease("gone")), way.waits(lease("stays"))
    with gone, stays:
        leave(gone, how)
        until(lambda: [entry["holder"] for entry in way.queue()] == ["stays"])
        way.broker.release(held["token"])
        answer = stays.answer()
        assert answer.status == 200
        way.broker.release(json.loads(answer.body)["token"])
    assert [event["holder"] for event in way.events("withdraw")[withdrawn:]] == ["gone"]
    assert [event["holder"] for event in way.events("grant")[grants:]] == ["stays"]


@pytest.mark.parametrize("how", ["closed", "reset", "half-closed"])
def test_a_proxied_caller_that_hangs_up_is_never_called(way: Way, how: str) -> None:
    held = way.broker.acquire(kind="raw").json()
    withdrawn = len(way.events("withdraw"))
    with way.waits(proxied("gone")) as gone, way.waits(proxied("stays")) as stays:
        leave(gone, how)
        until(lambda: len(way.queue()) == 1)
        way.broker.release(held["token"])
        assert stays.answer().body == b"ok"
    assert len(way.events("withdraw")) == withdrawn + 1
    assert [visit.target for visit in way.raw.visits] == ["/stays"]


def test_whoever_comes_after_many_that_left_is_granted(way: Way) -> None:
    held = way.broker.acquire(kind="raw").json()
    for caller in [way.waits(lease("gone")) for _ in range(20)]:
        caller.leave()
    until(lambda: way.queue() == [])
    grants = len(way.events("grant"))
    way.broker.release(held["token"])
    last = way.broker.acquire(kind="raw", holder="last", wait_seconds=5).json()
    way.broker.release(last["token"])
    assert [event["holder"] for event in way.events("grant")[grants:]] == ["last"]
