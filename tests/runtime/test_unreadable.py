"""A driver that cannot be read: leases are refused or rest on declared sizes, calls go on, and it comes back."""

from __future__ import annotations

from typing import Any

import pytest

from gpumgr.core.lease import Call, Lease
from gpumgr.core.placement import Report
from gpumgr.errors import EvictionFailed, GpuUnreadable, InsufficientVram
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import World, catalog, consumer

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear"])
HEAR = consumer("hear", 2000, beside=["chat"])


def world(when_unreadable: str, **settings: Any) -> World:
    return World(catalog(PAINT, CHAT, HEAR), when_unreadable=when_unreadable, **settings)


def lose_driver(w: World) -> None:
    w.card.unreadable = "the NVIDIA kernel driver is not loaded"
    w.broker.observe_card()


def test_refuse_grants_no_lease_and_lets_calls_go_on() -> None:
    w = world("refuse")
    lose_driver(w)
    assert isinstance(w.refusal("paint"), GpuUnreadable)
    caller = w.call("paint")
    w.prepare()
    call = caller.call()
    w.broker.end_call(call)
    w.card.unreadable = None
    assert isinstance(w.grant("paint"), Lease)


def test_a_call_without_a_reading_unloads_who_may_not_stay_as_well_as_it_can() -> None:
    w = world("refuse")
    w.broker.release(w.grant("chat", loaded=True).token)
    lose_driver(w)
    caller = w.call("paint")
    w.prepare()
    assert isinstance(caller.call(), Lease | Call)
    assert w.services["chat"].asked_to_unload == 1


def test_declared_sizes_stand_in_for_the_reading() -> None:
    w = world("declared")
    w.broker.release(w.grant("chat", loaded=True).token)
    lose_driver(w)
    lease = w.grant("paint")
    assert (lease.gpus, lease.gpu_uuids) == ((0,), ("GPU-0",))
    assert w.services["chat"].asked_to_unload == 1
    evicted = [e for e in w.broker.state.events if e["type"] == "evict" and e["consumer"] == "chat"]
    assert [e["proof"] for e in evicted] == ["its own word: the card could not be read"]
    told = snapshot(w.broker)
    assert (told["when_unreadable"], told["gpus"][0]["readable"]) == ("declared", False)
    assert w.broker.missing() == ["the broker has not started yet"]


def test_declared_sizes_that_do_not_fit_are_refused() -> None:
    w = World(catalog(consumer("chat", 9000, beside=["hear"]), consumer("hear", 16000, beside=["chat"])))
    w.broker.state.believes = True
    w.grant("chat", loaded=True)
    lose_driver(w)
    caller = w.ask("hear", wait_seconds=0)
    w.prepare()
    w.pass_time(0.1)
    assert caller.error().code == "scheduler_timeout"  # it fits once chat has ended


def test_a_stranger_of_the_last_reading_still_counts() -> None:
    w = world("declared")
    w.games[0].set_used(11000)
    w.broker.observe_card()
    lose_driver(w)
    caller = w.ask("paint")
    w.prepare()  # what was unloaded may still be falling
    w.prepare()
    error = caller.error()
    assert isinstance(error, InsufficientVram)
    assert error.details["untracked"][0]["name"] == "game.exe"


def test_a_victim_that_says_it_is_still_loaded_has_given_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world("declared")
    w.broker.release(w.grant("chat", loaded=True).token)
    lose_driver(w)
    monkeypatch.setattr(w.services["chat"], "loaded", lambda: Report(loaded=True, used_mib=9000))
    error = w.refusal("paint")
    assert isinstance(error, EvictionFailed)


def test_it_comes_back_by_itself() -> None:
    w = world("declared")
    lose_driver(w)
    w.card.unreadable = None
    w.games[0].set_used(15000)
    assert isinstance(w.refusal("paint"), InsufficientVram)
    assert snapshot(w.broker)["gpus"][0]["readable"]
