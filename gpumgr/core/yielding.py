"""Whether a holder is asked to make way. It is asked, and never made to.

Owns: that one decision, over a hold, whoever would have the turn without it, and ``now``. Must not: end a hold, or know
how its holder is told.

1. Only a live hold is asked, and never before it was held for ``min_hold_seconds``: what it loaded shall be of use.
2. It is asked for the sake of who would have the turn at once if it ended now, and has none because of it. Where those
   are several, as they may run side by side, for the first one with a reason.
3. Reason ``priority``: that one is more urgent than the hold.
4. Reason ``quantum``: that one needs a swap, and is due (core/quantum.py). First come, first served has no quanta.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from gpumgr.core.queue import Entry, Hold, Next, Phase


class YieldReason(StrEnum):
    PRIORITY = "priority"
    QUANTUM = "quantum"


@dataclass(frozen=True, slots=True)
class YieldRequest:
    """``to``: for whom; the holder, when it resumes, comes directly behind it (``Queue.enter(behind=to.seq)``).
    ``since``: from when on it was asked, in monotonic seconds."""

    to: Entry
    reason: YieldReason
    since: float


def yield_request(
    hold: Hold, held_since: float, min_hold_seconds: float, after: Iterable[Next], now: float
) -> YieldRequest | None:
    """``after``: what ``Queue.next_without`` answers for this hold. None: it is not asked."""
    from_then_on = held_since + min_hold_seconds
    if hold.phase is not Phase.LIVE or now < from_then_on:  # 1
        return None
    wishes = (_for(each, hold, from_then_on, now) for each in after)
    return next((wish for wish in wishes if wish is not None), None)  # 2


def _for(after: Next, hold: Hold, from_then_on: float, now: float) -> YieldRequest | None:
    entry = after.entry
    if entry.priority.rank < hold.priority.rank:  # 3
        return YieldRequest(entry, YieldReason.PRIORITY, max(entry.arrived_at, from_then_on))
    if after.due_at is not None and after.due_at <= now:  # 4
        return YieldRequest(entry, YieldReason.QUANTUM, max(entry.arrived_at, after.due_at, from_then_on))
    return None
