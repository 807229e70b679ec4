"""Who of the idle residents goes where memory is short.

Owns: the choice among those who may go. Must not: know why memory is short, or who may go (core/placement.py).

The smallest set that makes room goes: each unload and each load back takes its time, however little it frees. Among
sets of one size, the one whose most recently used member was used the longest ago. What a reload costs is not looked
at: gpumgr/simulate/sharing.py measures what that would add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from gpumgr.core.catalog import GpuRef

LOOKED_AT = 12
"""Of so many the sets can be gone through, under the lock. Where these make no room, the others go one after the other
until there is."""


def smallest_set(
    idle: Sequence[str], held_mib: Mapping[str, Mapping[GpuRef, int]], short_mib: Mapping[GpuRef, int]
) -> tuple[str, ...]:
    """``idle``: the least recently used first; so is the answer. Empty where all of them together make no room."""
    numbers = range(min(len(idle), LOOKED_AT))
    if not _makes_room(numbers, idle, held_mib, short_mib):  # who waits for a holder's memory asks twice a second
        ends = range(LOOKED_AT + 1, len(idle) + 1)
        return next((tuple(idle[:end]) for end in ends if _makes_room(range(end), idle, held_mib, short_mib)), ())
    for size in range(1, len(numbers) + 1):
        sets = (some for some in combinations(numbers, size) if _makes_room(some, idle, held_mib, short_mib))
        best = min(sets, key=lambda some: some[::-1], default=None)
        if best is not None:
            return tuple(idle[number] for number in best)
    return ()


def _makes_room(
    some: Sequence[int],
    idle: Sequence[str],
    held_mib: Mapping[str, Mapping[GpuRef, int]],
    short_mib: Mapping[GpuRef, int],
) -> bool:
    return all(sum(held_mib[idle[number]].get(gpu, 0) for number in some) >= mib for gpu, mib in short_mib.items())
