"""gunicorn's gthread worker, without its cost per waiting request.

gunicorn 23 gthread.py, ``ThreadWorker.run``: after every event the main loop calls ``concurrent.futures.wait`` on all
requests that have not ended, which locks each of them. With 1 000 waiters that made a hand-over 1.9 times as slow as
with 10 (bench/waiters.py). Only two moments need the list: at the connection limit, and at the end of the worker.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from gunicorn.workers.gthread import ThreadWorker


class _Copy(set[Future[Any]]):
    """``run`` removes what it has seen done; here that is done by the future's own callback."""

    def remove(self, future: Future[Any]) -> None:
        self.discard(future)


class LeaseWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pending: set[Future[Any]] = set()
        super().__init__(*args, **kwargs)

    @property
    def futures(self) -> set[Future[Any]]:
        if self.alive and self.nr_conns < self.worker_connections:
            return _Copy()
        return _Copy(self._pending)

    @futures.setter
    def futures(self, _value: object) -> None:
        """The base class sets its deque; here the pending set takes its place."""

    def _wrap_future(self, future: Future[Any], conn: Any) -> None:
        future.conn = conn  # type: ignore[attr-defined]
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        future.add_done_callback(self.finish_request)
