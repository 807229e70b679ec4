"""Leases: what is promised to whom, until when.

Owns: the values of a lease and of a proxied call, the book of leases, fences, request ids. Must not: make tokens, read
a clock, or decide who gets the GPU (queue.py, placement.py).

The life of a lease, beside the phase of its hold in queue.py, each step at an instant ``now`` of monotonic seconds:

    granting   being written down, nobody told yet: its hold excludes others; it is not in this book
    live       in this book from ``publish`` on, until ``expires_at``, which a renew moves
    ending     out of this book: over for its holder at once; its hold excludes others until that is written down

At ``now >= expires_at`` a lease is dead whoever looks first; nothing revives it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

from gpumgr.core.catalog import GpuRef
from gpumgr.errors import LeaseUnknown, RequestEnded, RequestMismatch


class EndReason(StrEnum):
    RELEASED = "released"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class RequestKey:
    """One request of one caller: ``bearer`` and ``holder`` are None where there is none."""

    bearer: str | None
    holder: str | None
    request_id: str


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

    def alive(self, now: float) -> bool:
        return now < self.expires_at


@dataclass(frozen=True, slots=True)
class Call:
    """A proxied call that may use its consumer's GPUs until it ends. ``seq`` is its hold in the queue; where it passes
    under a lease (``lease_id``) it has none of its own."""

    seq: int
    consumer: str
    began_at: float
    waited_seconds: float = 0.0
    lease_id: str | None = None


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
        self._fence = 0

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._live.values())

    def __len__(self) -> int:
        return len(self._live)

    def next_fence(self) -> int:
        """Larger than every fence before."""
        self._fence += 1
        return self._fence

    def publish(self, lease: Lease, now: float) -> Lease:
        """The grant is written down: from now on the lease is live, with its full TTL."""
        live = replace(lease, granted_at=now, expires_at=now + lease.ttl_seconds)
        self._live[live.token] = live
        if live.request is not None:
            self._by_request[live.request] = live.token
        return live

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
        ttl = lease.ttl_seconds if ttl_seconds is None else ttl_seconds
        renewed = replace(lease, ttl_seconds=ttl, expires_at=now + ttl)
        self._live[token] = renewed
        return renewed

    def end(self, lease: Lease, reason: EndReason, now: float) -> None:
        """The lease is over for its holder. Its request id is remembered, so that a late retry learns why."""
        del self._live[lease.token]
        if lease.request is not None:
            del self._by_request[lease.request]
            self._ended.pop(lease.request, None)  # an id used again after a day goes to the end of the line
            self._ended[lease.request] = _Ended(lease.consumer, reason, now)
        self._forget_old(now)

    def expired(self, now: float) -> list[Lease]:
        return [lease for lease in self._live.values() if not lease.alive(now)]

    def next_expiry(self) -> float | None:
        return min((lease.expires_at for lease in self._live.values()), default=None)

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
