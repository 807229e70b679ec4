"""What fits, who must go and what is said when it cannot be: the numbers are those of gpumgr/core/placement.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumgr.core.card import GpuProcess, GpuReading, Reading
from gpumgr.core.catalog import Catalog, GpuRef
from gpumgr.core.placement import (
    LEFTOVER_SLACK_MIB,
    Grant,
    Holding,
    Refuse,
    Report,
    Unload,
    Victim,
    View,
    Wait,
    assess,
    decide,
    decide_call,
    decide_restore,
    given_back,
    impossible,
    promised_mib,
    shortfall_mib,
)
from gpumgr.errors import EvictionFailed, GpuUnreadable, InsufficientVram, Refused
from tests.worlds import catalog, consumer

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000, beside=["hear", "talk"])
HEAR = consumer("hear", 2000, beside=["chat", "talk"])
TALK = consumer("talk", 4000, beside=["chat", "hear"])
ONE = catalog(PAINT, CHAT, HEAR, TALK)


def gpu(free: int, total: int = 24000, *, index: int = 0, games: Mapping[str, int | None] | None = None) -> GpuReading:
    strangers = tuple(GpuProcess(4000 + n, name, mib, None) for n, (name, mib) in enumerate((games or {}).items()))
    return GpuReading(index, f"GPU-{index}", "card", total, total - free, free, strangers)


def view(
    *gpus: GpuReading,
    of: Catalog = ONE,
    held: Mapping[Any, int | Holding] | None = None,
    promised: int | dict[GpuRef, int] = 0,
    in_use: Sequence[str] = (),
    tried: Sequence[Victim] = (),
    headroom: int = 512,
    **more: Any,
) -> View:
    """``held``: consumer, or (consumer, gpu) → MiB that the driver tells."""
    holdings: dict[tuple[str, GpuRef], Holding] = {}
    for key, value in (held or {}).items():
        pair = (key, 0) if isinstance(key, str) else key
        holdings[pair] = value if isinstance(value, Holding) else Holding(value, exact=True, resident=value > 0)
    return View(
        catalog=of,
        reading=Reading(1.0, gpus),
        headroom_mib=headroom,
        holdings=holdings,
        promised_mib={0: promised} if isinstance(promised, int) else promised,
        in_use=frozenset(in_use),
        tried=tuple(tried),
        **more,
    )


def refused(decision: object) -> Refused:
    assert isinstance(decision, Refuse), decision
    return decision.error


def went(name: str, held: int, still: int = 300) -> Victim:
    return Victim(name, held, still)


def kept(name: str, held: int) -> Victim:
    return Victim(name, held, held, 1.0, "kept")


# -- 1, 2 ---------------------------------------------------------------------------------------------------


def test_1_an_unreadable_card_grants_nothing() -> None:
    for reading, said in (
        (Reading(1.0, error="driver gone"), "driver gone"),
        (Reading(1.0, (gpu(24000, index=1),)), "GPU 0 is not among the 1"),
        (Reading(1.0, (GpuReading(0, None, "card", 0, 0, 0, error="GPU is lost"),)), "GPU 0: GPU is lost"),
    ):
        error = refused(decide(PAINT, View(ONE, reading, 512, {}, {})))
        assert isinstance(error, GpuUnreadable)
        assert said in error.message
        assert error.retryable


def test_1_another_gpu_that_is_unreadable_is_not_ours() -> None:
    lost = GpuReading(1, None, "card", 0, 0, 0, error="GPU is lost")
    assert decide(PAINT, view(gpu(24000), lost)) == Grant()


def test_2_more_than_the_card_can_ever_lend_is_refused_at_once() -> None:
    big = consumer("big", 23489)
    everyone = catalog(big, CHAT)
    error = refused(decide(big, view(gpu(15000), of=everyone, held={"chat": 9000})))
    assert isinstance(error, InsufficientVram)
    assert "can never fit" in error.message
    assert error.details["evicted"] == []
    assert impossible(big, view(gpu(24000), of=everyone))
    assert not impossible(consumer("big", 23488), view(gpu(24000), of=everyone))


# -- 3, 4 ---------------------------------------------------------------------------------------------------


def test_3_all_that_may_not_coexist_are_unloaded_at_once_even_where_it_fits() -> None:
    assert decide(PAINT, view(gpu(22000), held={"hear": 2000})) == Unload(("hear",), required=True)
    both = decide(PAINT, view(gpu(13000), held={"chat": 9000, "hear": 2000}))
    assert both == Unload(("chat", "hear"), required=True)


def test_3_nobody_knows_counts_as_resident() -> None:
    unknown = Holding(0, exact=False, resident=None)
    assert decide(PAINT, view(gpu(24000), held={"hear": unknown})) == Unload(("hear",), required=True)


def test_3_somebody_else_s_unload_is_waited_for() -> None:
    held = {"chat": 9000, "hear": 2000}
    assert decide(PAINT, view(gpu(13000), held=held, leaving=frozenset({"hear"}))) == Wait("preparing")


def test_4_one_that_kept_its_memory_refuses_though_the_target_would_fit() -> None:
    state = view(gpu(22000), held={"hear": 2000}, tried=[kept("hear", 2000)])
    error = refused(decide(PAINT, state))
    assert isinstance(error, EvictionFailed)
    assert error.retryable
    assert error.details["victims"] == [
        {"consumer": "hear", "held_mib": 2000, "still_held_mib": 2000, "reason": "kept"}
    ]
    assert "hear was asked to unload and kept 2000 of 2000 MiB" in error.message


def test_4_one_that_gave_back_late_is_no_reason_any_more() -> None:
    assert decide(PAINT, view(gpu(23700), held={"hear": 0}, tried=[kept("hear", 2000)])) == Grant()


# -- 5: fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "fits"), [(14512, True), (14511, False)])
def test_5_headroom_is_never_lent(free: int, fits: bool) -> None:
    state = view(gpu(free, games={"game": 24000 - free}))
    assert (decide(PAINT, state) == Grant()) is fits
    assert shortfall_mib(PAINT, state) == 14512 - free


@pytest.mark.parametrize(("free", "fits"), [(13512, True), (13511, False)])
def test_5_what_was_promised_to_others_is_not_lent_again(free: int, fits: bool) -> None:
    state = view(gpu(free), promised=9000, in_use=["chat"])
    assert decide(TALK, state) == (Grant() if fits else Wait("vram", 1, ("chat",)))


def test_5_what_the_target_holds_it_does_not_need_again() -> None:
    assert decide(PAINT, view(gpu(1512), held={"paint": 13000})) == Grant()
    assert decide(PAINT, view(gpu(512), held={"paint": 15000})) == Grant()


def test_5_a_holder_s_memory_on_the_card_counts_once() -> None:
    # 24000 - 9000 on the card; nothing is promised any more
    assert decide(TALK, view(gpu(15000), held={"chat": 9000}, in_use=["chat"])) == Grant()


def test_promised_is_what_a_holder_may_still_take() -> None:
    assert promised_mib(CHAT, 0, Holding(0)) == 9000
    assert promised_mib(CHAT, 0, Holding(3000)) == 6000
    assert promised_mib(CHAT, 0, Holding(9500)) == 0
    assert promised_mib(CHAT, 1, Holding(0)) == 0


# -- 6, 7 ---------------------------------------------------------------------------------------------------


def test_6_room_is_made_by_the_least_recently_used_idle_resident_one_at_a_time() -> None:
    held = {"chat": 9000, "hear": 11000}
    used = {"chat": 50.0, "hear": 40.0}
    assert decide(TALK, view(gpu(4000), held=held, last_used=used)) == Unload(("hear",), required=False)
    used = {"chat": 50.0, "hear": 60.0}
    assert decide(TALK, view(gpu(4000), held=held, last_used=used)) == Unload(("chat",), required=False)
    assert decide(TALK, view(gpu(4000), held=held, last_used={"chat": 50.0})) == Unload(("hear",), required=False)


def test_6_the_fewest_that_make_room_go_together() -> None:
    held: dict[Any, int | Holding] = {"a": 3000, "b": 3000, "c": 3000, "d": 9000}
    target = consumer("paint", 14000, beside=list(held))
    many = catalog(target, *(consumer(name, beside=["paint"]) for name in held))
    used = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    one = view(gpu(6000), of=many, held=held, last_used=used)
    # 8512 are missing: d alone would do, before a, b and c who were used less lately
    assert decide(target, one) == Unload(("d",), required=False)
    two = view(gpu(3500), of=many, held=held, last_used=used)  # 11012: d and any other, of whom a was used least lately
    assert decide(target, two) == Unload(("a", "d"), required=False)


def test_6_who_is_pinned_goes_where_it_must_alone() -> None:
    pinned = consumer("chat", 9000, beside=["hear", "talk"], pinned=True)
    some = catalog(PAINT, pinned, HEAR, TALK)
    used = {"chat": 1.0, "hear": 2.0}
    both = view(gpu(500), of=some, held={"chat": 9000, "hear": 4100}, last_used=used)
    assert decide(TALK, both) == Unload(("hear",), required=False)
    small = view(gpu(500), of=some, held={"chat": 9000, "hear": 4000}, last_used=used)
    assert decide(TALK, small) == Unload(("chat",), required=False)


def test_6_who_is_pinned_does_not_go_in_vain() -> None:
    pinned = consumer("chat", 3000, beside=["hear", "talk"], pinned=True)
    some = catalog(PAINT, pinned, HEAR, TALK)
    users = view(gpu(500, games={"game": 12000}), of=some, held={"chat": 3000, "hear": 8000}, in_use=["hear"])
    assert decide(TALK, users) == Wait("vram", 4012, ("hear",))
    both = view(gpu(500, games={"game": 19000}), of=some, held={"chat": 3000, "hear": 1500}, in_use=["hear"])
    assert decide(TALK, both) == Wait("vram", 4012, ("hear",)), "both of them have to go, and one of them is in use"
    last = view(gpu(500, games={"game": 20500}), of=some, held={"chat": 3000})
    assert decide(TALK, last) == Unload(("chat",), required=False), "before a refusal whatever may help is tried"


def test_6_of_many_pinned_ones_whoever_was_used_the_longest_ago_goes() -> None:
    names = [f"pinned{number:02}" for number in range(40)]
    target = consumer("paint", 14000, beside=names)
    many = catalog(target, *(consumer(name, 1000, beside=["paint"], pinned=True) for name in names))
    used = {name: float(number) for number, name in enumerate(names)}
    held: dict[Any, int | Holding] = dict.fromkeys(names, 1000)
    room = view(gpu(100, total=41000, games={"game": 900}), of=many, held=held, last_used=used)
    assert decide(target, room) == Unload(tuple(names[:15]), required=False)


def test_3_who_is_pinned_goes_when_the_others_are_gone() -> None:
    some = catalog(PAINT, consumer("chat", 9000, pinned=True), HEAR)
    state = view(gpu(13000), of=some, held={"chat": 9000, "hear": 2000})
    assert decide(PAINT, state) == Unload(("hear",), required=True)
    state = view(gpu(15000), of=some, held={"chat": 9000}, tried=[went("hear", 2000)])
    assert decide(PAINT, state) == Unload(("chat",), required=True)


def test_a_call_spares_who_is_pinned() -> None:
    some = catalog(PAINT, consumer("chat", 9000, pinned=True), HEAR)
    assert decide_call(PAINT, view(gpu(15000), of=some, held={"chat": 9000})) == Grant()
    beside = view(gpu(14000), of=some, held={"chat": 9000, "hear": 1000})
    assert decide_call(PAINT, beside) == Unload(("hear",), required=True)
    full = view(gpu(14000), of=some, held={"chat": 9000})
    granted = decide_call(PAINT, full)
    assert isinstance(granted, Grant)
    assert granted.despite is not None
    assert "Pinned, and not unloaded for a proxied call: chat 9000 MiB" in granted.despite.message
    itself = replace(PAINT, pinned=True)
    bloated = view(gpu(100, games={"game": 8000}), of=catalog(itself), held={"paint": 15900})
    assert isinstance(decide_call(itself, bloated), Grant), "not even itself"
    assert decide(itself, bloated) == Unload(("paint",), required=False)


def test_nobody_pinned_goes_for_what_is_brought_back() -> None:
    some = catalog(PAINT, consumer("chat", 9000, pinned=True), HEAR)
    assert decide_restore(PAINT, view(gpu(22000), of=some, held={"hear": 2000})) == Unload(("hear",), required=True)
    state = view(gpu(13000), of=some, held={"chat": 9000, "hear": 2000})
    assert isinstance(refused(decide_restore(PAINT, state)), InsufficientVram)
    makes_room = view(gpu(4000), held={"chat": 9000, "hear": 11000})
    assert isinstance(refused(decide_restore(TALK, makes_room)), InsufficientVram)


@st.composite
def crowds(draw: st.DrawFn) -> View:
    """Idle residents beside paint, some of them pinned."""
    names = "abcdef"[: draw(st.integers(1, 6))]
    pins = draw(st.sets(st.sampled_from(names)))
    held = {name: draw(st.integers(1, 6)) * 1000 for name in names}
    used = {name: float(draw(st.integers(0, 3))) for name in names}
    others = [consumer(name, held[name], beside=["paint"], pinned=name in pins) for name in names]
    everyone = catalog(consumer("paint", 14000, beside=list(names)), *others)
    total = max(24000, sum(held.values()))
    free = draw(st.integers(0, total - sum(held.values())))
    rest = total - sum(held.values()) - free
    return view(gpu(free, total, games={"game": rest}), of=everyone, held=dict(held), last_used=used)


@given(crowds())
def test_6_no_smaller_set_makes_room(state: View) -> None:
    paint = state.catalog.consumers["paint"]
    short = shortfall_mib(paint, state)
    held = {name: holding.held_mib for (name, _), holding in state.holdings.items()}
    sets = [some for size in range(len(held) + 1) for some in combinations(held, size)]
    enough = [some for some in sets if sum(held[name] for name in some) >= short]
    decision = decide(paint, state)
    if short <= 0:
        assert decision == Grant()
        return
    assert isinstance(decision, Unload)
    if not enough:
        assert len(decision.consumers) == 1, "it does not suffice: one at a time, those that are not pinned first"
        assert not state.catalog.consumers[decision.consumers[0]].pinned or len(_pinned(state, held)) == len(held)
        return
    cost = min((len(_pinned(state, some)), len(some)) for some in enough)
    assert (len(_pinned(state, decision.consumers)), len(decision.consumers)) == cost
    if cost == (0, 1):
        alone = [name for (name,) in (some for some in enough if len(some) == 1) if not _pinned(state, [name])]
        oldest = min(alone, key=lambda name: (state.last_used[name], name))
        assert decision.consumers == (oldest,)


def _pinned(state: View, names: Iterable[str]) -> list[str]:
    return [name for name in names if state.catalog.consumers[name].pinned]


def test_6_nobody_is_unloaded_where_it_fits() -> None:
    assert decide(TALK, view(gpu(13000), held={"chat": 9000, "hear": 2000})) == Grant()


def test_6_what_is_in_use_is_never_unloaded() -> None:
    state = view(gpu(2000), held={"chat": 20000, "hear": 2000}, in_use=["hear"], last_used={"chat": 9.0})
    assert decide(TALK, state) == Unload(("chat",), required=False)
    nobody_idle = view(gpu(2000), held={"chat": 20000, "hear": 2000}, in_use=["hear", "chat"])
    assert decide(TALK, nobody_idle) == Wait("vram", 4000 + 512 - 2000, ("chat", "hear"))


def test_6_a_failed_one_is_not_asked_again_and_the_next_one_is() -> None:
    held = {"chat": 9000, "hear": 11000}
    used = {"chat": 50.0, "hear": 40.0}
    state = view(gpu(4000), held=held, last_used=used, tried=[kept("hear", 11000)])
    assert decide(TALK, state) == Unload(("chat",), required=False)


def test_6_one_that_is_being_unloaded_for_somebody_else_is_waited_for() -> None:
    state = view(gpu(4000), held={"chat": 9000, "hear": 11000}, leaving=frozenset({"chat"}))
    assert decide(TALK, state) == Wait("preparing")


def test_7_it_waits_where_it_fits_once_the_consumers_in_use_are_done() -> None:
    # 24000: a game's 10000, chat's 9000 (4000 of it on the card)
    state = view(gpu(10000, games={"game": 10000}), held={"chat": 4000}, promised=5000, in_use=["chat"])
    assert decide(TALK, state) == Grant()
    tight = view(gpu(9000, games={"game": 11000}), held={"chat": 4000}, promised=5000, in_use=["chat"])
    assert decide(TALK, tight) == Wait("vram", 4000 + 512 + 5000 - 9000, ("chat",))
    never = view(gpu(500, games={"game": 19500}), held={"chat": 4000}, promised=0, in_use=["chat"])
    assert isinstance(refused(decide(TALK, never)), InsufficientVram)


# -- 8 ------------------------------------------------------------------------------------------------------


def test_8_before_a_refusal_an_idle_target_is_itself_unloaded_once() -> None:
    # bloated: it holds 6000 of its 4000, so that it needs no more, yet headroom is missing
    game = gpu(100, games={"game": 17900})
    state = view(game, held={"talk": 6000})
    assert decide(TALK, state) == Unload(("talk",), required=False)
    again = view(game, held={"talk": 6000}, tried=[kept("talk", 6000)])
    assert isinstance(refused(decide(TALK, again)), InsufficientVram)


def test_8_a_target_that_somebody_else_holds_is_not() -> None:
    state = view(gpu(100, games={"game": 17900}), held={"talk": 6000}, target_in_use=True)
    assert isinstance(refused(decide(TALK, state)), InsufficientVram)


def test_8_also_where_an_excluded_one_kept_its_memory() -> None:
    state = view(gpu(1000), held={"paint": 12000, "chat": 9000}, tried=[kept("chat", 9000)])
    assert decide(PAINT, state) == Unload(("paint",), required=False)


# -- 9: the two refusals ------------------------------------------------------------------------------------


def test_9_insufficient_with_its_numbers() -> None:
    state = view(
        gpu(12000, games={"bg3": 9000, "browser": 700, "hidden": None}),
        held={"hear": Holding(300, resident=False)},
        tried=[went("hear", 2000)],
    )
    error = refused(decide(PAINT, state))
    assert isinstance(error, InsufficientVram)
    assert not error.retryable
    details = error.details
    assert (details["needed_mib"], details["free_mib"], details["total_mib"]) == (14000, 12000, 24000)
    assert (details["headroom_mib"], details["promised_mib"], details["held_mib"]) == (512, 0, 0)
    assert [p["name"] for p in details["untracked"]] == ["bg3", "browser", "hidden"]
    assert details["evicted"] == ["hear"]
    for said in ("paint needs 14000 MiB", "12000 of 24000 MiB are free", "bg3", "9000 MiB", "an unknown amount"):
        assert said in error.message


@pytest.mark.parametrize(("game", "error"), [(4488, EvictionFailed), (4489, InsufficientVram)])
def test_9_excluded_one_kept_and_it_does_not_fit(game: int, error: type[Refused]) -> None:
    # With chat gone it needs 14000 + 512 + 5000 of another's + game <= 24000: then chat is to blame
    everyone = catalog(PAINT, CHAT)
    free = 24000 - 9000 - 5000 - game
    state = view(
        gpu(free, games={"game": game, "more": 5000}), of=everyone, held={"chat": 9000}, tried=[kept("chat", 9000)]
    )
    assert type(refused(decide(PAINT, state))) is error


@pytest.mark.parametrize(("game", "error"), [(19488, EvictionFailed), (19489, InsufficientVram)])
def test_9_idle_one_that_had_to_make_room_kept(game: int, error: type[Refused]) -> None:
    everyone = catalog(HEAR, TALK, CHAT)
    state = view(
        gpu(24000 - game - 2000, games={"game": game}), of=everyone, held={"hear": 2000}, tried=[kept("hear", 2000)]
    )
    assert type(refused(decide(TALK, state))) is error


def test_9_an_idle_one_that_kept_does_not_matter_where_it_fits() -> None:
    assert decide(TALK, view(gpu(4512), held={"hear": 2000}, tried=[kept("hear", 2000)])) == Grant()


def test_9_idle_residents_that_nobody_asked_yet_are_no_shortfall() -> None:
    # talk kept 800 and excludes paint; what is missing beyond that is idle chat's, which was not asked any more
    everyone = catalog(
        consumer("paint", 14000, beside=["chat"]),
        consumer("talk", 4000, beside=["chat"]),
        consumer("chat", 9000, beside=["talk", "paint"]),
    )
    state = view(gpu(14200), of=everyone, held={"talk": 800, "chat": 9000}, tried=[kept("talk", 800)])
    assert isinstance(refused(decide(everyone.consumers["paint"], state)), EvictionFailed)


@pytest.mark.parametrize("reason", ["kept", "busy", "hung", "unreachable"])
def test_9_each_reason_has_its_words(reason: Any) -> None:
    victim = Victim("hear", 2000, 1900, 30.0, reason)
    error = refused(decide(PAINT, view(gpu(22100), held={"hear": 1900}, tried=[victim])))
    assert error.details["victims"][0]["reason"] == reason
    assert "1900 of 2000 MiB" in error.message


# -- several GPUs -------------------------------------------------------------------------------------------

SPAN = consumer("span", (4000, 8000), gpus=(0, 1), beside=["near", "far"])
NEAR = consumer("near", 6000, gpus=(0,), beside=["span"])
FAR = consumer("far", 6000, gpus=(1,), beside=["span"])
TWO = catalog(SPAN, NEAR, FAR)


def test_several_it_must_fit_on_each() -> None:
    assert decide(SPAN, view(gpu(4512), gpu(8512, 12000, index=1), of=TWO)) == Grant()
    for free in ((4511, 8512), (4512, 8511)):
        state = view(gpu(free[0]), gpu(free[1], 12000, index=1), of=TWO)
        assert isinstance(refused(decide(SPAN, state)), InsufficientVram)


def test_several_only_residents_of_the_short_gpu_make_room() -> None:
    state = view(
        gpu(10000), gpu(6000, 12000, index=1), of=TWO, held={("near", 0): 6000, ("far", 1): 6000}, last_used={"far": 9}
    )
    assert decide(SPAN, state) == Unload(("far",), required=False)


def test_several_the_refusal_is_of_the_shortest() -> None:
    state = view(gpu(4000), gpu(2000, 12000, index=1, games={"game": 10000}), of=TWO)
    error = refused(decide(SPAN, state))
    assert (error.details["gpu"], error.details["needed_mib"], error.details["free_mib"]) == (1, 8000, 2000)


def test_several_promises_count_on_their_own_gpu() -> None:
    gpus = (gpu(24000), gpu(12000, index=1, total=12000))
    assert decide(SPAN, view(*gpus, of=TWO, promised={0: 19488}, in_use=["near"])) == Grant()
    assert decide(SPAN, view(*gpus, of=TWO, promised={0: 19489}, in_use=["near"])) == Wait("vram", 1, ("near",))
    assert decide(SPAN, view(*gpus, of=TWO, promised={1: 3489}, in_use=["far"])) == Wait(
        "vram", 8000 + 512 + 3489 - 12000, ("far",)
    )


# -- proof --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "proved"), [(0, True), (768, True), (769, False)])
def test_given_back_is_at_most_the_residual(now: int, proved: bool) -> None:
    # whatever free memory says, which may lag or which a game may have taken
    for risen in (0, 9000):
        assert given_back(CHAT, {0: Holding(9000)}, {0: now}, {0: risen}) is proved


def test_given_back_has_the_consumer_s_own_residual() -> None:
    assert not given_back(consumer("x", residual_mib=0), {0: Holding(9000)}, {0: 1}, {})
    assert given_back(consumer("x", residual_mib=1500), {0: Holding(9000)}, {0: 1500}, {})


@pytest.mark.parametrize(("risen", "proved"), [(8099, False), (8100, True), (9000, True)])
def test_where_processes_cannot_be_read_free_memory_must_rise_by_nine_tenths(risen: int, proved: bool) -> None:
    assert given_back(CHAT, {0: Holding(9000)}, {0: None}, {0: risen}) is proved
    assert given_back(CHAT, {0: Holding(9000, exact=False)}, {0: 0}, {0: risen}) is proved


def test_given_back_is_proved_on_every_gpu() -> None:
    before: dict[GpuRef, Holding] = {0: Holding(4000), 1: Holding(8000)}
    assert given_back(SPAN, before, {0: 300, 1: 300}, {})
    assert not given_back(SPAN, before, {0: 300, 1: 8000}, {})
    assert not given_back(SPAN, before, {0: 300, 1: None}, {1: 7000})
    assert given_back(SPAN, before, {0: 300, 1: None}, {1: 7200})


# -- what is held -------------------------------------------------------------------------------------------


def assessed(driver: int | None, report: Report | None = None, **known: Any) -> Holding:
    facts: dict[str, Any] = {"attributable": True, "used_since_unload": None, "leftover_mib": 0} | known
    return assess(CHAT, 0, driver_mib=driver, report=report, **facts)


def test_assess_1_its_own_report_where_the_driver_tells_nothing() -> None:
    loaded, told = Report(True), Report(True, 5000)
    assert assessed(None, loaded) == Holding(9000, exact=False, resident=True)
    assert assessed(None, told) == Holding(5000, exact=False, resident=True)
    assert assessed(None, Report(False)) == Holding(0, exact=False, resident=False)
    assert assessed(0, told, attributable=False) == Holding(5000, exact=False, resident=True)
    assert assessed(0, told, attributable=True) == Holding(0, exact=True, resident=False)
    assert assessed(7000, told, attributable=False) == Holding(7000, exact=True, resident=True)


def test_assess_1_a_report_is_for_all_gpus_together() -> None:
    holding = assess(
        SPAN, 1, driver_mib=None, attributable=True, report=Report(True, 9000), used_since_unload=None, leftover_mib=0
    )
    assert holding.held_mib == 4500


def test_assess_2_the_driver_s_number_above_what_stayed_after_the_last_unload() -> None:
    assert assessed(1) == Holding(1, exact=True, resident=True)
    assert assessed(0) == Holding(0, exact=True, resident=False)
    assert assessed(300 + LEFTOVER_SLACK_MIB, leftover_mib=300).resident is False
    assert assessed(301 + LEFTOVER_SLACK_MIB, leftover_mib=300).resident is True


@pytest.mark.parametrize(("used", "held", "resident"), [(True, 9000, True), (False, 0, False), (None, 0, None)])
def test_assess_3_what_the_broker_remembers(used: bool | None, held: int, resident: bool | None) -> None:
    assert assessed(None, used_since_unload=used) == Holding(held, exact=False, resident=resident)


@pytest.mark.parametrize(
    ("games", "words"),
    [
        ({"bg3.exe": 10600}, "1112 MiB are missing: it fits once bg3.exe has gone"),
        ({"bg3.exe": 9000, "ide": 1600}, "1112 MiB are missing: it fits once bg3.exe or ide has gone"),
        ({"a": 900, "b": 800, "c": 700, "d": 600}, "1112 MiB are missing: it fits once a and b have gone"),
        ({"a": 900}, "1112 MiB are missing: even without them it would not fit"),
        ({"a": None}, "1112 MiB are missing: the driver does not tell whether they hold that much"),
    ],
)
def test_a_refusal_says_what_would_have_to_go(games: dict[str, int | None], words: str) -> None:
    error = refused(decide(PAINT, view(gpu(13400, games=games))))
    assert words in error.message
    assert error.details["short_mib"] == 1112


# -- tails, direct use --------------------------------------------------------------------------------------


def test_3_a_tail_or_direct_use_is_waited_for_and_named() -> None:
    state = view(gpu(13000), held={"chat": 9000, "hear": 2000}, in_use=["chat"], busy=frozenset({"chat"}))
    assert decide(PAINT, state) == Wait("draining", consumers=("chat",))


def test_6_the_next_idle_one_makes_room_where_the_first_is_busy() -> None:
    state = view(
        gpu(4000, games={"game": 0}),
        held={"chat": 9000, "hear": 11000},
        in_use=["hear"],
        busy=frozenset({"hear"}),
        last_used={"hear": 1.0, "chat": 2.0},
    )
    assert decide(TALK, state) == Unload(("chat",), required=False)


def test_8_a_busy_target_is_not_unloaded_to_mend_itself() -> None:
    state = view(gpu(500, games={"game": 18000}), held={"paint": 5500})
    assert decide(PAINT, state) == Unload(("paint",), required=False)
    busy = view(gpu(500, games={"game": 18000}), held={"paint": 5500}, busy=frozenset({"paint"}))
    assert decide(PAINT, busy) == Wait("vram", 14000 - 5500 + 512 - 500, ("paint",))


# -- proxied calls ------------------------------------------------------------------------------------------


def test_a_call_goes_ahead_where_a_lease_is_refused_unless_a_live_lease_shares_the_card() -> None:
    full = view(gpu(5000, games={"game": 19000}))
    error = refused(decide(PAINT, full))
    granted = decide_call(PAINT, full)
    assert isinstance(granted, Grant)
    assert granted.despite is not None
    assert granted.despite.message == error.message
    leased = view(gpu(5000, games={"game": 19000}), leased=True)
    assert decide_call(PAINT, leased) == Wait("vram", 14000 + 512 - 5000)


def test_a_call_goes_ahead_beside_a_consumer_that_kept_its_memory() -> None:
    state = view(gpu(15000), held={"chat": 9000}, tried=[kept("chat", 9000)])
    granted = decide_call(PAINT, state)
    assert isinstance(granted, Grant)
    assert isinstance(granted.despite, EvictionFailed)


def test_a_call_that_fits_is_a_plain_grant() -> None:
    assert decide_call(PAINT, view(gpu(24000), leased=True)) == Grant()


def test_a_call_for_what_can_never_fit_is_refused_like_a_lease() -> None:
    assert isinstance(refused(decide_call(PAINT, view(gpu(12000, total=12000)))), InsufficientVram)


# -- nobody is unloaded -------------------------------------------------------------------------------------


def test_where_nobody_may_be_unloaded_residents_are_tolerated_while_it_fits() -> None:
    fits = view(gpu(15000), held={"chat": 9000}, may_unload=False)
    assert decide(PAINT, fits) == Grant()
    full = view(gpu(9000), held={"chat": 9000, "hear": 2000}, may_unload=False)
    error = refused(decide(PAINT, full))
    assert isinstance(error, InsufficientVram)
    assert "idle on the card: chat 9000 MiB, hear 2000 MiB" in error.message


# -- a card that cannot be read -----------------------------------------------------------------------------


def test_an_assumed_card_has_the_strangers_of_the_last_reading() -> None:
    last: dict[GpuRef, GpuReading] = {0: gpu(12000, games={"game": 10000})}
    assumed = Reading(2.0, error="the driver is away").believing([0], last, {0: 9000})
    (seen,) = assumed.gpus
    assert (seen.total_mib, seen.free_mib, seen.index) == (24000, 24000 - 10000 - 9000, 0)
    assert [p.name for p in seen.untracked] == ["game"]
    assert seen.held_mib("chat") is None
    assert assumed.problems([0]) == []


def test_a_card_that_was_never_read_lends_what_is_declared() -> None:
    assumed = Reading(2.0, error="the driver is away").believing([0, "GPU-x"], {}, {})
    state = view(*assumed.gpus, held={})
    assert decide(PAINT, state) == Grant()
    assert assumed.gpu("GPU-x") is not None


def test_what_can_be_read_stays_as_it_is() -> None:
    reading = Reading(2.0, (gpu(12000), GpuReading(1, "GPU-1", "card", 0, 0, 0, error="it is lost")))
    assumed = reading.believing([0, 1], {1: gpu(20000, index=1)}, {1: 3000})
    assert assumed.gpu(0) is reading.gpu(0)
    other = assumed.gpu(1)
    assert other is not None
    assert (other.readable, other.total_mib, other.free_mib) == (True, 24000, 21000)
