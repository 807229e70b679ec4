"""A grant by the thread that asks, and what goes to a preparation thread all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpumgr.core.card import Reading
from gpumgr.core.queue import Phase
from gpumgr.runtime.preparation import HEALTH_COUNTS_SECONDS
from tests.worlds import World, catalog, consumer


def used_before(mode: str = "evicting") -> World:
    """``paint`` was granted a moment ago, so that its health is known, and everybody has said that they are idle."""
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000)), mode=mode)
    world.services["chat"].computing = False
    world.broker.release(world.grant("paint").token)
    world.broker.at_once = True
    return world


def test_one_look_at_the_card_is_enough() -> None:
    world = used_before()
    caller = world.ask("paint")
    assert world.begun() == []
    assert [hold.phase for hold in world.broker.state.queue.holds_of("paint")] == [Phase.LIVE]
    world.wake()
    assert caller.lease().fence == 2
    assert world.broker.release(caller.lease().token)


def old_health(world: World) -> None:
    world.pass_time(HEALTH_COUNTS_SECONDS + 1)


def somebody_to_unload(world: World) -> None:
    world.services["chat"].take()


def somebody_to_ask(world: World) -> None:
    world.broker.state.memory["chat"].tail = True


def no_store(world: World) -> None:
    world.broker.state.store_error = "the disk is full"


def no_card(world: World) -> None:
    world.card.unreadable = "gone"
    world.broker.observe_card()


def a_card_that_is_gone_with_this_look(world: World) -> None:
    world.card.unreadable = "gone"


def an_end_during_the_look(world: World) -> None:
    read = world.probe.read

    def meanwhile(at_most_seconds: float | None = None) -> Reading:
        reading = read(at_most_seconds)
        world.broker.state.ends += 1
        return reading

    world.probe.read = meanwhile  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "happens",
    [
        old_health,
        somebody_to_unload,
        somebody_to_ask,
        no_store,
        no_card,
        a_card_that_is_gone_with_this_look,
        an_end_during_the_look,
    ],
)
def test_what_needs_more_goes_to_a_preparation_thread(happens: Callable[[World], None]) -> None:
    world = used_before()
    happens(world)
    caller = world.ask("paint")
    assert caller.waits
    assert world.begun() == [caller.ticket.seq]
    assert not caller.ticket.granting


def test_a_mode_that_tells_what_it_would_unload_goes_there_too() -> None:
    world = used_before("locked")
    caller = world.ask("paint")
    assert world.begun() == [caller.ticket.seq]


def test_who_hangs_up_during_the_look_is_granted_nothing() -> None:
    world = used_before()
    read = world.probe.read

    def leave(at_most_seconds: float | None = None) -> Reading:
        (ticket,) = world.broker.state.tickets.values()
        for caller in ticket.callers:
            caller.here = lambda: False
        return read(at_most_seconds)

    world.probe.read = leave  # type: ignore[method-assign]
    world.ask("paint")
    assert not world.broker.state.queue.holds
    assert len(world.broker.state.leases) == 0
