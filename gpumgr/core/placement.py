"""Does it fit, who must go, and what to say when it cannot be.

Owns: the one decision of a preparation, re-made after every step from what the card says then.
Must not: unload, probe, wait or know a clock.

``decide`` numbers its rules; the numbers stand beside the code.

0. An operator keeps the card free; or a game runs, and beside it and its reserve the target would not fit with every
   consumer gone: refuse (``gpu_yielded``), unloading nobody.
1. A GPU that cannot be read: refuse (``gpu_unreadable``). No reading, no proof, no grant.
2. A need above ``total - headroom``: refuse at once, unloading nobody.
3. Consumers that may not coexist with the target and are resident: unload them, all at once. One that is in use
   is waited for (``draining``), on the card already or still on its way there: what is in use is never unloaded. In
   use are holders, and who computes without one: a holder's tail, or direct use. Those that are pinned go after the
   others are gone.
4. One of them kept its memory: refuse, whether or not the target would fit beside it. Only the driver can take that
   back: the consumer's own word that it is gone is what its unload has just disproved.
5. It fits: grant.
6. It does not: unload the smallest set of idle residents that makes room (core/victims.py); among equals those
   least recently used; one with somebody pinned only where there is none without. Where no set suffices: the least
   recently used one that is not pinned.
7. None of those is left, but it would fit once the consumers in use are done: wait.
8. Before any refusal whatever may still help is tried once: idle residents that are pinned; idle consumers that hold
   little (what stayed after an earlier unload, which may have become more); then the target itself where it is idle;
   and the card is read again.
9. Refuse: ``eviction_failed`` where what the victims kept would cover the shortfall; ``gpu_yielded`` where a game's
   reserve would; else ``insufficient_vram``.

Where nobody may be unloaded (``may_unload`` is false), rules 3, 4, 6 and 8 fall away: whoever is there is tolerated.

A proxied call is short, and its caller cannot do anything about a refusal: ``decide_call`` turns rule 9 into a grant
with a warning, unless a live lease shares the card, which it must not endanger: then it waits. It spares who is pinned:
for it, as where nobody may be unloaded, that one is tolerated. ``decide_restore`` is for what nobody asked for: nobody
makes room for it, and who is pinned keeps it away.

Fit, on each of the target's GPUs:

    free - headroom - promised - kept >= max(0, size - held(target))

``promised`` sums, over the *other* holders and preparations on that GPU, ``max(0, size - held)``: memory they were
granted and have not taken yet. What is on the card is in ``free`` already and is not subtracted again. ``kept`` is what
strangers may take again, or a game still (core/outside.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

from gpumgr.core.card import GpuProcess, GpuReading, Reading
from gpumgr.core.catalog import Catalog, Consumer, GpuRef
from gpumgr.core.outside import Game, Outside, Pause, Stranger
from gpumgr.core.victims import smallest_set
from gpumgr.errors import EvictionFailed, GpuUnreadable, GpuYielded, InsufficientVram, Refused

PINNED_LOOKED_AT = 6
"""Of more pinned ones whoever was used the longest ago goes first, as for so many sets there is no time."""
LEFTOVER_SLACK_MIB = 64
"""A context may grow a little without a model being loaded."""

KeptReason = Literal["kept", "busy", "hung", "unreachable"]


@dataclass(frozen=True, slots=True)
class Report:
    """A consumer's own word on what it holds; ``used_mib`` is None where it only knows whether."""

    loaded: bool
    used_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """What one consumer holds on one GPU, as far as anyone can tell.

    ``held_mib`` is the best number there is. ``exact`` tells whether the driver said it; else it is the
    consumer's own report, or its declared size where it only says that it is loaded. ``resident`` is None
    where nobody knows.
    """

    held_mib: int
    exact: bool = True
    resident: bool | None = False


@dataclass(frozen=True, slots=True)
class Victim:
    """What came of one unload. ``reason`` is None where the memory was given back."""

    consumer: str
    held_mib: int
    still_held_mib: int
    seconds: float = 0.0
    reason: KeptReason | None = None
    asked: bool = True
    """Whether it has an unload call at all."""
    proved: bool = True
    """By the card, and not by its own word."""
    cause: str = ""
    """What its last unload call failed with."""
    returned_share: float | None = None
    """How much came back of what had to (core/ledger.py); None where the driver did not say."""


