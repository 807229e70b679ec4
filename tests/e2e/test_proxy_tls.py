"""The proxy with TLS on both sides: what is told of a connection's end must not depend on what is read from it."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from tests.brokers import RunningBroker
from tests.certificates import Certificate, self_signed
from tests.upstreams import OK, Upstream, Visit, answers, whole
from tests.waiting import until

STALL_SECONDS = 0.6
HEAD = b"POST /v1/raw/x HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n"


class World:
    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.certificate: Certificate = self_signed(directory)
        self.raw = stack.enter_context(Upstream(tls=self.certificate.server()))
        config = {
            "gpu": {"probe": "simulated"},
            "proxy": {"stall_timeout_seconds": STALL_SECONDS},
            "routing": {"raw": "raw"},
            "consumers": {
                "raw": {
                    "dialect": "http",
                    "url": self.raw.url,
                    "vram_resident_mib": 100,
                    "health": {"path": "/health"},
                }
            },
        }
        trusted = str(self.certificate.file)
        self.broker = RunningBroker(directory, config, {"SSL_CERT_FILE": trusted})
        self.broker.url = self.broker.url.replace("http:", "https:")
        self.broker.http.trust_env = False
        self.broker.http.verify = trusted
        stack.callback(self.broker.__exit__, None, None, None)
        self.broker.start("--certfile", trusted, "--keyfile", str(self.certificate.key))

    def connected(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.broker.port), timeout=20)
        return self.certificate.client().wrap_socket(sock, server_hostname="127.0.0.1")

    def in_use(self) -> object:
        return self.broker.status()["consumers"][0]["in_use"]

    def post(self, body: bytes) -> requests.Response:
        return self.broker.http.post(f"{self.broker.url}/v1/raw/x", data=body, timeout=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("tls"), stack)


def test_both_ways_and_in_pieces(world: World) -> None:
    world.raw.script = answers(whole(b"ok"))
    assert world.post(b"x" * 3_000_000).text == "ok"
    assert world.raw.visits[-1].raw_body == b"x" * 3_000_000
    world.raw.script = answers(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert world.post(b"").text == "hello"


# TLS has a goodbye of its own: without it, what ends with the connection has broken off.
def test_a_connection_that_ends_without_goodbye_breaks_the_answer(world: World) -> None:
    world.raw.script = answers(OK + b"\r\nhalf")
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        world.post(b"")


# With TLS only the end is looked at: what can be read may be TLS talking about itself.
@pytest.mark.parametrize(("said", "status"), [(b"", 502), (whole(b"too large", status="413 Payload Too Large"), 413)])
def test_a_consumer_that_ends_while_the_upload_pauses_is_noticed(world: World, said: bytes, status: int) -> None:
    world.raw.script = lambda visit: visit.say(said)
    began = len(world.broker.log())
    with world.connected() as sock:
        sock.sendall(HEAD + b"abc")
        with http.client.HTTPResponse(sock) as response:
            response.begin()
            assert world.in_use() is None
            assert response.status == status
    assert "no byte of the body" not in world.broker.log()[began:]


def silent(visit: Visit) -> None:
    visit.until_gone()


def floods(visit: Visit) -> None:
    visit.say(OK + b"\r\n")
    while not visit.over.is_set():
        visit.say(b"x" * 65536)


def takes_nothing(visit: Visit) -> None:
    visit.stall()


@pytest.mark.parametrize("script", [silent, floods, takes_nothing])
def test_the_gpu_is_free_when_the_caller_has_left(world: World, script: Callable[[Visit], None]) -> None:
    world.raw.script = script
    with world.connected() as sock:
        sock.sendall(HEAD + b"x" * 1000)
        until(lambda: world.in_use() == "proxy")
    until(lambda: world.in_use() is None, 1.0)


def test_a_caller_that_takes_nothing_loses_its_call(world: World) -> None:
    world.raw.script = floods
    with world.connected() as sock:
        sock.sendall(HEAD.replace(b"Content-Length: 5000000\r\n", b""))
        with http.client.HTTPResponse(sock) as response:
            response.begin()
            until(lambda: world.in_use() == "proxy")
            until(lambda: world.in_use() is None)
    assert "Traceback" not in world.broker.log()
