"""An operator's hold, games, strangers' peaks, intruders, and the card at rest, with the broker at work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpumgr.config import Rest
from gpumgr.core.outside import Pause
from gpumgr.core.placement import Report
from gpumgr.errors import GpuYielded, InsufficientVram, SchedulerTimeout
from gpumgr.runtime import preparation
from gpumgr.runtime.ports import BackendError, StoreError
from gpumgr.runtime.snapshot import hold_facts, snapshot
from tests.waiting import until
from tests.worlds import Service, StartedWorld, World, catalog, consumer, started

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear"])
HEAR = consumer("hear", 2000, beside=["chat"])


def world(**settings: Any) -> World:
    return World(catalog(PAINT, CHAT, HEAR), **settings)


def keep_house(w: World) -> None:
    w.broker.observe_card()
    w.broker.housekeeping.round()
    w.broker.observe_card()


def events(w: World, kind: str) -> list[dict[str, Any]]:
    return [event for event in w.broker.state.events if event["type"] == kind]


# -- hold ---------------------------------------------------------------------------------------------------


def test_a_hold_refuses_who_comes_and_who_waits_and_says_who_and_until_when() -> None:
    w = world()
    w.grant("paint", loaded=True)
    waiting = w.ask("chat", wait_seconds=60)
    w.broker.outsiders.hold("bg3", 3600, "ada")
    w.wake()
    for error in (waiting.error(), w.refusal("hear")):
        assert isinstance(error, GpuYielded)
        assert (error.details["cause"], error.details["by"], error.details["reason"]) == ("hold", "ada", "bg3")
        assert error.details["until_at"] == w.broker.state.shown(w.now + 3600)
        assert error.details["until_at"] in error.message
    assert w.broker.outsiders.resume("ada")
    assert not w.broker.outsiders.resume("ada")
    again = w.ask("chat")
    assert again.waits


def test_a_hold_drains_and_then_frees_the_card() -> None:
    w = world()
    lease = w.grant("chat", loaded=True)
    w.services["hear"].take()
    keep_house(w)
    w.broker.outsiders.hold(None, None, None)
    renewed = w.broker.renew(lease.token, None)
    assert isinstance(renewed.yield_to, Pause)
    assert hold_facts(w.broker)["hold"]["state"] == "draining"
    keep_house(w)
    assert (w.services["hear"].asked_to_unload, w.services["chat"].asked_to_unload) == (1, 0)
    w.broker.release(lease.token)
    assert hold_facts(w.broker)["hold"]["state"] == "unloading"
    keep_house(w)
    assert hold_facts(w.broker)["hold"]["state"] == "free"
    assert w.services["chat"].used_mib() == 300
    assert [event["why"] for event in events(w, "evict")] == ["hold", "hold"]


def test_work_that_goes_on_is_not_unloaded_for_a_hold() -> None:
    w = world()
    w.services["paint"].take()
    w.services["paint"].computing = True
    w.broker.outsiders.hold(None, None, None)
    keep_house(w)
    assert w.services["paint"].asked_to_unload == 0
    w.services["paint"].computing = False
    keep_house(w)
    assert (w.services["paint"].asked_to_unload, w.services["paint"].unloads_while_computing) == (1, 0)


def test_a_preparation_under_way_ends_with_the_hold() -> None:
    w = world()
    w.services["chat"].take()
    caller = w.ask("paint")
    [seq] = w.begun()

    def hold(_: str) -> None:
        w.broker.outsiders.hold("a game", None, None)

    w.services["chat"].before_unload = hold
    w.step(seq)
    assert isinstance(caller.error(), GpuYielded)
    w.prepare()
    assert not w.broker.state.queue.holds


def test_a_hold_survives_a_restart_and_ends_by_itself() -> None:
    w = world()
    w.broker.outsiders.hold("bg3", 100, "ada")
    w.restart()
    assert isinstance(w.refusal("chat"), GpuYielded)
    w.pass_time(99.9, watchdog=True)
    w.broker.tick()
    assert isinstance(w.refusal("chat"), GpuYielded)
    w.pass_time(0.2)
    w.broker.tick()
    assert w.grant("chat").consumer == "chat"
    assert events(w, "resume")[-1]["reason"] == "its time is over"


def test_a_hold_ends_by_the_wall_clock_where_the_machine_slept() -> None:
    w = world()
    w.broker.outsiders.hold("bg3", 100, "ada")
    w.sleep(101)
    w.broker.tick()
    assert w.grant("chat").consumer == "chat"


def test_a_hold_needs_no_disk() -> None:
    w = world()
    w.store.fails = StoreError("it is full")
    w.broker.outsiders.hold(None, 100, None)
    assert isinstance(w.refusal("chat"), GpuYielded)


def test_a_hold_counts_in_every_mode_and_unloads_in_none_that_does_not() -> None:
    for mode in ("locked", "passthrough"):
        w = world(mode=mode)
        w.services["chat"].take()
        w.broker.outsiders.hold(None, None, None)
        keep_house(w)
        assert isinstance(w.refusal("chat"), GpuYielded)
        assert w.services["chat"].asked_to_unload == 0


# -- games --------------------------------------------------------------------------------------------------


def play(w: World, *games: tuple[int, str]) -> None:
    w.running.found = list(games)
    w.broker.outsiders.look_for_games()


def test_a_game_clears_the_idle_asks_holders_and_lets_in_what_fits_beside_it() -> None:
    w = world(gpu={"yield_reserve_mib": 6144})
    lease = w.grant("chat", loaded=True)
    w.services["hear"].take()
    keep_house(w)
    play(w, (41, "bg3.exe"))
    keep_house(w)
    assert w.services["hear"].asked_to_unload == 1
    told = w.broker.renew(lease.token, None).yield_to
    assert told is not None
    assert "bg3.exe (pid 41)" in told.words
    w.broker.release(lease.token)
    keep_house(w)
    assert w.services["chat"].used_mib() == 300
    w.games[0].set_used(8000)
    error = w.refusal("paint")  # 24000 - 512 - 8000 - 6144 is less than 14000
    assert isinstance(error, GpuYielded)
    assert (error.details["cause"], error.details["name"], error.details["pid"]) == ("game", "bg3.exe", 41)
    assert w.grant("chat").consumer == "chat"
    play(w)
    assert snapshot(w.broker)["games"] == []
    assert [len(events(w, kind)) for kind in ("game", "game_over")] == [1, 1]


def test_a_refusal_for_a_game_unloads_nobody() -> None:
    w = world()
    w.games[0].set_used(8000)
    play(w, (41, "bg3.exe"))
    w.broker.observe_card()
    w.services["chat"].take()
    assert isinstance(w.refusal("paint"), GpuYielded)
    assert w.services["chat"].asked_to_unload == 0


def test_a_game_that_took_less_than_its_reserve_is_no_lack_of_memory() -> None:
    """Retryable: it ends some time, unlike a card that is too small."""
    w = world(gpu={"yield_reserve_mib": 12000})
    w.services["chat"].computing = True
    w.services["chat"].take()
    play(w, (41, "bg3.exe"))
    assert isinstance(w.refusal("paint"), GpuYielded)


def test_who_waits_when_a_game_begins_is_told_at_once() -> None:
    w = world()
    w.grant("chat", loaded=True)
    caller = w.ask("paint", wait_seconds=60)
    w.games[0].set_used(8000)
    w.broker.observe_card()
    play(w, (41, "bg3.exe"))
    w.wake()
    assert isinstance(caller.error(), GpuYielded)


def test_a_proxied_call_does_not_push_a_game_out() -> None:
    w = world()
    w.games[0].set_used(8000)
    w.broker.observe_card()
    play(w, (41, "bg3.exe"))
    with pytest.raises(GpuYielded):
        w.call("paint")


def test_what_is_larger_than_the_card_is_no_games_doing() -> None:
    w = World(catalog(consumer("huge", 30000)))
    play(w, (41, "bg3.exe"))
    assert isinstance(w.refusal("huge"), InsufficientVram)


def test_a_report_that_hangs_delays_nobody_else() -> None:
    w = world()
    paint, chat = w.services["paint"], w.services["chat"]
    paint.computing, chat.computing = False, BackendError("hung", "no answer in time")
    chat.take()
    paint.take()
    w.broker.observe_card()
    preparation.ask_busy(w.broker.state, "chat", chat)  # it said nothing the last time
    ask, seen = chat.busy, []

    def busy() -> bool | None:
        seen.append(paint.asked_to_unload)
        return ask()

    chat.busy = busy  # type: ignore[method-assign]
    w.broker.outsiders.hold(None, None, None)
    keep_house(w)
    assert seen == [1]


def test_a_game_on_another_card_is_nobodys_business() -> None:
    other = consumer("other", 14000, gpus=(1,))
    w = World(catalog(PAINT, other), totals_mib=(24000, 24000), gpu={"yield_gpus": (0,)})
    play(w, (41, "bg3.exe"))
    w.games[0].set_used(8000)
    w.broker.observe_card()
    assert w.grant("other").consumer == "other"
    assert isinstance(w.refusal("paint"), GpuYielded)


# -- strangers ----------------------------------------------------------------------------------------------


def test_a_trough_is_not_lent() -> None:
    w = world(gpu={"untracked_peak_seconds": 300})
    w.games[0].set_used(12000)
    w.broker.observe_card()
    w.games[0].set_used(2000)
    error = w.refusal("paint")
    assert isinstance(error, InsufficientVram)
    assert error.details["kept_mib"] == 10000
    assert error.details["lately"][0]["peak_mib"] == 12000
    assert "lately 12000 MiB, there for 0 s" in error.message
    assert "it fits once game.exe has gone" in error.message
    w.pass_time(301)
    assert w.grant("paint").consumer == "paint"


def test_a_backend_that_is_taken_for_a_stranger_gives_back_for_good() -> None:
    """Its process cannot be attributed and stays after the unload: it is not held at what it had before."""
    w = World(catalog(consumer("paint", 18000), CHAT, HEAR), gpu={"untracked_peak_seconds": 300})
    chat = w.services["chat"]
    w.probe._owner_of_port = {port: name for port, name in w.probe._owner_of_port.items() if name != "chat"}
    chat.loaded = lambda: Report(loaded=chat.used_mib() > 768, used_mib=chat.used_mib())  # type: ignore[method-assign]
    chat.take()
    w.broker.observe_card()
    assert w.grant("paint").consumer == "paint"
    assert chat.used_mib() == 300


def test_a_refusal_says_who_could_go_and_since_when_the_stranger_is_there() -> None:
    w = World(catalog(consumer("big", 20000, beside=["hear"]), consumer("hear", 2000, beside=["big"])))
    w.grant("hear", loaded=True)
    w.games[0].set_used(9000)
    w.broker.observe_card()
    w.pass_time(600)
    w.grant("hear", loaded=True)
    error = w.refusal("big", wait_seconds=1)
    assert isinstance(error, InsufficientVram)
    assert error.details["could_go"] == [{"consumer": "hear", "held_mib": 2000}]
    assert error.details["lately"][0]["there_seconds"] == 600
    assert "there for 10 min" in error.message


# -- intruders ----------------------------------------------------------------------------------------------


def test_an_intruder_is_told_and_unloaded_and_ends_no_lease() -> None:
    w = world()
    lease = w.grant("paint", loaded=True)
    w.broker.observe_card()
    w.services["chat"].take(5000)
    w.broker.observe_card()
    assert w.broker.renew(lease.token, None).intruders == ("chat",)
    [event] = events(w, "intruder")
    assert (event["consumer"], event["beside"]) == ("chat", "paint")
    w.broker.observe_card()
    assert len(events(w, "intruder")) == 1
    keep_house(w)
    assert w.services["chat"].used_mib() == 300
    assert w.broker.renew(lease.token, None).intruders == ()
    assert events(w, "evict")[-1]["why"] == "intruder"


def test_an_intruder_that_computes_is_left_until_it_is_done() -> None:
    w = world()
    w.services["chat"].computing = False
    w.grant("paint", loaded=True)
    w.services["chat"].computing = True
    w.services["chat"].take(5000)
    keep_house(w)
    assert w.services["chat"].asked_to_unload == 0
    w.services["chat"].computing = False
    keep_house(w)
    assert (w.services["chat"].asked_to_unload, w.services["chat"].unloads_while_computing) == (1, 0)


def test_who_may_stand_beside_is_no_intruder() -> None:
    w = world()
    lease = w.grant("chat", loaded=True)
    w.services["hear"].take()
    w.broker.observe_card()
    assert w.broker.renew(lease.token, None).intruders == ()


def test_an_intruder_that_keeps_its_memory_is_asked_again_later() -> None:
    w = world()
    w.grant("paint", loaded=True, ttl_seconds=600)
    w.services["chat"].lies = True
    w.services["chat"].take(5000)
    keep_house(w)
    asked = w.services["chat"].asked_to_unload
    keep_house(w)
    assert w.services["chat"].asked_to_unload == asked
    assert len(events(w, "evict_failed")) == 1
    w.pass_time(10.1)
    keep_house(w)
    assert w.services["chat"].asked_to_unload > asked


# One that hung in its unload kept all others on the card until its time was over, 30 s as a rule.
def test_an_unload_that_hangs_keeps_nobody_else_on_the_card() -> None:
    hear = consumer("hear", 2000, beside=["chat"], unload_timeout_seconds=30)
    with started(CHAT, hear, rest={"hear": Rest(idle_unload_seconds=0.1)}) as w:
        w.services["hear"].unload_gate = threading.Event()
        w.services["hear"].take()
        w.services["chat"].take()
        until(lambda: w.services["hear"].asked_to_unload == 1)
        w.broker.outsiders.hold(None, None, None)
        until(lambda: w.services["chat"].used_mib() == 300)
        assert w.services["hear"].used_mib() == 2000
        w.services["hear"].unload_gate.set()
        until(lambda: w.services["hear"].used_mib() == 300)


# -- the card at rest ---------------------------------------------------------------------------------------


def test_who_was_idle_for_long_is_unloaded() -> None:
    w = world(rest={"chat": Rest(idle_unload_seconds=60)})
    lease = w.grant("chat", loaded=True)
    w.broker.observe_card()
    w.pass_time(100)
    keep_house(w)
    assert w.services["chat"].asked_to_unload == 0  # its lease lasts
    w.broker.release(lease.token)
    w.pass_time(59)
    keep_house(w)
    assert w.services["chat"].asked_to_unload == 0
    w.pass_time(2)
    keep_house(w)
    assert w.services["chat"].used_mib() == 300
    assert events(w, "evict")[-1]["why"] == "idle"


def test_direct_use_begins_the_rest_anew() -> None:
    w = world(rest={"chat": Rest(idle_unload_seconds=60)})
    w.services["chat"].take()
    w.services["chat"].computing = True
    keep_house(w)
    w.pass_time(61)
    keep_house(w)
    w.services["chat"].computing = False
    keep_house(w)
    assert w.services["chat"].asked_to_unload == 0
    w.pass_time(61)
    keep_house(w)
    assert w.services["chat"].asked_to_unload == 1


def test_who_was_unloaded_for_somebody_comes_back() -> None:
    with started(PAINT, CHAT, rest={"chat": Rest(restore=True, restore_after_seconds=0.2)}) as w:
        w.services["chat"].can_restore = True
        w.services["chat"].take()
        lease = w.lease("paint")
        assert w.services["chat"].used_mib() < 768
        w.services["paint"].take()
        w.broker.release(lease.token)
        until(lambda: w.services["chat"].used_mib() == 9000)
        until(lambda: any(event["type"] == "restore" for event in w.broker.state.events))
        assert w.services["paint"].used_mib() < 768
        assert w.store.intents == []
        shown = {c["name"]: c for c in snapshot(w.broker)["consumers"]}
        assert shown["chat"]["total_requests"] == 0
        assert w.lease("paint").consumer == "paint"  # and whoever asks comes first again


def test_preload_is_for_the_start() -> None:
    with started(PAINT, CHAT, rest={"chat": Rest(preload=True)}) as w:
        w.services["chat"].can_restore = True
        until(lambda: w.services["chat"].used_mib() == 9000)
        lease = w.lease("paint")
        w.broker.release(lease.token)
        assert w.services["chat"].used_mib() < 768


def test_nobody_makes_room_for_a_preload() -> None:
    big = consumer("big", 20000, beside=["chat"])
    chat = consumer("chat", 9000, beside=["big"])
    with started(big, chat, rest={"chat": Rest(preload=True)}) as w:
        w.services["chat"].can_restore = True
        w.services["big"].take()
        until(lambda: w.broker.state.memory["chat"].load_not_before > w.clock.monotonic())
        assert (w.services["big"].asked_to_unload, w.services["chat"].used_mib()) == (0, 0)


class _SlowRestore:
    """A restore that the test lets end; later ones do so at once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.called, self.may_return = threading.Event(), threading.Event()
        self.count = 0
        service.restore, service.can_restore = self, True  # type: ignore[method-assign]

    def __call__(self) -> None:
        self.count += 1
        self.called.set()
        self.may_return.wait(10)
        self._service.take()


