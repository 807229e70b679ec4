"""Defects that were found once, by the machine or by reading, and must not come back."""

from __future__ import annotations

from gpumgr.core.placement import decide
from gpumgr.errors import InsufficientVram, SchedulerTimeout
from tests.core.test_placement import gpu, refused, view
from tests.worlds import World, catalog, consumer


def test_a_turn_that_comes_after_the_deadline_is_nobody_s() -> None:
    # A release may come after a waiter's deadline and before its thread runs (many threads, one lock): the late one
    # got the turn, and others were made to wait for it.
    world = World(catalog(consumer("paint"), consumer("chat")))
    lease = world.grant("paint")
    late = world.ask("chat", wait_seconds=5)
    world._forward(6)  # its thread is not running yet
    world.broker.release(lease.token)
    world.prepare()
    world.wake()
    assert isinstance(late.error(), SchedulerTimeout)


def test_a_timeout_behind_a_preparation_names_it() -> None:
    # Who waited for the GPU's preparation was told "0 requests are ahead of it" and no holder.
    world = World(catalog(consumer("chat", beside=["hear"]), consumer("hear", beside=["chat"])))
    world.ask("chat", holder="bot")
    error = world.refusal("hear", wait_seconds=0)
    assert isinstance(error, SchedulerTimeout)
    assert error.details["waiting_for"] == "preparing"
    assert [holder["consumer"] for holder in error.details["holders"]] == ["chat"]
    assert "chat is preparing" in error.message


def test_a_refusal_names_the_gpu_that_is_to_blame() -> None:
    # The refusals looked only at the GPU with the largest shortfall now, also where that one would be free once a
    # holder ends. GPU 0 is short of 5512 that its holder gives back; GPU 1 is short of 512 for a game.
    span = consumer("span", (8000, 8000), gpus=(0, 1), beside=["near"])
    everyone = catalog(span, consumer("near", 21000, beside=["span"]))
    state = view(
        gpu(3000), gpu(8000, 12000, index=1, games={"game": 4000}), of=everyone, held={"near": 21000}, in_use=["near"]
    )
    error = refused(decide(span, state))
    assert isinstance(error, InsufficientVram)
    assert error.details["gpu"] == 1
    assert [process["name"] for process in error.details["untracked"]] == ["game"]


def test_two_names_of_one_card_found_out_while_both_are_prepared() -> None:
    # Where the driver was unreadable at start, a consumer named by index and one named by UUID did not share a GPU
    # yet, so both began; the first reading made them one card, and both were granted though they exclude each other.
    near, same = consumer("near", 2000), consumer("same", 2000, gpus=("GPU-0",))
    world = World(catalog(near, same), read_first=False)
    callers = [world.ask("near"), world.ask("same")]
    for _ in range(5):
        for seq in world.begun():
            world.step(seq)
    assert [caller.waits for caller in callers] == [False, True]
