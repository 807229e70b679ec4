"""Who has made way for whom: so that it comes back directly behind that one.

Owns: for whose sake leases were given back, for as long as their holders may come back. Must not: ask anybody to make
way (yielding.py), or place anybody (queue.py). Pure: the caller holds the lock.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

COMES_BACK_WITHIN_SECONDS = 600.0
"""A holder saves what it has, and asks again. Later than that it is a new request."""
KEPT = 1000


@dataclass(frozen=True, slots=True)
class _Yielded:
    consumer: str
    to: int
    until: float


@dataclass
class Resuming:
    """By ``lease_id``. ``to`` is the number of the request that it yielded to."""

    _kept: OrderedDict[str, _Yielded] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def yielded(self, lease_id: str, consumer: str, to: int, now: float) -> None:
        self._kept[lease_id] = _Yielded(consumer, to, now + COMES_BACK_WITHIN_SECONDS)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def resume(self, lease_id: str | None, consumer: str, now: float) -> int | None:
        """Behind whom it comes back, once; None: nobody remembers it, or it is for another consumer."""
        found = self.behind(lease_id, consumer, now)
        if found is not None:
            del self._kept[lease_id or ""]
        return found

    def behind(self, lease_id: str | None, consumer: str, now: float) -> int | None:
        """The same, without coming back."""
        found = self._kept.get(lease_id or "")
        return None if found is None or found.consumer != consumer or now >= found.until else found.to
