"""What a run is judged by. Owns: waits, swaps, throughput and their means over seeds. Must not: play or print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gpumgr.simulate.engine import NEVER, Run


@dataclass(frozen=True, slots=True)
class Waits:
    """In seconds; of a request that still waited at the end, so far."""

    count: float
    mean: float
    p95: float
    longest: float


@dataclass(frozen=True, slots=True)
class Figures:
    """``served`` and ``each`` by consumer. ``useful_share``: of the time, in which somebody was served."""

    all: Waits
    each: dict[str, Waits]
    served: dict[str, float]
    swaps: float
    seconds: float
    useful_share: float
    over_commits: float
    beyond_promise: float = 0.0

    @property
    def served_per_hour(self) -> float:
        return 3600 * sum(self.served.values()) / self.seconds

    @property
    def swaps_per_hour(self) -> float:
        return 3600 * self.swaps / self.seconds


def waits_of(seconds: Sequence[float]) -> Waits:
    ordered = sorted(seconds)
    if not ordered:
        return Waits(0, 0.0, 0.0, 0.0)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return Waits(len(ordered), sum(ordered) / len(ordered), p95, ordered[-1])


def figures_of(run: Run, beyond_promise: int = 0) -> Figures:
    waited: dict[str, list[float]] = {}
    useful = 0.0
    for request in run.requests:
        waited.setdefault(request.consumer, []).append(request.waited_seconds(run.ended_at))
        if request.granted_at < run.ended_at:
            useful += min(request.ended_at, run.ended_at) - request.granted_at
    return Figures(
        all=waits_of([seconds for each in waited.values() for seconds in each]),
        each={name: waits_of(seconds) for name, seconds in sorted(waited.items())},
        served=dict(Counter(r.consumer for r in run.requests if r.ended_at != NEVER and r.ended_at <= run.ended_at)),
        swaps=len(run.loads),
        seconds=run.ended_at,
        useful_share=useful / run.ended_at,
        over_commits=run.over_commits,
        beyond_promise=beyond_promise,
    )


def mean_of(runs: Sequence[Figures]) -> Figures:
    """Over the seeds; also of the longest waits, as the longest of all is one draw."""
    names = sorted({name for figures in runs for name in figures.each})
    nothing = waits_of([])
    return Figures(
        all=_mean_waits([figures.all for figures in runs]),
        each={name: _mean_waits([figures.each.get(name, nothing) for figures in runs]) for name in names},
        served={name: _mean([figures.served.get(name, 0) for figures in runs]) for name in names},
        swaps=_mean([figures.swaps for figures in runs]),
        seconds=_mean([figures.seconds for figures in runs]),
        useful_share=_mean([figures.useful_share for figures in runs]),
        over_commits=sum(figures.over_commits for figures in runs),
        beyond_promise=sum(figures.beyond_promise for figures in runs),
    )


def _mean_waits(waits: Sequence[Waits]) -> Waits:
    return Waits(
        _mean([each.count for each in waits]),
        _mean([each.mean for each in waits]),
        _mean([each.p95 for each in waits]),
        _mean([each.longest for each in waits]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
