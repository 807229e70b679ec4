"""The places that may block: so many threads less than the pool has.

gunicorn's pool queues what it has no thread for, unseen, so a renew would wait behind the waiters (measured with
8 threads: 8 waiters delay a renew by 4.7 s, 7 do not). A request that finds no place is refused at once.
"""

from __future__ import annotations

import threading

from gpumgr.errors import QueueFull


class Places:
    def __init__(self, count: int) -> None:
        self.count = count
        self._free = threading.Semaphore(count)

    def take(self) -> Place:
        """Until it is given back. Raises: QueueFull."""
        if not self._free.acquire(blocking=False):
            raise QueueFull(
                f"all {self.count} places for waiting requests are taken; ask again later, or raise server.threads",
                places=self.count,
            )
        return Place(self._free)


class Place:
    """Taken by one thread and given back by the same, which may say so more than once."""

    def __init__(self, free: threading.Semaphore) -> None:
        self._free: threading.Semaphore | None = free

    def give_back(self) -> None:
        free, self._free = self._free, None
        if free is not None:
            free.release()
