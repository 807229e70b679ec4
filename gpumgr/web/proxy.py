"""The proxy routes: a kind's consumer answers, in its own words, while the caller holds the GPU.

Owns: the life of one proxied call, from its place to its end. Must not: know who gets the GPU (the broker), what HTTP
looks like on the wire (adapters/upstream.py), or what is passed on (passing.py).

    place → turn (broker.call) → head and body to the consumer, as they come → its answer, as it comes → the GPU is
    free → the answer's end is sent → place

The GPU is free before the caller can see the end of the answer, so that whoever has seen it may rely on that. A caller
that leaves at any moment after its turn is noticed by the thread ``hang-up``, which cuts both connections and frees the
GPU at once; the handler's own thread then wakes up and puts the rest down.

Two kinds of call are different. One whose answer may name work that goes on after it (a ComfyUI prompt) has its answer
read before any of it is handed on, so that the GPU is held for that work (runtime/following.py). One of a path that
needs no GPU has no turn, and nothing to free.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from flask import Flask, Request, Response, request
from werkzeug.routing import BaseConverter, Rule

from gpumgr.adapters.upstream import Exchange, Head, shut, upstream_of
from gpumgr.config.load import NAME, RESERVED_KINDS
from gpumgr.core.lease import Call
from gpumgr.errors import GpumgrError, InvalidRequest, NotFound, UpstreamTimeout, UpstreamUnreachable
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.ports import BackendError
from gpumgr.runtime.ticket import Ask, Caller
from gpumgr.web import passing
from gpumgr.web.hangup import HangUp, Watch
from gpumgr.web.places import Place, Places
from gpumgr.web.problems import NO_WEBSOCKETS
from gpumgr.web.upload import Upload

log = logging.getLogger(__name__)

_Turn = Callable[[Caller], Call]
LARGEST_ANSWER_BYTES = 2**20
"""Of one that may name work: ComfyUI's also lists what it thinks of nodes that it leaves out."""
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class KindConverter(BaseConverter):
    """What may be the name of a kind; gpumgr's own words are none, so that their routes keep their 404 and 405."""

    regex = rf"(?!(?:{'|'.join(sorted(RESERVED_KINDS))})\Z){NAME.pattern}"


class RestConverter(BaseConverter):
    """Whatever follows, nothing included."""

    regex = r"[\s\S]*"
    part_isolating = False
    weight = 200


def register(app: Flask, broker: Broker, places: Places, hang_up: HangUp) -> None:
    """Any method: a blueprint's routes would name them, and answer OPTIONS themselves."""
    proxy = _Proxy(broker, places, hang_up)
    app.url_map.converters |= {"kind": KindConverter, "rest": RestConverter}
    for path in ("/v1/<kind:kind>", "/v1/<kind:kind>/<rest:path>"):
        app.url_map.add(Rule(path, endpoint="proxy"))
    app.view_functions["proxy"] = proxy.pass_on


