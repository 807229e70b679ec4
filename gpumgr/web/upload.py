"""The body of a request that is passed on: in pieces, as it arrives, never whole. And what is done with one that nobody
wanted.

Owns: reading it from gunicorn. Must not: look into it, whatever type it claims to have.

gunicorn's own ``wsgi.input`` reads 1 KiB at a time until it has as much as was asked for, so that a live stream would
wait for its next 64 KiB; here its two readers are asked for what has come (gunicorn 23 http/body.py).
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flask import Flask, Request, Response, request
from gunicorn.http.body import Body, ChunkedReader, LengthReader
from gunicorn.http.errors import NoMoreData, ParseException

from gpumgr.errors import InvalidRequest

PIECE_BYTES = 64 * 1024
LARGEST_DROPPED_BYTES = 2**20
DROP_SECONDS = 0.05
"""Clients send a head and a small body in two pieces: the second one is on its way."""


def register(app: Flask) -> None:
    """A body that nobody read is dropped before the answer, and the connection kept; or the answer tells that it ends:
    a client with a pool of connections would else send its next request into a closed one."""

    @app.after_request
    def drop(response: Response) -> Response:
        body = request.environ["wsgi.input"]
        if isinstance(body, Body) and is_left(body.reader):
            if not _is_broken(body.reader):
                passed_on = (
                    request.endpoint == "proxy" and response.mimetype != "application/json"
                )  # its answer is here
                with suppress(InvalidRequest):
                    sock = request.environ.get("gunicorn.socket")
                    Upload(request, sock).drop_what_came(0.0 if passed_on else DROP_SECONDS)
            if is_left(body.reader):
                body.gpumgr_request.force_close()
        return response


def is_left(reader: Any) -> bool:
    """Whether something of the body was not read, as far as its reader knows."""
    if isinstance(reader, LengthReader):
        return bool(reader.length)
    return isinstance(reader, ChunkedReader) and reader.parser is not None


def _is_broken(reader: Any) -> bool:
    """A generator that has failed looks as if it had come to its end."""
    return isinstance(reader, ChunkedReader) and reader.parser.gi_frame is None


class _Unwanted(Exception):
    """The consumer will not read the rest."""


class Upload:
    """``chunked`` and ``length``: how the caller announced it; neither where there is none. ``unwanted``: ended early
    by ``beside``."""

    def __init__(self, request: Request, sock: socket.socket | None) -> None:
        """Raises: InvalidRequest where it is coded in a way that would be lost."""
        environ = request.environ
        coding = environ.get("HTTP_TRANSFER_ENCODING", "").strip().lower()
        if coding not in ("", "chunked", "identity"):
            raise InvalidRequest("Transfer-Encoding must be chunked, or left out", field="Transfer-Encoding")
        self.chunked = coding == "chunked"
        self.length: str | None = None if self.chunked else environ.get("CONTENT_LENGTH") or None
        self.unwanted = False
        self._sock = sock
        self._body = environ["wsgi.input"]
        self._arriving = _arriving(request)
        self._broken = False

    def __iter__(self) -> Iterator[bytes]:
        """Raises: InvalidRequest where nothing comes for the socket's time limit, or it ends before it is whole."""
        while piece := self._next():
            yield piece

    @contextmanager
    def beside(self, wait: Callable[[int], bool]) -> Iterator[None]:
        """Within, ``wait`` waits for the caller's socket before each read; where it says False, the body ends."""

        def wait_or_end(sock: socket.socket) -> None:
            if not (isinstance(sock, ssl.SSLSocket) and sock.pending()) and not wait(sock.fileno()):
                raise _Unwanted

        with _before_each_read(self._body, self._sock, wait_or_end):
            yield

    def _next(self) -> bytes:
        try:
            return next(self._arriving, b"")
        except _Unwanted:
            self.unwanted = True
            return b""
        except TimeoutError:
            self._broken = True
            limit = 0.0 if self._sock is None else self._sock.gettimeout() or 0.0
            raise InvalidRequest(f"no byte of the body came for {limit:g} s") from None
        except (OSError, ParseException):
            self._broken = True
            raise InvalidRequest("the body ended before it was whole, or its chunks cannot be read") from None

    def drop_what_came(self, within_seconds: float = 0.0) -> None:
        """Of a small body that nobody wants, without waiting long for the rest: it is mostly there, and a connection
        that is closed over unread bytes is reset, which may overtake the answer."""
        if self._broken or self._sock is None:
            return
        dropped = 0
        with _within(self._body, self._sock, within_seconds, DROP_SECONDS), suppress(OSError, ParseException):
            while dropped < LARGEST_DROPPED_BYTES and (piece := next(self._arriving, b"")):
                dropped += len(piece)


def read_within(request: Request, seconds: float, at_most_bytes: int) -> bytes:
    """A small body, whole. Raises: InvalidRequest where it has not come to its end, or to the limit, in time."""
    environ = request.environ
    arriving, came = _arriving(request), bytearray()
    try:
        with _within(environ["wsgi.input"], environ.get("gunicorn.socket"), seconds):
            while len(came) < at_most_bytes and (piece := next(arriving, b"")):
                came += piece
    except TimeoutError:
        raise InvalidRequest(f"the body did not come within {seconds:g} s") from None
    except (OSError, ParseException):
        raise InvalidRequest("the body ended before it was whole, or its chunks cannot be read") from None
    return bytes(came)


@contextmanager
def _within(body: Any, sock: socket.socket | None, seconds: float, spare_seconds: float = 0.0) -> Iterator[None]:
    """All reads together wait no longer than that, however many make one piece: a limit for each would be none for a
    caller that trickles. With ``spare_seconds``, what is there already may be read for so much longer."""
    until = time.monotonic() + seconds

    def hurry(sock: socket.socket) -> None:
        left = until - time.monotonic()
        if left <= -spare_seconds:
            raise TimeoutError
        sock.settimeout(max(0.0, left))

    limit = None if sock is None else sock.gettimeout()
    try:
        with _before_each_read(body, sock, hurry):
            yield
    finally:
        if sock is not None:
            sock.settimeout(limit)


@contextmanager
def _before_each_read(body: Any, sock: socket.socket | None, wait: Callable[[socket.socket], None]) -> Iterator[None]:
    if sock is None or not isinstance(body, Body):  # flask's own server
        yield
        return
    unreader = body.gpumgr_request.unreader
    unreader.wait = lambda: wait(sock)
    try:
        yield
    finally:
        unreader.wait = None


def _arriving(request: Request) -> Iterator[bytes]:
    source = request.environ["wsgi.input"]
    if isinstance(source, Body):
        pieces = _chunks(source.reader) if isinstance(source.reader, ChunkedReader) else _bytes(source.reader)
        return (piece for piece in pieces if piece)
    return iter(lambda: request.stream.read(PIECE_BYTES), b"")  # flask's own server: no limits, no hurry


def _chunks(reader: Any) -> Iterator[bytes]:
    yield from reader.parser
    reader.parser = None  # as its own ``read`` marks the end


def _bytes(reader: Any) -> Iterator[bytes]:
    reader.unreader.mxchunk = PIECE_BYTES
    while reader.length:
        came = reader.unreader.read()
        if not came:
            raise NoMoreData
        piece = came[: reader.length]
        reader.unreader.unread(came[len(piece) :])
        reader.length -= len(piece)
        yield piece
