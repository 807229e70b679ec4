"""Defects that were found once, by the machine or by reading, and must not come back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from gpumgr.core.catalog import Consumer
from gpumgr.core.placement import Report, decide
from gpumgr.core.queue import WaitingFor
from gpumgr.errors import (
    ConsumerUnhealthy,
    EvictionFailed,
    GpumgrError,
    InsufficientVram,
    InternalError,
    PrepareTimeout,
    SchedulerTimeout,
)
from gpumgr.runtime.evictor import SETTLE_SECONDS
from gpumgr.runtime.ports import BackendError
from gpumgr.runtime.preparation import LOOK_AGAIN_SECONDS
from gpumgr.sim.card import OutOfMemory
from tests.core.test_placement import gpu, refused, view
from tests.waiting import until
from tests.worlds import CONTEXT_MIB, Caller, Calling, Service, World, catalog, consumer, started


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


# -- consumers that hold little -----------------------------------------------------------------------------


def ask_to_the_end(world: World, name: str, **words: Any) -> Caller:
    """Also where the preparation looks once more, a moment later, before it refuses."""
    caller = world.ask(name, **words)
    world.prepare()
    world.pass_time(LOOK_AGAIN_SECONDS)
    world.prepare()
    return caller


def use(world: World, name: str, mib: int) -> None:
    """A lease of it that has ended, and what it left on the card."""
    lease = world.grant(name)
    world.services[name].take(mib)
    world.broker.release(lease.token)


def unload_in_vain(world: World, name: str, target: str) -> None:
    """An unload that is answered, and proved as it holds little, though its memory stands still all the while."""
    world.services[name].lies = True
    caller = ask_to_the_end(world, target)
    world.services[name].lies = False
    if not isinstance(caller.answer, GpumgrError):
        world.broker.release(caller.lease().token)


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_a_small_consumer_that_came_back_is_unloaded_again(seen: bool) -> None:
    # Its unload was proved at 700 MiB, before the memory fell. From then on 700 MiB passed for what stays of it, and
    # when it was loaded again nobody asked it to unload: everybody who needed those MiB was refused, for ever.
    world = World(catalog(consumer("small", 700), consumer("big", 23000)))
    small = world.services["small"]
    use(world, "small", 700)
    unload_in_vain(world, "small", "big")
    small.take(CONTEXT_MIB)
    if seen:
        world.broker.observe_card()
    use(world, "small", 700)
    asked = small.asked_to_unload
    assert ask_to_the_end(world, "big").lease().consumer == "big"
    assert small.asked_to_unload == asked + 1
    assert small.used_mib() == CONTEXT_MIB


def test_what_stays_of_a_consumer_is_the_least_that_was_seen() -> None:
    # As above, where the target would fit beside it: they exclude each other, so what it holds is its model.
    world = World(catalog(consumer("small", 700), consumer("big", 9000)))
    use(world, "small", 700)
    unload_in_vain(world, "small", "big")
    world.services["small"].take(CONTEXT_MIB)
    world.broker.observe_card()
    use(world, "small", 700)
    assert ask_to_the_end(world, "big").lease().consumer == "big"
    assert world.services["small"].used_mib() == CONTEXT_MIB


def little_ones(world: World) -> list[Service]:
    """Two idle consumers that hold 600 MiB each, which is what their last unload left of them."""
    services = [world.services[name] for name in ("hear", "talk")]
    for service in services:
        service.take(600)
        service.lies = True
    world.broker.release(ask_to_the_end(world, "paint").lease().token)
    for service in services:
        service.lies = False
        service.asked_to_unload = 0
    return services


LITTLE = (consumer("hear", 600), consumer("talk", 600), consumer("paint", 9000), consumer("big", 22800))


def test_those_that_hold_little_are_tried_before_a_refusal() -> None:
    # 512 MiB were missing, 1200 lay with two idle consumers, and neither was asked.
    world = World(catalog(*LITTLE))
    little = little_ones(world)
    assert ask_to_the_end(world, "big").lease().consumer == "big"
    assert [service.used_mib() for service in little] == [CONTEXT_MIB, CONTEXT_MIB]


def test_those_that_hold_little_are_tried_once() -> None:
    world = World(catalog(*LITTLE))
    little = little_ones(world)
    for service in little:
        service.lies = True
    assert isinstance(ask_to_the_end(world, "big").error(), InsufficientVram)
    assert [service.asked_to_unload for service in little] == [1, 1]


def test_those_that_hold_little_are_left_alone_where_it_would_not_be_enough() -> None:
    world = World(catalog(*LITTLE))
    little = little_ones(world)
    world.games[0].set_used(700)  # 1212 MiB are missing now
    assert isinstance(ask_to_the_end(world, "big").error(), InsufficientVram)
    assert [service.asked_to_unload for service in little] == [0, 0]


@pytest.mark.parametrize(
    ("breaks", "seconds"),
    [
        (lambda service: setattr(service, "can_unload", False), 0.0),
        (lambda service: setattr(service, "fails", "failed"), 5.0),
        (lambda service: setattr(service, "fails", "hung"), 5.0),
    ],
    ids=["no unload call", "failed", "hung"],
)
def test_a_context_blocks_nobody(breaks: Callable[[Service], None], seconds: float) -> None:
    # 400 MiB are below residual_mib: given back by definition. Nobody who excludes it was ever granted.
    world = World(catalog(consumer("chat", 9000, unload_timeout_seconds=5.0), consumer("paint", 9000)))
    world.services["chat"].take(400)
    breaks(world.services["chat"])
    caller = world.ask("paint")
    world.prepare()
    assert caller.lease().consumer == "paint"
    assert caller.answered_at == pytest.approx(1000.0 + seconds, abs=0.2)


# -- proof, where the driver does not name its processes ----------------------------------------------------


def test_one_rise_of_free_memory_does_not_prove_two_unloads() -> None:
    # Both were unloaded at once: the 9000 MiB of the one were more than 90 % of the other's 2000 as well.
    chat, hear = consumer("chat", 9000, beside=["hear"]), consumer("hear", 2000, beside=["chat"])
    world = World(catalog(chat, hear, consumer("paint", 14000)))
    world.card.set_processes_readable(False)
    use(world, "chat", 9000)
    use(world, "hear", 2000)
    world.services["hear"].lies = True
    error = ask_to_the_end(world, "paint").error()
    assert isinstance(error, EvictionFailed)
    assert [victim["consumer"] for victim in error.details["victims"]] == ["hear"]
    assert error.details["evicted"] == ["chat"]
    world.services["hear"].lies = False
    assert ask_to_the_end(world, "paint").lease().consumer == "paint"
    assert world.services["hear"].used_mib() == CONTEXT_MIB


def test_an_empty_list_of_processes_is_not_believed_while_memory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a container without the host's pids: the list can be read and is empty. Its consumers were never asked.
    world = World(catalog(consumer("chat", 9000), consumer("paint", 20000)))
    tell = world.card.state

    def without_processes() -> Mapping[str, object]:
        told: dict[str, Any] = tell()
        return told | {"gpus": [gpu | {"processes": []} for gpu in told["gpus"]]}

    chat = world.services["chat"]
    monkeypatch.setattr(world.probe, "_source", without_processes)
    monkeypatch.setattr(chat, "loaded", lambda: Report(loaded=chat.used_mib() > CONTEXT_MIB, used_mib=chat.used_mib()))
    chat.take(9000)
    assert ask_to_the_end(world, "paint").lease().consumer == "paint"
    assert (chat.asked_to_unload, chat.used_mib()) == (1, CONTEXT_MIB)


# -- an unload call that is still running -------------------------------------------------------------------


def test_a_victim_serves_again_when_its_unload_call_has_ended() -> None:
    # Its memory fell, so it was proved and granted anew while its call was still running: that then unloaded what the
    # new holder had just loaded.
    chat, paint = consumer("chat", 9000, unload_timeout_seconds=8.0), consumer("paint", 9000)
    gate = threading.Event()
    with started(chat, paint) as world:
        victim = world.services["chat"]

        def first_of_two_models(_name: str) -> None:
            victim.take(CONTEXT_MIB)
            gate.wait(10)

        victim.before_unload = first_of_two_models
        victim.take()
        try:
            world.broker.release(world.lease("paint", wait_seconds=3).token)
            caller = Calling(world, "chat", wait_seconds=10)
            until(lambda: world.waiting() == ["chat"])
            with world.broker.state.lock:
                assert world.broker.state.queue.begin(world.broker.state.now()) == []
                assert world.broker.state.queue.is_unloading("chat")
        finally:
            gate.set()
        assert caller.lease().consumer == "chat"
        victim.take()
        assert not [thread for thread in threading.enumerate() if thread.name == "unload-chat"]
        assert (victim.asked_to_unload, victim.used_mib()) == (1, 9000)


# -- the target's own health and load -----------------------------------------------------------------------


def test_a_target_that_dies_while_it_waits_for_memory_is_not_granted() -> None:
    # Its health was asked once, before the wait.
    paint, chat = consumer("paint", 14000, beside=["chat"]), consumer("chat", 14000, beside=["paint"])
    world = World(catalog(paint, chat))
    lease = world.grant("paint", loaded=True, ttl_seconds=600)
    caller = world.ask("chat", wait_seconds=300)
    world.prepare()
    assert caller.ticket.waiting_for is WaitingFor.VRAM
    world.services["chat"].unhealthy = "no answer"
    world.pass_time(60)
    world.broker.release(lease.token)
    world.prepare()
    assert isinstance(caller.error(), ConsumerUnhealthy)
    assert world.services["paint"].asked_to_unload == 0
    assert world.broker.state.queue.holds == {}


LOADS = (
    consumer("paint", 14000, beside=["chat"], unload_timeout_seconds=30.0),
    consumer("chat", 10300, beside=["paint"]),
)
"""They may stand beside each other, and do not fit."""


def loading_world(monkeypatch: pytest.MonkeyPatch, load: Callable[[World, Service], None]) -> World:
    """``paint`` loads as ``load`` does."""
    world = World(catalog(*LOADS), loads=["paint"], max_prepare_seconds=20)
    paint = world.services["paint"]
    monkeypatch.setattr(paint, "load", lambda: load(world, paint))
    return world


def hang_and_go_on(seconds: float, *, at_once_mib: int, answers_unloads: bool) -> Callable[[World, Service], None]:
    """A load call that ends in a time-out while its server goes on: ``at_once_mib`` are on the card already, the rest
    comes ``seconds`` later, and what it is asked to unload until then is lost."""

    def load(world: World, service: Service) -> None:
        due = world.now + seconds
        service.take(at_once_mib)
        service.lies = not answers_unloads
        pending = [True]

        def finish() -> None:
            if pending and world.now >= due:
                pending.clear()
                service.lies = False
                try:
                    service.take()
                except OutOfMemory:
                    return  # the card has counted it

        world.each_instant = finish
        raise BackendError("hung", "no answer in time")

    return load


def test_a_load_that_fails_and_goes_on_keeps_others_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # The promise ended with the load call's error: a coexisting consumer was granted what the load was still taking.
    load = hang_and_go_on(3.0, at_once_mib=2000, answers_unloads=False)
    world = loading_world(monkeypatch, load)
    first = world.ask("paint")
    world.prepare()
    assert isinstance(first.error(), ConsumerUnhealthy)
    world.grant("chat", loaded=True)
    world.pass_time(10)
    assert world.card.over_commits == 0
    assert world.services["paint"].used_mib() == CONTEXT_MIB


# Its unload is answered while nothing of the load is on the card yet.
def test_a_load_that_fails_and_shows_only_later_keeps_others_off(monkeypatch: pytest.MonkeyPatch) -> None:
    load = hang_and_go_on(SETTLE_SECONDS + 2.5, at_once_mib=0, answers_unloads=True)
    world = loading_world(monkeypatch, load)
    first = world.ask("paint")
    world.prepare()
    assert isinstance(first.error(), ConsumerUnhealthy)
    world.grant("chat", loaded=True)
    world.pass_time(10)
    assert world.card.over_commits == 0
    assert world.services["paint"].used_mib() == CONTEXT_MIB


def loads_and_is_ill(_world: World, service: Service) -> None:
    service.take()
    service.unhealthy = "loaded and ill"


def loads_too_slowly(world: World, service: Service) -> None:
    world.pass_time(30)
    service.take()


@pytest.mark.parametrize("processes_readable", [True, False])
@pytest.mark.parametrize(
    ("load", "refusal"), [(loads_and_is_ill, ConsumerUnhealthy), (loads_too_slowly, PrepareTimeout)]
)
def test_what_was_loaded_for_nobody_is_unloaded_again(
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[[World, Service], None],
    refusal: type[GpumgrError],
    processes_readable: bool,
) -> None:
    # It stayed on the card; and where the driver names no processes nobody knew, as only grants were remembered.
    world = loading_world(monkeypatch, load)
    world.card.set_processes_readable(processes_readable)
    for name in ("paint", "chat"):
        world.broker.state.memory[name].used_since_unload = False
    caller = world.ask("paint")
    world.prepare()
    assert isinstance(caller.answer, refusal)
    paint = world.services["paint"]
    assert (paint.asked_to_unload, paint.used_mib()) == (1, CONTEXT_MIB)
    world.grant("chat", loaded=True)
    assert world.card.over_commits == 0
    assert paint.asked_to_unload == 1


# -- who waits for whom -------------------------------------------------------------------------------------


def test_a_gpu_that_the_driver_does_not_show_joins_no_others() -> None:
    # A UUID with a typing error might have been any card: so a wait on GPU 0 kept everybody off GPU 1.
    a, b = consumer("a", 14000, beside=["b"]), consumer("b", 14000, beside=["a"])
    world = World(catalog(a, b, consumer("far", 9000, gpus=(1,)), consumer("typo", gpus=("GPU-nope",))), (24000, 24000))
    world.grant("a", loaded=True, ttl_seconds=600)
    waiter = world.ask("b", wait_seconds=500)
    world.prepare()
    assert waiter.ticket.waiting_for is WaitingFor.VRAM
    assert world.grant("far").gpus == (1,)


def behind_a_wait() -> tuple[World, str, Caller]:
    """``big`` holds the memory, ``mid`` waits for it with the turn kept, ``tiny`` would fit and comes after ``mid``."""
    names = ("big", "mid", "tiny")
    sizes = {"big": 14000, "mid": 12000, "tiny": 1000}
    world = World(catalog(*(consumer(name, sizes[name], beside=[n for n in names if n != name]) for name in names)))
    lease = world.grant("big", loaded=True, ttl_seconds=600, holder="imagen")
    world.ask("mid", wait_seconds=600)
    world.prepare()
    behind = world.ask("tiny", wait_seconds=120)
    world.prepare()
    return world, lease.token, behind


def test_a_timeout_behind_a_wait_for_memory_names_who_holds_it() -> None:
    # It named only the preparation in front of it, which was itself waiting.
    world, token, behind = behind_a_wait()
    world.pass_time(120)
    error = behind.error()
    assert isinstance(error, SchedulerTimeout)
    assert [holder["consumer"] for holder in error.details["holders"]] == ["mid", "big"]
    assert error.details["holders"][1]["lease_id"] == world.broker.lease(token).lease_id
    assert "imagen" in error.message


def test_renew_counts_those_behind_a_wait_for_the_lease_s_memory() -> None:
    # It told the holder of the one that waits for its memory and not of those who wait behind that one.
    world, token, behind = behind_a_wait()
    assert world.broker.renew(token, None)[1] == 2
    world.pass_time(120)
    assert not behind.waits
    assert world.broker.renew(token, None)[1] == 1


def test_the_refusal_of_a_turn_that_came_too_late_says_so() -> None:
    world = World(catalog(consumer("paint"), consumer("chat")))
    lease = world.grant("paint", holder="imagen", ttl_seconds=100)
    late = world.ask("chat", wait_seconds=10)
    world._forward(11)  # its thread is not running yet
    world.broker.release(lease.token)
    world.wake()
    error = late.error()
    assert isinstance(error, SchedulerTimeout)
    assert "its turn came only after that" in error.message


# -- exceptions ---------------------------------------------------------------------------------------------


class Defect(Exception):
    pass


def fails_once(call: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The call, but the first one of which ``when`` is true raises."""
    left = [True]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left and when(*args):
            left.clear()
            raise Defect
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("where", ["health", "unload", "refusal", "grant"])
def test_an_exception_inside_a_preparation_ends_only_that(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One in the refusal itself ended the thread: its hold stayed, and with one GPU nothing was ever prepared again.
    everyone: list[Consumer] = [consumer("chat", 9000), consumer("paint", 9000)]
    with started(*everyone) as world:
        state, paint = world.broker.state, world.services["paint"]
        until(lambda: all(memory.checked is not None for memory in state.memory.values()))
        if where == "health":
            state.memory["paint"].checked = None
            monkeypatch.setattr(paint, "health", fails_once(paint.health, lambda: True))
        elif where == "unload":
            world.services["chat"].take()
            evictor = world.broker._world.evictor
            monkeypatch.setattr(evictor, "_watch", fails_once(evictor._watch, lambda _: True))
        elif where == "refusal":
            world.games[0].set_used(15000)
            monkeypatch.setattr(state, "note", fails_once(state.note, lambda event, *_: event == "refuse"))
        else:
            monkeypatch.setattr(world.store, "granted", fails_once(world.store.granted, lambda *_: True))
        error = Calling(world, "paint", wait_seconds=1).error()
        assert isinstance(error, InsufficientVram if where == "refusal" else InternalError)
        until(lambda: not state.queue.holds)
        assert world.broker.missing() == []
        world.games[0].set_used(0)
        for name in ("paint", "chat"):
            world.broker.release(world.lease(name, wait_seconds=2).token)


def test_a_tail_that_is_not_on_the_card_yet_holds_up_whom_it_excludes() -> None:
    # ComfyUI answers a prompt at once and reads its model for seconds: a lease of speech was granted beside that.
    world = World(catalog(consumer("paint", 14000), consumer("talk", 3000)))
    world.services["paint"].computing = True
    call = world.call("paint")
    world.prepare()
    world.broker.end_call(call.call())
    talk = world.ask("talk", wait_seconds=60)
    world.prepare()
    assert talk.waits
    assert talk.ticket.waiting_for is WaitingFor.DRAINING
    world.services["paint"].computing = False
    world.prepare()
    assert talk.lease().consumer == "talk"


@pytest.mark.parametrize("mode", ["evicting", "locked"])
def test_a_load_that_fails_unloads_nobody_under_another_lease(mode: str) -> None:
    world = World(catalog(consumer("both", 4000, at_once=2)), loads=["both"], mode=mode)
    world.grant("both", loaded=True)
    world.services["both"].take(0)  # it went away by itself, so that the next one must load again

    def fails() -> None:
        raise BackendError("failed", "500")

    world.services["both"].load = fails  # type: ignore[method-assign]
    assert isinstance(world.refusal("both"), ConsumerUnhealthy)
    assert world.services["both"].asked_to_unload == 0


def test_one_that_was_never_used_and_cannot_be_asked_blocks_nobody() -> None:
    world = World(catalog(consumer("mute", 4000), consumer("paint", 14000)), when_unreadable="declared")
    world.services["mute"].can_unload = False
    world.card.unreadable = "the driver is gone"
    assert world.grant("paint").consumer == "paint"
    assert world.broker.state.memory["mute"].evictions == 0


def test_a_victim_for_whose_call_there_is_no_thread_comes_back_into_service(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(catalog(consumer("chat", 9000), consumer("paint", 14000)))
    world.services["chat"].take()

    def no_more(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        assert isinstance(world.refusal("paint"), EvictionFailed)
    assert not world.broker.state.queue.is_unloading("chat")
    assert world.grant("paint").consumer == "paint"


def test_a_call_under_a_lease_is_not_the_end_of_a_grant() -> None:
    world = World(catalog(consumer("chat", 9000), chat="chat"))
    lease = world.grant("chat")
    world.broker.end_call(world.broker.call_under_lease(lease.token, "chat"))
    assert world.broker.state.memory["chat"].last_used_at is None
