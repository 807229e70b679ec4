"""The order with few swaps at work: who keeps its turn, who wakes those that wait for time alone, when a turn ends."""

from __future__ import annotations

from typing import Any

import pytest

from gpumgr.config import SchedulingSettings
from gpumgr.core.lease import Lease
from gpumgr.core.ledger import Observation, Unloaded
from gpumgr.core.outlook import Why
from gpumgr.core.quantum import FLOOR_SECONDS, PATIENCE, UNKNOWN_SWAP_SECONDS, Quantum
from gpumgr.core.queue import Fifo, Priority, WaitingFor
from gpumgr.core.resuming import KEPT, Resuming
from gpumgr.errors import ConsumerUnhealthy, SchedulerTimeout
from gpumgr.runtime.broker import Broker, order_of
from gpumgr.runtime.ports import Kept
from gpumgr.runtime.refusals import quantum_words
from gpumgr.runtime.snapshot import snapshot
from gpumgr.runtime.ticket import Ask
from tests.worlds import Caller, Calling, Stand, World, catalog, consumer, started

CHAT, PAINT = consumer("chat", 9000), consumer("paint", 14000)
QUANTUM = PATIENCE * FLOOR_SECONDS
"""While few wait, and no swap was seen yet."""


@pytest.fixture
def world() -> World:
    return World(catalog(CHAT, PAINT), totals_mib=[16000])


def learn_swaps(world: Stand, broker: Broker, reload_seconds: float = 3.0) -> None:
    for name in ("chat", "paint"):
        ledger, of = broker.state.ledger, world.catalog.consumers[name]
        ledger._enter(of, Unloaded("", 9000, 300, 2.0, share=1.0))
        ledger._enter(of, Observation("", {0: 1}, {0: 1}, reload_seconds=reload_seconds))


def quick_visits(world: World, count: int = 3) -> None:
    """So that it is known to come back soon."""
    learn_swaps(world, world.broker)
    for _ in range(count):
        world.broker.release(world.grant("chat", loaded=True).token)
        world.pass_time(0.1)


def goes_on(world: World, caller: Caller) -> str:
    world.prepare()
    return caller.lease().token


# -- the turn -----------------------------------------------------------------------------------------------


def test_who_is_on_the_card_keeps_its_turn_for_a_quantum(world: World) -> None:
    token = world.grant("chat", loaded=True).token
    paint = world.ask("paint")
    for _ in range(2):
        chat = world.ask("chat")
        world.broker.release(token)
        token = goes_on(world, chat)
    world.pass_time(QUANTUM)
    late = world.ask("chat")
    world.broker.release(token)
    world.broker.release(goes_on(world, paint))
    assert goes_on(world, late)
    assert [world.services[name].asked_to_unload for name in ("chat", "paint")] == [1, 0]


def test_nobody_waits_for_a_turn_that_nobody_uses(world: World) -> None:
    world.broker.release(world.grant("chat", loaded=True).token)
    assert world.grant("paint").granted_at == world.now


def test_nobody_is_waited_for_where_nobody_knows_what_that_saves(world: World) -> None:
    for _ in range(3):
        world.broker.release(world.grant("chat", loaded=True).token)
        world.pass_time(0.1)
    assert world.grant("paint").granted_at == world.now


def test_who_comes_back_soon_is_waited_for_and_the_watchdog_ends_that(world: World) -> None:
    quick_visits(world)
    world.broker.release(world.grant("chat").token)
    paint = world.ask("paint")
    assert world.begun() == []
    world.pass_time(0.1, watchdog=True)
    world.broker.release(world.grant("chat").token)
    world.pass_time(5, watchdog=True)
    assert world.begun() == [paint.ticket.seq]


def test_nobody_is_refused_for_who_may_come_back(world: World) -> None:
    quick_visits(world)
    lease = world.grant("paint", wait_seconds=0)
    assert lease.granted_at == world.now
    world.broker.release(lease.token)
    quick_visits(world)
    late = world.ask("paint", wait_seconds=0.1)
    world.prepare()
    assert late.lease().consumer == "paint"


@pytest.mark.parametrize(("wait_seconds", "goes"), [(10, True), (60, False)])
def test_nor_who_has_waited_already_and_cannot_wait_for_that_too(
    world: World, wait_seconds: float, *, goes: bool
) -> None:
    learn_swaps(world, world.broker, reload_seconds=18.0)
    for _ in range(3):
        world.broker.release(world.grant("chat", loaded=True).token)
        world.pass_time(4.0)
    lease = world.grant("chat")
    paint = world.ask("paint", wait_seconds=wait_seconds)
    world.pass_time(7.0)
    world.broker.release(lease.token)
    assert (world.begun() == [paint.ticket.seq]) is goes


