"""From "the memory is free" to the grant: what gpumgr adds to a backend's own unload, however long that takes.

How: mvoice is resident and takes its time over an unload; a caller acquires comfyui, which may not stand beside it. The
simulated card runs in this process, so that the instant at which mvoice has fallen to its ``residual_mib`` is seen to
half a millisecond; the broker is the real one and reads the card's file. Once with memory that falls within the
2 s in which the card is looked at each 25 ms, once later, when it is looked at less often.

Bar: at most 100 ms, at the 99th percentile of both.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from bench.figure import Bar, Figure, quantile, spread
from bench.rig import Caller
from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.waiting import until

AT_MOST_MS = 100.0
RESIDUAL_MIB = 768
EARLY_SECONDS, LATE_SECONDS = 0.4, 2.6
WARM_UP = 1


def run(early_rounds: int = 30, late_rounds: int = 12) -> Figure:
    with (
        tempfile.TemporaryDirectory(prefix="gpumgr-bench-") as directory,
        Stage(Path(directory), speed=20) as stage,
        RunningBroker(Path(directory), stage.config()) as broker,
    ):
        early = [_round(stage, broker.port, EARLY_SECONDS, n) for n in range(early_rounds + WARM_UP)][WARM_UP:]
        late = [_round(stage, broker.port, LATE_SECONDS, n) for n in range(late_rounds)]
    return Figure(
        name="free_to_grant",
        unit="ms",
        measured=spread("early", early) | spread("late", late) | {"rounds": early_rounds, "late_rounds": late_rounds},
        bars=[
            Bar("memory back within 2 s, to the grant, p99", round(quantile(early, 0.99) * 1000, 1), AT_MOST_MS, "ms"),
            Bar("memory back later, to the grant, p99", round(quantile(late, 0.99) * 1000, 1), AT_MOST_MS, "ms"),
        ],
    )


def _round(stage: Stage, port: int, unload_seconds: float, number: int) -> float:
    """Seconds from the memory's return to the grant's arrival."""
    stage.warm("mvoice")
    until(lambda: stage.mvoice.busy == 0)
    # The phase against the polls moves from round to round.
    stage.mvoice.faults.slow_unload_seconds = unload_seconds + 0.0137 * (number % 8)
    freed: list[float] = []
    watcher = threading.Thread(target=_watch, args=(stage, freed))
    with Caller(port) as caller:
        watcher.start()
        token = caller.acquire("comfyui")
        granted = time.perf_counter()
        watcher.join()
        caller.release(token)
    return granted - freed[0]


def _watch(stage: Stage, freed: list[float]) -> None:
    until(lambda: stage.mvoice.used_mib <= RESIDUAL_MIB, 30, every_seconds=0.0005)
    freed.append(time.perf_counter())