def _asked_while_it_is_brought_back(w: StartedWorld, name: str) -> _SlowRestore:
    """``chat`` was unloaded for ``paint`` and comes back; then somebody asks for ``name``, and has held it."""
    restore = _SlowRestore(w.services["chat"])
    w.services["chat"].take()
    w.broker.release(w.lease("paint").token)
    assert restore.called.wait(10)
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(w.lease, name, wait_seconds=30)
        until(lambda: bool(w.broker.state.queue.waiting()))
        restore.may_return.set()
        w.broker.release(asked.result(10).token)
    return restore


# A restore that somebody's request had interrupted was never tried again: its own undoing had cleared the wish.
def test_a_restore_that_is_interrupted_is_made_up_for() -> None:
    with started(PAINT, CHAT, rest={"chat": Rest(restore=True, restore_after_seconds=0.2)}) as w:
        restore = _asked_while_it_is_brought_back(w, "paint")
        until(lambda: restore.count == 2)
        until(lambda: any(event["type"] == "restore" for event in w.broker.state.events))


# Whoever asked for the very one that came back waited for its load, for its unload, and loaded it anew.
def test_what_comes_back_stays_for_who_asks_for_it() -> None:
    with started(PAINT, CHAT, rest={"chat": Rest(restore=True, restore_after_seconds=0.2)}) as w:
        _asked_while_it_is_brought_back(w, "chat")
        assert (w.services["chat"].asked_to_unload, w.services["chat"].used_mib()) == (1, 9000)


