"""Who waits, who holds, and who has the turn.

Owns: tickets, holds, the consumers that are being unloaded, and the order, which is one pure policy object.
Must not: know time's passing, memory, HTTP or threads.

Rules of the turn (the numbers stand beside the code):

0. Who is ahead of whom is fixed from the moment they enter: an interactive request counts as having come
   ``HEAD_START_SECONDS`` earlier, one of batch as much later. So within a class it is first come, first served; a more
   urgent one goes ahead of those that came shortly before it, and of nobody who has waited for longer than its head
   start: that is the ageing, and nobody starves. One that resumes counts as having come directly behind the one that
   it yielded to.
1. Two requests conflict when their consumers share a GPU and do not coexist; some also where their sizes do not fit
   together (core/sharing.py).
2. Requests for one consumer conflict beyond its ``max_concurrency``.
3. A request has its turn when it conflicts with no holder and with nobody ahead of it: nobody overtakes
   someone they would hold up.
4. Its consumer must be in service: not in the middle of an unload.
5. One preparation per GPU: a request whose GPU is being prepared for another one keeps its place until then.
   What waits for a GPU's preparation also holds back whoever comes later for that GPU, so that preparations
   on a card keep the order of arrival.

A request that has its turn becomes a holder at once (``preparing``), so everything decided afterwards counts it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import takewhile
from typing import Protocol

from gpumgr.core.catalog import Catalog, Consumer, GpuRef, overlap
from gpumgr.core.sharing import crowded, holds_up, leaving_for


class Phase(StrEnum):
    """Where a hold is in its life. Every phase excludes others: also the ones on the way in and out."""

    PREPARING = "preparing"
    GRANTING = "granting"
    LIVE = "live"
    ENDING = "ending"
    QUARANTINE = "quarantine"


class WaitingFor(StrEnum):
    """What a queued request waits for, as status shows it."""

    HOLDER = "holder"
    AHEAD = "ahead"
    VRAM = "vram"
    PREPARING = "preparing"
    DRAINING = "draining"
    QUANTUM = "quantum"


class Priority(StrEnum):
    """How urgent a request is; the most urgent first."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BATCH = "batch"

    @property
    def rank(self) -> int:
        """0 is the most urgent."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}
HEAD_START_SECONDS = 120.0
"""What one class is worth. By half of it interactive voices at half load get a p95 of 0.53 times that without
priorities, by this of 0.46; and no batch request is overtaken by who comes four minutes after it."""

Order = tuple[float, int, int]
"""The instant from which a request counts as waiting, and its place."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request in the order. ``seq`` is its number of arrival; no two are the same. ``arrived_at``: when it came.
    ``behind``: the order of the one that it yielded to. ``order``: the smallest is ahead of all others."""

    seq: int
    consumer: str
    arrived_at: float = 0.0
    priority: Priority = Priority.NORMAL
    behind: Order | None = None
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        head_start = (Priority.NORMAL.rank - self.priority.rank) * HEAD_START_SECONDS
        order = (self.arrived_at - head_start, self.seq, 0)  # 0
        if self.behind is not None:
            order = (*self.behind[:2], self.seq)
        object.__setattr__(self, "order", order)

    @property
    def counts_from(self) -> float:
        """The instant from which it counts as waiting: its arrival less its head start."""
        return self.order[0]

    @property
    def place(self) -> tuple[int, int]:
        """Its arrival as a number: ``(seq, 0)``, or directly behind the request that it yielded to."""
        return self.order[1:]


@dataclass(slots=True)
class Hold:
    """A holder: a preparation, or a grant of a consumer's GPUs. ``priority``: that of its request."""

    seq: int
    consumer: str
    gpus: tuple[GpuRef, ...]
    phase: Phase = Phase.PREPARING
    priority: Priority = Priority.NORMAL


GAPS_KEPT = 8
ORDERS_KEPT = 256
"""So many turns later nobody comes back behind a request that it yielded to."""


