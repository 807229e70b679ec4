"""Taking gpumgr into use step by step: locked lends turns and unloads nobody, passthrough only watches."""

from __future__ import annotations

from typing import Any

from gpumgr.core.lease import Call, Lease
from gpumgr.errors import InsufficientVram
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import World, catalog, consumer, request

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear"])
HEAR = consumer("hear", 2000, beside=["chat"])


def world(mode: str, **settings: Any) -> World:
    return World(catalog(PAINT, CHAT, HEAR), mode=mode, **settings)


def would(of: World) -> list[tuple[str, Any]]:
    told = [event for event in of.broker.state.events if event["type"].startswith("would_")]
    return [(e["type"], e.get("victims") or e.get("code") or e.get("behind") or e.get("waiting_for")) for e in told]


def test_locked_lends_turns_and_unloads_nobody() -> None:
    w = world("locked")
    w.services["chat"].take()
    lease = w.grant("paint")
    rival = w.ask("chat")
    w.prepare()
    assert rival.waits
    assert w.services["chat"].asked_to_unload == 0
    assert would(w) == [("would_evict", ["chat"])]
    w.broker.release(lease.token)
    w.prepare()
    assert isinstance(rival.lease(), Lease | Call)


def test_locked_still_refuses_what_does_not_fit() -> None:
    w = world("locked")
    w.services["chat"].take()
    w.games[0].set_used(3000)
    error = w.refusal("paint")
    assert isinstance(error, InsufficientVram)
    assert "idle on the card: chat 9000 MiB" in error.message
    assert w.services["chat"].asked_to_unload == 0
    assert would(w) == [("would_evict", ["chat"])]


def test_in_passthrough_nothing_waits_and_nothing_is_unloaded() -> None:
    w = world("passthrough")
    w.services["chat"].take()
    w.broker.observe_card()
    first = w.ask("paint").lease()
    second = w.ask("chat").lease()
    third = w.ask("paint", wait_seconds=0).lease()
    call = w.call("paint").call()
    assert w.begun() == []
    assert [s.asked_to_unload for s in w.services.values()] == [0, 0, 0]
    assert len({first.fence, second.fence, third.fence}) == 3
    assert would(w)[0] == ("would_evict", ["chat"])
    assert ("would_wait", ["paint"]) in would(w)
    assert ("would_wait", ["paint", "chat"]) in would(w)
    assert w.broker.renew(first.token, None)[1] == 0
    w.broker.end_call(call)
    for lease in (first, second, third):
        assert w.broker.release(lease.token)
    assert w.broker.state.queue.holds == {}


def test_in_passthrough_nothing_is_refused() -> None:
    w = world("passthrough")
    w.games[0].set_used(15000)
    w.services["paint"].unhealthy = "down"
    w.broker._observe_servers()
    w.broker.observe_card()
    assert isinstance(w.ask("paint").lease(), Lease | Call)
    assert would(w) == [("would_refuse", "consumer_unhealthy"), ("would_refuse", "insufficient_vram")]


def test_in_passthrough_what_can_never_fit_is_granted_and_told() -> None:
    w = world("passthrough", totals_mib=(8000,))
    assert isinstance(w.ask("paint").lease(), Lease | Call)
    assert would(w) == [("would_refuse", "insufficient_vram")]


def test_in_passthrough_a_request_id_still_names_one_lease() -> None:
    w = world("passthrough")
    key = request("a")
    lease = w.ask("paint", request=key).lease()
    assert w.broker.state.leases.of_request(key, "paint", w.now) == lease


def test_in_passthrough_an_unreadable_card_is_no_reason_either() -> None:
    w = world("passthrough")
    w.card.unreadable = "the driver is away"
    w.broker.observe_card()
    assert isinstance(w.ask("paint").lease(), Lease | Call)
    assert would(w) == [("would_refuse", "gpu_unreadable")]


def test_status_tells_the_mode() -> None:
    assert snapshot(world("locked").broker)["mode"] == "locked"
