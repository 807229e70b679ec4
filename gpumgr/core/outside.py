"""Who claims the card without asking for a turn: an operator, a game, any process that is nobody's.

Owns: what is known of them, and how much of a card is kept for them. Must not: look for them, or unload anybody.

Three claims, strongest first:

1. A **pause**: an operator keeps the cards free. Nobody is granted anything until it ends.
2. A **game** (``gpu.yield_to``): whoever does not fit beside it, with ``yield_reserve_mib`` left for it, is refused.
3. Any other **stranger** is held at the most it was seen to hold in the last minutes: a process breathes, and what it
   gave up in a trough it takes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gpumgr.core.card import GpuProcess, GpuReading, Reading
from gpumgr.core.catalog import GpuRef, overlap

GROWING_SECONDS = 60.0
"""A process that took memory so lately may take more."""


@dataclass(frozen=True, slots=True)
class Pause:
    """``POST /v1/hold``. Instants are monotonic seconds; those that end in ``_at`` are the same as texts, to show."""

    since: float
    until: float
    since_at: str
    until_at: str
    by: str | None = None
    reason: str | None = None

    def lasts(self, now: float) -> bool:
        return now < self.until

    @property
    def cause(self) -> str:
        return "hold"

    @property
    def words(self) -> str:
        who = self.by or "somebody"
        why = f" ({self.reason})" if self.reason else ""
        return f"{who} keeps the GPU free{why}, since {self.since_at}, until {self.until_at} or until it is resumed"


@dataclass(frozen=True, slots=True)
class Game:
    """A process that ``gpu.yield_to`` names, or one that Steam started. ``since``: when it was seen first."""

    pid: int
    name: str
    since: float
    since_at: str

    @property
    def cause(self) -> str:
        return "game"

    @property
    def words(self) -> str:
        return f"{self.name} (pid {self.pid}) runs since {self.since_at}"


@dataclass(frozen=True, slots=True)
class Stranger:
    """One untracked process on one GPU. ``recent`` are (instant, MiB), each less than the one before: the first is the
    most that was seen within the window."""

    pid: int
    name: str
    since: float
    recent: tuple[tuple[float, int], ...] = ()
    grown_at: float = float("-inf")
    """When it was last seen to hold more than before."""

    @property
    def peak_mib(self) -> int:
        return self.recent[0][1] if self.recent else 0

    def seen(self, used_mib: int | None, now: float, window_seconds: float) -> Stranger:
        """With what it holds now; what the driver does not say changes nothing."""
        kept = [(at, mib) for at, mib in self.recent if now - at < window_seconds]
        if used_mib is None:
            return replace(self, recent=tuple(kept))
        last = self.recent[-1][1] if self.recent else 0
        kept = [(at, mib) for at, mib in kept if mib > used_mib]
        kept.append((now, used_mib))
        grown_at = now if used_mib > last else self.grown_at
        return Stranger(self.pid, self.name, self.since, tuple(kept), grown_at)

    def grows(self, now: float) -> bool:
        return now - self.grown_at < GROWING_SECONDS


@dataclass(frozen=True)
class Outside:
    """Immutable; whoever learns something makes a new one. ``yields``: on which GPUs a game counts; None: on all."""

    pause: Pause | None = None
    games: tuple[Game, ...] = ()
    strangers: Mapping[tuple[int, int], Stranger] = field(default_factory=dict)
    """By GPU's index and pid."""
    peak_seconds: float = 300
    reserve_mib: int = 6144
    yields: tuple[GpuRef, ...] | None = None

    def reading(self, reading: Reading) -> Outside:
        """What a reading tells of strangers. A GPU that cannot be read keeps those that it had."""
        found: dict[tuple[int, int], Stranger] = {}
        seen = {gpu.index: gpu for gpu in reading.gpus if gpu.readable and gpu.processes_readable}
        for gpu in seen.values():
            for process in gpu.untracked:
                found[gpu.index, process.pid] = self._stranger(gpu, process, reading.read_at)
        unseen = {key: stranger for key, stranger in self.strangers.items() if key[0] not in seen}
        return replace(self, strangers={**unseen, **found})

    def _stranger(self, gpu: GpuReading, process: GpuProcess, now: float) -> Stranger:
        known = self.strangers.get((gpu.index, process.pid))
        if known is None or known.name != process.name:
            known = Stranger(process.pid, process.name, since=now)
        return known.seen(process.used_mib, now, self.peak_seconds)

    def unloaded(self, gpus: Iterable[GpuRef]) -> Outside:
        """Somebody whose processes are taken for strangers has given memory back on these GPUs: which of them it was
        nobody can tell, so that none of them is held at what it had before."""
        there = set(gpus)
        strangers = {
            key: replace(each, recent=each.recent[-1:]) if key[0] in there else each
            for key, each in self.strangers.items()
        }
        return replace(self, strangers=strangers)

    def stranger(self, gpu: int, pid: int) -> Stranger | None:
        return self.strangers.get((gpu, pid))

    def paused(self, now: float) -> Pause | None:
        return self.pause if self.pause is not None and self.pause.lasts(now) else None

    def games_on(self, gpus: tuple[GpuRef, ...]) -> tuple[Game, ...]:
        return self.games if self.yields is None or overlap(self.yields, gpus) else ()

    def closed(self, gpus: tuple[GpuRef, ...], now: float) -> Pause | Game | None:
        """The strongest claim on these GPUs to which holders are asked to yield."""
        games = self.games_on(gpus)
        return self.paused(now) or (games[0] if games else None)

    def kept_mib(self, gpu: GpuReading) -> int:
        """MiB of this GPU's free memory that are not to be lent: strangers up to their peaks, or a game's reserve."""
        breath = 0
        for process in gpu.untracked:
            known = self.strangers.get((gpu.index, process.pid))
            if known is not None and process.used_mib is not None:
                breath += max(0, known.peak_mib - process.used_mib)
        return max(breath, self.reserve_mib) if self.games_on((gpu.index,)) else breath
