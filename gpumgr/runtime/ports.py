"""What the broker asks of the world: the seams that adapters fill and tests fake.

Owns: the protocols and their promises. Must not: do anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from gpumgr.core.card import Reading
from gpumgr.core.following import Work
from gpumgr.core.lease import EndReason, HolderProcess, Lease, RequestKey
from gpumgr.core.ledger import Account, Entry
from gpumgr.core.placement import Report
from gpumgr.core.queue import Priority


class Clock(Protocol):
    """One source of time with two faces."""

    def monotonic(self) -> float:
        """Seconds to compute with; never jumps with the wall clock."""

    def utc(self) -> datetime:
        """The wall clock, aware, only ever shown."""

    def slept(self) -> float:
        """Seconds that the machine was suspended since some instant of the past; it only grows."""


class Probe(Protocol):
    """The driver. ``read`` never raises: what cannot be read is told in the reading, as is a driver that does not
    answer within ``at_most_seconds`` (None: as long as the probe itself allows)."""

    def read(self, at_most_seconds: float | None = None) -> Reading: ...

    def close(self) -> None: ...


class GameWatch(Protocol):
    """Looks for games. Never raises."""

    def running(self) -> Sequence[tuple[int, str]]:
        """Pid and name of each that runs now, in the order in which they were seen first."""


BackendReason = Literal["unreachable", "hung", "failed"]


class BackendError(Exception):
    """A consumer's server did not do what was asked.

    ``reason``: ``unreachable`` (no connection), ``hung`` (no answer in time), ``failed`` (an answer that says no).
    ``refused``: the machine itself says that nobody listens there, so that nobody can hold anything.
    ``stopped``: its service does not run, as an unload leaves it where loading starts it: nothing is wrong.
    """

    def __init__(self, reason: BackendReason, message: str, *, refused: bool = False, stopped: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.refused = refused
        self.stopped = stopped


class Dialect(Protocol):
    """How one consumer is spoken to. Every call blocks, is bounded in time, and raises BackendError alone."""

    @property
    def ask_again_seconds(self) -> float | None:
        """Unload again after this long without the memory falling; None: once is enough."""

    @property
    def can_unload(self) -> bool: ...

    @property
    def can_load(self) -> bool: ...

    @property
    def load_starts_service(self) -> bool:
        """Health is only asked after the load."""

    @property
    def cuts_work(self) -> bool:
        """Its unload breaks what runs: while it says that it is busy it is not called again."""

    def health(self) -> None:
        """Return if it serves."""

    def unload(self, within_seconds: float) -> None:
        """One round of the unload calls. Returning proves nothing: the caller watches the card."""

    def load(self) -> None:
        """Bring the consumer's memory onto the card, where the dialect has such a call."""

    def loaded(self) -> Report | None:
        """Its own report of what is loaded; None: it has no such report."""

    def busy(self) -> bool | None:
        """Is it computing now? None: it has no such report."""

    @property
    def can_restore(self) -> bool:
        """Whether ``restore`` would bring something onto the card now."""

    def restore(self) -> None:
        """Bring back what its last unload took from the card, where it knows."""

    def interrupt(self) -> None:
        """End what it computes now and what waits in it at this moment, and nothing that comes later. Does nothing
        where it has no call for that, or the file says to wait. Returning proves nothing."""

    def begins_work(self, method: str, path: str) -> bool:
        """Whether the answer to this call may name work that goes on after it. ``path`` is without the url's own and
        without query. Asks nobody; where in doubt true: only the answer tells."""

    def work_begun(self, status: int, body: bytes) -> Work | None:
        """What the answer to such a call names. Asks nobody."""

    def is_done(self, work: Work) -> bool | None:
        """Whether it has ended, in whatever way; None: it neither runs nor waits, and nothing is known of its end."""


class HolderProcesses(Protocol):
    """The processes that holders name as theirs; a probe asks this one whose the memory of each process is."""

    def started(self, pid: int) -> int | None:
        """When the process started, in clock ticks since boot: with its pid it names one process. None: there is no
        such process on this machine, or none that a holder may name."""

    def follow(self, process: HolderProcess, consumer: str) -> None:
        """From now on its memory, and that of its descendants, is the consumer's, until each of them ends."""


class StoreError(Exception):
    """The store cannot write or read now. The message is the end of a sentence: why."""


@dataclass(frozen=True, slots=True)
class KeptLease:
    """A lease that an earlier life granted. ``sizes_mib``: what its consumer was declared to hold on each of its GPUs.
    ``quarantined``: over for its holder, and its consumer was not seen idle since."""

    lease: Lease
    sizes_mib: tuple[int, ...]
    quarantined: bool = False
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class Total:
    """What is counted of one consumer over all lives. ``last_used_at`` is the wall clock's."""

    requests: int = 0
    evictions: int = 0
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Paused:
    """An operator's hold, in the wall clock's time, which is what an operator means."""

    since: datetime
    until: datetime
    by: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """Everything that outlives the broker's process. ``ended``: requests whose lease is over, the oldest first, with
    the consumer, the reason, and the instant (monotonic)."""

    fence: int = 0
    leases: Sequence[KeptLease] = ()
    ended: Sequence[tuple[RequestKey, str, EndReason, float]] = ()
    rebooted: Sequence[Lease] = ()
    """Live when the machine went down: they are over."""
    totals: Mapping[str, Total] = field(default_factory=dict)
    events: Sequence[dict[str, Any]] = ()
    pause: Paused | None = None
    """An operator keeps the card free."""
    evicting: Sequence[str] = ()
    """Consumers that were being unloaded when the process ended: nobody knows what came of it."""
    holders: Sequence[tuple[HolderProcess, str]] = ()
    """Processes that holders named, the oldest first, and the consumers of their leases, which may be over."""
    learned: Mapping[str, Account] = field(default_factory=dict)
    """What unloads gave back and what was observed, by consumer."""


class Store(Protocol):
    """What outlives the process. Every call but ``note`` may block on a disk and raises StoreError alone; it is made
    with the lock down, before anybody is told. After a failure a call owes what it could not write, and the next one
    that succeeds writes that too."""

    def open(self) -> Kept: ...

    def note(self, event: dict[str, Any]) -> None:
        """To be written with the next call. Never blocks."""

    def intend(self, seq: int, target: str, victims: Sequence[str]) -> None:
        """Durably: these are about to be unloaded for the ticket ``seq``."""

    def forget_intent(self, seq: int) -> None:
        """Nothing comes of what was intended for it, to be written with the next call. Never blocks."""

    def granted(self, kept: KeptLease, event: dict[str, Any], totals: Mapping[str, Total]) -> None:
        """Durably, in one transaction: fence, lease, event, and that what was intended for it is done."""

    def ended(self, lease: Lease, reason: EndReason, event: dict[str, Any], *, quarantined: bool) -> None:
        """Durably."""

    def raised(self, lease: Lease) -> None:
        """Durably: its TTL, for a restart."""

    def paused(self, pause: Paused | None) -> None:
        """Durably: an operator keeps the card free; None: not any more."""

    def keep(self, totals: Mapping[str, Total], idle: Sequence[str], learned: Sequence[tuple[str, Entry]] = ()) -> None:
        """Events and totals, the leases (by id) whose quarantine is over, and what is new in the consumers' accounts.
        It survives the process, not a loss of power. What was learned is not owed where this fails."""

    def try_again(self) -> None:
        """Durably, whatever is owed."""

    def close(self) -> None: ...
