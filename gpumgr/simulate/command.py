"""``gpumgr simulate``: orders compared, as a table, as JSON and in pictures. Owns: what is played and where it goes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Policy
from gpumgr.simulate.compare import (
    AFFINITY,
    FIFO,
    ORDERS,
    OURS,
    Scene,
    clairvoyant,
    compare,
    one_client_each,
    open_loop,
    play,
    traced,
    two_agents,
)
from gpumgr.simulate.figures import Figures
from gpumgr.simulate.peers import HeadAge
from gpumgr.simulate.report import as_json, table
from gpumgr.simulate.workload import CASE, read_trace

SWEPT_FACTORS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 20.0)
SWEPT_SECONDS = (15.0, 30.0, 60.0, 120.0, 240.0)
SHOWN_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """``requests`` for each load and seed. ``directory``: where JSON and pictures go; None: the table is all."""

    loads: Sequence[float] = (0.3, 0.5, 0.7)
    requests: int = 3000
    seeds: int = 3
    trace: Path | None = None
    every: int = 20
    closed: bool = True
    directory: Path | None = None
    pictures: bool = True


def simulate(wanted: Wanted) -> int:
    """Prints. Raises: OSError, ValueError where the trace cannot be read; ImportError before anything is played, where
    pictures are wanted and there is no matplotlib."""
    if wanted.directory is not None and wanted.pictures:
        importlib.import_module("gpumgr.simulate.pictures")
    seeds = range(1, wanted.seeds + 1)
    found = {}
    for scene in scenes(wanted):
        compared, bound = compare(scene, seeds), clairvoyant(scene, seeds)
        print(table(scene.name, compared, bound), end="\n\n", flush=True)
        found[scene.name] = as_json(compared, bound)
    if wanted.directory is not None:
        wanted.directory.mkdir(parents=True, exist_ok=True)
        kept = {"loads": list(wanted.loads), "requests": wanted.requests, "seeds": list(seeds), "scenes": found}
        (wanted.directory / "simulate.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        if wanted.pictures:
            draw(wanted, seeds, wanted.directory)
    return 0


def scenes(wanted: Wanted) -> list[Scene]:
    found = [open_loop(load, wanted.requests) for load in wanted.loads]
    if wanted.trace is not None:
        trace = read_trace(wanted.trace)
        found += [traced(trace, load, wanted.every) for load in wanted.loads]
    if wanted.closed:
        found += [two_agents(0.0), two_agents(1.0), one_client_each(0.0), one_client_each(1.0)]
    return found


def draw(wanted: Wanted, seeds: Sequence[int], directory: Path) -> list[Path]:
    """Needs matplotlib. Raises: ImportError."""
    from gpumgr.simulate import pictures  # nothing else needs matplotlib

    written = []
    for load in wanted.loads:
        scene = open_loop(load, wanted.requests)
        compared = compare(scene, seeds)
        written.append(directory / f"frontier_{load:g}.png")
        orders = {name: _point(figures) for name, figures in compared.items() if name != FIFO or load < 0.6}
        pictures.frontier(scene.name, orders, _sweeps(scene, seeds), written[-1])
    written.append(directory / "timeline.png")
    scene = open_loop(0.7, 200)
    runs = {name: play(scene, ORDERS[name], seeds[0]) for name in (FIFO, AFFINITY, OURS)}
    pictures.timeline(scene.name, runs, CASE, SHOWN_SECONDS, written[-1])
    return written


def _sweeps(scene: Scene, seeds: Sequence[int]) -> dict[str, list[tuple[str, tuple[float, float]]]]:
    swept: dict[str, dict[str, Callable[[], Policy]]] = {
        "factor": {f"{factor:g}": partial(Quantum, factor=factor) for factor in SWEPT_FACTORS},
        "fixed quantum": {f"{seconds:g} s": partial(Quantum, seconds) for seconds in SWEPT_SECONDS},
        "head age": {f"{seconds:g} s": partial(HeadAge, seconds) for seconds in SWEPT_SECONDS},
    }
    return {
        name: [(value, _point(figures)) for value, figures in compare(scene, seeds, orders).items()]
        for name, orders in swept.items()
    }


def _point(figures: Figures) -> tuple[float, float]:
    return figures.swaps_per_hour, figures.all.longest
