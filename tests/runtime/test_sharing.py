"""Who shares the card with whom, and who stays on it: pinned consumers, and those that coexist by size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumgr.config import Rest
from gpumgr.core.catalog import Consumer
from gpumgr.core.queue import Phase
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import HEADROOM_MIB, World, catalog, consumer

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


# -- by size ------------------------------------------------------------------------------------------------


def sized(name: str, mib: int, **more: Any) -> Consumer:
    return consumer(name, mib, by_size=True, **more)


def by_size() -> World:
    w = World(catalog(sized("chat", 12000), sized("voice", 3000), sized("paint", 14000), sized("hear", 6000)))
    w.broker.observe_card()
    return w


def test_who_fits_by_size_runs_beside_and_who_does_not_waits_in_the_line() -> None:
    w = by_size()
    chat = w.grant("chat")  # 12000 are promised, and nothing is on the card yet
    paint = w.ask("paint", wait_seconds=60)
    w.prepare()
    assert w.begun() == [], "it waits in the line, and keeps nobody from being prepared"
    voice = w.grant("voice", loaded=True)
    w.services["chat"].take()
    assert paint.waits
    shown = snapshot(w.broker)
    assert [(row["consumer"], row["waiting_for"]) for row in shown["queue"]] == [("paint", "holder")]
    assert w.broker.renew(chat.token, None).waiting == 1
    assert w.broker.renew(voice.token, None).waiting == 0
    w.broker.release(chat.token)
    w.prepare()
    assert paint.lease().consumer == "paint"
    assert kinds(w, "evict") == [("evict", "chat")], "voice is beside it, and chat made room"


def test_the_idle_stay_while_there_is_room() -> None:
    w = by_size()
    for name in ("hear", "chat"):
        w.broker.release(w.grant(name, loaded=True).token)
    w.grant("voice", loaded=True)
    assert kinds(w, "evict") == []
    w.grant("paint", loaded=True)
    assert kinds(w, "evict") == [("evict", "chat")], "one is enough, and hear alone is not"


def test_who_fits_by_size_is_no_intruder() -> None:
    w = by_size()
    lease = w.grant("paint", loaded=True)
    w.services["hear"].take()
    w.broker.observe_card()
    assert w.broker.renew(lease.token, None).intruders == ()
    w.services["voice"].take(3600)
    w.broker.observe_card()
    assert w.broker.renew(lease.token, None).intruders == ("hear", "voice")


def test_a_stranger_takes_from_what_can_be_shared() -> None:
    w = by_size()
    w.games[0].set_used(9000)
    w.broker.observe_card()
    w.grant("chat", loaded=True)
    paint = w.ask("voice", wait_seconds=60)
    w.prepare()
    assert w.begun() == []
    assert paint.waits
    w.games[0].set_used(0)
    w.broker.observe_card()
    w.prepare()
    assert paint.lease().consumer == "voice"


def test_who_has_no_size_yet_is_alone() -> None:
    unknown = replace(sized("voice", 0), auto=True, unsized=True)
    w = World(catalog(sized("chat", 9000), unknown))
    w.grant("chat")
    voice = w.ask("voice", wait_seconds=60)
    w.prepare()
    assert voice.waits


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "call", "take", "take", "release", "game"]), st.integers(0, 99)),
    min_size=10,
    max_size=25,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([3, 4, 5, 7]), min_size=3, max_size=5), ACTIONS)
def test_nothing_is_lent_twice(sizes: list[int], actions: list[tuple[str, int]]) -> None:
    """Whatever is asked, taken and given back: what was granted fits on the card together, and nobody in use goes."""
    some = [
        sized(f"c{n}", mib * 2000, at_once=1 + n % 2) if n != 2 else consumer("c2", mib * 2000)
        for n, mib in enumerate(sizes)
    ]
    w = World(catalog(*some))
    w.broker.observe_card()
    wrong: list[str] = []
    for service in w.services.values():
        service.before_unload = lambda name: wrong.extend(
            hold.consumer for hold in w.broker.state.queue.holds_of(name) if hold.phase is not Phase.PREPARING
        )
    for action, pick in actions:
        each = some[pick % len(some)]
        left = 24000 - HEADROOM_MIB - lent(w)
        if action in ("ask", "call"):
            (w.ask if action == "ask" else w.call)(each.name, wait_seconds=60)
        elif action == "take" and (each.name in granted(w) or each.needs_mib(0) <= left):
            w.services[each.name].take()
        elif action == "game":
            w.games[0].set_used(min(pick * 20, w.card.used_mib(w.games[0].pid, 0) + max(0, left)))
        elif action == "release" and (leases := list(w.broker.state.leases)):
            w.broker.release(leases[pick % len(leases)].token)
        elif action == "release" and (calls := list(w.broker.state.calls.values())):
            w.broker.end_call(calls[pick % len(calls)])
        w.broker.observe_card()
        w.prepare()
        w.broker.observe_card()
        assert lent(w) <= 24000 - HEADROOM_MIB
        assert not wrong


def lent(w: World) -> int:
    """MiB that are on the card, and those that holders may still take."""
    held = {name: service.used_mib() for name, service in w.services.items()}
    sizes = {name: w.catalog.consumers[name].needs_mib(0) for name in granted(w)}
    return sum(max(mib, sizes.get(name, 0)) for name, mib in held.items()) + w.card.used_mib(w.games[0].pid, 0)


def granted(w: World) -> set[str]:
    return {hold.consumer for hold in w.broker.state.queue.holds.values() if hold.phase is not Phase.PREPARING}
