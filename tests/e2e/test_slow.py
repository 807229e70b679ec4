"""Callers that send slowly: each is cut in the end, and until then it is in nobody's way who has a thread left.

The broker has eight threads, four of them reserved, and its worker waits for a head for 1 s instead of 10.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.brokers import RunningBroker
from tests.callers import PATIENCE_SECONDS, Caller
from tests.hasty_worker import HASTY_WORKER
from tests.nginx import Nginx
from tests.upstreams import Upstream

THREADS, RESERVED = 8, 4
MANY = 20
TRICKLE_SECONDS = 0.1
HEAD = b"POST /v1/lease HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODIES = {
    "length": (HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "in a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1000\r\n", b" "),
    "in its size": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x"),
}
"""What is sent at once, and what then comes again and again."""


class Trickle:
    """A caller that sends a little each 100 ms until it is cut or has an answer."""

    def __init__(self, port: int, first: bytes, piece: bytes) -> None:
        self.caller = Caller(port)
        self.caller.say(first)
        self._first, self._piece = first, piece
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.wait(TRICKLE_SECONDS):
                self.caller.say(self._piece)
        except OSError:
            pass  # it was cut

    def said(self) -> bytes:
        """What came until its connection was closed."""
        try:
            return self.caller.rest()
        except ConnectionResetError:
            return b""

    def __enter__(self) -> Trickle:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE_SECONDS)
        self.caller.leave()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream())
        broker = RunningBroker(tmp_path_factory.mktemp("slow"), config(upstream.url))
        stack.callback(broker.__exit__, None, None, None)
        yield broker.start("--worker-class", HASTY_WORKER)


def config(url: str) -> dict[str, Any]:
    consumer = {"dialect": "http", "url": url, "vram_resident_mib": 100, "health": {"path": "/health"}}
    return {
        "server": {"threads": THREADS, "reserved_threads": RESERVED},
        "gpu": {"probe": "simulated"},
        "routing": {"raw": "raw"},
        "consumers": {"raw": consumer},
    }


@pytest.fixture
def broker(shared: RunningBroker) -> Iterator[RunningBroker]:
    yield shared
    assert shared.status()["queue"] == []
    assert "Traceback" not in shared.log()


@pytest.fixture
def token(broker: RunningBroker) -> Iterator[str]:
    held = str(broker.acquire(kind="raw").json()["token"])
    yield held
    broker.release(held)


@pytest.mark.parametrize("first", [b"P", b"POST /v1/lease HTTP/1.1\r\n", HEAD], ids=["line", "headers", "last header"])
def test_a_head_that_trickles_is_cut(broker: RunningBroker, token: str, first: bytes) -> None:
    with Trickle(broker.port, first, b"x") as slow:
        assert broker.renew(token).status_code == 200
        assert slow.said() == b""
    assert broker.renew(token).status_code == 200


def test_a_head_that_comes_slowly_and_in_time_is_answered(broker: RunningBroker) -> None:
    with Caller(broker.port) as caller:
        for piece in (b"GET /healthz HT", b"TP/1.1\r\nHost: 127.0", b".0.1\r\n", b"\r\n"):
            caller.say(piece)
        assert caller.answer().status == 200


def test_a_body_that_trickles_is_refused(broker: RunningBroker, token: str) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(Trickle(broker.port, *framing)) for framing in BODIES.values()]
        assert broker.renew(token).status_code == 200
        assert broker.status()["leases"]
        answers = [each.said().partition(b"\r\n\r\n") for each in slow]
    for head, _, body in answers:
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"\r\nConnection: close\r\n" in head
        error = json.loads(body)["error"]
        assert (error["code"], error["message"]) == ("invalid_request", "the body did not come within 5 s")
    assert broker.renew(token).status_code == 200


@pytest.mark.parametrize("how", ["heads", "acquires", "renews"])
def test_many_of_them_do_not_stop_a_renew_for_longer_than_they_last(
    broker: RunningBroker, token: str, how: str
) -> None:
    """They may take every thread; each that is cut makes room, and a known connection goes ahead of the next one."""
    first, piece = (HEAD, b"x") if how == "heads" else BODIES["length"]
    if how == "renews":
        first = first.replace(b"/v1/lease ", f"/v1/lease/{token}/renew ".encode())
    with ExitStack() as stack:
        slow = [stack.enter_context(Trickle(broker.port, first, piece)) for _ in range(MANY)]
        assert broker.http.post(f"{broker.url}/v1/lease/{token}/renew", timeout=PATIENCE_SECONDS).status_code == 200
        for each in slow:
            each.said()
        assert broker.renew(token).status_code == 200


def test_nginx_keeps_slow_heads_and_lease_bodies_to_itself() -> None:
    with Upstream() as behind, Nginx(behind.port, client_timeout_seconds=1) as nginx, ExitStack() as stack:
        heads = [stack.enter_context(Trickle(nginx.port, HEAD, b"x")) for _ in range(MANY)]
        for framing in BODIES.values():
            stack.enter_context(Trickle(nginx.port, *framing))
        for slow in heads:
            assert b"\r\n\r\n" not in slow.said()  # it just closes
        with Caller(nginx.port) as caller:
            assert caller.ask("POST", "/v1/lease", body=b"{}").answer().body == b"ok"
        assert len(behind.visits) == 1