@dataclass(frozen=True)
class View:
    """Everything a decision looks at, at one instant.

    ``holdings`` maps (consumer, gpu); a missing pair holds nothing. ``in_use`` names the consumers that are
    anyone's now: held, prepared, computing. ``leaving`` names those in the middle of somebody else's unload.
    ``busy`` names those among them, and the target itself, that compute without a holder: a tail, or direct use.
    ``tried`` are this preparation's own unloads so far, ``evicted`` and failed alike.
    ``last_used`` orders idle residents; who is missing was never used.
    """

    catalog: Catalog
    reading: Reading
    headroom_mib: int
    holdings: Mapping[tuple[str, GpuRef], Holding]
    promised_mib: Mapping[GpuRef, int]
    in_use: frozenset[str] = frozenset()
    busy: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    target_in_use: bool = False
    leased: bool = False
    """A live lease shares a GPU with the target."""
    may_unload: bool = True
    spares_pinned: bool = False
    """Whoever is pinned stays, come what may."""
    tried: Sequence[Victim] = ()
    last_used: Mapping[str, float] = field(default_factory=dict)
    lingering_mib: Mapping[GpuRef, int] = field(default_factory=dict)
    """What is counted as the target's and is not: processes that its earlier holders named and left on the card."""
    outside: Outside = field(default_factory=Outside)
    now: float = 0.0
    """Monotonic."""

    def kept_mib(self, gpu: GpuRef) -> int:
        """MiB of this GPU that are kept for those outside."""
        read = self.reading.gpu(gpu)
        return 0 if read is None else self.outside.kept_mib(read)

    def held(self, consumer: str, gpu: GpuRef) -> Holding:
        return self.holdings.get((consumer, gpu), Holding(0))

    def resident(self, consumer: Consumer) -> bool:
        """Not known counts as resident: an unload too many is better than a consumer left on the card."""
        return any(self.held(consumer.name, gpu).resident is not False for gpu in consumer.gpus)

    def failed(self) -> dict[str, Victim]:
        return {victim.consumer: victim for victim in self.tried if victim.reason is not None}


@dataclass(frozen=True, slots=True)
class Grant:
    """It fits, and nobody is there who may not be; or it is a call that goes ahead ``despite`` what a lease would
    have been refused for."""

    despite: Refused | None = None


@dataclass(frozen=True, slots=True)
class Unload:
    """Unload these; ``required``: the target may not stand beside them, else they only make room."""

    consumers: tuple[str, ...]
    required: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: look again when somebody ends, or the card changes. ``short_mib``: what is missing now;
    ``consumers``: whose end is waited for, where that is known."""

    reason: Literal["vram", "preparing", "draining"]
    short_mib: int = 0
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refuse:
    error: Refused


Decision = Grant | Unload | Wait | Refuse


def decide(target: Consumer, view: View) -> Decision:
    """The next step of preparing ``target``. See the module's rules."""
    kept_free = keeps_out(target, view)
    if kept_free is not None:  # 0
        return Refuse(kept_free)
    problems = view.reading.problems(target.gpus)
    if problems:  # 1
        return Refuse(unreadable(target, problems))
    if impossible(target, view):  # 2
        return Refuse(insufficient(target, view))
    if target.name in view.leaving:
        return Wait("preparing")  # an unload call of its own is still on its way
    excluded = _excluded_residents(target, view) if view.may_unload else []
    if any(name in view.leaving for name in excluded):
        return Wait("preparing")  # somebody else is unloading it right now: look at what comes of that
    if any(name in view.failed() for name in excluded):  # 4
        return _before_refusing(target, view) or Refuse(kept_or_insufficient(target, view))
    draining = tuple(name for name in excluded if name in view.in_use)
    if draining:  # 3
        return Wait("draining", consumers=draining)
    if excluded:
        return Unload(tuple(_unpinned(excluded, view) or excluded), required=True)
    if shortfall_mib(target, view) <= 0:  # 5
        return Grant()
    return _make_room(target, view)


def decide_call(target: Consumer, view: View) -> Decision:
    """The same for a proxied call. What can never fit is refused to it too."""
    view = replace(view, spares_pinned=True)
    decision = decide(target, view)
    if not isinstance(decision, Refuse) or view.reading.problems(target.gpus) or impossible(target, view):
        return decision
    if isinstance(decision.error, GpuYielded):
        return decision
    if view.leased:
        return Wait("vram", max(0, shortfall_mib(target, view)))
    return Grant(despite=decision.error)


