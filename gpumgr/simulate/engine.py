"""One card on virtual time: the real queue with a policy, and loads and holds that only pass.

Owns: the clock that jumps from one event to the next. Must not: decide whose turn it is.

A request is held from its turn on: first for the load, where another consumer is on the card, then for its service. It
waited until it was loaded. The card holds one consumer at a time; a load under somebody's hold would be an over-commit,
and is counted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from gpumgr.core.catalog import NO_BACKEND, Catalog, Consumer
from gpumgr.core.queue import Hold, Order, Phase, Policy, Priority, Queue
from gpumgr.simulate.workload import Agent, Arrival, Kind

NEVER = float("inf")


@dataclass(slots=True)
class Request:
    """``order``: its place in the queue. ``turn_at`` + the load = ``granted_at``; ``ended_at`` = that + its service.
    ``NEVER`` as long as it waits."""

    seq: int
    order: Order
    consumer: str
    arrived_at: float
    service_seconds: float
    agent: Agent | None = None
    turn_at: float = NEVER
    granted_at: float = NEVER
    ended_at: float = NEVER

    def waited_seconds(self, now: float) -> float:
        """Until its grant, or so far."""
        return min(self.granted_at, max(now, self.arrived_at)) - self.arrived_at


@dataclass(slots=True)
class Run:
    """What came of it. ``ended_at``: when the last event was, or the run was cut."""

    requests: list[Request] = field(default_factory=list)
    loads: list[tuple[float, float, str]] = field(default_factory=list)
    over_commits: int = 0
    ended_at: float = 0.0


class Card:
    """Plays one workload. ``until``: it is cut then; without it, it ends when everybody was served."""

    def __init__(self, policy: Policy, kinds: Sequence[Kind]) -> None:
        self.load_seconds = {kind.name: kind.load_seconds for kind in kinds}
        consumers = {kind.name: Consumer(kind.name, None, None, NO_BACKEND) for kind in kinds}
        self.queue = Queue(Catalog(consumers), policy, lambda _from, to: self.load_seconds[to])
        self.run = Run()
        self._waiting: dict[int, Request] = {}
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._on_card: str | None = None

    def play(self, arrivals: Sequence[Arrival], agents: Sequence[Agent] = (), until: float = NEVER) -> Run:
        """``arrivals`` in order of time."""
        for agent in agents:
            self._at(agent.begins_at, self._ask, agent)
        coming = iter(arrivals)
        following = next(coming, None)
        while True:
            arrives_at = NEVER if following is None else following.at
            happens_at = self._events[0][0] if self._events else NEVER
            again_at = NEVER if self.queue.look_again_at is None else self.queue.look_again_at
            now = min(arrives_at, happens_at, again_at)
            if now > until or now == NEVER:
                break
            if happens_at <= now:
                _, _, happen, arguments = heapq.heappop(self._events)
                happen(now, *arguments)
            elif following is not None and arrives_at <= now:
                self._enter(now, following.consumer, following.service_seconds, following.priority)
                following = next(coming, None)
            self._begin(now)
            self.run.ended_at = now
        self.run.ended_at = until if until < NEVER else self.run.ended_at
        return self.run

    def _at(self, at: float, happen: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (at, next(self._order), happen, arguments))

    def _enter(
        self,
        now: float,
        consumer: str,
        service_seconds: float,
        priority: Priority = Priority.NORMAL,
        agent: Agent | None = None,
    ) -> None:
        entry = self.queue.enter(consumer, now, priority=priority)
        request = Request(entry.seq, entry.order, consumer, now, service_seconds, agent)
        self.run.requests.append(request)
        self._waiting[entry.seq] = request

    def _ask(self, now: float, agent: Agent) -> None:
        self._enter(now, agent.consumer, agent.next_service_seconds(), agent=agent)

    def _begin(self, now: float) -> None:
        while begun := self.queue.begin(now):
            for hold in begun:
                self._prepare(now, hold)

    def _prepare(self, now: float, hold: Hold) -> None:
        request = self._waiting.pop(hold.seq)
        loads = 0.0 if self._on_card == hold.consumer else self.load_seconds[hold.consumer]
        if loads:
            self.run.over_commits += len(self.queue.holds) > 1
            self.run.loads.append((now, now + loads, hold.consumer))
            self._on_card = hold.consumer
            self._at(now + loads, self._grant, hold)
        else:
            hold.phase = Phase.LIVE
        request.turn_at, request.granted_at = now, now + loads
        request.ended_at = request.granted_at + request.service_seconds
        self._at(request.ended_at, self._end, request)

    def _grant(self, _now: float, hold: Hold) -> None:
        hold.phase = Phase.LIVE

    def _end(self, now: float, request: Request) -> None:
        self.queue.leave(request.seq)
        if request.agent is not None:
            self._at(now + request.agent.think_seconds, self._ask, request.agent)
