"""Callers of a broker that is being killed: most behave, some repeat, hang up, crash, or come back from the dead.

Owns: what a caller does and what it saw of it. Must not: judge, or touch the broker but over HTTP.

A caller whose connection breaks asks again with the same request_id, as the broker's documents tell it to. It draws
what it does from a generator of its own, so that a seed gives the same callers; what the threads make of it differs.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpumgr.sim.stage import Stage
from tests.torture.history import SECOND, UNKNOWN, Call, Op, Recorder, boot_ns, boot_of_wall

CONSUMERS = ("mvoice", "whisper")
ANSWER_SECONDS = 30.0
GIVES_UP_SECONDS = 30.0
AGAIN_SECONDS = 0.02
"""Between two tries at a broker that is away: short, as the time to its return is what callers notice."""
LONGEST_WORK_SECONDS = 0.6
"""Who begins with less than that left may still be at it when the next one is granted."""
COME_BACK = {"shutting_down", "queue_full", "store_unavailable"}


@dataclass(frozen=True, slots=True)
class Manners:
    """Shares of all cycles; what is left behaves."""

    impatient: float = 0.08
    thinks_better: float = 0.3
    crashes: float = 0.02
    repeats: float = 0.15
    renews_after_release: float = 0.05
    works: float = 0.2
    raises_ttl: float = 0.2
    short_waits: float = 0.05
    loyal: float = 0.0
    """Of a caller's requests those for one and the same consumer; the others are for any."""
    wait_seconds: float = 20
    ttl_seconds: tuple[float, ...] = (1, 1, 1.4)
    raised_ttl_seconds: float = 2.5
    holds_seconds: tuple[float, float] = (0.0, 0.03)


@dataclass(slots=True)
class Held:
    """A grant as its holder knows it."""

    token: str
    lease_id: str
    fence: int
    expires_ns: int


