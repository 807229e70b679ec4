"""Thousands of wrong requests to a real broker: none of them is a defect of ours, and afterwards it still grants.

``NASTY`` are made by hand, each for a reason; the rest comes from a seeded dice, so that a failure comes again. Every
broker is asked on kept-alive connections while it keeps them.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import RunningBroker
from tests.callers import Answer, Caller
from tests.upstreams import Upstream, whole

pytestmark = pytest.mark.long
SECRET = "correct-horse-battery"  # noqa: S105 - it stands for one
ROUNDS = 1000
"""So many of the dice for each of two brokers."""
LIVES = 50
"""So many requests have a live lease in their paths, while none of them ends it."""
ANSWER_SECONDS = 0.4
"""A request that is not whole is given up after that."""
SHAPE = {"code", "message", "type", "retryable", "details"}

TARGETS = [
    *("/v1/lease", "/v1/lease/TOKEN", "/v1/lease/TOKEN/renew", "/v1/leases/ID", "/v1/status", "/healthz", "/readyz"),
    *("/v1/tts", "/v1/tts/x", "/v1/tts/", "/v1/tts/a/b?c=d", "/v1/leases", "/v1/models", "/v1/nobody", "/nowhere"),
    *("/v1/explain", "/v1/explain/x"),
    *("/", "", "*", "/v1", "/v1/", "//", "/v1//lease", "/v1/lease/", "/v1/lease//renew", "/V1/LEASE", "/v1/lease?x"),
    *("/v1/status?refresh=off", "/v1/status?format=json", "/v1/status?format=%00", "/v1/status?refresh=off&refresh=on"),
    *("/v1/lease/%00", "/v1/lease/%0d%0aX:1/renew", "/v1/lease/..%2f..", "/v1/lease/../status", "/v1/%2e%2e/healthz"),
    *("/v1/lease?request_id=x&holder=y", "/v1/leases/x?reason=%ff%fe", "/v1/leases/x?reason=" + "r" * 300),
    *("http://localhost/v1/status", "http://evil.example/v1/status", "http:///", "http://[::1", "http://a:b@c:d/"),
    *("/v1/tts/%", "/v1/tts/%zz", "/v1/tts/\xff\xfe", "/v1/lease/\xf0\x9f\x98\x80", "/" + "x" * 4000, "/v1/tts/\x7f"),
    *("/v1/lease;x=y", "/v1/lease#x", "?", "#", "%2fv1%2flease", "/v1%2flease", "/v1/lease/" + "t" * 3000),
]
METHODS = [
    *("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "QUERY"),
    *("get", "GE T", "", "G\x00T", "X" * 30, "POST\t", "M-SEARCH", "\xc3\x89"),
]
BODIES: list[bytes] = [
    *(b"", b"{", b"}", b"[]", b"null", b"0", b'"x"', b"\xff\xfe", b"\x00", b"{}" * 100, b"[" * 5000, b'{"a":' * 2000),
    *(b'{"kind":"tts"', b'{"kind":"tts",}', b"{'kind':'tts'}", b'{"kind":NaN}', b'{"kind":"tts","ttl_seconds":1e999}'),
    *(
        b'{"kind":"tts","kind":"tts"}',
        b'{"":""}',
        b'{"kind":""}',
        b'{"kind":null}',
        b'{"kind":["tts"]}',
        b'{"kind":{}}',
    ),
    *(b'{"consumer":"tts","kind":"tts"}', b'{"kind":"\\ud800"}', b'{"kind":"\\u0000"}', b'{"consumer":"../../x"}'),
    *(b'{"kind":"tts","wait_seconds":-1}', b'{"kind":"tts","ttl_seconds":true}', b'{"kind":"tts","ttl_seconds":0}'),
    *(
        b'{"ttl_seconds":5}',
        b'{"ttl_seconds":1e999}',
        b'{"ttl_seconds":-1}',
        b'{"ttl_seconds":null}',
        b'{"ttl_seconds":',
    ),
    *(b'{"kind":"tts","ttl_seconds":' + b"9" * 5000 + b"}", b'{"kind":"tts","ttl_seconds":"10"}', b'{"__proto__":1}'),
    *(b'{"kind":"tts","holder":' + json.dumps("h" * 129).encode() + b"}", b'{"kind":"tts","request_id":""}'),
    *(b"\xef\xbb\xbf{}", b"{}\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n", b" " * 70_000, b"a=b&c=d", b"--x\r\n\r\n--x--"),
    '{"kind":"\uff54ts"}'.encode(),
    *('{"kind":"tts"}'.encode("utf-16"), b'{"kind":"tts","priority":5}', b"1e400", b"-"),
]
TYPES = [
    *("application/json", "application/json; charset=utf-16", "text/plain", "", "application/x-www-form-urlencoded"),
    *("multipart/form-data; boundary=x", "multipart/form-data", "application/JSON;;;", "\xff", "a/b/c", "x" * 500),
]
HEADERS = [
    *("Host: evil.example", "Host: ", "Host: [::1", "Host: a,b", "Host: \xff", "Host: localhost:99999999", "Host: %00"),
    *(
        "Host: [::1%25eth0]",
        "Host: [evil]:1",
        "Host: " + "h" * 3000,
        "Host: @",
        "Host: a@b",
        "Host: ..",
        "Host: [1.2.3.4]",
    ),
    *("Origin: null", "Origin: http://evil.example", "Origin: http://[::1", "Origin: \xff", "Origin: http://a:b:c"),
    *("Origin: http://localhost:99999", "Origin: http://", "Origin: " + "o" * 3000, "Sec-Fetch-Site: cross-site"),
    *(f"Authorization: Bearer {SECRET}", "Authorization: Bearer", "Authorization: Basic !!!", "Authorization: Basic "),
    *(
        "Authorization: Basic /////w==",
        "Authorization: \xff",
        "Authorization: Bearer \xc3\xa9",
        "Authorization: Digest x",
    ),
    *("Accept: text/html", "Accept: */*;q=x", "Accept: ;;;,,,", "Accept: text/html;q=9e999", "Accept: " + "a/b," * 500),
    *(
        "X-GPU-Lease: nobody",
        "X-GPU-Lease: ",
        "X-GPU-Lease: \xff",
        "X-GPU-Wait: 0",
        "X-GPU-Wait: -1",
        "X-GPU-Wait: nan",
    ),
    *("X-GPU-Wait: 1e999", "X-GPU-Wait: \xb2", "Upgrade: websocket", "Connection: upgrade", "Connection: close"),
    *("Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 1e3", "Content-Length: 1, 1"),
    *("Transfer-Encoding: gzip", "Transfer-Encoding: chunked", "Transfer-Encoding: identity, chunked", "Trailer: x"),
    *("Expect: 100-continue", "Expect: x", "Range: bytes=0-", "If-None-Match: *", "If-Modified-Since: yesterday"),
    *("Cookie: a=b; \xff=;;;", "X-Forwarded-Proto: https", "X-Forwarded-Ssl: on", "SCRIPT_NAME: /x", "PATH_INFO: /x"),
    *("X-Forwarded-For: 1.2.3.4", "Forwarded: for=x", "REMOTE_USER: me", "X: " + "x" * 9000, "X\x00: 1", ": x", "x"),
    *(
        " folded",
        "X : 1",
        "X-\xff: 1",
        "Accept-Encoding: br",
        "Content-Encoding: gzip",
        "X-HTTP-Method-Override: DELETE",
    ),
]
H = b"Host: localhost\r\n"
NASTY: list[bytes] = [
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\x00" * 64, b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *(b"GET\r\n\r\n", b"GET /healthz\r\n\r\n", b"GET  /healthz HTTP/1.1\r\n\r\n", b"GET /healthz HTTP/1.1 x\r\n\r\n"),
    *(b"GET /healthz HTTP/0.9\r\n\r\n", b"GET /healthz HTTP/2.0\r\n\r\n", b"GET /healthz HTTQ/1.1\r\n\r\n"),
    *(b"GET /healthz HTTP/1.1\n\n", b"GET /healthz HTTP/1.1\r\nHost localhost\r\n\r\n", b" GET / HTTP/1.1\r\n\r\n"),
    b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + b"X: 1\r\n" * 200 + b"\r\n",
    b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
    b"POST /v1/lease HTTP/1.1\r\n" + H + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /v1/lease HTTP/1.1\r\n" + H + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/lease HTTP/1.0\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/lease HTTP/1.1\r\n" + H + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/lease HTTP/1.1\r\n"
    + H
    + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    b"POST /v1/lease HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
    b"POST /v1/lease HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    b"POST /v1/lease HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX\x00: 1\r\n\r\n",
    b"POST /v1/tts/x HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/tts/x HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
    b"POST /v1/tts/x HTTP/1.1\r\n" + H + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"GET /v1/tts/a b HTTP/1.1\r\n" + H + b"\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nSCRIPT_NAME: /elsewhere\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nSCRIPT_NAME: /v1\r\nPATH_INFO: /v1/lease\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n",
    b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET /healthz HTTP/1.1\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\n" + H + b"\r\nGET /healthz HTTP/1.1\r\n" + H + b"\r\nGARBAGE\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
    b"GET /v1/tts/ws HTTP/1.1\r\n" + H + b"Upgrade: websocket\r\nConnection: upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"GET /v1/status HTTP/1.1\r\n" + H + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"GET /v1/lease/x HTTP/1.1\r\n" + H + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n",
]


def config(upstream: Upstream, **server: Any) -> dict[str, Any]:
    tts = {"dialect": "http", "url": upstream.url, "vram_resident_mib": 100, "proxy_path": "/speak"}
    return {
        "server": server,
        "gpu": {"probe": "simulated"},
        "lease": {"min_ttl_seconds": 1, "default_ttl_seconds": 1, "default_wait_seconds": 0},
        "proxy": {"connect_timeout_seconds": 1, "idle_timeout_seconds": 1, "stall_timeout_seconds": 0.2},
        "routing": {"tts": "tts"},
        "consumers": {"tts": {**tts, "health": {"path": "/health"}, "max_concurrency": 100}},
    }


class Fuzz:
    """Requests on one connection, as long as the broker keeps it."""

    def __init__(self, broker: RunningBroker) -> None:
        self.broker = broker
        self.caller: Caller | None = None
        self.sent = 0
        self.statuses: dict[int, int] = {}

    def say(self, method: str, request: bytes) -> None:
        """One request and what comes of it. A request that is not whole gets no answer until it is given up."""
        self.sent += 1
        caller = self.caller = self.caller or self._connected()
        try:
            caller.sock.sendall(request)
            caller._method = method
            answer = caller.answer()
        except (OSError, http.client.HTTPException):
            self.end()
            return
        self.judge(request, answer)
        if "close" in answer.header("Connection"):
            self.end()

    def _connected(self) -> Caller:
        caller = Caller(self.broker.port)
        caller.sock.settimeout(ANSWER_SECONDS)
        return caller

    def end(self) -> None:
        if self.caller is not None:
            self.caller.leave()
        self.caller = None

    def judge(self, request: bytes, answer: Answer) -> None:
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        assert answer.status not in (500, 501), (request[:500], answer)
        if answer.status < 400 or not answer.body:
            return
        assert answer.header("Content-Type") == ["application/json"], (request[:500], answer)
        said = json.loads(answer.body)
        assert set(said["error"]) == SHAPE, (request[:500], answer)
        assert said["error"]["type"] == "gpumgr_error", (request[:500], answer)


def rolled(dice: random.Random, token: str, lease_id: str) -> tuple[str, bytes]:
    """Most are nearly right: what is wrong in everything is refused by whoever looks first."""
    method = dice.choice(METHODS[:6] if dice.random() < 0.8 else METHODS)
    target = dice.choice(TARGETS[:11] if dice.random() < 0.6 else TARGETS)
    target = target.replace("TOKEN", token).replace("ID", lease_id)
    body = dice.choice(BODIES) if dice.random() < 0.7 else dice.randbytes(dice.randrange(40))
    said = TYPES[0] if dice.random() < 0.7 else dice.choice(TYPES)
    lines = [f"Content-Type: {said}", f"Content-Length: {len(body)}", "Host: localhost"]
    lines += dice.sample(HEADERS, dice.choice((0, 0, 1, 1, 2, 4)))
    lines += [f"Authorization: Bearer {SECRET}"] if dice.random() < 0.8 else []
    if any(line.lower().startswith("host:") for line in lines[3:]):
        lines.remove("Host: localhost")
    if any(line.lower().startswith(("content-length:", "transfer-encoding:")) for line in lines[3:]):
        del lines[1]
    dice.shuffle(lines)
    head = "\r\n".join([f"{method} {target} HTTP/1.{dice.choice('111110')}", *lines, "", ""])
    raw = bytearray(head.encode("latin-1"))
    if dice.random() < 0.1:  # a byte that fell over on its way
        raw[dice.randrange(len(raw) - 4)] = dice.randrange(256)
    return method, bytes(raw) + body


@pytest.fixture(params=["off", "bearer"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    env = {"GPUMGR_TOKENS": f"fuzz:operate:{SECRET}"} if request.param == "bearer" else {}
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream(lambda visit: visit.say(whole(b"ok"))))
        yield stack.enter_context(RunningBroker(tmp_path, config(upstream, auth=request.param), env))


def test_nothing_that_is_said_breaks_it(broker: RunningBroker) -> None:
    dice = random.Random(20261125)  # noqa: S311 - it shall come again
    fuzz = Fuzz(broker)
    broker.http.headers["Authorization"] = f"Bearer {SECRET}"
    for request in NASTY:
        fuzz.say("GET", request)
        fuzz.end()
    for turn in range(ROUNDS):
        if turn % LIVES == 0:
            lease = broker.acquire(kind="tts", ttl_seconds=600).json()
        fuzz.say(*rolled(dice, lease["token"], lease["lease_id"]))
    fuzz.end()
    assert fuzz.sent >= 1000, "two thousand with both"
    assert sum(fuzz.statuses.values()) > 0.9 * fuzz.sent
    log = broker.log()
    assert "Traceback" not in log
    assert SECRET not in log

    for lease in broker.status()["leases"]:
        broker.release(lease["token"])
    found = broker.status()
    assert (found["leases"], found["queue"]) == ([], [])
    assert [consumer["in_use"] for consumer in found["consumers"]] == [None]
    granted = broker.acquire(kind="tts")
    assert granted.status_code == 200, granted.text
    assert broker.release(granted.json()["token"]).json() == {"released": True}


def test_a_caller_that_says_half_holds_nothing(broker: RunningBroker) -> None:
    with ExitStack() as stack:
        for half in (
            b"GET /hea",
            b"POST /v1/lease HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
            b"POST /v1/tts/x HTTP/1.1\r\n",
        ):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", broker.port)))
            with suppress(OSError):
                sock.sendall(half)
        broker.http.headers["Authorization"] = f"Bearer {SECRET}"
        assert broker.acquire(kind="tts").status_code == 200
