"""Who computes without a holder: a holder's tail, or somebody's direct use. Nobody unloads it; it is waited for."""

from __future__ import annotations

from typing import Any

import pytest

from gpumgr.core.lease import Call, Lease
from gpumgr.core.queue import WaitingFor
from gpumgr.errors import EvictionFailed, SchedulerTimeout
from gpumgr.runtime.ports import BackendError
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import World, catalog, consumer

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear"])
HEAR = consumer("hear", 2000, beside=["chat"])


def world(**settings: Any) -> World:
    return World(catalog(PAINT, CHAT, HEAR), **settings)


def shown(of: World, name: str) -> Any:
    return next(c for c in snapshot(of.broker)["consumers"] if c["name"] == name)["in_use"]


def test_a_tail_is_waited_for_and_unloaded_once_it_is_idle() -> None:
    w = world()
    lease = w.grant("paint", loaded=True)
    w.services["paint"].computing = True
    w.broker.release(lease.token)
    caller = w.ask("chat", wait_seconds=60)
    w.prepare()
    assert caller.ticket.waiting_for is WaitingFor.DRAINING
    assert w.services["paint"].asked_to_unload == 0
    assert shown(w, "paint") == "tail"
    w.services["paint"].computing = False
    w.prepare()
    assert caller.lease().consumer == "chat"
    assert w.services["paint"].asked_to_unload == 1
    assert w.services["paint"].unloads_while_computing == 0


def test_direct_use_is_not_thrown_out_and_named_when_time_runs_out() -> None:
    w = world()
    w.services["paint"].take()
    w.services["paint"].computing = True
    caller = w.ask("chat", wait_seconds=5)
    w.prepare()
    assert shown(w, "paint") == "direct"
    w.pass_time(5.1)
    error = caller.error()
    assert isinstance(error, SchedulerTimeout)
    assert error.details["waiting_for"] == "draining"
    assert error.details["in_use"] == [{"consumer": "paint", "in_use": "direct"}]
    assert "without gpumgr" in error.message
    assert w.services["paint"].asked_to_unload == 0


@pytest.mark.parametrize("computing", [True, BackendError("hung", "no answer in time")])
def test_direct_use_outlives_a_load_that_failed(computing: bool | BackendError) -> None:
    """Its own load is undone, and not what somebody else does there; and what that still takes stays promised."""
    w = World(catalog(consumer("paint", 14000)), loads=["paint"])
    service = w.services["paint"]

    def load() -> None:
        raise BackendError("failed", "CUDA out of memory")

    service.load = load  # type: ignore[method-assign]
    service.computing = computing
    assert w.refusal("paint").code == "consumer_unhealthy"
    assert service.asked_to_unload == 0
    assert shown(w, "paint") == "direct"
    service.computing = False
    w.prepare()
    assert w.refusal("paint").code == "consumer_unhealthy"
    assert service.asked_to_unload == 1


def test_while_somebody_holds_it_nobody_asks_whether_it_is_busy() -> None:
    w = world()
    w.services["paint"].computing = True
    lease = w.grant("paint", loaded=True)
    w.ask("chat")
    w.prepare()
    w.broker._observe_servers()
    assert w.services["paint"].asked_whether_busy == 0
    assert shown(w, "paint") == "lease"
    w.broker.renew(lease.token, None)


def test_a_report_that_hangs_is_busy() -> None:
    w = world()
    w.services["paint"].take()
    w.services["paint"].computing = BackendError("hung", "GET /queue: not answered within 2 s")
    caller = w.ask("chat", wait_seconds=5)
    w.prepare()
    w.pass_time(5.1)
    error = caller.error()
    assert isinstance(error, SchedulerTimeout)
    assert "GET /queue: not answered within 2 s" in error.message
    assert w.services["paint"].asked_to_unload == 0


def test_a_machine_where_nobody_listens_does_not_compute() -> None:
    w = world()
    w.services["paint"].take()
    w.services["paint"].computing = BackendError("unreachable", "refused", refused=True)
    caller = w.ask("chat")
    w.prepare()
    assert isinstance(caller.lease(), Lease | Call)


def test_without_a_report_it_counts_as_idle() -> None:
    w = world()
    lease = w.grant("paint", loaded=True)
    w.broker.release(lease.token)
    assert w.grant("chat").consumer == "chat"
    assert shown(w, "paint") is None


def test_the_first_idle_answer_ends_a_tail_and_what_comes_after_it_is_direct_use() -> None:
    w = world()
    service = w.services["paint"]
    lease = w.grant("paint", loaded=True)
    service.computing = True
    w.broker.release(lease.token)
    w.pass_time(1)
    w.broker._observe_servers()
    assert shown(w, "paint") == "tail"
    service.computing = False
    w.pass_time(1)
    w.broker._observe_servers()
    assert shown(w, "paint") is None
    service.computing = True
    w.pass_time(20)
    w.broker._observe_servers()
    assert shown(w, "paint") == "direct"


def test_its_own_next_holder_does_not_wait_for_a_tail() -> None:
    w = world()
    lease = w.grant("paint", loaded=True)
    w.services["paint"].computing = True
    w.broker.release(lease.token)
    assert w.grant("paint").consumer == "paint"


def test_a_tail_that_is_still_loading_keeps_its_promise() -> None:
    # chat's holder left at once; its model is not on the card yet: hear must not be lent that memory
    w = World(catalog(PAINT, CHAT, HEAR), totals_mib=(10000,))
    lease = w.grant("chat")
    w.services["chat"].computing = True
    w.broker.release(lease.token)
    caller = w.ask("hear", wait_seconds=30)
    w.prepare()
    assert caller.ticket.waiting_for is WaitingFor.VRAM
    w.services["chat"].computing = False
    w.prepare()
    assert isinstance(caller.lease(), Lease | Call)


def test_an_answer_from_before_a_grant_says_nothing_about_after_it() -> None:
    w = world()
    state = w.broker.state
    with state.lock:
        uses = state.memory["paint"].uses
    lease = w.grant("paint", loaded=True)
    w.broker.release(lease.token)
    with state.lock:
        state.note_busy("paint", uses, busy=False, error=None)
        assert state.memory["paint"].tail


def test_a_victim_that_began_to_work_after_its_unload_call_is_a_failed_one() -> None:
    w = world()
    service = w.services["paint"]
    service.take()
    service.computing = False
    service.lies = True

    def begins(_name: str) -> None:
        service.computing = True

    service.before_unload = begins
    error = w.refusal("chat")
    assert isinstance(error, EvictionFailed)
    assert error.details["victims"][0]["reason"] == "busy"


@pytest.mark.parametrize("computing", [True, BackendError("failed", "GET /busy answers 404")])
def test_what_cannot_be_understood_counts_as_busy(computing: bool | BackendError) -> None:
    w = world()
    w.services["paint"].take()
    w.services["paint"].computing = computing
    caller = w.ask("chat", wait_seconds=1)
    w.prepare()
    w.pass_time(1.1)
    assert isinstance(caller.error(), SchedulerTimeout)
