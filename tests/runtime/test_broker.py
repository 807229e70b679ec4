"""The broker between its threads: what becomes of a grant, an end or a preparation that goes wrong."""

from __future__ import annotations

import pytest

from gpumgr.core.lease import Lease, RequestKey
from gpumgr.errors import (
    ConsumerUnhealthy,
    EvictionFailed,
    GpuUnreadable,
    InsufficientVram,
    LeaseUnknown,
    RequestEnded,
    StoreUnavailable,
)
from gpumgr.runtime.ports import StoreError
from gpumgr.runtime.preparation import Step
from tests.worlds import HadIt, ManualClock, World, catalog, consumer, request


@pytest.fixture
def world() -> World:
    return World(catalog(consumer("paint", 14000), consumer("chat", 9000), consumer("far", gpus=(1,))), (24000, 24000))


def test_an_end_that_cannot_be_written_down_still_frees_its_gpu(world: World) -> None:
    world.grant("paint", ttl_seconds=10)
    world.grant("far", ttl_seconds=10)
    waiter = world.ask("chat", wait_seconds=60)
    world.pass_time(10)
    world.store.fails = StoreError("no space left on device")
    assert world.broker.tick() == 2
    world.prepare()
    assert isinstance(waiter.error(), StoreUnavailable)
    assert world.broker.state.queue.holds == {}
    world.store.fails = None
    world.broker.keep_store()
    assert world.grant("chat").consumer == "chat"
    assert world.store.open().leases[0].lease.consumer == "chat", "the ends were written with the first success"


def test_a_revoked_lease_is_over_at_once_and_the_store_knows_who_and_why(world: World) -> None:
    lease = world.grant("paint", request=request("r1", "me"), holder="me")
    waiter = world.ask("chat", wait_seconds=60)
    world.broker.revoke(lease.lease_id, by="operator", reason="stuck")
    event = world.broker.state.events[-1]
    assert (event["type"], event["by"], event["reason"]) == ("revoke", "operator", "stuck")
    assert world.store.written[-1][0] == "revoke"
    with pytest.raises(LeaseUnknown):
        world.broker.renew(lease.token, None)
    with pytest.raises(LeaseUnknown):
        world.broker.revoke(lease.lease_id, by="operator", reason="again")
    world.prepare()
    assert waiter.lease().consumer == "chat"
    with pytest.raises(RequestEnded) as caught:
        world.ask("paint", request=request("r1", "me"), holder="me")
    assert caught.value.details == {"reason": "revoked"}


def test_a_grant_that_cannot_be_written_down_is_none(world: World) -> None:
    world.store.fails = StoreError("no space left on device")
    assert isinstance(world.refusal("paint", request=request("r1")), StoreUnavailable)
    assert len(world.broker.state.leases) == 0
    assert world.broker.state.queue.holds == {}
    assert world.broker.state.store_error == "no space left on device"
    world.store.fails = None
    world.broker.keep_store()
    assert world.grant("paint", request=request("r1")).fence == 2, "a fence is never used twice"


def test_the_same_request_has_the_same_lease(world: World) -> None:
    lease = world.grant("paint", request=request("r1", "me"), holder="me")
    with pytest.raises(HadIt) as had:
        world.ask("paint", request=RequestKey(None, "me", "r1"))
    assert had.value.lease == lease


def test_no_reading_no_grant(world: World) -> None:
    world.card.unreadable = "Driver/library version mismatch"
    error = world.refusal("paint")
    assert isinstance(error, GpuUnreadable)
    assert "Driver/library version mismatch" in error.message
    world.card.unreadable = None
    assert world.grant("paint").fence == 1


def test_a_gpu_that_cannot_be_read_does_not_keep_the_other_one(world: World) -> None:
    world.card.set_gpu_error("GPU is lost", gpu=0)
    assert isinstance(world.refusal("paint"), GpuUnreadable)
    assert world.grant("far").gpus == (1,)