@dataclass(slots=True)
class Tries:
    """What the tries of one call came to."""

    inv_ns: int
    sent_ns: int = 0
    count: int = 0
    code: int = UNKNOWN
    body: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Line:
    """One kept-alive connection, opened when it is needed. Records nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: http.client.HTTPConnection | None = None

    def call(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float, sent: Callable[[], None]
    ) -> tuple[int, dict[str, Any]]:
        """Raises: OSError, http.client.HTTPException, ValueError; then the connection is closed."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_seconds)
        try:
            return self._call(self._connection, method, path, body, timeout_seconds, sent)
        except BaseException:
            self.close()
            raise

    def _call(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        sent: Callable[[], None],
    ) -> tuple[int, dict[str, Any]]:
        if connection.sock is None:
            connection.connect()
        connection.sock.settimeout(timeout_seconds)
        content = None if body is None else json.dumps(body).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        connection.request(method, path, content, headers)
        sent()
        response = connection.getresponse()
        answered: dict[str, Any] = json.loads(response.read())
        return response.status, answered

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Client:
    def __init__(
        self,
        number: int,
        port: int,
        recorder: Recorder,
        stage: Stage,
        manners: Manners,
        seed: int,
        over: threading.Event,
    ) -> None:
        self._number = number
        self._line = Line(port)
        self._recorder = recorder
        self._stage = stage
        self._manners = manners
        self._draw = random.Random(seed * 1000 + number)  # noqa: S311 - a workload, not a secret
        self._over = over
        self.broken: list[str] = []
        """What no caller should ever see, in its own words."""

    def run(self) -> None:
        try:
            while not self._over.is_set():
                self._cycle()
        except Exception as error:  # a defect of this file must not look like a quiet broker
            self.broken.append(f"client {self._number}: {type(error).__name__}: {error}")
        finally:
            self._line.close()

    # -- a cycle --------------------------------------------------------------------------------------------

    def _cycle(self) -> None:
        drawn, manners = self._draw.random(), self._manners
        request_id = str(uuid.UUID(int=self._draw.getrandbits(128), version=4))
        asked = self._asked(request_id)
        if drawn < manners.impatient:
            self._lose_patience(asked)
            return
        held = self._acquire(asked)
        if held is None:
            return
        if drawn < manners.impatient + manners.crashes:
            self._crash(held)
            return
        self._behave(held, asked)

    def _asked(self, request_id: str) -> dict[str, Any]:
        short = self._draw.random() < self._manners.short_waits
        loyal = self._draw.random() < self._manners.loyal
        return {
            "consumer": CONSUMERS[self._number % len(CONSUMERS)] if loyal else self._draw.choice(CONSUMERS),
            "ttl_seconds": self._draw.choice(self._manners.ttl_seconds),
            "wait_seconds": self._draw.uniform(0.05, 1.0) if short else self._manners.wait_seconds,
            "holder": f"client-{self._number}",
            "request_id": request_id,
        }

    def _behave(self, held: Held, asked: dict[str, Any]) -> None:
        if self._draw.random() < self._manners.repeats:
            self._acquire(asked)
        if self._draw.random() < self._manners.works and held.expires_ns - boot_ns() > LONGEST_WORK_SECONDS * SECOND:
            self._work(asked["consumer"])
        for _ in range(self._draw.randrange(3)):
            self._pause(self._draw.uniform(*self._manners.holds_seconds))
            self._renew(held, raises=self._draw.random() < self._manners.raises_ttl)
        self._release(held)
        if self._draw.random() < self._manners.renews_after_release:
            self._renew(held)

    def _lose_patience(self, asked: dict[str, Any]) -> None:
        """It hangs up while it waits; some think better of it, and ask again for what may be theirs by then."""
        held = self._acquire(asked, leaves_after=self._draw.uniform(0.02, 0.2))
        if held is None and self._draw.random() < self._manners.thinks_better:
            self._pause(self._draw.uniform(0.0, 0.4))
            held = self._acquire(asked)
        if held is not None:
            self._release(held)

    def _crash(self, held: Held) -> None:
        """It vanishes without a word, and comes back when its lease is over, believing that it still holds."""
        self._line.close()
        left_ns = held.expires_ns - boot_ns() + round(self._draw.uniform(0.02, 0.3) * SECOND)
        time.sleep(max(0.0, left_ns / SECOND))
        self._renew(held)

    def _pause(self, seconds: float) -> None:
        """A holder's own work, which the broker does not see."""
        time.sleep(seconds)

    def _work(self, consumer: str) -> None:
        """Something that puts the consumer's memory on the card. What becomes of it is not this run's business."""
        try:
            self._stage.warm(consumer)
        except Exception as error:
            self.broken.append(f"client {self._number}: {consumer} did not work: {error}")

    # -- calls ----------------------------------------------------------------------------------------------

    def _acquire(self, asked: dict[str, Any], leaves_after: float | None = None) -> Held | None:
        tries = self._call("POST", "/v1/lease", asked, leaves_after)
        granted = tries.body if tries.code == 200 else {}
        expires_ns = boot_of_wall(granted["expires_at"]) if granted else None
        self._record(
            "acquire",
            tries,
            request_id=asked["request_id"],
            consumer=asked["consumer"],
            lease_id=granted.get("lease_id"),
            fence=granted.get("fence"),
            expires_ns=expires_ns,
        )
        if expires_ns is None:
            return None
        return Held(granted["token"], granted["lease_id"], granted["fence"], expires_ns)

    def _renew(self, held: Held, *, raises: bool = False) -> None:
        """What it promises is counted from before it was sent, where the broker's own word is later."""
        body = {"ttl_seconds": self._manners.raised_ttl_seconds} if raises else None
        tries = self._call("POST", f"/v1/lease/{held.token}/renew", body)
        expires_ns = None
        if tries.code == 200:
            expires_ns = held.expires_ns = boot_of_wall(tries.body["expires_at"])
        self._record("renew", tries, lease_id=held.lease_id, fence=held.fence, expires_ns=expires_ns)

    def _release(self, held: Held) -> None:
        tries = self._call("DELETE", f"/v1/lease/{held.token}", None)
        released = tries.body.get("released")
        self._record("release", tries, lease_id=held.lease_id, fence=held.fence, released=released)

    def _record(self, op: Op, tries: Tries, **seen: Any) -> None:
        self._recorder.add(
            Call(
                op=op,
                client=self._number,
                inv_ns=tries.inv_ns,
                sent_ns=tries.sent_ns,
                ok_ns=boot_ns(),
                code=tries.code,
                tries=tries.count,
                error=tries.error,
                **seen,
            )
        )

    def _call(self, method: str, path: str, body: dict[str, Any] | None, leaves_after: float | None = None) -> Tries:
        """Again and again while nobody answers, or while the answer says that the broker is on its way out."""
        tries = Tries(boot_ns())
        until_ns = tries.inv_ns + round(GIVES_UP_SECONDS * SECOND)
        while boot_ns() < until_ns:
            tries.count += 1
            try:
                timeout = leaves_after or ANSWER_SECONDS
                tries.code, tries.body = self._line.call(method, path, body, timeout, lambda: _left(tries))
            except TimeoutError:
                if leaves_after is not None:
                    tries.error = "hung_up"
                    return tries
            except (OSError, http.client.HTTPException, ValueError):
                pass  # the broker is dead, or died in the middle of its answer
            else:
                tries.error = tries.body.get("error", {}).get("code")
                if tries.error not in COME_BACK:
                    self._look_at(method, path, tries)
                    return tries
                tries.code = UNKNOWN
            time.sleep(AGAIN_SECONDS)
        tries.error = "gave_up"
        self.broken.append(f"client {self._number}: nobody answered for {GIVES_UP_SECONDS:g} s")
        return tries

    def _look_at(self, method: str, path: str, tries: Tries) -> None:
        expected = (200, 404, 503) if path.startswith("/v1/lease/") else (200, 409, 503)
        if tries.code not in expected:
            self.broken.append(f"client {self._number}: {method} was answered {tries.code} {tries.error}")


def _left(tries: Tries) -> None:
    tries.sent_ns = boot_ns()
