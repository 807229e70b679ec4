"""A caller as a bare socket: says exactly what a test wants, and sees exactly what comes."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    @property
    def error(self) -> dict[str, Any]:
        """gpumgr's own. Raises: KeyError where it is not gpumgr's."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        if error["type"] != "gpumgr_error":
            raise KeyError("this error is not gpumgr's")
        return error


class Caller:
    """One connection, kept alive while both sides like."""

    def __init__(self, port: int, *, receive_bytes: int | None = None) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(PATIENCE_SECONDS)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_bytes is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.connect(("127.0.0.1", port))
        self._method = ""

    def ask(self, method: str, target: str | bytes, *headers: str, body: bytes = b"", version: str = "1.1") -> Self:
        """A head, and a body as it is: its length is announced where there is one and no header frames it."""
        self._method = method
        target = target.encode("latin-1") if isinstance(target, str) else target
        framed = any(header.lower().startswith(("content-length:", "transfer-encoding:")) for header in headers)
        lines = [f"Host: 127.0.0.1:{self.sock.getpeername()[1]}", *headers]
        lines += [] if framed or not body else [f"Content-Length: {len(body)}"]
        head = b"%b %b HTTP/%b\r\n" % (method.encode(), target, version.encode())
        self.sock.sendall(head + "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n" + body)
        return self

    def say(self, *said: bytes) -> None:
        for piece in said:
            self.sock.sendall(piece)

    def head(self) -> http.client.HTTPResponse:
        """The answer's head is read, its body is not."""
        response = http.client.HTTPResponse(self.sock, method=self._method)
        response.begin()
        return response

    def answer(self) -> Answer:
        """Raises: ConnectionError, http.client.IncompleteRead where it is cut short."""
        with self.head() as response:
            length = response.length
            body = response.read()
            if length is not None and len(body) < length:
                raise http.client.IncompleteRead(body)
            return Answer(response.status, response.reason, response.getheaders(), body)

    def rest(self) -> bytes:
        """Everything until the other side closes, as it is. Raises: ConnectionResetError where it resets."""
        return b"".join(iter(lambda: self.sock.recv(65536), b""))

    def leave(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.sock.close()