def decide_restore(target: Consumer, view: View) -> Decision:
    """The same for a consumer that is brought back although nobody asks for it."""
    decision = decide(target, view)
    if not isinstance(decision, Unload):
        return decision
    stays = [name for name in _excluded_residents(target, view) if view.catalog.consumers[name].pinned]
    return decision if decision.required and not stays else Refuse(insufficient(target, view))


def _make_room(target: Consumer, view: View) -> Decision:
    idle = _idle_residents(target, view) if view.may_unload else []
    if any(name in view.leaving for name in idle):
        return Wait("preparing")
    left = [name for name in idle if name not in view.failed()]
    enough = _fewest(target, view, left)  # 6
    if enough:
        return Unload(enough, required=False)
    pinned = [name for name in left if view.catalog.consumers[name].pinned]
    for name in left:
        if name not in pinned:
            return Unload((name,), required=False)
    if would_fit_later(target, view, pinned):  # 7
        return Wait("vram", shortfall_mib(target, view), _users(target, view))
    if pinned:
        return Unload((pinned[0],), required=False)
    little = _little_ones(target, view) if view.may_unload else ()
    if little:
        return Unload(little, required=False)
    return _before_refusing(target, view) or Refuse(kept_or_insufficient(target, view))


def _before_refusing(target: Consumer, view: View) -> Unload | Wait | None:
    """8: the target's own memory may be bloated or in pieces; once is enough."""
    if view.target_in_use or shortfall_mib(target, view) <= 0 or not view.may_unload:
        return None
    if view.spares_pinned and target.pinned:
        return None
    if any(view.lingering_mib.values()):
        return None  # what would fall is not the target's to give back
    if any(victim.consumer == target.name for victim in view.tried) or not view.resident(target):
        return None
    if target.name in view.busy:
        return Wait("vram", shortfall_mib(target, view), (target.name,))
    return Unload((target.name,), required=False)


def _users(target: Consumer, view: View) -> tuple[str, ...]:
    """Those in use beside the target on its GPUs."""
    others = tuple(other.name for other in _others(target, view) if other.name in view.in_use)
    return (*others, target.name) if any(view.lingering_mib.values()) else others


def _others(target: Consumer, view: View) -> list[Consumer]:
    return [
        c for c in view.catalog.consumers.values() if c.name != target.name and not set(c.gpus).isdisjoint(target.gpus)
    ]


def _excluded_residents(target: Consumer, view: View) -> list[str]:
    return [
        other.name
        for other in _others(target, view)
        if (view.resident(other) or other.name in view.in_use or _kept(other, view))
        and not view.catalog.may_coexist(target.name, other.name)
        and not _spared(other, view)
    ]


def _spared(consumer: Consumer, view: View) -> bool:
    return view.spares_pinned and consumer.pinned


def _unpinned(names: Sequence[str], view: View) -> list[str]:
    return [name for name in names if not view.catalog.consumers[name].pinned]


def _kept(other: Consumer, view: View) -> bool:
    """4: its unload failed, and the driver does not say that it has nothing any more."""
    gone = all(h.exact and h.resident is False for h in (view.held(other.name, gpu) for gpu in other.gpus))
    return other.name in view.failed() and not gone


def _little_ones(target: Consumer, view: View) -> tuple[str, ...]:
    """Idle consumers below what counts as resident, where all of theirs together would make the difference."""
    gpu = _to_blame(target, view)
    tried = {victim.consumer for victim in view.tried}
    untouchable = tried | view.in_use | view.leaving
    others = [c for c in _others(target, view) if not _spared(c, view)]
    idle = [c for c in others if gpu in c.gpus and c.name not in untouchable]
    holding = {c.name: view.held(c.name, gpu).held_mib for c in idle if view.held(c.name, gpu).held_mib > 0}
    return tuple(holding) if sum(holding.values()) >= _shortfall_on(target, view, gpu) else ()


def _idle_residents(target: Consumer, view: View) -> list[str]:
    """Idle residents on a GPU that is short, least recently used first."""
    short = [gpu for gpu in target.gpus if _shortfall_on(target, view, gpu) > 0]
    idle = [
        other
        for other in _others(target, view)
        if other.name not in view.in_use and view.resident(other) and any(gpu in other.gpus for gpu in short)
    ]
    idle = [other for other in idle if not _spared(other, view)]
    return [c.name for c in sorted(idle, key=lambda c: (view.last_used.get(c.name, float("-inf")), c.name))]


