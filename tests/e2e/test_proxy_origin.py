"""Whatever a caller writes, a proxy route calls the configured consumer and nobody else, with one request of one line
for each header.

``elsewhere`` is what every trick points at: a listener that nobody accepts from, so that one connection to it is seen
whatever was said on it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPException

import pytest

from tests.brokers import RunningBroker
from tests.callers import Answer, Caller
from tests.upstreams import Upstream, answers, whole


class World:
    def __init__(self, stack: ExitStack, upstreams: dict[str, Upstream], broker: RunningBroker) -> None:
        self.upstreams = upstreams
        self.broker = broker
        self.elsewhere = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.elsewhere.setblocking(False)
        self.evil = f"127.0.0.1:{self.elsewhere.getsockname()[1]}"

    def reset(self) -> None:
        for upstream in self.upstreams.values():
            upstream.script = answers(whole(b"ok"))
            upstream.visits.clear()

    def said(self, head: str, body: bytes = b"") -> Answer:
        """An answer to exactly this; EVIL is where nobody may be sent."""
        with Caller(self.broker.port) as caller:
            caller.say(head.replace("EVIL", self.evil).encode("latin-1") + body)
            return caller.answer()

    def call(self, target: str, *headers: str, method: str = "GET") -> Answer:
        return self.said("\r\n".join([f"{method} {target} HTTP/1.1", "Host: localhost", *headers, "", ""]))

    def nobody_went_elsewhere(self) -> bool:
        try:
            self.elsewhere.accept()[0].close()
        except BlockingIOError:
            return True
        return False


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream()) for name in ("tts", "base")}
        urls = {"tts": upstreams["tts"].url, "base": f"{upstreams['base'].url}/base/v2"}
        consumers = {
            name: {"dialect": "http", "url": url, "vram_resident_mib": 10, "health": {"path": "/health"}}
            for name, url in urls.items()
        }
        config = {"gpu": {"probe": "simulated"}, "routing": {"tts": "tts", "base": "base"}, "consumers": consumers}
        yield World(stack, upstreams, stack.enter_context(RunningBroker(tmp_path_factory.mktemp("origin"), config)))


@pytest.fixture
def world(running: World) -> Iterator[World]:
    running.reset()
    yield running
    assert running.nobody_went_elsewhere()
    for upstream in running.upstreams.values():
        for visit in upstream.visits:
            hosts = [value for name, value in visit.headers if name == "host"]
            assert hosts == [f"127.0.0.1:{upstream.port}"]
            assert visit.head.count(b"\n") == visit.head.count(b"\r\n") == len(visit.headers) + 1
            assert visit.request_line.endswith(" HTTP/1.1")
            assert visit.target.startswith("/")
    assert "Traceback" not in running.broker.log()


PASSED = [
    ("http://EVIL/v1/tts/x", "/x"),
    ("https://EVIL/v1/tts/x", "/x"),
    ("http://user:secret@localhost/v1/tts/x", None),
    ("/v1/tts//EVIL/x", "//EVIL/x"),
    ("/v1/tts///EVIL", "///EVIL"),
    ("/v1/tts/http://EVIL/", "/http://EVIL/"),
    ("/v1/tts/http:/EVIL/", "/http:/EVIL/"),
    ("/v1/tts/http%3A%2F%2FEVIL/", "/http%3A%2F%2FEVIL/"),
    ("/v1/tts/@EVIL/", "/@EVIL/"),
    ("/v1/tts/:1@EVIL/", "/:1@EVIL/"),
    ("/v1/tts/%40EVIL", "/%40EVIL"),
    ("/v1/tts@EVIL/", None),
    ("/v1/tts:80@EVIL/", None),
    ("/v1/tts.EVIL/", None),
    ("/v1/tts%40EVIL/", None),
    ("/v1/tts\\EVIL/", None),
    ("/v1/tts/\\\\EVIL\\x", "/\\\\EVIL\\x"),
    ("/v1/tts/../../EVIL", "/../../EVIL"),
    ("/v1/tts/..%2f..%2fhttp:%2f%2fEVIL", "/..%2f..%2fhttp:%2f%2fEVIL"),
    ("/v1/tts/%2e%2e/%2e%2e/etc", "/%2e%2e/%2e%2e/etc"),
    ("/v1/tts/x?url=http://EVIL/", "/x?url=http://EVIL/"),
    ("/v1/tts?//EVIL", None),
    ("/v1/tts/#@EVIL/", "/"),
    ("/v1/tts/%0d%0aHost:%20EVIL", "/%0d%0aHost:%20EVIL"),
    ("/v1/tts/%00", "/%00"),
    ("/v1/tts/%", "/%"),
    ("/v1/tts/%u002e", "/%u002e"),
    ("//EVIL/v1/tts/x", None),
    ("/\\EVIL/v1/tts/x", None),
    ("/v1/../v1/tts/x", None),
    ("/v1/tts/../../v1/lease", "/../../v1/lease"),
    ("v1/tts/x", None),
    ("@EVIL/v1/tts/x", None),
    ("EVIL", None),
    ("*", None),
    ("http:EVIL/v1/tts/x", None),
    ("http:///v1/tts/x", "/x"),
    ("http://localhost/http://EVIL/v1/tts/x", None),
]


@pytest.mark.parametrize(("target", "asked"), PASSED)
def test_a_target_is_a_path_of_the_consumers_own(world: World, target: str, asked: str | None) -> None:
    answer = world.call(target)
    if asked is None:
        assert 400 <= answer.status < 500
        assert world.upstreams["tts"].visits == []
    else:
        assert answer.body == b"ok"
        assert world.upstreams["tts"].visit.target == asked.replace("EVIL", world.evil)


@pytest.mark.parametrize("method", ["CONNECT", "POST", "PRI"])
def test_no_method_makes_a_tunnel(world: World, method: str) -> None:
    assert world.call("EVIL", method=method).status >= 400
    world.call("/v1/tts/x", method=method)


@pytest.mark.parametrize(
    "target",
    [
        *("/v1/base/..", "/v1/base/../", "/v1/base/../../admin", "/v1/base/x/../../y", "/v1/base/./../x"),
        *("/v1/base/%2e%2e/x", "/v1/base/.%2E/x", "/v1/base/..%2fx", "/v1/base/x%2f..%2f..%2fy", "/v1/base/..\\x"),
        *("/v1/base/..;a=b/x", "/v1/base//../../x", "/v1/base/%5c..%5c..", "/v1/base/..;/x"),
    ],
)
def test_the_urls_own_path_is_not_left(world: World, target: str) -> None:
    answer = world.call(target)
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert "/base/v2" in answer.error["message"]
    assert world.upstreams["base"].visits == []


@pytest.mark.parametrize("path", ["x/../y", "...", "..x", "x/..", "a/b/../../c", "%252e%252e/x", "?x=../..", "#/../.."])
def test_what_stays_below_the_urls_own_path_passes(world: World, path: str) -> None:
    assert world.call(f"/v1/base/{path}").body == b"ok"
    assert world.upstreams["base"].visit.target == f"/base/v2/{path.partition('#')[0]}"


@pytest.mark.parametrize(
    "header",
    [
        *("X-Forwarded-Host: EVIL", "X-Forwarded-Server: EVIL", "X-Forwarded-Proto: https", "X-Forwarded-Port: 1"),
        *("X-Forwarded-For: EVIL", "Forwarded: host=EVIL;proto=https", "X-Original-URL: http://EVIL/"),
        *("X-Rewrite-URL: //EVIL/", "X-Host: EVIL", "X-Forwarded-Prefix: //EVIL", "Base-Url: http://EVIL"),
        *("SCRIPT_NAME: /v1", "PATH_INFO: //EVIL/", "HTTP_HOST: EVIL", "RAW_URI: http://EVIL/", "SERVER_NAME: EVIL"),
        *("Script-Name: /v1/tts", "Raw-Uri: http://EVIL/x", "X-Accel-Redirect: http://EVIL/", "Proxy: http://EVIL"),
        *("Destination: http://EVIL/", "Referer: http://EVIL/", "Via: 1.1 EVIL", "Origin: http://EVIL"),
    ],
)
def test_no_header_says_where_to_call(world: World, header: str) -> None:
    assert world.call("/v1/tts/x", header).body == b"ok"
    assert world.upstreams["tts"].visit.target == "/x"


@pytest.mark.parametrize(
    "request_head",
    [
        "GET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\nX-A: 1\rHost: EVIL\r\n\r\n",
        "GET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\nX-A: 1\nHost: EVIL\r\n\r\n",
        "GET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\nX-A: 1\0Host: EVIL\r\n\r\n",
        "GET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\n Host: EVIL\r\n\r\n",
        "GET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\nX\nA: 1\r\n\r\n",
        "GET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\nX-A : 1\r\n\r\n",
        "GET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\n: 1\r\n\r\n",
        "GET /v1/tts/x\nHost:\tEVIL HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /v1/tts/x HTTP/1.1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /v1/tts/x HTTP/9.9\r\nHost: localhost\r\n\r\n",
        "G\rET /v1/tts/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_not_one_line_for_each_header_goes_nowhere(world: World, request_head: str) -> None:
    assert 400 <= world.said(request_head).status < 600
    assert world.upstreams["tts"].visits == []


@pytest.mark.parametrize(
    ("framing", "body"),
    [
        ("Content-Length: 4\r\nTransfer-Encoding: chunked", b"0\r\n\r\nGET /v1/tts/smuggled HTTP/1.1\r\n\r\n"),
        ("Content-Length: 4\r\nContent-Length: 5", b"xxxxx"),
        ("Content-Length: +4", b"xxxx"),
        ("Content-Length: 4, 4", b"xxxx"),
        ("Content-Length: -1", b""),
        ("Content-Length: 0x4", b"xxxx"),
        ("Transfer-Encoding: chunked, identity", b"0\r\n\r\n"),
        ("Transfer-Encoding: xchunked", b"0\r\n\r\n"),
        ("Transfer-Encoding:\x0bchunked", b"0\r\n\r\n"),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
        ("Transfer-Encoding: chunked", b"4;\r\nxxxx\r\n+1\r\nx\r\n0\r\n\r\n"),
        ("Transfer-Encoding: chunked", b"0x4\r\nxxxx\r\n0\r\n\r\n"),
        ("Transfer_Encoding: chunked\r\nContent-Length: 0", b""),
    ],
)
def test_a_body_has_one_length(world: World, framing: str, body: bytes) -> None:
    """Else what follows it would be a request of its own to one of the two servers."""
    with suppress(OSError, HTTPException):  # a connection that is closed without an answer is as good
        world.said(f"POST /v1/tts/x HTTP/1.1\r\nHost: localhost\r\nX-Type: 1\r\n{framing}\r\n\r\n", body)
    visits = world.upstreams["tts"].visits
    assert len(visits) <= 1
    assert not [visit for visit in visits if visit.target != "/x"]
    for visit in visits:
        framed = [name for name, _ in visit.headers if name in ("content-length", "transfer-encoding")]
        assert len(framed) <= 1


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("location", ["http://EVIL/", "//EVIL/", "/elsewhere"])
def test_a_redirect_is_passed_on_and_not_followed(world: World, status: str, location: str) -> None:
    where = location.replace("EVIL", world.evil)
    world.upstreams["tts"].script = answers(whole(b"", f"Location: {where}", status=status))
    answer = world.call("/v1/tts/x", "Content-Length: 0", method="POST")
    assert (f"{answer.status} {answer.reason}", answer.header("Location")) == (status, [where])
    assert len(world.upstreams["tts"].visits) == 1


def test_the_consumers_answer_cannot_begin_another(world: World) -> None:
    for broken in ("X-A: 1\0", "X A: 1", "\0: 1"):
        world.upstreams["tts"].script = answers(whole(b"", broken))
        answer = world.call("/v1/tts/x")
        assert (answer.status, answer.error["code"]) == (502, "upstream_unreachable")
