"""Two pictures: swaps against the longest wait, and what the card does. Needs matplotlib (the extra ``dev``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")  # a server has no screen
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpumgr.simulate.engine import Run
from gpumgr.simulate.workload import Kind

Point = tuple[float, float]
LOADING = "0.55"


def frontier(
    scene: str, orders: Mapping[str, Point], sweeps: Mapping[str, Sequence[tuple[str, Point]]], file: Path
) -> None:
    """``orders``: swaps an hour and the longest wait of each; ``sweeps``: the same over one setting, by its value."""
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for name, points in sweeps.items():
        axes.plot(*zip(*(point for _, point in points), strict=True), ".-", alpha=0.7, label=name)
        for value, point in points:
            axes.annotate(value, point, fontsize=7, textcoords="offset points", xytext=(3, 3))
    for name, point in orders.items():
        axes.plot(*point, "o", markersize=9, label=name)
    axes.set(title=f"{scene}: down and to the left is better", xlabel="swaps an hour", ylabel="longest wait, s")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _write(figure, file)


def timeline(scene: str, runs: Mapping[str, Run], kinds: Sequence[Kind], until: float, file: Path) -> None:
    """Each order's card: whose holds, in grey the loads, and above it how many wait."""
    figure, rows = plt.subplots(len(runs), 1, figsize=(11, 1.7 * len(runs)), sharex=True, squeeze=False)
    for axes, (name, run) in zip(rows[:, 0], runs.items(), strict=True):
        _card(axes, run, kinds, until)
        axes.set_ylabel(name, rotation=0, ha="right")
    rows[0, 0].set_title(scene)
    rows[0, 0].legend(fontsize=7, ncols=len(kinds) + 1, loc="upper right")
    rows[-1, 0].set_xlabel("s")
    _write(figure, file)


def _card(axes: Axes, run: Run, kinds: Sequence[Kind], until: float) -> None:
    for number, kind in enumerate(kinds):
        spans = [
            (r.granted_at, r.service_seconds) for r in run.requests if r.consumer == kind.name and r.granted_at < until
        ]
        axes.broken_barh(spans, (0, 1), color=f"C{number}", label=kind.name)
    loads = [(began, ended - began) for began, ended, _ in run.loads if began < until]
    axes.broken_barh(loads, (0, 1), color=LOADING, label="loading")
    steps = sorted(
        [(r.arrived_at, 1) for r in run.requests if r.arrived_at < until]
        + [(r.granted_at, -1) for r in run.requests if r.granted_at < until]
    )
    times, waiting = [0.0], [0]
    for at, step in steps:
        times.append(at)
        waiting.append(waiting[-1] + step)
    above = axes.twinx()
    above.step(times, waiting, where="post", color="black", linewidth=0.8)
    above.set_ylim(bottom=0)
    axes.set(xlim=(0, until), ylim=(0, 1), yticks=[])


def _write(figure: Figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
