"""The machine's clock. freezegun moves both faces, as it patches the names of module ``time`` and ``datetime``."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def utc(self) -> datetime:
        return datetime.now(UTC)