def _fewest(target: Consumer, view: View, idle: Sequence[str]) -> tuple[str, ...]:
    """6: those of ``idle`` (the least recently used first) that make room, with as few pinned ones as it takes; none:
    all of them do not."""
    short_mib = {gpu: mib for gpu in target.gpus if (mib := _shortfall_on(target, view, gpu)) > 0}
    held_mib = {name: {gpu: view.held(name, gpu).held_mib for gpu in short_mib} for name in idle}
    if any(sum(held_mib[name][gpu] for name in idle) < mib for gpu, mib in short_mib.items()):
        return ()  # however many sets there are
    free = _unpinned(idle, view)
    pinned = [name for name in idle if name not in free]
    for some in range(len(pinned) + 1):
        found = []
        for last in combinations(pinned, some) if len(pinned) <= PINNED_LOOKED_AT else [tuple(pinned[:some])]:
            left = {gpu: mib - sum(held_mib[name][gpu] for name in last) for gpu, mib in short_mib.items()}
            fits = all(mib <= 0 for mib in left.values())
            first = () if fits else smallest_set(free, held_mib, left)
            if first or fits:
                found.append((*first, *last))
        if found:
            return min(found, key=len)
    return ()


# -- what is held ----


def assess(
    consumer: Consumer,
    gpu: GpuRef,
    *,
    driver_mib: int | None,
    attributable: bool,
    report: Report | None,
    used_since_unload: bool | None,
    leftover_mib: int,
) -> Holding:
    """What a consumer holds on one GPU, from everything that is known. The first rule that applies:

    1. Its own report, where the driver tells nothing, or shows strangers among whom it may be (in a container, or
       another user's) and nothing of its own.
    2. The driver's number. Resident is what is above ``leftover_mib``, which stayed after its last proved unload:
       a CUDA context never leaves.
    3. What the broker remembers (``used_since_unload``): its whole size after a grant, 0 after an unload, and
       where it remembers nothing: 0, resident unknown.
    """
    size = consumer.needs_mib(gpu)
    if report is not None and (driver_mib is None or (driver_mib == 0 and not attributable)):  # 1
        said = size if report.used_mib is None else report.used_mib // len(consumer.gpus)
        return Holding(said if report.loaded else 0, exact=False, resident=report.loaded)
    if driver_mib is not None:  # 2
        floor = leftover_mib + LEFTOVER_SLACK_MIB if leftover_mib else 0
        return Holding(driver_mib, exact=True, resident=driver_mib > floor)
    return Holding(size if used_since_unload else 0, exact=False, resident=used_since_unload)  # 3


# -- numbers ------------------------------------------------------------------------------------------------


def promised_mib(consumer: Consumer, gpu: GpuRef, held: Holding) -> int:
    """Memory on this GPU that a holder may still take."""
    return max(0, consumer.needs_mib(gpu) - held.held_mib)


def need_mib(target: Consumer, view: View, gpu: GpuRef) -> int:
    """What the target would still take on this GPU."""
    own_mib = view.held(target.name, gpu).held_mib - view.lingering_mib.get(gpu, 0)
    return max(0, target.needs_mib(gpu) - max(0, own_mib))


def _gpu(view: View, gpu: GpuRef) -> GpuReading:
    reading = view.reading.gpu(gpu)
    if reading is None:
        raise LookupError(f"GPU {gpu} is not in the reading")
    return reading


def _shortfall_on(target: Consumer, view: View, gpu: GpuRef) -> int:
    usable = _gpu(view, gpu).free_mib - view.headroom_mib - view.promised_mib.get(gpu, 0) - view.kept_mib(gpu)
    return need_mib(target, view, gpu) - usable


def shortfall_mib(target: Consumer, view: View) -> int:
    """MiB missing on the GPU that is shortest; 0 or less: it fits."""
    return max(_shortfall_on(target, view, gpu) for gpu in target.gpus)


def impossible(target: Consumer, view: View) -> bool:
    """Larger than the card can ever lend."""
    return any(target.needs_mib(gpu) > _gpu(view, gpu).total_mib - view.headroom_mib for gpu in target.gpus)


