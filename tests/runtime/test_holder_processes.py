"""What a holder's own program holds: the lease's while it lives, nobody's to lend or to unload until it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpumgr.core.catalog import Catalog, Consumer
from gpumgr.core.queue import WaitingFor
from gpumgr.errors import InsufficientVram, InvalidRequest
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import World, catalog, consumer

BATCH_MIB = 10000
CONTEXT_MIB = 400


def of_batch(*more: Consumer, **changes: Any) -> Catalog:
    """``batch`` has no backend."""
    batch = replace(consumer("batch", BATCH_MIB, **changes), dialect="none", url=None, public_url=None)
    return catalog(batch, *more)


def world_of(*more: Consumer, **changes: Any) -> World:
    world = World(of_batch(*more, **changes))
    world.services["batch"].can_unload = False
    return world


def shown(world: World, name: str = "batch") -> dict[str, Any]:
    world.broker.observe_card()
    (found,) = [c for c in snapshot(world.broker)["consumers"] if c["name"] == name]
    return dict(found)


def test_what_a_holders_program_holds_counts_for_its_lease() -> None:
    world = world_of(consumer("voice", 3000, beside=["batch"]), beside=["voice"])
    pid = world.programs.begin()
    lease = world.grant("batch", holder_pid=pid)
    world.programs.begin(6000, parent=pid)
    assert shown(world)["held_mib"] == 6000
    assert snapshot(world.broker)["gpus"][0]["promised_mib"] == BATCH_MIB - 6000
    assert snapshot(world.broker)["leases"][0]["holder_pid"] == pid
    assert world.grant("voice").consumer == "voice"
    assert lease.process is not None


def test_a_pid_of_nobody_is_refused_with_what_to_do() -> None:
    world = world_of()
    for pid in (1, 4_000_000):
        with pytest.raises(InvalidRequest) as caught:
            world.ask("batch", holder_pid=pid)
        assert "leave holder_pid out" in caught.value.message
        assert caught.value.details == {"field": "holder_pid"}


# A new holder was granted what an old one's program still held: together they took twice what was declared.
def test_what_an_earlier_holders_program_holds_is_not_lent_to_the_next_one() -> None:
    world = world_of()
    first = world.programs.begin()
    lease = world.grant("batch", holder_pid=first)
    world.card.set_used(first, 15000)
    world.broker.release(lease.token)
    second = world.ask("batch", holder_pid=world.programs.begin(), wait_seconds=60)
    world.prepare()
    assert second.waits
    assert second.ticket.waiting_for is WaitingFor.VRAM
    assert f"train.py (pid {first})" in second.ticket.step
    world.programs.end(first)
    world.prepare()
    assert second.lease().consumer == "batch"


# What the old one's program still held counted as taken by the new holder: a third one was granted its memory.
def test_what_an_earlier_holders_program_holds_keeps_no_promise_to_the_next_one() -> None:
    world = world_of(consumer("voice", 8000, beside=["batch"]), beside=["voice"])
    first = world.programs.begin()
    lease = world.grant("batch", holder_pid=first)
    world.card.set_used(first, 8000)
    world.broker.release(lease.token)
    second = world.programs.begin()
    world.grant("batch", holder_pid=second)
    shown(world)
    assert snapshot(world.broker)["gpus"][0]["promised_mib"] == BATCH_MIB
    voice = world.ask("voice", wait_seconds=60)
    world.prepare()
    assert voice.waits
    world.card.set_used(second, BATCH_MIB)
    world.programs.end(first)
    world.prepare()
    assert voice.lease().consumer == "voice"


def test_a_program_that_leases_again_uses_what_it_kept() -> None:
    world = world_of()
    pid = world.programs.begin()
    for _ in range(2):
        lease = world.grant("batch", holder_pid=pid, wait_seconds=0)
        world.card.set_used(pid, 15000)
        world.broker.release(lease.token)


@pytest.mark.parametrize("dialect", ["none", "comfyui"])
def test_who_may_not_stand_beside_it_waits_until_the_program_ends(dialect: str) -> None:
    consumers = of_batch(consumer("voice", 3000))
    held = replace(consumers.consumers["batch"], dialect=dialect)
    world = World(replace(consumers, consumers={**consumers.consumers, "batch": held}))
    world.services["batch"].can_unload = dialect != "none"
    pid = world.programs.begin()
    lease = world.grant("batch", holder_pid=pid)
    world.card.set_used(pid, 8000)
    world.broker.release(lease.token)
    voice = world.ask("voice", wait_seconds=60)
    world.prepare()
    assert voice.ticket.waiting_for is WaitingFor.DRAINING
    assert f"train.py (pid {pid}) of batch has ended" in voice.ticket.step
    assert shown(world)["in_use"] == "tail"
    assert world.services["batch"].asked_to_unload == 0
    world.programs.end(pid)
    world.prepare()
    assert voice.lease().consumer == "voice"


def test_a_context_that_a_program_keeps_holds_nobody_up() -> None:
    world = world_of(consumer("voice", 3000))
    pid = world.programs.begin()
    lease = world.grant("batch", holder_pid=pid)
    world.card.set_used(pid, CONTEXT_MIB)
    world.broker.release(lease.token)
    assert world.grant("voice").consumer == "voice"
    assert shown(world)["in_use"] is None


def test_the_memory_is_its_consumers_again_after_a_restart_and_its_tail_too() -> None:
    world = world_of(consumer("voice", 3000))
    live, over = world.programs.begin(), world.programs.begin()
    lease = world.grant("batch", holder_pid=over)
    world.card.set_used(over, 1000)
    world.broker.release(lease.token)
    held = world.grant("batch", holder_pid=live)
    world.card.set_used(live, 5000)
    world.restart()
    assert (shown(world)["held_mib"], shown(world)["in_use"]) == (6000, "lease")
    world.broker.release(held.token)
    world.programs.end(live)
    assert (shown(world)["held_mib"], shown(world)["in_use"]) == (1000, "tail")


def test_a_pid_that_was_given_again_meanwhile_is_a_strangers() -> None:
    world = world_of()
    pid = world.programs.begin(2000)
    world.grant("batch", holder_pid=pid)
    world.programs._starts[pid] += 1
    assert shown(world)["held_mib"] == 0
    (process,) = snapshot(world.broker)["gpus"][0]["processes"]
    assert process["consumer"] is None


def test_what_can_never_fit_beside_it_is_refused_and_nobody_is_unloaded() -> None:
    world = world_of()
    pid = world.programs.begin()
    lease = world.grant("batch", holder_pid=pid)
    world.card.set_used(pid, 5000)
    world.games[0].set_used(15000)
    world.broker.release(lease.token)
    refusal = world.refusal("batch", holder_pid=world.programs.begin(), wait_seconds=5)
    assert isinstance(refusal, InsufficientVram)
    assert world.services["batch"].asked_to_unload == 0


def test_what_a_program_of_two_leases_holds_is_the_ones_that_goes_on() -> None:
    world = world_of(consumer("voice", 3000, beside=["batch"]), beside=["voice"])
    pid = world.programs.begin()
    world.grant("voice", holder_pid=pid)
    lease = world.grant("batch", holder_pid=pid)
    world.card.set_used(pid, 2000)
    assert (shown(world)["held_mib"], shown(world, "voice")["held_mib"]) == (2000, 0)
    world.broker.release(lease.token)
    assert (shown(world)["held_mib"], shown(world, "voice")["held_mib"]) == (0, 2000)
