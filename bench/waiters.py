"""What a long queue costs those in it: a hand-over with 1000 waiting callers against one with 10.

How: two brokers of the same configuration (1100 threads), their hand-overs measured in turn. ``line``: everyone
waits for the consumer that is handed over, and whoever was holder goes to the end. ``beside``: one caller waits for
it, the others for another consumer behind a holder of their own, which may stand beside the first. A waiting caller
is a socket that has sent its acquire; nobody reads it until it is its turn.

Bars: p50 with 1000 at most 1.5 times p50 with 10, in both; and so of the CPU time that the broker takes for a
hand-over, and for the one who joins the line after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

from bench.figure import Bar, Figure, quantile, spread
from bench.idle import cpu_seconds
from bench.rig import Line, Rig, allow_open_files, rig
from tests.brokers import RunningBroker

AT_MOST = 1.5
THREADS = 1100
MANY, FEW = 1000, 10
WARM_UP = 10
QUIET_SECONDS = 0.005
"""Before each hand-over, so that what one broker still does after its last call does not slow the other one's."""

Build = Callable[[Rig, int], tuple[Line, RunningBroker]]


def run(rounds: int = 200) -> Figure:
    allow_open_files()
    measured: dict[str, float] = {"rounds": rounds}
    bars = []
    for name, build in (("line", _line), ("beside", _beside)):
        many, few, cpu = _measure(build, rounds)
        measured |= spread(f"{name}_{MANY}", many) | spread(f"{name}_{FEW}", few)
        ratio = quantile(many, 0.5) / quantile(few, 0.5)
        bars.append(Bar(f"{MANY} waiting / {FEW} waiting, {name}, p50", round(ratio, 2), AT_MOST, "times"))
        measured |= {
            f"{name}_{waiting}_cpu": round(1000 * each, 3) for waiting, each in zip((MANY, FEW), cpu, strict=True)
        }
        bars.append(Bar(f"{MANY} waiting / {FEW} waiting, {name}, CPU", round(cpu[0] / cpu[1], 2), AT_MOST, "times"))
    return Figure("waiters", "ms", measured, bars)


def _measure(build: Build, rounds: int) -> tuple[list[float], list[float], tuple[float, float]]:
    """Seconds of each hand-over, and of CPU time for one round, with many and with few."""
    with rig() as stage:
        stage.load_speech()
        (many, of_many), (few, of_few) = build(stage, MANY), build(stage, FEW)
        for _ in range(WARM_UP):
            _hand_over(many), _hand_over(few)
        before = [cpu_seconds([psutil.Process(broker.worker_pid())]) for broker in (of_many, of_few)]
        pairs = [(_hand_over(many), _hand_over(few)) for _ in range(rounds)]
        after = [cpu_seconds([psutil.Process(broker.worker_pid())]) for broker in (of_many, of_few)]
    cpu = (after[0] - before[0]) / rounds, (after[1] - before[1]) / rounds
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], cpu


def _line(stage: Rig, waiting: int) -> tuple[Line, RunningBroker]:
    broker = stage.broker(threads=THREADS)
    return stage.line(broker, "mvoice", waiting), broker


def _beside(stage: Rig, waiting: int) -> tuple[Line, RunningBroker]:
    broker = stage.broker(threads=THREADS)
    stage.line(broker, "whisper", waiting)
    return stage.line(broker, "mvoice", 1), broker


def _hand_over(line: Line) -> float:
    line.settle()
    time.sleep(QUIET_SECONDS)
    seconds = line.hand_over()
    line.join()
    return seconds
