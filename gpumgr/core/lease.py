"""Leases: what is promised to whom, until when.

Owns: the values of a lease and of a proxied call, the book of leases, fences, request ids. Must not: make tokens, read
a clock, or decide who gets the GPU (queue.py, placement.py).

The life of a lease, beside the phase of its hold in queue.py, each step at an instant ``now`` of monotonic seconds:

    granting   being written down, nobody told yet: its hold excludes others; it is not in this book
    live       in this book from ``publish`` on, until ``expires_at``, which a renew moves, though never beyond
               ``hold_until``. A restart and a sleep of the machine give it its full TTL again
    ending     out of this book: over for its holder at once; its hold excludes others until that is written down
    quarantine over, after an expiry or a revoke, and its consumer may still compute for the old holder: its hold
               excludes others until the consumer is idle, or for a limited time

At ``now >= expires_at`` a lease is dead whoever looks first; nothing revives it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol

from gpumgr.core.catalog import GpuRef
from gpumgr.errors import LeaseUnknown, RequestEnded, RequestMismatch


class EndReason(StrEnum):
    RELEASED = "released"
    EXPIRED = "expired"
    REVOKED = "revoked"
    HOST_REBOOT = "host_reboot"


@dataclass(frozen=True, slots=True)
class RequestKey:
    """One request of one caller: ``bearer`` and ``holder`` are None where there is none."""

    bearer: str | None
    holder: str | None
    request_id: str


@dataclass(frozen=True, slots=True)
class HolderProcess:
    """The holder's own process, by pid and start (clock ticks since boot), which no later process shares."""

    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A grant of a consumer's GPUs to one holder. ``seq`` is its hold in the queue. The token is a capability
    and stays out of ``repr``, so that no log line shows it."""

    lease_id: str
    token: str = field(repr=False)
    consumer: str
    holder: str | None
    gpus: tuple[GpuRef, ...]
    gpu_uuids: tuple[str | None, ...]
    seq: int
    fence: int
    granted_at: float
    ttl_seconds: float
    expires_at: float
    request: RequestKey | None = None
    hold_until: float = math.inf
    """``lease.max_hold_seconds`` after the grant: from then on a renew does not extend it."""
    written_ttl_seconds: float = 0.0
    """What a restart would give it."""
    process: HolderProcess | None = None
    """Whose memory is the lease's too, beside its consumer's own."""

    def alive(self, now: float) -> bool:
        return now < self.expires_at

    def armed(self, now: float, ttl_seconds: float) -> Lease:
        """With this TTL from ``now`` on."""
        return replace(self, ttl_seconds=ttl_seconds, expires_at=min(now + ttl_seconds, self.hold_until))


@dataclass(frozen=True, slots=True)
class Call:
    """A proxied call that may use its consumer's GPUs until it ends. ``seq`` is its hold in the queue; where it passes
    under a lease (``lease_id``) it has none of its own."""

    seq: int
    consumer: str
    began_at: float
    waited_seconds: float = 0.0
    lease_id: str | None = None
    restoring: bool = False
    """Housekeeping's own, which ends at once."""


class Claim(Protocol):
    """Somebody who wants the card, as its holder is told of it: an operator, a game, or who waits.
    ``cause``: ``hold``, ``game``, ``priority`` or ``quantum``."""

    @property
    def cause(self) -> str: ...
    @property
    def words(self) -> str: ...
    @property
    def since_at(self) -> str: ...


class Renewed(NamedTuple):
    """What a renew tells its holder. ``waiting``: how many requests it holds up. ``yield_to``: who asks it to leave the
    card. ``intruders``: consumers on the card beside it that may not be."""

    lease: Lease
    waiting: int
    healthy: bool | None
    yield_to: Claim | None = None
    intruders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Ended:
    consumer: str
    reason: EndReason
    at: float


