"""The library that holders import: acquire, keep renewed, notice the loss, release. Needs ``requests`` alone.

    from gpumgr.client import Gpu

    with Gpu("http://127.0.0.1:8770").lease("image", holder="imagen") as lease:
        for step in job:
            lease.check()              # raises LeaseLost instead of working on somebody else's GPU
            lease.yield_turn()         # where somebody more urgent waits: gives the GPU away, and waits to have it back
            run(step, lease.url)

What it promises: the lease is renewed from a thread of its own each third of its TTL; a renew that fails is tried
again until the lease's time is over. What it cannot: a process that is stopped for longer than the TTL (SIGSTOP,
suspend, a debugger) wakes up without its lease; ``check`` tells it before the next step, nothing stops the one that
is running.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import requests

from gpumgr.errors import GpumgrError, LeaseUnknown, from_wire

DEFAULT_URL = "http://127.0.0.1:8770"
URL_VARIABLE = "GPUMGR_URL"
TOKEN_VARIABLE = "GPUMGR_TOKEN"  # noqa: S105 - where it is, not what
CALL_SECONDS = 10.0
LONGEST_ANSWER_SECONDS = 1500.0
RETRY_SECONDS = 1.0
YIELD_TOLD_WITHIN_SECONDS = 2.0
"""A renew each third of a TTL is too seldom for somebody who waits, one each step too often where steps are short."""
BROKEN_CONNECTION = (
    requests.ConnectionError,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)
"""Before an answer, or in the middle of one. A read that times out is none of them: asking again would take as long."""


class LeaseLost(Exception):
    """The lease is over although nobody released it. The GPU may be another holder's: stop working on it."""


class BrokerUnreachable(Exception):
    """No answer from the broker, or none that is its own."""


