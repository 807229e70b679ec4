"""Who shares the card with whom, and who stays on it: pinned consumers."""

from __future__ import annotations

from typing import Any

from gpumgr.config import Rest
from tests.worlds import World, catalog, consumer

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000)
VOICE = consumer("voice", 3000, pinned=True)


def kinds(w: World, *types: str) -> list[tuple[str, Any]]:
    return [(event["type"], event["consumer"]) for event in w.broker.state.events if event["type"] in types]


def test_a_proxied_call_runs_beside_who_is_pinned_and_a_lease_does_not() -> None:
    w = World(catalog(PAINT, CHAT, VOICE))
    w.services["voice"].take()
    w.services["chat"].take()
    call = w.call("paint")
    w.prepare()
    assert w.services["chat"].asked_to_unload == 1
    assert w.services["voice"].asked_to_unload == 0
    w.broker.end_call(call.call())
    w.services["paint"].take()
    w.grant("chat")
    assert kinds(w, "evict") == [("evict", "chat"), ("evict", "paint"), ("evict", "voice")]


def test_who_is_pinned_keeps_away_what_nobody_asked_for() -> None:
    w = World(catalog(PAINT, CHAT, VOICE), rest={"paint": Rest(preload=True)})
    w.services["paint"].can_restore = True
    w.services["voice"].take()
    w.services["chat"].take()
    w.broker.observe_card()
    refused: list[Any] = []
    w.broker.housekeeping._bring_back = lambda name: refused.append(w.refusal(name, restoring=True, wait_seconds=0))
    w.broker.housekeeping.round()
    assert [error.code for error in refused] == ["insufficient_vram"]
    assert all(service.asked_to_unload == 0 for service in w.services.values())


def test_a_hold_frees_the_card_of_who_is_pinned() -> None:
    w = World(catalog(VOICE))
    w.services["voice"].take()
    w.broker.observe_card()
    w.broker.housekeeping.round()
    assert w.services["voice"].asked_to_unload == 0
    w.broker.outsiders.hold(None, None, None)
    w.broker.housekeeping.round()
    assert w.services["voice"].asked_to_unload == 1