def would_fit_later(target: Consumer, view: View, idle: Sequence[str] = ()) -> bool:
    """Whether it fits once everyone in use has ended and been unloaded, and these idle ones too, on every GPU that is
    short now."""
    return all(
        _shortfall_on(target, view, gpu)
        <= _freed_by_holders(target, view, gpu) + sum(view.held(name, gpu).held_mib for name in idle)
        for gpu in target.gpus
        if _shortfall_on(target, view, gpu) > 0
    )


def _freed_by_holders(target: Consumer, view: View, gpu: GpuRef) -> int:
    users = [c for c in view.catalog.on_gpu(gpu) if c.name in view.in_use and c.name != target.name]
    held_mib = sum(view.held(c.name, gpu).held_mib for c in users) + view.lingering_mib.get(gpu, 0)
    return held_mib + view.promised_mib.get(gpu, 0)


# -- refusals -----------------------------------------------------------------------------------------------


def unreadable(target: Consumer, problems: Sequence[str]) -> GpuUnreadable:
    return GpuUnreadable(
        f"{target.name} cannot be granted: {'; '.join(problems)}. Without a reading nothing can be proved free; "
        "look at nvidia-smi on the server, leases are granted again as soon as the driver answers",
        consumer=target.name,
        problems=list(problems),
    )


def kept_or_insufficient(target: Consumer, view: View) -> Refused:
    """9: which of the two refusals is true."""
    kept = [victim for victim in view.failed().values() if victim.consumer != target.name]
    if kept and _still_held_mib(target, view, kept) >= _shortfall_without_others(target, view):
        return eviction_failed(target, view, kept)
    worst = _to_blame(target, view)
    games = view.outside.games_on((worst,))
    if games and _shortfall_on(target, view, worst) <= view.kept_mib(worst):
        return yielded(target, games[0], view)
    return insufficient(target, view)


def keeps_out(target: Consumer, view: View) -> GpuYielded | None:
    """0: who keeps the target off the card whatever is unloaded for it, as far as this reading tells."""
    pause = view.outside.paused(view.now)
    if pause is not None:
        return yielded(target, pause, view)
    games = view.outside.games_on(target.gpus)
    if view.reading.problems(target.gpus) or impossible(target, view):
        return None  # which is worse, and no game's doing
    if games and any(target.needs_mib(gpu) > _beside_strangers(view, gpu) for gpu in target.gpus):
        return yielded(target, games[0], view)
    return None


def _beside_strangers(view: View, gpu: GpuRef) -> int:
    return beside_strangers_mib(_gpu(view, gpu), view.headroom_mib, view.outside)


def beside_strangers_mib(gpu: GpuReading, headroom_mib: int, outside: Outside) -> int:
    """What could be lent of this GPU if every consumer were gone."""
    strangers = sum(process.used_mib or 0 for process in gpu.untracked)
    return gpu.total_mib - headroom_mib - strangers - outside.kept_mib(gpu)


def yielded(target: Consumer, to: Pause | Game, view: View) -> GpuYielded:
    """The refusal in an operator's or a game's favour."""
    facts = {"consumer": target.name, "since_at": to.since_at}
    if isinstance(to, Pause):
        return GpuYielded(
            f"{target.name} cannot be granted: {to.words}. Ask again after that, or end it with gpumgr resume",
            **facts,
            cause="hold",
            by=to.by,
            reason=to.reason,
            until_at=to.until_at,
        )
    reserve = view.outside.reserve_mib
    return GpuYielded(
        f"{target.name} cannot be granted: {to.words}, and {target.name} does not fit beside it with {reserve} MiB "
        "left for it. Ask again when it has ended, or lower gpu.yield_reserve_mib",
        **facts,
        cause="game",
        pid=to.pid,
        name=to.name,
        games=[{"pid": game.pid, "name": game.name, "since_at": game.since_at} for game in view.outside.games],
        yield_reserve_mib=reserve,
    )


def _still_held_mib(target: Consumer, view: View, kept: Sequence[Victim]) -> int:
    """What these hold on the GPU to blame: the driver's number, else what was left when their unload was given up."""
    worst = _to_blame(target, view)
    held = [(victim, view.held(victim.consumer, worst)) for victim in kept]
    return sum(now.held_mib if now.exact else max(now.held_mib, victim.still_held_mib) for victim, now in held)