@dataclass(frozen=True, slots=True)
class Stay:
    """A consumer on its GPUs, as far as turns know. ``since``: its turn began, as it came onto them or joined those who
    were there; None: it was sent away, or never came. ``idle_since``: nobody holds it nor waits for it; None
    while somebody does. ``gaps``: how many seconds it was idle before each of its last ``GAPS_KEPT`` returns, the
    oldest first."""

    since: float | None = None
    idle_since: float | None = None
    gaps: tuple[float, ...] = ()

    def asked(self, now: float) -> Stay:
        """Somebody asks for it, who is the first since it was idle."""
        if self.idle_since is None:
            return self
        gap = max(0.0, now - self.idle_since)
        return replace(self, idle_since=None, gaps=(*self.gaps, gap)[-GAPS_KEPT:])


Line = Mapping[str, Mapping[int, Entry]]
"""Each consumer's waiting entries (seq → entry), whoever is ahead first."""

SwapSeconds = Callable[[str, str], float | None]
"""What it costs to have the second consumer on the card in the place of the first; None where nobody knows yet."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Who has the turn now, in this order. ``look_again_at``: the instant at which the answer is another one although
    nobody came or went until then; None: there is none. ``due_at``: of those who need a swap, by their number, the
    instant from which on nobody overtakes them; empty where the policy knows no swaps."""

    entries: list[Entry] = field(default_factory=list)
    look_again_at: float | None = None
    due_at: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Next:
    """Who would have the turn. ``due_at``: as in ``Turns``; None: it needs no swap, or the policy knows none."""

    entry: Entry
    due_at: float | None


class Policy(Protocol):
    """The order. Pure: which waiting requests have their turn now. Rules 1 to 3, and who goes first."""

    def turns(
        self,
        line: Line,
        holds: Iterable[Hold],
        catalog: Catalog,
        now: float,
        stays: Mapping[str, Stay],
        swap_seconds: SwapSeconds,
    ) -> Turns: ...


class Fifo:
    """First come, first served, except that nobody waits for someone they do not conflict with.

    Within one consumer only the first ``max_concurrency`` entries can have the turn, so the cost does not
    grow with the queue's length.
    """

    def turns(
        self,
        line: Line,
        holds: Iterable[Hold],
        catalog: Catalog,
        _now: float,
        _stays: Mapping[str, Stay],
        _swap_seconds: SwapSeconds,
    ) -> Turns:
        ahead = Counter(hold.consumer for hold in holds)
        return Turns(in_order(heads(line, catalog), ahead, catalog))


def in_order(entries: Iterable[Entry], ahead: Counter[str], catalog: Catalog) -> list[Entry]:
    """Who of these goes, where whoever is earlier among them, and ``ahead``, is not to be held up."""
    found = []
    for entry in entries:
        if not blocked(entry.consumer, ahead, catalog):
            found.append(entry)
        ahead[entry.consumer] += 1  # 3: whoever comes later yields to it, whether it goes or waits
    return found


def heads(line: Line, catalog: Catalog) -> list[Entry]:
    """Those that can have the turn, whoever is ahead first: of each consumer as many as it serves at once."""
    first: list[Entry] = []
    for consumer, entries in line.items():
        for entry, _ in zip(entries.values(), range(catalog.consumers[consumer].max_concurrency), strict=False):
            first.append(entry)
    return sorted(first, key=_order)


def _order(entry: Entry) -> Order:
    return entry.order


def stays_after(
    stays: Mapping[str, Stay], line: Line, holds: Iterable[Hold], catalog: Catalog, now: float
) -> dict[str, Stay]:
    """Who stays, given who waits and holds now. A holder is on the card, and whom it excludes was sent
    away for it. Who joins others on a GPU joins their turn, so that together they keep nobody waiting for longer."""
    found = dict(stays)
    held = {hold.consumer for hold in holds}
    for name in sorted(held):
        stay = found.get(name, Stay())
        if stay.since is None:
            beside = []
            leaving = leaving_for(name, on_card(found), catalog) if catalog.mates[name] else []
            for other, its in found.items():
                if its.since is not None and catalog.exclude(name, other):
                    found[other] = replace(its, since=None)
                elif its.since is not None and catalog.share_gpu(name, other) and other not in leaving:
                    beside.append(its.since)
            found[name] = replace(stay, since=min(beside, default=now), idle_since=None)
        elif stay.idle_since is not None:
            found[name] = replace(stay, idle_since=None)
    for name, stay in found.items():
        if stay.since is not None and stay.idle_since is None and name not in held and name not in line:
            found[name] = replace(stay, idle_since=now)
    return found


