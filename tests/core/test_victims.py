"""Which of the idle residents goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from gpumgr.core.catalog import GpuRef
from gpumgr.core.victims import smallest_set

IDLE = ("chat", "hear", "paint", "code")
HELD: dict[str, dict[GpuRef, int]] = {"chat": {0: 3}, "hear": {0: 2}, "paint": {0: 9, 1: 1}, "code": {0: 4, 1: 5}}


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        ({0: 2}, ("chat",)),  # all do: the least recently used
        ({0: 4}, ("paint",)),  # and not chat and hear, who were used before
        ({0: 3, 1: 1}, ("paint",)),
        ({0: 3, 1: 5}, ("code",)),
        ({0: 10}, ("chat", "paint")),  # hear would do as well as chat, and was used later
        ({0: 15}, ("chat", "paint", "code")),
        ({1: 7}, ()),
    ],
)
def test_the_smallest_set_that_makes_room(short: dict[GpuRef, int], expected: tuple[str, ...]) -> None:
    assert smallest_set(IDLE, HELD, short) == expected


def test_of_sets_of_one_size_the_one_that_spares_who_was_used_last() -> None:
    held: dict[str, dict[GpuRef, int]] = {"a": {0: 1}, "b": {0: 4}, "c": {0: 4}, "d": {0: 7}}
    assert smallest_set("abcd", held, {0: 8}) == ("b", "c")  # and not a and d


def test_a_crowd_is_cut() -> None:
    names = [f"consumer{number}" for number in range(200)]
    held: dict[str, dict[GpuRef, int]] = {name: {0: 1} for name in names}
    assert smallest_set(names, held, {0: 3}) == tuple(names[:3])
    assert smallest_set(names, held, {0: 100}) == tuple(names[:100])
    assert smallest_set(names, held, {0: 201}) == ()


class Asked(Mapping[GpuRef, int]):
    """One MiB on GPU 0, and how often anybody looked."""

    def __init__(self) -> None:
        self.times = 0

    def __getitem__(self, gpu: GpuRef) -> int:
        self.times += 1
        return {0: 1}[int(gpu)]

    def __iter__(self) -> Iterator[GpuRef]:
        return iter((0,))

    def __len__(self) -> int:
        return 1


def test_where_all_of_them_do_not_suffice_no_set_is_looked_at() -> None:
    held = {f"consumer{number}": Asked() for number in range(12)}
    assert smallest_set(list(held), held, {0: 13}) == ()
    assert [each.times for each in held.values()] == [1] * 12
