"""Waiting for a state instead of hoping for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(predicate: Callable[[], T], seconds: float = 5.0, every_seconds: float = 0.005) -> T:
    """What the predicate says, as soon as that is true. Raises: TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(every_seconds)
    return found
