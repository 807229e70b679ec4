"""Proxied calls in the queue: they wait and hold like leases, and go ahead where a lease is refused."""

from __future__ import annotations

from typing import Any

import pytest

from gpumgr.core.lease import Call, Lease
from gpumgr.core.queue import WaitingFor
from gpumgr.errors import (
    ConsumerUnhealthy,
    InsufficientVram,
    LeaseMismatch,
    LeaseUnknown,
    SchedulerTimeout,
    ShuttingDown,
)
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import World, catalog, consumer

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear"])
HEAR = consumer("hear", 2000, beside=["chat"])
KINDS = {"image": "paint", "llm": "chat", "stt": "hear"}


def world(**settings: Any) -> World:
    return World(catalog(PAINT, CHAT, HEAR, **KINDS), **settings)


def begun(w: World, name: str, **words: Any) -> Call:
    caller = w.call(name, **words)
    w.prepare()
    return caller.call()


def shown(of: World, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in snapshot(of.broker)["consumers"] if c["name"] == name)
    return found


def events(of: World, kind: str) -> list[dict[str, Any]]:
    return [event for event in of.broker.state.events if event["type"] == kind]


def test_a_call_holds_until_it_ends() -> None:
    w = world()
    call = begun(w, "paint")
    assert (shown(w, "paint")["in_use"], shown(w, "paint")["total_requests"]) == ("proxy", 1)
    rival = w.ask("chat")
    assert w.begun() == []
    w.broker.end_call(call)
    w.broker.end_call(call)
    w.prepare()
    assert isinstance(rival.lease(), Lease | Call)
    assert shown(w, "paint")["last_used_at"] is not None
    assert len(w.broker.state.queue.holds) == 1


def test_calls_for_one_consumer_go_one_after_the_other() -> None:
    w = world()
    first = begun(w, "chat")
    second = w.call("chat", wait_seconds=3)
    w.prepare()
    assert second.waits
    w.pass_time(3.1)
    error = second.error()
    assert isinstance(error, SchedulerTimeout)
    assert "a proxied call has held chat for" in error.message
    w.broker.end_call(first)


def test_a_call_evicts_with_proof_like_a_lease() -> None:
    w = world()
    w.services["chat"].take()
    begun(w, "paint")
    assert w.services["chat"].asked_to_unload == 1
    assert [event["consumer"] for event in events(w, "evict")] == ["chat"]


def test_not_fitting_is_a_warning() -> None:
    w = world()
    w.games[0].set_used(15000)
    assert isinstance(w.refusal("paint"), InsufficientVram)
    call = begun(w, "paint")
    (told,) = events(w, "proxy_over_budget")
    assert (told["consumer"], told["code"]) == ("paint", "insufficient_vram")
    w.broker.end_call(call)


def test_unless_a_live_lease_shares_the_card() -> None:
    w = world()
    w.games[0].set_used(14000)
    lease = w.grant("chat", loaded=True)  # 24000 - 14000 - 9000 = 1000
    caller = w.call("hear", wait_seconds=60)
    w.prepare()
    assert caller.ticket.waiting_for is WaitingFor.VRAM
    assert events(w, "proxy_over_budget") == []
    w.broker.release(lease.token)
    w.prepare()
    call = caller.call()
    assert w.services["chat"].asked_to_unload == 1
    w.broker.end_call(call)


def test_a_consumer_that_is_not_healthy_is_not_called() -> None:
    w = world()
    w.services["paint"].unhealthy = "down"
    caller = w.call("paint")
    w.prepare()
    assert isinstance(caller.error(), ConsumerUnhealthy)


def test_under_a_lease_a_call_passes_without_queueing() -> None:
    w = world()
    lease = w.grant("paint", loaded=True)
    call = w.broker.call_under_lease(lease.token, "image")
    assert shown(w, "paint")["in_use"] == "lease"
    w.broker.end_call(call)
    assert shown(w, "paint")["total_requests"] == 1
    assert w.broker.lease(lease.token) == lease


def test_a_call_that_outlives_its_lease_is_a_tail() -> None:
    w = world()
    lease = w.grant("paint", loaded=True)
    call = w.broker.call_under_lease(lease.token, "image")
    w.broker.release(lease.token)
    assert shown(w, "paint")["in_use"] == "tail"
    caller = w.ask("chat")
    w.prepare()
    assert caller.ticket.waiting_for is WaitingFor.DRAINING
    assert w.services["paint"].asked_to_unload == 0
    w.broker.end_call(call)
    w.prepare()
    assert isinstance(caller.lease(), Lease | Call)


def test_a_lease_opens_its_own_consumer_alone() -> None:
    w = world()
    lease = w.grant("paint")
    with pytest.raises(LeaseMismatch) as wrong:
        w.broker.call_under_lease(lease.token, "llm")
    assert wrong.value.details == {"consumer": "paint", "asked": "chat"}
    w.broker.release(lease.token)
    with pytest.raises(LeaseUnknown):
        w.broker.call_under_lease(lease.token, "image")


def test_a_failed_call_makes_the_next_one_ask_for_health() -> None:
    w = world()
    w.broker.end_call(begun(w, "paint"))
    asked = w.services["paint"].asked_for_health
    w.broker.end_call(begun(w, "paint"))
    assert w.services["paint"].asked_for_health == asked
    w.broker.note_call("paint", "it died in the middle of its answer")
    w.broker.end_call(begun(w, "paint"))
    assert w.services["paint"].asked_for_health == asked + 1


def test_an_answered_call_counts_as_health() -> None:
    w = world()
    call = begun(w, "paint")
    w.pass_time(60)
    w.broker.note_call("paint", None)
    w.broker.end_call(call)
    asked = w.services["paint"].asked_for_health
    begun(w, "paint")
    assert w.services["paint"].asked_for_health == asked


def test_a_stop_answers_waiting_calls() -> None:
    w = world()
    w.grant("paint")
    caller = w.call("paint")
    w.broker.stop()
    w.wake()
    assert isinstance(caller.error(), ShuttingDown)
