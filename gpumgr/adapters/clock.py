"""The machine's clock. freezegun moves its first two faces: it patches the modules ``time`` and ``datetime``."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class SystemClock:
    """``slept`` never goes back: under freezegun monotonic time runs ahead of CLOCK_BOOTTIME."""

    def __init__(self) -> None:
        self._slept = 0.0

    def monotonic(self) -> float:
        return time.monotonic()

    def utc(self) -> datetime:
        return datetime.now(UTC)

    def slept(self) -> float:
        """CLOCK_BOOTTIME counts suspend and CLOCK_MONOTONIC does not (clock_gettime(2))."""
        self._slept = max(self._slept, time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic())
        return self._slept
