"""One HTTP call to a consumer or a container engine, over after a stated time whatever the server does.

Owns: the connection, its deadline, and turning every failure into BackendError. Must not: know what is called.

http.client and not requests: a time limit of requests holds for each read of the socket, so that a server that
drips a byte a second never ends the call; here the socket itself is shut when the time is over. It also knows
nothing of proxies, .netrc, redirects or compression, which are not for a consumer's own address.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gpumgr.runtime.ports import BackendError

CONNECT_SECONDS = 2.0
LARGEST_ANSWER_BYTES = 4 * 2**20
SHORTEST_KEY = 8
"""Shorter words of a header (Bearer) are no secret."""
Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's whole answer. ``asked`` is for the error's sentence; what it was told in ``headers`` is not, also
    where it says it again: "no such key: …"."""

    asked: str
    status: int
    body: bytes
    headers: Headers = field(default=(), repr=False)

    def require(self) -> Answer:
        """Raises: BackendError where the status says no. A redirect is an answer that nobody configured."""
        if self.status >= 300:
            said = " ".join(self._hidden(self.body.decode(errors="replace"))[:200].split())
            raise BackendError("failed", f"{self.asked} answers {self.status} {said}".rstrip())
        return self

    def _hidden(self, said: str) -> str:
        for word in (word for _, value in self.headers for word in value.split()):
            said = said.replace(word, "[hidden]") if len(word) >= SHORTEST_KEY else said
        return said

    def json(self) -> Any:
        """Raises: BackendError."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise BackendError("failed", f"{self.asked} answers something that is not JSON") from None


def send(
    method: str, url: str, path: str, *, body: Any = None, headers: Headers = (), timeout_seconds: float
) -> Answer:
    """One request on a connection of its own: one kept alive may be closed by the server just as we write on it, and
    an unload that fails for that reason would cost a second. ``url``: also ``unix:/path`` of a socket.

    Raises: BackendError: ``unreachable`` (nobody listens), ``hung`` (not over after ``timeout_seconds``), ``failed``.
    """
    asked = f"{method} {path}"
    until = time.monotonic() + timeout_seconds
    parts = urlsplit(url)
    connection = _connected(url, until, asked, timeout_seconds)
    over = threading.Event()
    deadline = threading.Timer(max(0.0, until - time.monotonic()), _cut, (connection.sock, over))
    deadline.daemon = True
    deadline.start()
    try:
        content = None if body is None else json.dumps(body).encode()
        typed = {} if content is None else {"Content-Type": "application/json"}
        target = path if parts.scheme == "unix" else parts.path + path
        connection.request(method, target, content, typed | dict(headers))
        with connection.getresponse() as response:
            answer = Answer(asked, response.status, _body(response, asked), headers)
        if over.is_set():  # a body that ends when the connection does looks whole when we cut it
            raise _hung(asked, timeout_seconds)
        return answer
    except (OSError, http.client.HTTPException, ValueError) as error:
        if over.is_set() or isinstance(error, TimeoutError):
            raise _hung(asked, timeout_seconds) from None
        raise BackendError("failed", f"{asked}: {type(error).__name__} {error}".rstrip()) from None
    finally:
        deadline.cancel()
        connection.close()


def _hung(asked: str, timeout_seconds: float) -> BackendError:
    return BackendError("hung", f"{asked}: not answered within {timeout_seconds:.3g} s")


def _connected(url: str, until: float, asked: str, timeout_seconds: float) -> http.client.HTTPConnection:
    left = max(0.001, min(CONNECT_SECONDS, until - time.monotonic()))
    connection = _connection(url, left)
    try:
        connection.connect()
    except TimeoutError:
        connection.close()
        raise _hung(asked, timeout_seconds) from None
    except (OSError, ValueError) as error:  # ValueError: a host that cannot be encoded
        connection.close()
        said = f"{url} cannot be reached ({getattr(error, 'strerror', None) or error})"
        raise BackendError("unreachable", said, refused=isinstance(error, ConnectionRefusedError)) from None
    connection.sock.settimeout(timeout_seconds)
    return connection


def _connection(url: str, timeout_seconds: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return _UnixConnection(parts.path, timeout_seconds)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=timeout_seconds)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_seconds: float) -> None:
        super().__init__("localhost", timeout=timeout_seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _cut(sock: socket.socket, over: threading.Event) -> None:
    """Wake whoever reads from or writes to this socket. The connection may have let go of it already: an answer that
    ends with the connection keeps it alone."""
    over.set()
    with contextlib.suppress(OSError):  # closed in this very moment
        sock.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, asked: str) -> bytes:
    body = response.read(LARGEST_ANSWER_BYTES + 1)
    if len(body) > LARGEST_ANSWER_BYTES:
        raise BackendError("failed", f"{asked}: its answer is larger than {LARGEST_ANSWER_BYTES} bytes")
    if response.length:  # http.client's own read(n) does not raise where the announced length was cut short
        raise http.client.IncompleteRead(body, response.length)
    return body
