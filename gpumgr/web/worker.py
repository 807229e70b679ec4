"""gunicorn's gthread worker, with our own threads (pool.py), without its cost per waiting request, without a wait
for bodies nobody wants or for heads that never end, with less to do for each request, without a traceback for callers
that stand still, and with our own words for what it cannot read.

The cost: gunicorn 23 gthread.py, ``ThreadWorker.run``: after every event the main loop calls
``concurrent.futures.wait`` on all requests that have not ended, which locks each of them. With 1 000 waiters that made
a hand-over 1.9 times as slow as with 10 (bench/waiters.py). Only two moments need the list: at the connection limit,
and at the end of the worker.

The wait: gunicorn 23 parser.py, ``Parser.__next__``, drops what is left of a body before it reads the next request of a
kept-alive connection, in a thread of the pool and without a limit of time. Four clients that announced a body and do
not send it would hold four threads; so a connection whose body was not read whole is closed after its answer
(upload.py drops what is there, so that this is rare, and told).

The head: gunicorn 23 reads a request's line and headers without a limit of time, in a thread of the pool. Some bytes of
them, and nothing more, would hold that thread for ever; so they have ten seconds for the whole.

The hand-overs: gunicorn's main loop waits for the next request of a kept connection, which costs two changes of threads
for each. Who asks for a lease often releases it soon, so the thread that has answered waits for a moment itself, while
half of the pool has nothing to do.

The traceback: a proxied call sets a time limit on its caller's socket; gunicorn 23 gthread.py, ``ThreadWorker.handle``,
logs everything that breaks an answer as a defect, but a connection that is gone.

The words: a request line or header that gunicorn refuses never reaches the application, and base.py, ``handle_error``,
answers it in HTML, with a status of its own choice.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.errors import ParseException
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import ThreadWorker

from gpumgr.errors import GpumgrError, InternalError, InvalidRequest
from gpumgr.web.answer import Answer
from gpumgr.web.pool import Pool
from gpumgr.web.upload import is_left

HEAD_SECONDS = 10.0
LINGER_SECONDS = 0.02
"""A crowd that comes just then finds half of the pool, and the rest so much later."""


class _Copy(set[Future[Any]]):
    """``run`` removes what it has seen done; here that is done by the future's own callback."""

    def remove(self, future: Future[Any]) -> None:
        self.discard(future)


def _said(error: GpumgrError) -> bytes:
    """A whole answer, after which the connection is closed."""
    body = json.dumps(error.to_wire()).encode()
    head = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "x-should-retry: false",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


class _Punctual(SocketUnreader):  # type: ignore[misc]  # gunicorn has no types
    """Reads from the socket until an instant, and no longer. ``until`` None: without a limit of its own."""

    until: float | None = None
    wait: Callable[[], None] | None = None
    """Called before each read, and may raise instead: upload.py looks at something else meanwhile."""

    def chunk(self) -> Any:
        if self.wait is not None:
            self.wait()
        if self.until is None:
            return super().chunk()
        try:
            left = self.until - time.monotonic()
            if left <= 0:  # also where there is always one more byte
                raise TimeoutError
            if (came := self._what_is_there()) is not None:
                return came
            self.sock.settimeout(left)
            return super().chunk()
        except TimeoutError as error:
            raise ConnectionResetError(errno.ECONNRESET, "its head did not come in time") from error
        finally:
            if self.sock.gettimeout() is not None:
                self.sock.settimeout(None)

    def _what_is_there(self) -> bytes | None:
        """Without a time limit, which costs three calls of the system. None: nothing yet."""
        if isinstance(self.sock, ssl.SSLSocket):
            return None
        try:
            came: bytes = self.sock.recv(self.mxchunk, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return came


class LeaseWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pending: set[Future[Any]] = set()
        super().__init__(*args, **kwargs)

    def init_process(self) -> None:
        # gunicorn asks for 17 settings for each request, through ``__getattr__``: half the time of reading one. In a
        # worker they never change, so they are put where they are found at once.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        super().init_process()

    def get_thread_pool(self) -> Pool:
        return Pool(self.cfg.threads)

    @property
    def futures(self) -> set[Future[Any]]:
        if self.alive and self.nr_conns < self.worker_connections:
            return _Copy()
        return _Copy(self._pending)

    @futures.setter
    def futures(self, _value: object) -> None:
        """The base class sets its deque; here the pending set takes its place."""

    def handle_request(self, req: Any, conn: Any) -> Any:
        conn.parser.unreader.until = None
        req.body.gpumgr_request = req  # so that the application can say that the connection ends (upload.py)
        try:
            return self._answer(req, conn)
        except TimeoutError as error:
            raise BrokenPipeError(errno.EPIPE, "the caller takes nothing") from error

    def _answer(self, req: Any, conn: Any) -> bool:
        """Whether the connection may be kept. As gunicorn 23 gthread.py, ``ThreadWorker.handle_request``, with an
        Answer, and without what gpumgr has no use for: hooks, ``max_requests`` and files."""
        began_at = datetime.now(UTC)
        answer = Answer(req, conn.sock, self.cfg)
        _, environ = wsgi.create(req, conn.sock, conn.client, conn.server, self.cfg)
        environ["wsgi.multithread"] = True
        if not self.alive or not self.cfg.keepalive or len(self._keep) >= self.max_keepalived:
            answer.force_close()
        try:
            pieces = self.wsgi(environ, answer.start_response)
            try:
                for piece in pieces:
                    answer.write(piece)
                answer.close()
            finally:
                self.log.access(answer, req, environ, datetime.now(UTC) - began_at)
                if hasattr(pieces, "close"):
                    pieces.close()
        except OSError:
            raise
        except Exception:
            if answer.headers_sent:  # half an answer must not look whole
                self.log.exception("Error handling request")
                with suppress(OSError):
                    conn.sock.shutdown(socket.SHUT_RDWR)
                    conn.sock.close()
                raise StopIteration from None
            raise
        return not answer.should_close()

    def handle(self, conn: Any) -> tuple[bool, Any]:
        kept, conn = self._handle_one(conn)
        while kept and self.alive and self._asks_again(conn.sock):
            kept, conn = self._handle_one(conn)
        return kept, conn

    def _asks_again(self, sock: Any) -> bool:
        """Whether the next request, or the connection's end, is there within a moment that nobody else needs."""
        if not self.tpool.is_at_leisure():
            return False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(1000 * LINGER_SECONDS))

    def _handle_one(self, conn: Any) -> tuple[bool, Any]:
        if not isinstance(conn.parser.unreader, _Punctual):
            conn.parser.unreader = _Punctual(conn.sock)
        conn.parser.unreader.until = time.monotonic() + self.head_seconds
        keepalive, conn = super().handle(conn)
        return keepalive and not is_left(conn.parser.mesg.body.reader), conn

    def handle_error(self, _req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Not the error's own words, which repeat what was sent: they may be a header with a secret."""
        error: GpumgrError
        if isinstance(exc, ParseException):
            what = type(exc).__name__
            error = InvalidRequest(
                f"this is not HTTP as gpumgr reads it ({what}): look at its first line and its headers"
            )
            self.log.info("a request cannot be read ip=%s: %s", addr[0] if addr else "", what)
        else:
            error = InternalError("gpumgr failed; its log has the traceback")
            self.log.exception("a request failed before the application saw it")
        try:
            client.sendall(_said(error))
        except OSError:
            self.log.debug("nobody takes the answer")

    def _wrap_future(self, future: Future[Any], conn: Any) -> None:
        future.conn = conn  # type: ignore[attr-defined]
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        future.add_done_callback(self.finish_request)
