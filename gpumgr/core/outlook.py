"""What those who wait may expect: why each of them waits, in which place, and when its turn comes.

Owns: the reason of a wait, and the forecast, which plays the very order ahead on virtual time. Must not: change the
queue, or know memory, HTTP, threads or a clock.

The forecast is a guess and a careful one: everybody who waits keeps waiting, each holds for as long as its consumer's
holds usually take, one that holds for longer than that already as long again, nobody longer than they may, and a swap
takes what it was seen to take. A start that depends on the end of somebody of whom nothing is known is not known
either.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gpumgr.core.catalog import Catalog, GpuRef
from gpumgr.core.ledger import percentile
from gpumgr.core.quantum import UNKNOWN_SWAP_SECONDS, Quantum, Swap
from gpumgr.core.queue import Entry, Hold, Phase, Queue, Stay, WaitingFor, swapped_out

USUALLY_PERCENT = 80
"""Of the holds that were seen: most are over by then."""
GUESSED_HOLD_SECONDS = 10.0
"""Where none was seen: for the places of those behind alone."""
FORESEEN = 100
"""Turns that are played ahead. Whoever comes later has a place and no time."""

UsualSeconds = Callable[[str], float | None]
"""How long a consumer's holds take; None where none was seen."""


@dataclass(frozen=True, slots=True)
class Why:
    """``until``: of a quantum alone, when it is over if nobody else comes. ``whose``: who keeps the card until then.
    ``lingers``: nobody uses it meanwhile."""

    reason: WaitingFor
    until: float | None = None
    whose: tuple[str, ...] = ()
    lingers: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """``place``: 1 is the next one to get a turn. ``start_at``: when it is granted; None: nobody knows."""

    place: int
    start_at: float | None


def usual_seconds(seen: Iterable[float]) -> float | None:
    return percentile(list(seen), USUALLY_PERCENT)


# -- why ----------------------------------------------------------------------------------------------------


def why(queue: Queue, entry: Entry, now: float) -> Why:
    """What this entry of the line waits for. For a quantum where others of the resident go ahead although they came
    later, also while one of them holds the card; or where it lingers."""
    residents = _residents(queue, entry)
    needs = _swap(queue, entry)
    if needs is not None and now < needs.due_at and any(_overtakes(queue, name, entry) for name in residents):
        return Why(WaitingFor.QUANTUM, needs.due_at, residents)
    reason = queue.why(entry)
    until = None if needs is None else min(needs.due_at, needs.lingers_until)
    if until is not None and now < until and reason is not WaitingFor.HOLDER:
        return Why(WaitingFor.QUANTUM, until, residents, lingers=True)
    return Why(reason)


def _residents(queue: Queue, entry: Entry) -> tuple[str, ...]:
    """Who has the turn and would have to go for it."""
    return tuple(sorted(_leaving(queue.catalog, queue.stays, entry.consumer)))


def _leaving(catalog: Catalog, stays: Mapping[str, Stay], consumer: str) -> list[str]:
    return [name for name in swapped_out(consumer, stays, catalog) if stays[name].since is not None]


def _swap(queue: Queue, entry: Entry) -> Swap | None:
    policy = queue.policy
    if not isinstance(policy, Quantum):
        return None
    return policy.swap_needed(entry, queue.line, queue.catalog, queue.stays, queue.swap_seconds)


def _overtakes(queue: Queue, resident: str, entry: Entry) -> bool:
    """Whether somebody waits for the resident who came after this one."""
    last = queue.last(resident)
    return last is not None and last.order > entry.order


# -- when ---------------------------------------------------------------------------------------------------


def forecast(
    queue: Queue,
    now: float,
    usual: UsualSeconds,
    held_since: Mapping[int, float],
    over_by: Mapping[int, float],
    most: int = FORESEEN,
) -> dict[int, Expected]:
    """Of everybody in the line, by number. ``queue``: a fork, which is played to its end. ``held_since``: when each
    hold was granted; one that is missing there is being prepared. ``over_by``: when a hold is over at the latest."""
    return _Play(queue, now, usual).run(held_since, over_by, most)


@dataclass
class _Play:
    queue: Queue
    now: float
    usual: UsualSeconds

    def run(self, held_since: Mapping[int, float], over_by: Mapping[int, float], most: int) -> dict[int, Expected]:
        self._found: dict[int, Expected] = {}
        self._ends: list[tuple[float, int, bool]] = []
        self._doubtful: set[GpuRef] = set()
        """GPUs on which somebody was guessed to end."""
        self._prepared_at: dict[GpuRef, float] = {}
        """When the last one that began there is granted: one preparation per GPU."""
        for hold in self.queue.holds.values():
            self._goes_on(hold, held_since.get(hold.seq), over_by.get(hold.seq, float("inf")))
        waiting = [entry.seq for entry in self.queue.waiting()]
        self._begin()
        while len(self._found) < min(most, len(waiting)) and (instant := self._next_instant()) is not None:
            self.now = max(self.now, instant)
            while self._ends and self._ends[0][0] <= self.now:
                self._end()
            self._begin()
        for seq in waiting:
            self._found.setdefault(seq, Expected(len(self._found) + 1, None))
        return self._found

    def _next_instant(self) -> float | None:
        instants = [self._ends[0][0]] if self._ends else []
        again_at = self.queue.look_again_at
        return min(instants + ([] if again_at is None or again_at <= self.now else [again_at]), default=None)

    def _goes_on(self, hold: Hold, since: float | None, over_by: float) -> None:
        """One that holds already, or is being prepared."""
        hold.phase = Phase.LIVE
        usual = self.usual(hold.consumer)
        length = GUESSED_HOLD_SECONDS if usual is None else usual
        so_far = 0.0 if since is None else self.now - since
        left = length - so_far if so_far < length else so_far
        self._push(hold, min(self.now + left, over_by), known=usual is not None)

    def _begin(self) -> None:
        while True:
            before = self.queue.stays
            begun = self.queue.begin(self.now)
            for hold in begun:
                hold.phase = Phase.LIVE
                free_at = max([self.now, *(self._prepared_at.get(gpu, self.now) for gpu in hold.gpus)])
                start_at = free_at + self._swap_seconds(hold, before)
                self._prepared_at |= dict.fromkeys(hold.gpus, start_at)
                usual = self.usual(hold.consumer)
                known = self._doubtful.isdisjoint(hold.gpus)
                self._found[hold.seq] = Expected(len(self._found) + 1, start_at if known else None)
                length = GUESSED_HOLD_SECONDS if usual is None else usual
                self._push(hold, start_at + length, known=usual is not None)
            if not begun:
                return

    def _swap_seconds(self, hold: Hold, before: Mapping[str, Stay]) -> float:
        """Several go together, as a rule."""
        leaving = _leaving(self.queue.catalog, before, hold.consumer)
        found = [self.queue.swap_seconds(name, hold.consumer) for name in leaving]
        return max((UNKNOWN_SWAP_SECONDS if cost is None else cost for cost in found), default=0.0)

    def _push(self, hold: Hold, ends_at: float, *, known: bool) -> None:
        heapq.heappush(self._ends, (ends_at, hold.seq, known))

    def _end(self) -> None:
        _, seq, known = heapq.heappop(self._ends)
        if not known:
            self._doubtful |= set(self.queue.holds[seq].gpus)
        self.queue.leave(seq)
