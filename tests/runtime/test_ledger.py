"""The ledger at work: observations of real holds, unloads that are written down, sizes that follow, restarts."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from gpumgr.core.catalog import Consumer
from gpumgr.core.ledger import LEARNED_AFTER, Account, Observation
from gpumgr.errors import EvictionFailed, InsufficientVram
from gpumgr.runtime.broker import CARD_EACH_SECONDS
from gpumgr.runtime.ports import StoreError
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import World, catalog, consumer, started


def auto(name: str, declared: int | None = None, **facts: Any) -> Consumer:
    size = 0 if declared is None else declared
    known = consumer(name, size, **facts)
    return replace(known, auto=True, declared_mib=() if declared is None else (declared,), unsized=declared is None)


@pytest.fixture
def world() -> World:
    return World(catalog(consumer("paint", 14000), consumer("chat", 9000)))


def shown(world: World, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in snapshot(world.broker)["consumers"] if c["name"] == name)
    return found


def account(world: World, name: str) -> Account:
    return world.broker.state.ledger.account(name)


def look(world: World, seconds: float = 2.0) -> None:
    world.pass_time(seconds)
    world.broker.observe_card()


def use(world: World, name: str, peak: int, rest: int | None = None) -> None:
    """A lease whose holder takes so much, and what stays after it."""
    lease = world.grant(name)
    world.services[name].take(peak)
    look(world)
    world.services[name].take(peak if rest is None else rest)
    world.broker.release(lease.token)
    world.broker._look_at_work(name, world.services[name])  # a tail would still be its use
    look(world)


# -- what is observed ---------------------------------------------------------------------------------------


def test_a_lease_is_one_observation(world: World) -> None:
    use(world, "paint", 15000, 11000)
    use(world, "paint", 12000, 10000)
    assert shown(world, "paint")["observed"] == {
        "count": 2,
        "resident_mib": 10000,
        "resident_p95_mib": 11000,
        "peak_mib": 12000,
        "peak_p95_mib": 15000,
        "reload_seconds": 2.0,
    }
    assert shown(world, "chat")["observed"] is None


def test_a_call_is_one_too_and_a_lease_that_nobody_used_is_none(world: World) -> None:
    call = world.call("paint")
    world.prepare()
    world.services["paint"].take(9000)
    look(world)
    world.broker.end_call(call.call())
    world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    world.broker.release(world.grant("chat").token)
    look(world)
    assert [each.peak_mib for each in account(world, "paint").observations] == [{0: 9000}]
    assert account(world, "chat") == Account()


@pytest.mark.parametrize("hidden", ["processes", "share", "gpu", "card"])
def test_what_the_driver_does_not_say_is_no_observation(world: World, hidden: str) -> None:
    lease = world.grant("paint", loaded=True)
    if hidden == "processes":
        world.card.set_processes_readable(False)
    elif hidden == "share":
        world.card.set_used_readable(world.services["paint"].pid, False)
    elif hidden == "gpu":
        world.card.set_gpu_error("gone")
    else:
        world.card.unreadable = "gone"
    look(world)
    world.broker.release(lease.token)
    world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    assert account(world, "paint") == Account()


def test_a_shared_consumer_is_observed_as_one(world: World) -> None:
    world = World(catalog(consumer("hear", 6000, at_once=2)))
    one, two = world.grant("hear"), world.grant("hear")
    world.services["hear"].take(7000)
    look(world)
    world.broker.release(one.token)
    look(world)
    assert account(world, "hear").observations == ()
    world.broker.release(two.token)
    world.broker._look_at_work("hear", world.services["hear"])
    look(world)
    assert [each.peak_mib for each in account(world, "hear").observations] == [{0: 7000}]


def test_a_reload_is_timed_from_the_grant_with_close_looks(world: World) -> None:
    assert world.broker.observe_card() == CARD_EACH_SECONDS
    lease = world.grant("paint")
    pauses = []
    for mib in (0, 400, 4000, 9000, 13000, *[13000] * 8):
        world.services["paint"].take(mib)
        pauses.append(world.broker.observe_card())
        world.pass_time(pauses[-1])
    assert pauses[:12] == [0.25] * 12
    assert pauses[-1] == CARD_EACH_SECONDS, "it stands still: there is nothing more to see"
    world.broker.release(lease.token)
    world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    assert account(world, "paint").observations[0].reload_seconds == 1.0


@pytest.mark.parametrize("rests_seconds", [0.0, 0.2, 1.0, 3.0])
def test_a_reload_is_known_also_where_the_next_one_takes_the_card_at_once(world: World, rests_seconds: float) -> None:
    """Each swap on a card that is waited for."""
    lease = world.grant("paint")
    for mib in (0, 400, 4000, 9000, 13000, *[13000] * 8):
        world.services["paint"].take(mib)
        world.pass_time(world.broker.observe_card())
    world.broker.release(lease.token)
    world.pass_time(rests_seconds)
    world.grant("chat", loaded=True)
    look(world)
    assert world.services["paint"].asked_to_unload
    assert [each.reload_seconds for each in account(world, "paint").observations] == [1.0]
    assert [each.peak_mib for each in account(world, "paint").observations] == [{0: 13000}]


def test_a_load_outlives_an_unload_that_failed(world: World) -> None:
    lease = world.grant("paint")
    for mib in (0, 400, 4000, 9000, 13000, *[13000] * 8):
        world.services["paint"].take(mib)
        world.pass_time(world.broker.observe_card())
    world.broker.release(lease.token)
    world.services["paint"].lies = True
    assert isinstance(world.refusal("chat"), EvictionFailed)
    look(world)
    assert [each.reload_seconds for each in account(world, "paint").observations] == [1.0]


def test_who_is_on_the_card_already_reloads_nothing(world: World) -> None:
    use(world, "paint", 14000)
    use(world, "paint", 14000)
    assert [each.reload_seconds for each in account(world, "paint").observations] == [2.0, None]


def test_a_load_call_is_a_reload(world: World) -> None:
    world = World(catalog(consumer("paint", 14000)), loads=["paint"])
    lease = world.grant("paint")
    look(world)
    world.broker.release(lease.token)
    world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    assert account(world, "paint").observations[0].reload_seconds == 0.0


def test_a_load_and_what_was_learned_wake_who_waits_for_them(world: World) -> None:
    woken: list[str] = []
    world.broker.state.on_load = lambda: woken.append("observe-card")
    world.broker.state.on_learned = lambda: woken.append("keep-store")
    use(world, "paint", 9000)
    assert woken == ["observe-card", "keep-store"]
    use(world, "paint", 9000)
    assert woken[2:] == ["keep-store"], "it was there already"
    with started(consumer("paint", 14000)) as running:
        state = running.broker.state
        assert (state.on_load, state.on_learned) == (running.broker._card.nudge, running.broker._keeper.nudge)


def test_what_is_over_before_the_next_reading_is_observed_too(world: World) -> None:
    for _ in range(3):
        call = world.call("paint")
        world.prepare()
        world.services["paint"].take(9000)
        world.broker.end_call(call.call())
        world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    assert [each.peak_mib for each in account(world, "paint").observations] == [{0: 9000}] * 3


def test_what_a_call_left_running_belongs_to_it(world: World) -> None:
    call = world.call("paint")
    world.prepare()
    world.services["paint"].computing = True
    world.broker.end_call(call.call())
    for mib in (3000, 12000, 9000):
        world.services["paint"].take(mib)
        look(world)
    world.services["paint"].computing = False
    world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    assert [each.peak_mib for each in account(world, "paint").observations] == [{0: 12000}]


def test_who_is_never_granted_is_not_observed() -> None:
    world = World(catalog(consumer("paint", 14000, beside=["chat"]), consumer("chat", 9000, beside=["paint"])))
    world.services["paint"].take(3000)
    world.grant("chat", loaded=True)
    waits = world.ask("paint", wait_seconds=10)
    world.games[0].set_used(4000)
    world.prepare()
    look(world)
    look(world, 20)
    assert waits.error().code == "scheduler_timeout"
    world.prepare()
    look(world)
    assert account(world, "paint") == Account()


# -- unloads ------------------------------------------------------------------------------------------------


def test_every_unload_is_written_down(world: World) -> None:
    use(world, "chat", 9000)
    world.broker.release(world.grant("paint").token)
    told = shown(world, "chat")["unloads"]
    assert (told["count"], told["failed"], told["returned_share"], told["residual_mib"]) == (1, 0, 1.0, 300)
    assert (told["claimed_mib"], told["returned_mib"]) == (9000, 8700)
    assert 0 < told["seconds_p50"] == told["seconds_max"] < 1
    assert shown(world, "paint")["unloads"] is None
    ledger = world.broker.state.ledger
    assert ledger.swap_seconds(["chat"], "paint") is None, "nobody saw paint load"
    assert ledger.swap_seconds([], "chat") == account(world, "chat").observations[0].reload_seconds == 2.0
    use(world, "paint", 14000)
    assert ledger.swap_seconds(["chat"], "paint") == pytest.approx(2.0 + told["seconds_p50"])


def leak(world: World, times: int) -> None:
    for _ in range(times):
        use(world, "chat", 9000)
        world.services["chat"].lies = True
        assert isinstance(world.refusal("paint"), EvictionFailed)


def test_a_leaky_consumer_is_warned_of_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gpumgr.runtime.ledger"):
        leak(world, 2)
        assert shown(world, "chat")["warnings"] == []
        leak(world, 2)
        world.broker.observe_card()
    assert "chat returned 0 % on average over 4 unloads" in shown(world, "chat")["warnings"][0]
    assert len([each for each in caplog.messages if each.startswith("leaky consumer=chat")]) == 1
    world.restart()
    with caplog.at_level(logging.WARNING, "gpumgr.runtime.ledger"):
        caplog.clear()
        leak(world, 1)
        world.broker.observe_card()
    assert not caplog.messages, "an earlier life has said it"


def test_a_victim_whose_numbers_nobody_can_read_enters_no_share(world: World) -> None:
    use(world, "chat", 9000)
    world.card.set_processes_readable(False)
    world.broker.release(world.grant("paint").token)
    told = shown(world, "chat")["unloads"]
    assert (told["count"], told["measured"], told["returned_share"], told["claimed_mib"]) == (1, 0, None, 0)


# -- over lives ---------------------------------------------------------------------------------------------


def test_a_restart_keeps_the_accounts(world: World) -> None:
    use(world, "chat", 9000)
    world.broker.release(world.grant("paint").token)
    before = {name: account(world, name) for name in ("paint", "chat")}
    world.restart()
    assert {name: account(world, name) for name in ("paint", "chat")} == before
    assert before["chat"].tally.unloads == before["chat"].tally.observations == 1
    use(world, "chat", 9000)
    assert account(world, "chat").tally.observations == 2


def test_what_a_broken_store_did_not_take_is_offered_again(world: World) -> None:
    use(world, "chat", 9000)
    world.store.fails = StoreError("disk full")
    world.broker.keep_store()
    assert world.store.learned == {}
    world.store.fails = None
    world.broker.keep_store()
    world.broker.keep_store()
    assert world.store.learned["chat"] == account(world, "chat")


# -- sizes that follow --------------------------------------------------------------------------------------


def learn(world: World, name: str, peak: int) -> None:
    for _ in range(LEARNED_AFTER):
        use(world, name, peak)


def test_a_size_follows_after_five_uses() -> None:
    world = World(catalog(auto("paint", 14000), consumer("chat", 9000)))
    assert (shown(world, "paint")["vram_resident_mib"], shown(world, "paint")["declared_mib"]) == (14000, 14000)
    for _ in range(LEARNED_AFTER - 1):
        use(world, "paint", 5000)
    assert shown(world, "paint")["vram_resident_mib"] == 14000
    use(world, "paint", 5000)
    assert (shown(world, "paint")["vram_resident_mib"], shown(world, "paint")["declared_mib"]) == (5500, 14000)
    world.restart()
    assert shown(world, "paint")["vram_resident_mib"] == 5500


def test_a_size_follows_when_the_tail_of_the_fifth_use_has_ended() -> None:
    world = World(catalog(auto("paint", 14000)))
    world.services["paint"].computing = False
    for _ in range(LEARNED_AFTER - 1):
        use(world, "paint", 5000)
    lease = world.grant("paint")
    look(world)
    world.services["paint"].computing = True
    world.broker.release(lease.token)
    look(world)
    assert shown(world, "paint")["vram_resident_mib"] == 14000
    world.services["paint"].computing = False
    world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    assert shown(world, "paint")["vram_resident_mib"] == 5500


def test_each_gpu_has_its_own_size() -> None:
    paint = replace(consumer("paint", (0, 0), gpus=(0, 1)), auto=True, unsized=True)
    world = World(catalog(paint), totals_mib=(24000, 12000))
    for _ in range(LEARNED_AFTER):
        lease = world.grant("paint")
        for gpu, mib in ((0, 9000), (1, 1000)):
            world.card.set_used(world.services["paint"].pid, mib, gpu)
        look(world)
        world.broker.release(lease.token)
        world.broker._look_at_work("paint", world.services["paint"])
        look(world)
    told = shown(world, "paint")
    assert (told["vram_resident_mib"], told["observed"]["peak_mib"]) == ([9900, 1100], [9000, 1000])


def beside_each_other() -> World:
    return World(catalog(auto("paint", beside=["chat"]), consumer("chat", 9000, beside=["paint"])))


def test_without_a_size_it_runs_alone_until_it_is_learned() -> None:
    world = beside_each_other()
    world.broker.release(world.grant("chat", loaded=True).token)
    lease = world.grant("paint")
    assert world.services["chat"].asked_to_unload, "whoever is idle goes"
    assert shown(world, "paint")["vram_resident_mib"] is None
    chat = world.ask("chat", wait_seconds=500)
    world.prepare()
    assert chat.waits, "and nobody comes beside it"
    world.broker.release(lease.token)
    world.prepare()
    world.broker.release(chat.lease().token)
    learn(world, "paint", 5000)
    lease = world.grant("paint", loaded=True)
    assert world.grant("chat").consumer == "chat", "it is known by now, and there is room"
    assert lease.consumer == "paint"


def test_a_desktop_does_not_keep_it_away_and_a_game_does() -> None:
    world = beside_each_other()
    world.games[0].set_used(2000)
    world.broker.release(world.grant("paint").token)
    world.games[0].set_used(15000)
    refused = world.refusal("paint")
    assert isinstance(refused, InsufficientVram)
    assert "half of the card, 11744 MiB, until its size is learned" in refused.message


def test_what_a_holder_was_promised_is_not_lowered_under_it() -> None:
    paint, chatty = auto("paint", 15000, beside=["chat"], at_once=2), consumer("chat", 9000, beside=["paint"])
    world = World(catalog(paint, chatty), max_ttl_seconds=5000)
    for _ in range(LEARNED_AFTER - 1):
        use(world, "paint", 3000)
    one = world.grant("paint", ttl_seconds=5000)
    look(world)
    look(world, 700)
    two = world.grant("paint", ttl_seconds=5000)
    look(world)
    world.broker.release(one.token)
    look(world)
    assert len(account(world, "paint").observations) == LEARNED_AFTER
    chat = world.ask("chat", wait_seconds=500)
    world.prepare()
    assert chat.waits, "15000 MiB are promised to somebody who has taken 3000"
    world.broker.release(two.token)
    world.broker._look_at_work("paint", world.services["paint"])
    look(world)
    assert shown(world, "paint")["vram_resident_mib"] == 3300
    world.prepare()
    assert chat.lease().consumer == "chat"


def test_a_promise_outlives_a_restart() -> None:
    world = World(catalog(auto("paint", 14000), consumer("chat", 9000)))
    lease = world.grant("paint")
    for _ in range(LEARNED_AFTER):
        world.broker.state.ledger._enter(
            world.catalog.consumers["paint"], Observation("2026-11-25", {0: 3000}, {0: 3000})
        )
    world.restart()
    assert shown(world, "paint")["vram_resident_mib"] == 14000
    world.broker.release(lease.token)
    look(world)
    assert shown(world, "paint")["vram_resident_mib"] == 3300


def test_a_raise_counts_from_the_next_decision_on() -> None:
    world = World(catalog(auto("paint", 2000, beside=["chat"]), consumer("chat", 9000, beside=["paint"])))
    learn(world, "paint", 15000)
    assert shown(world, "paint")["vram_resident_mib"] == 16500
    world.services["paint"].take(0)
    lease = world.grant("paint")
    chat = world.ask("chat", wait_seconds=0)
    world.prepare()
    assert chat.waits or chat.error().code == "scheduler_timeout"
    assert world.broker.release(lease.token)


def test_what_fills_the_card_stays_possible() -> None:
    world = World(catalog(auto("paint", 14000)))
    learn(world, "paint", 24000)
    assert shown(world, "paint")["vram_resident_mib"] == 24000 - 512
    assert world.grant("paint").consumer == "paint"


def test_a_declared_size_that_is_too_small_is_told(world: World) -> None:
    use(world, "chat", 11400)
    assert shown(world, "chat")["warnings"] == ["declared 9000, seen 11400 MiB: raise vram_resident_mib"]
    assert shown(world, "chat")["vram_resident_mib"] == 9000
