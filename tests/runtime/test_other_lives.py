"""Restart, reboot, sleep, quarantine and the longest hold, on a broker whose time the test owns."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from gpumgr.core.lease import Lease
from gpumgr.core.quantum import UNKNOWN_SWAP_SECONDS
from gpumgr.core.queue import Priority
from gpumgr.errors import LeaseUnknown, RequestEnded, StoreUnavailable
from gpumgr.runtime.ports import BackendError, StoreError
from gpumgr.runtime.snapshot import snapshot
from gpumgr.runtime.ticket import Ask, Caller
from tests.waiting import until
from tests.worlds import CONTEXT_MIB, HadIt, World, catalog, consumer, request, started


@pytest.fixture
def world() -> World:
    return World(catalog(consumer("paint", 14000), consumer("chat", 9000)))


def in_use(world: World, name: str) -> str | None:
    found: str | None = next(c["in_use"] for c in snapshot(world.broker)["consumers"] if c["name"] == name)
    return found


# -- restart and sleep --------------------------------------------------------------------------------------


def test_a_restart_gives_a_full_ttl_and_no_more(world: World) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    world.pass_time(50)
    world.restart()
    assert world.broker.lease(lease.token).expires_at == world.now + 60
    world.pass_time(60, watchdog=True)
    with pytest.raises(LeaseUnknown):
        world.broker.renew(lease.token, None)


def test_nothing_conflicting_is_granted_after_a_restart(world: World) -> None:
    lease = world.grant("paint", loaded=True)
    world.restart()
    chat = world.ask("chat", wait_seconds=500)
    world.prepare()
    assert chat.waits
    world.broker.release(lease.token)
    world.prepare()
    assert chat.lease().fence == lease.fence + 1


def test_a_lease_is_as_urgent_after_a_restart(world: World) -> None:
    paint = world.grant("paint", priority=Priority.INTERACTIVE)
    world.restart()
    world.pass_time(world.broker.settings.lease.min_hold_seconds)
    world.ask("chat", priority=Priority.INTERACTIVE, wait_seconds=500)
    assert snapshot(world.broker)["leases"][0]["priority"] == "interactive"
    assert world.broker.state.wish(paint) is None, "nobody is more urgent"


def test_what_an_unload_left_is_no_model_in_the_next_life(world: World) -> None:
    world.grant("paint", loaded=True)
    world.broker.release(next(iter(world.broker.state.leases)).token)
    lease = world.grant("chat", loaded=True)
    assert world.services["paint"].used_mib(0) == CONTEXT_MIB
    world.restart()
    world.broker.observe_card()
    state, lease = world.broker.state, world.broker.lease(lease.token)
    assert state.intruders_of(lease) == frozenset()
    rows = {row["name"]: (row["held_mib"], row["resident"]) for row in snapshot(world.broker)["consumers"]}
    assert rows["paint"] == (CONTEXT_MIB, False)
    world.services["paint"].take()
    world.pass_time(5)
    world.broker.observe_card()
    assert state.intruders_of(lease) == {"paint"}, "it was loaded beside the lease"


def test_a_shortened_ttl_is_not_promised_longer_than_it_was_written(world: World) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    writes = world.store.writes
    world.broker.renew(lease.token, 30)
    world.broker.renew(lease.token, None)
    assert world.store.writes == writes, "renewing needs no write"
    world.broker.renew(lease.token, 100)
    world.broker.renew(lease.token, 90)
    assert world.store.writes == writes + 1
    world.restart()
    assert world.broker.lease(lease.token).ttl_seconds == 100


def test_a_sleep_of_the_machine_gives_a_full_ttl(world: World) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    world.pass_time(50)
    world.sleep(3600)
    assert world.broker.lease(lease.token).expires_at == world.now + 60
    dead = world.broker.lease(lease.token).expires_at
    world.pass_time(dead - world.now)
    world.sleep(3600)
    with pytest.raises(LeaseUnknown):
        world.broker.lease(lease.token)


def test_who_may_compute_since_the_life_before_is_asked_before_the_first_grant(world: World) -> None:
    world.services["paint"].computing = True
    world.restart()
    chat = world.ask("chat", wait_seconds=500)
    world.prepare()
    assert chat.waits
    assert in_use(world, "paint") == "direct"
    world.services["paint"].computing = False
    world.prepare()
    assert chat.lease().consumer == "chat"


def test_a_store_that_cannot_be_read_at_the_start_hides_no_lease_for_good(world: World) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    world.store.fails = StoreError("the disk is gone")
    world.restart()
    with pytest.raises(StoreUnavailable):
        world.broker.renew(lease.token, None)
    assert isinstance(world.refusal("chat"), StoreUnavailable)
    world.store.fails = None
    world.broker.keep_store()
    assert world.broker.renew(lease.token, None)[0].fence == lease.fence


def test_nobody_is_unloaded_for_a_lease_that_could_not_be_written_down(world: World) -> None:
    world.services["paint"].take()
    world.store.fails = StoreError("no space left on device")
    assert isinstance(world.refusal("chat"), StoreUnavailable)
    assert world.services["paint"].asked_to_unload == 0
    assert not world.broker.state.queue.is_unloading("paint")


# -- the longest hold ---------------------------------------------------------------------------------------


def test_a_renew_extends_no_further_than_the_longest_hold() -> None:
    world = World(catalog(consumer("paint", 14000)), max_hold_seconds=100)
    lease = world.grant("paint", ttl_seconds=60)
    world.pass_time(50)
    renewed = world.broker.renew(lease.token, None).lease
    assert renewed.expires_at == lease.granted_at + 100
    world.restart()
    assert world.broker.lease(lease.token).expires_at == lease.granted_at + 100
    world.pass_time(50, watchdog=True)
    with pytest.raises(LeaseUnknown):
        world.broker.renew(lease.token, None)


# -- quarantine ---------------------------------------------------------------------------------------------


def expired(world: World, name: str = "paint", *, computing: object = True) -> Lease:
    lease = world.grant(name, ttl_seconds=10, loaded=True, request=request("r1"))
    world.services[name].computing = computing  # type: ignore[assignment]
    world.pass_time(10)
    world.broker.tick()
    return lease


def test_after_an_expiry_who_still_computes_holds_up_whoever_conflicts(world: World) -> None:
    expired(world)
    assert in_use(world, "paint") == "quarantine"
    assert world.services["paint"].asked_to_interrupt == 1
    chat = world.ask("chat", wait_seconds=500)
    world.prepare()
    world.broker.look_at_quarantines()
    assert chat.waits
    assert world.services["paint"].asked_to_interrupt == 1, "once: what came later is somebody else's"
    world.services["paint"].computing = False
    world.broker.look_at_quarantines()
    world.prepare()
    assert chat.lease().consumer == "chat"
    assert world.services["paint"].unloads_while_computing == 0


def test_whoever_waits_for_it_is_told_that_it_ends_soon(world: World) -> None:
    world.broker.state.memory["paint"].hold_seconds.append(5.0)
    world.grant("paint", ttl_seconds=600, loaded=True)
    world.services["paint"].computing = True
    world.pass_time(600)
    world.broker.tick()
    world.ask("chat", wait_seconds=500)
    for after, left in ((10, 20), (25, 0)):
        world.pass_time(after)
        (row,) = snapshot(world.broker)["queue"]
        assert row["estimated_wait_seconds"] == left + UNKNOWN_SWAP_SECONDS


@pytest.mark.parametrize("computing", [False, None, BackendError("unreachable", "refused", refused=True)])
def test_idle_or_no_report_or_nobody_there_costs_nothing(world: World, computing: object) -> None:
    expired(world, computing=computing)
    assert in_use(world, "paint") is None
    assert world.services["paint"].asked_to_interrupt == 0


def test_a_report_that_hangs_is_busy_and_ends_with_the_limit(world: World) -> None:
    expired(world, computing=BackendError("hung", "no answer in time"))
    chat = world.ask("chat", wait_seconds=500)
    world.pass_time(29.9)
    world.broker.look_at_quarantines()
    world.prepare()
    assert chat.waits
    world.pass_time(0.2)
    world.broker.look_at_quarantines()
    world.prepare()
    assert chat.lease().consumer == "chat", "then the eviction and its proof decide"
    assert world.services["paint"].used_mib() <= 768


def test_at_its_end_a_victim_that_keeps_its_memory_is_no_silent_grant(world: World) -> None:
    expired(world)
    world.services["paint"].lies = True
    chat = world.ask("chat", wait_seconds=500)
    world.pass_time(30)
    world.broker.look_at_quarantines()
    world.prepare()
    assert chat.error().code == "eviction_failed"


def test_the_next_one_for_the_same_consumer_unloads_nobody(world: World) -> None:
    expired(world)
    again = world.ask("paint", wait_seconds=500)
    world.services["paint"].computing = False
    world.broker.look_at_quarantines()
    world.prepare()
    assert again.lease().consumer == "paint"
    assert world.services["paint"].asked_to_unload == 0


def test_a_release_is_no_expiry(world: World) -> None:
    lease = world.grant("paint", loaded=True)
    world.services["paint"].computing = True
    world.broker.release(lease.token)
    assert world.broker.state.memory["paint"].tail
    assert world.broker.state.quarantines == {}
    assert world.services["paint"].asked_to_interrupt == 0


def test_a_revoke_is_followed_by_it(world: World) -> None:
    lease = world.grant("paint", loaded=True)
    world.services["paint"].computing = True
    world.broker.revoke(lease.lease_id, None, "stuck")
    assert in_use(world, "paint") == "quarantine"


def test_it_survives_a_restart_and_no_reboot(world: World) -> None:
    lease = expired(world)
    world.restart()
    assert in_use(world, "paint") == "quarantine"
    assert world.services["paint"].asked_to_interrupt == 2, "a restart does not know what the life before has done"
    with pytest.raises(RequestEnded):
        world.ask("paint", request=request("r1"))
    world.restart(reboot=True)
    assert in_use(world, "paint") != "quarantine"
    with pytest.raises(LeaseUnknown):
        world.broker.renew(lease.token, None)


def test_without_a_limit_there_is_none() -> None:
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000)), quarantine_seconds=0)
    expired(world)
    assert world.broker.state.memory["paint"].tail
    assert world.broker.state.quarantines == {}


def test_where_another_lease_of_it_is_live_nothing_is_interrupted() -> None:
    world = World(catalog(consumer("paint", 4000, at_once=2)))
    other = world.grant("paint", ttl_seconds=100)
    expired(world)
    assert world.services["paint"].asked_to_interrupt == 0
    assert world.broker.lease(other.token).alive(world.now)


def test_a_lease_of_a_consumer_that_left_the_file_excludes_all_of_its_card(world: World) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    world._settings = replace(world._settings, catalog=catalog(consumer("chat", 9000)))
    world.restart()
    chat = world.ask("chat", wait_seconds=500)
    world.prepare()
    assert chat.waits
    assert [c["name"] for c in snapshot(world.broker)["consumers"]] == ["chat"]
    assert world.broker.renew(lease.token, None)[0].consumer == "paint"
    world.broker.release(lease.token)
    world.prepare()
    assert chat.lease().consumer == "chat"
    assert set(world.broker.state.catalog.consumers) == {"chat"}


# -- what else can go wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_a_wall_clock_that_jumps_ends_and_extends_nothing(world: World, seconds: float) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    world.set_wall_clock(seconds)
    assert world.broker.tick() == 0
    assert world.broker.renew(lease.token, None)[0].expires_at == world.now + 60
    world.pass_time(60, watchdog=True)
    with pytest.raises(LeaseUnknown):
        world.broker.renew(lease.token, None)


def test_a_game_that_grows_during_an_unload_is_seen_before_the_grant(world: World) -> None:
    world.services["chat"].take()
    world.services["chat"].before_unload = lambda _: world.games[0].set_used(12000)
    paint = world.ask("paint")
    world.prepare()
    world.prepare()  # what was unloaded may still be falling: it looks once more
    error = paint.error()
    assert error.code == "insufficient_vram"
    assert [process["name"] for process in error.details["untracked"]] == ["game.exe"]
    assert world.card.over_commits == 0


# -- found by a review --------------------------------------------------------------------------------------


def test_a_retry_that_was_answered_keeps_its_lease_whoever_has_gone() -> None:
    # The first caller's connection broke while its grant was written; its retry had the lease, and lost it 3 s later.
    world = World(catalog(consumer("paint", 14000)))
    lease = world.grant("paint", request=request("r1"), ttl_seconds=60)
    with pytest.raises(HadIt):
        world.ask("paint", request=request("r1"))
    world.broker._doubt(lease)
    world.pass_time(10, watchdog=True)
    assert world.broker.lease(lease.token).alive(world.now)


def test_a_retry_on_a_connection_that_has_gone_confirms_nothing() -> None:
    world = World(catalog(consumer("paint", 14000)))
    lease = world.grant("paint", request=request("r1"), ttl_seconds=600)
    world.broker._doubt(lease)
    with pytest.raises(RequestEnded):
        world.broker.acquire(Ask(consumer="paint", request=request("r1")), Caller(here=lambda: False))
    world.pass_time(3, watchdog=True)
    assert len(world.broker.state.leases) == 0


def test_a_proxied_call_waits_for_what_the_store_may_know(world: World) -> None:
    world.grant("paint")
    world.store.fails = StoreError("the disk is gone")
    world.restart()
    call = world.call("chat")
    world.prepare()
    assert call.error().code == "store_unavailable"


def test_who_asks_while_an_end_is_written_is_told_afterwards() -> None:
    # 404, then kill -9 before the commit: the same token was renewed after the restart.
    with started(consumer("paint", 14000)) as world:
        lease = world.lease("paint")
        told: list[bool] = []
        ended = world.store.ended

        def slow(*words: Any, **more: Any) -> None:
            again = threading.Thread(target=lambda: told.append(world.broker.release(lease.token)))
            again.start()
            again.join(0.3)
            assert told == [], "told before it is written"
            ended(*words, **more)

        world.store.ended = slow  # type: ignore[method-assign]
        assert world.broker.release(lease.token)
        until(lambda: told == [False])


def test_a_quarantine_without_a_thread_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with started(consumer("paint", 14000)) as world:
        world.services["paint"].computing = True
        lease = world.lease("paint")

        def no_more(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            world.broker.revoke(lease.lease_id, None, None)
        assert world.broker.state.queue.holds == {}


def test_a_quarantine_interrupts_no_other_lease_of_its_consumer() -> None:
    world = World(catalog(consumer("paint", 4000, at_once=2)))
    expired(world)
    assert world.services["paint"].asked_to_interrupt == 1
    world.grant("paint", ttl_seconds=600)
    world.restart()
    assert world.services["paint"].asked_to_interrupt == 1
    assert world.broker.state.quarantines == {}


def test_what_was_intended_and_not_done_is_forgotten(world: World) -> None:
    world.services["paint"].take()
    world.services["paint"].lies = True
    assert world.refusal("chat").code == "eviction_failed"
    assert world.store.intents == []
