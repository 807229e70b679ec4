"""What a run leaves behind: everything that callers saw, what was done to the broker, and the broker's own rows.

Owns: these records, and how they are written and read back. Must not: judge them, or talk to a broker.

Every instant is nanoseconds of CLOCK_BOOTTIME: callers, nemesis and broker share the machine and so the clock.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

SECOND = 1_000_000_000
MILLISECOND = 1_000_000
READ_TOGETHER_NS = 20_000
UNKNOWN = 0
"""A code: nobody knows what came of the call."""

Op = Literal["acquire", "renew", "release"]


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_of_wall(shown: str) -> int:
    """An instant of the wire on this clock. It is cut to milliseconds."""
    wall_ns = round(datetime.fromisoformat(shown).timestamp() * 1000) * MILLISECOND
    return wall_ns - _wall_minus_boot_ns()


def _wall_minus_boot_ns() -> int:
    """Read until nothing came between the two clocks: a thread may be put aside in the middle."""
    best = least = None
    for _ in range(20):
        before, wall, after = boot_ns(), time.time_ns(), boot_ns()
        if least is None or after - before < least:
            best, least = wall - (before + after) // 2, after - before
        if least < READ_TOGETHER_NS:
            break
    return best or 0


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one caller with all its tries. ``code`` 0: unknown what came of it.

    ``inv_ns``: before the first try was sent. ``sent_ns``: the last try has left. ``ok_ns``: the answer is here, or the
    caller has closed its connection. ``expires_ns``: what the answer promises. ``error``: the answer's code, or
    ``hung_up`` for a caller that left a connection on which it waited.
    """

    op: Op
    client: int
    inv_ns: int
    sent_ns: int
    ok_ns: int
    code: int
    tries: int = 1
    request_id: str | None = None
    lease_id: str | None = None
    fence: int | None = None
    expires_ns: int | None = None
    released: bool | None = None
    error: str | None = None
    consumer: str | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """From before it was done until the broker was seen to serve again."""

    kind: str
    inv_ns: int
    ok_ns: int


@dataclass(frozen=True, slots=True)
class Truth:
    """Who holds memory on the card, and who does by the broker's word, in MiB by consumer, at one time."""

    at_ns: int
    card: dict[str, int]
    status: dict[str, int]


@dataclass(frozen=True, slots=True)
class Event:
    """A row of the broker's events. ``at_ns`` is its wall clock's, cut to milliseconds."""

    seq: int
    at_ns: int
    life: str
    type: str
    consumer: str | None
    facts: dict[str, Any]

    @property
    def lease_id(self) -> str:
        return str(self.facts.get("lease_id"))

    @property
    def fence(self) -> int:
        return int(self.facts["fence"])


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the broker's leases."""

    lease_id: str
    fence: int
    state: str


@dataclass(frozen=True, slots=True)
class Final:
    """After the callers have gone and every lease had time to end."""

    queue: int
    leases: int
    over_commits: int


@dataclass(slots=True)
class Run:
    """``quantum_ns``: the longest turn while somebody else is waited for; None: first come, first served."""

    quantum_ns: int | None = None
    calls: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    truths: list[Truth] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    leases: list[Row] = field(default_factory=list)
    final: Final = field(default_factory=lambda: Final(0, 0, 0))

    def grants(self) -> list[Event]:
        return [event for event in self.events if event.type == "grant"]

    def ends(self) -> list[Event]:
        return [event for event in self.events if event.type in ("release", "expire", "revoke") and event.facts]


class Recorder:
    """Written as it comes, one JSON line each, so that a run that breaks leaves what it saw. Any thread."""

    def __init__(self, path: Path, quantum_ns: int | None = None) -> None:
        self.run = Run(quantum_ns)
        self._file = path.open("w", encoding="utf-8", buffering=1)  # a line at once
        self._turn = threading.Lock()

    def add(self, record: Call | Fault | Truth | Final) -> None:
        with self._turn:
            if isinstance(record, Call):
                self.run.calls.append(record)
            elif isinstance(record, Fault):
                self.run.faults.append(record)
            elif isinstance(record, Truth):
                self.run.truths.append(record)
            else:
                self.run.final = record
            self._file.write(json.dumps({"record": type(record).__name__, **asdict(record)}) + "\n")

    def close(self) -> None:
        self._file.close()


class Ledger:
    """The broker's events and leases, read while it runs: it keeps the last events only, and a long run makes more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events: dict[int, Event] = {}
        self._leases: dict[str, Row] = {}

    def read(self) -> None:
        """Without a write to the file. Nothing where there is no such file: then nothing was kept.

        Raises: sqlite3.Error.
        """
        if not self._path.exists():
            return
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=5)) as connection:
            after = max(self._events, default=0)
            for event in _events(connection.execute(_SELECT_EVENTS, (after,))):
                self._events[event.seq] = event
            for lease_id, fence, state in connection.execute("SELECT lease_id, fence, state FROM lease"):
                self._leases[lease_id] = Row(lease_id, fence, state)

    def into(self, run: Run) -> None:
        run.events = sorted(self._events.values(), key=lambda event: event.seq)
        run.leases = list(self._leases.values())


_SELECT_EVENTS = "SELECT seq, at, life, type, consumer, facts FROM event WHERE seq > ? ORDER BY seq"


def _events(rows: Iterable[tuple[int, str, str, str, str | None, str]]) -> Iterator[Event]:
    for seq, at, life, kind, consumer, facts in rows:
        yield Event(seq, boot_of_wall(at), life, kind, consumer, json.loads(facts))
