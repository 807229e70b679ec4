"""The order: few swaps and short longest waits at once, against first come first served and affinity without a bound.

How: ``gpumgr.simulate`` plays the queue's own decisions on virtual time, each order on the same seeded draws: open loop
at three loads, with a trace (``GPUMGR_BENCH_TRACE`` names the file) also its arrivals, and callers that ask again. A
longest wait is the mean over the draws' longest, as the longest of all is one draw. ``affinity`` serves the resident
first for ever, as llama-swap does. Pictures of the frontier go beside the results where matplotlib is installed.

Bars: those of the open loop against affinity, and never worse than first come first served. Closed loop: two agents'
answers, and the rarest's longest wait; and one client for each consumer against a swap for each request, and against
the best that the same longest wait allows: a cycle of that length and one image, with one swap for each consumer, and
served without a gap otherwise, measured in the share of time that somebody is served. Where each of them thinks for a
second, none has less than a fifth of another's answers. Nobody waits beyond the stated bound (core/quantum.py), nothing
is over-committed. Deciding with 1000 waiting costs no more than with 10. With priorities an interactive voice's p95 is
half of that without. Beside it, without a bar: what each choice of victims costs where consumers share a card by size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.figure import RESULTS, Bar, Figure, quantile
from gpumgr.core.catalog import NO_BACKEND, Catalog, Consumer
from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Phase, Queue
from gpumgr.simulate.command import Wanted, draw
from gpumgr.simulate.compare import (
    AFFINITY,
    FIFO,
    ORDERS,
    OURS,
    Scene,
    compare,
    one_client_each,
    open_loop,
    play,
    traced,
    two_agents,
    urgent,
)
from gpumgr.simulate.figures import Figures
from gpumgr.simulate.sharing import SHARING, choices, loads
from gpumgr.simulate.workload import CASE, from_trace, poisson, read_trace

LOADS = (0.3, 0.5, 0.7)
OTHER_LOADS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
REQUESTS = 3000
SEEDS = range(1, 21)
FEW_SEEDS = range(1, 5)
COMPARED = {name: ORDERS[name] for name in (FIFO, AFFINITY, OURS)}
TRACE = "GPUMGR_BENCH_TRACE"
DECISIONS = 300
MANY_REQUESTS = 100_000


class Bars:
    """Collects what is compared."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self.measured: dict[str, float] = {}
        self.beyond_promise = 0.0
        self.over_commits = 0.0

    def compare(self, scene: Scene, seeds: Sequence[int]) -> tuple[Figures, Figures, Figures]:
        found = compare(scene, seeds, COMPARED)
        for name, figures in found.items():
            word = f"{scene.name}, {name}"
            self.measured[f"{word}: mean"] = round(figures.all.mean, 2)
            self.measured[f"{word}: p95"] = round(figures.all.p95, 1)
            self.measured[f"{word}: longest"] = round(figures.all.longest, 1)
            self.measured[f"{word}: swaps an hour"] = round(figures.swaps_per_hour, 1)
            self.measured[f"{word}: served an hour"] = round(figures.served_per_hour, 1)
            self.over_commits += figures.over_commits
        self.beyond_promise += found[OURS].beyond_promise
        return found[FIFO], found[AFFINITY], found[OURS]

    def ratio(self, what: str, value: float, other: float, at_most: float) -> None:
        self.bars.append(Bar(what, round(value / other, 3), at_most, "times"))


def run(requests: int = REQUESTS, seeds: Sequence[int] = SEEDS) -> Figure:
    bars = Bars()
    scenes = [open_loop(load, requests) for load in LOADS]
    if os.environ.get(TRACE):
        trace = read_trace(Path(os.environ[TRACE]))
        scenes += [traced(trace, load) for load in LOADS]
    for scene in scenes:
        _open(bars, scene, seeds)
    for load in OTHER_LOADS:
        fifo, _, ours = bars.compare(open_loop(load, requests), FEW_SEEDS)
        bars.ratio(f"load {load:g}: mean wait / fifo", ours.all.mean, fifo.all.mean, 1.0)
    _closed(bars, seeds)
    _priorities(bars, requests, seeds)
    _victims(bars, requests)
    bars.bars.append(Bar("waits beyond the stated bound", bars.beyond_promise, 0, "of all"))
    bars.bars.append(Bar("over-commits", bars.over_commits, 0, "of all"))
    _deciding(bars)
    _playing(bars)
    _pictures(requests)
    return Figure("order", "s", bars.measured, bars.bars)


def _open(bars: Bars, scene: Scene, seeds: Sequence[int]) -> None:
    fifo, affinity, ours = bars.compare(scene, seeds)
    bars.ratio(f"{scene.name}: mean wait / affinity", ours.all.mean, affinity.all.mean, 1.05)
    bars.ratio(f"{scene.name}: p95 / affinity", ours.all.p95, affinity.all.p95, 1.05)
    bars.ratio(f"{scene.name}: longest / affinity", ours.all.longest, affinity.all.longest, 0.85)
    bars.ratio(f"{scene.name}: swaps / affinity", ours.swaps, affinity.swaps, 1.05)
    bars.ratio(f"{scene.name}: mean wait / fifo", ours.all.mean, fifo.all.mean, 1.0)


