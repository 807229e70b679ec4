"""Brokers that break one promise each. A checker that cannot fail proves nothing: each of these must be caught.

Owns: what each one does wrong, and which rules must say so. Must not: be loaded by a broker that is meant to work; only
mutant.conf.py installs one, from outside, before the application is built.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

from gpumgr import wiring
from gpumgr.adapters import store
from gpumgr.core import quantum, queue
from gpumgr.core.catalog import Catalog
from gpumgr.core.lease import EndReason, Lease, LeaseBook, Renewed
from gpumgr.core.queue import Entry
from gpumgr.errors import LeaseUnknown
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.ports import Kept, StoreError
from gpumgr.runtime.ticket import Caller
from gpumgr.web.hangup import HangUp
from tests.torture.clients import Manners
from tests.torture.nemesis import Moods
from tests.torture.plan import QUANTUM_SECONDS, Plan

ENV = "GPUMGR_TORTURE_MUTANT"
LATE_SECONDS = 0.3
QUIET = Moods(every_seconds=(3.0, 5.0))
PAUSES = Moods(every_seconds=(3.0, 5.0), weights=(0.0, 0.0, 0.0, 1.0, 0.0))
LOYAL = Manners(loyal=1.0)
CALM = Moods(every_seconds=(9.0, 12.0))
KILLS = Moods(every_seconds=(0.4, 1.0), weights=(0.3, 0.2, 0.5, 0.0, 0.0))


@dataclass(frozen=True, slots=True)
class Mutant:
    """``caught_by``: one of these must. ``manners`` and ``moods`` bring about what it does wrong sooner."""

    install: Callable[[], None]
    caught_by: tuple[str, ...]
    manners: Manners = field(default_factory=Manners)
    moods: Moods = field(default_factory=Moods)
    seconds: float = 15.0
    quantum_seconds: float | None = None

    def plan(self, seconds: float, seed: int = 1) -> Plan:
        """What it leaves behind is not waited for: it is not what it must be caught by."""
        manners, moods = self.manners, self.moods
        return Plan(seconds, seed, self.quantum_seconds, manners=manners, moods=moods, drain_seconds=0)


MUTANTS: dict[str, Mutant] = {}


def mutant(*caught_by: str, **plan: Any) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def enter(install: Callable[[], None]) -> Callable[[], None]:
        MUTANTS[install.__name__] = Mutant(install, caught_by, **plan)
        return install

    return enter


def _put(owner: Any, name: str, wrong: object) -> None:
    """In the place of something that is there: else the mutant would be none, and nobody would notice."""
    getattr(owner, name)
    setattr(owner, name, wrong)


@mutant("R1", moods=QUIET)
def double_grant() -> None:
    """Nobody excludes anybody."""
    _put(queue, "blocked", lambda _consumer, _ahead, _catalog: False)


class Forgetful(store.SqliteStore):
    """Everything is written nowhere."""

    def open(self) -> Kept:
        return Kept()

    def _write(self, *_args: Any, **_options: Any) -> None:
        self._events.clear()


@mutant("R1", "R2", "R4", moods=KILLS)
def no_persistence() -> None:
    _put(wiring, "SqliteStore", Forgetful)


@mutant("R2", moods=KILLS)
def fence_in_memory() -> None:
    """Each life of the broker counts from one; the table that would object lets it."""
    _put(LeaseBook, "start_fence", lambda _self, _fence: None)
    _put(store, "_SCHEMA", store._SCHEMA.replace(" UNIQUE", ""))


class Late(store.SqliteStore):
    """Says yes at once, and writes in its own time, in the right order."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._due: SimpleQueue[tuple[float, tuple[Any, ...], dict[str, Any]]] = SimpleQueue()
        threading.Thread(target=self._write_later, name="late", daemon=True).start()

    def _write(self, *args: Any, **options: Any) -> None:
        self._due.put((time.monotonic() + LATE_SECONDS, args, options))

    def _write_later(self) -> None:
        while True:
            at, args, options = self._due.get()
            time.sleep(max(0.0, at - time.monotonic()))
            with suppress(StoreError):  # too late to tell anybody
                super()._write(*args, **options)


