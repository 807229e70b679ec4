"""One call to a consumer that is passed through: its request sent and its answer read in pieces, nothing kept.

Owns: the connection, what is HTTP and what is not, and telling a whole answer from one that broke off. Must not: know
the caller, or change what is said.

A connection for each call, as in dialects/wire.py: one kept alive may be closed by the server just as we write on it,
and only some requests may be sent twice. http.client, with its own ways round what it is lenient about (Python 3.11
to 3.13, Lib/http/client.py, read 2026-11): it takes every 1xx but 100 for the answer, chunk sizes such as -5 for
numbers, a broken header line for the end of the headers, and the end of the connection for the end of the answer.
"""

from __future__ import annotations

import http.client
import re
import select
import socket
import ssl
import string
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import quote, urlsplit

from gpumgr.adapters.dialects import REGISTERED
from gpumgr.adapters.early import Early
from gpumgr.config import ConsumerSettings, ProxySettings
from gpumgr.config.free_paths import FreePath, free_path
from gpumgr.runtime.ports import BackendError, BackendReason

PIECE_BYTES = 64 * 1024
"""Small enough that a time limit for handing one on is a limit for standing still: with 60 s, below 1 KiB a second."""
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
NUMBER = re.compile(r"[0-9]{1,18}")
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
FIELD_VALUE = re.compile(r"[ \t\x21-\x7e\x80-\xff]*")
"""RFC 9110 section 5.5, as gunicorn holds it against what it sends."""
FOLD = re.compile(r"\r?\n[ \t]+")

