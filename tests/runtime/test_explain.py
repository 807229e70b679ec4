"""What would happen, told without doing it: and then done, to compare."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumgr.core.catalog import Consumer
from gpumgr.core.lease import Lease
from gpumgr.errors import ConsumerUnknown, GpumgrError, InvalidRequest, QueueFull
from gpumgr.runtime.preparation import ask_busy
from gpumgr.runtime.ticket import Ask
from tests.worlds import World, catalog, consumer, request

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear"])
HEAR = consumer("hear", 2000, beside=["chat"])


def world(*consumers: Consumer, **more: Any) -> World:
    return World(catalog(*(consumers or (PAINT, CHAT, HEAR))), **more)


def explain(w: World, name: str, **words: Any) -> dict[str, Any]:
    return w.broker.explainer.explain(Ask(consumer=name, **words))


def everything(w: World) -> dict[str, Any]:
    """All that the broker knows and that was written or asked, but for the instant of the last reading."""
    state = w.broker.state
    with state.lock:
        return {
            "line": [entry.seq for entry in state.queue.waiting()],
            "holds": copy.deepcopy(dict(state.queue.holds)),
            "stays": dict(state.queue.stays),
            "next": state.queue._seq,
            "tickets": {seq: (t.outcome, t.prepare_limit, t.waiting_for, t.step) for seq, t in state.tickets.items()},
            "requests": dict(state.by_request),
            "leases": list(state.leases),
            "memory": copy.deepcopy(state.memory),
            "events": list(state.events),
            "changes": (state.changes, state.ends, len(state.begun), state.ledger.changes),
            "written": (w.store.writes, list(w.store.intents)),
            "asked": {
                name: (s.asked_to_unload, s.asked_whether_busy, s.asked_for_health) for name, s in w.services.items()
            },
        }


def test_granted_at_once() -> None:
    w = world()
    told = explain(w, "paint")
    assert (told["outcome"], told["unloads"], told["refusal"]) == ("granted", [], None)
    assert told["message"] == "paint would be granted at once"
    assert told["asked"] is False


def test_who_would_be_unloaded_and_how_long_that_takes() -> None:
    w = world()
    for name in ("paint", "chat"):  # so that both are known
        lease = w.grant(name, loaded=True)
        w.broker.observe_card()
        w.pass_time(5)
        w.broker.observe_card()
        w.broker.release(lease.token)
        w.broker.observe_card()
    told = explain(w, "paint")
    assert told["outcome"] == "unload"
    (unload,) = told["unloads"]
    assert (unload["consumer"], unload["required"], unload["held_mib"]) == ("chat", True, 9000)
    assert unload["seconds"] is None, "it was not unloaded yet"
    w.broker.release(w.grant("paint", loaded=True).token)
    w.broker.release(w.grant("chat", loaded=True).token)
    (unload,) = explain(w, "paint")["unloads"]
    assert unload["returns_mib"] == 9000 - 300, "as after its last unload"
    assert unload["seconds"] is not None
    assert "chat gives back 8700 MiB, usually in" in explain(w, "paint")["message"]
    assert w.services["chat"].asked_to_unload == 1


def test_what_it_would_wait_for() -> None:
    w = world()
    lease = w.grant("chat", holder="assistant")
    w.ask("paint", holder="imagen", wait_seconds=60)
    w.pass_time(12)
    told = explain(w, "paint")
    assert (told["outcome"], told["waiting_for"], told["ahead"]) == ("wait", "holder", 1)
    assert told["ahead_first"] == [{"consumer": "paint", "holder": "imagen", "waiting_seconds": 12.0}]
    (holder,) = told["holders"]
    assert (holder["holder"], holder["lease_id"], holder["held_seconds"]) == ("assistant", lease.lease_id, 12.0)
    assert holder["expires_at"] == w.broker.state.shown(lease.expires_at)
    assert "assistant has held chat for 12 s" in told["message"]
    assert "1 request is ahead of it" in told["message"]
    never = explain(w, "paint", wait_seconds=0)
    assert (never["outcome"], never["refusal"]["code"]) == ("refused", "scheduler_timeout")


def test_it_waits_for_memory_that_a_holder_has() -> None:
    big = consumer("big", 20000, beside=["hear"])
    w = world(big, consumer("hear", 6000, beside=["big"]))
    w.grant("hear", loaded=True)
    told = explain(w, "big")
    assert (told["outcome"], told["waiting_for"], told["short_mib"]) == ("wait", "vram", 20000 + 512 - 18000)
    assert [holder["consumer"] for holder in told["holders"]] == ["hear"]


def test_why_it_would_be_refused() -> None:
    w = world()
    w.games[0].set_used(12000)
    told = explain(w, "paint")
    assert (told["outcome"], told["refusal"]["code"]) == ("refused", "insufficient_vram")
    assert told["refusal"] == w.refusal("paint").to_wire()["error"]
    w.broker.outsiders.hold("bg3", 3600, "ada")
    assert explain(w, "hear")["refusal"] == w.refusal("hear").to_wire()["error"]


def test_a_refusal_that_unloads_somebody_first_says_so() -> None:
    w = world()
    w.services["chat"].take()
    w.games[0].set_used(11000)
    told = explain(w, "paint")
    assert (told["outcome"], [each["consumer"] for each in told["unloads"]]) == ("refused", ["chat"])
    assert told["refusal"]["details"]["evicted"] == ["chat"]
    assert w.services["chat"].asked_to_unload == 0


def test_a_broken_store_an_unhealthy_service_a_shutdown() -> None:
    w = world()
    w.services["paint"].unhealthy = "500"
    w.refusal("paint")
    assert explain(w, "paint")["refusal"] == w.refusal("paint").to_wire()["error"]
    w.broker.state.store_error = "the disk is full"
    assert explain(w, "chat")["refusal"]["code"] == "store_unavailable"
    w.broker.state.stopping = True
    assert explain(w, "chat")["refusal"]["code"] == "shutting_down"


def test_modes_hold_for_it_too() -> None:
    w = world(mode="locked")
    w.services["chat"].take()
    assert explain(w, "hear")["outcome"] == "granted"
    told = explain(w, "paint")
    assert (told["outcome"], told["unloads"]) == ("granted", []), "there is room beside chat, which is tolerated"
    w.games[0].set_used(3000)
    assert explain(w, "paint")["refusal"] == w.refusal("paint").to_wire()["error"]
    passing = world(mode="passthrough")
    passing.services["chat"].take(20000)
    assert explain(passing, "paint")["outcome"] == "granted"


def test_a_request_that_is_known_already() -> None:
    w = world()
    lease = w.grant("chat", request=request("r1"))
    assert explain(w, "chat", request=request("r1"))["lease_id"] == lease.lease_id
    assert explain(w, "hear", request=request("r1"))["refusal"]["code"] == "request_mismatch"
    w.ask("paint", request=request("r2"))
    told = explain(w, "paint", request=request("r2"))
    assert (told["outcome"], told["joins"], told["waiting_for"], told["ahead"]) == ("wait", True, "holder", 0)
    w.broker.release(lease.token)
    assert explain(w, "chat", request=request("r1"))["refusal"]["code"] == "request_ended"


def test_a_request_that_housekeeping_makes_is_in_nobody_s_way() -> None:
    w = world()
    w.grant("chat")
    w.ask("paint", restoring=True, wait_seconds=60)
    assert explain(w, "hear")["outcome"] == "granted", "an acquire withdraws it"
    assert len(w.broker.state.tickets) == 1


def test_no_place_to_wait() -> None:
    told = world().broker.explainer.refused(Ask(consumer="paint"), QueueFull("all places are taken", places=4))
    assert (told["outcome"], told["refusal"]["code"]) == ("refused", "queue_full")


def test_words_that_are_wrong_are_errors() -> None:
    w = world()
    with pytest.raises(ConsumerUnknown):
        explain(w, "nobody")
    with pytest.raises(InvalidRequest):
        explain(w, "paint", holder_pid=4_000_000)


NAMES = ("a", "b", "c", "d")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "take", "take", "release", "direct", "direct", "game", "pause", "busy"]),
        st.sampled_from(NAMES),
        st.integers(0, 5),
    ),
    min_size=5,
    max_size=14,
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([2, 5, 9, 12]), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    STEPS,
    st.sampled_from(NAMES),
    st.sampled_from([0.0, 60.0]),
    st.sampled_from(["evicting"] * 6 + ["locked", "passthrough"]),
)
def test_what_is_told_is_what_an_acquire_meets(
    sizes: list[int], shares: list[bool], steps: list[tuple[str, str, int]], name: str, wait: float, mode: str
) -> None:
    """In whatever state: explain, see that nothing has changed, acquire, and compare."""
    some = [
        consumer(each, size * 1000, by_size=by_size, beside=["b", "a"][n : n + 1], pinned=n == 3)
        for n, (each, size, by_size) in enumerate(zip(NAMES, sizes, shares, strict=True))
    ]
    w = World(catalog(*some), mode=mode)
    for step in steps:
        _play(w, *step)
    w.broker.tick()
    for each in NAMES:  # as observe-servers does: who computes is known
        if w.broker.state.may_ask_busy(each):
            ask_busy(w.broker.state, each, w.services[each])
    w.broker.observe_card()
    before = everything(w)
    told = explain(w, name, wait_seconds=wait)
    assert everything(w) == before
    events = len(w.broker.state.events)
    answer = _acquired(w, name, wait)
    evicted = {event["consumer"] for event in list(w.broker.state.events)[events:] if event["type"] == "evict"}
    if told["outcome"] == "refused":
        assert isinstance(answer, GpumgrError)
        assert answer.code == told["refusal"]["code"], told["message"]
    elif told["outcome"] == "wait":
        assert answer is None, told["message"]
    else:
        assert isinstance(answer, Lease), (told["message"], answer)
    assert evicted == {each["consumer"] for each in told["unloads"]}, told["message"]


def _play(w: World, step: str, name: str, number: int) -> None:
    service = w.services[name]
    holders = {hold.consumer for hold in w.broker.state.queue.holds.values()}
    free = 24000 - sum(each.used_mib() for each in w.services.values()) - w.card.used_mib(w.games[0].pid, 0)
    wants = service.consumer.needs_mib(0) - service.used_mib()
    if step == "ask":
        _acquired(w, name, 600.0)
    elif (step == "take" and name in holders and wants <= free) or (step == "direct" and not holders and wants <= free):
        service.take()
    elif step == "release" and (leases := list(w.broker.state.leases)):
        w.broker.release(leases[number % len(leases)].token)
    elif step == "game":
        w.games[0].set_used(min(number * 3000, free + w.card.used_mib(w.games[0].pid, 0)))
    elif step == "pause" and number == 0:
        w.broker.outsiders.hold("bg3", 3600, None)
    elif step == "busy":
        service.computing = number < 3
    w.broker.observe_card()
    w.prepare()


def _acquired(w: World, name: str, wait: float) -> Lease | GpumgrError | None:
    try:
        caller = w.ask(name, wait_seconds=wait)
    except GpumgrError as error:
        return error
    for _ in range(2):  # what was unloaded may still be falling: a refusal looks once more
        w.prepare()
        w.pass_time(0.6)
    answer = caller.answer
    assert answer is None or isinstance(answer, Lease | GpumgrError)
    return answer
