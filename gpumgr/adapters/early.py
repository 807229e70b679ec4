"""What a consumer says before it has the whole request: whether the rest of it still has a reader.

Owns: looking at its connection while the request's body stands still. Must not: read from it; whatever was said is
left for the answer.

    its connection has ended     it wants no more
    4xx, 5xx, no HTTP at all     it wants no more
    1xx, 2xx, 3xx                it may listen, as a live transcription does; from now on only its end is looked at
    over TLS                     only its end: what can be read may be TLS talking about itself
"""

from __future__ import annotations

import re
import select
import socket
import time

ENDED = select.POLLRDHUP | select.POLLHUP | select.POLLERR
MAY_LISTEN = re.compile(rb"HTTP/1\.[0-9] [123]")
STATUS_BYTES = len(b"HTTP/1.1 4")
AGAIN_SECONDS = 0.05
"""Until a status is looked at again whose first letters have come: they stay readable, so poll would not wait."""


class Early:
    def __init__(self, sock: socket.socket, *, tls: bool) -> None:
        self._sock = sock
        self._heeds_words = not tls
        self._has_begun = False

    def until_readable(self, fd: int, seconds: float) -> bool:
        """Until there is something to read from ``fd``, where the rest of the request comes from. False: the consumer
        wants no more. Raises: TimeoutError where neither happens."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready = self._ready(fd, left)
            if fd in ready:
                return True
            if ready and self._is_enough(ready[self._sock.fileno()]):
                return False
        raise TimeoutError

    def _ready(self, fd: int, seconds: float) -> dict[int, int]:
        listens = self._heeds_words and not self._has_begun
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._sock, select.POLLRDHUP | (select.POLLIN if listens else 0))
        ready = poll.poll(1000 * (min(seconds, AGAIN_SECONDS) if self._has_begun else seconds))
        self._has_begun = False
        return dict(ready)

    def _is_enough(self, state: int) -> bool:
        if state & ENDED:
            return True
        said = self._sock.recv(STATUS_BYTES, socket.MSG_PEEK)
        self._has_begun = len(said) < STATUS_BYTES
        self._heeds_words = self._has_begun
        return not self._has_begun and not MAY_LISTEN.match(said)
