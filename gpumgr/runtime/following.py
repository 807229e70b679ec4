"""Calls whose work goes on after their answer: they hold the GPU until their consumer is done with it.

Owns: beginning to follow, and the looks, which the thread ``observe-servers`` makes. Must not: know what a consumer's
answers mean (its dialect does), or what follows from a look (core/following.py).

    call's answer    names work         → followed: from then on the call ends with the work, and not with its caller
    each 0.5 s       is it done?        → its call ends, whoever waits goes. Sooner where a caller has been told
                                          something through a free path meanwhile: it may be the end
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping

from gpumgr.core.following import Followed, Look, Over, Work, begun
from gpumgr.core.lease import Call
from gpumgr.runtime.ports import BackendError, Clock, Dialect
from gpumgr.runtime.state import State

log = logging.getLogger(__name__)


class Follower:
    """``over`` ends a call. ``nudge`` has ``look`` called soon, on the one thread that calls it."""

    def __init__(
        self,
        state: State,
        dialects: Mapping[str, Dialect],
        clock: Clock,
        over: Callable[[Call], None],
        nudge: Callable[[], None],
    ) -> None:
        self._state = state
        self._dialects = dialects
        self._clock = clock
        self._over = over
        self._nudge = nudge

    def may_begin(self, consumer: str, method: str, path: str) -> bool:
        """Whether the answer to this call may name work that goes on after it."""
        return self._dialects[consumer].begins_work(method, path)

    def follow(self, call: Call, status: int, body: bytes) -> None:
        """Before the answer is handed on. Nothing where it names no work, or a lease is what holds the GPU."""
        if call.lease_id is not None:
            return
        try:
            work = self._dialects[call.consumer].work_begun(status, body)
        except Exception:  # a defect there must not cost the caller its answer
            log.exception("what a call began could not be read consumer=%s", call.consumer)
            work = None
        if work is None:
            log.warning("a call's answer names no work to wait for: the rest is a tail consumer=%s", call.consumer)
            return
        with self._state.lock:
            if call.seq not in self._state.calls:
                return
            self._state.followed[call.seq] = begun(call, work, self._clock.monotonic())
        self._nudge()

    def hint(self, consumer: str) -> None:
        """A caller was told something by this consumer: look soon."""
        with self._state.lock:
            of_it = [seq for seq, followed in self._state.followed.items() if followed.call.consumer == consumer]
            for seq in of_it:
                self._state.followed[seq] = dataclasses.replace(self._state.followed[seq], hinted=True)
        if of_it:
            self._nudge()

    def look(self) -> None:
        """At each whose time has come. On one thread alone, which is also the only one that ends it."""
        with self._state.lock:
            now = self._clock.monotonic()
            due = [followed for followed in self._state.followed.values() if followed.due_at() <= now]
            for followed in due:  # a hint that comes from now on is about a later moment than this look
                self._state.followed[followed.call.seq] = dataclasses.replace(followed, hinted=False)
        for followed in due:
            self._note(followed, *self._looked(followed))

    def due_in(self, at_most_seconds: float) -> float:
        """Seconds until the next look."""
        with self._state.lock:
            soonest = min((followed.due_at() for followed in self._state.followed.values()), default=None)
        left = at_most_seconds if soonest is None else soonest - self._clock.monotonic()
        return min(at_most_seconds, max(0.0, left))

    def _looked(self, followed: Followed) -> tuple[Look, str]:
        """And why it could not be seen."""
        try:
            done = self._dialects[followed.call.consumer].is_done(followed.work)
        except BackendError as error:
            return (Look.REFUSED if error.refused else Look.SILENT), str(error)
        except Exception:
            log.exception("a look at work failed consumer=%s", followed.call.consumer)
            return Look.SILENT, "gpumgr failed to ask; its log has the traceback"
        return Look.NOWHERE if done is None else Look.DONE if done else Look.GOING_ON, ""

    def _note(self, looked_at: Followed, look: Look, why: str) -> None:
        call, work = looked_at.call, looked_at.work
        with self._state.lock:
            now = self._clock.monotonic()
            hinted = self._state.followed.pop(call.seq).hinted
            after = looked_at.after(look, now)
            if not isinstance(after, Over):
                is_long = after.is_long(now)
                told_at = now if is_long else after.told_at
                self._state.followed[call.seq] = dataclasses.replace(after, told_at=told_at, hinted=hinted)
        held = round(now - call.began_at, 3)
        if isinstance(after, Over):
            self._tell_end(call, work, after, held, why)
            self._over(call)
        elif is_long:
            self._state.note("work_long", call.consumer, work=str(work), held_seconds=held)
            log.warning("work_long consumer=%s work=%s held_seconds=%s: it is waited for", call.consumer, work, held)

    def _tell_end(self, call: Call, work: Work, over: Over, held: float, why: str) -> None:
        facts = f"consumer={call.consumer} work={work} held_seconds={held}"
        if over is Over.DONE:
            log.info("work done %s", facts)
            return
        reason = why or f"it is neither in the queue nor in the history of {call.consumer}"
        self._state.note("work_lost", call.consumer, work=str(work), held_seconds=held, how=over.value, reason=reason)
        log.warning("work_lost %s how=%s: %s", facts, over.value, reason)