def test_nobody_is_waited_for_less_because_of_one_who_would_be_refused_anyway(world: World) -> None:
    quick_visits(world)
    world.broker.release(world.grant("chat").token)
    paint = world.ask("paint")
    assert isinstance(world.refusal("paint", wait_seconds=0), SchedulerTimeout)
    assert world.begun() == []
    world.pass_time(5, watchdog=True)
    assert world.begun() == [paint.ticket.seq]


def test_a_running_watchdog_wakes_for_it() -> None:
    with started(CHAT, PAINT) as world:
        learn_swaps(world, world.broker)
        for _ in range(4):
            world.broker.release(world.lease("chat").token)
            world.services["chat"].take()
        paint = Calling(world, "paint")
        assert paint.lease().consumer == "paint"


# -- what a swap costs --------------------------------------------------------------------------------------


def test_a_quantum_follows_what_was_learned_of_swaps(world: World) -> None:
    ledger = world.broker.state.ledger
    assert ledger.pair_seconds("chat", "paint") is None
    learn_swaps(world, world.broker, reload_seconds=8.0)
    assert ledger.pair_seconds("chat", "paint") == 10.0
    token = world.grant("chat", loaded=True).token
    paint = world.ask("paint")
    world.pass_time(QUANTUM + 1)
    chat = world.ask("chat")
    world.broker.release(token)
    token = goes_on(world, chat)
    world.pass_time(PATIENCE * 20.0 - QUANTUM)
    world.ask("chat")
    world.broker.release(token)
    assert goes_on(world, paint)


# -- when it is over ----------------------------------------------------------------------------------------


def test_who_left_the_card_by_itself_is_not_waited_for(world: World) -> None:
    quick_visits(world)
    paint = world.ask("paint")
    world.services["chat"].take(0)
    world.pass_time(0.01)
    world.broker.observe_card()
    assert world.begun() == [paint.ticket.seq]


def test_who_is_late_ends_nobody_s_turn(world: World) -> None:
    for _ in range(3):
        world.broker.release(world.grant("paint", loaded=True).token)
        world.pass_time(0.1)
    learn_swaps(world, world.broker)
    world.pass_time(10)
    lease = world.grant("chat", loaded=True)
    paint = world.ask("paint", wait_seconds=5)
    world._move_to(world.now + 6)  # its caller's thread did not get to say so
    world.broker.release(lease.token)
    assert isinstance(paint.ticket.outcome, SchedulerTimeout)
    assert world.grant("chat").granted_at == world.now


def test_who_never_came_onto_the_card_has_no_turn(world: World) -> None:
    world.broker.release(world.grant("chat", loaded=True).token)
    world.services["paint"].unhealthy = "it burns"
    for _ in range(3):
        assert isinstance(world.refusal("paint"), ConsumerUnhealthy)
        world.pass_time(0.1)
    assert world.grant("chat").granted_at == world.now


def test_an_unload_that_nobody_waits_for_ends_a_turn_too(world: World) -> None:
    quick_visits(world)
    world.broker.outsiders.hold(None, 60, None)
    world.broker.observe_card()
    world.broker.housekeeping.round()
    world.broker.outsiders.resume(None)
    assert world.grant("paint").granted_at == world.now


def test_a_lease_of_an_earlier_life_has_the_turn(world: World) -> None:
    lease = world.grant("chat", loaded=True)
    world.restart()
    world.broker.release(lease.token)
    chat = world.ask("chat")
    paint, again = world.ask("paint"), world.ask("chat")
    world.broker.release(goes_on(world, chat))
    assert goes_on(world, again)
    assert paint.waits


@pytest.mark.parametrize(
    ("scheduling", "order"),
    [
        (SchedulingSettings(), Quantum()),
        (SchedulingSettings(quantum_seconds=30), Quantum(30)),
        (SchedulingSettings("fifo"), Fifo),
        (SchedulingSettings(mode="locked"), Fifo),
        (SchedulingSettings(mode="passthrough"), Fifo),
    ],
)
def test_where_nothing_is_unloaded_there_are_no_swaps_to_save(scheduling: SchedulingSettings, order: object) -> None:
    found = order_of(scheduling)
    assert found == order or type(found) is order


