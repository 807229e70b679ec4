"""What a long queue costs those in it: a hand-over with 1000 waiting callers against one with 10.

How: two brokers of the same configuration (1100 threads), their hand-overs measured in turn. ``line``: everyone
waits for the consumer that is handed over, and whoever was holder goes to the end. ``beside``: one caller waits for
it, the others for another consumer behind a holder of their own, which may stand beside the first. A waiting caller
is a socket that has sent its acquire; nobody reads it until it is its turn.

Bar: p50 with 1000 at most 1.5 times p50 with 10, in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.figure import Bar, Figure, quantile, spread
from bench.rig import Line, Rig, allow_open_files, rig

AT_MOST = 1.5
THREADS = 1100
MANY, FEW = 1000, 10
WARM_UP = 10
QUIET_SECONDS = 0.005
"""Before each hand-over, so that what one broker still does after its last call does not slow the other one's."""


def run(rounds: int = 200) -> Figure:
    allow_open_files()
    measured: dict[str, float] = {"rounds": rounds}
    bars = []
    for name, build in (("line", _line), ("beside", _beside)):
        many, few = _measure(build, rounds)
        measured |= spread(f"{name}_{MANY}", many) | spread(f"{name}_{FEW}", few)
        ratio = quantile(many, 0.5) / quantile(few, 0.5)
        bars.append(Bar(f"{MANY} waiting / {FEW} waiting, {name}, p50", round(ratio, 2), AT_MOST, "times"))
    return Figure("waiters", "ms", measured, bars)


def _measure(build: Callable[[Rig, int], Line], rounds: int) -> tuple[list[float], list[float]]:
    with rig() as stage:
        stage.load_speech()
        many, few = build(stage, MANY), build(stage, FEW)
        pairs = [(_hand_over(many), _hand_over(few)) for _ in range(rounds + WARM_UP)][WARM_UP:]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _line(stage: Rig, waiting: int) -> Line:
    return stage.line(stage.broker(threads=THREADS), "mvoice", waiting)


def _beside(stage: Rig, waiting: int) -> Line:
    broker = stage.broker(threads=THREADS)
    stage.line(broker, "whisper", waiting)
    return stage.line(broker, "mvoice", 1)


def _hand_over(line: Line) -> float:
    line.settle()
    time.sleep(QUIET_SECONDS)
    seconds = line.hand_over()
    line.join()
    return seconds