class LeaseBook:
    """The leases that are live, the ids of requests that had one, and the fence. Pure: the caller holds the lock."""

    ENDED_KEPT_SECONDS = 24 * 3600.0
    ENDED_KEPT_COUNT = 100_000

    def __init__(self) -> None:
        self._live: dict[str, Lease] = {}
        self._by_request: dict[RequestKey, str] = {}
        self._ended: OrderedDict[RequestKey, _Ended] = OrderedDict()
        self._unconfirmed: dict[str, float] = {}
        self._told: set[str] = set()
        self._fence = 0

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._live.values())

    def __len__(self) -> int:
        return len(self._live)

    def next_fence(self) -> int:
        """Larger than every fence before."""
        self._fence += 1
        return self._fence

    def publish(self, lease: Lease, now: float, max_hold_seconds: float = 0.0) -> Lease:
        """The grant is written down: from now on the lease is live, with its full TTL. ``max_hold_seconds`` 0: as long
        as it is renewed."""
        until = now + max_hold_seconds if max_hold_seconds else math.inf
        live = replace(lease, granted_at=now, hold_until=until, written_ttl_seconds=lease.ttl_seconds)
        return self._put(live.armed(now, lease.ttl_seconds))

    def restore(self, lease: Lease, now: float) -> Lease:
        """One that an earlier life of the broker granted, with a full TTL."""
        return self._put(lease.armed(now, lease.ttl_seconds))

    def _put(self, lease: Lease) -> Lease:
        self._live[lease.token] = lease
        if lease.request is not None:
            self._by_request[lease.request] = lease.token
        return lease

    def remember(self, key: RequestKey, consumer: str, reason: EndReason, at: float) -> None:
        """A request whose lease ended in an earlier life. In order of their ends."""
        self._ended[key] = _Ended(consumer, reason, at)

    def start_fence(self, fence: int) -> None:
        """The largest one that was ever given."""
        self._fence = max(self._fence, fence)

    def rearm(self, now: float) -> None:
        """Every live lease has its full TTL again: nobody could renew while the machine slept."""
        for token, lease in self._live.items():
            if lease.alive(now):
                self._live[token] = lease.armed(now, lease.ttl_seconds)

    def wrote(self, token: str, ttl_seconds: float) -> None:
        """This TTL is what a restart would give."""
        if token in self._live:
            lease = self._live[token]
            self._live[token] = replace(lease, written_ttl_seconds=max(lease.written_ttl_seconds, ttl_seconds))

    def get(self, token: str, now: float) -> Lease:
        """Raises: LeaseUnknown where there is none, or its time is over."""
        lease = self._live.get(token)
        if lease is None or not lease.alive(now):
            raise LeaseUnknown("no live lease has this token: it was released, it expired, or it never existed")
        return lease

    def named(self, lease_id: str, now: float) -> Lease:
        """By its public name. Raises: LeaseUnknown."""
        for lease in self._live.values():
            if lease.lease_id == lease_id and lease.alive(now):
                return lease
        raise LeaseUnknown("no live lease has this lease_id: it was released, it expired, or it never existed")

    def renew(self, token: str, now: float, ttl_seconds: float | None) -> Lease:
        """A full TTL from ``now`` on; ``ttl_seconds`` (already clamped) replaces the lease's own.

        Raises: LeaseUnknown.
        """
        lease = self.get(token, now)
        renewed = self._live[token] = lease.armed(now, lease.ttl_seconds if ttl_seconds is None else ttl_seconds)
        self.confirm(token)
        return renewed

    def confirm(self, token: str) -> None:
        """Somebody was told of it: whoever else has gone no longer matters."""
        if token in self._live:
            self._told.add(token)
            self._unconfirmed.pop(token, None)

    def doubt(self, token: str, until: float) -> None:
        """Its only caller left before the answer: whoever asks again under its request id until then may have it."""
        if token in self._live and token not in self._told:
            self._unconfirmed[token] = until

    def is_told(self, token: str) -> bool:
        """Whether anybody was told of it, or it is over."""
        return token in self._told or token not in self._live

    def unclaimed(self, now: float) -> list[Lease]:
        """Those that nobody asked for again in time."""
        return [self._live[token] for token, until in self._unconfirmed.items() if now >= until]

    def end(self, lease: Lease, reason: EndReason, now: float) -> None:
        """The lease is over for its holder. Its request id is remembered, so that a late retry learns why."""
        del self._live[lease.token]
        self._unconfirmed.pop(lease.token, None)
        self._told.discard(lease.token)
        if lease.request is not None:
            del self._by_request[lease.request]
            self._ended.pop(lease.request, None)  # an id used again after a day goes to the end of the line
            self._ended[lease.request] = _Ended(lease.consumer, reason, now)
        self._forget_old(now)

    def expired(self, now: float) -> list[Lease]:
        return [lease for lease in self._live.values() if not lease.alive(now)]

    def next_expiry(self) -> float | None:
        """When the next one is over, or is unclaimed for long enough."""
        return min((*(lease.expires_at for lease in self._live.values()), *self._unconfirmed.values()), default=None)

    def of_request(self, key: RequestKey, consumer: str, now: float) -> Lease | None:
        """The live lease this request already has, or None where the request is new.

        Raises: RequestMismatch where the id asked for another consumer; RequestEnded where its lease is over.
        """
        lease = self._live.get(self._by_request.get(key, ""))
        if lease is not None and lease.alive(now):
            require_same(key, lease.consumer, consumer)
            return lease
        ended = self._ended.get(key)
        if lease is not None:
            ended = _Ended(lease.consumer, EndReason.EXPIRED, lease.expires_at)
        if ended is None or now - ended.at >= self.ENDED_KEPT_SECONDS:
            return None
        require_same(key, ended.consumer, consumer)
        raise RequestEnded(
            f"the lease of this request_id was {ended.reason}; use a new request_id for a new lease",
            reason=ended.reason.value,
        )

    def holder_of(self, key: RequestKey, now: float) -> Lease | None:
        """The live lease of this request."""
        lease = self._live.get(self._by_request.get(key, ""))
        return lease if lease is not None and lease.alive(now) else None

    def _forget_old(self, now: float) -> None:
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= self.ENDED_KEPT_COUNT and now - oldest.at < self.ENDED_KEPT_SECONDS:
                return
            self._ended.popitem(last=False)


def require_same(key: RequestKey, known: str, asked: str) -> None:
    """Raises: RequestMismatch where a known request id now asks for another consumer."""
    if known != asked:
        raise RequestMismatch(
            f"request_id {key.request_id!r} already asked for {known!r}; it cannot ask for {asked!r} as well: "
            "use one request_id for one request",
            consumer=known,
        )
