"""The orders that ours is compared with. Nobody is served by them but in the simulator.

Each is the rule of turn of core/queue.py with another sorting of the heads; two keep a count, which a broker's policy
must not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpumgr.core.catalog import Catalog
from gpumgr.core.queue import Entry, Hold, Line, Stay, SwapSeconds, Turns, heads, in_order


def resident_first(entries: Sequence[Entry], stays: Mapping[str, Stay]) -> list[Entry]:
    on_card = {name for name, stay in stays.items() if stay.since is not None}
    return sorted(entries, key=lambda entry: entry.consumer not in on_card)  # the order of arrival stays within both


@dataclass(frozen=True, slots=True)
class HeadAge:
    """The resident's requests first, until the oldest has waited for ``seconds``: then the oldest. Without a limit it
    is unbounded affinity: what llama-swap and large-model-proxy were seen to do, 2026-11."""

    seconds: float = float("inf")

    def turns(
        self,
        line: Line,
        holds: Iterable[Hold],
        catalog: Catalog,
        now: float,
        stays: Mapping[str, Stay],
        _swap_seconds: SwapSeconds,
    ) -> Turns:
        entries = heads(line, catalog)
        if entries and now - entries[0].arrived_at < self.seconds:
            entries = resident_first(entries, stays)
        return Turns(in_order(entries, Counter(hold.consumer for hold in holds), catalog))


@dataclass(frozen=True, slots=True)
class SkipLimit:
    """The resident's requests first, but nobody is overtaken more than ``most`` times: vramd's order with 3."""

    most: int = 3
    _skipped: Counter[int] = field(default_factory=Counter)

    def turns(
        self,
        line: Line,
        holds: Iterable[Hold],
        catalog: Catalog,
        _now: float,
        stays: Mapping[str, Stay],
        _swap_seconds: SwapSeconds,
    ) -> Turns:
        entries = heads(line, catalog)
        if any(True for _ in holds) or not entries:
            return Turns()
        oldest, first = entries[0], resident_first(entries, stays)[0]
        if first is not oldest and self._skipped[oldest.seq] < self.most:
            self._skipped[oldest.seq] += 1
            return Turns([first])
        return Turns([oldest])