@dataclass(eq=False)
class HeldLease:
    """A lease in the holder's hand. ``expires`` is this machine's monotonic clock; after a renew it is counted from
    before that was sent, so that it is never later than the broker's own."""

    gpu: Gpu
    grant: dict[str, Any]
    expires: float
    yield_reason: str | None = None
    """Who asks for the card, as the last renew told: an operator, a game, or a request that is more urgent or waits for
    longer than a turn. Nothing forces a holder: one that can stop between two steps does so with ``yield_turn``."""
    wanted: dict[str, Any] = field(default_factory=dict)
    """What it was asked with."""
    _told_at: float = field(default_factory=time.monotonic)
    _lost: str | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def token(self) -> str:
        return str(self.grant["token"])

    @property
    def url(self) -> str:
        """Where the consumer is: run the job directly against it. Raises: ValueError where it has no address."""
        if self.grant["url"] is None:
            raise ValueError(f"{self.grant['consumer']} has no url: its lease is for a program of the holder's own")
        return str(self.grant["url"])

    @property
    def fence(self) -> int:
        """Larger than that of every lease before in this life of the broker; useful where what the job writes to
        checks it."""
        return int(self.grant["fence"])

    @property
    def ttl_seconds(self) -> float:
        return float(self.grant["ttl_seconds"])

    def check(self) -> None:
        """Between two steps. Raises: LeaseLost."""
        if self._lost is None and time.monotonic() >= self.expires:
            self._lost = "it could not be renewed within its TTL"
        if self._lost is not None:
            raise LeaseLost(f"the lease of {self.grant['consumer']} is lost: {self._lost}")

    def renew(self, ttl_seconds: float | None = None) -> dict[str, Any]:
        """A full TTL from now on; the answer tells ``waiting`` and ``consumer_healthy``.

        Raises: LeaseLost, BrokerUnreachable.
        """
        sent = time.monotonic()
        body = None if ttl_seconds is None else {"ttl_seconds": ttl_seconds}
        try:
            answer = self.gpu.call("POST", f"/v1/lease/{self.token}/renew", json=body)
        except LeaseUnknown:
            self._lost = "the broker does not know it any more"
            raise LeaseLost(f"the lease of {self.grant['consumer']} is lost: {self._lost}") from None
        self.grant |= {"ttl_seconds": answer["ttl_seconds"], "expires_at": answer["expires_at"]}
        self.yield_reason, self._told_at = answer.get("yield_reason"), sent
        self.expires = sent + float(answer["ttl_seconds"])
        return answer

    @property
    def should_yield(self) -> bool:
        """As the last renew told."""
        return self.yield_reason is not None

    def yield_turn(self, told_within_seconds: float = YIELD_TOLD_WITHIN_SECONDS) -> bool:
        """Between two steps: where somebody is waited for, release, and wait to have the GPU back, directly behind that
        one. Whether it was given away: then what was loaded may have been unloaded, and token and fence are new.
        ``told_within_seconds``: the broker is asked where its last word is older.

        Raises: LeaseLost; as ``acquire`` where it does not come back (GpuYielded: an operator or a game has the card):
        then there is no lease any more, and ``acquire`` with ``resume_of`` may be tried again for ten minutes.
        """
        self.check()
        if time.monotonic() - self._told_at >= told_within_seconds:
            self.renew()
        if not self.should_yield:
            return False
        kept = self._thread is not None
        self.release()
        again = self.gpu.acquire(**self.wanted, resume_of=self.grant["lease_id"])
        self.grant, self.expires, self.yield_reason, self._told_at = again.grant, again.expires, None, again._told_at
        self._lost, self._ended = None, threading.Event()
        if kept:
            self.keep()
        return True

    def keep(self) -> Self:
        """Renew from a thread of its own from now on."""
        self._thread = threading.Thread(target=self._keep, name=f"gpumgr-renew-{self.grant['lease_id']}", daemon=True)
        self._thread.start()
        return self

    def _keep(self) -> None:
        pause = 0.0  # at once: an acquire that was sent twice may be answered with a lease that has run for a while
        while not self._ended.wait(pause):
            try:
                self.renew()
                pause = self.ttl_seconds / 3
            except LeaseLost:
                return
            except (BrokerUnreachable, GpumgrError):
                if time.monotonic() >= self.expires:
                    self._lost = "it could not be renewed within its TTL"
                    return
                pause = RETRY_SECONDS

    def release(self) -> bool:
        """Whether it was still ours. The renewing ends; calling it twice does no harm.

        Raises: BrokerUnreachable; the lease then ends by itself at its TTL.
        """
        self._ended.set()
        self._lost = self._lost or "it was released"
        if self._thread is not None:
            self._thread.join(CALL_SECONDS)
            self._thread = None
        return bool(self.gpu.call("DELETE", f"/v1/lease/{self.token}")["released"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.release()
        except (BrokerUnreachable, GpumgrError):
            if kind is None:  # else the block's own exception is the one to tell
                raise


class Gpu:
    """A broker. One object may serve many threads; each call is a request on a pooled connection.

    ``url``: without it that of ``GPUMGR_URL``, else this machine's own broker. ``token``: the secret of a broker with
    ``server.auth: bearer``; without it that of ``GPUMGR_TOKEN``, if it is set.
    """

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        self.url = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        if token:
            self._session.headers["Authorization"] = f"Bearer {token.strip()}"

    def acquire(
        self,
        kind: str | None = None,
        *,
        consumer: str | None = None,
        ttl_seconds: float | None = None,
        wait_seconds: float | None = None,
        holder: str | None = None,
        request_id: str | None = None,
        holder_pid: int | None = None,
        priority: str | None = None,
        resume_of: str | None = None,
    ) -> HeldLease:
        """Wait for the GPU; renewing is the caller's business (``lease`` does it by itself).

        ``holder_pid``: ``os.getpid()`` where this program computes on the card itself, so that what it and its children
        take counts as this lease's. Not in a container, nor from another machine. ``priority``: ``interactive``,
        ``normal`` or ``batch``; without it that of the kind. ``resume_of``: the ``lease_id`` of a lease that was
        released when it was asked to yield: this request comes directly behind the one that it yielded to.

        A connection that breaks is tried once more under the same ``request_id``, so that no grant is lost.
        Raises: the classes of gpumgr.errors, BrokerUnreachable.
        """
        wanted = {
            "kind": kind,
            "consumer": consumer,
            "ttl_seconds": ttl_seconds,
            "wait_seconds": wait_seconds,
            "holder": holder,
            "request_id": request_id or str(uuid.uuid4()),
            "holder_pid": holder_pid,
            "priority": priority,
            "resume_of": resume_of,
        }
        again = {name: value for name, value in wanted.items() if name not in ("request_id", "resume_of")}
        body = {name: value for name, value in wanted.items() if value is not None}
        grant = self.call("POST", "/v1/lease", json=body, seconds=LONGEST_ANSWER_SECONDS)
        return HeldLease(self, grant, time.monotonic() + float(grant["ttl_seconds"]), wanted=again)

    def lease(self, kind: str | None = None, **options: Any) -> HeldLease:
        """``acquire`` and keep renewed; for ``with``, which releases."""
        return self.acquire(kind, **options).keep()

    def explain(self, kind: str | None = None, **wanted: Any) -> dict[str, Any]:
        """What ``acquire`` with the same words would meet now; nothing is done. Raises: as ``acquire``, for words that
        are wrong; what would be refused is told in ``refusal``."""
        body = {name: value for name, value in {"kind": kind, **wanted}.items() if value is not None}
        return self.call("POST", "/v1/explain", json=body)

    def hold(self, reason: str | None = None, ttl_seconds: float | None = None) -> dict[str, Any] | None:
        """Keep the card free: nobody is granted it, whoever is idle is unloaded, holders are asked to yield. The
        answer's ``state`` is ``free`` when it is. Needs the scope ``operate``. Raises: as ``acquire``."""
        wanted = {"reason": reason, "ttl_seconds": ttl_seconds}
        body = {name: value for name, value in wanted.items() if value is not None}
        return self._hold(self.call("POST", "/v1/hold", json=body))

    def held(self) -> dict[str, Any] | None:
        """The hold that lasts, or None."""
        return self._hold(self.call("GET", "/v1/hold"))

    def resume(self) -> bool:
        """Whether there was a hold to end. Raises: as ``acquire``."""
        return bool(self.call("DELETE", "/v1/hold").get("resumed"))

    @staticmethod
    def _hold(answer: dict[str, Any]) -> dict[str, Any] | None:
        found = answer.get("hold")
        return found if isinstance(found, dict) else None

    def status(self) -> dict[str, Any]:
        return self.call("GET", "/v1/status")

    def call(self, method: str, path: str, *, json: Any = None, seconds: float = CALL_SECONDS) -> dict[str, Any]:
        """One call of the API; every call of it may be sent twice. Raises: as ``acquire``."""
        try:
            answer = self._send(method, path, json, seconds)
        except BROKEN_CONNECTION:
            answer = self._again(method, path, json, seconds)
        except requests.RequestException as error:
            raise BrokerUnreachable(f"{self.url}: {type(error).__name__}") from None
        return self._told(answer)

    def _again(self, method: str, path: str, json: Any, seconds: float) -> requests.Response:
        """A pooled connection may be closed by the other side just as we write on it: once more, on a fresh one."""
        try:
            return self._send(method, path, json, seconds)
        except requests.RequestException as error:
            raise BrokerUnreachable(f"{self.url} cannot be reached ({type(error).__name__})") from None

    def _send(self, method: str, path: str, json: Any, seconds: float) -> requests.Response:
        return self._session.request(method, self.url + path, json=json, timeout=(5.0, seconds))

    def _told(self, answer: requests.Response) -> dict[str, Any]:
        try:
            body = answer.json()
        except ValueError:
            raise BrokerUnreachable(f"{self.url} answers {answer.status_code}, not as gpumgr does") from None
        error = from_wire(body)
        if error is not None:
            raise error
        if not answer.ok or not isinstance(body, dict):
            raise BrokerUnreachable(f"{self.url} answers {answer.status_code}, not as gpumgr does")
        return body

    def close(self) -> None:
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