def _shortfall_without_others(target: Consumer, view: View) -> int:
    """What is missing even if everyone in use, and the idle residents that nobody asked yet, were gone."""
    worst = _to_blame(target, view)
    tried = {victim.consumer for victim in view.tried}
    idle = [name for name in _idle_residents(target, view) if name not in tried]
    gone = sum(view.held(name, worst).held_mib for name in idle) + _freed_by_holders(target, view, worst)
    return _shortfall_on(target, view, worst) - gone


def _to_blame(target: Consumer, view: View) -> GpuRef:
    """The GPU that a refusal is about: of those it could never fit, the one that lacks most; else the one that would
    still be short once everyone in use has ended."""
    never = [gpu for gpu in target.gpus if target.needs_mib(gpu) > _gpu(view, gpu).total_mib - view.headroom_mib]
    if never:
        return max(never, key=lambda gpu: target.needs_mib(gpu) - _gpu(view, gpu).total_mib)
    return max(target.gpus, key=lambda gpu: _shortfall_on(target, view, gpu) - _freed_by_holders(target, view, gpu))


def eviction_failed(target: Consumer, view: View, kept: Sequence[Victim]) -> EvictionFailed:
    said = "; ".join(f"{v.consumer} {_kept_words(v)}" for v in kept)
    return EvictionFailed(
        f"{target.name} cannot be granted: {said}. Look at that service; the next request tries again",
        consumer=target.name,
        victims=[
            {
                "consumer": v.consumer,
                "held_mib": v.held_mib,
                "still_held_mib": v.still_held_mib,
                "reason": v.reason,
            }
            | ({"cause": v.cause} if v.cause else {})
            for v in kept
        ],
        evicted=_evicted(view),
    )


def _kept_words(victim: Victim) -> str:
    if not victim.asked:
        return f"has no unload call configured and holds {victim.still_held_mib} MiB"
    words = {
        "kept": "was asked to unload and kept",
        "busy": "is still computing and holds",
        "hung": "did not answer its unload and holds",
        "unreachable": "could not be reached for its unload and holds",
    }
    cause = f" ({victim.cause})" if victim.cause else ""
    return f"{words[victim.reason or 'kept']} {victim.still_held_mib} of {victim.held_mib} MiB{cause}"


def _evicted(view: View) -> list[str]:
    return [victim.consumer for victim in view.tried if victim.reason is None]


def insufficient(target: Consumer, view: View) -> InsufficientVram:
    """The refusal with its numbers, of the GPU that is shortest."""
    worst = _to_blame(target, view)
    gpu = _gpu(view, worst)
    needed = target.needs_mib(worst)
    short = max(0, _shortfall_on(target, view, worst))
    strangers = sorted(gpu.untracked, key=lambda p: -(p.used_mib or 0))
    size = f"half of the card, {needed} MiB, until its size is learned" if target.unsized else f"{needed} MiB"
    message = (
        f"{target.name} needs {size} on GPU {worst} ({gpu.name}); {gpu.free_mib} of {gpu.total_mib} MiB are "
        f"free, {view.headroom_mib} MiB are headroom"
    )
    promised = view.promised_mib.get(worst, 0)
    if promised:
        message += f", {promised} MiB are promised to holders"
    if view.kept_mib(worst):
        message += f", {view.kept_mib(worst)} MiB are kept for what others held in the last minutes"
    if impossible(target, view):
        message += f". It can never fit on this card: lower vram_resident_mib of {target.name} or gpu.headroom_mib"
    elif strangers:
        named = ", ".join(_stranger_words(p, view.outside.stranger(gpu.index, p.pid), view.now) for p in strangers)
        message += f". Not gpumgr's to unload: {named}. {_would_have_to_go(strangers, short, view, worst)}"
    else:
        message += ". Nothing that gpumgr may unload is left on the card"
    could_go = _could_go(target, view, worst)
    if could_go:
        named = ", ".join(f"{user['consumer']} {user['held_mib']} MiB" for user in could_go)
        message += f". In use, and could go later: {named}"
    if not view.may_unload and (residents := _idle_residents(target, view)):
        held = ", ".join(f"{name} {view.held(name, worst).held_mib} MiB" for name in residents)
        message += f". scheduling.mode lets gpumgr unload nobody; idle on the card: {held}"
    if view.spares_pinned and (stays := [c.name for c in _others(target, view) if c.pinned and view.resident(c)]):
        held = ", ".join(f"{name} {view.held(name, worst).held_mib} MiB" for name in stays)
        message += f". Pinned, and not unloaded for a proxied call: {held}"
    if _evicted(view):
        message += f". Unloaded for this attempt: {', '.join(_evicted(view))}"
    return InsufficientVram(
        message,
        consumer=target.name,
        gpu=worst,
        needed_mib=needed,
        short_mib=short,
        free_mib=gpu.free_mib,
        total_mib=gpu.total_mib,
        headroom_mib=view.headroom_mib,
        promised_mib=promised,
        held_mib=view.held(target.name, worst).held_mib,
        kept_mib=view.kept_mib(worst),
        untracked=[{"pid": p.pid, "name": p.name, "used_mib": p.used_mib} for p in strangers],
        lately=[
            {"pid": known.pid, "peak_mib": known.peak_mib, "there_seconds": round(max(0.0, view.now - known.since), 3)}
            for known in (view.outside.stranger(gpu.index, p.pid) for p in strangers)
            if known is not None
        ],
        could_go=_could_go(target, view, worst),
        evicted=_evicted(view),
    )


