"""The order over HTTP: the arrivals that the simulator plays, played in real time against a real broker.

How: three services that exclude each other on the simulated card, loading for 3, 1 and 12 s; 160 Poisson requests of
load 0.5, each a lease, a first call that loads where it must, its service, and the release; all of it twenty times as
fast, with the order's own seconds scaled alike (bench/scaled_conf.py). Once as it is by default and once first come,
first served, side by side on two brokers. Then the simulator plays the same arrivals, with swaps and requests
that cost what they were seen to cost beside load and service. A wait ends when the service is loaded.

Bars: the real run's mean and longest wait and its swaps are what the simulator says (not those of first come, first
served: they grow without end, and with them each difference); shorter waits than that; nobody waits beyond the stated
bound; the card never holds what does not fit.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import requests

from bench.figure import Bar, Figure, quantile
from bench.rig import Caller
from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Fifo, Policy
from gpumgr.sim.card import SimulatedCard, SimulatedGpu
from gpumgr.sim.speech import Speech
from gpumgr.simulate.bound import beyond_promise
from gpumgr.simulate.engine import Card, Request
from gpumgr.simulate.figures import figures_of
from gpumgr.simulate.workload import CASE, Arrival, poisson
from tests.brokers import RunningBroker

SPEED = 20.0
LOAD = 0.5
REQUESTS = 160
SEED = 11
RESIDENT_MIB = 18000
WAIT_SECONDS = 600.0
ALONE = 12
NEAR = 1.3
"""Two clocks, some dozens of swaps and a machine with other work: so much may lie between a run and its simulation."""


@dataclass(slots=True)
class Served:
    """In seconds of the world that is played, not of this one."""

    arrival: Arrival
    waited_seconds: float = 0.0
    error: str | None = None


class World:
    """One card, its three services and a broker."""

    def __init__(self, stack: ExitStack, policy: str) -> None:
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpumgr-bench-")))
        self.card = SimulatedCard((SimulatedGpu(total_mib=24000),), self.directory / "card.json")
        self.services = {
            kind.name: stack.enter_context(
                Speech(
                    kind.name,
                    self.card,
                    resident_mib=RESIDENT_MIB,
                    load_seconds=kind.load_seconds / SPEED,
                    unload_seconds=0.01,
                    work_seconds=0.0,
                )
            )
            for kind in CASE
        }
        broker = RunningBroker(self.directory, self._config(policy), {"GPUMGR_BENCH_SPEED": str(SPEED)})
        broker.start("-c", "bench/scaled_conf.py")
        self.broker = broker
        stack.callback(broker.stop)

    def _config(self, policy: str) -> dict[str, Any]:
        consumers = {
            name: {
                "dialect": "http",
                "url": service.url,
                "vram_resident_mib": RESIDENT_MIB,
                "health": {"path": "/health", "timeout_seconds": 2},
                "busy": {"path": "/busy", "json": "running", "above": 0},
                "unload": {"method": "POST", "path": "/unload"},
            }
            for name, service in self.services.items()
        }
        return {
            "gpu": {"probe": "simulated", "simulated_card": str(self.directory / "card.json")},
            "server": {"threads": 512},
            "lease": {"max_wait_seconds": WAIT_SECONDS},
            "scheduling": {"policy": policy},
            "consumers": consumers,
        }

    def costs(self) -> tuple[float, float]:
        """What a swap costs beside its load, and a request beside its service, with nobody else there: in the world
        that is played."""
        names = list(self.services)
        swaps = [self._once(names[number % len(names)])[0] for number in range(ALONE)]
        rest = [sum(self._once(name)) for name in names[-1:] for _ in range(ALONE)]
        return quantile(swaps[1:], 0.5) * SPEED, quantile(rest, 0.5) * SPEED

    def _once(self, name: str) -> tuple[float, float]:
        """Until its grant, and what follows that, without the load."""
        with Caller(self.broker.port) as caller:
            began = time.perf_counter()
            token = caller.acquire(name)
            granted = time.perf_counter()
            self._say(name)
            said = time.perf_counter()
            caller.release(token)
            ended = time.perf_counter()
        load = 0.0 if granted - began < 0.01 else self.services[name].load_seconds
        return granted - began, said - granted - load + ended - said

    def swaps(self) -> int:
        return sum(consumer["evictions"] for consumer in self.broker.status()["consumers"])

    def play(self, arrivals: Sequence[Arrival]) -> list[Served]:
        served = [Served(arrival) for arrival in arrivals]
        began = time.perf_counter()
        threads = [threading.Thread(target=self._ask, args=(each, began), daemon=True) for each in served]
        for thread, each in zip(threads, served, strict=True):
            time.sleep(max(0.0, began + each.arrival.at / SPEED - time.perf_counter()))
            thread.start()
        for thread in threads:
            thread.join()
        return served

    def _ask(self, served: Served, began: float) -> None:
        arrival = served.arrival
        try:
            with Caller(self.broker.port) as caller:
                token = caller.acquire(arrival.consumer, WAIT_SECONDS)
                self._say(arrival.consumer)
                served.waited_seconds = (time.perf_counter() - began) * SPEED - arrival.at
                time.sleep(arrival.service_seconds / SPEED)
                caller.release(token)
        except (RuntimeError, OSError) as error:
            served.error = str(error)

    def _say(self, name: str) -> None:
        requests.post(f"{self.services[name].url}/v1/audio/speech", json={"input": "x"}, timeout=60).raise_for_status()


@dataclass(frozen=True, slots=True)
class Played:
    """One order's run, and what the simulator says of the same arrivals."""

    served: list[Served]
    costs: tuple[float, float]
    """Of a swap beside its load, and of a request beside its service."""
    found: dict[str, float]
    simulated: dict[str, float]
    beyond_promise: int