# -- priorities ---------------------------------------------------------------------------------------------


def test_who_is_more_urgent_goes_first() -> None:
    kinds = {"paint": "paint", "voice": "paint"}
    world = World(catalog(PAINT, **kinds), priorities={"voice": Priority.INTERACTIVE})
    lease = world.grant("paint")
    world.ask("paint", holder="job", priority=Priority.BATCH)
    world.ask("paint", holder="imagen")
    world.acquire(Ask(kind="voice", holder="ada"))
    world.acquire(Ask(kind="voice", holder="bob", priority=Priority.NORMAL))
    assert [(row["holder"], row["priority"]) for row in queue_of(world)] == [
        ("ada", "interactive"),
        ("imagen", "normal"),
        ("bob", "normal"),
        ("job", "batch"),
    ]
    world.broker.release(lease.token)
    world.prepare()
    (row,) = snapshot(world.broker)["leases"]
    assert (row["holder"], row["priority"]) == ("ada", "interactive")
    assert world.broker.state.events[-1]["priority"] == "interactive"


# -- making way ---------------------------------------------------------------------------------------------


def claim_of(world: World, lease: Lease) -> tuple[str, str, str] | None:
    to = world.broker.renew(lease.token, None).yield_to
    return None if to is None else (to.cause, to.words, to.since_at)


def test_a_holder_is_asked_to_yield_to_who_is_more_urgent_when_it_has_held_for_a_while(world: World) -> None:
    lease = world.grant("chat", loaded=True)
    world.ask("paint", holder="imagen")
    ada = world.ask("paint", holder="ada", priority=Priority.INTERACTIVE)
    since = world.broker.state.shown(world.now)
    assert claim_of(world, lease) is None
    world.pass_time(10)
    because = f"ada waits for paint since {since}, and is more urgent (interactive before normal)"
    assert claim_of(world, lease) == ("priority", because, world.broker.state.shown(world.now))
    (row,) = snapshot(world.broker)["leases"]
    assert (row["yield_requested"], row["yield_reason"]) == (True, because)
    world.hang_up(ada)
    assert claim_of(world, lease) is None


def test_and_when_its_quantum_is_over(world: World) -> None:
    lease = world.grant("chat", loaded=True)
    world.ask("paint")
    ends_at = world.broker.state.shown(world.now + QUANTUM)
    world.pass_time(QUANTUM - 0.1)
    assert claim_of(world, lease) is None
    world.pass_time(0.1)
    cause, because, since_at = claim_of(world, lease) or ("", "", "")
    assert (cause, since_at) == ("quantum", ends_at)
    assert because.endswith("and the turn of chat is over")
    world.broker.release(lease.token)
    assert len(world.broker.state.resuming) == 1


def test_who_made_way_comes_back_directly_behind_that_one(world: World) -> None:
    lease = world.grant("chat", loaded=True, priority=Priority.BATCH)
    ada = world.ask("paint", holder="ada")
    world.pass_time(10)
    world.broker.release(lease.token)
    token = goes_on(world, ada)
    world.ask("chat", holder="since then")
    back = world.ask("chat", holder="back", priority=Priority.BATCH, resume_of=lease.lease_id)
    world.ask("chat", holder="again", priority=Priority.BATCH, resume_of=lease.lease_id)
    assert [row["holder"] for row in queue_of(world)] == ["back", "since then", "again"]
    world.broker.release(token)
    goes_on(world, back)
    assert world.broker.state.events[-1]["resumes"] == lease.lease_id


def test_who_came_back_and_got_nothing_may_come_back_again(world: World) -> None:
    lease = world.grant("chat", loaded=True, priority=Priority.BATCH)
    ada = world.ask("paint", holder="ada")
    world.pass_time(10)
    world.broker.release(lease.token)
    goes_on(world, ada)
    late = world.refusal("chat", wait_seconds=0, resume_of=lease.lease_id)
    assert isinstance(late, SchedulerTimeout)
    world.ask("chat", holder="since then")
    world.ask("chat", holder="back", priority=Priority.BATCH, resume_of=lease.lease_id)
    assert [row["holder"] for row in queue_of(world)] == ["back", "since then"]


