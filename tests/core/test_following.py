"""What follows from each look at work that goes on after its call was answered."""

from __future__ import annotations

import pytest

from gpumgr.core.following import (
    HINTED_SECONDS,
    LONG_SECONDS,
    LOOK_EACH_SECONDS,
    SILENT_SECONDS,
    Followed,
    Look,
    Over,
    Work,
    begun,
)
from gpumgr.core.lease import Call

CALL = Call(7, "paint", began_at=100.0)
GOING_ON, DONE, NOWHERE, REFUSED, SILENT = Look


def after(*looks: tuple[float, Look]) -> Followed | Over:
    followed = begun(CALL, Work("prompt", "6b1f"), 100.0)
    for seconds, look in looks[:-1]:
        held = followed.after(look, 100.0 + seconds)
        assert isinstance(held, Followed), held
        followed = held
    seconds, look = looks[-1]
    return followed.after(look, 100.0 + seconds)


@pytest.mark.parametrize(
    ("looks", "over"),
    [
        ([(0.5, DONE)], Over.DONE),
        ([(0.5, REFUSED)], Over.DIED),
        ([(0.5, GOING_ON)], None),
        ([(86400.0, GOING_ON)], None),  # its consumer says that it works: however long
        ([(0.5, NOWHERE)], None),
        ([(0.5, NOWHERE), (1.0, NOWHERE)], Over.LEFT),
        ([(0.5, NOWHERE), (1.0, DONE)], Over.DONE),
        ([(0.5, NOWHERE), (1.0, GOING_ON), (1.5, NOWHERE)], None),
        ([(0.5, NOWHERE), (1.0, SILENT), (1.5, NOWHERE)], Over.LEFT),
        ([(SILENT_SECONDS - 0.1, SILENT)], None),
        ([(SILENT_SECONDS, SILENT)], Over.LOST),
        ([(50.0, SILENT), (59.0, GOING_ON), (59.0 + SILENT_SECONDS - 0.1, SILENT)], None),
        ([(50.0, SILENT), (59.0, GOING_ON), (59.0 + SILENT_SECONDS, SILENT)], Over.LOST),
    ],
)
def test_what_follows_from_looks(looks: list[tuple[float, Look]], over: Over | None) -> None:
    found = after(*looks)
    assert found is over if over is not None else isinstance(found, Followed)


def test_a_hint_hurries_the_next_look_but_not_a_second_opinion() -> None:
    followed = begun(CALL, Work("prompt", "6b1f"), 100.0)
    assert followed.due_at() == 100.0 + LOOK_EACH_SECONDS
    hinted = Followed(CALL, followed.work, looked_at=100.0, heard_at=100.0, told_at=100.0, hinted=True)
    assert hinted.due_at() == 100.0 + HINTED_SECONDS
    nowhere = Followed(CALL, followed.work, looked_at=100.0, heard_at=100.0, told_at=100.0, nowhere=True, hinted=True)
    assert nowhere.due_at() == 100.0 + LOOK_EACH_SECONDS
    looked = hinted.after(GOING_ON, 100.1)
    assert isinstance(looked, Followed)
    assert not looked.hinted


def test_what_takes_long_is_told_each_time_anew() -> None:
    followed = begun(CALL, Work("prompt", "6b1f"), 100.0)
    assert not followed.is_long(100.0 + LONG_SECONDS - 0.1)
    assert followed.is_long(100.0 + LONG_SECONDS)