@mutant("R1", "R2", "R3", "R4", "R8", manners=Manners(wait_seconds=4), moods=KILLS)
def reply_before_commit() -> None:
    _put(wiring, "SqliteStore", Late)


def _youngest_first(line: Mapping[str, OrderedDict[int, Entry]], _catalog: Catalog) -> list[Entry]:
    return sorted((next(reversed(waiting.values())) for waiting in line.values()), key=lambda e: -e.seq)


@mutant("R6", moods=QUIET)
def last_come_first_served() -> None:
    _put(queue, "heads", _youngest_first)


@mutant("R6", moods=QUIET, quantum_seconds=QUANTUM_SECONDS)
def last_come_of_a_consumer_first_served() -> None:
    _put(quantum, "heads", _youngest_first)


@mutant("R12", manners=Manners(holds_seconds=(0.1, 0.2)), moods=CALM, quantum_seconds=QUANTUM_SECONDS)
def endless_turn() -> None:
    """Whoever is on the card keeps its turn for as long as somebody asks for it."""
    _put(quantum.Quantum, "quantum_seconds_of", lambda _self, _round_trip, _times: 1e9)


@mutant("R13", manners=LOYAL, moods=PAUSES, quantum_seconds=QUANTUM_SECONDS)
def turn_that_each_request_begins_anew() -> None:
    """The turn of who is on the card is counted from its last request: for as long as somebody asks for it again."""
    after = queue.stays_after

    def stays_after(stays: Any, line: Any, holds: Any, catalog: Catalog, now: float) -> Any:
        some = list(holds)
        found = after(stays, line, some, catalog, now)
        return found | {hold.consumer: replace(found[hold.consumer], since=now) for hold in some}

    _put(queue, "stays_after", stays_after)


@mutant("R13", manners=LOYAL, moods=PAUSES, quantum_seconds=QUANTUM_SECONDS)
def turn_ten_times_as_long() -> None:
    of = quantum.Quantum.quantum_seconds_of
    _put(quantum.Quantum, "quantum_seconds_of", lambda *asked: 10 * of(*asked))


@mutant("R1", "R5", manners=Manners(crashes=0.2), moods=QUIET)
def revival() -> None:
    """A renew brings an expired lease back, for whoever renews it."""
    expired: dict[str, Lease] = {}
    end, renew = LeaseBook.end, Broker.renew

    def remembering(self: LeaseBook, lease: Lease, reason: EndReason, now: float) -> None:
        if reason is EndReason.EXPIRED:
            expired[lease.token] = lease
        end(self, lease, reason, now)

    def reviving(self: Broker, token: str, ttl_seconds: float | None) -> Renewed:
        try:
            return renew(self, token, ttl_seconds)
        except LeaseUnknown:
            if token not in expired:
                raise
            lease = expired[token]
            return Renewed(replace(lease, expires_at=self.clock.monotonic() + lease.ttl_seconds), 0, True)

    _put(LeaseBook, "end", remembering)
    _put(Broker, "renew", reviving)


@mutant("R3", moods=QUIET)
def no_idempotency() -> None:
    """A repeated request is a new one."""
    _put(LeaseBook, "of_request", lambda _self, _key, _consumer, _now: None)


@mutant("R11", manners=Manners(impatient=0.3, thinks_better=0, wait_seconds=4), moods=QUIET)
def ghost_waiter() -> None:
    """A caller that hangs up while it waits is never missed."""

    @contextmanager
    def deaf(_self: HangUp, _sock: Any, _broker: Any) -> Iterator[Caller]:
        yield Caller()

    _put(HangUp, "while_waiting", deaf)
