"""Whether a holder is asked to make way. It is asked, and never made to.

Owns: that one decision, over a hold, whoever would have the turn without it, and ``now``. Must not: end a hold, or know
how its holder is told.

1. Only the live hold of a lease is asked, and never before it was held for ``min_hold_seconds``: what it loaded shall
   be of use.
2. It is asked for the sake of who would have the turn at once if it ended now, and has none because of it; or if all
   ended that are asked for the same one's sake. Where those are several, as they may run side by side, for the first
   one with a reason.
3. Reason ``priority``: that one is more urgent than the hold.
4. Reason ``quantum``: that one needs a swap, and is due (core/quantum.py). First come, first served has no quanta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gpumgr.core.queue import Entry, Hold, Next, Phase, Queue


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
    hold: Hold, queue: Queue, held_since: Mapping[int, float], min_hold_seconds: float, now: float
) -> YieldRequest | None:
    """``held_since``: of each lease's hold, by number, in monotonic seconds. None: it is not asked."""
    asked_from = {seq: since + min_hold_seconds for seq, since in held_since.items()}
    may_be_asked = [each for each in queue.holds.values() if _may_be_asked(each, asked_from, now)]
    if hold not in may_be_asked:  # 1
        return None
    for after in queue.next_without(may_be_asked, now):
        willing = [each for each in may_be_asked if _reason(after, each, now) is not None]
        reason = _reason(after, hold, now)
        if reason is None or not queue.holds_up(hold, after.entry.consumer):
            continue
        for together in ([hold], willing):  # 2
            if after in queue.next_without(together, now):
                in_its_way = (each for each in together if queue.holds_up(each, after.entry.consumer))
                since = max(after.entry.arrived_at, *(asked_from[each.seq] for each in in_its_way))
                if reason is YieldReason.QUANTUM and after.due_at is not None:
                    since = max(since, after.due_at)
                return YieldRequest(after.entry, reason, since)
    return None


def _may_be_asked(hold: Hold, asked_from: Mapping[int, float], now: float) -> bool:
    return hold.phase is Phase.LIVE and asked_from.get(hold.seq, float("inf")) <= now


def _reason(after: Next, hold: Hold, now: float) -> YieldReason | None:
    if after.entry.priority.rank < hold.priority.rank:  # 3
        return YieldReason.PRIORITY
    if after.due_at is not None and after.due_at <= now:  # 4
        return YieldReason.QUANTUM
    return None
