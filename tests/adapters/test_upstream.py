"""One passed-on call on real sockets, step by step; what callers see of it is in tests/e2e/test_proxy_http.py."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpumgr.adapters.upstream import Exchange, upstream_of
from gpumgr.config import ConsumerSettings, ProxySettings
from gpumgr.runtime.ports import BackendError
from tests.certificates import self_signed
from tests.upstreams import OK, Upstream, Visit, answers, whole

PATIENCE_SECONDS = 20.0
LIMITS = ProxySettings(connect_timeout_seconds=0.4, idle_timeout_seconds=0.4)


@contextmanager
def exchange(url: str, limits: ProxySettings = LIMITS, **settings: Any) -> Iterator[Exchange]:
    made = Exchange(upstream_of(ConsumerSettings("it", settings.pop("dialect", "http"), url, **settings)), limits)
    try:
        yield made
    finally:
        made.close()


def error_of(call: Callable[[], object]) -> BackendError:
    with pytest.raises(BackendError) as caught:
        call()
    return caught.value


def whole_answer(made: Exchange) -> bytes:
    return b"".join(iter(made.read, b""))


@pytest.mark.parametrize(
    ("settings", "proxy_path", "prefix", "authority", "port"),
    [
        ({"url": "http://h:1"}, None, "", "h:1", 1),
        ({"url": "http://h"}, None, "", "h", 80),
        ({"url": "https://h/a/b"}, None, "/a/b", "h", 443),
        ({"url": "http://[::1]:7"}, None, "", "[::1]:7", 7),
        ({"url": "http://b\xfccher.example:7"}, None, "", "xn--bcher-kva.example:7", 7),
        ({"url": "http://h/\xfc"}, None, "/%C3%BC", "h", 80),
        ({"url": "http://h", "proxy_path": "/\xfc%20?a=b&c"}, "/%C3%BC%20?a=b&c", "", "h", 80),
        ({"url": "http://h", "dialect": "ollama"}, "/api/chat", "", "h", 80),
        ({"url": "http://h", "dialect": "comfyui"}, "/prompt", "", "h", 80),
        ({"url": "http://h", "dialect": "ollama", "proxy_path": "/v1/x"}, "/v1/x", "", "h", 80),
    ],
)
def test_where_calls_go(
    settings: dict[str, Any], proxy_path: str | None, prefix: str, authority: str, port: int
) -> None:
    found = upstream_of(ConsumerSettings("it", settings.pop("dialect", "http"), **settings))
    assert (found.proxy_path, found.prefix, found.authority, found.port) == (proxy_path, prefix, authority, port)


def test_the_head_leaves_with_the_first_piece() -> None:
    def script(visit: Visit) -> None:
        visit.body()
        visit.say(whole(b"ok"))

    with Upstream(script) as upstream, exchange(upstream.url) as made:
        made.ask("POST", "/x", [("Content-Length", "4")], chunked=False)
        assert made.send(b"bo")
        assert made.send(b"")
        assert made.send(b"dy")
        assert made.answer().length == 2
        assert whole_answer(made) == b"ok"
        assert made.is_over()
        assert upstream.visit.raw_body == b"body"


def test_pieces_become_chunks_and_none_of_them_the_last_one() -> None:
    with Upstream() as upstream, exchange(upstream.url) as made:
        made.ask("POST", "/x", [], chunked=True)
        for piece in (b"a", b"", b"x" * 20):
            assert made.send(piece)
        assert made.answer().status == 200
        assert upstream.visit.raw_body == b"1\r\na\r\n14\r\n" + b"x" * 20 + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "target", "header"),
    [
        ("GET", "/x\r\nX-Injected: 1", ("X-A", "b")),
        ("GET", "/x", ("X-A", "b\r\nX-Injected: 1")),
        ("GET", "/x", ("X-A", "b\nX-Injected: 1")),
        ("GET", "/x", ("X-A", "b\rX-Injected: 1")),
        ("GET", "/x", ("X-A\r\nX-Injected", "1")),
        ("GET", "/x", ("X-A", "b\0")),
        ("GET / HTTP/1.1\r\nX-Injected: 1\r\n", "/x", ("X-A", "b")),
        ("GET", "/x", ("X-A", "\u2028")),
    ],
)
def test_nothing_is_smuggled_into_the_head(method: str, target: str, header: tuple[str, str]) -> None:
    with Upstream() as upstream, exchange(upstream.url) as made:
        with pytest.raises(ValueError, match=r"end of a line|latin-1"):
            made.ask(method, target, [header], chunked=False)
        assert upstream.visits == []


def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with exchange(url) as made:
            error = error_of(lambda: made.ask("GET", "/", [], chunked=False))
    assert error.reason == "unreachable"
    assert str(error) == f"it at {url} cannot be reached (Connection refused)"


@pytest.mark.parametrize("host", ["nowhere.invalid", "x" * 70 + ".invalid"])
def test_a_name_that_is_none_is_unreachable(host: str) -> None:
    with exchange(f"http://{host}") as made:
        assert error_of(lambda: made.ask("GET", "/", [], chunked=False)).reason == "unreachable"


def test_a_connection_that_is_not_taken_is_unreachable_within_its_limit() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        with socket.create_connection(address):  # the only place in its backlog
            with exchange(f"http://127.0.0.1:{address[1]}") as made:
                began = time.monotonic()
                error = error_of(lambda: made.ask("GET", "/", [], chunked=False))
            assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert (error.reason, "within 0.4 s" in str(error)) == ("unreachable", True)


def test_a_port_that_speaks_no_tls_is_unreachable() -> None:
    with Upstream() as upstream, exchange(upstream.url.replace("http:", "https:")) as made:
        assert error_of(lambda: made.ask("GET", "/", [], chunked=False)).reason == "unreachable"


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 2", OK + b"X-A: b\r\n"])
def test_silence_before_the_answer_is_hung(said: bytes) -> None:
    def script(visit: Visit) -> None:
        visit.say(said)
        visit.until_gone()

    with Upstream(script) as upstream, exchange(upstream.url) as made:
        made.ask("GET", "/", [], chunked=False)
        error = error_of(made.answer)
    assert (error.reason, "0.4 s" in str(error)) == ("hung", True)


def test_a_request_that_is_not_taken_is_hung() -> None:
    with Upstream(lambda visit: visit.stall()) as upstream, exchange(upstream.url) as made:
        made.ask("PUT", "/", [("Content-Length", "100000000")], chunked=False)
        error = error_of(lambda: all(made.send(b"x" * 1_000_000) for _ in range(100)))
    assert error.reason == "hung"


def test_an_answer_instead_of_taking_more_ends_the_sending() -> None:
    def script(visit: Visit) -> None:
        visit.say(whole(b"no", status="413 No"))
        visit.stall()

    with Upstream(script) as upstream, exchange(upstream.url, ProxySettings(idle_timeout_seconds=60)) as made:
        made.ask("PUT", "/", [("Content-Length", "100000000")], chunked=False)
        assert not all(made.send(b"x" * 1_000_000) for _ in range(100))
        assert made.answer(whole=False).status == 413
        assert whole_answer(made) == b"no"


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (whole(b"half").replace(b"Length: 4", b"Length: 5"), b"half"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b""),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf", b"half"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b"half"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n+1\r\nx\r\n0\r\n\r\n", b"half"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n1_0\r\nx\r\n0\r\n\r\n", b"half"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n" + b"f" * 20 + b"\r\n", b"half"),
    ],
)
def test_an_answer_that_broke_off_is_never_whole(said: bytes, left: bytes) -> None:
    with Upstream(answers(said)) as upstream, exchange(upstream.url) as made:
        made.ask("GET", "/", [], chunked=False)
        made.answer()
        got: list[bytes] = []
        with pytest.raises(BackendError, match="broke off"):
            got.extend(iter(made.read, b""))
        assert b"".join(got) == left
        assert not made.is_over()


def test_a_cut_wakes_who_waits_for_the_answer_or_for_more_of_it() -> None:
    reading = threading.Event()

    def script(visit: Visit) -> None:
        if visit.target == "/begins":
            visit.say(OK + b"\r\nbegin")
        reading.set()
        visit.until_gone()

    for target in ("/silent", "/begins"):
        reading.clear()
        with (
            Upstream(script) as upstream,
            exchange(upstream.url, ProxySettings()) as made,
            ThreadPoolExecutor(1) as pool,
        ):
            made.ask("GET", target, [], chunked=False)
            call = pool.submit(lambda made=made: (made.answer(), whole_answer(made)))  # type: ignore[misc]
            assert reading.wait(PATIENCE_SECONDS)
            made.cut()
            # An answer that ends with its connection must not look whole because of the cut.
            assert isinstance(call.exception(PATIENCE_SECONDS), BackendError)
            assert upstream.visit.gone.wait(PATIENCE_SECONDS)


def test_after_a_cut_nothing_is_asked() -> None:
    with Upstream() as upstream, exchange(upstream.url) as made:
        made.cut()
        error_of(lambda: made.ask("POST", "/", [], chunked=False))
        error_of(made.answer)
        assert upstream.visits == []


def test_cut_and_close_in_any_order_do_no_harm() -> None:
    with Upstream() as upstream:
        for _ in range(50):
            with exchange(upstream.url) as made:
                made.ask("GET", "/", [], chunked=False)
                made.answer()
                cutting = threading.Thread(target=made.cut)
                cutting.start()
                made.close()
                cutting.join()
                made.cut()
                made.close()


def test_a_kind_answer_is_not_read_beyond_its_end() -> None:
    def script(visit: Visit) -> None:
        visit.say(whole(b"ok") + b"HTTP/1.1 200 OK\r\n")
        visit.until_gone()

    with Upstream(script) as upstream, exchange(upstream.url, ProxySettings()) as made:
        made.ask("GET", "/", [], chunked=False)
        made.answer()
        assert made.read() == b"ok"
        assert made.is_over()  # without waiting for the connection's end


def test_pieces_come_as_they_arrive() -> None:
    steps = [threading.Event() for _ in range(3)]

    def script(visit: Visit) -> None:
        visit.say(OK + b"\r\n")
        for number, step in enumerate(steps):
            assert step.wait(PATIENCE_SECONDS)
            visit.say(b"%d" % number)

    with Upstream(script) as upstream, exchange(upstream.url, ProxySettings()) as made:
        made.ask("GET", "/", [], chunked=False)
        made.answer()
        for number, step in enumerate(steps):
            step.set()
            assert made.read() == b"%d" % number
        assert made.read() == b""


def test_a_certificate_that_nobody_vouches_for_is_unreachable(tmp_path: Path) -> None:
    with Upstream(tls=self_signed(tmp_path).server()) as upstream, exchange(upstream.url) as made:
        error = error_of(lambda: made.ask("GET", "/", [], chunked=False))
    assert (error.reason, "certificate" in str(error)) == ("unreachable", True)