@pytest.mark.parametrize(
    "why_not", ["never heard of", "another consumer", "another's", "too late", "nobody waited", "expired"]
)
def test_otherwise_it_is_a_request_like_any(world: World, why_not: str) -> None:
    lease = world.grant("chat", loaded=True, priority=Priority.BATCH)
    if why_not != "nobody waited":
        world.ask("paint", holder="ada", wait_seconds=600)
    world.pass_time(10)
    if why_not == "expired":
        world.pass_time(120, watchdog=True)
    else:
        world.broker.release(lease.token, "imagen")
    world.prepare()
    if why_not == "too late":
        world.pass_time(600)
    name = "paint" if why_not == "another consumer" else "chat"
    lease_id = "0" * 10 if why_not == "never heard of" else lease.lease_id
    world.ask(name, holder="since then")
    bearer = "thief" if why_not == "another's" else "imagen"
    world.ask(name, holder="back", priority=Priority.BATCH, resume_of=lease_id, bearer=bearer)
    assert [row["holder"] for row in queue_of(world)][-2:] == ["since then", "back"]


def test_no_more_of_those_who_made_way_are_remembered_than_may_be() -> None:
    resuming = Resuming()
    for number in range(KEPT + 5):
        resuming.yielded(str(number), "chat", number, 0.0)
    assert len(resuming) == KEPT
    assert resuming.resume("4", "chat", 1.0) is None
    assert resuming.resume("5", "chat", 1.0) == 5


# -- what those who wait are told ---------------------------------------------------------------------------


def queue_of(world: World) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = snapshot(world.broker)["queue"]
    return found


def test_status_tells_who_goes_next_and_why_the_others_wait(world: World) -> None:
    quick_visits(world)
    token = world.grant("chat", loaded=True, holder="ada").token
    world.ask("paint", holder="imagen")
    assert queue_of(world)[0]["reason"].startswith("ada has held chat for 0 s (lease ")
    chat = world.ask("chat", holder="bob")
    first, second = queue_of(world)
    assert [(row["position"], row["holder"], row["waiting_for"]) for row in (first, second)] == [
        (1, "bob", "holder"),
        (2, "imagen", "quantum"),
    ]
    ends_at = world.broker.state.shown(world.now + QUANTUM)
    assert second["quantum_ends_at"] == ends_at
    assert f"chat is on the GPU and keeps its turn until {ends_at}, or longer if more requests come" in second["reason"]
    assert first["estimated_wait_seconds"] == 0.0  # its visits took no time
    assert second["estimated_start_at"] is not None
    world.broker.release(token)
    assert goes_on(world, chat)
    world.pass_time(QUANTUM)
    (row,) = queue_of(world)
    assert (row["waiting_for"], row["quantum_ends_at"]) == ("holder", None)


def test_a_refusal_tells_of_the_quantum(world: World) -> None:
    world.grant("chat", loaded=True)
    paint = world.ask("paint", wait_seconds=5.0)
    ends_at = world.broker.state.shown(world.now + QUANTUM)
    world.ask("chat")
    world.pass_time(5.0)
    error = paint.error()
    assert (error.details["waiting_for"], error.details["quantum_ends_at"]) == ("quantum", ends_at)
    assert "waiting for quantum: chat is on the GPU and keeps its turn until" in error.message


def test_a_linger_is_told_with_what_ends_it_later() -> None:
    said = quantum_words(Why(WaitingFor.QUANTUM, whose=("chat",), lingers=True), "12:00")
    assert said == "chat usually comes back within a moment, and keeps the GPU for that, until 12:00 if it does not"


def test_nobody_is_given_an_estimate_out_of_nothing(world: World) -> None:
    lease = world.grant("chat")
    world.ask("paint")
    assert [(row["position"], row["estimated_start_at"]) for row in queue_of(world)] == [(1, None)]
    world.pass_time(7.0)
    world.broker.release(lease.token)
    (row,) = queue_of(world)
    assert (row["waiting_for"], row["estimated_start_at"]) == ("preparing", None), "it was never seen to load"
    world.prepare()
    world.ask("chat")
    world.broker.state.memory["paint"].hold_seconds.append(4.0)
    (row,) = queue_of(world)
    assert row["estimated_wait_seconds"] == 4.0 + UNKNOWN_SWAP_SECONDS


def test_how_long_leases_took_outlives_the_broker(world: World) -> None:
    kept = Kept(0, [], [], [], {}, events=[{"type": "release", "consumer": "chat", "held_seconds": 7.5}])
    world.broker.state.restore(kept)
    assert list(world.broker.state.memory["chat"].hold_seconds) == [7.5]
