"""What outlives the process: real SQLite in a real directory."""

from __future__ import annotations

import json
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gpumgr.adapters import store as stores
from gpumgr.adapters.store import EVENTS_KEPT, LONGEST_FACTS, SqliteStore, Unusable, examine
from gpumgr.core.lease import EndReason, Lease, RequestKey
from gpumgr.core.ledger import KEPT, Account, Observation, Unloaded
from gpumgr.core.queue import Priority
from gpumgr.runtime.ports import KeptLease, StoreError, Total
from tests.worlds import ManualClock

TTL = 60.0


class Disk:
    """A directory, and lives of a broker on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = ManualClock()
        self.boot = "boot-1"
        self.opened: list[SqliteStore] = []
        self._fence = 0

    @property
    def file(self) -> Path:
        return self.directory / stores.FILE

    def life(self) -> SqliteStore:
        found = SqliteStore(self.directory, self.clock, lambda: self.boot)
        self.opened.append(found)
        return found

    def kept(self, **facts: Any) -> KeptLease:
        self._fence += 1
        known = Lease(
            lease_id=f"lease-{self._fence}",
            token=f"token-{self._fence}",
            consumer="comfyui",
            holder="imagen",
            gpus=(0,),
            gpu_uuids=("GPU-0",),
            seq=self._fence,
            fence=self._fence,
            granted_at=self.clock.now,
            ttl_seconds=TTL,
            expires_at=self.clock.now + TTL,
        )
        return KeptLease(replace(known, **facts), (14000,))

    def event(self, kind: str = "grant", **facts: Any) -> dict[str, Any]:
        return {"at": self.clock.utc().isoformat(), "type": kind, "consumer": "comfyui", **facts}

    def rows(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.file)) as connection:
            return connection.execute(sql).fetchall()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path)
    yield found
    for each in found.opened:
        each.close()


def granted(disk: Disk, store: SqliteStore, **facts: Any) -> Lease:
    kept = disk.kept(**facts)
    store.granted(kept, disk.event(lease_id=kept.lease.lease_id), {})
    return kept.lease


def test_a_live_lease_is_there_again_with_everything(disk: Disk) -> None:
    store = disk.life()
    store.open()
    key = RequestKey("ops", "imagen", "r1")
    lease = granted(disk, store, request=key, gpus=(0, "GPU-x"), gpu_uuids=("GPU-0", None))
    urgent = replace(disk.kept(), sizes_mib=(9000,), priority=Priority.INTERACTIVE)
    store.granted(urgent, disk.event(), {"comfyui": Total(2, 1, disk.clock.utc())})
    disk.clock.now += 10
    kept = disk.life().open()
    assert kept.fence == 2
    again = kept.leases[0].lease
    assert again.granted_at == disk.clock.now - 10
    assert replace(again, seq=lease.seq, granted_at=lease.granted_at, expires_at=lease.expires_at) == replace(
        lease, written_ttl_seconds=TTL
    )
    assert [(each.sizes_mib, each.priority) for each in kept.leases] == [
        ((14000,), Priority.NORMAL),
        ((9000,), Priority.INTERACTIVE),
    ]
    assert kept.totals == {"comfyui": Total(2, 1, disk.clock.utc() - timedelta(seconds=10))}
    assert [event["lease_id"] for event in kept.events if "lease_id" in event] == ["lease-1"]


def test_an_end_is_an_end_in_the_next_life_too(disk: Disk) -> None:
    store = disk.life()
    store.open()
    key = RequestKey(None, "imagen", "r1")
    lease = granted(disk, store, request=key)
    other = granted(disk, store)
    store.ended(lease, EndReason.RELEASED, disk.event("release"), quarantined=False)
    store.ended(other, EndReason.EXPIRED, disk.event("expire"), quarantined=True)
    disk.clock.now += 5
    kept = disk.life().open()
    assert kept.ended == [(key, "comfyui", EndReason.RELEASED, disk.clock.now - 5)]
    assert [(each.lease.lease_id, each.quarantined) for each in kept.leases] == [(other.lease_id, True)]
    assert disk.rows("SELECT token FROM lease") == [(None,), (None,)], "a token that opens nothing is not kept"


def test_a_quarantine_that_is_over_is_over(disk: Disk) -> None:
    store = disk.life()
    store.open()
    lease = granted(disk, store)
    store.ended(lease, EndReason.EXPIRED, disk.event("expire"), quarantined=True)
    store.keep({}, [lease.lease_id])
    assert disk.life().open().leases == []


def test_a_raised_ttl_is_what_a_restart_gives(disk: Disk) -> None:
    store = disk.life()
    store.open()
    lease = granted(disk, store)
    store.raised(replace(lease, ttl_seconds=600.0))
    assert disk.life().open().leases[0].lease.ttl_seconds == 600


def test_another_boot_ends_every_lease(disk: Disk) -> None:
    store = disk.life()
    store.open()
    key = RequestKey(None, "imagen", "r1")
    lease = granted(disk, store, request=key)
    other = granted(disk, store)
    store.ended(other, EndReason.EXPIRED, disk.event("expire"), quarantined=True)
    disk.boot = "boot-2"
    kept = disk.life().open()
    assert kept.leases == []
    assert [each.lease_id for each in kept.rebooted] == [lease.lease_id]
    assert [(k, reason) for k, _, reason, _ in kept.ended] == [(key, EndReason.HOST_REBOOT)]
    assert kept.fence == 2
    assert disk.life().open().rebooted == []


def test_fences_that_are_written_out_of_order_do_not_come_again(disk: Disk) -> None:
    store = disk.life()
    store.open()
    first, second = disk.kept(), disk.kept()
    store.granted(second, disk.event(), {})
    store.granted(first, disk.event(), {})
    assert disk.life().open().fence == 2


def test_what_was_intended_is_told_once(disk: Disk) -> None:
    store = disk.life()
    store.open()
    store.intend(1, "comfyui", ["ollama", "mvoice"])
    assert disk.life().open().evicting == ["ollama", "mvoice"]
    store = disk.life()
    assert store.open().evicting == []
    kept = disk.kept()
    store.intend(kept.lease.seq, "comfyui", ["ollama"])
    store.granted(kept, disk.event(), {})
    assert disk.life().open().evicting == []


# -- a disk that fails --------------------------------------------------------------------------------------


def locked(disk: Disk) -> sqlite3.Connection:
    """Somebody else writes, and does not end: for a writer the same as a disk that does not answer."""
    connection = sqlite3.connect(disk.file, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_what_could_not_be_written_is_owed(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BUSY_SECONDS", 0.02)
    store = disk.life()
    store.open()
    lease = granted(disk, store)
    with closing(locked(disk)):
        with pytest.raises(StoreError, match="cannot be written"):
            store.ended(lease, EndReason.RELEASED, disk.event("release"), quarantined=False)
        refused = disk.kept()
        with pytest.raises(StoreError):
            store.granted(refused, disk.event(lease_id="nobody's"), {})
        with pytest.raises(StoreError):
            store.try_again()
    store.note(disk.event("refuse"))
    store.try_again()
    assert disk.rows("SELECT lease_id, state FROM lease") == [(lease.lease_id, "released")]
    assert [kind for (kind,) in disk.rows("SELECT type FROM event ORDER BY seq")] == ["grant", "release", "refuse"]


def test_a_disk_without_room_is_a_store_error_and_heals(disk: Disk) -> None:
    store = disk.life()
    store.open()
    assert store._connection is not None
    store._connection.execute("VACUUM")
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages + 1}")  # what ENOSPC does, without a disk of our own
    for _ in range(20):
        store.note(disk.event("refuse", reason="x" * 1000))
    with pytest.raises(StoreError, match="full"):
        granted(disk, store)
    live = len(disk.rows("SELECT * FROM lease"))
    store._connection.execute("PRAGMA max_page_count = 1000000")
    store.try_again()
    assert len(disk.rows("SELECT * FROM lease")) == live
    granted(disk, store)


def test_a_directory_that_is_not_there_is_a_store_error(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "nowhere", ManualClock(), lambda: "boot-1")
    with pytest.raises(StoreError, match="nowhere"):
        store.open()
    with pytest.raises(StoreError):
        store.try_again()
    (tmp_path / "nowhere").mkdir()
    assert store.open().fence == 0
    store.close()


# -- a file that is no store of ours ------------------------------------------------------------------------


def test_nothing_and_our_own_may_start(disk: Disk) -> None:
    examine(disk.file)
    store = disk.life()
    store.open()
    granted(disk, store)
    examine(disk.file)
    store.close()
    examine(disk.file)


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_damaged_file_is_refused_and_left_as_it_is(disk: Disk, content: bytes) -> None:
    disk.file.write_bytes(content)
    with pytest.raises(Unusable, match=r"is damaged .* move it"):
        examine(disk.file)
    assert disk.file.read_bytes() == content


def test_a_page_that_was_overwritten_is_found(disk: Disk) -> None:
    store = disk.life()
    store.open()
    for _ in range(50):
        granted(disk, store)
    store.close()
    content = bytearray(disk.file.read_bytes())
    content[4096:8192] = b"\x55" * 4096
    disk.file.write_bytes(content)
    with pytest.raises(Unusable, match="is damaged"):
        examine(disk.file)


def test_a_newer_one_s_file_is_refused_and_left_as_it_is(disk: Disk) -> None:
    with closing(sqlite3.connect(disk.file)) as connection:
        connection.execute("PRAGMA user_version = 7")
        connection.execute("CREATE TABLE lease (x)")
    before = disk.file.read_bytes()
    with pytest.raises(Unusable, match=r"newer gpumgr .version 7"):
        examine(disk.file)
    assert disk.file.read_bytes() == before


@pytest.mark.parametrize("version", range(1, stores.VERSION))
def test_a_file_of_an_earlier_version_is_brought_up_with_all_that_is_in_it(disk: Disk, version: int) -> None:
    lease = disk.kept().lease
    with closing(sqlite3.connect(disk.file)) as connection:
        connection.executescript(f"{' '.join(stores._steps()[:version])} PRAGMA user_version = {version};")
    with closing(sqlite3.connect(disk.file)) as connection, connection:
        values = (lease.fence, lease.lease_id, lease.token, "comfyui", TTL, disk.clock.utc().isoformat(), disk.boot)
        connection.execute(
            "INSERT INTO lease VALUES (?, ?, ?, ?, NULL, NULL, NULL, '[0]', '[null]', '[9000]', ?, ?, 0, ?, 'life', "
            "'live', NULL, 0)",
            values,
        )
        connection.execute("INSERT INTO total VALUES ('comfyui', 7, 2, NULL)")
    examine(disk.file)
    kept = disk.life().open()
    assert [(each.lease.token, each.priority) for each in kept.leases] == [(lease.token, Priority.NORMAL)]
    assert kept.totals["comfyui"].requests == 7
    assert kept.learned == {}
    assert disk.rows("PRAGMA user_version") == [(stores.VERSION,)]
    disk.opened[0].keep({}, [], [("comfyui", UNLOADED)])
    examine(disk.file)
    assert disk.life().open().learned["comfyui"].unloads == (UNLOADED,)


# -- what was learned ---------------------------------------------------------------------------------------

UNLOADED = Unloaded("2026-11-25T09:00:00.000Z", 9000, 400, 0.31, 1.0)
FAILED = Unloaded("2026-11-25T09:01:00.000Z", 9000, 8000, 30.0, None, "kept")
OBSERVED = Observation("2026-11-25T09:02:00.000Z", {0: 9000, 1: 200}, {0: 8000, 1: 0}, 4.25)


def test_what_was_learned_outlives_the_process(disk: Disk) -> None:
    store = disk.life()
    store.open()
    store.keep({}, [], [("comfyui", UNLOADED), ("chat", FAILED), ("comfyui", OBSERVED)])
    store.keep({}, [], [("comfyui", replace(OBSERVED, reload_seconds=None))])
    store.close()
    learned = disk.life().open().learned
    expected = Account().with_entry(UNLOADED).with_entry(OBSERVED).with_entry(replace(OBSERVED, reload_seconds=None))
    assert learned == {"comfyui": expected, "chat": Account().with_entry(FAILED)}


def test_what_was_learned_is_bounded_and_its_sums_go_on(disk: Disk) -> None:
    store = disk.life()
    store.open()
    for _ in range(3):
        store.keep({}, [], [("comfyui", UNLOADED), ("comfyui", OBSERVED), ("chat", UNLOADED)] * (KEPT // 2))
    assert disk.rows("SELECT consumer, count(*) FROM unload GROUP BY consumer") == [("chat", KEPT), ("comfyui", KEPT)]
    assert disk.rows("SELECT count(*) FROM observation") == [(KEPT,)]
    learned = disk.life().open().learned["comfyui"]
    assert (learned.tally.unloads, learned.tally.observations) == (KEPT * 3 // 2, KEPT * 3 // 2)
    assert learned.tally.claimed_mib == 9000 * KEPT * 3 // 2


# -- bounds -------------------------------------------------------------------------------------------------


def test_events_are_bounded_by_rows_and_bytes(disk: Disk) -> None:
    store = disk.life()
    store.open()
    for number in range(EVENTS_KEPT + 1500):
        store.note(disk.event("refuse", number=number))
        if number % 500 == 0:
            store.keep({}, [])
    store.note(disk.event("refuse", reason="x" * 100_000))
    store.keep({}, [])
    store.keep({}, [])
    ((count,),) = disk.rows("SELECT count(*) FROM event")
    assert count <= EVENTS_KEPT + stores.TRIM_EACH
    ((longest,),) = disk.rows("SELECT max(length(facts)) FROM event")
    assert longest <= LONGEST_FACTS
    assert "left_out" in json.loads(disk.rows("SELECT facts FROM event ORDER BY seq DESC LIMIT 1")[0][0])
    wal = disk.file.with_name(f"{stores.FILE}-wal")
    assert wal.stat().st_size < 3 * stores.LARGEST_WAL_BYTES


def test_leases_that_ended_are_forgotten_after_a_day(disk: Disk) -> None:
    store = disk.life()
    store.open()
    for reason in (EndReason.RELEASED, EndReason.EXPIRED):
        lease = granted(disk, store)
        store.ended(lease, reason, disk.event(), quarantined=False)
    disk.clock.now += 24 * 3600 + 1
    granted(disk, store)
    disk.life().open()
    assert disk.rows("SELECT state FROM lease") == [("live",)]


def test_its_files_are_ours_alone(disk: Disk) -> None:
    store = disk.life()
    store.open()
    granted(disk, store)
    for file in disk.directory.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_each_durable_write_is_on_the_disk_and_a_kept_one_is_not_waited_for(disk: Disk) -> None:
    store = disk.life()
    store.open()
    assert store._connection is not None
    said: list[str] = []
    store._connection.set_trace_callback(said.append)
    granted(disk, store)
    store.keep({"comfyui": Total(1)}, [])
    modes = [line for line in said if "synchronous" in line]
    assert modes == ["PRAGMA synchronous = FULL", "PRAGMA synchronous = NORMAL"]
