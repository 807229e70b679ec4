"""An order with few swaps and a bound on waiting: whoever is on the card keeps its turn for a while.

Owns: how long a turn lasts, and how long a consumer that is idle keeps the card. Must not: know memory, HTTP, threads
or a clock: it is a pure decision over who waits, who holds, who stays, what swaps cost, and ``now``.

A **swap** sends away consumers that are on the card for one that may not be there beside them; it costs seconds in
which the card computes nothing. A request **needs a swap** while a consumer that its own one excludes is on the card,
or those whose sizes leave no room for it (core/sharing.py).
Rules of the turn (the numbers stand beside the code; 0 to 5 are those of core/queue.py):

6. Within one consumer and class: first come, first served. **Older** is below whoever is ahead by ``Entry.order``.
7. A request that needs no swap goes ahead of an older one that needs one, until that one is **due**: the resident has
   had its quantum since its turn began, and so has the one that waits since its arrival, which is ``PATIENCE`` times
   what the swap costs at least. For one that is more urgent than the next one for the resident, or where none waits
   for it, its head start counts as waited. Where it needs several gone, it is due when the last of their turns is
   over: so nobody keeps a card empty for a turn on another one.
8. Among those that need a swap nobody overtakes anybody whom they would hold up: when a turn is over, the next one is
   the oldest request's. One that is due is held up by older ones only.
9. The **quantum** of a pair is a multiple of what it costs to swap there and back, ``factor`` times at most:
   once for each ``WAITING_EACH`` requests that wait for this part of the card, as one that few wait for has time for a
   swap. It is the longest against a consumer that asked again at once, and usually does (within what 10 would wait
   for): it would send the resident away for each of its requests. A swap there and back counts as ``floor_seconds`` at
   least, so that a turn covers a few requests. Where somebody has fixed ``quantum_seconds``, that is its most instead.
   For a request that is more urgent than the next one for the resident, it is ``URGENT`` times what the swap costs.
10. A consumer that is idle **lingers** before a swap where it usually comes back soon: for twice the median of its
   last gaps and ``GRACE_SECONDS``, unless that is more than ``LINGER_SHARE`` of what is **at stake**: the dearest swap
   there and back with one that waits, as it comes back after all of them. By the swap that is next alone, whoever has
   a cheap one next to it would leave after each request, and the others stay for a turn. Where that is too little it
   goes at once; so it does where nobody knows yet what a swap costs, as an idle card is certain and the saving is not.
   Nobody waits for it who needs no swap, nor longer than until they are due.
11. Who joins others on the card joins their turn, so that the quanta of coexisting consumers do not add up.

**The bound.** On one card, with consumers that all exclude each other, a request waits at most for

- the holds of all who came before it, with a swap for each of them, and its own swap: the worst of first come first
  served (whoever holds already as it comes is among them, however urgent it is itself),
- and once for each other consumer: its longest quantum, and the hold that runs when that is over.

Why: every turn begins with the oldest request, so that the swaps are no more than the older ones, and a consumer
whose younger requests overtake this one has no older ones left and gets no other turn before it. All that it is
overtaken by, and the lingering, lies within one quantum of the turn that each other consumer has last.

With priorities those who come later and are ahead count as older ones, and each of them may begin one more such turn.
They have come within two head starts at most (core/queue.py): nobody starves. The same holds for one that resumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from gpumgr.core.catalog import Catalog
from gpumgr.core.queue import Entry, Hold, Line, Stay, SwapSeconds, Turns, blocked, heads, in_order, swapped_out
from gpumgr.core.sharing import crowded

FACTOR = 8.0
PATIENCE = 4.0
URGENT = 1.0
WAITING_EACH = 1.5
FLOOR_SECONDS = 12.0
LINGER_SHARE = 0.5
GRACE_SECONDS = 0.2
"""A caller's next request is on its way for a moment also where it does not think."""
GAPS_NEEDED = 2
UNKNOWN_SWAP_SECONDS = 5.0
"""Until a swap was seen: a small model from a warm disk cache."""


