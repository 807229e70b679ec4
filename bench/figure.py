"""What a benchmark hands back, how it is shown and where it is kept.

Owns: figures, bars, the table, ``results/``. Must not: measure.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parents[1]


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise: ``value`` is at most ``at_most``, both in ``unit`` (``times`` for a ratio)."""

    what: str
    value: float
    at_most: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value <= self.at_most


@dataclass(frozen=True, slots=True)
class Figure:
    """``measured`` are the numbers behind the bars, all in ``unit`` unless the name says another."""

    name: str
    unit: str
    measured: Mapping[str, float]
    bars: Sequence[Bar]

    @property
    def met(self) -> bool:
        return all(bar.met for bar in self.bars)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all do not exceed; no interpolation."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Seconds as milliseconds: what a reader wants to see of many measurements."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {f"{name}_{label}": round(quantile(seconds, share) * 1000, 3) for label, share in shares.items()}


def keep(figure: Figure) -> Path:
    """Write the figure with the circumstances of its run; the last run's file is the one that is committed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{figure.name}.json"
    bars = [asdict(bar) | {"met": bar.met} for bar in figure.bars]
    shown = asdict(figure) | {"bars": bars, "met": figure.met, "run": circumstances()}
    path.write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    return path


def circumstances() -> dict[str, object]:
    return {
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "python": platform.python_version(),
        "gunicorn": version("gunicorn"),
        "cpus": os.cpu_count(),
        "load_1_minute": round(os.getloadavg()[0], 2),
        "commit": _commit(),
    }


def _commit() -> str:
    """``-dirty`` where what is measured differs from the commit; ``unknown`` outside a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}-dirty" if _git("status", "--porcelain", "gpumgr", "config") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def table(figures: Sequence[Figure]) -> str:
    bars = [(figure, bar) for figure in figures for bar in figure.bars]
    rows = [("figure", "what", "measured", "at most", "")]
    rows += [
        (figure.name, bar.what, _number(bar.value, bar.unit), _number(bar.at_most, bar.unit), _word(bar))
        for figure, bar in bars
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(_line(row, widths) for row in rows)


def _word(bar: Bar) -> str:
    return "met" if bar.met else "MISSED"


def _number(value: float, unit: str) -> str:
    return f"{value:g} {unit}".rstrip()


def _line(row: tuple[str, str, str, str, str], widths: Sequence[int]) -> str:
    name, what, value, limit, word = row
    left, middle = name.ljust(widths[0]), what.ljust(widths[1])
    return f"{left}  {middle}  {value.rjust(widths[2])}  {limit.rjust(widths[3])}  {word}".rstrip()