# What had failed to come back was not unloaded for five minutes either, whoever had loaded it meanwhile.
def test_who_could_not_be_brought_back_is_in_nobodys_way() -> None:
    w = world(rest={"chat": Rest(preload=True)})
    w.services["chat"].can_restore = True
    w.broker.housekeeping._bring_back = lambda _: SchedulerTimeout("somebody was first")
    keep_house(w)
    w.services["chat"].take()
    play(w, (41, "bg3.exe"))
    keep_house(w)
    assert w.services["chat"].used_mib() == 300


def test_a_use_that_ended_since_it_was_asked_counts_as_work() -> None:
    w = world()
    chat = w.services["chat"]
    chat.take()
    chat.computing = False
    says = chat.busy

    def busy() -> bool | None:
        """A lease comes and goes while its answer is on its way, and leaves work behind."""
        said = says()
        if chat.asked_whether_busy == 1:
            w.broker.release(w.grant("chat").token)
            chat.computing = True
        return said

    play(w, (41, "bg3.exe"))
    w.broker.observe_card()
    chat.busy = busy  # type: ignore[method-assign]
    keep_house(w)
    assert (chat.asked_whether_busy, chat.asked_to_unload) == (1, 0)
    keep_house(w)
    chat.computing = False
    keep_house(w)
    assert (chat.asked_to_unload, chat.unloads_while_computing) == (1, 0)


def test_nothing_is_brought_back_where_calls_only_pass() -> None:
    w = world(mode="passthrough", rest={"chat": Rest(preload=True)})
    w.services["chat"].can_restore = True
    keep_house(w)
    assert (w.services["chat"].used_mib(), events(w, "restore")) == (0, [])