Header = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a consumer's calls go. ``strips``: request headers it must not see, in small letters. ``headers``: those
    of the configuration, which may be keys."""

    consumer: str
    url: str
    tls: bool
    host: str
    port: int
    authority: str
    prefix: str
    proxy_path: str | None
    strips: frozenset[str]
    headers: tuple[Header, ...] = field(default=(), repr=False)
    free_paths: tuple[FreePath, ...] = ()


def upstream_of(settings: ConsumerSettings) -> Upstream:
    """Raises: ValueError where it has no address to pass anything on to."""
    if settings.url is None:
        raise ValueError(f"{settings.name} has no url")
    parts = urlsplit(settings.url)
    dialect = REGISTERED[settings.dialect]
    proxy_path = settings.proxy_path or dialect.proxy_path_default
    free = settings.proxy_free_paths
    return Upstream(
        consumer=settings.name,
        url=settings.url,
        tls=parts.scheme == "https",
        host=parts.hostname or "",
        port=parts.port or (443 if parts.scheme == "https" else 80),
        authority=parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode(),
        prefix=_escaped(parts.path),
        proxy_path=None if proxy_path is None else _escaped(proxy_path),
        strips=dialect.strips_headers,
        headers=settings.headers,
        free_paths=tuple(map(free_path, dialect.free_paths_default)) if free is None else free,
    )


def _escaped(path: str) -> str:
    """As it stands, but for what is not ASCII."""
    return quote(path, safe=string.punctuation)


@dataclass(frozen=True, slots=True)
class Head:
    """What an answer begins with. ``length`` is its Content-Length, also where it only says how long the body would
    be (HEAD, 304); None where it has none or must not have one."""

    status: int
    reason: str
    headers: Sequence[Header]
    length: int | None


class _Response(http.client.HTTPResponse):
    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        if status == http.client.SWITCHING_PROTOCOLS:
            raise http.client.BadStatusLine("101 to a request that did not ask for it")
        return version, http.client.CONTINUE if status < 200 else status, reason

    def _read_next_chunk_size(self) -> int:
        line = self.fp.readline(1024).partition(b";")[0].strip()
        if not CHUNK_SIZE.fullmatch(line):
            raise ValueError("no chunk size")  # what the caller of this method expects
        return int(line, 16)


class Exchange:
    """One request and its answer. One thread works with it; ``cut`` may come from any other, at any time.

    Every step raises BackendError: ``unreachable`` (no connection), ``hung`` (silent for the idle limit), ``failed``.
    """

    def __init__(self, upstream: Upstream, limits: ProxySettings) -> None:
        self.upstream = upstream
        self._limits = limits
        self._sock: socket.socket | None = None
        self._early: Early | None = None
        self._response: _Response | None = None
        self._method = ""
        self._chunked = False
        self._unsent = b""
        self._lock = threading.Lock()
        self._is_cut = False
        self._is_over = False

    def is_over(self) -> bool:
        """Every byte of the answer has been read."""
        return self._is_over

    def ask(self, method: str, target: str, headers: Iterable[Header], *, chunked: bool) -> None:
        """Connect. The request's head leaves with the first piece of its body, or without one with ``answer``.

        Raises: BackendError; ValueError where the request would not be one line for each header.
        """
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.upstream.authority}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines += ["Transfer-Encoding: chunked"] if chunked else []
        lines += ["Connection: close", "", ""]
        head = "\r\n".join(lines).encode("latin-1")
        if not head.count(b"\n") == head.count(b"\r") == len(lines) - 1 or b"\0" in head:
            raise ValueError("a header holds the end of a line")
        self._method, self._chunked, self._unsent = method, chunked, head
        self._connect()

    def send(self, piece: bytes) -> bool:
        """The next piece of the request's body. False: it answers, or has gone, instead of taking more; see ``answer``
        what it said."""
        if not piece:  # as a chunk it would be the last one
            return True
        return self._push(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)

    def wait_beside(self, fd: int, seconds: float) -> bool:
        """Until there is something to read from ``fd``, where the rest of the request's body comes from. False: it
        refuses, or has gone, before it has the whole; see ``answer`` what it said.

        Raises: BackendError; TimeoutError where nothing happens.
        """
        if self._unsent and not _is_readable(fd) and not self._push(b""):  # the head may be enough for a refusal
            return False
        if self._early is None:
            self._early = Early(self._connected(), tls=self.upstream.tls)
        return self._early.until_readable(fd, seconds)

    def answer(self, *, whole: bool = True) -> Head:
        """What the answer begins with, when it has come. ``whole``: the request's body was sent to its end."""
        if whole:
            self._push(b"0\r\n\r\n" if self._chunked else b"")
        response = self._response = _Response(self._connected(), method=self._method)
        try:
            response.begin()
        except TimeoutError:
            raise self._hung("said nothing") from None
        except http.client.RemoteDisconnected:
            raise self._error("failed", "closed the connection without an answer") from None
        except http.client.HTTPException as error:
            raise self._error("failed", f"answered something that is not HTTP ({type(error).__name__})") from None
        except OSError as error:
            raise self._error("failed", f"broke the connection before it answered ({_said(error)})") from None
        head = self._head(response)
        self._is_over = response.length == 0
        return head

    def read(self) -> bytes:
        """What has come of the answer, as soon as something has; empty at its end."""
        response = self._response
        if response is None:
            raise RuntimeError("there is no answer yet")
        try:
            piece = response.read1(PIECE_BYTES)
        except TimeoutError:
            raise self._hung("said nothing more in the middle of its answer") from None
        except (OSError, http.client.HTTPException, ValueError):
            raise self._broke_off() from None
        if self._is_cut or (not piece and response.length):
            raise self._broke_off()
        self._is_over = not piece or response.length == 0
        return piece

    def cut(self) -> None:
        """Whoever waits for this consumer wakes up, and nothing more is sent to it."""
        with self._lock:
            self._is_cut = True
            if self._sock is not None:
                with suppress(OSError):  # it closed it already
                    shut(self._sock)

    def close(self) -> None:
        with self._lock:
            sock, self._sock = self._sock, None
        if self._response is not None:
            self._response.close()
        if sock is not None:
            sock.close()

    # -- the connection -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        try:
            sock = self._open()
        except TimeoutError:
            seconds = self._limits.connect_timeout_seconds
            raise self._error("unreachable", f"cannot be reached within {seconds:g} s") from None
        except (OSError, ValueError) as error:  # ValueError: a host that cannot be encoded
            raise self._error("unreachable", f"cannot be reached ({_said(error)})") from None
        with self._lock:
            if not self._is_cut:
                self._sock = sock
                return
        sock.close()
        raise self._error("failed", "was not asked: the call was cut")

    def _open(self) -> socket.socket:
        up = self.upstream
        sock = socket.create_connection((up.host, up.port), self._limits.connect_timeout_seconds)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if up.tls:
                # A connection that ends without TLS' own goodbye was cut.
                sock = _tls().wrap_socket(sock, server_hostname=up.host, suppress_ragged_eofs=False)
            sock.settimeout(self._limits.idle_timeout_seconds)
        except BaseException:
            sock.close()
            raise
        return sock

    def _connected(self) -> socket.socket:
        if self._sock is None:
            raise self._error("failed", "is not connected")
        return self._sock

    def _push(self, data: bytes) -> bool:
        """False where the consumer takes no more: it has answered, closed or broken the connection."""
        sock = self._connected()
        view, self._unsent = memoryview(self._unsent + data), b""
        try:
            while view:
                if not self._has_room(sock):
                    return False
                view = view[sock.send(view) :]
        except TimeoutError:
            raise self._hung("took none of the request") from None
        except OSError:
            return False
        return True

    def _has_room(self, sock: socket.socket) -> bool:
        """Wait until it takes more; False where it says something instead. Raises: TimeoutError."""
        if self.upstream.tls:
            return True  # what can be read may be TLS talking about itself
        poll = select.poll()
        poll.register(sock, select.POLLIN | select.POLLOUT)
        ready = poll.poll(self._limits.idle_timeout_seconds * 1000)
        if not ready:
            raise TimeoutError
        return ready[0][1] != select.POLLIN

    # -- what it said ---------------------------------------------------------------------------------------

    def _head(self, response: _Response) -> Head:
        coding, length = response.getheader("transfer-encoding"), response.getheader("content-length")
        headers = [(name, FOLD.sub(" ", value)) for name, value in response.headers.items()]
        is_framed = (coding is None or response.chunked) and (length is None or NUMBER.fullmatch(length))
        is_said = all(FIELD_NAME.fullmatch(name) and FIELD_VALUE.fullmatch(value) for name, value in headers)
        if response.headers.defects or not (is_framed and is_said):
            raise self._error("failed", "answered something that is not HTTP (its headers)")
        has_length = length is not None and not response.chunked and response.status != http.client.NO_CONTENT
        reason = response.reason if FIELD_VALUE.fullmatch(response.reason) else ""
        return Head(response.status, reason, headers, int(length or 0) if has_length else None)

    def _hung(self, what: str) -> BackendError:
        return self._error("hung", f"{what} for {self._limits.idle_timeout_seconds:g} s")

    def _broke_off(self) -> BackendError:
        return self._error("failed", "broke off in the middle of its answer")

    def _error(self, reason: BackendReason, what: str) -> BackendError:
        return BackendError(reason, f"{self.upstream.consumer} at {self.upstream.url} {what}")


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def shut(sock: socket.socket) -> None:
    """End both directions; whoever reads or writes wakes up. Past TLS: ``SSLSocket.shutdown`` would make what another
    thread still writes plain text. Raises: OSError where the connection is gone already."""
    socket.socket.shutdown(sock, socket.SHUT_RDWR)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__)
