"""The memory of one simulated process, coming and going step by step.

Owns: the ramps, and the CUDA context that stays until the process ends.
Must not: know why a service loads or unloads.
"""

from __future__ import annotations

import threading

from gpumgr.sim.card import OutOfMemory, SimulatedCard

STEP_SECONDS = 0.02


class Gone(Exception):
    """The service was stopped or died in the middle of this."""


class ProcessMemory:
    """Named parts (the models) of one process. Ramps of one process come one after the other.

    While loaded the process holds the sum of its parts, the context among them; afterwards the context alone.
    """

    def __init__(self, card: SimulatedCard, pid: int, gpu: int, context_mib: int, gone: threading.Event) -> None:
        self._card = card
        self._pid = pid
        self._gpu = gpu
        self._context_mib = context_mib
        self._gone = gone
        self._ramps = threading.Lock()
        self._parts: dict[str, int] = {}

    @property
    def used_mib(self) -> int:
        return self._card.used_mib(self._pid, self._gpu)

    def take(self, part: str, mib: int, seconds: float) -> None:
        """Raises: OutOfMemory (what was taken for this part is given back), Gone."""
        with self._ramps:
            before = self.used_mib
            self._parts[part] = mib
            try:
                self._card.allocate(self._pid, max(0, self._context_mib - before), self._gpu)
                before = max(before, self._context_mib)
                self._ramp(max(self.used_mib, self._resting_mib()), seconds)
            except OutOfMemory:
                del self._parts[part]
                self._card.set_used(self._pid, before, self._gpu)
                raise

    def give_back(self, part: str, seconds: float, share: float = 1.0) -> None:
        """``share`` below 1 leaves the rest held by nobody's name. Raises: Gone."""
        with self._ramps:
            self._parts.pop(part, None)
            used = self.used_mib
            self._ramp(used - round((used - self._resting_mib()) * share), seconds)

    def _resting_mib(self) -> int:
        return max(self._context_mib, sum(self._parts.values()))

    def _ramp(self, to_mib: int, seconds: float) -> None:
        start = self.used_mib
        steps = max(1, round(seconds / STEP_SECONDS))
        for step in range(1, steps + 1):
            if self._gone.wait(seconds / steps):
                raise Gone
            self._card.set_used(self._pid, start + round((to_mib - start) * step / steps), self._gpu)
