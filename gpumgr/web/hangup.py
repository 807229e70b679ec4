"""Callers that hang up while something is done for them.

Also while they wait for their turn.

Owns: the thread ``hang-up``, which sleeps in epoll until a watched socket's peer closes, half-closes or resets, and
then calls back. Must not: read, write or close what it watches: with TLS or not, only the descriptor is looked at.

A peer that only ends its own direction (``shutdown(SHUT_WR)``) counts as gone: it cannot be told from one that closed.
One whose machine or network has vanished says nothing: the kernel asks for it, and reports it as an error.

The number of a descriptor is given away again as soon as it is closed, so that an event may arrive for a socket that is
not there any more. Therefore a watch must be closed before its socket is, and an event is believed only when the
descriptor, looked at under the watch's lock, still says so: then it is this watch's socket.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from gpumgr.runtime.broker import Broker
from gpumgr.runtime.ticket import Caller

log = logging.getLogger(__name__)

VANISHED_SECONDS = 20.0
"""A waiting caller whose machine says nothing for so long is gone: its kernel is asked each quarter of it."""


class Watch:
    """One socket that is watched, until ``close`` or until its peer has gone."""

    def __init__(self, owner: HangUp, fd: int, on_gone: Callable[[], None]) -> None:
        self._owner = owner
        self._fd = fd
        self._on_gone = on_gone
        self._lock = threading.RLock()  # on_gone may close its own watch
        self._closed = False

    def close(self) -> None:
        """From now on nothing is called back; where that is happening just now, its end is waited for."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._owner.forget(self, self._fd)

    def look(self) -> None:
        """On the thread ``hang-up``: there was an event for this number."""
        with self._lock:
            if self._closed or not _is_gone(self._fd):
                return
            self.close()
            try:
                self._on_gone()
            except Exception:  # the other callers are still watched
                log.exception("a caller's end could not be told")


class HangUp:
    """The thread starts with the first watch. Sockets in any number; at most one watch for each at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoll: select.epoll | None = None
        self._watches: dict[int, Watch] = {}

    def watch(self, sock: socket.socket, on_gone: Callable[[], None], vanished_seconds: float) -> Watch:
        """``on_gone`` is called once, at once where the peer has gone already, on a thread that all share: it must be
        quick. A peer whose kernel is silent for ``vanished_seconds`` is gone too. Close the watch before the socket.

        Raises: OSError, ValueError where the socket is closed.
        """
        _ask_for_life(sock, vanished_seconds)
        with self._lock:
            self._started().register(sock, select.EPOLLRDHUP | select.EPOLLONESHOT)
            watch = self._watches[sock.fileno()] = Watch(self, sock.fileno(), on_gone)
        return watch

    @contextmanager
    def while_waiting(self, sock: socket.socket | None, broker: Broker) -> Iterator[Caller]:
        """The caller on this socket, watched from when it begins to wait, as most are answered at once. Without a
        socket (flask's own server) it never leaves."""
        if sock is None:
            yield Caller()
            return
        watches: list[Watch] = []

        def begin_wait() -> None:
            try:
                watches.append(self.watch(sock, lambda: broker.hang_up(caller), VANISHED_SECONDS))
            except (OSError, ValueError):
                broker.hang_up(caller)

        caller = Caller(here=lambda: not _is_gone(sock.fileno()), begin_wait=begin_wait)
        try:
            yield caller
        finally:
            for watch in watches:
                watch.close()

    def forget(self, watch: Watch, fd: int) -> None:
        with self._lock:
            if self._watches.get(fd) is watch and self._epoll is not None:
                del self._watches[fd]
                with suppress(OSError):  # closed before its watch: the system has forgotten it already
                    self._epoll.unregister(fd)

    def _started(self) -> select.epoll:
        if self._epoll is None:
            epoll = select.epoll()
            threading.Thread(target=self._run, args=(epoll,), name="hang-up", daemon=True).start()
            self._epoll = epoll  # after the start: without its thread nobody would see anybody go
        return self._epoll

    def _run(self, epoll: select.epoll) -> None:
        while True:
            for fd, _ in epoll.poll():
                with self._lock:
                    watch = self._watches.get(fd)
                if watch is not None:
                    watch.look()


def _ask_for_life(sock: socket.socket, vanished_seconds: float) -> None:
    """Probes while nothing is sent, a limit for what is sent and not acknowledged (tcp(7), TCP_USER_TIMEOUT)."""
    if sock.family == socket.AF_UNIX:
        return
    each_seconds = max(1, int(vanished_seconds / 4))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, each_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, each_seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(vanished_seconds * 1000))


def _is_gone(fd: int) -> bool:
    if fd < 0:
        return True  # closed on our side
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return any(state & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, state in poll.poll(0))