class _Proxy:
    def __init__(self, broker: Broker, places: Places, hang_up: HangUp) -> None:
        self.broker = broker
        self.places = places
        self.hang_up = hang_up
        self.upstreams = {name: upstream_of(c) for name, c in broker.settings.consumers.items() if c.url is not None}

    def pass_on(self, kind: str, **_path: str) -> Response:
        """``_path`` is unescaped; what the caller wrote is in the environment."""
        if "websocket" in request.environ.get("HTTP_UPGRADE", "").lower():
            raise InvalidRequest(NO_WEBSOCKETS)
        sock = request.environ.get("gunicorn.socket")
        upload = Upload(request, sock)
        try:
            return self._passed(kind, sock, upload)
        except GpumgrError:
            upload.drop_what_came()
            raise

    def _passed(self, kind: str, sock: socket.socket | None, upload: Upload) -> Response:
        consumer = self.broker.state.catalog.resolve(kind=kind, consumer=None)
        upstream = self.upstreams.get(consumer.name)
        if upstream is None:
            raise NotFound(
                f"/v1/{kind} leads to {consumer.name}, which has no url: there is nobody to pass this call on to. Take "
                f"a lease (POST /v1/lease), or write consumers.{consumer.name}.url if it has a server",
                consumer=consumer.name,
            )
        exchange = Exchange(upstream, self.broker.settings.proxy)
        target = passing.target(request.environ, kind, exchange.upstream)
        turn = self._turn(kind, free=passing.needs_no_turn(request.environ, target, exchange.upstream))
        passage = _Passage(self, exchange, sock, self.places.take())
        try:
            passage.begin(turn)
            return _Answer(passage, passage.asked(request, target, upload))
        except BaseException:
            passage.close()
            raise

    def _turn(self, kind: str, *, free: bool) -> _Turn | None:
        """How to get the GPU; a lease needs no wait. None: it is not needed. Raises: InvalidRequest."""
        token = request.environ.get("HTTP_X_GPU_LEASE")
        if token is not None:
            return lambda _: self.broker.call_under_lease(token, kind)
        environ = request.environ
        ask = Ask(kind=kind, wait_seconds=passing.wait_seconds(environ), priority=passing.priority(environ))
        return None if free else lambda caller: self.broker.call(ask, caller)


