"""What the machine knows of its world by itself: who conflicts with whom, and what it expects of each request.

It shares no decision with gpumgr.core.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gpumgr.core.lease import Call, RequestKey
from tests.worlds import Caller

TOTALS = (24000, 12000)
GPUS = range(len(TOTALS))
MAX_PREPARE = 120.0

SIZES: dict[str, dict[int, int]] = {
    "paint": {0: 14000},  # big, alone
    "chat": {0: 9000},  # chat and talk fit side by side, with hear they do not
    "talk": {0: 10000},
    "hear": {0: 6000},
    "span": {0: 4000, 1: 8000},  # two GPUs, and a load call
    "film": {1: 7000},  # film and clip coexist and do not fit together
    "clip": {1: 5000},
}
BESIDE = {frozenset(pair) for pair in (("chat", "talk"), ("chat", "hear"), ("talk", "hear"), ("film", "clip"))}
AT_ONCE = {"hear": 2}
MUTE = {"talk", "clip"}
"""They have no report of whether they compute: gpumgr takes them for idle."""
NAMES = sorted(SIZES)
REPORTING = [name for name in NAMES if name not in MUTE]
QUARANTINE_SECONDS = 30.0
HEAD_START = 120.0
MIN_HOLD_SECONDS = 10.0
WORN_MIB = 768 + 64
"""Held beyond this, a consumer is certainly on the card."""


def excludes(a: str, b: str) -> bool:
    return a != b and share_gpu(a, b) and frozenset((a, b)) not in BESIDE


def conflicts(a: str, b: str) -> bool:
    return a == b or excludes(a, b)


def share_gpu(a: str, b: str) -> bool:
    return bool(SIZES[a].keys() & SIZES[b].keys())


def blocked(name: str, ahead: list[str]) -> bool:
    return ahead.count(name) >= AT_ONCE.get(name, 1) or any(excludes(name, other) for other in ahead)


@dataclass(eq=False)
class Wanted:
    """One request, as the model sees it: for a lease, or (``proxied``) for a call. ``eager``: its holder loads at
    once, not some time later."""

    seq: int
    name: str
    ttl: float
    key: RequestKey | None
    eager: bool
    proxied: bool = False
    arrived_at: float = 0.0
    rank: int = 1
    """0 is the most urgent."""
    behind: Wanted | None = None
    """The one that it made way for before, and comes back behind."""
    callers: list[Caller] = field(default_factory=list)
    turn_at: float | None = None
    over: bool = False
    """Answered, or abandoned by its last caller."""

    @property
    def order(self) -> tuple[float, int, int]:
        """The smallest is ahead of all others: who came first, with the head start of its class."""
        if self.behind is not None:
            return (*self.behind.order[:2], self.seq)
        return (self.arrived_at + HEAD_START * self.rank, self.seq, 0)

    @property
    def deadline(self) -> float:
        return max(caller.deadline for caller in self.callers)


@dataclass(eq=False)
class Held:
    """One lease, as the model sees it. ``noticed``: the broker had occasion to see that it is over."""

    token: str
    name: str
    ttl: float
    expires_at: float
    key: RequestKey | None
    fence: int
    since: float = 0.0
    written_ttl: float = 0.0
    """What a restart gives it."""
    ended: str | None = None
    noticed: bool = False

    def alive(self, now: float) -> bool:
        return self.ended is None and now < self.expires_at


@dataclass(eq=False)
class Called:
    """One call that goes on until it ends. ``under`` a lease it holds nothing itself, and may outlive it."""

    call: Call
    name: str
    under: Held | None = None
    ended: bool = False
