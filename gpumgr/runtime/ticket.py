"""A request on its way: what the caller's thread waits on.

Owns: the ticket and its place between the queue and the waiting threads. Must not: decide anything.
Every field is guarded by the broker's one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from gpumgr.core.catalog import Consumer
from gpumgr.core.lease import Call, HolderProcess, Lease, RequestKey
from gpumgr.core.placement import Victim
from gpumgr.core.queue import Entry, Priority, WaitingFor
from gpumgr.errors import GpumgrError


@dataclass(frozen=True, slots=True)
class Ask:
    """What a caller asks for, validated. Seconds are clamped by the broker, which knows the limits."""

    kind: str | None = None
    consumer: str | None = None
    ttl_seconds: float | None = None
    wait_seconds: float | None = None
    holder: str | None = None
    request: RequestKey | None = None
    restoring: bool = False
    """Housekeeping's own: the consumer is to be loaded, and nobody holds it afterwards."""
    holder_pid: int | None = None
    """The holder's own process, whose memory its lease is for as well."""
    priority: Priority | None = None
    """None: that of its kind."""
    resume_of: str | None = None
    """The lease_id of a lease that was given back when it was asked to yield."""
    bearer: str | None = None
    """The name of whoever asks; None where nobody is asked for it."""


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that a holder is asked to yield to."""

    cause: str
    words: str
    since_at: str
    seq: int


@dataclass(eq=False, slots=True)
class Caller:
    """One connection that waits for an answer. ``here`` looks whether it still stands: quick, and called with the lock
    down. ``gone`` is set by whoever saw it go. ``begin_wait`` is called before its thread waits, with the lock down:
    from then on somebody must see it go."""

    here: Callable[[], bool] = _always
    begin_wait: Callable[[], None] = _nothing
    gone: bool = False
    ticket: Ticket | None = None


@dataclass(eq=False, slots=True)
class Ticket:
    """One request, however many callers joined it.

    ``woken`` is the condition of its callers, ``stirred`` that of its preparation where that waits for memory;
    both are made from the broker's lock, so that a release wakes exactly who may go.
    """

    entry: Entry
    consumer: Consumer
    holder: str | None
    ttl_seconds: float
    request: RequestKey | None
    entered_at: float
    deadline: float
    prepare_seconds: float
    woken: threading.Condition
    stirred: threading.Condition
    process: HolderProcess | None = None
    proxied: bool = False
    """A call that ends by itself, not a lease."""
    restoring: bool = False
    resumes: str | None = None
    """The lease_id of the one that has yielded, and comes back with it."""
    callers: list[Caller] = field(default_factory=list)
    answered: bool = False
    """One of its callers was there to take the grant."""
    began_at: float | None = None
    """Its turn came."""
    prepare_limit: float | None = None
    """Monotonic; None while it waits in the line."""
    waiting_for: WaitingFor | None = None
    """Set while its preparation has to wait: then the deadline counts, not the preparation's limit."""
    step: str = "waiting for its turn"
    granting: bool = False
    outcome: Lease | Call | GpumgrError | None = None
    tried: list[Victim] = field(default_factory=list)

    @property
    def seq(self) -> int:
        return self.entry.seq

    @property
    def preparing(self) -> bool:
        return self.prepare_limit is not None and self.waiting_for is None

    def is_late(self, now: float) -> bool:
        """Whether a turn that comes now is nobody's; one that comes at once never is."""
        return now >= self.deadline and now != self.entered_at

    def limit(self, deadline: float) -> float | None:
        """Until when a caller with this deadline waits; None: the answer is being written down."""
        if self.granting:
            return None
        if self.prepare_limit is None or self.waiting_for is not None:
            return deadline
        return min(self.prepare_limit, deadline + self.prepare_seconds)  # a caller who joined may have been first