class _Passage:
    """One call, and the pieces of its answer: an iterator and not a generator, whose ``close`` does nothing where it
    was never begun (HEAD, a caller that left)."""

    def __init__(self, proxy: _Proxy, exchange: Exchange, sock: socket.socket | None, place: Place) -> None:
        self._proxy = proxy
        self._exchange = exchange
        self._sock = sock
        self._place = place
        self._call: Call | None = None
        self._watch: Watch | None = None
        self._caller_left = False
        self._noted = False
        self._hears = False
        """The consumer has the whole request, and its answer will name what it has begun: it is not cut off."""
        self._ahead: deque[bytes] = deque()
        """What was read of the answer and is not handed on yet."""
        self._ends_with_connection = False
        self._head_sent = False
        self._closed = False

    def begin(self, turn: _Turn | None) -> None:
        """Raises: what the turn raises; RequestEnded where the caller left while it waited."""
        if turn is not None:
            with self._proxy.hang_up.while_waiting(self._sock, self._proxy.broker) as caller:
                self._call = turn(caller)
        if self._sock is not None:
            stall_seconds = self._proxy.broker.settings.proxy.stall_timeout_seconds
            self._sock.settimeout(stall_seconds)
            self._watch = self._proxy.hang_up.watch(self._sock, self._on_gone, stall_seconds)

    def _on_gone(self) -> None:
        """On the thread ``hang-up``."""
        self._caller_left = True
        hears = self._hears
        if not hears:
            self._exchange.cut()
        if self._sock is not None:
            with suppress(OSError):
                shut(self._sock)
        if not hears:
            self._end()

    def asked(self, request: Request, target: str, upload: Upload) -> Head:
        """What the consumer's answer begins with. Raises: InvalidRequest, UpstreamUnreachable, UpstreamTimeout."""
        try:
            head = self._exchanged(request, target, upload)
        except ValueError as error:
            raise InvalidRequest(f"this cannot be passed on: {error}") from None
        except BackendError as error:
            raise self._failed(error) from None
        if head.status < 400:
            self._proxy.broker.note_call(self._exchange.upstream.consumer, None)
        if self._exchange.is_over():
            self._end()
        self._ends_with_connection = head.length is None and request.environ["SERVER_PROTOCOL"] == "HTTP/1.0"
        return head

    def _exchanged(self, request: Request, target: str, upload: Upload) -> Head:
        upstream, method = self._exchange.upstream, request.environ["REQUEST_METHOD"]
        begins = self._begins_work(method, target)
        headers = passing.request_headers(request.environ, upstream, upload.length, plain_answer=begins)
        self._exchange.ask(method, target, headers, chunked=upload.chunked)
        stall_seconds = self._proxy.broker.settings.proxy.stall_timeout_seconds
        with upload.beside(lambda fd: self._exchange.wait_beside(fd, stall_seconds)):
            whole = all(map(self._exchange.send, upload)) and not upload.unwanted
        self._hears = begins and whole
        head = self._exchange.answer(whole=whole)
        if begins and head.status < 300:
            self._hear(head)
        self._hears = False
        if self._caller_left:
            self._exchange.cut()  # ``_on_gone`` left it to this thread
        return head

    def _begins_work(self, method: str, target: str) -> bool:
        """Whether this call's own hold may have to outlive it."""
        if self._call is None or self._call.lease_id is not None:
            return False
        upstream = self._exchange.upstream
        return self._proxy.broker.follower.may_begin(upstream.consumer, method, passing.path_of(target, upstream))

    def _hear(self, head: Head) -> None:
        """The whole of this answer before any of it is handed on: what it names is followed before its caller can know
        of it, and also where its caller has left."""
        left = LARGEST_ANSWER_BYTES
        while left > 0 and not self._exchange.is_over():
            self._ahead.append(self._exchange.read())
            left -= len(self._ahead[-1])
        if self._call is not None and self._exchange.is_over():
            self._proxy.broker.follower.follow(self._call, head.status, b"".join(self._ahead))
        elif self._call is not None:
            log.warning("an answer too large to look for work in consumer=%s", self._call.consumer)

    def _failed(self, error: BackendError) -> GpumgrError:
        """The GPU is let go before the caller learns of it."""
        self._noted = not self._caller_left
        self.close()
        if self._caller_left:
            return InvalidRequest("the caller hung up")  # nobody reads it
        self._note(error)
        failed = UpstreamTimeout if error.reason == "hung" else UpstreamUnreachable
        return failed(str(error), consumer=self._exchange.upstream.consumer)

    # -- the answer -----------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._head_sent:
            self._head_sent = True
            return b""  # gunicorn sends the head with the first piece: it must not wait for the first token
        if self._ahead:
            return self._ahead.popleft()
        if self._exchange.is_over():
            raise StopIteration
        try:
            piece = self._exchange.read()
        except BackendError as error:
            raise self._broke_off(error) from None
        if self._exchange.is_over():
            self._end()
        if not piece:
            raise StopIteration
        return piece

    def _broke_off(self, error: BackendError) -> OSError:
        """What makes gunicorn close the connection without the end of the answer, and without a word in its log."""
        self._noted = not self._caller_left
        self._exchange.close()
        self._end()
        if self._noted:
            self._note(error)
        if self._ends_with_connection:
            self._reset_at_close()
        return ConnectionResetError(errno.ECONNRESET, "the answer broke off")

    def _reset_at_close(self) -> None:
        """The connection's end would look like the answer's."""
        if self._sock is not None:
            with suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)

    def _note(self, error: BackendError) -> None:
        self._proxy.broker.note_call(self._exchange.upstream.consumer, str(error))

    # -- the end --------------------------------------------------------------------------------------------

    def _end(self) -> None:
        if self._call is not None:
            self._proxy.broker.end_call(self._call)
        elif not self._closed:
            self._proxy.broker.follower.hint(self._exchange.upstream.consumer)

    def close(self) -> None:
        """Put everything down, in whatever state it is. The second time does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.close()
        self._exchange.close()
        self._end()
        if self._sock is not None:
            with suppress(OSError):
                self._sock.settimeout(None)
        self._place.give_back()
        if self._call is not None and not (self._exchange.is_over() or self._noted):
            log.info("a caller left before its call was over consumer=%s", self._exchange.upstream.consumer)


class _Answer(Response):
    """The consumer's head and the passage's pieces, past what werkzeug would do to headers and bodies: leave out
    Content-Type from a 304, the close from a HEAD."""

    def __init__(self, passage: _Passage, head: Head) -> None:
        super().__init__(status=head.status)
        self._passage = passage
        self._status_line = f"{head.status} {head.reason}"
        self._headers = passing.answer_headers(head)

    def __call__(self, environ: Any, start_response: Any) -> Any:  # noqa: ARG002
        try:
            start_response(self._status_line, self._headers)
        except BaseException:
            self._passage.close()
            raise
        return self._passage
