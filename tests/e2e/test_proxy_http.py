"""The proxy routes, with the real broker between bare sockets: what a caller says arrives as it was said, what the
consumer answers arrives as it comes, and the GPU is held for exactly as long.

The broker has four places, so that a place which is not given back fails the tests that follow.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpumgr.sim.stage import MODEL
from tests.brokers import RunningBroker
from tests.callers import Answer, Caller
from tests.upstreams import OK, REPORTS, Upstream, Visit, answers, whole
from tests.waiting import until

NAMES = ("raw", "bare", "comfy", "llama")
SECRET = "sk-not-for-the-log"  # noqa: S105 - it stands for one
LONG_WAIT_SECONDS = 20.0
STALL_SECONDS = 0.6
IDLE_SECONDS = 0.8


class World:
    """One broker and the consumers behind it, each of them what a test's script says."""

    def __init__(self, directory: Path, stack: ExitStack, **proxy: float) -> None:
        self.upstreams = {name: stack.enter_context(Upstream()) for name in NAMES}
        self.broker = stack.enter_context(RunningBroker(directory, self._config(proxy)))
        self.port = self.broker.port

    def _config(self, proxy: dict[str, float]) -> dict[str, Any]:
        consumers = {name: self._consumer(name, upstream.url) for name, upstream in self.upstreams.items()}
        consumers["raw"]["max_concurrency"] = 4
        consumers["bare"]["proxy_path"] = "/speak?voice=a"
        consumers["comfy"]["dialect"] = "comfyui"
        consumers["llama"] |= {"dialect": "ollama", "url": f"{self.upstreams['llama'].url}/base"}
        return {
            "server": {"threads": 8, "reserved_threads": 4},
            "gpu": {"probe": "simulated"},
            "proxy": proxy,
            "routing": {name: name for name in NAMES},
            "consumers": consumers,
        }

    def _consumer(self, name: str, url: str) -> dict[str, Any]:
        return {
            "dialect": "http",
            "url": url,
            "vram_resident_mib": 100,
            "can_coexist_with": [other for other in NAMES if other != name],
            "health": {"path": "/health"},
        }

    @property
    def raw(self) -> Upstream:
        return self.upstreams["raw"]

    def reset(self) -> None:
        for upstream in self.upstreams.values():
            upstream.script = answers(whole(b"ok"))
            upstream.visits.clear()

    def in_use(self, name: str = "raw") -> object:
        return next(c["in_use"] for c in self.broker.status()["consumers"] if c["name"] == name)

    def until_free(self) -> None:
        """Of whoever has seen no end of his answer."""
        until(lambda: not any(self.in_use(name) for name in NAMES))

    def call(self, method: str, target: str | bytes, *headers: str, body: bytes = b"", version: str = "1.1") -> Answer:
        with Caller(self.port) as caller:
            return caller.ask(method, target, *headers, body=body, version=version).answer()


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("patient"), stack)


@pytest.fixture
def world(patient: World) -> Iterator[World]:
    patient.reset()
    yield patient
    patient.until_free()
    assert "Traceback" not in patient.broker.log()
    assert SECRET not in patient.broker.log()


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    limits = {"idle_timeout_seconds": IDLE_SECONDS, "stall_timeout_seconds": STALL_SECONDS}
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("impatient"), stack, **limits)


@pytest.fixture
def hasty(impatient: World) -> Iterator[World]:
    impatient.reset()
    yield impatient
    impatient.until_free()
    assert "Traceback" not in impatient.broker.log()


@pytest.fixture
def caller(world: World) -> Iterator[Caller]:
    with Caller(world.port) as caller:
        yield caller


# -- whose route it is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "M-SEARCH", "QUERY"]
)
def test_any_method_goes_to_the_consumer(world: World, method: str) -> None:
    assert world.call(method, "/v1/raw/x").body == b"ok"
    assert world.raw.visit.request_line == f"{method} /x HTTP/1.1"


@pytest.mark.parametrize(
    ("method", "target", "status", "code"),
    [
        ("PUT", "/v1/lease", 405, "method_not_allowed"),
        ("PROPFIND", "/v1/lease/nobody", 405, "method_not_allowed"),
        ("POST", "/v1/status", 405, "method_not_allowed"),
        ("GET", "/v1/models", 404, "not_found"),
        ("POST", "/v1/chat/completions", 404, "not_found"),
        ("GET", "/v1/lease/a/b/c", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/", 404, "not_found"),
        ("GET", "/v1//x", 404, "not_found"),
        ("GET", "/v1/Raw/x", 404, "not_found"),
        ("GET", "/v1/" + "x" * 33, 404, "not_found"),
        ("GET", "//v1/raw/x", 404, "not_found"),
        ("GET", "/v1%2Fraw/x", 404, "not_found"),
        ("GET", "/v1/video", 404, "kind_unknown"),
        ("POST", "/v1/video/x", 404, "kind_unknown"),
        ("GET", "/v1/leases-of-mine", 404, "kind_unknown"),
    ],
)
def test_gpumgrs_own_routes_and_words_stay_its_own(
    world: World, method: str, target: str, status: int, code: str
) -> None:
    answer = world.call(method, target)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert bool(answer.header("Allow")) == (status == 405)
    assert not any(upstream.visits for upstream in world.upstreams.values())


def test_an_unknown_kind_is_told_before_the_body_is_read(caller: Caller) -> None:
    answer = caller.ask("POST", "/v1/video/x", "Content-Length: 1000000000").answer()
    assert (answer.status, answer.error["code"]) == (404, "kind_unknown")


def test_a_kind_without_a_path_of_its_own_says_what_to_call(world: World) -> None:
    answer = world.call("POST", "/v1/raw?x=1", body=b"{}")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "/v1/raw/PATH" in answer.error["message"]
    assert "consumers.raw.proxy_path" in answer.error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        ("Connection: Upgrade", "Upgrade: websocket"),
        ("Connection: keep-alive, Upgrade", "Upgrade: WebSocket"),
        ("Upgrade: websocket",),
    ],
)
def test_websockets_are_refused_in_words(world: World, headers: tuple[str, ...]) -> None:
    answer = world.call("GET", "/v1/comfy/ws?clientId=1", *headers)
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert "/history/PROMPT_ID" in answer.error["message"]
    assert "take a lease and connect to its url" in answer.error["message"]