def _could_go(target: Consumer, view: View, gpu: GpuRef) -> list[dict[str, object]]:
    """Who is in use on this GPU, and may be unloaded when that has ended."""
    users = (view.held(name, gpu).held_mib for name in _users(target, view))
    pairs = zip(_users(target, view), users, strict=True)
    return [{"consumer": name, "held_mib": held} for name, held in pairs if held]


def _stranger_words(process: GpuProcess, known: Stranger | None, now: float) -> str:
    said = f"{process.name} (pid {process.pid}) {_mib(process.used_mib)}"
    if known is None:
        return said
    if known.peak_mib > (process.used_mib or 0):
        said += f", lately {known.peak_mib} MiB"
    return f"{said}, there for {_span(now - known.since)}"


def _span(seconds: float) -> str:
    minutes = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
    return f"{seconds:.0f} s" if seconds < 120 else minutes


def _would_have_to_go(strangers: Sequence[GpuProcess], short_mib: int, view: View, gpu: GpuRef) -> str:
    """In words: any one of those that are large enough, else the largest ones together. Largest first."""

    def freed_by(process: GpuProcess) -> int:
        index = _gpu(view, gpu).index
        known = view.outside.stranger(index, process.pid)
        return max(process.used_mib or 0, 0 if known is None else known.peak_mib)

    strangers = sorted(strangers, key=lambda process: -freed_by(process))
    enough = [p.name for p in strangers if freed_by(p) >= short_mib]
    if enough:
        return f"{short_mib} MiB are missing: it fits once {' or '.join(enough)} has gone"
    together: list[str] = []
    freed = 0
    for process in strangers:
        together.append(process.name)
        freed += freed_by(process)
        if freed >= short_mib:
            return f"{short_mib} MiB are missing: it fits once {' and '.join(together)} have gone"
    if any(process.used_mib is None for process in strangers):
        return f"{short_mib} MiB are missing: the driver does not tell whether they hold that much"
    return f"{short_mib} MiB are missing: even without them it would not fit"


def _mib(used_mib: int | None) -> str:
    return "an unknown amount" if used_mib is None else f"{used_mib} MiB"


# -- proof --------------------------------------------------------------------------------------------------


def given_back(
    victim: Consumer,
    before: Mapping[GpuRef, Holding],
    now: Mapping[GpuRef, int | None],
    risen_mib: Mapping[GpuRef, int],
) -> bool:
    """Whether an unload is proved, on every GPU of the victim that ``now`` tells of.

    Where the driver names its processes (``now`` has a number): they hold at most ``residual_mib``. Where not:
    free memory rose by at least 90 % of what the victim was known to hold, or by all of it but ``residual_mib``,
    which a small consumer's context may be more than a tenth of.
    """
    for gpu, held in now.items():
        if held is not None and before[gpu].exact:
            if held > victim.residual_mib:
                return False
        else:
            known = before[gpu].held_mib
            enough = min(0.9 * known, known - victim.residual_mib) if known > victim.residual_mib else 0.9 * known
            if risen_mib.get(gpu, 0) < enough:
                return False
    return True
