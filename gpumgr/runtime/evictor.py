"""Unload, and watch the card until the memory is back.

Owns: the unload calls and the proof. Must not: choose victims or hold the broker's lock.

    0 ms      every victim's unload call goes out, each on a short thread of its own: one server that hangs
              must not hide what another gives back
    +25 ms …  the card is read: each 25 ms for 2 s, then each 50 ms
    +1 s …    a dialect that loses calls, or a call that failed, is asked again each second
    limit     whoever has not given back is a failed victim, with the reason

A 200 proves nothing: only the card does. Three cases beside the plain one:

- It held no more than its residual from the start: that is given back by definition, but a model that is just being
  loaded looks the same. So the call must have been answered and the number stand still, or the limit be reached.
- Nobody knows what it holds: the call must have been answered, or refused by a machine where nobody listens.
- The driver does not name its processes, so that free memory must tell: such victims go one after the other, as one
  rise cannot prove two.

A victim is back in service when it is judged and none of its calls is running any more: a late one would unload what
its next holder has just loaded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gpumgr.core.card import Reading
from gpumgr.core.catalog import Consumer, GpuRef
from gpumgr.core.ledger import returned_share
from gpumgr.core.placement import Holding, KeptReason, Victim, given_back
from gpumgr.runtime.ports import BackendError, Clock, Dialect, Probe

log = logging.getLogger(__name__)

FAST_POLL_SECONDS = 0.025
SLOW_POLL_SECONDS = 0.05
"""With the step after it this stays below 100 ms from the memory's return to the grant (bench/free_to_grant.py)."""
FAST_FOR_SECONDS = 2.0
RETRY_FAILED_SECONDS = 1.0
SAID_EACH_SECONDS = 0.25
SETTLE_SECONDS = 0.5
"""How long free memory may lag behind the process list before it is believed as it is."""


@dataclass
class _Unload:
    """One victim's unload under way. ``error`` and ``answered`` are written by the calling thread alone; ``calling``
    and ``judged`` together say whether it may serve again, and are guarded by the evictor."""

    consumer: Consumer
    gpus: Sequence[GpuRef]
    """Where its memory must be back: those that are needed."""
    dialect: Dialect
    back: Callable[[str], None]
    before: Mapping[GpuRef, Holding]
    free_before: Mapping[GpuRef, int]
    started_at: float
    growing: bool = False
    believe: bool = False
    said_at: float | None = None
    proved: bool = True
    asked_at: float = 0.0
    asks: int = 0
    calling: bool = False
    answered: bool = False
    error: BackendError | None = None
    proved_at: float | None = None
    done_at: float | None = None
    judged: bool = False
    seen_mib: int = 0
    still: dict[GpuRef, int] = field(default_factory=dict)
    told: dict[GpuRef, int | None] = field(default_factory=dict)
    """What the driver said last that it holds; None where it did not say."""
    still_since: float = 0.0

    @property
    def limit(self) -> float:
        if not self.dialect.can_unload:
            return self.started_at  # nobody was asked: there is nothing to wait for
        return self.started_at + self.consumer.unload_timeout_seconds

    @property
    def shows(self) -> bool:
        """Whether the card can tell this unload: memory that has to fall."""
        return max(self.seen_mib, *(holding.held_mib for holding in self._needed())) > self.consumer.residual_mib

    @property
    def exact(self) -> bool:
        return all(holding.exact for holding in self._needed())

    @property
    def held_mib(self) -> int:
        return sum(holding.held_mib for holding in self._needed())

    @property
    def nothing_to_ask(self) -> bool:
        """Nothing is known that it holds, and there is no call that would take it away: what stays is the card's to
        tell."""
        return not self.dialect.can_unload and not self.held_mib

    @property
    def refused(self) -> bool:
        return self.error is not None and self.error.refused

    def _needed(self) -> list[Holding]:
        return [self.before[gpu] for gpu in self.gpus]