# -- what is passed on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "target"),
    [
        ("raw", "/v1/raw/a%2Fb%20c", "/a%2Fb%20c"),
        ("raw", "/v1/raw//x//", "//x//"),
        ("raw", "/v1/raw/", "/"),
        ("raw", "/v1/raw/?", "/?"),
        ("raw", "/v1/raw/a+b;c=d?e=f%20g&h+i=%26&j", "/a+b;c=d?e=f%20g&h+i=%26&j"),
        ("raw", "/v1/raw/%C3%BC/%ff?%0a", "/%C3%BC/%ff?%0a"),
        ("raw", "/v1/raw/\xfc?\xe4", "/\xfc?\xe4"),
        ("raw", "/v1/raw/a/../b/./c", "/a/../b/./c"),
        ("raw", "/v1/raw/x?y=http://z/?a", "/x?y=http://z/?a"),
        ("raw", "/v1/raw/v1/raw/x", "/v1/raw/x"),
        ("raw", "/v1/%72aw/x", "/x"),
        ("raw", "/v1/raw/x#part", "/x"),
        ("raw", "http://elsewhere:1/v1/raw/x?y", "/x?y"),
        ("raw", "/v1/raw/{}|\\^`\"<>'", "/{}|\\^`\"<>'"),
        ("bare", "/v1/bare", "/speak?voice=a"),
        ("bare", "/v1/bare?speed=2", "/speak?voice=a&speed=2"),
        ("bare", "/v1/bare/", "/"),
        ("bare", "/v1/bare/other?x", "/other?x"),
        ("comfy", "/v1/comfy", "/prompt"),
        ("comfy", "/v1/comfy?", "/prompt?"),
        ("llama", "/v1/llama", "/base/api/chat"),
        ("llama", "/v1/llama?x", "/base/api/chat?x"),
        ("llama", "/v1/llama/api/tags", "/base/api/tags"),
    ],
)
def test_path_and_query_arrive_byte_by_byte(world: World, name: str, asked: str, target: str) -> None:
    assert world.call("GET", asked).body == b"ok"
    assert world.upstreams[name].visit.request_line == f"GET {target} HTTP/1.1"


@pytest.mark.parametrize(
    "target", [b"/v1/raw/a\tb", b"/v1/raw/a\rb", b"/v1/raw/a\nb", b"/v1/raw/\x00", b"/v1/raw/\x7f"]
)
def test_a_control_character_in_the_path_goes_nowhere(world: World, target: bytes) -> None:
    answer = world.call("GET", target)
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert world.raw.visits == []


def test_headers_meant_for_the_consumer_arrive_and_no_others(world: World) -> None:
    world.call(
        "POST",
        "/v1/raw/x",
        "Authorization: Bearer " + SECRET,
        "Accept: text/event-stream",
        "Content-Type: application/x-strange",
        "Cookie: a=b; c=d",
        "X-Twice: 1",
        "X-Twice: 2",
        "Origin: http://page.example",
        "Connection: keep-alive, X-Private , close",
        "X-Private: for this hop",
        "Keep-Alive: timeout=5",
        "Proxy-Authorization: Basic " + SECRET,
        "Proxy-Authenticate: Basic",
        "Proxy-Connection: keep-alive",
        "TE: trailers",
        "Trailer: X-After",
        "Upgrade: h2c",
        "Expect: something-else",
        "X-GPU-Wait: 5",
        body=b"a=b",
    )
    assert sorted(world.raw.visit.headers) == [
        ("accept", "text/event-stream"),
        ("authorization", "Bearer " + SECRET),
        ("connection", "close"),
        ("content-length", "3"),
        ("content-type", "application/x-strange"),
        ("cookie", "a=b; c=d"),
        ("host", world.raw.url.removeprefix("http://")),
        ("origin", "http://page.example"),
        ("x-twice", "1,2"),
    ]


def test_a_bare_request_gets_no_header_of_ours(world: World) -> None:
    world.call("GET", "/v1/raw/x")
    assert [name for name, _ in world.raw.visit.headers] == ["host", "connection"]


