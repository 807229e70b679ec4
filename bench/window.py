"""What must never happen between a grant and its release, counted while many want the card.

``window``: one caller for images and 20 for the other kinds, each in a circle: acquire, let the service work (it
loads when asked to), renew, release. Counted over all leases, from the moment the grant has arrived to the moment
the release is sent: work or unload calls to a service that may not stand beside the holder's; leases that overlap
and may not. And over-commits: memory that a service asked the card for and did not get.

``lazy``: a card on which ollama and mvoice may stand beside each other and do not fit together, and services that load
only after the grant. Over-commits again. ``lazy_unbrokered``: the same callers without a broker, which shows
that the measure can tell.

The services live in this process, so that their ledgers can be read: the times here say nothing.

Bars: all zero.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import requests

from bench.figure import Bar, Figure
from bench.rig import Caller
from gpumgr.sim.stage import SMALL, Stage
from tests.brokers import RunningBroker

SPEED = 40.0
COMPETITORS = 20
RENEWS = 3
SMALL_CARD_MIB = 11_500
LAZY = ("ollama", "mvoice")
LAZY_SECONDS = 0.03
"""Between a grant and the first work: long enough for another grant that counts on the same memory."""
LAZY_CALLERS = 6


@dataclass(frozen=True, slots=True)
class Window:
    """From the grant's arrival to the release's departure, monotonic seconds: inside what the broker calls held."""

    consumer: str
    start: float
    end: float


def run(seconds: float = 25.0, lazy_seconds: float = 12.0) -> Figure:
    measured: dict[str, float] = _contended(seconds) | _lazy(lazy_seconds) | _lazy_unbrokered(lazy_seconds / 4)
    wanted = {
        "stray_calls": "work or unload calls to competitors within a lease",
        "overlaps": "leases that overlap and may not",
        "over_commits": "over-commits",
        "lazy_over_commits": "over-commits, lazy loading",
    }
    return Figure("window", "count", measured, [Bar(what, measured[key], 0, "") for key, what in wanted.items()])


def _contended(seconds: float) -> dict[str, float]:
    with _stage(24_000) as stage, _broker(stage) as broker:
        circle = Circle(stage, broker.port, seconds)
        circle.turn(["comfyui", *(SMALL[number % len(SMALL)] for number in range(COMPETITORS))])
        images = sum(window.consumer == "comfyui" for window in circle.windows)
        if not images or images == len(circle.windows):
            raise RuntimeError("nobody competed: there is nothing to count")
        return {
            "grants": len(circle.windows),
            "grants_image": images,
            "unloads": sum(service.unload_calls for service in stage.services.values()),
            "stray_calls": sum(_stray_calls(stage, window) for window in circle.windows),
            "overlaps": _overlaps(circle.windows),
            "over_commits": stage.card.over_commits,
        }


def _lazy(seconds: float) -> dict[str, float]:
    with _stage(SMALL_CARD_MIB) as stage, _broker(stage) as broker:
        circle = Circle(stage, broker.port, seconds, LAZY_SECONDS)
        circle.turn([LAZY[number % len(LAZY)] for number in range(LAZY_CALLERS)])
        loads = sum(stage.services[name].loads for name in LAZY)
        return {
            "lazy_grants": len(circle.windows),
            "lazy_loads": loads,
            "lazy_over_commits": stage.card.over_commits,
        }


def _lazy_unbrokered(seconds: float) -> dict[str, float]:
    with _stage(SMALL_CARD_MIB) as stage:
        until = time.monotonic() + seconds

        def work(name: str) -> None:
            while time.monotonic() < until:
                try:
                    stage.warm(name)
                except requests.RequestException:
                    continue  # out of memory: the card has counted it

        _together([lambda name=name: work(name) for name in LAZY])  # type: ignore[misc]
        return {"lazy_unbrokered_over_commits": stage.card.over_commits}


class Circle:
    """Callers that lease, work and release until the time is over. ``windows`` are their leases, in no order."""

    def __init__(self, stage: Stage, port: int, seconds: float, lazy_seconds: float = 0.0) -> None:
        self._stage = stage
        self._port = port
        self._until = time.monotonic() + seconds
        self._lazy_seconds = lazy_seconds
        self._lock = threading.Lock()
        self.windows: list[Window] = []

    def turn(self, consumers: list[str]) -> None:
        """Raises: whatever a caller met: no lease may be refused, lost or starved of memory here."""
        _together([lambda name=name: self._repeat(name) for name in consumers])  # type: ignore[misc]

    def _repeat(self, consumer: str) -> None:
        with Caller(self._port) as caller:
            while time.monotonic() < self._until:
                window = self._lease(caller, consumer)
                with self._lock:
                    self.windows.append(window)

    def _lease(self, caller: Caller, consumer: str) -> Window:
        token = caller.acquire(consumer)
        start = time.monotonic()
        time.sleep(self._lazy_seconds)
        self._stage.warm(consumer)
        for _ in range(RENEWS):
            caller.renew(token)
        end = time.monotonic()
        caller.release(token)
        return Window(consumer, start, end)


def _together(runs: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(runs)) as pool:
        for running in [pool.submit(run) for run in runs]:
            running.result()


def _may_not_overlap(one: str, other: str) -> bool:
    """As the stage configures it: the small ones stand beside each other, each is one lease at a time."""
    return one == other or one not in SMALL or other not in SMALL


def _overlaps(windows: list[Window]) -> int:
    return sum(
        _may_not_overlap(a.consumer, b.consumer) and a.start < b.end and b.start < a.end
        for a, b in combinations(windows, 2)
    )


def _stray_calls(stage: Stage, window: Window) -> int:
    """Work and unload calls are POSTs; health and reports are GETs, and are allowed."""
    others = [service for name, service in stage.services.items() if name != window.consumer]
    return sum(
        method == "POST" and window.start <= at <= window.end
        for service in others
        if _may_not_overlap(service.name, window.consumer)
        for at, method, _ in service.calls
    )


@contextmanager
def _stage(total_mib: int) -> Iterator[Stage]:
    with (
        tempfile.TemporaryDirectory(prefix="gpumgr-bench-") as directory,
        Stage(Path(directory), speed=SPEED, total_mib=total_mib) as stage,
    ):
        yield stage


def _broker(stage: Stage) -> RunningBroker:
    directory = stage.directory / "broker"
    directory.mkdir()
    return RunningBroker(directory, stage.config(state_dir=directory / "state"))
