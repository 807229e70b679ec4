"""Watching a consumer that may still compute for a holder whose lease is over.

Owns: the thread of each quarantine, what is asked of its consumer, and when it ends. Must not: decide what its end
means, which is the broker's.

    0 s      is it busy? Idle, no report, or nobody listening there: over, at once
    busy     what runs and what waits at that moment is ended, once (``on_expiry: interrupt``)
    +0.5 s   asked again, until it is idle, or ``quarantine_seconds`` are over. A report that hangs is busy
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from gpumgr.runtime.ports import BackendError, Clock, Dialect
from gpumgr.runtime.state import Quarantine, State

log = logging.getLogger(__name__)

AGAIN_SECONDS = 0.5


class _Over(Protocol):
    def __call__(self, quarantine: Quarantine, *, idle: bool) -> None: ...


class Watchman:
    """``watch`` returns at once; ``look`` is one step of it, for whoever owns the time."""

    def __init__(self, state: State, dialects: Mapping[str, Dialect], clock: Clock, at_most_seconds: float) -> None:
        self._state = state
        self._dialects = dialects
        self._clock = clock
        self._at_most_seconds = at_most_seconds
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Those that are not over go on in the next life."""
        self._stopping.set()

    def watch(self, quarantine: Quarantine, over: _Over) -> None:
        threading.Thread(
            target=self._run, args=(quarantine, over), name=f"quarantine-{quarantine.consumer}", daemon=True
        ).start()

    def _run(self, quarantine: Quarantine, over: _Over) -> None:
        look = self.looker(quarantine, over)
        while look() and not self._stopping.wait(AGAIN_SECONDS):
            pass

    def looker(self, quarantine: Quarantine, over: _Over) -> Callable[[], bool]:
        """Asks once each time it is called; whether to ask again."""
        until = self._clock.monotonic() + self._at_most_seconds
        interrupted = False

        def look() -> bool:
            nonlocal interrupted
            busy = self._is_alone(quarantine) and self._busy(quarantine.consumer)
            if busy and self._clock.monotonic() < until:
                if not interrupted and self._is_alone(quarantine):
                    interrupted = True
                    self._interrupt(quarantine)
                return True
            over(quarantine, idle=not busy)
            return False

        return look

    def _is_alone(self, quarantine: Quarantine) -> bool:
        """Else what it computes may be another holder's, who keeps it from being unloaded anyway."""
        with self._state.lock:
            return all(hold.seq == quarantine.seq for hold in self._state.queue.holds_of(quarantine.consumer))

    def _busy(self, name: str) -> bool:
        try:
            busy = self._dialects[name].busy()
        except BackendError as error:
            return not error.refused
        except Exception:  # a defect of one dialect must not keep the GPU
            log.exception("busy failed consumer=%s", name)
            return False
        if busy is None:
            with self._state.lock:
                self._state.memory[name].reports_busy = False
        return bool(busy)

    def _interrupt(self, quarantine: Quarantine) -> None:
        log.info("quarantine consumer=%s lease_id=%s: it still computes", quarantine.consumer, quarantine.lease_id)
        try:
            self._dialects[quarantine.consumer].interrupt()
        except BackendError as error:
            log.warning("what it computes could not be ended consumer=%s: %s", quarantine.consumer, error)
        except Exception:
            log.exception("interrupt failed consumer=%s", quarantine.consumer)
