"""The consumer that ``proxy`` measures with, in a process of its own: ``python -m bench.upstream`` prints its port.

``/small`` answers at once, ``/tokens`` streams tokens that carry the instant they were sent at (the monotonic clock is
one for the whole machine), ``/silent`` never answers, ``/upload`` counts what it is given, ``/endless`` streams until
nobody takes it.
"""

from __future__ import annotations

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = 400
TOKEN_SECONDS = 0.02
TOKEN_LINE_BYTES = 20
PIECE_BYTES = 256 * 1024
ANSWER = b'{"text": "what a small model says"}'


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service for this machine's name, which can take seconds.
        super(ThreadingHTTPServer, self).server_bind()
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        taken = self._take()
        if self.path == "/tokens":
            self._stream(TOKENS, TOKEN_SECONDS)
        elif self.path == "/endless":
            self._stream(sys.maxsize, TOKEN_SECONDS)
        elif self.path == "/silent":
            self.rfile.read(1)
            self.close_connection = True
        else:
            self._whole(b"%d" % taken if self.path == "/upload" else ANSWER)

    do_POST = do_GET  # noqa: N815

    def _take(self) -> int:
        left = length = int(self.headers.get("Content-Length", "0"))
        while left:
            left -= len(self.rfile.read1(min(left, PIECE_BYTES)))
        return length

    def _whole(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.wfile.write(head + body)

    def _stream(self, tokens: int, each_seconds: float) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(tokens):
            time.sleep(each_seconds)
            line = b"%019d\n" % time.monotonic_ns()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # whoever hangs up is what is measured

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 http.server's name
        """Silent."""


def main() -> None:
    listener = Listener(("127.0.0.1", 0), Handler)
    print(listener.server_port, flush=True)
    listener.serve_forever()


if __name__ == "__main__":
    main()
