"""Who has made way for whom: so that it comes back directly behind that one.

Owns: for whose sake leases were given back, for as long as their holders may come back. Must not: ask anybody to make
way (yielding.py), or place anybody (queue.py). Pure: the caller holds the lock.

A lease_id is public, and a place ahead of others worth having: only the bearer that gave the lease back has it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

COMES_BACK_WITHIN_SECONDS = 600.0
"""A holder saves what it has, and asks again. Later than that it is a new request."""
KEPT = 1000


@dataclass(slots=True)
class _Yielded:
    consumer: str
    to: int
    until: float
    bearer: str | None
    taken: bool = False


@dataclass
class Resuming:
    """By ``lease_id``. ``to`` is the number of the request that it yielded to."""

    _kept: OrderedDict[str, _Yielded] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._kept)

    def yielded(self, lease_id: str, consumer: str, to: int, now: float, bearer: str | None = None) -> None:
        """``bearer``: the name of whoever gave it back; None where nobody is asked who calls."""
        self._kept[lease_id] = _Yielded(consumer, to, now + COMES_BACK_WITHIN_SECONDS, bearer)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def resume(self, lease_id: str | None, consumer: str, now: float, bearer: str | None = None) -> int | None:
        """Behind whom it comes back, once; None: nobody remembers it, or it is for another consumer, or another's."""
        found = self.behind(lease_id, consumer, now, bearer)
        if found is not None:
            self._kept[lease_id or ""].taken = True
        return found

    def give_back(self, lease_id: str | None) -> None:
        """Whoever came back got nothing: it may come back again, for as long as before."""
        if found := self._kept.get(lease_id or ""):
            found.taken = False

    def behind(self, lease_id: str | None, consumer: str, now: float, bearer: str | None = None) -> int | None:
        """The same, without coming back."""
        found = self._kept.get(lease_id or "")
        if found is None or found.taken or (found.consumer, found.bearer) != (consumer, bearer) or now >= found.until:
            return None
        return found.to
