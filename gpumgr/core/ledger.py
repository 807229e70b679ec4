"""What unloads gave back, what consumers really hold, and what follows from it.

Owns: the account of each consumer (its unloads, what it was seen to hold, how long it took), and the sizes and
warnings that are derived from it. Must not: read a card or a clock, or know who is waiting.

Unreadable is not zero: a number that the driver did not say enters no share and no size.

**An observation** is one use of a consumer: one lease or proxied call, and what it left running (a tail) with it. Where
``max_concurrency`` lets several in, it is the time in which somebody is in at all; but who comes after
``JOINS_WITHIN_SECONDS`` belongs to the next one, so that a consumer that is never idle is observed too. ``peak`` is the
most that any reading of it showed; ``resident`` what the consumer holds in the first reading after it, or showed in its
last one.

**A reload** begins with the grant of a consumer that was not on the card, or with its load call, and ends with the last
rise of its memory: known once that has stood still for a moment, near what the consumer holds otherwise.

**The size of an ``auto`` consumer**, on each of its GPUs:

1. Before ``LEARNED_AFTER`` observations: the declared one (``vram_declared_mib``).
2. Nothing declared: nobody knows (``unsized``). It is alone on the card: whoever is idle goes, whoever holds is waited
   for, and nobody comes beside it. It is granted where half of what the card lends is free, so that a desktop does not
   keep it away and a game does.
3. From then on the p95 of the observed peaks and a tenth more. The tenth is a margin, and gives way where it would take
   more than nine tenths of what the card lends: a consumer that fills a card must not be refused for its margin.
4. Never more than the card lends: what it was seen to hold must not make it impossible.
5. Nobody's promise is lowered under him: while somebody holds the consumer, its size is at least what he was granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpumgr.core.catalog import Consumer, GpuRef
from gpumgr.core.placement import Holding, Victim

KEPT = 100
"""Unloads, and observations, of each consumer; older ones are forgotten, and stay in the tally."""
JUDGED = 20
"""What is said of a consumer rests on the last of them: a new model, or a repaired server, shows within days."""
LEARNED_AFTER = 5
LEAKY_AFTER = 3
LEAKY_BELOW = 0.9
STEP_MIB = 64
"""Less than this is no rise: a server at rest allocates a little now and then."""
STILL_SECONDS = 2.0
NEAR = 0.75
RISES_WITHIN_SECONDS = 30.0
"""A load that shows no rise for so long has not begun, because its holder waits, or is over at another size."""
SOON_SECONDS = 0.25
JOINS_WITHIN_SECONDS = 600.0
FOLLOWS_SECONDS = 10.0
"""A reading later than this after the last one says nothing about the use that ended between them."""


# -- unloads ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unloaded:
    """One unload, proved or given up. ``share``: how much came back of what had to, 0 to 1; None where nobody could
    read it, or nothing had to (it held no more than its residual)."""

    at: str
    claimed_mib: int
    left_mib: int
    seconds: float
    share: float | None = None
    reason: str | None = None

    @property
    def returned_mib(self) -> int:
        return max(0, self.claimed_mib - self.left_mib)

    @property
    def tells_cost(self) -> bool:
        """A failed one took as long as its limit, and one that gave back nothing took nothing."""
        return self.reason is None and self.returned_mib > STEP_MIB


def returned_share(
    residual_mib: int, before: Mapping[GpuRef, Holding], now: Mapping[GpuRef, int | None]
) -> float | None:
    """Of what lay above the residual on these GPUs, how much is gone; None where the driver did not say it, before or
    now, or nothing lay there."""
    if not now or any(held is None or not before[gpu].exact for gpu, held in now.items()):
        return None
    due = sum(max(0, before[gpu].held_mib - residual_mib) for gpu in now)
    kept = sum(max(0, (held or 0) - residual_mib) for held in now.values())
    return None if due <= 0 else max(0.0, 1 - kept / due)


def unloaded(victim: Victim, at: str) -> Unloaded:
    return Unloaded(at, victim.held_mib, victim.still_held_mib, victim.seconds, victim.returned_share, victim.reason)


@dataclass(frozen=True, slots=True)
class UnloadFigures:
    """``count`` and ``failed`` are of all lives; the rest of the last ``JUDGED`` unloads that tell it, None where none
    does. ``measured``: how many of them the share is of."""

    count: int
    failed: int
    measured: int
    returned_share: float | None
    residual_mib: int | None
    seconds_mean: float | None
    seconds_p50: float | None
    seconds_p95: float | None
    seconds_max: float | None

    @property
    def leaky(self) -> bool:
        return self.returned_share is not None and self.measured >= LEAKY_AFTER and self.returned_share < LEAKY_BELOW


# -- observations -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Observation:
    """One use. The maps have the consumer's GPUs, by index."""

    at: str
    peak_mib: Mapping[GpuRef, int]
    resident_mib: Mapping[GpuRef, int]
    reload_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ObservedFigures:
    """``count`` is of all lives. ``resident_mib`` and ``peak_mib`` are those of the last use, the percentiles of the
    last ``JUDGED``, each with one number for each GPU; ``reload_seconds`` is their median."""

    count: int
    resident_mib: tuple[int, ...]
    resident_p95_mib: tuple[int, ...]
    peak_mib: tuple[int, ...]
    peak_p95_mib: tuple[int, ...]
    reload_seconds: float | None


