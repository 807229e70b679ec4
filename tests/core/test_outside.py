"""Those who claim the card without a turn, and the card at rest: the rules alone."""

from __future__ import annotations

from dataclasses import replace

from gpumgr.core.card import GpuProcess, GpuReading, Reading
from gpumgr.core.outside import Game, Outside, Pause
from gpumgr.core.rest import AGAIN_SECONDS, Absent, Standing, to_clear, to_restore

GAME = Game(7, "bg3.exe", since=5.0, since_at="then")
PAUSE = Pause(since=0.0, until=100.0, since_at="then", until_at="later")
NOBODY = Outside()


def card(used_mib: int | None, at: float, *, pid: int = 7, name: str = "bg3.exe", index: int = 0) -> Reading:
    process = GpuProcess(pid, name, used_mib, None)
    return Reading(at, (GpuReading(index, None, "A Card", 24000, used_mib or 0, 24000 - (used_mib or 0), (process,)),))


def kept_mib(outside: Outside, reading: Reading) -> int:
    return outside.kept_mib(reading.gpus[0])


def test_a_stranger_is_held_at_its_peak_until_the_window_is_over() -> None:
    outside = Outside(peak_seconds=300).reading(card(10000, 0.0)).reading(card(4000, 10.0))
    assert kept_mib(outside, card(4000, 10.0)) == 6000
    outside = outside.reading(card(7000, 200.0))
    assert kept_mib(outside, card(7000, 200.0)) == 3000
    outside = outside.reading(card(5000, 301.0))  # the peak of the window is 7000 now
    assert kept_mib(outside, card(5000, 301.0)) == 2000
    outside = outside.reading(card(5000, 501.0))
    assert kept_mib(outside, card(5000, 501.0)) == 0


def test_a_stranger_that_has_gone_keeps_nothing_and_its_pid_means_nothing() -> None:
    outside = Outside().reading(card(10000, 0.0))
    after = outside.reading(Reading(1.0, (GpuReading(0, None, "A Card", 24000, 0, 24000),)))
    assert after.strangers == {}
    other = outside.reading(card(100, 1.0, name="notebook"))
    assert kept_mib(other, card(100, 1.0, name="notebook")) == 0


def test_what_cannot_be_read_changes_nothing_that_is_known() -> None:
    outside = Outside().reading(card(10000, 0.0))
    assert outside.reading(Reading(1.0, error="gone")).strangers == outside.strangers
    unknown = outside.reading(card(None, 1.0))
    assert unknown.strangers[0, 7].peak_mib == 10000
    assert kept_mib(unknown, card(None, 1.0)) == 0  # what it holds now nobody knows


def test_a_game_has_its_reserve_on_its_gpus_and_a_peak_counts_where_it_is_more() -> None:
    outside = Outside(games=(GAME,), reserve_mib=6144, yields=(0,)).reading(card(4000, 0.0))
    assert kept_mib(outside, card(4000, 0.0)) == 6144
    assert kept_mib(outside, card(0, 0.0, index=1)) == 0
    outside = outside.reading(card(14000, 1.0)).reading(card(4000, 2.0))
    assert kept_mib(outside, card(4000, 2.0)) == 10000


def test_a_hold_comes_before_a_game_and_ends_by_itself() -> None:
    outside = Outside(pause=PAUSE, games=(GAME,))
    assert outside.closed((0,), 99.9) is PAUSE
    assert outside.closed((0,), 100.0) is GAME
    assert replace(outside, games=()).closed((0,), 100.0) is None


def standing(name: str = "chat", **facts: object) -> Standing:
    return replace(
        Standing(name, gpus=(0,), resident=True, free=True, idle_since=0.0),
        **facts,  # type: ignore[arg-type]
    )


def test_who_goes_and_why() -> None:
    idle = standing(idle_unload_seconds=60.0)
    assert to_clear([idle], NOBODY, 59.9) == []
    assert to_clear([idle], NOBODY, 60.0) == [("chat", "idle")]
    assert to_clear([replace(idle, waited_for=True)], NOBODY, 60.0) == []
    assert to_clear([standing(intrudes=("paint",))], NOBODY, 1.0) == [("chat", "intruder")]
    assert to_clear([standing(intrudes=("paint",))], Outside(games=(GAME,)), 1.0) == [("chat", "game")]
    assert to_clear([standing()], Outside(pause=PAUSE, games=(GAME,)), 1.0) == [("chat", "hold")]
    assert to_clear([standing(gpus=(1,))], Outside(games=(GAME,), yields=(0,)), 1.0) == []


def test_nobody_goes_who_is_used_or_not_there_or_was_just_asked_in_vain() -> None:
    paused = Outside(pause=PAUSE)
    assert to_clear([standing(free=False), standing(resident=False)], paused, 1.0) == []
    failed = standing(not_before=1.0 + AGAIN_SECONDS)
    assert to_clear([failed], paused, 1.0) == []
    assert to_clear([failed], paused, 1.0 + AGAIN_SECONDS) == [("chat", "hold")]


def test_who_comes_back() -> None:
    away = Absent("chat", (0,), wanted=True, resident=False, quiet_since=0.0, after_seconds=60.0)
    assert to_restore([away], NOBODY, 59.9) is None
    assert to_restore([away], NOBODY, 60.0) == "chat"
    assert to_restore([replace(away, name="hear", wanted=False), away], NOBODY, 60.0) == "chat"
    for disturbed in (
        replace(away, wanted=False),
        replace(away, resident=True),
        replace(away, quiet_since=None),
        replace(away, not_before=61.0),
    ):
        assert to_restore([disturbed], NOBODY, 60.0) is None
    for outside in (Outside(games=(GAME,)), Outside(pause=PAUSE)):
        assert to_restore([away], outside, 60.0) is None


def test_nobody_comes_back_beside_a_stranger_that_grows() -> None:
    away = Absent("chat", (0,), wanted=True, resident=False, quiet_since=0.0, after_seconds=60.0)
    grown = Outside().reading(card(4000, 0.0)).reading(card(5000, 100.0))
    assert to_restore([away], grown, 110.0) is None
    assert to_restore([away], grown.reading(card(5000, 165.0)), 165.0) == "chat"
    assert to_restore([replace(away, gpus=(1,))], grown, 110.0) == "chat"
