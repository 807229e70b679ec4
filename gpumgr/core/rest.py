"""The card at rest: who is unloaded although no request needs the room, and who comes back.

Owns: the housekeeping's decisions. Must not: unload, load, ask or wait.

Who goes (``to_clear``), of those that nobody holds, is preparing or is unloading already:

1. An operator keeps the card free, or a game runs: every resident on those GPUs.
2. An intruder: who became resident beside a lease it may not coexist with.
3. Who was idle for its ``idle_unload_seconds``, unless somebody waits for it.

Whoever kept its memory is asked again ``AGAIN_SECONDS`` later. Whether it computes is asked before each unload, by
whoever carries it out.

Who comes back (``to_restore``): a consumer with ``restore`` that was unloaded for somebody else, once nobody holds or
waits on its GPUs for its ``restore_after_seconds``; or one with ``preload``, once, after the start. Never while the
card is closed or a stranger grows, and nobody is unloaded for it but idle residents it may not coexist with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gpumgr.core.catalog import GpuRef
from gpumgr.core.outside import Game, Outside, Pause

AGAIN_SECONDS = 10.0
RESTORE_AGAIN_SECONDS = 300.0
"""After one that failed."""
PRELOAD_AGAIN_SECONDS = 15.0
"""The server may be starting, as we are."""

Why = Literal["hold", "game", "intruder", "idle"]


@dataclass(frozen=True, slots=True)
class Standing:
    """One consumer as housekeeping sees it. ``resident``: known to be. ``free``: nobody holds, prepares, calls or
    unloads it, and it can be unloaded. ``intrudes``: beside whose leases it should not be."""

    name: str
    gpus: tuple[GpuRef, ...]
    resident: bool
    free: bool
    idle_since: float
    waited_for: bool = False
    intrudes: tuple[str, ...] = ()
    idle_unload_seconds: float = 0.0
    not_before: float = float("-inf")


def to_clear(standings: Iterable[Standing], outside: Outside, now: float) -> list[tuple[str, Why]]:
    """Whom to unload now, and why: the strongest reason of each. See the module's rules."""
    found = ((each.name, _why(each, outside, now)) for each in standings if _may_go(each, now))
    return [(name, why) for name, why in found if why is not None]


def _may_go(each: Standing, now: float) -> bool:
    return each.resident and each.free and now >= each.not_before


def _why(each: Standing, outside: Outside, now: float) -> Why | None:
    to = outside.closed(each.gpus, now)
    if isinstance(to, Pause):  # 1
        return "hold"
    if isinstance(to, Game):
        return "game"
    if each.intrudes:  # 2
        return "intruder"
    rests = each.idle_unload_seconds > 0 and now - each.idle_since >= each.idle_unload_seconds
    return "idle" if rests and not each.waited_for else None  # 3


@dataclass(frozen=True, slots=True)
class Absent:
    """A consumer that may be brought back. ``wanted``: it was unloaded for somebody else, or is to be preloaded.
    ``quiet_since``: since when nobody holds or waits on its GPUs; None: somebody does."""

    name: str
    gpus: tuple[GpuRef, ...]
    wanted: bool
    resident: bool
    quiet_since: float | None
    after_seconds: float
    not_before: float = float("-inf")


def to_restore(absent: Sequence[Absent], outside: Outside, now: float) -> str | None:
    """Whom to bring back now: the first of them, one at a time."""
    for each in absent:
        quiet = each.quiet_since is not None and now - each.quiet_since >= each.after_seconds
        ready = each.wanted and not each.resident and now >= each.not_before
        if ready and quiet and not _disturbed(each, outside, now):
            return each.name
    return None


def _disturbed(each: Absent, outside: Outside, now: float) -> bool:
    """The card is closed, or a stranger grows on it."""
    grows = any(stranger.grows(now) for (gpu, _), stranger in outside.strangers.items() if gpu in each.gpus)
    return outside.closed(each.gpus, now) is not None or grows
