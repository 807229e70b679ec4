"""Threads that look at the broker from time to time.

Owns: when to look. Must not: decide what follows, or let one wait for another: the watchdog must be free to
end a lease while a server hangs, so the card and the servers are looked at by threads of their own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Rounds:
    """A named daemon thread that calls ``look`` and sleeps for as long as it answers, or until ``stop``.

    It survives a look that raises: the traceback is logged, and it looks again.
    """

    def __init__(self, name: str, look: Callable[[], float], after_failure_seconds: float = 1.0) -> None:
        self._look = look
        self._after_failure_seconds = after_failure_seconds
        self._nudged = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def nudge(self) -> None:
        """Look now."""
        self._nudged.set()

    def stop(self) -> None:
        self._stopping = True
        self._nudged.set()

    def join(self, timeout_seconds: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._stopping:
            try:
                pause = self._look()
            except Exception:
                log.exception("%s failed; it goes on", self._thread.name)
                pause = self._after_failure_seconds
            self._nudged.wait(pause)
            self._nudged.clear()