def blocked(consumer: str, ahead: Mapping[str, int], catalog: Catalog) -> bool:
    """Whether one more request for this consumer conflicts with ``ahead`` (consumer → how many)."""
    if ahead.get(consumer, 0) >= catalog.consumers[consumer].max_concurrency:  # 2
        return True
    there = [other for other, count in ahead.items() if count]
    return any(catalog.exclude(consumer, other) for other in there) or crowded(consumer, there, catalog)  # 1


def on_card(stays: Mapping[str, Stay]) -> list[str]:
    """Those who stay, in the order in which they would go: who is idle for the longest time first."""
    there = [(name, stay.idle_since) for name, stay in stays.items() if stay.since is not None]
    return [name for name, idle in sorted(there, key=lambda each: float("inf") if each[1] is None else each[1])]


def swapped_out(consumer: str, stays: Mapping[str, Stay], catalog: Catalog) -> list[str]:
    """Who has to leave the card for a request: all that its consumer excludes, and by size as many as it takes."""
    found = [name for name in catalog.excluded[consumer] if name in stays and stays[name].since is not None]
    if catalog.mates[consumer]:
        found += leaving_for(consumer, [name for name in on_card(stays) if name not in found], catalog)
    return found


class Queue:
    """The book of who waits and who holds. Mutable, but pure: no clock, no lock, no I/O."""

    def __init__(self, catalog: Catalog, policy: Policy, swap_seconds: SwapSeconds = lambda _from, _to: None) -> None:
        self.catalog = catalog
        self.stays: dict[str, Stay] = {}
        """Of every consumer that had a turn."""
        self.look_again_at: float | None = None
        """The instant at which ``begin`` may find somebody although nobody came or went."""
        self._policy = policy
        self._swap_seconds = swap_seconds
        self._line: dict[str, OrderedDict[int, Entry]] = {}
        self._holds: dict[int, Hold] = {}
        self._unloading: dict[str, int] = {}
        self._seq = 0
        self._last_arrived_at = float("-inf")
        self._orders: OrderedDict[int, Order] = OrderedDict()
        """Of those who had their turn lately, as whoever yielded to one comes back when it may be over."""

    def copy(self) -> Queue:
        """As it is now, for whoever wants to know what would come of something. The policy is shared, as it is pure."""
        other = copy(self)
        for name, book in vars(self).items():
            if isinstance(book, dict):
                setattr(other, name, copy(book))
        other._line = {name: OrderedDict(entries) for name, entries in self._line.items()}
        other._holds = {seq: replace(hold) for seq, hold in self._holds.items()}
        return other

    # -- coming and going ---------------------------------------------------------------------------------

    def number(self) -> int:
        """The next number of arrival."""
        self._seq += 1
        return self._seq

    def enter(
        self, consumer: str, now: float, *, priority: Priority = Priority.NORMAL, behind: int | None = None
    ) -> Entry:
        """``behind``: the number of the request that this one yielded to. One that nobody remembers changes nothing."""
        now = self._last_arrived_at = max(now, self._last_arrived_at)  # its clock may have been read before another's
        entry = Entry(self.number(), consumer, now, priority, self._order_of(behind))
        if consumer in self.stays:
            self.stays[consumer] = self.stays[consumer].asked(now)
        self._insert(entry)
        return entry

    def _order_of(self, seq: int | None) -> Order | None:
        if seq is None or seq in self._orders:
            return None if seq is None else self._orders[seq]
        return next((entries[seq].order for entries in self._line.values() if seq in entries), None)

    def _insert(self, entry: Entry) -> None:
        """Costs as many steps as it overtakes."""
        queued = self._line.setdefault(entry.consumer, OrderedDict())
        overtaken = list(takewhile(lambda other: other.order > entry.order, reversed(queued.values())))
        queued[entry.seq] = entry
        for other in reversed(overtaken):
            queued.move_to_end(other.seq)

    def leave(self, seq: int) -> None:
        """Forget a request or a hold, wherever it is. Nothing happens where it is gone already."""
        self._holds.pop(seq, None)
        for consumer, entries in self._line.items():
            if entries.pop(seq, None) is not None:
                if not entries:
                    del self._line[consumer]
                return

    def resolve(self, catalog: Catalog) -> None:
        """The same consumers, with GPUs that are now known by their index."""
        self.catalog = catalog
        self.stays = {name: stay for name, stay in self.stays.items() if name in catalog.consumers}
        for hold in self._holds.values():
            hold.gpus = catalog.consumers[hold.consumer].gpus

    def begin(self, now: float) -> list[Hold]:
        """Move every request that has its turn from the line to the holders, as ``preparing``. To be asked after every
        coming and going, and at ``look_again_at``."""
        begun = []
        slots = self._slots()
        self.stays = stays_after(self.stays, self._line, self._holds.values(), self.catalog, now)
        turns = self._policy.turns(self._line, self._holds.values(), self.catalog, now, self.stays, self._swap_seconds)
        self.look_again_at = turns.look_again_at
        for entry in turns.entries:
            gpus = set(self.catalog.consumers[entry.consumer].gpus)
            free = not overlap(slots, gpus)
            slots |= gpus  # 5: also where it must wait, so that nobody behind it goes first
            if free and entry.consumer not in self._unloading:  # 4
                begun.append(self._hold(entry))
        if len(begun) < len(turns.entries):  # 5: who has to keep its place holds others up until they are due
            due = [at for at in turns.due_at.values() if at > now]
            self.look_again_at = min(due if self.look_again_at is None else [self.look_again_at, *due], default=None)
        if begun:
            self.stays = stays_after(self.stays, self._line, self._holds.values(), self.catalog, now)
        return begun

    def admit(self, entry: Entry) -> Hold:
        """A holder at once, whether or not it has its turn."""
        return self._hold(entry)

    def end_stay(self, consumer: str) -> None:
        """It is not on the card any more: its turn is over, and nobody waits for a swap that none is."""
        if consumer in self.stays:
            self.stays[consumer] = replace(self.stays[consumer], since=None)

    def restore(self, consumer: str, phase: Phase, priority: Priority) -> Hold:
        """A holder of an earlier life of the broker."""
        return self._hold(Entry(self.number(), consumer, priority=priority), phase)

    def _hold(self, entry: Entry, phase: Phase = Phase.PREPARING) -> Hold:
        self.leave(entry.seq)
        gpus = self.catalog.consumers[entry.consumer].gpus
        hold = Hold(entry.seq, entry.consumer, gpus, phase, entry.priority)
        self._holds[entry.seq] = hold
        self._orders[entry.seq] = entry.order
        if len(self._orders) > ORDERS_KEPT:
            self._orders.popitem(last=False)
        return hold

    def _slots(self) -> set[GpuRef]:
        return {gpu for hold in self._holds.values() if hold.phase is Phase.PREPARING for gpu in hold.gpus}

    # -- out of service -----------------------------------------------------------------------------------

    def take_out(self, consumer: str) -> None:
        """Its unload begins: requests for it wait from now on."""
        self.end_stay(consumer)
        self._unloading[consumer] = self._unloading.get(consumer, 0) + 1

    def put_back(self, consumer: str) -> None:
        """Its unload is over, whatever came of it."""
        self._unloading[consumer] -= 1
        if not self._unloading[consumer]:
            del self._unloading[consumer]

    def is_unloading(self, consumer: str) -> bool:
        return consumer in self._unloading

    # -- questions ----------------------------------------------------------------------------------------

    def fork(self, swap_seconds: SwapSeconds | None = None) -> Queue:
        """A copy that can be played ahead: who waits and who holds now, and nobody in the middle of an unload."""
        fork = self.copy()
        fork._unloading = {}
        fork._swap_seconds = swap_seconds or self._swap_seconds
        return fork

    @property
    def policy(self) -> Policy:
        return self._policy

    @property
    def swap_seconds(self) -> SwapSeconds:
        return self._swap_seconds

    @property
    def line(self) -> Line:
        return self._line

    def last(self, consumer: str) -> Entry | None:
        """The one of those who wait for it that everybody else is ahead of."""
        queued = self._line.get(consumer)
        return next(reversed(queued.values())) if queued else None

    @property
    def holds(self) -> Mapping[int, Hold]:
        return self._holds

    def holds_of(self, consumer: str) -> list[Hold]:
        return [hold for hold in self._holds.values() if hold.consumer == consumer]

    def is_waiting(self, entry: Entry) -> bool:
        return entry.seq in self._line.get(entry.consumer, ())

    def waiting(self) -> list[Entry]:
        """Everyone in the line, whoever is ahead first."""
        entries = (entry for queued in self._line.values() for entry in queued.values())
        return sorted(entries, key=_order)

    def held_up_by(self, hold: Hold) -> int:
        """How many waiting requests this hold alone would be enough to keep waiting, or keeps waiting by its size, with
        others."""
        return sum(len(queued) for name, queued in self._line.items() if self.holds_up(hold, name))

    def behind(self, hold: Hold) -> int:
        """How many waiting requests keep their place because of this preparation alone."""
        names = (name for name in self._line if overlap(self.catalog.consumers[name].gpus, hold.gpus))
        return sum(len(self._line[name]) for name in names)

    def holds_up(self, hold: Hold, consumer: str) -> bool:
        """Whether this hold is one of those that keep one more request for this consumer waiting."""
        if consumer == hold.consumer:
            return len(self.holds_of(consumer)) >= self.catalog.consumers[consumer].max_concurrency
        return self.catalog.exclude(consumer, hold.consumer) or self._crowds(hold, consumer)

    def _crowds(self, hold: Hold, consumer: str) -> bool:
        """Whether it is one of those whose sizes together leave no room for this consumer."""
        holders = (each.consumer for each in self._holds.values())
        return holds_up(hold.consumer, consumer, holders, self.catalog)

    def why(self, entry: Entry) -> WaitingFor:
        """What this entry of the line waits for: the first that applies of holder, ahead, preparing."""
        holders = Counter(hold.consumer for hold in self._holds.values())
        if blocked(entry.consumer, holders, self.catalog):
            return WaitingFor.HOLDER
        ahead = Counter(other.consumer for other in self._ahead_of(entry))
        ahead.update(holders)
        return WaitingFor.AHEAD if blocked(entry.consumer, ahead, self.catalog) else WaitingFor.PREPARING

    def _ahead_of(self, entry: Entry) -> Iterator[Entry]:
        for queued in self._line.values():
            for other in queued.values():
                if other.order >= entry.order:
                    break
                yield other

    def ahead(self, entry: Entry) -> int:
        """How many waiting requests are ahead of this one, whether or not they hold it up."""
        return sum(1 for _ in self._ahead_of(entry))

    def next_without(self, ended: Sequence[Hold], now: float) -> list[Next]:
        """Those who would have the turn at once if these holds ended, and have none because of them; the next one
        first."""
        others = [other for other in self._holds.values() if other not in ended]
        turns = self._policy.turns(self._line, others, self.catalog, now, self.stays, self._swap_seconds)
        kept = (entry for entry in turns.entries if any(self.holds_up(hold, entry.consumer) for hold in ended))
        return [Next(entry, turns.due_at.get(entry.seq)) for entry in kept]

    def blockers(self, consumer: Consumer) -> list[Hold]:
        """The holders that a request for this consumer waits for, oldest first: those it conflicts with, and those
        that are being prepared on a GPU of its own."""
        full = len(self.holds_of(consumer.name)) >= consumer.max_concurrency
        slots = set(consumer.gpus)
        return [
            hold
            for hold in self._holds.values()
            if (hold.consumer == consumer.name and full)
            or self.catalog.exclude(consumer.name, hold.consumer)
            or self._crowds(hold, consumer.name)
            or (hold.phase is Phase.PREPARING and overlap(slots, hold.gpus))
        ]
