"""The queue as status shows it: who is next, for what each one waits, and when it may expect its turn.

Owns: the shape of one row. Must not: decide who goes (core/queue.py), or reckon (core/outlook.py).

What has to be told from one instant is copied with the lock held (``Outlook``); the reckoning, which takes some
milliseconds where many wait, follows with the lock down (``rows``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from gpumgr.core.ledger import swap_seconds
from gpumgr.core.outlook import Expected, Why, forecast, usual_seconds, why
from gpumgr.core.queue import Entry, Queue, WaitingFor
from gpumgr.runtime.refusals import ahead_words, blockers_words, quantum_words

if TYPE_CHECKING:
    from gpumgr.runtime.state import State
    from gpumgr.runtime.ticket import Ticket


@dataclass(frozen=True, slots=True)
class _Waiting:
    """``inside``: what its preparation waits for, and when it may be done; None: it is in the line. ``facts`` are those
    of its row that need no reckoning."""

    entry: Entry
    facts: dict[str, Any]
    inside: WaitingFor | None
    ready_at: float | None


class Forecast:
    """When those in a line may expect their turns. To be made with the lock held; ``expected`` reckons without it."""

    def __init__(self, state: State, queue: Queue, now: float) -> None:
        accounts = dict(state.ledger.accounts)
        self.queue = queue.fork(cache(lambda leaving, coming: swap_seconds(accounts, [leaving], coming)))
        self._now = now
        self._usual = {name: usual_seconds(memory.hold_seconds) for name, memory in state.memory.items()}
        self._granted_at = dict(state.granted_at)
        self._over_by = {lease.seq: lease.hold_until for lease in state.leases}
        self._over_by |= {quarantine.seq: quarantine.until for quarantine in state.quarantines.values()}

    def expected(self) -> dict[int, Expected]:
        return forecast(self.queue.fork(), self._now, self._usual.get, self._granted_at, self._over_by)


class Outlook:
    """To be made with the lock held."""

    def __init__(self, state: State, now: float) -> None:
        self._now = now
        self._shown = state.shown
        self._forecast = Forecast(state, state.queue, now)
        self._queue = self._forecast.queue
        self._waiting = [_waiting(state, ticket, now) for ticket in state.tickets.values()]
        names = {each.entry.consumer for each in self._waiting}
        self._blockers = {name: blockers_words(state, state.catalog.consumers[name]) for name in names}

    def rows(self) -> list[dict[str, Any]]:
        """Everyone without an answer yet: those who have their turn, then whoever is next."""
        expected = self._forecast.expected()
        found = []
        for each in self._waiting:
            seq = each.entry.seq
            if each.inside is not None or seq not in expected:
                reason, place, start_at = Why(each.inside or WaitingFor.PREPARING), 0, each.ready_at
            else:
                place, start_at = expected[seq].place, expected[seq].start_at
                reason = why(self._queue, each.entry, self._now)
            found.append((place, seq, self._row(each, reason, place, start_at)))
        rows = [row for _, _, row in sorted(found, key=lambda each: each[:2])]
        return [{"position": position, **row} for position, row in enumerate(rows, 1)]

    def _row(self, each: _Waiting, found: Why, place: int, start_at: float | None) -> dict[str, Any]:
        return {
            **each.facts,
            "deadline_at": self._shown(each.facts["deadline_at"]),
            "waiting_for": found.reason.value,
            "reason": self._words(each, found, place),
            "quantum_ends_at": None if found.until is None else self._shown(found.until),
            "estimated_start_at": None if start_at is None else self._shown(start_at),
            "estimated_wait_seconds": None if start_at is None else round(max(0.0, start_at - self._now), 3),
        }

    def _words(self, each: _Waiting, found: Why, place: int) -> str:
        if each.inside is not None:
            return str(each.facts["step"])
        if found.until is not None:
            return quantum_words(found, self._shown(found.until))
        if found.reason is WaitingFor.AHEAD:
            return ahead_words(place - 1)
        return self._blockers[each.entry.consumer] or "its turn comes"


def _waiting(state: State, ticket: Ticket, now: float) -> _Waiting:
    facts = {
        "consumer": ticket.consumer.name,
        "holder": ticket.holder,
        "priority": ticket.entry.priority.value,
        "waiting_seconds": round(now - ticket.entered_at, 3),
        "deadline_at": ticket.deadline,
        "step": ticket.step,
    }
    prepared = ticket.prepare_limit is not None
    inside = ticket.waiting_for or (WaitingFor.PREPARING if prepared else None)
    return _Waiting(ticket.entry, facts, inside, _ready_at(state, ticket, now))


def _ready_at(state: State, ticket: Ticket, now: float) -> float | None:
    """When the preparation of one that has its turn is over, as far as its reload was ever seen."""
    if ticket.waiting_for is not None or ticket.began_at is None:
        return None
    reload_seconds = state.ledger.swap_seconds([], ticket.consumer.name)
    return None if reload_seconds is None else max(now, ticket.began_at + reload_seconds)
