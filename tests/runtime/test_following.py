"""Proxied calls whose work goes on after their answer: the GPU is theirs until their consumer is done with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gpumgr.core.following import LONG_SECONDS, SILENT_SECONDS
from gpumgr.core.lease import Call, Lease
from gpumgr.core.queue import WaitingFor
from gpumgr.errors import SchedulerTimeout
from gpumgr.runtime.ports import BackendError
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import World, catalog, consumer

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000)
KINDS = {"image": "paint", "llm": "chat"}


def world(**settings: Any) -> World:
    return World(catalog(PAINT, CHAT, **KINDS), **settings)


def begun(w: World, work: str = "one", *, done: bool | None = False) -> Call:
    """A call that was answered with this work, and is over for its caller. None: its consumer knows nothing of it."""
    if done is not None:
        w.services["paint"].works[work] = done
    caller = w.call("paint")
    w.prepare()
    call = caller.call()
    w.broker.follower.follow(call, 200, work.encode())
    w.broker.end_call(call)
    return call


def look(w: World, after_seconds: float = 0.5) -> None:
    w.pass_time(after_seconds)
    w.broker.follower.look()
    w.prepare()


def shown(w: World) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in snapshot(w.broker)["consumers"] if c["name"] == "paint")
    json.dumps(found)
    return found


def events(w: World, kind: str) -> list[dict[str, Any]]:
    return [event for event in w.broker.state.events if event["type"] == kind]


def test_it_holds_until_its_consumer_says_that_it_is_done() -> None:
    w = world()
    w.services["paint"].take()
    call = begun(w)
    w.broker.end_call(call)
    rival = w.ask("chat", wait_seconds=600)
    for _ in range(10):
        look(w)
    assert rival.waits
    assert rival.ticket.waiting_for is None  # it has no turn: nobody is even asked to unload
    assert (shown(w)["in_use"], shown(w)["total_requests"], shown(w)["last_used_at"]) == ("proxy", 1, None)
    assert shown(w)["calls"] == [{"held_seconds": 5.0, "lease_id": None, "work": "job one"}]
    w.services["paint"].works["one"] = True
    look(w)
    assert isinstance(rival.lease(), Lease)
    assert shown(w)["calls"] == []
    assert w.services["paint"].unloads_while_computing == 0
    assert events(w, "work_lost") == []


def test_whoever_waits_is_told_what_for() -> None:
    w = world()
    begun(w)
    rival = w.ask("chat", wait_seconds=12)
    w.pass_time(12)
    error = rival.error()
    assert isinstance(error, SchedulerTimeout)
    assert "a proxied call has held paint for 12 s, job one" in error.message
    assert error.details["holders"][0] | {"phase": ""} == {
        "consumer": "paint",
        "phase": "",
        "held_seconds": 12.0,
        "work": "job one",
    }


@pytest.mark.parametrize(("status", "body"), [(400, b"one"), (200, b"")])
def test_an_answer_that_names_no_work_ends_with_its_call(status: int, body: bytes) -> None:
    w = world()
    call = w.call("paint")
    w.prepare()
    w.broker.follower.follow(call.call(), status, body)
    w.broker.end_call(call.call())
    assert w.broker.state.calls == {}
    assert not w.broker.state.queue.holds


def test_under_a_lease_the_lease_is_what_holds() -> None:
    w = world()
    w.services["paint"].works["one"] = False
    lease = w.grant("paint", loaded=True)
    call = w.broker.call_under_lease(lease.token, "image")
    w.broker.follower.follow(call, 200, b"one")
    w.broker.end_call(call)
    w.services["paint"].computing = True
    w.broker.release(lease.token)
    rival = w.ask("chat")
    w.prepare()
    assert rival.ticket.waiting_for is WaitingFor.DRAINING  # its tail
    w.services["paint"].computing = False
    w.prepare()
    assert isinstance(rival.lease(), Lease)


def test_one_that_left_undone_is_looked_for_twice() -> None:
    w = world()
    begun(w, done=None)
    look(w)
    assert shown(w)["in_use"] == "proxy"
    w.broker.follower.hint("paint")
    look(w, 0.2)
    assert shown(w)["in_use"] == "proxy"  # a second look that comes too soon would see the same moment
    look(w, 0.3)
    assert not w.broker.state.queue.holds
    assert [(event["work"], event["how"]) for event in events(w, "work_lost")] == [("job one", "left")]


def test_it_goes_with_its_consumers_process() -> None:
    w = world()
    begun(w)
    w.services["paint"].works["one"] = BackendError("unreachable", "nobody listens", refused=True)
    look(w)
    assert not w.broker.state.queue.holds
    assert [(event["how"], event["reason"]) for event in events(w, "work_lost")] == [("died", "nobody listens")]


def test_one_that_nobody_can_see_is_a_tail_after_a_while() -> None:
    w = world()
    w.services["paint"].take()
    begun(w)
    hung = BackendError("hung", "GET /queue: not answered within 2 s")
    w.services["paint"].works["one"] = w.services["paint"].computing = hung
    rival = w.ask("chat", wait_seconds=600)
    look(w, SILENT_SECONDS - 1)
    assert w.begun() == []
    look(w, 1)
    assert [event["how"] for event in events(w, "work_lost")] == ["lost"]
    assert rival.ticket.waiting_for is WaitingFor.DRAINING  # as long as its busy report hangs, it may be computing
    assert w.services["paint"].asked_to_unload == 0
    assert shown(w)["in_use"] == "tail"


def test_one_that_takes_long_is_held_and_told() -> None:
    w = world()
    begun(w)
    look(w, LONG_SECONDS)
    look(w)
    assert [(event["work"], event["held_seconds"]) for event in events(w, "work_long")] == [("job one", LONG_SECONDS)]
    look(w, LONG_SECONDS)
    assert len(events(w, "work_long")) == 2
    assert shown(w)["in_use"] == "proxy"


def test_a_hint_has_it_looked_at_sooner() -> None:
    w = world()
    begun(w, done=True)
    look(w, 0.11)
    assert w.services["paint"].asked_for_work == 0
    w.broker.follower.hint("chat")
    look(w, 0.0)
    assert w.services["paint"].asked_for_work == 0
    w.broker.follower.hint("paint")
    look(w, 0.0)
    assert not w.broker.state.queue.holds


def test_a_hint_that_comes_during_a_look_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world()
    begun(w)
    w.broker.follower.hint("paint")

    def told_meanwhile(_work: object) -> bool:
        w.broker.follower.hint("paint")
        return False

    monkeypatch.setattr(w.services["paint"], "is_done", told_meanwhile)
    look(w)
    assert w.broker.follower.due_in(9.0) == pytest.approx(0.1)
    monkeypatch.undo()
    look(w, 0.1)
    assert w.broker.follower.due_in(9.0) == pytest.approx(0.5)


def test_the_observer_sleeps_no_longer_than_until_the_next_look() -> None:
    w = world()
    assert w.broker.follower.due_in(2.5) == 2.5
    begun(w)
    w.pass_time(0.3)
    assert w.broker.follower.due_in(2.5) == pytest.approx(0.2)
    assert w.broker.follower.due_in(0.1) == 0.1
    assert w.broker._observe_servers() == pytest.approx(0.2)


def test_the_observer_ends_it() -> None:
    w = world()
    begun(w, done=True)
    w.pass_time(0.5)
    w.broker._observe_servers()
    assert not w.broker.state.queue.holds


def test_calls_side_by_side_are_followed_each_by_itself() -> None:
    w = World(catalog(consumer("paint", 14000, at_once=2), CHAT, **KINDS))
    begun(w, "one")
    begun(w, "two")
    w.services["paint"].works["two"] = True
    look(w)
    assert [call["work"] for call in shown(w)["calls"]] == ["job one"]


def test_a_defect_in_a_dialect_costs_nobody_the_gpu() -> None:
    w = world()
    call = w.call("paint")
    w.prepare()
    w.broker.follower.follow(call.call(), 200, b"\xff")  # its own decoding fails
    w.broker.end_call(call.call())
    assert not w.broker.state.queue.holds


def test_after_a_restart_what_still_runs_is_waited_for() -> None:
    w = world()
    w.services["paint"].take()
    begun(w)
    w.services["paint"].computing = True
    w.restart()
    rival = w.ask("chat", wait_seconds=600)
    w.prepare()
    assert rival.ticket.waiting_for is WaitingFor.DRAINING
    assert w.services["paint"].asked_to_unload == 0
    w.services["paint"].computing = False
    w.prepare()
    assert isinstance(rival.lease(), Lease)


def test_after_a_restart_what_it_is_still_loading_is_promised_to_it() -> None:
    w = World(catalog(consumer("paint", 14000, beside=["chat"]), consumer("chat", 12000, beside=["paint"]), **KINDS))
    begun(w)
    w.services["paint"].take(2000)
    w.services["paint"].computing = True
    w.restart()
    rival = w.ask("chat", wait_seconds=600)
    w.prepare()
    assert rival.ticket.waiting_for is WaitingFor.VRAM


def test_nothing_waits_for_it_in_passthrough() -> None:
    w = world(mode="passthrough")
    caller = w.call("paint")
    w.services["paint"].works["one"] = False
    w.broker.follower.follow(caller.call(), 200, b"one")
    w.broker.end_call(caller.call())
    assert isinstance(w.ask("chat").lease(), Lease)
