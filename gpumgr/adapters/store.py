"""What outlives the process: leases, the fence, requests that are over, totals and events, in SQLite.

Owns: the file ``gpumgr.db`` and its tables. Must not: decide what a lease is, or be called with the broker's lock held.

WAL with ``synchronous=FULL``: a commit returns when the disk has it (sqlite.org/pragma.html, read 2026-11). What may
be lost with the power, and not with the process, is written with ``NORMAL`` by ``keep``. One connection, made in the
worker: SQLite's must not cross a fork. A call that fails leaves what it could not write in ``_owed``, and every later
one writes that first, so that the file is true again with the first success.

    meta      boot_id, and an operator's hold
    lease     one row for each grant, by its fence, while it is live, in quarantine, or ended less than a day ago; the
              largest fence of all is the row that never goes
    holder_process  by fence: the process that the holder named; as long as its lease's row
    intent    who is being unloaded for whom
    total     per consumer
    event     the last ones, as status shows them
    unload, observation, tally   each consumer's account: its last unloads, what it was last seen to hold, and sums

A file of an earlier version is brought up by the steps it lacks, in one transaction.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gpumgr.core import ledger
from gpumgr.core.catalog import GpuRef
from gpumgr.core.lease import EndReason, HolderProcess, Lease, LeaseBook, RequestKey
from gpumgr.core.ledger import Account, Entry, Observation, Tally, Unloaded
from gpumgr.core.queue import Priority
from gpumgr.runtime.ports import Clock, Kept, KeptLease, Paused, StoreError, Total

log = logging.getLogger(__name__)

FILE = "gpumgr.db"
BUSY_SECONDS = 1.0
"""How long somebody else who writes to the file, such as a backup, is waited for."""
EVENTS_KEPT = 10_000
EVENTS_SHOWN = 200
EVENTS_OWED = 10_000
LONGEST_FACTS = 4096
LARGEST_WAL_BYTES = 4 * 2**20
WAL_BYTES = 1100 * 1000
"""A checkpoint comes with the 1000th page."""
PAGE_BYTES = 1024
"""A commit writes each page it touches, whole: a quarter of SQLite's usual size is a quarter to bring to the disk."""
TRIM_EACH = 500
"""So many events are written between two looks at whether there are too many."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE lease (
    fence INTEGER PRIMARY KEY, lease_id TEXT NOT NULL, token TEXT, consumer TEXT NOT NULL, holder TEXT, bearer TEXT,
    request_id TEXT, gpus TEXT NOT NULL, gpu_uuids TEXT NOT NULL, sizes_mib TEXT NOT NULL, ttl_seconds REAL NOT NULL,
    granted_at TEXT NOT NULL, granted_boot REAL NOT NULL, boot_id TEXT NOT NULL, life TEXT NOT NULL,
    state TEXT NOT NULL, ended_at TEXT, quarantined INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE intent (life TEXT NOT NULL, seq INTEGER NOT NULL, target TEXT NOT NULL, victims TEXT NOT NULL);
CREATE TABLE total (
    consumer TEXT PRIMARY KEY, requests INTEGER NOT NULL, evictions INTEGER NOT NULL, last_used_at TEXT
) WITHOUT ROWID;
CREATE TABLE event (
    seq INTEGER PRIMARY KEY, at TEXT NOT NULL, life TEXT NOT NULL, type TEXT NOT NULL, consumer TEXT,
    facts TEXT NOT NULL
);
"""
_LEDGER = """
CREATE TABLE unload (
    seq INTEGER PRIMARY KEY, consumer TEXT NOT NULL, at TEXT NOT NULL, claimed_mib INTEGER NOT NULL,
    left_mib INTEGER NOT NULL, seconds REAL NOT NULL, share REAL, reason TEXT
);
CREATE TABLE observation (
    seq INTEGER PRIMARY KEY, consumer TEXT NOT NULL, at TEXT NOT NULL, peak_mib TEXT NOT NULL,
    resident_mib TEXT NOT NULL, reload_seconds REAL
);
CREATE TABLE tally (
    consumer TEXT PRIMARY KEY, unloads INTEGER NOT NULL, failed INTEGER NOT NULL, claimed_mib INTEGER NOT NULL,
    returned_mib INTEGER NOT NULL, seconds REAL NOT NULL, observations INTEGER NOT NULL
) WITHOUT ROWID;
"""
_PRIORITY = "ALTER TABLE lease ADD COLUMN priority TEXT NOT NULL DEFAULT 'normal';"
VERSION = 3