class Evictor:
    """Blocking. ``pause`` sleeps that many seconds; it is handed in so that a test owns the time."""

    def __init__(
        self, probe: Probe, dialects: Mapping[str, Dialect], clock: Clock, pause: Callable[[float], None]
    ) -> None:
        self._probe = probe
        self._dialects = dialects
        self._clock = clock
        self._pause = pause
        self._guard = threading.Lock()

    def unload(
        self,
        victims: Sequence[Consumer],
        holdings: Mapping[tuple[str, GpuRef], Holding],
        reading: Reading,
        back: Callable[[str], None] = lambda _: None,
        *,
        needed: Sequence[GpuRef] | None = None,
        growing: bool = False,
        believe: bool = False,
    ) -> list[Victim]:
        """Unload these and wait for the proof; one Victim for each, in order. ``back`` is told each one's name once,
        when it may serve again: at the latest when this returns, or from a thread of its own when its call ends.
        ``needed``: only there must the memory be back; None: on every GPU of each victim.
        ``growing``: memory may still be on its way to the card; what looks small is watched until it has come and
        gone, or until the limit. ``believe``: where the card cannot be read, their own word counts.

        Returns after the slowest one's ``unload.timeout_seconds`` at the latest, plus one read of the card and one
        busy report (those whom the driver does not name go one after the other).
        """
        known = {victim.name: self._known(victim, holdings) for victim in victims}
        named = [v for v in victims if all(holding.exact for holding in known[v.name].values())]
        groups = ([named] if named else []) + [[v] for v in victims if v not in named]
        verdicts: dict[str, Victim] = {}
        waiting = [victim.name for victim in victims]
        try:
            for number, group in enumerate(groups):
                before = reading if number == 0 else self._probe.read()
                unloads = self._began(group, known, before, back, needed, growing=growing, believe=believe)
                for verdict in self._together(unloads, waiting):
                    verdicts[verdict.consumer] = verdict
        finally:
            for name in waiting:
                back(name)
        return [verdicts[victim.name] for victim in victims]

    @staticmethod
    def _known(victim: Consumer, holdings: Mapping[tuple[str, GpuRef], Holding]) -> dict[GpuRef, Holding]:
        return {gpu: holdings.get((victim.name, gpu), Holding(0)) for gpu in victim.gpus}

    def _began(
        self,
        group: Sequence[Consumer],
        known: Mapping[str, Mapping[GpuRef, Holding]],
        reading: Reading,
        back: Callable[[str], None],
        needed: Sequence[GpuRef] | None,
        *,
        growing: bool,
        believe: bool,
    ) -> list[_Unload]:
        now = self._clock.monotonic()
        return [
            _Unload(
                consumer=victim,
                gpus=[gpu for gpu in victim.gpus if needed is None or gpu in needed] or victim.gpus,
                dialect=self._dialects[victim.name],
                back=back,
                before=known[victim.name],
                free_before=_free(victim, reading),
                started_at=now,
                growing=growing,
                believe=believe,
                still_since=now,
            )
            for victim in group
        ]

    def _together(self, unloads: Sequence[_Unload], waiting: list[str]) -> list[Victim]:
        for unload in unloads:
            waiting.remove(unload.consumer.name)  # from here on its unload sees to it
        try:
            for unload in unloads:
                self._ask(unload, unload.started_at)
            self._watch(unloads)
            return [self._verdict(unload) for unload in unloads]
        finally:
            for unload in unloads:
                self._judge(unload)

    def _judge(self, unload: _Unload) -> None:
        with self._guard:
            unload.judged = True
            serves = not unload.calling
        if serves:
            unload.back(unload.consumer.name)

    def _ask(self, unload: _Unload, now: float) -> None:
        if not unload.dialect.can_unload:
            return
        again = unload.asks > 0
        unload.asked_at = now
        unload.asks += 1
        unload.calling = True
        name = f"unload-{unload.consumer.name}"
        try:
            arguments = (unload, unload.limit - now, again and unload.dialect.cuts_work)
            threading.Thread(target=self._call, args=arguments, name=name, daemon=True).start()
        except RuntimeError as error:  # no thread to be had: tried again like any call that failed
            unload.calling = False
            unload.error = BackendError("failed", f"its unload could not be called: {error}")

    def _call(self, unload: _Unload, within_seconds: float, only_idle: bool) -> None:
        """``only_idle``: whoever was idle at the first call may compute by now, and this one would cut that."""
        try:
            if only_idle and _computes(unload.dialect):
                raise BackendError("failed", "it computes: it was not asked again")
            unload.dialect.unload(within_seconds)
        except BackendError as error:
            unload.error = error
            log.warning("unload call failed consumer=%s reason=%s: %s", unload.consumer.name, error.reason, error)
        else:
            unload.error = None
            unload.answered = True
        finally:
            with self._guard:
                unload.calling = False
                serves = unload.judged
            if serves:
                unload.back(unload.consumer.name)

    def _watch(self, unloads: Sequence[_Unload]) -> None:
        start = self._clock.monotonic()
        while True:
            reading = self._probe.read()
            now = self._clock.monotonic()
            for unload in unloads:
                if unload.done_at is None:
                    self._look(unload, reading, now)
            if all(unload.done_at is not None or now >= unload.limit for unload in unloads):
                return
            self._pause(FAST_POLL_SECONDS if now - start < FAST_FOR_SECONDS else SLOW_POLL_SECONDS)

    def _look(self, unload: _Unload, reading: Reading, now: float) -> None:
        if self._given_back(unload, reading, now):
            unload.done_at = now
        elif now < unload.limit and not unload.calling:
            again = unload.dialect.ask_again_seconds
            again = RETRY_FAILED_SECONDS if unload.error is not None else again
            if again is not None and now - unload.asked_at >= again:
                self._ask(unload, now)

    def _given_back(self, unload: _Unload, reading: Reading, now: float) -> bool:
        """Proved by the card where that can be read; where not, its own word may do."""
        unseen = [gpu for gpu in unload.gpus if reading.problems([gpu])]
        unload.told = {gpu: _held(unload.consumer, gpu, reading) for gpu in unload.gpus}
        if unseen and not (unload.believe and self._said_gone(unload, unseen, now)):
            return False
        seen = [gpu for gpu in unload.gpus if gpu not in unseen]
        return not seen or self._shown_gone(unload, seen, reading, now)

    def _shown_gone(self, unload: _Unload, seen: Sequence[GpuRef], reading: Reading, now: float) -> bool:
        held = {gpu: _held(unload.consumer, gpu, reading) for gpu in seen}
        free = _free(unload.consumer, reading)
        risen = {gpu: free[gpu] - unload.free_before.get(gpu, 0) for gpu in seen}
        still = {gpu: _still(unload.before[gpu], held[gpu], risen[gpu]) for gpu in seen}
        if not still.items() <= unload.still.items():
            unload.still |= still
            unload.still_since = now
        unload.seen_mib = max(unload.seen_mib, *still.values())
        if not given_back(unload.consumer, unload.before, held, risen):
            return False
        if not unload.exact and not unload.held_mib and not unload.growing:
            return unload.nothing_to_ask or unload.answered or unload.refused
        if not unload.shows:
            rests = now - unload.still_since >= SETTLE_SECONDS and not unload.growing
            return (unload.answered and rests) or now >= unload.limit
        unload.proved_at = now if unload.proved_at is None else unload.proved_at
        gone = {gpu: unload.before[gpu].held_mib - unload.still[gpu] for gpu in held}
        lagging = any(risen[gpu] < 0.9 * gone[gpu] for gpu in held)
        return not lagging or now - unload.proved_at >= SETTLE_SECONDS or now >= unload.limit

    def _said_gone(self, unload: _Unload, unseen: Sequence[GpuRef], now: float) -> bool:
        """Without a card to look at: its call was answered, and its report, if any, says that nothing is loaded."""
        gone = unload.nothing_to_ask or unload.refused
        if unload.proved and (gone or (unload.answered and self._says_nothing_is_loaded(unload, now))):
            unload.still |= dict.fromkeys(unseen, 0)
            unload.proved = False
        return not unload.proved

    def _says_nothing_is_loaded(self, unload: _Unload, now: float) -> bool:
        if unload.said_at is not None and now - unload.said_at < SAID_EACH_SECONDS:
            return False
        unload.said_at = now
        try:
            report = unload.dialect.loaded()
        except BackendError as error:
            return error.refused
        return report is None or not report.loaded

    def _verdict(self, unload: _Unload) -> Victim:
        end = unload.done_at if unload.done_at is not None else self._clock.monotonic()
        return Victim(
            consumer=unload.consumer.name,
            held_mib=unload.held_mib,
            still_held_mib=sum(unload.still.values()) if unload.still else unload.held_mib,
            seconds=round(end - unload.started_at, 3),
            reason=None if unload.done_at is not None else self._why(unload),
            asked=unload.dialect.can_unload,
            proved=unload.proved,
            cause=self._cause(unload),
            returned_share=returned_share(unload.consumer.residual_mib, unload.before, unload.told),
        )

    @staticmethod
    def _cause(unload: _Unload) -> str:
        """Only what is not in the reason already."""
        said = unload.error is not None and unload.error.reason == "failed" and unload.done_at is None
        return str(unload.error) if said else ""

    def _why(self, unload: _Unload) -> KeptReason:
        reason = unload.error.reason if unload.error is not None else None
        if reason == "unreachable":
            return "unreachable"
        if unload.calling or reason == "hung":
            return "hung"
        try:
            return "busy" if unload.dialect.busy() else "kept"
        except BackendError:
            return "kept"


def _computes(dialect: Dialect) -> bool:
    """A report that fails tells nothing, and it was asked to unload already."""
    try:
        return dialect.busy() is True
    except BackendError:
        return False


def _free(consumer: Consumer, reading: Reading) -> dict[GpuRef, int]:
    gpus = {ref: reading.gpu(ref) for ref in consumer.gpus}
    return {ref: gpu.free_mib for ref, gpu in gpus.items() if gpu is not None}


def _held(consumer: Consumer, ref: GpuRef, reading: Reading) -> int | None:
    gpu = reading.gpu(ref)
    return None if gpu is None else gpu.held_mib(consumer.name)


def _still(before: Holding, held_mib: int | None, risen_mib: int) -> int:
    if held_mib is not None and before.exact:
        return held_mib
    return max(0, before.held_mib - max(0, risen_mib))