def test_a_reading_lost_in_the_middle_of_an_unload_is_no_proof(world: World) -> None:
    world.services["chat"].take()
    caller = world.ask("paint")
    world.services["chat"].before_unload = lambda _name: setattr(world.card, "unreadable", "gone")
    world.prepare()
    assert isinstance(caller.error(), GpuUnreadable | EvictionFailed)
    assert len(world.broker.state.leases) == 0


def test_what_can_never_fit_is_refused_at_once_and_unloads_nobody() -> None:
    world = World(catalog(consumer("huge", 23489), consumer("chat", 9000)))
    world.services["chat"].take()
    error = world.refusal("huge")
    assert isinstance(error, InsufficientVram)
    assert error.details["evicted"] == []
    assert world.services["chat"].asked_to_unload == 0
    assert world.broker.state.queue.waiting() == []


def test_an_unhealthy_target_costs_nobody_anything(world: World) -> None:
    world.services["chat"].take()
    world.services["paint"].unhealthy = "503"
    assert isinstance(world.refusal("paint"), ConsumerUnhealthy)
    assert world.services["chat"].used_mib() == 9000
    assert world.broker.state.queue.holds == {}


def test_a_health_that_is_young_is_not_asked_again(world: World) -> None:
    world.broker.release(world.grant("paint").token)
    world.pass_time(5)
    world.broker.release(world.grant("paint").token)
    assert world.services["paint"].asked_for_health == 1
    world.pass_time(5.1)
    world.grant("paint")
    assert world.services["paint"].asked_for_health == 2


def test_a_consumer_with_a_load_call_is_on_the_card_when_it_is_granted() -> None:
    world = World(catalog(consumer("span", (4000, 8000), gpus=(0, 1))), (24000, 12000), loads=["span"])
    world.grant("span")
    assert [world.services["span"].used_mib(gpu) for gpu in (0, 1)] == [4000, 8000]


def test_one_whose_caller_has_gone_in_the_middle_of_an_unload_is_never_granted() -> None:
    slow = World(
        catalog(consumer("paint", 14000), consumer("chat", 9000, unload_timeout_seconds=200)), max_prepare_seconds=50
    )
    slow.services["chat"].take()
    slow.services["chat"].lies = True
    caller = slow.ask("paint", wait_seconds=0)
    (seq,) = slow.begun()
    while seq in slow.preparations:
        assert slow.step(seq) is not Step.WAIT
    assert caller.error().code == "prepare_timeout"
    assert caller.answered_at == 1050.0
    assert len(slow.broker.state.leases) == 0
    assert slow.broker.state.queue.holds == {}


def test_the_fence_and_the_counts_are_shown_by_what_happened(world: World) -> None:
    world.services["chat"].take()
    world.grant("paint", holder="imagen")
    kinds = [(event["type"], event["consumer"]) for event in world.broker.state.events]
    assert kinds == [("evict", "chat"), ("grant", "paint")]
    assert world.broker.state.memory["chat"].evictions == 1
    assert world.broker.state.memory["paint"].total_requests == 1


def test_after_an_unload_a_refusal_looks_once_more() -> None:
    """A victim is proved at its residual while memory may still be falling, its own or a neighbour's."""
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000)))
    chat, game = world.services["chat"], world.games[0]
    world.card.set_used(chat.pid, 9000)
    game.set_used(10000)
    caller = world.ask("paint")
    (seq,) = world.begun()
    while (outcome := world.step(seq)) is Step.AGAIN:
        pass
    assert (outcome, caller.waits) == (Step.WAIT, True)
    game.set_used(8000)
    world.prepare()
    assert isinstance(caller.answer, Lease)


def test_one_instant_is_shown_alike_each_time(world: World) -> None:
    """A retry of one request is answered like the first, although the clocks are never read at the same instant."""
    state, clock = world.broker.state, world.clock
    assert isinstance(clock, ManualClock)
    first = state.shown(clock.now + 60)
    clock.asleep += 0.003  # between the two looks, so that they are 3 ms apart
    assert state.shown(clock.now + 60) == first
    clock.asleep += 3600  # the wall clock was set, or the machine slept
    assert state.shown(clock.now + 60) > first
