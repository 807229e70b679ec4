"""A renew while every place that may wait is taken: a holder must never lose its lease to a full queue.

How: two brokers as an operator has them (128 threads, 16 of them reserved), one with 112 callers waiting behind the
holder (one more is refused ``queue_full``), one with none. 2000 renews of each on a kept-alive connection, in turn, and
200 of each on a connection of their own, its connect included.

Bar: p99 with the full queue at most 25 ms, on both kinds of connection.
"""

from __future__ import annotations

import time

from bench.figure import Bar, Figure, quantile, spread
from bench.rig import Caller, Line, Rig, rig

AT_MOST_MS = 25.0
THREADS, RESERVED = 128, 16
WARM_UP = 20


def run(rounds: int = 2000, fresh_rounds: int = 200) -> Figure:
    with rig() as stage:
        full, empty = _full_line(stage), stage.line(stage.broker(), "mvoice")
        for _ in range(WARM_UP):
            _kept(full), _kept(empty)
        kept = [(_kept(full), _kept(empty)) for _ in range(rounds)]
        fresh = [(_fresh(full), _fresh(empty)) for _ in range(fresh_rounds)]
        full.settle()  # everyone still waits
    measured: dict[str, float] = {"waiting": full.waiting, "rounds": rounds, "fresh_rounds": fresh_rounds}
    for name, pairs in (("kept", kept), ("fresh", fresh)):
        measured |= spread(f"full_{name}", [pair[0] for pair in pairs])
        measured |= spread(f"empty_{name}", [pair[1] for pair in pairs])
    return Figure("renew", "ms", measured, [_bar("kept-alive", kept), _bar("fresh connection", fresh)])


def _full_line(stage: Rig) -> Line:
    broker = stage.broker(threads=THREADS, reserved_threads=RESERVED)
    line = stage.line(broker, "mvoice", THREADS - RESERVED)
    with Caller(broker.port) as late:
        late.ask("mvoice")
        refused = late.receive()
    if refused.status != 503 or refused.body["error"]["code"] != "queue_full":
        raise RuntimeError(f"the queue is not full: one more caller gets {refused}")
    return line


def _kept(line: Line) -> float:
    start = time.perf_counter()
    line.holder.renew(line.token)
    return time.perf_counter() - start


def _fresh(line: Line) -> float:
    start = time.perf_counter()
    with Caller(line.port) as caller:
        caller.renew(line.token)
    return time.perf_counter() - start


def _bar(what: str, pairs: list[tuple[float, float]]) -> Bar:
    p99 = quantile([full for full, _ in pairs], 0.99) * 1000
    return Bar(f"renew under a full queue, {what}, p99", round(p99, 2), AT_MOST_MS, "ms")
