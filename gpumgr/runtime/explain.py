"""What an acquire would meet now, told without doing it.

Owns: the answer of ``POST /v1/explain``. Must not: decide (the queue's policy and core/placement.py do), change
anything, or ask a consumer.

It goes the way of an acquire, on a copy of the queue and a ticket that nobody else sees:

    1. at once    what refuses before the line; the lease, or the waiting request, that its request_id has already
    2. the line   a copy of the queue: whether it has its turn, else what it waits for
    3. prepare    the store, the target's health as it was seen last, the card as it is read now
    4. decide     the decision, and what follows where the unloads it asks for succeed (core/foresight.py)

Whether a consumer serves, computes or is loaded is taken from what was heard last: asking takes as long as the slowest
of them, and would be the only thing here that anybody else could feel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumgr.core.catalog import Consumer
from gpumgr.core.foresight import foresee
from gpumgr.core.lease import HolderProcess, Lease, require_same
from gpumgr.core.ledger import observed_figures, percentile, unload_figures
from gpumgr.core.outlook import Why
from gpumgr.core.placement import Grant, Refuse, Unload, View, Wait
from gpumgr.core.queue import Priority, Queue, WaitingFor
from gpumgr.errors import Conflict, GpumgrError, Refused
from gpumgr.runtime.outlook import Forecast
from gpumgr.runtime.ports import Clock, Dialect, Probe
from gpumgr.runtime.preparation import decision_for, require_store, unhealthy
from gpumgr.runtime.refusals import quantum_words, reason_of, said_of, scheduler_timeout, waits_for
from gpumgr.runtime.state import State
from gpumgr.runtime.ticket import Ask, Ticket

READ_SECONDS = 1.0
"""How long the card is waited for; a driver that takes longer leaves the last reading."""
SHOWN_AHEAD = 20


@dataclass
class Found:
    """What was found, until it is told. ``joins``: a request that waits already."""

    outcome: str
    ticket: Ticket | None = None
    unloads: Sequence[Unload] = ()
    view: View | None = None
    waiting_for: Why | None = None
    refusal: GpumgrError | None = None
    holders: Sequence[Mapping[str, Any]] = ()
    in_use: Sequence[Mapping[str, Any]] = ()
    ahead: Sequence[Ticket] = ()
    forecast: Forecast | None = None
    """Where it waits in the line."""
    lease: Lease | None = None
    joins: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Explainer:
    """``refusal_at_once`` and ``named_process`` are the acquire's own; ``wait_seconds`` is what an ask waits, and
    ``priority`` what it counts as."""

    def __init__(
        self,
        state: State,
        probe: Probe,
        dialects: Mapping[str, Dialect],
        clock: Clock,
        *,
        lets_pass: bool,
        refusal_at_once: Callable[[Consumer], GpumgrError | None],
        named_process: Callable[[int | None], HolderProcess | None],
        wait_seconds: Callable[[Ask], float],
        priority: Callable[[Ask], Priority],
        stopping: Callable[[], GpumgrError],
    ) -> None:
        self._state = state
        self._probe = probe
        self._dialects = dialects
        self._clock = clock
        self._lets_pass = lets_pass
        self._refusal_at_once = refusal_at_once
        self._named_process = named_process
        self._wait_seconds = wait_seconds
        self._priority = priority
        self._stopping = stopping

    def explain(self, ask: Ask) -> dict[str, Any]:
        """Waits for the card alone, at most ``READ_SECONDS``.

        Raises: InvalidRequest, KindUnknown, ConsumerUnknown; what else an acquire would raise is told.
        """
        process = self._named_process(ask.holder_pid)
        with self._state.lock:
            self._state.catalog.resolve(kind=ask.kind, consumer=ask.consumer)
        reading = self._probe.read(READ_SECONDS)
        with self._state.lock:
            if reading.error is None:
                self._state.note_reading(reading)  # as status does: what is known of the card is no secret of anybody's
            consumer = self._state.catalog.resolve(kind=ask.kind, consumer=ask.consumer)
            try:
                found = self._found(ask, consumer, process)
            except (Refused, Conflict) as error:
                found = Found("refused", refusal=error)
            told = self._told(consumer, found)
        return told | self._start(found)

    def refused(self, ask: Ask, error: Refused) -> dict[str, Any]:
        """The answer where it is known already what an acquire would be refused with. Raises: as ``explain``."""
        with self._state.lock:
            consumer = self._state.catalog.resolve(kind=ask.kind, consumer=ask.consumer)
            found = Found("refused", refusal=error)
            told = self._told(consumer, found)
        return told | self._start(found)

    # -- the way of an acquire, with the lock held ----------------------------------------------------------

    def _found(self, ask: Ask, consumer: Consumer, process: HolderProcess | None) -> Found:
        """1."""
        state, now = self._state, self._clock.monotonic()
        if ask.request is not None:
            if not state.restored:
                require_store(state)
            live = state.leases.of_request(ask.request, consumer.name, now)
            if live is not None:
                return Found("granted", lease=live)
        if state.stopping:
            raise self._stopping()
        waiting = None if ask.request is None else state.by_request.get(ask.request)
        if waiting is not None and ask.request is not None:
            require_same(ask.request, waiting.consumer.name, consumer.name)
            return self._waits(waiting, state.queue, reason_of(state, waiting, now), joins=True)
        refusal = self._refusal_at_once(consumer)
        if refusal is not None:
            raise refusal
        if self._lets_pass:
            require_store(state)
            return Found("granted")
        return self._in_line(ask, consumer, process)

    def _in_line(self, ask: Ask, consumer: Consumer, process: HolderProcess | None) -> Found:
        """2."""
        state, now = self._state, self._clock.monotonic()
        queue = state.queue.copy()
        for other in state.making_way(consumer):
            if other.prepare_limit is None:
                queue.leave(other.seq)
        wait_seconds = self._wait_seconds(ask)
        behind = state.resuming.behind(ask.resume_of, consumer.name, now, ask.bearer)
        entry = queue.enter(consumer.name, now, priority=self._priority(ask), behind=behind)
        ticket = state.new_ticket(entry, ask, consumer, now, now + wait_seconds)
        ticket.process = process
        queue.begin(now)
        if state.end_lingers(ticket, now, queue):
            queue.begin(now)
        if queue.is_waiting(ticket.entry):
            if wait_seconds <= 0:
                raise scheduler_timeout(state, ticket, queue)
            return self._waits(ticket, queue, reason_of(state, ticket, now, queue))
        return self._prepared(ticket, queue, wait_seconds)

    def _prepared(self, ticket: Ticket, queue: Queue, wait_seconds: float) -> Found:
        """3, 4."""
        state, target = self._state, ticket.consumer
        require_store(state)
        known = state.memory[target.name]
        dialect = self._dialects[target.name]
        unreadable = bool(state.reading.problems(target.gpus))
        if (state.believes or not unreadable) and not dialect.load_starts_service and known.healthy is False:
            raise unhealthy(target.name, known.health_error or "it failed when it was asked last")
        busy = [name for name in state.views.suspects(target) if state.memory[name].busy]
        view = state.views.of(ticket, state.reading, {}, busy)
        seen = foresee(target, view, decision_for(ticket), self._left_mib)
        if isinstance(seen.last, Grant):
            return Found("unload" if seen.unloads else "granted", ticket, seen.unloads, view)
        if isinstance(seen.last, Refuse):
            return Found("refused", ticket, seen.unloads, view, refusal=seen.last.error)
        reason = WaitingFor(seen.last.reason) if isinstance(seen.last, Wait) else WaitingFor.VRAM
        ticket.waiting_for = reason
        if wait_seconds <= 0 and reason is not WaitingFor.PREPARING:
            return Found("refused", ticket, seen.unloads, view, refusal=scheduler_timeout(state, ticket))
        found = self._waits(ticket, queue, Why(reason))
        found.unloads, found.view = seen.unloads, view
        if isinstance(seen.last, Wait):
            found.facts = {"short_mib": seen.last.short_mib or None}
        return found

    def _waits(self, ticket: Ticket, queue: Queue, reason: Why, *, joins: bool = False) -> Found:
        state = self._state
        line, found = queue.is_waiting(ticket.entry), waits_for(state, ticket)
        waiting = [each for each in state.tickets.values() if line and state.queue.is_waiting(each.entry)]
        ahead = [each for each in waiting if each.entry.order < ticket.entry.order]
        return Found(
            "wait",
            ticket,
            waiting_for=reason,
            holders=found["holders"],
            in_use=found["in_use"],
            ahead=sorted(ahead, key=lambda each: each.entry.order),
            forecast=Forecast(state, queue, state.now()) if line else None,
            joins=joins,
        )

    def _left_mib(self, name: str, gpu: int | str) -> int:
        """What stayed after its last proved unload, or usually does."""
        known = self._state.memory[name].leftover_mib.get(gpu)
        if known:
            return known
        consumer = self._state.catalog.consumers[name]
        figures = unload_figures(self._state.ledger.account(name))
        return 0 if figures is None or figures.residual_mib is None else figures.residual_mib // len(consumer.gpus)

    # -- in words and numbers -------------------------------------------------------------------------------

    def _told(self, consumer: Consumer, found: Found) -> dict[str, Any]:
        state, now = self._state, self._clock.monotonic()
        unloads = [self._unload(name, unload, found) for unload in found.unloads for name in unload.consumers]
        waits = found.waiting_for
        until = None if waits is None or waits.until is None else state.shown(waits.until)
        told: dict[str, Any] = {
            "outcome": found.outcome,
            "message": "",
            "consumer": consumer.name,
            "at": state.shown(now),
            "read_at": state.shown(state.reading.read_at) if state.reading.read_at > float("-inf") else None,
            "asked": False,
            "lease_id": None if found.lease is None else found.lease.lease_id,
            "joins": found.joins,
            "unloads": unloads,
            "load_seconds": self._load_seconds(consumer, found),
            "waiting_for": None if waits is None else waits.reason.value,
            "quantum_ends_at": until,
            "short_mib": found.facts.get("short_mib"),
            "holders": list(found.holders),
            "in_use": list(found.in_use),
            "ahead": len(found.ahead),
            "ahead_first": [
                {"consumer": t.consumer.name, "holder": t.holder, "waiting_seconds": state.waited(t)}
                for t in found.ahead[:SHOWN_AHEAD]
            ],
            "refusal": None if found.refusal is None else found.refusal.to_wire()["error"],
        }
        told["message"] = _words(told, found)
        return told

    def _start(self, found: Found) -> dict[str, Any]:
        """When it may expect its turn, reckoned with the lock down."""
        if found.forecast is None or found.ticket is None:
            return {"estimated_start_at": None, "estimated_wait_seconds": None}
        expected = found.forecast.expected().get(found.ticket.seq)
        start_at = None if expected is None else expected.start_at
        return {
            "estimated_start_at": None if start_at is None else self._state.shown(start_at),
            "estimated_wait_seconds": None if start_at is None else round(max(0.0, start_at - self._state.now()), 3),
        }

    def _unload(self, name: str, unload: Unload, found: Found) -> dict[str, Any]:
        view = found.view
        consumer = self._state.catalog.consumers[name]
        held = 0 if view is None else sum(view.held(name, gpu).held_mib for gpu in consumer.gpus)
        left = sum(self._left_mib(name, gpu) for gpu in consumer.gpus)
        account = self._state.ledger.account(name)
        observed = observed_figures(consumer, account)
        remembered = self._state.memory[name]
        return {
            "consumer": name,
            "required": unload.required,
            "held_mib": held,
            "returns_mib": max(0, held - left),
            "seconds": _rounded(percentile(account.unload_seconds, 50)),
            "reload_seconds": _rounded(None if observed is None else observed.reload_seconds),
            "busy": remembered.busy if remembered.reports_busy and remembered.asked else None,
        }

    def _load_seconds(self, consumer: Consumer, found: Found) -> float | None:
        """How long its own load usually takes, where it is not on the card."""
        if found.view is None or found.view.resident(consumer):
            return None
        return _rounded(percentile(self._state.ledger.account(consumer.name).reload_seconds, 50))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _words(told: Mapping[str, Any], found: Found) -> str:
    """One sentence for people."""
    name = told["consumer"]
    if told["refusal"] is not None:
        return f"{name} would be refused ({told['refusal']['code']}): {told['refusal']['message']}"
    if told["lease_id"] is not None:
        return f"this request has its lease of {name} already: {told['lease_id']}"
    unloads = ", ".join(_unload_words(unload) for unload in told["unloads"])
    if told["outcome"] == "granted":
        return f"{name} would be granted at once"
    if told["outcome"] == "unload":
        return f"{name} would be granted when these are unloaded: {unloads}"
    after = f" after these are unloaded: {unloads}; it" if unloads else ""
    if found.waiting_for is not None and told["quantum_ends_at"] is not None:
        return f"{name} would wait{after} for a quantum: {quantum_words(found.waiting_for, told['quantum_ends_at'])}"
    who = said_of(found.holders)
    return f"{name} would wait{after} for {told['waiting_for']}{f': {who}' if who else ''}{_ahead_words(told['ahead'])}"


def _ahead_words(ahead: int) -> str:
    return f"; {ahead} {'request is' if ahead == 1 else 'requests are'} ahead of it" if ahead else ""


def _unload_words(unload: Mapping[str, Any]) -> str:
    seconds = "" if unload["seconds"] is None else f", usually in {unload['seconds']:g} s"
    return f"{unload['consumer']} gives back {unload['returns_mib']} MiB{seconds}"