def test_comfyui_sees_no_foreign_page(world: World) -> None:
    page = ("Origin: http://page.example", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: cors", "Accept: */*")
    world.call("GET", "/v1/comfy/history", *page)
    assert [name for name, _ in world.upstreams["comfy"].visit.headers] == ["host", "accept", "connection"]


def test_headers_of_the_answer_come_as_they_are(world: World) -> None:
    said = [
        ("Set-Cookie", "a=1; Path=/"),
        ("X-First", "\xe9t\xe9"),
        ("Set-Cookie", "b=2"),
        ("X-Empty", ""),
        ("Retry-After", "7"),
        ("Location", "/elsewhere"),
        ("Content-Type", "text/x-strange"),
    ]
    hop = ["Connection: X-Hop, close", "X-Hop: 1", "Keep-Alive: timeout=1", "Proxy-Authenticate: x", "Upgrade: h2c"]
    ours = ["Date: Tue, 01 Jan 2030 00:00:00 GMT", "Server: consumer"]
    lines = [f"{name}: {value}" for name, value in said]
    world.raw.script = answers(whole(b"ok", *hop, *lines, *ours, "X-Folded: one", "\t two", status="299 Quite So"))
    answer = world.call("GET", "/v1/raw/x")
    assert (answer.status, answer.reason) == (299, "Quite So")
    names = [name.lower() for name, _ in answer.headers]
    assert answer.headers[3:] == [*said, ("X-Folded", "one two"), ("Content-Length", "2")]
    assert names[:3] == ["server", "date", "connection"]  # gunicorn's own, once


def test_a_compressed_answer_stays_compressed(world: World) -> None:
    body = gzip.compress(b"x" * 1000)
    world.raw.script = answers(whole(body, "Content-Encoding: gzip"))
    answer = world.call("GET", "/v1/raw/x")
    assert (answer.body, answer.header("Content-Encoding")) == (body, ["gzip"])


@pytest.mark.parametrize("status", ["400 Bad", "404 Not Found", "422 Unprocessable", "500 Oh", "503 Busy"])
def test_the_consumers_own_errors_are_its_own(world: World, status: str) -> None:
    world.raw.script = answers(whole(b'{"error": "mine"}', "Content-Type: application/json", status=status))
    answer = world.call("POST", "/v1/raw/x", body=b"{}")
    assert (f"{answer.status} {answer.reason}", answer.body) == (status, b'{"error": "mine"}')
    assert not answer.header("x-should-retry")


# -- bodies -------------------------------------------------------------------------------------------------


def keeps_body(bodies: list[bytes]) -> Callable[[Visit], None]:
    def script(visit: Visit) -> None:
        bodies.append(visit.body())
        visit.say(whole(b"ok"))

    return script


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
@pytest.mark.parametrize("size", [0, 1, 5000, 70_000, 3_000_000])
def test_a_body_arrives_whatever_it_claims_to_be(world: World, kind: str, size: int) -> None:
    bodies: list[bytes] = []
    world.raw.script = keeps_body(bodies)
    body = random.Random(size).randbytes(size)  # noqa: S311
    headers = [f"Content-Type: {kind}"] * bool(kind)
    assert world.call("PUT", "/v1/raw/x", *headers, f"Content-Length: {size}", body=body).body == b"ok"
    assert bodies == [body]
    assert world.raw.visit.header("content-length") == str(size)


def test_a_chunked_body_stays_chunked(world: World) -> None:
    bodies: list[bytes] = []
    world.raw.script = keeps_body(bodies)
    chunks = b"5;ext=1\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\nX-Trailer: 1\r\n\r\n"
    with Caller(world.port) as caller:
        assert caller.ask("POST", "/v1/raw/x", "Transfer-Encoding: chunked", body=chunks).answer().body == b"ok"
        assert caller.ask("GET", "/v1/raw/y").answer().body == b"ok"  # the connection is still in step
    assert bodies == [b"hello world", b""]
    assert world.raw.visits[0].header("content-length") is None


def test_a_body_leaves_as_it_comes(world: World, caller: Caller) -> None:
    first, seen = threading.Event(), []

    def script(visit: Visit) -> None:
        seen.append(visit.take(6))
        first.set()
        seen.append(visit.take(6))
        visit.say(whole(b"ok"))

    world.raw.script = script
    caller.ask("POST", "/v1/raw/x", "Content-Length: 12", body=b"first ")
    assert first.wait(LONG_WAIT_SECONDS)
    caller.say(b"second")
    assert caller.answer().body == b"ok"
    assert seen == [b"first ", b"second"]


@pytest.mark.parametrize("coding", ["gzip, chunked", "deflate"])
def test_a_coding_that_would_be_lost_is_refused(world: World, coding: str) -> None:
    answer = world.call("POST", "/v1/raw/x", f"Transfer-Encoding: {coding}", body=b"0\r\n\r\n")
    assert (answer.status, answer.error["details"]) == (400, {"field": "Transfer-Encoding"})


def test_expect_100_is_answered_here(world: World, caller: Caller) -> None:
    caller.ask("POST", "/v1/raw/x", "Content-Length: 2", "Expect: 100-continue")
    assert caller.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.say(b"hi")
    assert caller.answer().body == b"ok"
    assert world.raw.visit.header("expect") is None


@pytest.mark.parametrize("size", [100_000, 40_000_000])
@pytest.mark.parametrize("then", ["closes", "stays", "resets"])
def test_an_answer_that_comes_before_the_body_was_read_is_passed_on(world: World, size: int, then: str) -> None:
    def script(visit: Visit) -> None:
        visit.say(whole(b"too large", status="413 Payload Too Large"))
        if then == "stays":
            visit.stall()
        elif then == "resets":
            visit.take(1000)
            visit.reset()

    world.raw.script = script
    with Caller(world.port) as caller:
        caller.ask("POST", "/v1/raw/x", f"Content-Length: {size}")
        try:
            for _ in range(0, size, 100_000):
                caller.say(b"x" * 100_000)
        except ConnectionError:
            pass  # nobody wants more of it
        answer = caller.answer()
    assert (answer.status, answer.body) == (413, b"too large")


PAUSED = {
    "length": ("Content-Length: 100", b"abc"),
    "length, nothing": ("Content-Length: 100", b""),
    "chunk": ("Transfer-Encoding: chunked", b"3\r\nabc\r\n"),
    "in a chunk": ("Transfer-Encoding: chunked", b"64\r\nabc"),
    "in its size": ("Transfer-Encoding: chunked", b"3\r\nabc\r\n6"),
    "chunked, nothing": ("Transfer-Encoding: chunked", b""),
}
"""Uploads that stand still: a header, and what is sent of the body. Their limit is longer than a test's patience."""


@pytest.mark.parametrize("framing", PAUSED)
@pytest.mark.parametrize("then", ["closes", "stays", "resets"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_refusal_is_passed_on_while_the_upload_pauses(
    world: World, caller: Caller, framing: str, then: str, pieces: int
) -> None:
    refusal = whole(b"too large", status="413 Payload Too Large")

    def script(visit: Visit) -> None:
        visit.say(refusal[: 5 * (pieces - 1)])
        visit.over.wait(0.02)
        visit.say(refusal[5 * (pieces - 1) :])
        if then == "stays":
            visit.until_gone()
        elif then == "resets":
            visit.reset()

    world.raw.script = script
    header, body = PAUSED[framing]
    answer = caller.ask("POST", "/v1/raw/x", header, body=body).answer()
    assert world.in_use() is None
    assert (answer.status, answer.body) == (413, b"too large")
    assert answer.header("Connection") == ["close"]
    assert caller.rest() == b""


@pytest.mark.parametrize("framing", PAUSED)
@pytest.mark.parametrize("how", ["closes", "resets"])
def test_a_consumer_that_dies_while_the_upload_pauses_is_502(
    world: World, caller: Caller, framing: str, how: str
) -> None:
    world.raw.script = Visit.reset if how == "resets" else Visit.close
    header, body = PAUSED[framing]
    answer = caller.ask("POST", "/v1/raw/x", header, body=body).answer()
    assert world.in_use() is None
    assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")


def test_a_consumer_that_has_answered_and_gone_ends_the_upload(world: World, caller: Caller) -> None:
    world.raw.script = lambda visit: visit.say(whole(b"enough"))
    assert caller.ask("POST", "/v1/raw/x", "Content-Length: 100", body=b"abc").answer().body == b"enough"
    assert world.in_use() is None


@pytest.mark.parametrize("early", [b"HTTP/1.1 100 Continue\r\n\r\n", OK, b"HTTP"])
def test_a_consumer_may_begin_its_answer_while_it_listens(world: World, caller: Caller, early: bytes) -> None:
    begun, heard = threading.Event(), []
    rest = whole(b"heard").removeprefix(early)

    def script(visit: Visit) -> None:
        heard.append(visit.take(3))
        visit.say(early)
        begun.set()
        heard.extend(visit.take(3) for _ in range(3))
        visit.say(rest)

    world.raw.script = script
    caller.ask("POST", "/v1/raw/x", "Content-Length: 12", body=b"abc")
    assert begun.wait(LONG_WAIT_SECONDS)
    for piece in (b"def", b"ghi", b"jkl"):
        until(lambda: world.in_use() == "proxy")
        caller.say(piece)
    answer = caller.answer()
    assert (answer.status, answer.body) == (200, b"heard")
    assert heard == [b"abc", b"def", b"ghi", b"jkl"]


@pytest.mark.parametrize("body", [b"5\r\nhel", b"ZZ\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n"])
def test_a_broken_body_is_the_callers_fault(world: World, body: bytes) -> None:
    with Caller(world.port) as caller:
        caller.ask("POST", "/v1/raw/x", "Transfer-Encoding: chunked", body=body)
        if body.endswith(b"hel"):
            return  # it leaves
        answer = caller.answer()
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


# -- answers ------------------------------------------------------------------------------------------------

CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
FRAMED = {
    "length": whole(b"hello"),
    "chunked": CHUNKED + b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nX-Trailer: 1\r\n\r\n",
    "close": OK + b"\r\nhello",
    "old": b"HTTP/1.0 200 OK\r\n\r\nhello",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nX: 1\r\n\r\n"
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + whole(b"hello"),
    "bare newlines": b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
    "both": OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "no reason": b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("framing", FRAMED)
def test_an_answer_is_whole_however_it_is_framed(world: World, caller: Caller, framing: str) -> None:
    world.raw.script = answers(FRAMED[framing])
    for _ in range(2):  # on one connection
        answer = caller.ask("GET", "/v1/raw/x").answer()
        assert world.in_use() is None  # whoever has seen the end may rely on it
        assert (answer.status, answer.body) == (200, b"hello")
        assert not answer.header("X-Trailer")
    old = world.call("GET", "/v1/raw/x", version="1.0")
    assert (old.body, old.header("Transfer-Encoding")) == (b"hello", [])


@pytest.mark.parametrize(
    ("method", "said", "length"),
    [
        ("HEAD", whole(b"", "ETag: x").replace(b"Length: 0", b"Length: 1234"), ["1234"]),
        ("HEAD", OK + b"ETag: x\r\nTransfer-Encoding: chunked\r\n\r\n", []),
        ("GET", b"HTTP/1.1 204 No Content\r\nETag: x\r\n\r\n", []),
        ("DELETE", b"HTTP/1.1 204 No Content\r\nETag: x\r\nContent-Length: 0\r\n\r\n", []),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 1234\r\n\r\n", ["1234"]),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", []),
        ("GET", whole(b"", "ETag: x"), ["0"]),
    ],
)
def test_an_answer_without_a_body_ends_at_once(
    world: World, caller: Caller, method: str, said: bytes, length: list[str]
) -> None:
    def script(visit: Visit) -> None:
        visit.say(said)
        visit.until_gone()  # it need not close for that

    world.raw.script = script
    for _ in range(2):
        answer = caller.ask(method, "/v1/raw/x").answer()
        assert world.in_use() is None
        assert (answer.body, answer.header("Content-Length"), answer.header("ETag")) == (b"", length, ["x"])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_tokens_leave_as_they_come_and_the_head_before_them(world: World, caller: Caller, version: str) -> None:
    steps = [threading.Event() for _ in range(4)]

    def script(visit: Visit) -> None:
        visit.body()
        visit.say(CHUNKED.replace(b"chunked\r\n", b"chunked\r\nContent-Type: text/event-stream\r\n"))
        for number, step in enumerate(steps):
            assert step.wait(LONG_WAIT_SECONDS)
            visit.say(b"8\r\ntoken %d\n\r\n" % number if number < 3 else b"0\r\n\r\n")

    world.raw.script = script
    response = caller.ask("POST", "/v1/raw/x", body=b"{}", version=version).head()
    assert response.getheader("Content-Type") == "text/event-stream"
    for number, step in enumerate(steps[:3]):
        assert world.in_use() == "proxy"
        step.set()
        assert response.read1(100) == b"token %d\n" % number
    steps[3].set()
    assert response.read() == b""
    assert world.in_use() is None


def test_a_large_answer_is_passed_on_unchanged(world: World) -> None:
    body = random.Random(1).randbytes(20_000_000)  # noqa: S311
    world.raw.script = answers(whole(body))
    assert world.call("GET", "/v1/raw/x").body == body


# -- answers that are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (b"", "without an answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not HTTP"),
        (b"HTTP/1.1 abc\r\n\r\n", "not HTTP"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nno colon here\r\nContent-Length: 0\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX-Bell: \x07\r\nContent-Length: 0\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX Y: 1\r\nContent-Length: 0\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "not HTTP"),
    ],
)
def test_no_answer_of_the_consumer_is_an_error_of_ours(world: World, said: bytes, what: str) -> None:
    world.raw.script = answers(said)
    with Caller(world.port) as caller:
        answer = caller.ask("POST", f"/v1/raw/x?key={SECRET}", body=b"hello").answer()
        assert world.in_use() is None
        assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")
        assert answer.error["retryable"]
        assert answer.header("Retry-After")
        assert answer.error["details"] == {"consumer": "raw"}
        assert what in answer.error["message"]
        world.raw.script = answers(whole(b"ok"))
        assert caller.ask("GET", "/v1/raw/x").answer().body == b"ok"


def test_a_consumer_that_refuses_is_502_and_its_health_is_asked_again(world: World) -> None:
    assert world.call("GET", "/v1/raw/x").body == b"ok"
    world.raw.stop_listening()
    try:
        answer = world.call("GET", "/v1/raw/x")
        assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")
        assert world.in_use() is None
        assert world.call("GET", "/v1/raw/x").error["code"] == "consumer_unhealthy"
    finally:
        world.raw.listen_again()
    until(lambda: world.call("GET", "/v1/raw/x").body == b"ok")


def dies(said: bytes, how: str) -> Callable[[Visit], None]:
    def script(visit: Visit) -> None:
        visit.body()
        visit.say(said)
        if how == "resets":
            visit.over.wait(0.05)  # so that the reset does not overtake what was said
            visit.reset()

    return script


@pytest.mark.parametrize("how", ["closes", "resets"])
@pytest.mark.parametrize(
    "said",
    [
        whole(b"half").replace(b"Length: 4", b"Length: 8"),
        CHUNKED + b"4\r\nhalf\r\n",
        CHUNKED + b"8\r\nhalf",
        CHUNKED + b"4\r\nhalf\r\n-5\r\nxxxxx\r\n0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_that_breaks_off_breaks_off_for_the_caller(world: World, said: bytes, how: str, version: str) -> None:
    world.raw.script = dies(said, how)
    began = len(world.broker.log())
    with Caller(world.port) as caller:
        caller.ask("GET", f"/v1/raw/x?key={SECRET}", version=version)
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            caller.answer()
    until(lambda: "a call got no answer consumer=raw" in world.broker.log()[began:])
    assert world.broker.log()[began:].count("WARNING") == 1
    assert "broke off in the middle of its answer" in world.broker.log()[began:]


def test_what_ends_with_a_reset_breaks_off_for_old_callers_too(world: World) -> None:
    world.raw.script = dies(OK + b"\r\nhalf", "resets")
    with Caller(world.port) as caller, pytest.raises(ConnectionResetError):
        caller.ask("GET", "/v1/raw/x", version="1.0").rest()


# -- callers that leave -------------------------------------------------------------------------------------


def silent(visit: Visit) -> None:
    visit.until_gone()


def streams(visit: Visit) -> None:
    visit.body()
    visit.say(CHUNKED)
    while not visit.over.is_set():
        visit.say(b"5\r\ntoken\r\n")
        visit.over.wait(0.005)


def floods(visit: Visit) -> None:
    visit.say(OK + b"\r\n")
    while not visit.over.is_set():
        visit.say(b"x" * 65536)


def takes_nothing(visit: Visit) -> None:
    visit.stall()


@pytest.mark.parametrize("leave", ["close", "half", "reset"])
@pytest.mark.parametrize("script", [silent, streams, floods, takes_nothing])
def test_the_gpu_is_free_when_the_caller_has_left(
    world: World, caller: Caller, script: Callable[[Visit], None], leave: str
) -> None:
    world.raw.script = script
    began = len(world.broker.log())
    caller.ask("POST", "/v1/raw/x", "Content-Length: 50000000", body=b"x" * 1000)
    until(lambda: world.in_use() == "proxy")
    until(lambda: world.raw.visits)
    if leave == "close":
        caller.leave()
    elif leave == "half":
        caller.sock.shutdown(socket.SHUT_WR)
    else:
        caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        caller.leave()
    until(lambda: world.in_use() is None, 1.0)
    until(lambda: "a caller left before its call was over consumer=raw" in world.broker.log()[began:])
    assert "WARNING" not in world.broker.log()[began:]  # the consumer did nothing wrong


def test_the_consumer_notices_that_the_caller_has_left(world: World, caller: Caller) -> None:
    world.raw.script = silent
    caller.ask("GET", "/v1/raw/x")
    visit = world.raw.visit
    caller.leave()
    assert visit.gone.wait(1.0)


def test_a_caller_that_left_while_it_waited_holds_nothing(world: World) -> None:
    lease = world.broker.acquire(kind="llama").json()
    with Caller(world.port) as caller:
        caller.ask("GET", "/v1/llama/x")
        until(lambda: world.broker.status()["queue"])
    world.broker.release(lease["token"])
    until(lambda: not world.broker.status()["queue"] and world.in_use("llama") is None)


# -- work that goes on after its answer ---------------------------------------------------------------------

NAMED = json.dumps({"prompt_id": "6b1f", "number": 1, "node_errors": {}}).encode()


class Prompts:
    """ComfyUI's part: one prompt, whose answer is what a test says, and which runs until it is ``done``."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, *said: bytes) -> None:
        self.said = said
        self.taken, self.answers, self.done = threading.Event(), threading.Event(), threading.Event()
        self.answers.set()
        self.world = world
        self.world.upstreams["comfy"].script = self.script
        monkeypatch.setitem(REPORTS, "/queue", b'{"queue_running": [[1, "6b1f"]], "queue_pending": []}')

    def script(self, visit: Visit) -> None:
        visit.body()
        self.taken.set()
        self.answers.wait(LONG_WAIT_SECONDS)
        visit.say(*self.said)

    def works(self) -> list[str]:
        comfy = next(c for c in self.world.broker.status()["consumers"] if c["name"] == "comfy")
        return [call["work"] for call in comfy["calls"]]

    def end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(REPORTS, "/queue", b'{"queue_running": [], "queue_pending": []}')
        monkeypatch.setitem(REPORTS, "/history/6b1f", b'{"6b1f": {}}')
        until(lambda: self.world.in_use("comfy") is None)


@pytest.mark.parametrize("compressed", [True, False])
def test_an_answer_that_names_work_is_passed_on_and_followed(
    world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    head, chunks = OK + b"Transfer-Encoding: chunked\r\n\r\n", (b"8\r\n%b\r\n" % NAMED[:8], NAMED[8:])
    prompts = Prompts(world, monkeypatch, head, chunks[0], b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunks[1]), chunks[1]))
    accepts = ("Accept-Encoding: gzip",) if compressed else ()
    assert caller.ask("POST", "/v1/comfy", *accepts, body=b"{}").answer().body == NAMED
    assert prompts.works() == ["prompt 6b1f"]
    assert world.upstreams["comfy"].visit.header("accept-encoding") is None  # it is read here
    prompts.end(monkeypatch)


def test_what_names_no_work_keeps_its_compression(world: World) -> None:
    world.call("PUT", "/v1/comfy/prompt", "Accept-Encoding: gzip")
    assert world.upstreams["comfy"].visit.header("accept-encoding") == "gzip"


def test_a_caller_that_leaves_before_the_answer_leaves_its_work_behind(
    world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Prompts(world, monkeypatch, whole(NAMED))
    prompts.answers.clear()
    caller.ask("POST", "/v1/comfy/prompt", body=b"{}")
    assert prompts.taken.wait(LONG_WAIT_SECONDS)
    caller.leave()
    world.raw.script = silent
    with Caller(world.port) as later:
        later.ask("GET", "/v1/raw/x")
        until(lambda: world.in_use() == "proxy")
    until(lambda: world.in_use() is None)  # whoever sees callers leave has seen the first one leave, too
    assert world.in_use("comfy") == "proxy"
    prompts.answers.set()
    until(lambda: prompts.works() == ["prompt 6b1f"])
    prompts.end(monkeypatch)


@pytest.mark.parametrize(
    "body", [NAMED[:-1] + b" " * 2_000_000 + b"}", b"no JSON", b"{}"], ids=["too large", "no JSON", "no id"]
)
def test_an_answer_that_cannot_be_followed_is_passed_on_all_the_same(
    world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    prompts = Prompts(world, monkeypatch, whole(body))
    assert caller.ask("POST", "/v1/comfy", body=b"{}").answer().body == body
    assert prompts.works() == []
    monkeypatch.undo()  # its tail is over


def test_half_an_answer_that_might_name_work_is_none(
    world: World, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    Prompts(world, monkeypatch, whole(NAMED)[:-3])
    answer = caller.ask("POST", "/v1/comfy", body=b"{}").answer()
    assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")
    monkeypatch.undo()


def test_a_free_path_needs_no_turn_and_fails_like_any_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(world, monkeypatch, whole(b"{}"))
    lease = world.broker.acquire(kind="comfy").json()
    assert world.call("GET", "/v1/comfy/history/x", "X-GPU-Wait: 0").body == b"{}"
    wrong = world.call("GET", "/v1/comfy/history/x", "X-GPU-Wait: soon")
    assert (wrong.status, wrong.error["code"]) == (400, "invalid_request")
    unknown = world.call("GET", "/v1/comfy/history/x", "X-GPU-Lease: nobody")
    assert (unknown.status, unknown.error["code"]) == (404, "lease_unknown")
    prompts.said = (b"nonsense\r\n\r\n",)
    failed = world.call("GET", "/v1/comfy/history/x")
    assert (failed.status, failed.error["code"]) == (502, "upstream_unreachable")
    world.broker.release(lease["token"])
    monkeypatch.undo()


# -- time limits --------------------------------------------------------------------------------------------


def test_a_consumer_that_says_nothing_is_504(hasty: World) -> None:
    hasty.raw.script = silent
    answer = hasty.call("POST", "/v1/raw/x", body=b"{}")
    assert hasty.in_use() is None
    assert (answer.status, answer.error["code"]) == (504, "upstream_timeout")
    assert answer.error["retryable"]
    assert f"{IDLE_SECONDS:g} s" in answer.error["message"]
    assert hasty.raw.visit.gone.wait(LONG_WAIT_SECONDS)


def test_a_consumer_that_takes_nothing_is_504(hasty: World) -> None:
    hasty.raw.script = takes_nothing
    with Caller(hasty.port) as caller, ThreadPoolExecutor(1) as pool:
        caller.ask("POST", "/v1/raw/x", "Content-Length: 50000000")
        sending = pool.submit(caller.say, *[b"x" * 100_000] * 500)
        assert caller.answer().error["code"] == "upstream_timeout"
        caller.leave()
        assert isinstance(sending.exception(LONG_WAIT_SECONDS), OSError)


def test_a_consumer_that_falls_silent_in_its_answer_breaks_it(hasty: World) -> None:
    def script(visit: Visit) -> None:
        visit.say(CHUNKED + b"5\r\ntoken\r\n")
        visit.until_gone()

    hasty.raw.script = script
    with Caller(hasty.port) as caller:
        response = caller.ask("GET", "/v1/raw/x").head()
        assert response.read1(100) == b"token"
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    assert hasty.raw.visit.gone.wait(LONG_WAIT_SECONDS)


def test_a_slow_consumer_is_not_cut(hasty: World) -> None:
    def script(visit: Visit) -> None:
        visit.body()
        for byte in whole(b"slow"):
            visit.over.wait(IDLE_SECONDS / 20)
            visit.say(bytes([byte]))

    hasty.raw.script = script
    began = time.monotonic()
    assert hasty.call("GET", "/v1/raw/x").body == b"slow"
    assert time.monotonic() - began > IDLE_SECONDS  # else it shows nothing


@pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
def test_a_body_that_stands_still_is_400(hasty: World, framing: str) -> None:
    hasty.raw.script = silent
    with Caller(hasty.port) as caller:
        answer = caller.ask("POST", "/v1/raw/x", framing, body=b"5\r\nhe").answer()
        assert hasty.in_use() is None
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert f"{STALL_SECONDS:g} s" in answer.error["message"]
    assert hasty.raw.visit.gone.wait(LONG_WAIT_SECONDS)


@pytest.mark.parametrize("said", [OK + b"\r\n", whole(b"").replace(b"Length: 0", b"Length: 100000000")])
def test_a_caller_that_takes_nothing_loses_its_call(hasty: World, said: bytes) -> None:
    ended = threading.Event()

    def script(visit: Visit) -> None:
        visit.say(said)
        try:
            while not visit.over.is_set():
                visit.say(b"x" * 65536)
        finally:
            ended.set()

    hasty.raw.script = script
    with Caller(hasty.port) as caller:
        caller.ask("GET", "/v1/raw/x").head()
        until(lambda: hasty.in_use() == "proxy")
        assert ended.wait(LONG_WAIT_SECONDS)  # its connection was closed
        until(lambda: hasty.in_use() is None)


def test_a_caller_that_takes_little_is_not_cut(hasty: World) -> None:
    # The kernel calls a socket writable when a third of its buffer is free: that can take longer than the limit.
    size = 6_000_000
    hasty.raw.script = answers(whole(b"x" * size))
    got = 0
    with Caller(hasty.port, receive_bytes=65536) as caller:
        response = caller.ask("GET", "/v1/raw/x").head()
        began = time.monotonic()
        while time.monotonic() - began < 6 * STALL_SECONDS:
            got += len(response.read1(10_000))
            time.sleep(STALL_SECONDS / 20)
        assert got < size / 2  # else it was not slow
        got += len(response.read())
    assert got == size


def test_a_kept_connection_has_no_time_limit_of_the_call(hasty: World) -> None:
    with Caller(hasty.port) as caller:
        assert caller.ask("GET", "/v1/raw/x").answer().body == b"ok"
        time.sleep(2 * STALL_SECONDS)
        assert caller.ask("GET", "/v1/raw/x").answer().body == b"ok"


# -- turns, leases, places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["", "x", "-1", "nan", "inf", "1e999", "1_0", "0x5", "5 s", "1, 2", "\xb2"])
def test_a_wait_that_is_no_number_is_refused(world: World, wait: str) -> None:
    answer = world.call("GET", "/v1/raw/x", f"X-GPU-Wait: {wait}")
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert answer.error["details"] == {"field": "X-GPU-Wait"}
    assert "X-GPU-Wait" in answer.error["message"]


@pytest.mark.parametrize("wait", ["0", "0.0", "5", "1.5", ".5", "2.", "1e3", "1e300", " 7 "])
def test_a_wait_is_a_number_of_seconds(world: World, wait: str) -> None:
    assert world.call("GET", "/v1/raw/x", f"X-GPU-Wait: {wait}").body == b"ok"


def test_a_call_waits_for_its_turn_as_long_as_it_says(world: World) -> None:
    lease = world.broker.acquire(kind="llama", holder="somebody").json()
    now_or_never = world.call("GET", "/v1/llama/x", "X-GPU-Wait: 0")
    assert (now_or_never.status, now_or_never.error["code"]) == (503, "scheduler_timeout")
    with Caller(world.port) as caller:
        caller.ask("POST", "/v1/llama/x", "X-GPU-Wait: 20", body=b"hello")
        until(lambda: world.broker.status()["queue"])
        assert world.upstreams["llama"].visits == []
        world.broker.release(lease["token"])
        assert caller.answer().body == b"ok"


def test_a_lease_passes_at_once(world: World) -> None:
    lease = world.broker.acquire(kind="llama").json()
    held = f"X-GPU-Lease: {lease['token']}"
    assert world.call("POST", "/v1/llama/x", held, body=b"hello").body == b"ok"
    assert world.call("GET", "/v1/llama/x", held, "X-GPU-Wait: 0").body == b"ok"
    assert world.upstreams["llama"].visit.header("x-gpu-lease") is None
    assert world.in_use("llama") == "lease"
    mismatch = world.call("GET", "/v1/raw/x", held)
    assert (mismatch.status, mismatch.error["code"]) == (409, "lease_mismatch")
    world.broker.release(lease["token"])
    over = world.call("GET", "/v1/llama/x", held)
    assert (over.status, over.error["code"]) == (404, "lease_unknown")
    assert lease["token"] not in world.broker.log()


def test_the_places_are_shared_and_kept_until_the_end(world: World) -> None:
    world.raw.script = streams
    with ExitStack() as stack:
        callers = [stack.enter_context(Caller(world.port)) for _ in range(4)]
        for caller in callers:
            caller.ask("GET", "/v1/raw/x").head()
        for full in (world.call("POST", "/v1/raw/x", body=b"hello"), world.call("GET", "/v1/llama/x")):
            assert (full.status, full.error["code"]) == (503, "queue_full")
            assert full.header("Retry-After")
        assert world.broker.acquire(kind="llama").json()["error"]["code"] == "queue_full"
        callers[0].leave()
        world.raw.script = answers(whole(b"ok"))
        until(lambda: world.call("GET", "/v1/raw/x").body == b"ok")
    world.until_free()


def test_one_call_at_a_time_where_the_consumer_takes_one(world: World, caller: Caller) -> None:
    going = threading.Event()

    def script(visit: Visit) -> None:
        assert going.wait(LONG_WAIT_SECONDS)
        visit.say(whole(b"ok"))

    world.upstreams["bare"].script = script
    with Caller(world.port) as second:
        caller.ask("GET", "/v1/bare")
        until(lambda: world.upstreams["bare"].visits)
        second.ask("GET", "/v1/bare/second")
        until(lambda: world.broker.status()["queue"])
        assert len(world.upstreams["bare"].visits) == 1
        going.set()
        assert caller.answer().body == second.answer().body == b"ok"


# -- memory, and the services as they are -------------------------------------------------------------------


def test_a_large_upload_is_not_kept(world: World, caller: Caller) -> None:
    size, piece = 200_000_000, b"x" * 1_000_000

    def script(visit: Visit) -> None:
        left = size
        while left:
            left -= len(visit.take(min(left, 1_000_000)))
        visit.say(whole(b"ok"))

    world.raw.script = script
    worker = psutil.Process(world.broker.worker_pid())
    before = most = worker.memory_info().rss
    caller.ask("POST", "/v1/raw/x", f"Content-Length: {size}")
    for _ in range(size // len(piece)):
        caller.say(piece)
        most = max(most, worker.memory_info().rss)
    assert caller.answer().body == b"ok"
    assert most - before < 50_000_000


def test_the_simulated_services_through_the_broker(broker: RunningBroker) -> None:
    def call(target: str, body: object = None, **headers: str) -> Any:
        method = "GET" if body is None else "POST"
        return broker.http.request(method, broker.url + target, json=body, headers=headers, timeout=30)

    assert call("/v1/tts", {"input": "hello"}).content.startswith(b"RIFF")
    said = call("/v1/llm", {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]})
    lines = [json.loads(line) for line in said.text.splitlines()]
    assert [line["done"] for line in lines[-2:]] == [False, True]
    openai = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    assert call("/v1/llm/v1/chat/completions", openai).text.endswith("data: [DONE]\n\n")
    page = {"Origin": "http://page.example", "Sec-Fetch-Site": "cross-site"}
    assert call("/v1/image/queue", **page).json() == {"queue_running": [], "queue_pending": []}
    assert call("/v1/image", {"prompt": {}}, **page).json()["node_errors"] == {}
    assert call("/v1/tts/nowhere").json() == {"error": "no route GET /nowhere"}
    assert [c["in_use"] for c in broker.status()["consumers"] if c["name"] != "comfyui"] == [None] * 3
