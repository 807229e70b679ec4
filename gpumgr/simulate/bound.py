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
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from gpumgr.core.quantum import Quantum, round_trip_seconds
from gpumgr.core.queue import HEAD_START_SECONDS
from gpumgr.simulate.engine import Request, Run
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
    overtaken = _overtaken_seconds(run, policy, load)
    count = 0
    running: list[Request] = []
    for number, request in enumerate(run.requests):
        at, order = request.arrived_at, request.order
        running = [other for other in running if other.ended_at >= at]  # at the same instant: it ended after this came
        before = [other for other in running if other.order < order or other.turn_at <= at]
        later = list(_later_and_ahead(run.requests, number))
        work = sum(other.service_seconds + swap for other in (*before, *later))
        turns = [name for name in load if name != request.consumer]
        turns += [other.consumer for other in later if other.consumer != request.consumer]
        promised = work + swap + sum(overtaken[name] for name in turns)
        count += request.waited_seconds(run.ended_at) > promised + 1e-6
        running.append(request)
    return count


def _overtaken_seconds(run: Run, policy: Quantum, load: Mapping[str, float]) -> dict[str, float]:
    """How long one turn of each may keep others waiting: its longest quantum, and the hold that runs at its end."""
    longest: dict[str, float] = dict.fromkeys(load, 0.0)
    for request in run.requests:
        longest[request.consumer] = max(longest[request.consumer], request.service_seconds)
    quanta = {
        name: [
            policy.longest_seconds(round_trip_seconds(name, other, lambda _from, to: load[to]))
            for other in load
            if other != name
        ]
        for name in load
    }
    return {name: max(quanta[name], default=0.0) + longest[name] for name in load}


def _later_and_ahead(requests: Sequence[Request], number: int) -> Iterator[Request]:
    """Those that came later, and are ahead of it by their priority."""
    request = requests[number]
    for other in islice(requests, number + 1, None):
        if other.arrived_at > request.arrived_at + 2 * HEAD_START_SECONDS:
            return
        if other.order < request.order:
            yield other
