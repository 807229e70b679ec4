"""What an answer says: a value at a dotted path, the items of a list, a sum of metrics, and a condition on it.

Owns: reading answers, and the sentence about one that does not say it. Must not: send anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from gpumgr.config import Call, Each, Report
from gpumgr.runtime.ports import BackendError

ITEM = "{item}"
METRIC = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?\s+(\S+)")
"""A line of Prometheus' text format, without its time."""


def find(path: str, answer: Any) -> Any:
    """The value at a dotted path; ``*`` is each item of a list, and lists of lists become one.

    Raises: LookupError, TypeError, ValueError.
    """
    here, _, rest = path.partition(".")
    if here == "*":
        if not isinstance(answer, list):
            raise TypeError("not a list")
        found = [find(rest, item) if rest else item for item in answer]
        return [inner for each in found for inner in (each if isinstance(each, list) else [each])]
    value = answer[int(here)] if isinstance(answer, list) else answer[here]
    return find(rest, value) if rest else value


def at(report: Report, answer: Any) -> Any:
    """Raises: BackendError."""
    try:
        return find(report.json or "", answer)
    except (LookupError, TypeError, ValueError):
        raise _says_nothing(report) from None


def holds(report: Report, value: Any) -> bool:
    """The report's condition on a value of its answer. A text, a list or a mapping counts as its length where it is
    compared with a number.

    Raises: BackendError.
    """
    if report.equals is not None:
        return _same(value, report.equals)
    if report.not_equals is not None:
        return not _same(value, report.not_equals)
    try:
        number = float(len(value) if isinstance(value, list | dict | str) else value or 0)
    except (TypeError, ValueError, OverflowError):
        raise _says_nothing(report) from None
    return number < report.below if report.below is not None else number > report.above


def _same(value: Any, wanted: object) -> bool:
    """1 is not true here."""
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def _says_nothing(report: Report) -> BackendError:
    return BackendError("failed", f"GET {report.path}: no number at {report.json!r}")


def items(each: Each, answer: Any) -> list[str]:
    """Raises: BackendError."""
    try:
        listed = find(each.json, answer)
    except (LookupError, TypeError, ValueError):
        listed = ()
    if listed is None:  # as some servers write an empty one
        return []
    if not isinstance(listed, list) or any(isinstance(i, bool) or not isinstance(i, str | int) for i in listed):
        raise BackendError("failed", f"GET {each.path}: no list of names at {each.json!r}")
    return [str(item) for item in listed]


def filled(call: Call, item: str) -> Call:
    """The call for this item. In a path it is escaped, but for the slashes that names of models have."""
    path = None if call.path is None else call.path.replace(ITEM, quote(item, safe="/"))
    return replace(call, path=path, json=_filled(call.json, item))


def _filled(value: Any, item: str) -> Any:
    if isinstance(value, str):
        return value.replace(ITEM, item)
    if isinstance(value, dict):
        return {key: _filled(inner, item) for key, inner in value.items()}
    return [_filled(inner, item) for inner in value] if isinstance(value, list) else value


def metrics(text: str, names: Sequence[str], path: str) -> float:
    """Raises: BackendError where one of them is not there at all, or is no number."""
    sums: dict[str, float] = {}
    try:
        for line in text.splitlines():
            match = METRIC.match(line)
            if match is not None and match[1] in names:
                sums[match[1]] = sums.get(match[1], 0.0) + float(match[2])
    except ValueError:
        raise BackendError("failed", f"GET {path}: a metric is no number") from None
    if any(map(math.isnan, sums.values())):
        raise BackendError("failed", f"GET {path}: a metric is no number")
    if missing := [name for name in names if name not in sums]:
        raise BackendError("failed", f"GET {path}: it does not tell {', '.join(missing)}")
    return sum(sums.values())
