"""What no order can beat, and what ours promises.

Owns: the clairvoyant lower bounds, and the bound of core/quantum.py for each request of a run. Must not: decide turns.

**Clairvoyant**: somebody who knows every arrival and every service beforehand, whose swaps cost nothing, and who may
interrupt a service and go on with it later. On one card the shortest remaining service first then has the least mean
wait (SRPT, Schrage 1968), and the earliest deadline first, of arrival plus service, the least maximum (Horn 1974). A
wait is what is left of the time between arrival and end without the service. Nobody reaches both at once, nor either
with swaps that cost: they are bounds, not orders.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

from gpumgr.core.quantum import Quantum, round_trip_seconds
from gpumgr.simulate.engine import Run
from gpumgr.simulate.workload import Arrival, Kind


def least_mean_wait(arrivals: Sequence[Arrival]) -> float:
    waits = _preemptive(arrivals, lambda _arrival, left: left)
    return sum(waits) / len(waits)


def least_longest_wait(arrivals: Sequence[Arrival]) -> float:
    return max(_preemptive(arrivals, lambda arrival, _left: arrival.at + arrival.service_seconds))


def _preemptive(arrivals: Sequence[Arrival], key: Callable[[Arrival, float], float]) -> list[float]:
    """The waits where whoever has the smallest key is served, until it ends or the next one comes."""
    ready: list[tuple[float, int, float]] = []
    waits: list[float] = []
    now = 0.0
    for number, arrival in enumerate([*arrivals, None]):
        until = float("inf") if arrival is None else arrival.at
        while ready and now < until:
            _, served, left = heapq.heappop(ready)
            its = arrivals[served]
            if now + left > until:
                left -= until - now
                heapq.heappush(ready, (key(its, left), served, left))
                break
            now += left
            waits.append(now - its.at - its.service_seconds)
        now = max(now, until) if arrival is not None else now
        if arrival is not None:
            heapq.heappush(ready, (key(arrival, arrival.service_seconds), number, arrival.service_seconds))
    return waits


def beyond_promise(run: Run, policy: Quantum, kinds: Sequence[Kind]) -> int:
    """How many requests waited longer than core/quantum.py says; it must be none."""
    load = {kind.name: kind.load_seconds for kind in kinds}
    swap = max(load.values())
    longest: dict[str, float] = {}
    for request in run.requests:
        longest[request.consumer] = max(longest.get(request.consumer, 0.0), request.service_seconds)
    overtaken = {
        name: sum(
            max(policy.longest_seconds(round_trip_seconds(d, e, lambda _from, to: load[to])) for e in load if e != d)
            + longest.get(d, 0.0)
            for d in load
            if d != name
        )
        for name in load
    }
    ends = sorted((request.ended_at, request.service_seconds) for request in run.requests)
    done = [0.0, *accumulate(seconds for _, seconds in ends)]
    before = [0.0, *accumulate(request.service_seconds for request in run.requests)]
    ended = [at for at, _ in ends]
    count = 0
    for number, request in enumerate(run.requests):
        gone = bisect_right(ended, request.arrived_at)
        work = before[number] - done[gone]
        swaps = (number - gone + 1) * swap
        promised = work + swaps + overtaken[request.consumer]
        count += request.waited_seconds(run.ended_at) > promised + 1e-6
    return count
