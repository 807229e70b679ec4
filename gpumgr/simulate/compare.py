"""Workloads and orders, each with each.

Owns: the scenes that orders are compared on, and the comparison. Must not: print, draw or write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Fifo, Policy, Priority
from gpumgr.simulate.bound import beyond_promise, least_longest_wait, least_mean_wait
from gpumgr.simulate.engine import NEVER, Card, Run
from gpumgr.simulate.figures import Figures, figures_of, mean_of
from gpumgr.simulate.peers import HeadAge, SkipLimit
from gpumgr.simulate.workload import CASE, Agent, Arrival, agents, from_trace, poisson, streams

HOUR = 3600.0
FIFO, AFFINITY, OURS = "fifo", "affinity", "quantum"

ORDERS: Mapping[str, Callable[[], Policy]] = {
    FIFO: Fifo,
    AFFINITY: HeadAge,
    "head age 60 s": lambda: HeadAge(60.0),
    "skip limit 3": SkipLimit,
    OURS: Quantum,
}
"""What each is: strict first come first served; the resident first without a bound; the same until the oldest waited so
long; the same until somebody was overtaken so often; ours."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One workload, in one draw for each seed."""

    name: str
    draw: Callable[[int], tuple[Sequence[Arrival], Sequence[Agent]]]
    until: float = NEVER


def open_loop(load: float, count: int) -> Scene:
    return Scene(f"open loop, load {load:g}", lambda seed: (poisson(CASE, load, count, seed), ()))


def urgent(load: float, count: int) -> Scene:
    """The same requests: voices are interactive, images are batch."""
    of = {"tts": Priority.INTERACTIVE, "image": Priority.BATCH}
    kinds = [replace(kind, priority=of.get(kind.name, Priority.NORMAL)) for kind in CASE]
    return Scene(f"priorities, load {load:g}", lambda seed: (poisson(kinds, load, count, seed), ()))


def traced(trace: Sequence[tuple[float, int]], load: float, every: int = 20) -> Scene:
    return Scene(
        f"trace, load {load:g}", lambda seed: (from_trace(trace, CASE, load, every=every, first=seed % every), ())
    )


def two_agents(think_seconds: float) -> Scene:
    """Two agents ask an LLM, a voice is asked for each 40 s and an image each 180 s."""
    others = {"tts": 40.0, "image": 180.0}
    return Scene(
        f"two agents, thinking {think_seconds:g} s",
        lambda seed: (streams(CASE, others, HOUR, seed), agents(CASE, think_seconds, seed, {"llm": 2})),
        HOUR,
    )


def one_client_each(think_seconds: float) -> Scene:
    each = {kind.name: 1 for kind in CASE}
    return Scene(
        f"one client each, thinking {think_seconds:g} s",
        lambda seed: ((), agents(CASE, think_seconds, seed, each)),
        HOUR,
    )


def play(scene: Scene, order: Callable[[], Policy], seed: int) -> Run:
    arrivals, asking = scene.draw(seed)
    return Card(order(), CASE).play(arrivals, asking, scene.until)


def compare(
    scene: Scene, seeds: Sequence[int], orders: Mapping[str, Callable[[], Policy]] = ORDERS
) -> dict[str, Figures]:
    """Each order on the same draws."""
    return {name: mean_of([_judged(scene, order, seed) for seed in seeds]) for name, order in orders.items()}


def _judged(scene: Scene, order: Callable[[], Policy], seed: int) -> Figures:
    run = play(scene, order, seed)
    policy = order()
    return figures_of(run, beyond_promise(run, policy, CASE) if isinstance(policy, Quantum) else 0)


def clairvoyant(scene: Scene, seeds: Sequence[int]) -> dict[str, float] | None:
    """What nobody can beat; None for agents, whose next question depends on the answer."""
    draws = [scene.draw(seed) for seed in seeds]
    if any(asking for _, asking in draws):
        return None
    return {
        "mean": sum(least_mean_wait(arrivals) for arrivals, _ in draws) / len(seeds),
        "longest": sum(least_longest_wait(arrivals) for arrivals, _ in draws) / len(seeds),
    }