# -- a consumer's account -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tally:
    """Of all lives, also of what is forgotten otherwise. The MiB are of unloads that the driver told."""

    unloads: int = 0
    failed: int = 0
    claimed_mib: int = 0
    returned_mib: int = 0
    seconds: float = 0.0
    observations: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.unloads + other.unloads,
            self.failed + other.failed,
            self.claimed_mib + other.claimed_mib,
            self.returned_mib + other.returned_mib,
            self.seconds + other.seconds,
            self.observations + other.observations,
        )


Entry = Unloaded | Observation


def tally_of(entry: Entry) -> Tally:
    if isinstance(entry, Observation):
        return Tally(observations=1)
    told = entry.share is not None
    return Tally(
        unloads=1,
        failed=int(entry.reason is not None),
        claimed_mib=entry.claimed_mib if told else 0,
        returned_mib=entry.returned_mib if told else 0,
        seconds=entry.seconds,
    )


@dataclass(frozen=True, slots=True)
class Account:
    """The last ``KEPT`` of each, the oldest first, and the tally of all."""

    unloads: tuple[Unloaded, ...] = ()
    observations: tuple[Observation, ...] = ()
    tally: Tally = field(default_factory=Tally)

    def with_entry(self, entry: Entry) -> Account:
        tally = self.tally + tally_of(entry)
        if isinstance(entry, Observation):
            return Account(self.unloads, (*self.observations, entry)[-KEPT:], tally)
        return Account((*self.unloads, entry)[-KEPT:], self.observations, tally)

    @property
    def left_mib(self) -> int:
        """What stayed after its last unload, on all of its GPUs; 0: it was not proved, or there was none."""
        return self.unloads[-1].left_mib if self.unloads and self.unloads[-1].reason is None else 0

    def after(self, earlier: Account) -> Account:
        """With what an earlier life wrote before it."""
        return Account(
            (*earlier.unloads, *self.unloads)[-KEPT:],
            (*earlier.observations, *self.observations)[-KEPT:],
            earlier.tally + self.tally,
        )

    @property
    def unload_seconds(self) -> list[float]:
        return [each.seconds for each in self.unloads if each.tells_cost][-JUDGED:]

    @property
    def reload_seconds(self) -> list[float]:
        return [each.reload_seconds for each in self.observations if each.reload_seconds is not None][-JUDGED:]


def unload_figures(account: Account) -> UnloadFigures | None:
    if not account.tally.unloads:
        return None
    measured = [each for each in account.unloads if each.share is not None][-JUDGED:]
    seconds = account.unload_seconds
    return UnloadFigures(
        count=account.tally.unloads,
        failed=account.tally.failed,
        measured=len(measured),
        returned_share=mean([each.share for each in measured if each.share is not None]),
        residual_mib=round(sum(each.left_mib for each in measured) / len(measured)) if measured else None,
        seconds_mean=mean(seconds),
        seconds_p50=percentile(seconds, 50),
        seconds_p95=percentile(seconds, 95),
        seconds_max=max(seconds, default=None),
    )


