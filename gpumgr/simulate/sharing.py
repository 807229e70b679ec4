"""Consumers that share a card by size: whom to send away when one more does not fit.

Owns: the comparison of choices of victims, by the seconds that loads take. Must not: know turns, which it takes as they
come: one request after the other, in order of arrival.

**GreedyDual-Size** (P. Cao, S. Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997): each resident is worth
what its reload costs for each MiB, above the worth of the last victim; the least worth goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gpumgr.core.victims import smallest_set
from gpumgr.simulate.workload import Kind

SIZES_MIB: Mapping[str, int] = {"llm": 9000, "tts": 2500, "image": 12000, "stt": 4000, "code": 15000, "embed": 1500}
SHARING = (
    Kind("llm", 3.0, 8.0, 0.35),
    Kind("tts", 1.0, 3.0, 0.20),
    Kind("image", 12.0, 15.0, 0.15),
    Kind("stt", 2.0, 2.0, 0.15),
    Kind("code", 6.0, 20.0, 0.10),
    Kind("embed", 1.0, 1.0, 0.05),
)
"""Six consumers, of which a card of 16 or 24 GB holds some at a time."""


class Choice(Protocol):
    def used(self, name: str) -> None: ...

    def victims(self, resident: Sequence[str], short_mib: int) -> Sequence[str]:
        """``resident``: the least recently used first."""


@dataclass(slots=True)
class LeastRecentlyUsed:
    """One after the other until there is room."""

    def used(self, name: str) -> None:
        pass

    def victims(self, resident: Sequence[str], short_mib: int) -> Sequence[str]:
        return _until_room(resident, short_mib)


@dataclass(slots=True)
class SmallestSet:
    """The rule of core/victims.py."""

    def used(self, name: str) -> None:
        pass

    def victims(self, resident: Sequence[str], short_mib: int) -> Sequence[str]:
        return smallest_set(resident, {name: {0: SIZES_MIB[name]} for name in resident}, {0: short_mib})


@dataclass(slots=True)
class GreedyDualSize:
    load_seconds: Mapping[str, float]
    _worth: dict[str, float] = field(default_factory=dict)
    _base: float = 0.0

    def used(self, name: str) -> None:
        self._worth[name] = self._base + self.load_seconds[name] / SIZES_MIB[name]

    def victims(self, resident: Sequence[str], short_mib: int) -> Sequence[str]:
        found = _until_room(sorted(resident, key=lambda name: self._worth[name]), short_mib)
        self._base = max(self._worth[name] for name in found)
        return found


def choices(kinds: Sequence[Kind]) -> dict[str, Callable[[], Choice]]:
    load_seconds = {kind.name: kind.load_seconds for kind in kinds}
    return {
        "least recently used": LeastRecentlyUsed,
        "smallest set": SmallestSet,
        "greedy dual size": lambda: GreedyDualSize(load_seconds),
    }


@dataclass(frozen=True, slots=True)
class Loads:
    """For each request: how many seconds of loading, how many loads and unloads."""

    seconds: float
    loads: float
    unloads: float


def loads(requests: Iterable[str], kinds: Sequence[Kind], card_mib: int, choice: Choice) -> Loads:
    """``requests``: whom each is for."""
    load_seconds = {kind.name: kind.load_seconds for kind in kinds}
    resident: dict[str, None] = {}
    count, seconds, loaded, unloaded = 0, 0.0, 0, 0
    for name in requests:
        count += 1
        if name in resident:
            del resident[name]  # and to the end, as the last one that was used
        else:
            short_mib = sum(SIZES_MIB[other] for other in resident) + SIZES_MIB[name] - card_mib
            for victim in choice.victims(list(resident), short_mib) if short_mib > 0 else ():
                del resident[victim]
                unloaded += 1
            seconds += load_seconds[name]
            loaded += 1
        resident[name] = None
        choice.used(name)
    return Loads(seconds / count, loaded / count, unloaded / count)


def _until_room(names: Iterable[str], short_mib: int) -> list[str]:
    found = []
    for name in names:
        if short_mib <= 0:
            break
        found.append(name)
        short_mib -= SIZES_MIB[name]
    return found
