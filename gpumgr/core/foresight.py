"""What would come of a preparation, played on values: who would be unloaded, and what is decided then.

Owns: going through a decision's unloads as if each of them gave its memory back. Must not: decide (core/placement.py
does), or change what it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gpumgr.core.card import GpuReading
from gpumgr.core.catalog import Consumer, GpuRef
from gpumgr.core.placement import Decision, Unload, Victim, View

MOST_STEPS = 100
"""Each step unloads somebody who is then gone; this is for who would go round in a circle."""

LeftMib = Callable[[str, GpuRef], int]
"""What a consumer is expected to keep on a GPU after its unload."""


@dataclass(frozen=True, slots=True)
class Foresight:
    """The unloads, in their order, and the decision after the last one, which is none."""

    unloads: Sequence[Unload]
    last: Decision


def foresee(target: Consumer, view: View, decide: Callable[[Consumer, View], Decision], left_mib: LeftMib) -> Foresight:
    """What ``decide`` leads to where every unload succeeds."""
    unloads: list[Unload] = []
    decision = decide(target, view)
    while isinstance(decision, Unload) and len(unloads) < MOST_STEPS:
        unloads.append(decision)
        for name in decision.consumers:
            view = _unloaded(view.catalog.consumers[name], view, left_mib)
        decision = decide(target, view)
    return Foresight(unloads, decision)


def _unloaded(victim: Consumer, view: View, left_mib: LeftMib) -> View:
    before = {gpu: view.held(victim.name, gpu) for gpu in victim.gpus}
    left = {gpu: min(held.held_mib, left_mib(victim.name, gpu)) for gpu, held in before.items()}
    gone = {gpu: held.held_mib - left[gpu] for gpu, held in before.items()}
    after = {(victim.name, gpu): replace(held, held_mib=left[gpu], resident=False) for gpu, held in before.items()}
    gpus = tuple(_with_free(gpu, gone.get(gpu.index, 0)) for gpu in view.reading.gpus)
    proof = Victim(victim.name, sum(held.held_mib for held in before.values()), sum(left.values()))
    return replace(
        view,
        reading=replace(view.reading, gpus=gpus),
        holdings={**view.holdings, **after},
        tried=(*view.tried, proof),
    )


def _with_free(gpu: GpuReading, more_mib: int) -> GpuReading:
    return replace(gpu, free_mib=gpu.free_mib + more_mib, used_mib=gpu.used_mib - more_mib)
