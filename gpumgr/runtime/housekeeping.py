"""The card at rest, at work: unloads that no request asked for, and bringing residents back.

Owns: the rounds of one thread, ``housekeeping``, and the order of their steps. Must not: choose (core/rest.py does).

    1. decide     under the lock, from the last reading: who may go, and why
    2. ask        those that can say so whether they compute; whoever does is left alone until the next round
    3. decide     again: whoever is still to go leaves service under that lock
    4. unload     with the evictor's proof, and back in service: on a short thread, ``clear``, not waited for where
                  that takes long
    5. restore    one consumer at a time, through the line like anybody's request, so that every rule holds for it too

It is a thread of its own and no preparation's, as nobody waits for it: a server that hangs must not hold up a request.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

from gpumgr.config import Rest
from gpumgr.core.catalog import Consumer, overlap
from gpumgr.core.placement import Victim
from gpumgr.core.rest import (
    AGAIN_SECONDS,
    PRELOAD_AGAIN_SECONDS,
    RESTORE_AGAIN_SECONDS,
    Absent,
    Standing,
    Why,
    to_clear,
    to_restore,
)
from gpumgr.errors import GpumgrError, GpuYielded, RequestEnded, SchedulerTimeout
from gpumgr.runtime.evictor import Evictor
from gpumgr.runtime.ports import Clock, Dialect, Probe
from gpumgr.runtime.preparation import ask_busy
from gpumgr.runtime.state import State

log = logging.getLogger(__name__)

SOON_SECONDS = 0.25
LATER_SECONDS = 1.0
PATIENCE_SECONDS = 1.0
"""After that an unload goes on by itself: whoever hangs must not keep the others on the card when a game begins."""


class Housekeeping:
    """``bring_back`` takes a consumer's name through the line, and says why it could not; it blocks."""

    def __init__(
        self,
        state: State,
        probe: Probe,
        dialects: Mapping[str, Dialect],
        evictor: Evictor,
        clock: Clock,
        rest: Mapping[str, Rest],
        bring_back: Callable[[str], GpumgrError | None],
    ) -> None:
        self._state = state
        self._probe = probe
        self._dialects = dialects
        self._evictor = evictor
        self._clock = clock
        self._rest = rest
        self._bring_back = bring_back
        self._quiet_since: dict[str, float] = {}
        self._preloads = {name for name, each in rest.items() if each.preload}

    def round(self) -> float:
        """One look and what follows from it; the seconds until the next."""
        going = self._chosen()
        hung = self._that_said_nothing(going)
        for names in ([name for name in going if name not in hung], hung):  # a report that hangs takes its time
            asked = {name: self._uses(name) for name in names}
            idle = {name: uses for name, uses in asked.items() if not self._computes(name)}
            if idle:
                self._clear(idle)
        name = self._to_restore()
        if name is not None:
            self._restore(name)
        with self._state.lock:
            now = self._clock.monotonic()
            outside = self._state.outside
            closed = outside.paused(now) is not None or bool(outside.games)
        return SOON_SECONDS if closed or going else LATER_SECONDS

    # -- who goes -------------------------------------------------------------------------------------------

    def _chosen(self) -> dict[str, Why]:
        with self._state.lock:
            return self._choose()

    def _choose(self) -> dict[str, Why]:
        """1 and 3, with the lock held."""
        state = self._state
        if not state.may_unload or state.stopping:
            return {}
        in_use = state.in_use()
        standings = [self._standing(c, in_use) for c in state.catalog.consumers.values() if not c.retired]
        return dict(to_clear(standings, state.outside, self._clock.monotonic()))

    def _standing(self, consumer: Consumer, in_use: frozenset[str]) -> Standing:
        state, name = self._state, consumer.name
        remembered = state.memory[name]
        used = [at for at in (remembered.last_used, remembered.busy_seen, remembered.resident_since) if at is not None]
        return Standing(
            name=name,
            gpus=consumer.gpus,
            resident=remembered.resident_since is not None,
            free=self._dialects[name].can_unload
            and name not in in_use
            and not state.queue.is_unloading(name)
            and not state.views.lingerers(name),
            idle_since=max(used, default=float("-inf")),
            waited_for=any(entry.consumer == name for entry in state.queue.waiting()),
            intrudes=tuple(sorted({lease.consumer for lease in state.leases if name in state.intruders_of(lease)})),
            idle_unload_seconds=self._rest.get(name, Rest()).idle_unload_seconds,
            not_before=remembered.unload_not_before,
        )

    def _that_said_nothing(self, names: Iterable[str]) -> list[str]:
        with self._state.lock:
            return [name for name in names if self._state.memory[name].busy_error is not None]

    def _uses(self, name: str) -> int:
        with self._state.lock:
            return self._state.memory[name].uses

    def _computes(self, name: str) -> bool:
        """2. A report that hangs counts as busy, as everywhere."""
        with self._state.lock:
            asks = self._state.may_ask_busy(name)
        return asks and bool(ask_busy(self._state, name, self._dialects[name]))

    def _clear(self, idle: Mapping[str, int]) -> None:
        """3 and 4. ``idle``: who said so, and after how many uses: one that ended since may have left work."""
        with self._state.lock:
            memory = self._state.memory
            chosen = {name: why for name, why in self._choose().items() if idle.get(name) == memory[name].uses}
            consumers = [self._state.catalog.consumers[name] for name in chosen]
            for name in chosen:
                self._state.queue.take_out(name)
        if not chosen:
            return
        unload = threading.Thread(target=self._unload, args=(chosen, consumers), name="clear", daemon=True)
        try:
            unload.start()
        except RuntimeError:  # no thread to be had
            self._unload(chosen, consumers)
        else:
            unload.join(PATIENCE_SECONDS)

    def _unload(self, chosen: Mapping[str, Why], consumers: Sequence[Consumer]) -> None:
        try:
            self._unload_with_proof(chosen, consumers)
        except Exception:
            log.exception("an unload failed consumers=%s", ", ".join(chosen))

    def _unload_with_proof(self, chosen: Mapping[str, Why], consumers: Sequence[Consumer]) -> None:
        back = set(chosen)

        def in_service(name: str) -> None:
            with self._state.lock:
                back.discard(name)
                self._state.queue.put_back(name)
                self._state.advance()

        try:
            reading = self._probe.read()
            with self._state.lock:
                holdings = self._state.views.holdings(reading, {})
        except BaseException:
            for name in list(back):
                in_service(name)
            raise
        outcome = self._evictor.unload(consumers, holdings, reading, in_service)
        after = self._probe.read()
        with self._state.lock:
            for victim in outcome:
                why = chosen[victim.consumer]
                self._state.note_victim(victim, after, wanted_back=why in ("hold", "game"))
                if victim.reason is not None:
                    remembered = self._state.memory[victim.consumer]
                    remembered.unload_not_before = self._clock.monotonic() + AGAIN_SECONDS
            self._state.note_reading(after)
        for victim in outcome:
            self._tell(victim, chosen[victim.consumer])

    def _tell(self, victim: Victim, why: Why) -> None:
        kind = "evict" if victim.reason is None else "evict_failed"
        facts: dict[str, object] = {
            "held_mib": victim.held_mib,
            "still_held_mib": victim.still_held_mib,
            "seconds": victim.seconds,
        }
        if victim.reason is not None:
            facts["reason"] = victim.reason
        self._state.note(kind, victim.consumer, **facts, why=why)
        log.info("%s consumer=%s why=%s %s", kind, victim.consumer, why, " ".join(f"{k}={v}" for k, v in facts.items()))

    # -- who comes back -------------------------------------------------------------------------------------

    def _to_restore(self) -> str | None:
        """5, the decision."""
        with self._state.lock:
            if self._state.stopping or not self._rest:
                return None
            now = self._clock.monotonic()
            returning = [(name, rest) for name, rest in self._rest.items() if self._may_return(name, rest)]
            return to_restore([self._absent(name, rest, now) for name, rest in returning], self._state.outside, now)

    def _may_return(self, name: str, rest: Rest) -> bool:
        if self._state.memory[name].resident_since is not None:
            self._preloads.discard(name)  # it came by itself
        return (rest.restore or name in self._preloads) and self._dialects[name].can_restore

    def _absent(self, name: str, rest: Rest, now: float) -> Absent:
        state, consumer = self._state, self._state.catalog.consumers[name]
        quiet = self._note_quiet(consumer, now)
        remembered = state.memory[name]
        preload = name in self._preloads
        return Absent(
            name=name,
            gpus=consumer.gpus,
            wanted=preload or remembered.wanted_back,
            resident=remembered.resident_since is not None,
            quiet_since=quiet,
            after_seconds=0.0 if preload else rest.restore_after_seconds,
            not_before=remembered.load_not_before,
        )

    def _note_quiet(self, consumer: Consumer, now: float) -> float | None:
        state = self._state
        holds = any(overlap(hold.gpus, consumer.gpus) for hold in state.queue.holds.values())
        waits = any(overlap(state.catalog.consumers[e.consumer].gpus, consumer.gpus) for e in state.queue.waiting())
        ends = [
            remembered.last_used
            for name, remembered in state.memory.items()
            if remembered.last_used is not None and state.catalog.share_gpu(name, consumer.name)
        ]
        if holds or waits:
            self._quiet_since.pop(consumer.name, None)
            return None
        since = self._quiet_since.setdefault(consumer.name, now)
        return max([since, *ends])

    def _restore(self, name: str) -> None:
        preload = name in self._preloads
        failed = self._bring_back(name)
        if failed is None:
            self._preloads.discard(name)
            self._state.note("restore", name, preload=preload)
            log.info("restore consumer=%s preload=%s", name, preload)
            return
        again = PRELOAD_AGAIN_SECONDS if preload else RESTORE_AGAIN_SECONDS
        first = isinstance(failed, RequestEnded | GpuYielded | SchedulerTimeout)  # somebody else was
        if first and not preload:
            again = self._rest[name].restore_after_seconds
        with self._state.lock:
            self._state.memory[name].load_not_before = self._clock.monotonic() + again
        level = logging.INFO if first else logging.WARNING
        log.log(level, "it could not be brought back, again in %.0f s consumer=%s: %s", again, name, failed)
