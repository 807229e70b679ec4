"""The account of a consumer: figures, sizes that follow from it, warnings, and what counts as a use and a reload."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumgr.core.catalog import Catalog, Consumer, GpuRef
from gpumgr.core.ledger import (
    JUDGED,
    KEPT,
    LEARNED_AFTER,
    Account,
    Load,
    Observation,
    Sight,
    Unloaded,
    Use,
    followed,
    keeping_promises,
    observed_figures,
    percentile,
    returned_share,
    sized,
    swap_seconds,
    unload_figures,
    warnings_of,
)
from gpumgr.core.placement import Holding
from tests.worlds import consumer

LENDS: dict[GpuRef, int] = {0: 23488}
AUTO = replace(consumer("paint"), auto=True, vram_resident_mib=(0,), unsized=True)


def observed(
    peak: int, resident: int | None = None, reload_seconds: float | None = None, gpu: GpuRef = 0
) -> Observation:
    return Observation("2026-11-25", {gpu: peak}, {gpu: peak if resident is None else resident}, reload_seconds)


def unload(share: float | None = 1.0, seconds: float = 1.0, reason: str | None = None) -> Unloaded:
    left = 0 if share is None else round(9000 * (1 - share))
    return Unloaded("2026-11-25", 9000, left, seconds, share, reason)


def account(*entries: Observation | Unloaded) -> Account:
    found = Account()
    for entry in entries:
        found = found.with_entry(entry)
    return found


# -- numbers ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=120), st.integers(1, 100))
def test_a_percentile_was_seen_and_so_many_do_not_exceed_it(values: list[int], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 95) is None


def test_an_account_is_bounded_and_counts_on() -> None:
    found = account(*[unload(seconds=n) for n in range(KEPT + 7)], *[observed(n) for n in range(KEPT + 3)])
    assert (len(found.unloads), found.tally.unloads) == (KEPT, KEPT + 7)
    assert (len(found.observations), found.tally.observations) == (KEPT, KEPT + 3)
    both = found.after(account(unload(0.0, reason="kept"), observed(1)))
    assert (len(both.unloads), both.tally.unloads, both.tally.failed) == (KEPT, KEPT + 8, 1)
    assert both.unloads[-1].seconds == KEPT + 6, "the earlier life's come first"


# -- what came back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "share"),
    [
        ({0: Holding(9000)}, {0: 400}, 1.0),  # what lies within the residual has come back
        ({0: Holding(9000)}, {0: 9000}, 0.0),
        ({0: Holding(8768)}, {0: 2768}, 0.75),
        ({0: Holding(9000)}, {0: 12000}, 0.0),
        ({0: Holding(4768), 1: Holding(4768)}, {0: 0, 1: 4768}, 0.5),  # what one gave too much is not the other's
        ({0: Holding(700)}, {0: 700}, None),  # nothing had to
        ({0: Holding(9000)}, {0: None}, None),
        ({0: Holding(9000, exact=False)}, {0: 0}, None),
        ({0: Holding(9000), 1: Holding(9000)}, {0: 0, 1: None}, None),
        ({0: Holding(9000)}, {}, None),
    ],
)
def test_the_share_that_was_returned(
    before: dict[GpuRef, Holding], now: dict[GpuRef, int | None], share: float | None
) -> None:
    assert returned_share(768, before, now) == share


def test_a_leaky_consumer_is_told() -> None:
    paint = consumer("paint", 9000)
    assert unload_figures(Account()) is None
    few = account(unload(0.1, reason="kept"), unload(0.1, reason="kept"))
    assert warnings_of(paint, few) == {}, "two may be chance"
    found = account(*[unload(0.6, 30.0, "kept")] * 4, *[unload(1.0, 0.3)] * 4, *[unload(None)] * 4)
    figures = unload_figures(found)
    assert figures is not None
    assert (figures.count, figures.failed, figures.measured) == (12, 4, 8)
    assert figures.returned_share == pytest.approx(0.8)
    assert (figures.residual_mib, figures.seconds_max) == (1800, 1.0), "a failed one took as long as its limit"
    assert "paint returned 80 % on average over 8 unloads" in warnings_of(paint, found)["leaky"]


def test_a_repaired_consumer_is_no_longer_leaky() -> None:
    found = account(*[unload(0.0, reason="kept")] * 50, *[unload()] * JUDGED)
    assert warnings_of(consumer("paint"), found) == {}


def test_what_nobody_could_read_enters_no_share() -> None:
    figures = unload_figures(account(*[unload(None)] * 5))
    assert figures is not None
    assert (figures.count, figures.measured, figures.returned_share, figures.residual_mib) == (5, 0, None, None)
    assert figures.seconds_p50 == 1.0, "how long it took was seen"


def test_a_swap_costs_the_slowest_unload_and_the_reload() -> None:
    accounts = {
        "paint": account(observed(9000, reload_seconds=4.0), observed(9000, reload_seconds=6.0), observed(9000)),
        "chat": account(unload(seconds=1.0), unload(seconds=2.0), unload(0.2, 30.0, "kept")),
        "talk": account(unload(seconds=0.5)),
        "mute": account(unload(0.2, 30.0, "kept"), observed(10)),
    }
    assert swap_seconds(accounts, [], "paint") == 4.0
    assert swap_seconds(accounts, ["chat", "talk"], "paint") == 5.0
    assert swap_seconds(accounts, ["chat", "mute"], "paint") is None
    assert swap_seconds(accounts, ["paint"], "mute") is None
    assert swap_seconds(accounts, ["chat"], "never seen") is None


# -- sizes --------------------------------------------------------------------------------------------------


def size(of: Consumer, *peaks: int) -> tuple[tuple[int, ...], bool]:
    found = sized(of, account(*map(observed, peaks)), LENDS)
    return found.vram_resident_mib, found.unsized


def test_an_auto_size() -> None:
    declared = replace(AUTO, declared_mib=(14000,))
    assert size(declared, 9000, 9000, 9000, 9000) == ((14000,), False)
    assert size(AUTO, 9000, 9000, 9000, 9000) == ((LENDS[0] // 2,), True)
    for each in (declared, AUTO):
        assert size(each, 9000, 8000, 10000, 9000, 9001) == ((11000,), False)
    assert size(consumer("chat", 5000), *[9000] * 9) == ((5000,), False), "only an auto size follows"
    other_gpu = account(*[observed(9000, gpu=1)] * 9)
    assert sized(AUTO, other_gpu, LENDS).unsized, "what it held on another GPU says nothing of this one"


@given(st.lists(st.integers(0, 60000), min_size=LEARNED_AFTER, max_size=JUDGED), st.integers(0, 50000))
def test_an_auto_size_covers_what_was_seen_and_never_more_than_there_is(peaks: list[int], lends: int) -> None:
    found = sized(AUTO, account(*map(observed, peaks)), {0: lends}).vram_resident_mib[0]
    p95 = sorted(peaks)[math.ceil(0.95 * len(peaks)) - 1]
    assert min(p95, lends) <= found <= min(lends, math.ceil(p95 * 1.1))
    assert found == math.ceil(p95 * 11 / 10) or found >= lends * 9 // 10, "the margin only yields on a full card"


def test_what_holders_were_granted_is_not_lowered() -> None:
    learned = replace(AUTO, vram_resident_mib=(5000,), unsized=False)
    larger = replace(learned, vram_resident_mib=(9000,))
    assert keeping_promises(learned, [larger, learned]).vram_resident_mib == (9000,)
    assert keeping_promises(larger, [learned]).vram_resident_mib == (9000,), "a raise counts at once"
    assert keeping_promises(learned, [learned, AUTO]).unsized, "who was granted the card alone has it alone"


def test_what_nobody_knows_the_size_of_stands_beside_nobody() -> None:
    chat, paint = consumer("chat", beside=["paint"]), replace(consumer("paint", beside=["chat"]), auto=True)
    assert Catalog({"chat": chat, "paint": paint}).may_coexist("chat", "paint")
    alone = Catalog({"chat": chat, "paint": replace(paint, unsized=True)})
    assert not alone.may_coexist("chat", "paint")
    assert alone.exclude("paint", "chat")


def test_a_size_that_is_declared_too_small_is_told() -> None:
    found = account(*[observed(11400)] * 3)
    assert warnings_of(consumer("paint", 9000), found) == {
        "size": "declared 9000, seen 11400 MiB: raise vram_resident_mib"
    }
    assert warnings_of(consumer("paint", 10400), found) == {}, "a tenth more is no news"
    assert warnings_of(replace(AUTO, declared_mib=(9000,)), found) == {}, "that one follows by itself"
    two = consumer("paint", (9000, 9000), gpus=(0, 1))
    seen = Observation("", {0: 100, 1: 12000}, {0: 100, 1: 12000})
    assert "seen 12000 MiB on GPU 1" in warnings_of(two, account(seen))["size"]


# -- uses and loads -----------------------------------------------------------------------------------------


def sight(at: float, held: int | None, *holds: int, works: bool = False, leaving: bool = False) -> Sight:
    told: dict[GpuRef, int] | None = None if held is None else {0: held}
    return Sight(at, frozenset(holds), works, leaving, resident=bool(held), held_mib=told)


def uses(*sights: Sight) -> list[tuple[int | None, int | None]]:
    """(peak, resident) of each use that these readings end."""
    found: list[tuple[int | None, int | None]] = []
    use: Use | None = None
    for each in sights:
        use, over = followed(use, each)
        if over is not None:
            found.append((over.peak_mib.get(0), over.last_mib.get(0)))
    return found


def test_a_use_is_one_hold_and_the_reading_after_it() -> None:
    assert uses(sight(0, 0, 1), sight(2, 9000, 1), sight(4, 7000, 1), sight(6, 6000)) == [(9000, 6000)]
    one_after_the_other = [sight(0, 9000, 1), sight(2, 12000, 2), sight(4, 8000)]
    assert uses(*one_after_the_other) == [(9000, 9000), (12000, 8000)], "the next one's memory is not the first one's"


def test_a_use_of_several_lasts_until_all_of_them_are_over_unless_it_never_ends() -> None:
    overlapping = [sight(0, 5000, 1), sight(2, 9000, 1, 2), sight(4, 7000, 2, 3), sight(6, 7000, 3)]
    assert uses(*overlapping) == []
    assert uses(*overlapping, sight(8, 6000)) == [(9000, 6000)]
    late = [sight(700, 8000, 3, 4), sight(702, 7000, 4)]
    assert uses(*overlapping, *late) == [(9000, 8000)], "who comes after ten minutes belongs to the next one"


def test_a_tail_belongs_to_the_use() -> None:
    left = [sight(2, 12000, works=True), sight(4, 13000, works=True), sight(6, 9000)]
    assert uses(sight(0, 0, 1), *left) == [(13000, 9000)]


def test_an_unload_ends_a_use_and_its_readings_are_not_the_use_s() -> None:
    assert uses(sight(0, 9000, 1), sight(2, 400, leaving=True)) == [(9000, 9000)]


def test_unreadable_is_not_zero() -> None:
    assert uses(sight(0, 9000, 1), sight(2, None, 1), sight(4, None)) == [(9000, 9000)]
    assert uses(sight(0, None, 1), sight(2, None)) == [(None, None)]


def test_a_reading_long_after_says_nothing_of_the_use() -> None:
    assert uses(sight(0, 9000, 1), sight(60, 20000)) == [(9000, 9000)]


def loading(size: int, *readings: tuple[float, int]) -> Load:
    load = Load(100.0, size, 300)
    for at, held in readings:
        load = load.seen(held, 100.0 + at)
    return load


def test_a_reload_ends_with_the_last_rise() -> None:
    rising = [(0.25, 300), (0.5, 2000), (0.75, 6000), (1.0, 9000), (1.25, 9000), (2.5, 9010)]
    assert loading(9000, *rising).seconds is None, "it may go on"
    assert loading(9000, *rising, (3.0, 9010)).seconds == 1.0
    assert loading(9000, *rising).ended().seconds == 1.0, "its holder is done"


def test_a_pause_far_below_its_size_is_no_end() -> None:
    part = [(0.5, 2000), (3.0, 2000)]
    assert loading(9000, *part).seconds is None
    assert loading(9000, *part).ended().seconds is None
    assert loading(9000, *part, (4.0, 9000), (6.0, 9000)).seconds == 4.0
    assert loading(0, *part).seconds == 0.5, "where nobody knows its size, standing still is all there is"


def test_a_load_is_watched_closely_while_it_rises() -> None:
    assert loading(9000).rises(129.0)
    assert not loading(9000).rises(130.0), "its holder waits"
    assert loading(9000, (20.0, 2000)).rises(149.0)
    assert not loading(9000, (20.0, 9000), (22.0, 9000)).rises(122.0)


def test_figures_of_what_was_observed() -> None:
    assert observed_figures(AUTO, Account()) is None
    found = observed_figures(
        AUTO, account(observed(9000, 8000, 4.0), observed(12000, 7000), observed(10000, 6000, 2.0))
    )
    assert found is not None
    assert (found.count, found.peak_mib, found.resident_mib, found.reload_seconds) == (3, (10000,), (6000,), 2.0)
    assert (found.peak_p95_mib, found.resident_p95_mib) == ((12000,), (8000,))