def observed_figures(consumer: Consumer, account: Account) -> ObservedFigures | None:
    found = observations_of(consumer, account)
    if not found:
        return None
    last = found[-1]
    return ObservedFigures(
        count=account.tally.observations,
        resident_mib=tuple(last.resident_mib[gpu] for gpu in consumer.gpus),
        resident_p95_mib=tuple(_p95([each.resident_mib[gpu] for each in found]) for gpu in consumer.gpus),
        peak_mib=tuple(last.peak_mib[gpu] for gpu in consumer.gpus),
        peak_p95_mib=tuple(_p95([each.peak_mib[gpu] for each in found]) for gpu in consumer.gpus),
        reload_seconds=percentile(account.reload_seconds, 50),
    )


def observations_of(consumer: Consumer, account: Account) -> list[Observation]:
    """Those that are judged: of the GPUs that the consumer has by now."""
    gpus = set(consumer.gpus)
    return [each for each in account.observations if gpus <= each.peak_mib.keys()][-JUDGED:]


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The smallest value that so many percent of all do not exceed (nearest rank): always one that was seen."""
    if not values:
        return None
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def _p95(values: Sequence[int]) -> int:
    return int(percentile(values, 95) or 0)


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def swap_seconds(accounts: Mapping[str, Account], from_names: Iterable[str], to_name: str) -> float | None:
    """What it costs to bring ``to_name`` onto the card in the place of these: their median unload, of which several go
    together as a rule, and its median reload. None where one of them was never seen to do so."""
    unloads = [percentile(accounts.get(name, Account()).unload_seconds, 50) for name in from_names]
    reload = percentile(accounts.get(to_name, Account()).reload_seconds, 50)
    known = [seconds for seconds in unloads if seconds is not None]
    return None if reload is None or len(known) < len(unloads) else max(known, default=0.0) + reload


# -- sizes --------------------------------------------------------------------------------------------------


def sized(consumer: Consumer, account: Account, lends_mib: Mapping[GpuRef, int]) -> Consumer:
    """The consumer with the size in force (rules 1 to 4). ``lends_mib``: each card's total less the headroom, as far as
    it was read."""
    if not consumer.auto:
        return consumer
    found = observations_of(consumer, account)
    if len(found) >= LEARNED_AFTER:  # 3
        peaks = {gpu: _p95([each.peak_mib[gpu] for each in found]) for gpu in consumer.gpus}
        sizes = tuple(_size_mib(peaks[gpu], lends_mib.get(gpu)) for gpu in consumer.gpus)
        return replace(consumer, vram_resident_mib=sizes, unsized=False)
    if consumer.declared_mib:  # 1
        return replace(consumer, vram_resident_mib=consumer.declared_mib, unsized=False)
    half = tuple(lends_mib.get(gpu, 0) // 2 for gpu in consumer.gpus)
    return replace(consumer, vram_resident_mib=half, unsized=True)  # 2


def _size_mib(peak_p95_mib: int, lends_mib: int | None) -> int:
    generous = -(-peak_p95_mib * 110 // 100)
    if lends_mib is None:
        return generous
    return min(lends_mib, max(peak_p95_mib, min(generous, lends_mib * 9 // 10)))  # 3, 4


def keeping_promises(consumer: Consumer, granted: Iterable[Consumer]) -> Consumer:
    """5: with at least the sizes that holders were granted it with."""
    for promised in granted:
        if promised.unsized:
            return replace(consumer, vram_resident_mib=promised.vram_resident_mib, unsized=True)
        sizes = tuple(max(consumer.needs_mib(gpu), promised.needs_mib(gpu)) for gpu in consumer.gpus)
        consumer = replace(consumer, vram_resident_mib=sizes)
    return consumer


# -- warnings -----------------------------------------------------------------------------------------------


def warnings_of(consumer: Consumer, account: Account) -> dict[str, str]:
    """What an operator should look at, a sentence by its kind: ``leaky``, ``size``."""
    found = {}
    unloads = unload_figures(account)
    if unloads is not None and unloads.leaky:
        share = int(100 * (unloads.returned_share or 0))
        found["leaky"] = (
            f"{consumer.name} returned {share} % on average over {unloads.measured} unloads: something in it keeps its "
            "memory; restart it, and look at its extensions"
        )
    observed = observed_figures(consumer, account)
    if observed is not None and not consumer.auto:
        for gpu, declared, seen in zip(consumer.gpus, consumer.vram_resident_mib, observed.peak_p95_mib, strict=True):
            if seen * 100 > declared * 110:
                where = f" on GPU {gpu}" if len(consumer.gpus) > 1 else ""
                found["size"] = f"declared {declared}, seen {seen} MiB{where}: raise vram_resident_mib"
                break
    return found


# -- what readings show -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sight:
    """One consumer in one reading. ``holds``: the grants of it. ``works``: what they left runs on in it. ``leaving``:
    it is being unloaded. ``held_mib`` is None where the driver does not say it for all its GPUs."""

    at: float
    holds: frozenset[int]
    works: bool
    leaving: bool
    resident: bool
    held_mib: Mapping[GpuRef, int] | None


@dataclass(frozen=True, slots=True)
class Use:
    """A use under way: from a grant, or from the first reading that shows a hold. ``holds`` are all that belong to it;
    the maps are empty until it was seen resident."""

    holds: frozenset[int]
    began_at: float
    last_at: float
    peak_mib: Mapping[GpuRef, int] = field(default_factory=dict)
    last_mib: Mapping[GpuRef, int] = field(default_factory=dict)

    def seen(self, sight: Sight) -> Use:
        joins = sight.at - self.began_at < JOINS_WITHIN_SECONDS
        holds = self.holds | sight.holds if joins else self.holds
        if sight.held_mib is None or not sight.resident or sight.leaving:
            return replace(self, holds=holds)
        peak = {gpu: max(mib, self.peak_mib.get(gpu, 0)) for gpu, mib in sight.held_mib.items()}
        return Use(holds, self.began_at, sight.at, peak, sight.held_mib)

    def goes_on(self, sight: Sight) -> bool:
        return not self.holds.isdisjoint(sight.holds) or (sight.works and not sight.holds)


def followed(use: Use | None, sight: Sight) -> tuple[Use | None, Use | None]:
    """What a reading makes of a use: the one that goes on or begins, and the one that is over."""
    if use is not None and use.goes_on(sight):
        return use.seen(sight), None
    over = use
    if use is not None and not sight.holds and sight.at - use.last_at <= FOLLOWS_SECONDS:
        over = use.seen(sight)  # it is at rest
    return Use(sight.holds, sight.at, sight.at).seen(sight) if sight.holds else None, over


@dataclass(frozen=True, slots=True)
class Load:
    """A load under way, or done: then ``seconds`` says how long it took. ``size_mib``: what it holds otherwise, 0 where
    nobody knows."""

    began_at: float
    size_mib: int
    seen_mib: int
    risen_at: float | None = None
    seconds: float | None = None

    def seen(self, held_mib: int, at: float) -> Load:
        if self.seconds is not None:
            return self
        if held_mib >= self.seen_mib + STEP_MIB:
            return replace(self, seen_mib=held_mib, risen_at=at)
        return self if self.risen_at is None or at - self.risen_at < STILL_SECONDS else self.ended()

    def ended(self) -> Load:
        """Nothing more will come: it is done where it came near its size."""
        if self.seconds is not None or self.risen_at is None or self.seen_mib < NEAR * self.size_mib:
            return self
        return replace(self, seconds=round(self.risen_at - self.began_at, 3))

    def rises(self, at: float) -> bool:
        """Whether it is worth a close look."""
        since = self.began_at if self.risen_at is None else self.risen_at
        return self.seconds is None and at - since < RISES_WITHIN_SECONDS
