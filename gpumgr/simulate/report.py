"""A comparison as a table and as JSON. Must not: play or draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gpumgr.simulate.figures import Figures

HEAD = ("order", "mean", "p95", "longest", "swaps/h", "served/h", "useful")


def table(scene: str, compared: Mapping[str, Figures], bound: Mapping[str, float] | None) -> str:
    """Waits in seconds, over all and by consumer."""
    names = sorted({name for figures in compared.values() for name in figures.each})
    rows = [(*HEAD, *(f"{name}: mean, p95, longest" for name in names))]
    for order, figures in compared.items():
        waits = figures.all
        each = [figures.each.get(name) for name in names]
        rows.append(
            (
                order,
                f"{waits.mean:.1f}",
                f"{waits.p95:.1f}",
                f"{waits.longest:.0f}",
                f"{figures.swaps_per_hour:.1f}",
                f"{figures.served_per_hour:.0f}",
                f"{100 * figures.useful_share:.0f} %",
                *("" if w is None else f"{w.mean:.1f} {w.p95:.0f} {w.longest:.0f}" for w in each),
            )
        )
    if bound is not None:
        least = ("nobody can beat", f"{bound['mean']:z.1f}", "", f"{bound['longest']:z.0f}")
        rows.append((*least, *[""] * (len(rows[0]) - len(least))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join([f"{scene}:", *(_line(row, widths) for row in rows)])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()


def as_json(compared: Mapping[str, Figures], bound: Mapping[str, float] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        order: asdict(figures) | {"served_per_hour": figures.served_per_hour, "swaps_per_hour": figures.swaps_per_hour}
        for order, figures in compared.items()
    }
    if bound is not None:
        found["clairvoyant"] = dict(bound)
    return {name: _rounded(each) for name, each in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value
