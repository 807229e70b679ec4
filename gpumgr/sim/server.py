"""A small HTTP/1.1 server on loopback that can die in the middle of an answer.

Owns: sockets, threads, keep-alive, chunked bodies. Must not: know what is served.

http.server rather than a framework, because kill -9 has to be played: every open connection is cut at once.
"""

from __future__ import annotations

import json
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from gpumgr.sim.card import NoSuchProcess
from gpumgr.sim.memory import Gone

HOST = "127.0.0.1"
JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request, its body read to the end. ``path`` comes without the query."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Keys in lower case."""
    body: bytes

    def json(self) -> Any:
        """Whatever the content type says. Raises: ValueError."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Reply:
    """A body that is an iterator is sent chunk by chunk, each as soon as it comes; it is closed in any case."""

    status: int = 200
    body: bytes | Iterator[bytes] = b""
    content_type: str | None = None


def json_reply(content: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(content).encode(), "application/json; charset=utf-8")


class Server:
    """``answer`` runs in the connection's own thread; it raises Gone to cut the connection without an answer."""

    def __init__(self, answer: Callable[[Request], Reply], port: int = 0) -> None:
        self._answer = answer
        self._port = port
        self._listener: _Listener | None = None
        self._accepting: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port it has, or had before it stopped; 0 before the first start."""
        return self._port

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def start(self) -> None:
        """Starting again takes the port it had. Raises: OSError where another took it meanwhile."""
        self._listener = _Listener(self._port, self._answer)
        self._port = self._listener.server_port
        self._accepting = threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True)
        self._accepting.start()

    def stop(self) -> None:
        """The port refuses and every connection is cut. From one of its own threads as well."""
        if self._listener is None or self._accepting is None:
            return
        self._listener.shutdown()
        self._listener.server_close()
        self._listener.cut()
        self._accepting.join(JOIN_SECONDS)

    def join(self) -> None:
        """Wait until the threads of the cut connections have ended."""
        if self._listener is not None:
            self._listener.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, answer: Callable[[Request], Reply]) -> None:
        super().__init__((HOST, port), _Connection)
        self.answer = answer
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}

    def server_bind(self) -> None:
        # HTTPServer.server_bind asks the name service for this host's name, which can take seconds.
        super(ThreadingHTTPServer, self).server_bind()
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._serve, args=(request, client_address), daemon=True)
        with self._lock:
            self._open[request] = thread
        thread.start()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._open[request]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is the peer's right; all else is answered with 500 before it comes here."""

    def shutdown_request(self, request: Any) -> None:
        # Under the lock: cut() must not meet a socket whose number the system has given away again.
        with self._lock:
            super().shutdown_request(request)

    def cut(self) -> None:
        with self._lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # closed by its own thread or by the peer

    def join(self) -> None:
        with self._lock:
            threads = list(self._open.values())
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_SECONDS)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without it a small answer in two writes waits 40 ms for the peer's delayed ACK.
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024
    server: _Listener

    def _serve(self) -> None:
        try:
            reply = self._reply()
        except (Gone, NoSuchProcess):
            self.close_connection = True
            return
        if isinstance(reply.body, bytes):
            self._send_whole(reply, reply.body)
        else:
            self._send_stream(reply, reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve  # noqa: N815 http.server's names

    def _reply(self) -> Reply:
        request = self._request()
        try:
            return self.server.answer(request)
        except (Gone, NoSuchProcess):
            raise
        except Exception:  # a defect of the simulation has to be seen by whoever called it
            return Reply(500, traceback.format_exc().encode(), "text/plain; charset=utf-8")

    def _request(self) -> Request:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query, keep_blank_values=True))
        headers = {key.lower(): value for key, value in self.headers.items()}
        chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        body = b"".join(self._chunks()) if chunked else self.rfile.read(int(headers.get("content-length", "0")))
        return Request(self.command, unquote(address.path), query, headers, body)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers, up to the empty line

    def _head(self, reply: Reply, framing: Iterable[tuple[str, str]]) -> None:
        self.send_response(reply.status)
        if reply.content_type is not None:
            self.send_header("Content-Type", reply.content_type)
        for key, value in framing:
            self.send_header(key, value)
        self.end_headers()

    def _send_whole(self, reply: Reply, body: bytes) -> None:
        self._head(reply, [("Content-Length", str(len(body)))])
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _send_stream(self, reply: Reply, chunks: Iterator[bytes]) -> None:
        chunked = self.request_version != "HTTP/1.0"
        try:
            self._head(reply, [("Transfer-Encoding", "chunked")] if chunked else [("Connection", "close")])
            self.wfile.flush()
            for chunk in chunks:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk)
                self.wfile.flush()
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
                self.wfile.flush()
        except (Gone, NoSuchProcess):
            self.close_connection = True  # no last chunk: the client must be able to see that it was cut
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 http.server's name
        """Silent: the ledger of the service is the log."""
