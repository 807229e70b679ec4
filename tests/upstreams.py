"""A server of raw bytes on loopback: each connection does what a test's script says, and is written down."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.waiting import until

REPORTS = {
    "/health": b"ok",
    "/queue": b'{"queue_running": [], "queue_pending": []}',
    "/system_stats": b'{"devices": []}',
    "/api/ps": b'{"models": []}',
}
"""What the broker itself asks: never recorded, and answered as a healthy, idle and empty service would."""
OK = b"HTTP/1.1 200 OK\r\n"
PATIENCE_SECONDS = 20.0


class Visit:
    """One connection, its request's head read already."""

    def __init__(self, sock: socket.socket, over: threading.Event) -> None:
        self.sock = sock
        self.over = over
        """The test has ended: whoever waits for something else should not."""
        self.gone = threading.Event()
        """The other side closed or broke the connection, as ``until_gone`` has seen."""
        self.raw_body = b""
        self._stream = sock.makefile("rb")
        self.head = b"".join(iter(self._line, b"\r\n"))

    def _line(self) -> bytes:
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("it ended in the middle")
        return line

    @property
    def request_line(self) -> str:
        return self.head.decode("latin-1").split("\r\n")[0]

    @property
    def method(self) -> str:
        return self.request_line.split(" ")[0]

    @property
    def target(self) -> str:
        return self.request_line.split(" ")[1]

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Names in small letters, in their order."""
        lines = self.head.decode("latin-1").split("\r\n")[1:-1]
        return [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)

    def body(self) -> bytes:
        """To its end. ``raw_body`` is how it was framed."""
        if self.header("transfer-encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        self.raw_body = self.take(int(self.header("content-length") or 0))
        return self.raw_body

    def _chunk(self) -> bytes:
        size = self._line()
        data = self._stream.read(int(size, 16) + 2)
        self.raw_body += size + data
        return data[:-2]

    def take(self, count: int) -> bytes:
        """So many bytes of what comes, as it is."""
        return self._stream.read(count)

    def say(self, *said: bytes) -> None:
        for piece in said:
            self.sock.sendall(piece)

    def stall(self) -> None:
        self.over.wait(PATIENCE_SECONDS)

    def until_gone(self) -> None:
        """Read until the other side has gone."""
        with suppress(OSError):
            while self._stream.read1(65536):
                pass
        self.gone.set()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._stream.close()
        self.sock.close()

    def close(self) -> None:
        self._stream.close()
        self.sock.close()


Script = Callable[[Visit], object]


def answers(said: bytes) -> Script:
    """These bytes after the whole request, and the connection is closed."""

    def script(visit: Visit) -> None:
        visit.body()
        visit.say(said)

    return script


def whole(body: bytes = b"", *headers: str, status: str = "200 OK") -> bytes:
    """An answer with its length."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


class Upstream:
    """Answers what the broker asks, and does with every other connection what ``script`` says, then closes it.

    A script may be exchanged while it runs. What it asserts fails the test at the end.
    """

    def __init__(self, script: Script | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.script = script or answers(whole(b"ok"))
        self.visits: list[Visit] = []
        self.failures: list[BaseException] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._tls = tls
        self._listener = self._listening(0)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"

    def _listening(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        return listener

    @property
    def visit(self) -> Visit:
        """The last one, waited for."""
        until(lambda: self.visits)
        return self.visits[-1]

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self.stop_listening()
        for visit in self.visits:
            with suppress(OSError):
                visit.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        if kind is None and self.failures:
            raise self.failures[0]

    def stop_listening(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def listen_again(self) -> None:
        self._listener = self._listening(self.port)
        self._spawn(self._accept)

    def _spawn(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock = sock if self._tls is None else self._tls.wrap_socket(sock, server_side=True)
            visit = Visit(sock, self._over)
        except OSError:
            sock.close()
            return
        with sock:
            try:
                report = next((body for path, body in REPORTS.items() if visit.target.endswith(path)), None)
                if report is not None:
                    visit.say(whole(report))
                else:
                    self.visits.append(visit)
                    self.script(visit)
            except OSError:
                pass  # the caller hung up, as it may
            except BaseException as failure:
                self.failures.append(failure)
            finally:
                visit.close()
