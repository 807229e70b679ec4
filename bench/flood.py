"""Holders while a thousand callers want the GPU in the same moment: no lease is lost to a crowd.

How: a broker as an operator has it (128 threads, 16 of them reserved) with three holders of consumers that may stand
beside each other, whose leases last 1 s. They renew on kept-alive connections, each 10 ms after the answer to the last
one, and somebody looks at the status each 20 ms. Then 1000 connections are made in one moment, and each asks for a held
consumer: 112 wait, the others are refused ``queue_full``. What counts is what is sent in the 5 s from that moment on.
``idle``: the same beside 200 connections that say nothing. ``linger``: the same beside 200 clients that say
``Connection: close`` in the same moment and do not close their own end. The crowds run in processes of their own.

Bars, in each: renews at most 50 ms at p99 and 1 s at most, status at most 100 ms at p99, no lease lost.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from bench.figure import Bar, Figure, quantile, spread
from bench.rig import Caller, rig
from tests.brokers import ROOT, RunningBroker
from tests.waiting import until

CROWD, BESIDE = 1000, 200
THREADS, RESERVED = 128, 16
HELD = ("mvoice", "whisper", "ollama")
TTL_SECONDS = 1.0
SECONDS = 5.0
RENEW_EACH_SECONDS, STATUS_EACH_SECONDS = 0.01, 0.02
RENEW_P99_MS, RENEW_MOST_MS, STATUS_P99_MS = 50.0, 1000.0, 100.0


def run(seconds: float = SECONDS) -> Figure:
    measured: dict[str, float] = {"crowd": CROWD}
    bars: list[Bar] = []
    for name, beside in (("alone", None), ("idle", "idle"), ("linger", "linger")):
        flood = Flood(beside, seconds)
        measured |= flood.measured(name)
        bars += flood.bars(name)
    return Figure("flood", "ms", measured, bars)


class Flood:
    """One, beside another crowd or none. ``renews`` and ``status`` are seconds; ``lost`` counts leases."""

    def __init__(self, beside: str | None, seconds: float) -> None:
        self.renews: list[float] = []
        self.status: list[float] = []
        self.lost = 0
        self._seconds = seconds
        with rig() as stage:
            lease = {"min_ttl_seconds": TTL_SECONDS}
            self._hold(stage.broker(threads=THREADS, reserved_threads=RESERVED, lease=lease), beside)

    def _hold(self, broker: RunningBroker, beside: str | None) -> None:
        over, begun = threading.Event(), threading.Event()
        with ThreadPoolExecutor(len(HELD) + 1) as pool:
            keeping = [pool.submit(_keep, broker.port, name, begun, over) for name in HELD]
            looking = pool.submit(_look, broker.port, begun, over)
            until(lambda: len(broker.status()["leases"]) == len(HELD), 30)
            with ExitStack() as stack:
                crowds = [stack.enter_context(_Crowd(broker.port, BESIDE, beside))] if beside else []
                crowds.append(stack.enter_context(_Crowd(broker.port, CROWD, "acquire")))
                begun.set()
                for crowd in crowds:
                    crowd.go()
                time.sleep(self._seconds)
                over.set()
                kept = [each.result() for each in keeping]
                waiting = len(broker.status()["queue"])
                refused = crowds[-1].end()
        if (waiting, refused) != (THREADS - RESERVED, {"503": CROWD - THREADS + RESERVED}):
            raise RuntimeError(f"this was no flood: {waiting} wait, and the others were answered {refused}")
        self.renews = [seconds for times, _ in kept for seconds in times]
        self.lost = sum(lost for _, lost in kept)
        self.status = looking.result()

    def measured(self, name: str) -> dict[str, float]:
        figures = spread(f"{name}_renew", self.renews) | spread(f"{name}_status", self.status)
        figures[f"{name}_renew_most"] = round(max(self.renews) * 1000, 3)
        return figures | {f"{name}_renews": len(self.renews), f"{name}_lost": self.lost}

    def bars(self, name: str) -> list[Bar]:
        where = {"alone": "", "idle": f", {BESIDE} idle connections", "linger": f", {BESIDE} that do not close"}[name]
        renew, status = quantile(self.renews, 0.99) * 1000, quantile(self.status, 0.99) * 1000
        return [
            Bar(f"renew under {CROWD} acquires{where}, p99", round(renew, 2), RENEW_P99_MS, "ms"),
            Bar(f"the slowest renew{where}", round(max(self.renews) * 1000, 2), RENEW_MOST_MS, "ms"),
            Bar(f"status{where}, p99", round(status, 2), STATUS_P99_MS, "ms"),
            Bar(f"leases lost{where}", self.lost, 0, ""),
        ]


def _keep(port: int, consumer: str, begun: threading.Event, over: threading.Event) -> tuple[list[float], int]:
    """Hold it and renew; the seconds of each renew since it has begun, and whether the lease was lost (0 or 1)."""
    with Caller(port) as holder:
        holder.send("POST", "/v1/lease", {"consumer": consumer, "ttl_seconds": TTL_SECONDS})
        token = holder.receive().require()["token"]
        lost = False

        def renew() -> None:
            nonlocal lost
            lost = lost or holder.call("POST", f"/v1/lease/{token}/renew").status != 200

        return _timed(renew, RENEW_EACH_SECONDS, begun, over), int(lost)


def _look(port: int, begun: threading.Event, over: threading.Event) -> list[float]:
    with Caller(port) as caller:
        return _timed(lambda: caller.call("GET", "/v1/status").require(), STATUS_EACH_SECONDS, begun, over)


def _timed(
    call: Callable[[], object], each_seconds: float, begun: threading.Event, over: threading.Event
) -> list[float]:
    """The seconds of each call that was sent between the two."""
    times = []
    while not over.wait(each_seconds):
        counts, start = begun.is_set(), time.perf_counter()
        call()
        if counts:
            times.append(time.perf_counter() - start)
    return times


class _Crowd:
    """Of ``what``, see bench/crowd.py."""

    def __init__(self, port: int, count: int, what: str) -> None:
        command = [sys.executable, "-m", "bench.crowd", str(port), str(count), what]
        self._running = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._hear("ready")

    def go(self) -> None:
        """It has connected, or tried to, when this returns."""
        if self._running.stdin is None:
            raise TypeError("the crowd has no stdin")
        self._running.stdin.write("\n")
        self._hear("begun")

    def _hear(self, word: str) -> None:
        if self._running.stdout is None or self._running.stdout.readline() != f"{word}\n":
            raise RuntimeError(f"the crowd is not {word}")

    def end(self) -> dict[str, int]:
        """Its answers by status."""
        said, _ = self._running.communicate()
        found: dict[str, int] = json.loads(said)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._running.poll() is None:
            self._running.communicate()
