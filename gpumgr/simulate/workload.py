"""Who asks for the card, and when: arrivals of an open loop, of a trace, and agents that ask again.

Owns: the case that policies are compared on, and everything random, which is seeded. Must not: decide or measure.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gpumgr.core.queue import Priority


@dataclass(frozen=True, slots=True)
class Kind:
    """One consumer. ``load_seconds`` is what a swap to it costs; ``service_seconds`` how long it is held in the mean
    (exponential); ``share`` how many of all requests are for it; ``priority`` that of each of them."""

    name: str
    load_seconds: float
    service_seconds: float
    share: float
    priority: Priority = Priority.NORMAL


CASE = (Kind("llm", 3.0, 8.0, 0.45), Kind("tts", 1.0, 3.0, 0.35), Kind("image", 12.0, 15.0, 0.20))
"""A chat model of some GB, a voice, and an image model, on a card that holds one of them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    consumer: str
    service_seconds: float
    priority: Priority = Priority.NORMAL


@dataclass(slots=True)
class Agent:
    """It asks, is served, thinks, and asks again. ``begins_at``: its first question."""

    consumer: str
    service_seconds: float
    think_seconds: float
    draw: random.Random
    begins_at: float = 0.0

    def next_service_seconds(self) -> float:
        return self.draw.expovariate(1 / self.service_seconds)


def mean_service_seconds(kinds: Sequence[Kind]) -> float:
    return sum(kind.share * kind.service_seconds for kind in kinds)


def poisson(kinds: Sequence[Kind], load: float, count: int, seed: int) -> list[Arrival]:
    """``load``: the share of time that the card would compute if swaps were free."""
    draw = _draw(seed)
    rate = load / mean_service_seconds(kinds)
    found: list[Arrival] = []
    at = 0.0
    for kind in draw.choices(kinds, [kind.share for kind in kinds], k=count):
        at += draw.expovariate(rate)
        found.append(Arrival(at, kind.name, draw.expovariate(1 / kind.service_seconds), kind.priority))
    return found


def streams(kinds: Sequence[Kind], each_seconds: Mapping[str, float], until: float, seed: int) -> list[Arrival]:
    """A Poisson stream of its own for each of these, one request each so many seconds in the mean."""
    found: list[Arrival] = []
    for kind in kinds:
        if kind.name in each_seconds:
            times = _times(each_seconds[kind.name], until, _draw(seed, kind.name))
            draw = _draw(seed, kind.name, "service")
            found += [Arrival(at, kind.name, draw.expovariate(1 / kind.service_seconds)) for at in times]
    return sorted(found, key=lambda arrival: arrival.at)


def agents(kinds: Sequence[Kind], think_seconds: float, seed: int, at_once: Mapping[str, int]) -> list[Agent]:
    """``at_once``: how many of each consumer."""
    return [
        Agent(kind.name, kind.service_seconds, think_seconds, _draw(seed, kind.name, number))
        for kind in kinds
        for number in range(at_once.get(kind.name, 0))
    ]


def read_trace(file: Path) -> list[tuple[float, int]]:
    """Of each row the second it came at and the tokens it was answered with. The columns are those of the Azure LLM
    inference trace 2023: ``TIMESTAMP, ContextTokens, GeneratedTokens``.

    Raises: OSError, ValueError.
    """
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"TIMESTAMP", "GeneratedTokens"} <= rows[0].keys():
        raise ValueError(f"{file}: no rows with the columns TIMESTAMP and GeneratedTokens")
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]  # datetime has no 7th digit
    return [((at - times[0]).total_seconds(), int(row["GeneratedTokens"])) for at, row in zip(times, rows, strict=True)]


def from_trace(
    trace: Sequence[tuple[float, int]], kinds: Sequence[Kind], load: float, *, every: int = 20, first: int = 0
) -> list[Arrival]:
    """The arrivals of a trace for the first of ``kinds``, thinned to every n-th row and stretched until one card has
    this load; bursts stay. What they are served for follows their tokens. The others are seeded Poisson streams.

    Raises: ValueError.
    """
    rows = trace[first::every]
    tokens = sum(count for _, count in rows)
    if len(rows) < 2 or not tokens or rows[-1][0] <= rows[0][0]:
        raise ValueError(f"the trace has too few rows to take every {every}-th of them")
    traced, *others = kinds
    rate = load / mean_service_seconds(kinds)
    span = len(rows) / (rate * traced.share)
    stretch = span / (rows[-1][0] - rows[0][0])
    per_token = traced.service_seconds * len(rows) / tokens
    found = [Arrival((at - rows[0][0]) * stretch, traced.name, count * per_token) for at, count in rows]
    each_seconds = {other.name: 1 / (rate * other.share) for other in others}
    return sorted(found + streams(kinds, each_seconds, span, first), key=lambda arrival: arrival.at)


def _times(each_seconds: float, until: float, draw: random.Random) -> Iterator[float]:
    at = draw.expovariate(1 / each_seconds)
    while at < until:
        yield at
        at += draw.expovariate(1 / each_seconds)


def _draw(*seed: object) -> random.Random:
    return random.Random(repr(seed))  # noqa: S311 - a workload, not a secret