def run(count: int = REQUESTS) -> Figure:
    arrivals = poisson(CASE, LOAD, count, SEED)
    orders: Mapping[str, Policy] = {"quantum": Quantum(), "fifo": Fifo()}
    with ExitStack() as stack:
        worlds = {name: World(stack, name) for name in orders}
        costs = {name: world.costs() for name, world in worlds.items()}
        before = {name: world.swaps() for name, world in worlds.items()}
        served = _side_by_side(worlds, arrivals)
        swaps = {name: world.swaps() - before[name] for name, world in worlds.items()}
        over_commits = sum(world.card.over_commits for world in worlds.values())
    played = {name: _judged(order, arrivals, served[name], costs[name], swaps[name]) for name, order in orders.items()}
    failed = sum(each.error is not None for all_ in served.values() for each in all_)
    bars = _near("quantum", played["quantum"])
    shorter = played["quantum"].found["mean wait"] / played["fifo"].found["mean wait"]
    bars.append(Bar("mean wait / first come, first served", round(shorter, 3), 1.0, "times"))
    bars.append(Bar("waits beyond the stated bound", played["quantum"].beyond_promise, 0, "of all"))
    bars.append(Bar("failed requests", failed, 0, "of all"))
    bars.append(Bar("over-commits", over_commits, 0, "of all"))
    return Figure("order_http", "s", _measured(played) | {"requests": count, "speed": SPEED}, bars)


def _judged(
    order: Policy, arrivals: Sequence[Arrival], served: Sequence[Served], costs: tuple[float, float], swaps: int
) -> Played:
    of_swap, of_request = costs
    kinds = [replace(kind, load_seconds=kind.load_seconds + of_swap) for kind in CASE]
    longer = [replace(arrival, service_seconds=arrival.service_seconds + of_request) for arrival in arrivals]
    simulated = Card(order, kinds).play(longer)
    said = figures_of(simulated)
    waits = [each.waited_seconds for each in served]
    real = replace(simulated, requests=[_as_it_was(*pair) for pair in zip(simulated.requests, served, strict=True)])
    return Played(
        list(served),
        costs,
        {"mean wait": sum(waits) / len(waits), "longest wait": max(waits), "swaps": swaps},
        {"mean wait": said.all.mean, "longest wait": said.all.longest, "swaps": said.swaps},
        beyond_promise(real, order, kinds) if isinstance(order, Quantum) else 0,
    )


def _as_it_was(simulated: Request, served: Served) -> Request:
    granted_at = simulated.arrived_at + served.waited_seconds
    return replace(simulated, granted_at=granted_at, ended_at=granted_at + simulated.service_seconds)


def _near(name: str, played: Played) -> list[Bar]:
    bars = []
    for what, value in played.found.items():
        said = played.simulated[what]
        apart = max(value, said) / max(0.001, min(value, said))
        bars.append(Bar(f"{name}: {what}, real and simulated apart", round(apart, 3), NEAR, "times"))
    return bars


def _measured(played: Mapping[str, Played]) -> dict[str, float]:
    measured = {}
    for name, each in played.items():
        measured[f"{name}: a swap beside its load"] = round(each.costs[0], 2)
        measured[f"{name}: a request beside its service"] = round(each.costs[1], 2)
        for what, value in each.found.items():
            measured[f"{name}: {what}"] = round(value, 2)
            measured[f"{name}: {what}, simulated"] = round(each.simulated[what], 2)
    return measured


def _side_by_side(worlds: Mapping[str, World], arrivals: Sequence[Arrival]) -> dict[str, list[Served]]:
    served: dict[str, list[Served]] = {}

    def play(name: str, world: World) -> None:
        served[name] = world.play(arrivals)

    threads = [threading.Thread(target=play, args=each) for each in worlds.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return served
