"""Hand-over without eviction: from sending the release until the next waiter's 200 arrives.

How: on one broker, 200 times in turn: a second caller waits for the same consumer (the broker counts it as
waiting), the holder releases, the second one is granted; then that one releases and acquires again with nobody
there. One thread, two kept-alive connections.

Bar: p50 of the hand-over at most 1.5 times p50 of the release with one's own acquire. Those are two calls and the
hand-over is one, so a ratio above 1 means that waking the waiter costs more than a whole call.
"""

from __future__ import annotations

from bench.figure import Bar, Figure, quantile, spread
from bench.rig import Line, rig

AT_MOST = 1.5
WARM_UP = 20


def run(rounds: int = 200) -> Figure:
    with rig() as stage:
        stage.load_speech()
        line = stage.line(stage.broker(), "mvoice")
        measured = [_round(line) for _ in range(rounds + WARM_UP)][WARM_UP:]
    handed, own = [pair[0] for pair in measured], [pair[1] for pair in measured]
    ratio = quantile(handed, 0.5) / quantile(own, 0.5)
    return Figure(
        name="handover",
        unit="ms",
        measured=spread("handover", handed) | spread("own_release_and_acquire", own) | {"rounds": rounds},
        bars=[Bar("hand-over / own release and acquire, p50", round(ratio, 2), AT_MOST, "times")],
    )


def _round(line: Line) -> tuple[float, float]:
    line.join()
    line.settle()
    return line.hand_over(), line.release_and_acquire()
