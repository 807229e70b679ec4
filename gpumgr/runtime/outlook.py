"""The queue as status shows it: who is next, for what each one waits, and when it may expect its turn.

Owns: the shape of one row. Must not: decide who goes (core/queue.py), or reckon (core/outlook.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpumgr.core.outlook import forecast, usual_seconds
from gpumgr.runtime.refusals import reason_of, reason_words

if TYPE_CHECKING:
    from gpumgr.runtime.state import State
    from gpumgr.runtime.ticket import Ticket


def outlook(state: State, now: float) -> list[dict[str, Any]]:
    """Everyone without an answer yet, whoever is next first: with the lock held. The forecast is played on a copy."""
    usual = {name: usual_seconds(memory.hold_seconds) for name, memory in state.memory.items()}
    expected = forecast(state.queue.fork(), now, usual.get, state.granted_at)
    inside = sorted((t for t in state.tickets.values() if t.seq not in expected), key=lambda ticket: ticket.seq)
    line = sorted((t for t in state.tickets.values() if t.seq in expected), key=lambda t: expected[t.seq].place)
    told = [_told(state, ticket, now, _loaded_at(state, ticket, now)) for ticket in inside]
    told += [_told(state, ticket, now, expected[ticket.seq].start_at) for ticket in line]
    return [{"position": position, **each} for position, each in enumerate(told, 1)]


def _told(state: State, ticket: Ticket, now: float, start_at: float | None) -> dict[str, Any]:
    found = reason_of(state, ticket, now)
    return {
        "consumer": ticket.consumer.name,
        "holder": ticket.holder,
        "waiting_seconds": round(now - ticket.entered_at, 3),
        "deadline_at": state.shown(ticket.deadline),
        "waiting_for": found.reason.value,
        "step": ticket.step,
        "reason": reason_words(state, ticket, found),
        "quantum_ends_at": None if found.until is None else state.shown(found.until),
        "estimated_start_at": None if start_at is None else state.shown(start_at),
        "estimated_wait_seconds": None if start_at is None else round(max(0.0, start_at - now), 3),
    }


def _loaded_at(state: State, ticket: Ticket, now: float) -> float | None:
    """When the preparation of one that has its turn is over, as far as its reload was ever seen."""
    reload_seconds = state.ledger.swap_seconds([], ticket.consumer.name)
    if ticket.waiting_for is not None or ticket.began_at is None or reload_seconds is None:
        return None
    return max(now, ticket.began_at + reload_seconds)
