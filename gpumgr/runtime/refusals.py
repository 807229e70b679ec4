"""The refusals that are about waiting: who was waited for, and in which step time ran out.

Owns: their words and facts. Must not: decide that time has run out. Called with the lock held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gpumgr.core.catalog import Consumer, GpuRef, overlap
from gpumgr.core.outlook import Why, why
from gpumgr.core.queue import Hold, Queue, WaitingFor
from gpumgr.errors import PrepareTimeout, SchedulerTimeout

if TYPE_CHECKING:
    from gpumgr.runtime.state import State
    from gpumgr.runtime.ticket import Ticket


def prepare_timeout(state: State, ticket: Ticket) -> PrepareTimeout:
    waited = state.waited(ticket)
    return PrepareTimeout(
        f"{ticket.consumer.name} had its turn and could not be prepared in time; after {waited:g} s it was "
        f"{ticket.step}. Look at that service, or raise lease.max_prepare_seconds",
        consumer=ticket.consumer.name,
        step=ticket.step,
        waited_seconds=waited,
    )


def scheduler_timeout(state: State, ticket: Ticket, queue: Queue | None = None) -> SchedulerTimeout:
    """``queue``: the line it stands in, where that is not the broker's own."""
    found = reason_of(state, ticket, state.now(), queue)
    waited_for = waits_for(state, ticket)
    holders = waited_for["holders"]
    ahead = (queue or state.queue).ahead(ticket.entry)
    waits = f"waiting for {found.reason}" if ticket.waiting_for is None else ticket.step
    said = _said(state, ticket, holders, ahead)
    if found.until is not None:
        said = f": {quantum_words(found, state.shown(found.until))}"
    waited = state.waited(ticket)
    return SchedulerTimeout(
        f"{ticket.consumer.name} was not granted within {waited:g} s, {waits}{said}. "
        "Ask again, or with a longer wait_seconds",
        consumer=ticket.consumer.name,
        waiting_for=found.reason,
        waited_seconds=waited,
        ahead=ahead,
        holders=holders,
        quantum_ends_at=None if found.until is None else state.shown(found.until),
        in_use=waited_for["in_use"],
    )


def reason_of(state: State, ticket: Ticket, now: float, queue: Queue | None = None) -> Why:
    if ticket.waiting_for is not None:
        return Why(ticket.waiting_for)
    if ticket.prepare_limit is not None:
        return Why(WaitingFor.PREPARING)
    return why(queue or state.queue, ticket.entry, now)


def blockers_words(state: State, consumer: Consumer) -> str:
    """Whom a request for it that is in the line waits for."""
    if state.queue.is_unloading(consumer.name):
        return f"{consumer.name} itself is being unloaded for somebody else"
    return "; ".join(_words(_facts(state, hold)) for hold in _blocking(state, consumer))


def ahead_words(count: int) -> str:
    return f"{'1 request goes' if count == 1 else f'{count} requests go'} before it"


def quantum_words(found: Why, until: str) -> str:
    whose = ", ".join(found.whose)
    if found.lingers:
        return f"{whose} usually comes back within a moment, and keeps the GPU for that, until {until} if it does not"
    return (
        f"{whose} is on the GPU and keeps its turn until {until}, or longer if more requests come; what runs then is "
        "waited for. So there are fewer swaps"
    )


def _computing(state: State, ticket: Ticket) -> list[str]:
    """Those that compute without a holder beside it: while they do they are not unloaded."""
    names = [name for name in state.memory if state.computing(name) and not state.queue.holds_of(name)]
    return [name for name in names if state.catalog.share_gpu(name, ticket.consumer.name)]


def _waited_for(state: State, ticket: Ticket) -> list[Hold]:
    """Those it conflicts with; and where one of them, or itself, waits inside its preparation: whom that waits for."""
    if ticket.waiting_for is not None:
        return _beside(state, ticket.seq, ticket.consumer.gpus)
    return [hold for hold in _blocking(state, ticket.consumer) if hold.seq != ticket.seq]


def _blocking(state: State, consumer: Consumer) -> list[Hold]:
    found = state.queue.blockers(consumer)
    inside = {waiting.seq for waiting in state.inside}
    further = [h for hold in found if hold.seq in inside for h in _beside(state, hold.seq, hold.gpus)]
    return list({hold.seq: hold for hold in [*found, *further]}.values())


def _beside(state: State, seq: int, gpus: Iterable[GpuRef]) -> list[Hold]:
    return [hold for hold in state.queue.holds.values() if hold.seq != seq and overlap(gpus, hold.gpus)]


def _facts(state: State, hold: Hold) -> dict[str, Any]:
    facts: dict[str, Any] = {"consumer": hold.consumer, "phase": hold.phase.value}
    call = state.calls.get(hold.seq)
    if call is not None:
        facts["held_seconds"] = round(state.now() - call.began_at, 3)
        if hold.seq in state.followed:
            facts["work"] = str(state.followed[hold.seq].work)
    lease = next((lease for lease in state.leases if lease.seq == hold.seq), None)
    if lease is not None:
        facts |= {
            "lease_id": lease.lease_id,
            "holder": lease.holder,
            "held_seconds": state.held(lease),
            "expires_at": state.shown(lease.expires_at),
        }
    return facts


def _said(state: State, ticket: Ticket, holders: list[dict[str, Any]], ahead: int) -> str:
    said = [_words(facts) for facts in holders]
    if state.queue.is_unloading(ticket.consumer.name):
        said.append(f"{ticket.consumer.name} itself is being unloaded for somebody else")
    if not said and ticket.waiting_for is None:
        said.append(f"{ahead} requests are ahead of it" if ahead else "its turn came only after that")
    return f": {'; '.join(said)}" if said else ""


def _words(facts: Mapping[str, Any]) -> str:
    if "held_seconds" not in facts:
        return f"{facts['consumer']} is {facts['phase']}"
    if "lease_id" not in facts:
        work = f", {facts['work']}" if "work" in facts else ""
        return f"a proxied call has held {facts['consumer']} for {facts['held_seconds']:g} s{work}"
    who = facts["holder"] or "an unnamed holder"
    return (
        f"{who} has held {facts['consumer']} for {facts['held_seconds']:g} s "
        f"(lease {facts['lease_id']}, until {facts['expires_at']} unless renewed)"
    )


def waits_for(state: State, ticket: Ticket) -> dict[str, list[dict[str, Any]]]:
    """The facts of those whom a request waits for: ``holders``, and who is ``in_use`` without one."""
    computing = [{"consumer": name, "in_use": state.computing(name)} for name in _computing(state, ticket)]
    return {"holders": [_facts(state, hold) for hold in _waited_for(state, ticket)], "in_use": computing}


def said_of(holders: Iterable[Mapping[str, Any]]) -> str:
    """The same holders in words."""
    return "; ".join(_words(facts) for facts in holders)
