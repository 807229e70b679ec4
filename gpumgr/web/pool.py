"""The worker's threads, and which request a free one takes next.

Owns: what gunicorn asks of ``concurrent.futures.ThreadPoolExecutor``, whose place this takes. Must not: look at a
request; nobody has read it yet.

**Whoever was answered before goes first.** A holder renews on a connection that it keeps. In one line, a renew waits
behind everyone who came in the moment before it: 1000 callers at once held one up for 440 ms, though most of them are
only refused (bench/flood.py). Each eighth free thread looks at the newcomers first, so that nobody is left out.

**All threads are there from the start.** The executor starts them one by one as requests come, in gunicorn's main loop,
which waits for each until it runs: among busy threads that took 100 to 300 ms, in which nobody was served.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

NEWCOMERS_EACH = 8

Work = Callable[[], None]


class Pool:
    """Daemon threads: the process ends without those that still wait when gunicorn's graceful time is over."""

    def __init__(self, threads: int) -> None:
        self._lock = threading.RLock()  # gunicorn's handler of SIGQUIT may interrupt ``submit`` and call ``shutdown``
        self._known: deque[Work] = deque()
        self._new: deque[Work] = deque()
        self._idle: list[SimpleQueue[Work | None]] = []
        self._turns = itertools.count(1)
        self._is_over = False
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._run, name=f"request-{number}", daemon=True).start()

    def submit(self, work: Callable[[Any], Any], conn: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._idle:
                self._idle.pop().put(lambda: _done(future, work, conn))  # the last one: its memory is warm
            else:
                (self._known if is_known(conn) else self._new).append(lambda: _done(future, work, conn))
        return future

    def is_at_leisure(self) -> bool:
        """Nobody waits for a thread, and half of them have nothing to do: one may be spared for a moment."""
        return not self._known and not self._new and 2 * len(self._idle) >= self._threads

    def shutdown(self, wait: bool = True) -> None:  # noqa: ARG002 gunicorn never waits here
        """Each thread ends when nothing is left to take."""
        with self._lock:
            self._is_over = True
            while self._idle:
                self._idle.pop().put(None)

    def _run(self) -> None:
        mine: SimpleQueue[Work | None] = SimpleQueue()
        while (work := self._next(mine)) is not None:
            work()

    def _next(self, mine: SimpleQueue[Work | None]) -> Work | None:
        """Waits. None at the end."""
        with self._lock:
            if self._known or self._new:
                return self._first()
            if self._is_over:
                return None
            self._idle.append(mine)
        return mine.get()

    def _first(self) -> Work:
        lanes = [self._known, self._new]
        if next(self._turns) % NEWCOMERS_EACH == 0:
            lanes.reverse()
        return next(lane for lane in lanes if lane).popleft()


def is_known(conn: Any) -> bool:
    """gunicorn 23 gthread.py, ``TConn``: the time limit is set when a connection is kept after an answer."""
    return conn.timeout is not None


def _done(future: Future[Any], work: Callable[[Any], Any], conn: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work(conn)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