@dataclass(frozen=True, slots=True)
class Quantum:
    """``quantum_seconds``: the longest quantum of all pairs; None: by what their swaps cost."""

    quantum_seconds: float | None = None
    factor: float = FACTOR
    floor_seconds: float = FLOOR_SECONDS
    linger_share: float = LINGER_SHARE

    def turns(
        self,
        line: Line,
        holds: Iterable[Hold],
        catalog: Catalog,
        now: float,
        stays: Mapping[str, Stay],
        swap_seconds: SwapSeconds,
    ) -> Turns:
        ahead = Counter(hold.consumer for hold in holds)
        holders = Counter(ahead)
        first: list[Entry] = []
        behind: list[tuple[Entry, Swap]] = []
        due_at: dict[int, float] = {}
        for entry in heads(line, catalog):  # 6
            needs = self.swap_needed(entry, line, catalog, stays, swap_seconds)
            if needs is not None:
                due_at[entry.seq] = needs.due_at
            if needs is None or (needs.due_at <= now and not _held_up(entry, behind, catalog)):
                first.append(entry)
            else:
                behind.append((entry, needs))  # 7
        found = in_order(first, ahead, catalog)
        # Also of whoever is due. Not younger ones that wait: they held it up, so that nobody else says when it goes.
        in_the_way = holders + Counter(entry.consumer for entry in found)
        look_again_at: float | None = None
        for entry, needs in behind:
            goes = not blocked(entry.consumer, ahead, catalog)
            until = min(needs.due_at, needs.lingers_until) if goes else needs.due_at  # 10
            ahead[entry.consumer] += 1  # 8
            if goes and until <= now:
                found.append(entry)
            elif until > now and not blocked(entry.consumer, in_the_way, catalog):
                look_again_at = until if look_again_at is None else min(look_again_at, until)
            in_the_way[entry.consumer] += 1
        return Turns(found, look_again_at, due_at)

    def swap_needed(
        self, entry: Entry, line: Line, catalog: Catalog, stays: Mapping[str, Stay], swap_seconds: SwapSeconds
    ) -> Swap | None:
        """The swap that a waiting request needs; None: none. Also for whoever has to say why it waits."""
        due_at, lingers_until = float("-inf"), float("-inf")
        found = False
        for name in swapped_out(entry.consumer, stays, catalog):
            stay = stays[name]
            if stay.since is None:
                continue
            found = True
            cost = round_trip_seconds(name, entry.consumer, swap_seconds)
            at_stake, its_stake = (
                max(cost, at_stake_seconds(each, line, catalog, stays, swap_seconds)) for each in (name, entry.consumer)
            )
            insists = entry.consumer in stays and self._asked_again_at_once(stays[entry.consumer], its_stake)
            asked = self.factor if insists else waiting_for_part_of(name, line, catalog) / WAITING_EACH
            due_at = max(due_at, self._due_at(entry, line.get(name, {}), stay.since, asked, cost))
            if stay.idle_since is not None and _is_known(name, entry.consumer, swap_seconds):
                lingers_until = max(lingers_until, stay.idle_since + self.linger_seconds(stay, at_stake))
        return Swap(due_at, lingers_until) if found else None

    def _due_at(
        self, entry: Entry, residents: Mapping[int, Entry], turn_since: float, asked: float, cost: float
    ) -> float:
        """``residents``: those who wait for who is on the card. ``asked``: how many times what the swap costs (9)."""
        turn, patience, waits_from = asked, max(PATIENCE, asked), entry.arrived_at
        next_there = next(iter(residents.values()), None)
        if next_there is None or entry.priority.rank < next_there.priority.rank:  # 7
            waits_from = min(entry.arrived_at, entry.counts_from)
        if next_there is not None and entry.priority.rank < next_there.priority.rank:  # 9
            turn = patience = URGENT
        return max(
            turn_since + self.quantum_seconds_of(cost, turn), waits_from + self.quantum_seconds_of(cost, patience)
        )

    def _asked_again_at_once(self, stay: Stay, at_stake: float) -> bool:
        return self.linger_seconds(stay, at_stake) > 0 and self._pays(stay.gaps[-1], at_stake)

    def quantum_seconds_of(self, round_trip: float, times: float) -> float:
        """So many times what the swap costs, within what is the most."""
        times = min(times, self.factor)
        if self.quantum_seconds is not None:
            return self.quantum_seconds * times / self.factor
        return times * max(self.floor_seconds, round_trip)

    def longest_seconds(self, round_trip: float) -> float:
        return self.quantum_seconds_of(round_trip, float("inf"))

    def linger_seconds(self, stay: Stay, at_stake: float) -> float:
        """How long it keeps the card although it is idle (10); 0: not at all."""
        if len(stay.gaps) < GAPS_NEEDED:
            return 0.0
        gap = median(stay.gaps)
        return _expected_seconds(gap) if self._pays(gap, at_stake) else 0.0

    def _pays(self, gap: float, at_stake: float) -> bool:
        """Whether waiting for one that comes back after so long costs less than it saves."""
        return _expected_seconds(gap) <= self.linger_share * at_stake


@dataclass(frozen=True, slots=True)
class Swap:
    """What a request needs before its turn. ``due_at``: nobody overtakes it from then on."""

    due_at: float
    lingers_until: float


def waiting_for_part_of(resident: str, line: Line, catalog: Catalog) -> int:
    """How many wait for this consumer, or for it to go."""
    others = catalog.excluded[resident] | catalog.mates[resident]
    return sum(len(entries) for name, entries in line.items() if name == resident or name in others)


def _expected_seconds(gap: float) -> float:
    return 2 * gap + GRACE_SECONDS


def _is_known(resident: str, other: str, swap_seconds: SwapSeconds) -> bool:
    return swap_seconds(resident, other) is not None and swap_seconds(other, resident) is not None


def round_trip_seconds(resident: str, other: str, swap_seconds: SwapSeconds) -> float:
    """A turn of somebody else costs two swaps: theirs, and the one back."""
    there, back = swap_seconds(resident, other), swap_seconds(other, resident)
    return sum(UNKNOWN_SWAP_SECONDS if seconds is None else seconds for seconds in (there, back))


def at_stake_seconds(
    consumer: str, line: Line, catalog: Catalog, stays: Mapping[str, Stay], swap_seconds: SwapSeconds
) -> float:
    """The dearest swap there and back that is known, with one that it excludes and that waits, or is in its place."""
    others = (other for other in catalog.excluded[consumer] if other in line or _stays(other, stays))
    known = (other for other in others if _is_known(consumer, other, swap_seconds))
    return max((round_trip_seconds(consumer, other, swap_seconds) for other in known), default=0.0)


def _stays(consumer: str, stays: Mapping[str, Stay]) -> bool:
    return consumer in stays and stays[consumer].since is not None


def _held_up(entry: Entry, behind: Iterable[tuple[Entry, Swap]], catalog: Catalog) -> bool:
    older = [other.consumer for other, _ in behind]
    excludes = any(catalog.exclude(entry.consumer, other) for other in older)
    return excludes or crowded(entry.consumer, older, catalog)
