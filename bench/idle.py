"""What the broker takes from the machine while nobody wants anything.

How: a broker with the default configuration serves 100 hand-overs, then everyone hangs up. After a pause its CPU time
(user and system) is counted over 30 s and its memory read: master and worker together, memory as PSS, so that the
pages they share count once. The simulated services answer its health checks from a process of their own.

Bars: at most 0.5 % of one core, at most 80 MB.
"""

from __future__ import annotations

import time

import psutil

from bench.figure import Bar, Figure
from bench.rig import Line, rig

AT_MOST_PERCENT = 0.5
AT_MOST_MB = 80.0
SETTLE_SECONDS = 2.0
HAND_OVERS = 100


def run(seconds: float = 30.0) -> Figure:
    with rig() as stage:
        broker = stage.broker()
        _work(broker.port)
        if broker.process is None:
            raise RuntimeError("the broker is not running")
        master = psutil.Process(broker.process.pid)
        both = [master, *master.children()]
        time.sleep(SETTLE_SECONDS)
        percent = cpu_percent(both, seconds)
        megabytes = [process.memory_full_info().pss / 1e6 for process in both]
        threads = sum(process.num_threads() for process in both)
    measured = {"cpu_percent": round(percent, 3), "pss_master": round(megabytes[0], 1), "seconds": seconds}
    measured |= {"pss_worker": round(sum(megabytes[1:]), 1), "threads": threads}
    return Figure(
        name="idle",
        unit="MB",
        measured=measured,
        bars=[
            Bar("CPU at rest, of one core", round(percent, 3), AT_MOST_PERCENT, "%"),
            Bar("memory at rest, PSS", round(sum(megabytes), 1), AT_MOST_MB, "MB"),
        ],
    )


def _work(port: int) -> None:
    with Line(port, "mvoice") as line:
        for _ in range(HAND_OVERS):
            line.join()
            line.settle()
            line.hand_over()
        line.holder.release(line.token)


def cpu_percent(processes: list[psutil.Process], seconds: float) -> float:
    before, start = cpu_seconds(processes), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(processes) - before) / (time.monotonic() - start) * 100


def cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(spent.user + spent.system for spent in times)