def _steps() -> tuple[str, ...]:
    """What each version added to the one before it."""
    return _SCHEMA, _LEDGER, _PRIORITY


_HOLDER_PROCESS = """
CREATE TABLE IF NOT EXISTS holder_process (
    fence INTEGER PRIMARY KEY, pid INTEGER NOT NULL, started INTEGER NOT NULL
)
"""
"""Made where it is missing: an older gpumgr that reads the file does without it."""


class Unusable(Exception):
    """The file is not this program's, or a newer one's. The message is one sentence."""


def boot_id() -> str:
    """Changes with each boot of the machine (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def examine(path: Path) -> None:
    """Whether a broker may start on this file; nothing is written to it. A file that is not there may.

    Raises: Unusable.
    """
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", timeout=BUSY_SECONDS, uri=True)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        log.warning("%s cannot be examined (%s)", path, error)
        return  # a disk that is full or read-only is told by the store, and no reason not to start
    except sqlite3.DatabaseError as error:
        raise Unusable(_corrupt(path, str(error))) from None
    if said != "ok":
        raise Unusable(_corrupt(path, str(said)))
    if version > VERSION or (version == 0 and tables):
        raise Unusable(
            f"{path} was written by a newer gpumgr (version {version} of its tables, this one knows {VERSION}): start "
            "that one, or move the file away to begin without its leases; nothing was changed in it"
        )


def _corrupt(path: Path, said: str) -> str:
    return (
        f"{path} is damaged ({said}): move it and its -wal and -shm files away to begin without its leases, or bring "
        "back a copy; nothing was changed in it"
    )


@dataclass(frozen=True, slots=True)
class _Write:
    """One statement that must be written, now or later."""

    sql: str
    values: Sequence[Any]


class SqliteStore:
    """``booted`` tells this boot of the machine. Any thread; calls take turns."""

    def __init__(self, directory: Path, clock: Clock, booted: Callable[[], str] = boot_id) -> None:
        self.path = directory / FILE
        self.life = uuid.uuid4().hex
        self._clock = clock
        self._booted = booted
        self._boot = ""
        self._turn = threading.Lock()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_OWED)
        self._owed: list[_Write] = []
        self._connection: sqlite3.Connection | None = None
        self._since_trim = 0
        self._durable: bool | None = None
        self._intended: set[int] = set()
        self._over: deque[int] = deque()
        """Intents of which nothing came."""

    # -- the start ------------------------------------------------------------------------------------------

    def open(self) -> Kept:
        with self._turn, self._translated():
            self._boot = self._booted()
            connection = self._connected()
            try:
                kept = self._load(connection)
            except BaseException:
                connection.close()
                raise
            self._connection, self._durable = connection, None
            return kept

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self.path.chmod(0o600)  # before the first token is in it; -wal and -shm get the same
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # before there is a table
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {LARGEST_WAL_BYTES}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version < VERSION:
                steps = " ".join(_steps()[version:])
                connection.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {VERSION}; COMMIT;")
            connection.execute(_HOLDER_PROCESS)
            self._make_room(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_room(self, connection: sqlite3.Connection) -> None:
        """The WAL has its whole size from the start, as it is written over from its beginning after each checkpoint: a
        commit that makes a file larger waits for the file system's own journal too (0.3 ms instead of 0.2, ext4)."""
        wal = self.path.with_name(f"{FILE}-wal")
        if not wal.exists() or wal.stat().st_size < WAL_BYTES:
            connection.execute("CREATE TABLE IF NOT EXISTS room (x)")
            connection.execute("INSERT INTO room VALUES (zeroblob(?))", (WAL_BYTES,))
            connection.execute("DROP TABLE room")
            connection.execute("PRAGMA wal_checkpoint(RESTART)")

    def _load(self, connection: sqlite3.Connection) -> Kept:
        now, today = self._clock.monotonic(), self._clock.utc()
        connection.execute("BEGIN IMMEDIATE")
        rebooted = self._of_another_boot(connection, today)
        evicting = [name for (names,) in connection.execute("SELECT victims FROM intent") for name in json.loads(names)]
        connection.execute("DELETE FROM intent")
        self._forget_old(connection, today)
        named = self._holder_processes(connection)
        kept = Kept(
            fence=connection.execute("SELECT coalesce(max(fence), 0) FROM lease").fetchone()[0],
            leases=[
                self._kept(row, now, named.get(row["fence"], (None, ""))[0])
                for row in _rows(connection, "SELECT * FROM lease WHERE state = 'live' OR quarantined ORDER BY fence")
            ],
            ended=list(self._ended(connection, now, today)),
            rebooted=[self._kept(row, now).lease for row in rebooted],
            totals={
                name: Total(requests, evictions, None if at is None else datetime.fromisoformat(at))
                for name, requests, evictions, at in connection.execute("SELECT * FROM total")
            },
            events=self._shown(connection),
            evicting=list(dict.fromkeys(evicting)),
            pause=self._pause(connection, today),
            holders=list(named.values()),
            learned=_accounts(connection),
        )
        connection.execute("COMMIT")
        return kept

    def _of_another_boot(self, connection: sqlite3.Connection, today: datetime) -> list[sqlite3.Row]:
        """What held the card then is gone with it."""
        self._set_meta(connection, "boot_id", self._boot)
        rows = _rows(connection, "SELECT * FROM lease WHERE state = 'live' AND boot_id != ? ORDER BY fence", self._boot)
        connection.execute(
            "UPDATE lease SET state = 'host_reboot', ended_at = ?, token = NULL WHERE state = 'live' AND boot_id != ?",
            (today.isoformat(), self._boot),
        )
        connection.execute("UPDATE lease SET quarantined = 0 WHERE boot_id != ?", (self._boot,))
        return rows

    def _holder_processes(self, connection: sqlite3.Connection) -> dict[int, tuple[HolderProcess, str]]:
        """Of this boot, with the consumers of their leases, by fence."""
        connection.execute(
            "DELETE FROM holder_process WHERE fence NOT IN (SELECT fence FROM lease WHERE boot_id = ?)", (self._boot,)
        )
        rows = connection.execute(
            "SELECT fence, pid, started, consumer FROM holder_process JOIN lease USING (fence) ORDER BY fence"
        )
        return {fence: (HolderProcess(pid, started), consumer) for fence, pid, started, consumer in rows}

    def _kept(self, row: sqlite3.Row, now: float, process: HolderProcess | None = None) -> KeptLease:
        """Since when it is held is reckoned by CLOCK_BOOTTIME, as somebody may have set the wall clock meanwhile."""
        ago = max(0.0, now + self._clock.slept() - row["granted_boot"])
        lease = Lease(
            lease_id=row["lease_id"],
            token=row["token"] or "",
            consumer=row["consumer"],
            holder=row["holder"],
            gpus=tuple(json.loads(row["gpus"])),
            gpu_uuids=tuple(json.loads(row["gpu_uuids"])),
            seq=0,
            fence=row["fence"],
            granted_at=now - ago,
            ttl_seconds=row["ttl_seconds"],
            expires_at=now,
            request=_request(row),
            written_ttl_seconds=row["ttl_seconds"],
            process=process,
        )
        sizes_mib, priority = tuple(json.loads(row["sizes_mib"])), Priority(row["priority"])
        return KeptLease(lease, sizes_mib, quarantined=bool(row["quarantined"]), priority=priority)

    @staticmethod
    def _pause(connection: sqlite3.Connection, today: datetime) -> Paused | None:
        found = connection.execute("SELECT value FROM meta WHERE key = 'pause'").fetchone()
        if found is None:
            return None
        kept = json.loads(found[0])
        since, until = (datetime.fromisoformat(kept[key]) for key in ("since", "until"))
        return Paused(since, until, kept["by"], kept["reason"]) if today < until else None

    @staticmethod
    def _ended(
        connection: sqlite3.Connection, now: float, today: datetime
    ) -> Iterator[tuple[RequestKey, str, EndReason, float]]:
        ended = "SELECT * FROM lease WHERE ended_at IS NOT NULL AND request_id IS NOT NULL ORDER BY ended_at"
        for row in _rows(connection, ended):
            ago = max(0.0, (today - datetime.fromisoformat(row["ended_at"])).total_seconds())
            request = _request(row)
            if request is not None:
                yield request, row["consumer"], EndReason(row["state"]), now - ago

    @staticmethod
    def _shown(connection: sqlite3.Connection) -> list[dict[str, Any]]:
        rows = _rows(connection, "SELECT * FROM event ORDER BY seq DESC LIMIT ?", EVENTS_SHOWN)
        return [
            {"at": row["at"], "type": row["type"], "consumer": row["consumer"], **json.loads(row["facts"])}
            for row in reversed(rows)
        ]

    # -- what is written ------------------------------------------------------------------------------------

    def note(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def intend(self, seq: int, target: str, victims: Sequence[str]) -> None:
        values = (self.life, seq, target, json.dumps(list(victims)))
        self._write([_Write("INSERT INTO intent VALUES (?, ?, ?, ?)", values)])
        self._intended.add(seq)

    def forget_intent(self, seq: int) -> None:
        if seq in self._intended:
            self._intended.discard(seq)
            self._over.append(seq)

    def granted(self, kept: KeptLease, event: dict[str, Any], totals: Mapping[str, Total]) -> None:
        """Where it fails, nobody is told of the lease: what a disk may have of it all the same is taken out again."""
        lease, request = kept.lease, kept.lease.request
        values = (
            *(lease.fence, lease.lease_id, lease.token, lease.consumer, lease.holder),
            *((None, None) if request is None else (request.bearer, request.request_id)),
            *(json.dumps(list(each)) for each in (lease.gpus, lease.gpu_uuids, kept.sizes_mib)),
            *(lease.ttl_seconds, self._clock.utc().isoformat(), self._clock.monotonic() + self._clock.slept()),
            *(self._boot, self.life, "live", None, 0, kept.priority.value),
        )
        writes = [
            _Write(f"INSERT INTO lease VALUES ({', '.join('?' * len(values))})", values),  # noqa: S608 - question marks
            *_of_totals(totals),
        ]
        if lease.process is not None:
            named = (lease.fence, lease.process.pid, lease.process.started)
            writes.append(_Write("INSERT OR REPLACE INTO holder_process VALUES (?, ?, ?)", named))
        if lease.seq in self._intended:
            writes.append(self._done(lease.seq))
        undo = _Write("DELETE FROM lease WHERE fence = ?", (lease.fence,))
        self._write(writes, event, owed=[undo])
        self._intended.discard(lease.seq)

    def _done(self, seq: int) -> _Write:
        return _Write("DELETE FROM intent WHERE life = ? AND seq = ?", (self.life, seq))

    def ended(self, lease: Lease, reason: EndReason, event: dict[str, Any], *, quarantined: bool) -> None:
        values = (reason.value, self._clock.utc().isoformat(), int(quarantined), lease.fence)
        sql = "UPDATE lease SET state = ?, ended_at = ?, quarantined = ?, token = NULL WHERE fence = ?"
        writes = [_Write(sql, values)]
        self._write(writes, event, owed=writes)

    def raised(self, lease: Lease) -> None:
        writes = [
            _Write(
                "UPDATE lease SET ttl_seconds = max(ttl_seconds, ?) WHERE fence = ?", (lease.ttl_seconds, lease.fence)
            )
        ]
        self._write(writes, owed=writes)

    def paused(self, pause: Paused | None) -> None:
        if pause is None:
            writes = [_Write("DELETE FROM meta WHERE key = 'pause'", ())]
        else:
            facts = {"since": pause.since.isoformat(), "until": pause.until.isoformat()}
            text = json.dumps(facts | {"by": pause.by, "reason": pause.reason})
            writes = [_Write("INSERT OR REPLACE INTO meta VALUES ('pause', ?)", (text,))]
        self._write(writes, owed=writes)

    def keep(self, totals: Mapping[str, Total], idle: Sequence[str], learned: Sequence[tuple[str, Entry]] = ()) -> None:
        over = [_Write("UPDATE lease SET quarantined = 0 WHERE lease_id = ?", (lease_id,)) for lease_id in idle]
        self._write([*_of_totals(totals), *over, *_of_learned(learned)], owed=over, durable=bool(over))

    def try_again(self) -> None:
        """Writing one row is the only way to know."""
        self._write([_Write("INSERT OR REPLACE INTO meta VALUES ('tried', ?)", (self._clock.utc().isoformat(),))])

    def close(self) -> None:
        with self._turn:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _write(
        self,
        writes: Sequence[_Write],
        event: dict[str, Any] | None = None,
        *,
        owed: Sequence[_Write] = (),
        durable: bool = True,
    ) -> None:
        """In one transaction: what is owed, the events before this one, and these. ``owed``: what must be written later
        where this fails."""
        with self._turn:
            self._owed += [self._done(self._over.popleft()) for _ in range(len(self._over))]
            before = list(self._events)
            events = before if event is None else [*before, event]
            try:
                with self._translated():
                    self._commit([*self._owed, *writes, *map(self._of_event, events)], durable=durable)
            except StoreError:
                self._owed += owed
                if event is not None and any(write in owed for write in writes):
                    self._events.append(event)  # it happened, written down or not
                raise
            self._owed.clear()
            for _ in before:
                self._events.popleft()
            self._since_trim += len(events)

    def _commit(self, writes: Sequence[_Write], *, durable: bool) -> None:
        connection = self._connection
        if connection is None:
            raise StoreError(f"{self.path} is not open")
        if durable is not self._durable:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        connection.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                connection.execute(write.sql, write.values)
            if self._since_trim >= TRIM_EACH:
                self._trim(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _of_event(self, event: Mapping[str, Any]) -> _Write:
        facts = {key: value for key, value in event.items() if key not in ("at", "type", "consumer")}
        text = json.dumps(facts, default=str)
        if len(text) > LONGEST_FACTS:
            text = json.dumps({"left_out": f"{len(text)} bytes of facts"})
        values = (event["at"], self.life, event["type"], event["consumer"], text)
        return _Write("INSERT INTO event (at, life, type, consumer, facts) VALUES (?, ?, ?, ?, ?)", values)

    def _trim(self, connection: sqlite3.Connection) -> None:
        self._since_trim = 0
        connection.execute("DELETE FROM event WHERE seq <= (SELECT max(seq) FROM event) - ?", (EVENTS_KEPT,))
        self._forget_old(connection, self._clock.utc())

    @staticmethod
    def _forget_old(connection: sqlite3.Connection, today: datetime) -> None:
        """As the book of leases does: after a day, and beyond a count. The largest fence stays: it is the last one that
        was given."""
        a_day_ago = today - timedelta(seconds=LeaseBook.ENDED_KEPT_SECONDS)
        over = "ended_at IS NOT NULL AND NOT quarantined AND fence < (SELECT max(fence) FROM lease)"
        connection.execute(f"DELETE FROM lease WHERE {over} AND ended_at < ?", (a_day_ago.isoformat(),))  # noqa: S608
        connection.execute(
            f"DELETE FROM lease WHERE {over} AND fence <= (SELECT max(fence) FROM lease) - ?",  # noqa: S608
            (LeaseBook.ENDED_KEPT_COUNT,),
        )

    @staticmethod
    def _set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors, and the file system's, as StoreError."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path} cannot be written ({error})") from None


def _rows(connection: sqlite3.Connection, sql: str, *values: Any) -> list[sqlite3.Row]:
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(sql, values).fetchall()


def _request(row: sqlite3.Row) -> RequestKey | None:
    if row["request_id"] is None:
        return None
    return RequestKey(row["bearer"], row["holder"], row["request_id"])


def _of_totals(totals: Mapping[str, Total]) -> list[_Write]:
    return [
        _Write(
            "INSERT OR REPLACE INTO total VALUES (?, ?, ?, ?)",
            (name, total.requests, total.evictions, total.last_used_at and total.last_used_at.isoformat()),
        )
        for name, total in totals.items()
    ]


def _of_learned(learned: Sequence[tuple[str, Entry]]) -> list[_Write]:
    writes = [_of_entry(name, entry) for name, entry in learned]
    for name in dict.fromkeys(name for name, _ in learned):
        tally = sum((ledger.tally_of(entry) for each, entry in learned if each == name), Tally())
        sums = ", ".join(f"{column} = {column} + excluded.{column}" for column in _SUMS)
        sql = f"INSERT INTO tally VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (consumer) DO UPDATE SET {sums}"  # noqa: S608
        writes.append(_Write(sql, (name, *(getattr(tally, column) for column in _SUMS))))
        for table in ("unload", "observation"):
            last = f"SELECT seq FROM {table} WHERE consumer = ? ORDER BY seq DESC LIMIT 1 OFFSET ?"  # noqa: S608
            trim = f"DELETE FROM {table} WHERE consumer = ? AND seq <= ({last})"  # noqa: S608 - our own names
            writes.append(_Write(trim, (name, name, ledger.KEPT)))
    return writes


_SUMS = ("unloads", "failed", "claimed_mib", "returned_mib", "seconds", "observations")


def _of_entry(name: str, entry: Entry) -> _Write:
    if isinstance(entry, Unloaded):
        values = (name, entry.at, entry.claimed_mib, entry.left_mib, entry.seconds, entry.share, entry.reason)
        columns = "consumer, at, claimed_mib, left_mib, seconds, share, reason"
        return _Write(f"INSERT INTO unload ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", values)  # noqa: S608
    sizes = (json.dumps({str(gpu): mib for gpu, mib in each.items()}) for each in (entry.peak_mib, entry.resident_mib))
    columns = "consumer, at, peak_mib, resident_mib, reload_seconds"
    return _Write(
        f"INSERT INTO observation ({columns}) VALUES (?, ?, ?, ?, ?)",  # noqa: S608
        (name, entry.at, *sizes, entry.reload_seconds),
    )


def _accounts(connection: sqlite3.Connection) -> dict[str, Account]:
    unloads: dict[str, list[Unloaded]] = {}
    for row in _rows(connection, "SELECT * FROM unload ORDER BY seq"):
        facts = ("at", "claimed_mib", "left_mib", "seconds", "share", "reason")
        unloads.setdefault(row["consumer"], []).append(Unloaded(*(row[fact] for fact in facts)))
    observations: dict[str, list[Observation]] = {}
    for row in _rows(connection, "SELECT * FROM observation ORDER BY seq"):
        peak, resident = _sizes(row["peak_mib"]), _sizes(row["resident_mib"])
        found = Observation(row["at"], peak, resident, row["reload_seconds"])
        observations.setdefault(row["consumer"], []).append(found)
    return {
        name: Account(tuple(unloads.get(name, ())), tuple(observations.get(name, ())), Tally(*sums))
        for name, *sums in connection.execute(f"SELECT consumer, {', '.join(_SUMS)} FROM tally")  # noqa: S608
    }


def _sizes(text: str) -> dict[GpuRef, int]:
    return {int(gpu) if gpu.isdecimal() else gpu: mib for gpu, mib in json.loads(text).items()}


class NoStore:
    """Keeps nothing: for a broker that is not to outlive its process, as in a bench of the rules."""

    def open(self) -> Kept:
        return Kept()

    def note(self, event: dict[str, Any]) -> None:
        pass

    def intend(self, seq: int, target: str, victims: Sequence[str]) -> None:
        pass

    def forget_intent(self, seq: int) -> None:
        pass

    def granted(self, kept: KeptLease, event: dict[str, Any], totals: Mapping[str, Total]) -> None:
        pass

    def ended(self, lease: Lease, reason: EndReason, event: dict[str, Any], *, quarantined: bool) -> None:
        pass

    def raised(self, lease: Lease) -> None:
        pass

    def paused(self, pause: Paused | None) -> None:
        pass

    def keep(self, totals: Mapping[str, Total], idle: Sequence[str], learned: Sequence[tuple[str, Entry]] = ()) -> None:
        pass

    def try_again(self) -> None:
        pass

    def close(self) -> None:
        pass