def _closed(bars: Bars, seeds: Sequence[int]) -> None:
    for think_seconds in (0.0, 1.0):
        scene = two_agents(think_seconds)
        _, affinity, ours = bars.compare(scene, seeds)
        bars.ratio(f"{scene.name}: affinity's answers / ours", affinity.served["llm"], ours.served["llm"], 1.087)
        longest = ours.each["image"].longest, affinity.each["image"].longest
        bars.ratio(f"{scene.name}: rarest's longest / affinity", *longest, 0.5)
    scene = one_client_each(0.0)
    fifo, _, ours = bars.compare(scene, seeds)
    bars.ratio(f"{scene.name}: swap-per-request's answers / ours", fifo.served_per_hour, ours.served_per_hour, 0.4)
    cycle = ours.all.longest + max(kind.service_seconds for kind in CASE)
    best = 1 - sum(kind.load_seconds for kind in CASE) / cycle
    bars.ratio(f"{scene.name}: best useful share / ours", best, ours.useful_share, 1.111)
    scene = one_client_each(1.0)
    served = bars.compare(scene, seeds)[-1].served.values()
    bars.ratio(f"{scene.name}: most answers of a consumer / fewest", max(served), min(served), 5.0)


def _priorities(bars: Bars, requests: int, seeds: Sequence[int]) -> None:
    for load in LOADS[1:]:
        found = [compare(scene(load, requests), seeds, {OURS: ORDERS[OURS]})[OURS] for scene in (open_loop, urgent)]
        without, ours = found
        bars.beyond_promise += ours.beyond_promise
        for name in sorted(ours.each):
            its, before = ours.each[name], without.each[name]
            word = f"priorities, load {load:g}, {name}"
            bars.measured[f"{word}: p95 / without"] = round(its.p95 / before.p95, 3)
            bars.measured[f"{word}: longest / without"] = round(its.longest / before.longest, 3)
        bars.measured[f"priorities, load {load:g}: mean wait / without"] = round(ours.all.mean / without.all.mean, 3)
        bars.measured[f"priorities, load {load:g}: swaps / without"] = round(ours.swaps / without.swaps, 3)
        if load == LOADS[1]:
            bars.ratio(
                f"priorities, load {load:g}: tts p95 / without", ours.each["tts"].p95, without.each["tts"].p95, 0.5
            )


def _victims(bars: Bars, requests: int) -> None:
    """Consumers that share the card by size: what each choice of victims costs in loads."""
    trace = read_trace(Path(os.environ[TRACE])) if os.environ.get(TRACE) else None
    for kinds, cards_mib in ((SHARING, (16_000, 20_000, 24_000, 32_000)), (CASE, (16_000, 22_000))):
        draws = [poisson(kinds, 0.5, requests, seed) for seed in FEW_SEEDS]
        draws += [from_trace(trace, kinds, 0.5, first=seed) for seed in FEW_SEEDS] if trace else []
        for card_mib in cards_mib:
            for name, choice in choices(kinds).items():
                found = [loads([arrival.consumer for arrival in draw], kinds, card_mib, choice()) for draw in draws]
                word = f"victims, {len(kinds)} consumers on {card_mib} MiB, {name}"
                bars.measured[f"{word}: seconds of loading"] = round(fmean(each.seconds for each in found), 3)
                bars.measured[f"{word}: unloads"] = round(fmean(each.unloads for each in found), 3)


def _playing(bars: Bars) -> None:
    start = time.perf_counter()
    play(open_loop(0.7, MANY_REQUESTS), ORDERS[OURS], 1)
    bars.bars.append(Bar(f"playing {MANY_REQUESTS} requests", round(time.perf_counter() - start, 1), 60, "s"))


def _deciding(bars: Bars) -> None:
    few, many = (_decision_seconds(waiting) for waiting in (10, 1000))
    bars.measured["deciding, 1000 waiting, p50 us"] = round(many * 1e6, 1)
    bars.ratio("deciding: 1000 waiting / 10", many, few, 1.5)
    bars.bars.append(Bar("deciding, 1000 waiting", round(many * 1e6, 1), 200, "us"))


def _decision_seconds(waiting: int) -> float:
    """Six consumers; one holds, and everybody waits."""
    names = [f"consumer{number}" for number in range(6)]
    consumers = {name: Consumer(name, None, None, NO_BACKEND) for name in names}
    queue = Queue(Catalog(consumers), Quantum(), lambda _from, _to: 5.0)
    queue.enter(names[0], 0.0)
    for hold in queue.begin(0.0):
        hold.phase = Phase.LIVE
    for number in range(waiting):
        queue.enter(names[number % len(names)], number / 10)
    took = []
    for number in range(DECISIONS):
        start = time.perf_counter()
        queue.begin(100.0 + number)
        took.append(time.perf_counter() - start)
    return quantile(took, 0.5)


def _pictures(requests: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    try:
        draw(Wanted(loads=(0.5, 0.7), requests=requests), FEW_SEEDS, RESULTS)
    except ImportError as error:
        print(f"(no pictures: {error}; make setup)", end=" ")
