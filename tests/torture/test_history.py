"""What is written down is read back: a run that lost half of its rows would break no rule."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.torture.history import MILLISECOND, Call, Ledger, Recorder, Row, Run, boot_ns, boot_of_wall

EVENT = (
    "INSERT INTO event (at, life, type, consumer, facts) VALUES ('2026-11-25T12:00:00.000Z', 'one', 'grant', NULL, ?)"
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "gpumgr.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE event (seq INTEGER PRIMARY KEY, at, life, type, consumer, facts)")
        connection.execute("CREATE TABLE lease (lease_id PRIMARY KEY, fence, state)")
        yield connection


def test_rows_that_the_broker_forgets_are_kept(database: sqlite3.Connection, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "gpumgr.db")
    database.execute(EVENT, (json.dumps({"lease_id": "a", "fence": 1}),))
    database.execute("INSERT INTO lease VALUES ('a', 1, 'live')")
    ledger.read()
    database.execute(EVENT, (json.dumps({"lease_id": "b", "fence": 2}),))
    database.execute("DELETE FROM event WHERE seq = 1")
    database.execute("UPDATE lease SET state = 'released'")
    ledger.read()
    run = Run()
    ledger.into(run)
    assert [(event.seq, event.lease_id, event.fence) for event in run.grants()] == [(1, "a", 1), (2, "b", 2)]
    assert run.leases == [Row("a", 1, "released")]


def test_a_broker_that_keeps_nothing_has_no_rows(tmp_path: Path) -> None:
    ledger, run = Ledger(tmp_path / "gpumgr.db"), Run()
    ledger.read()
    ledger.into(run)
    assert (run.events, run.leases) == ([], [])


def test_each_record_is_a_line_at_once(tmp_path: Path) -> None:
    call = Call("renew", client=3, inv_ns=1, sent_ns=2, ok_ns=3, code=200)
    with closing(Recorder(tmp_path / "history.jsonl")) as recorder:
        recorder.add(call)
        written = json.loads((tmp_path / "history.jsonl").read_text(encoding="utf-8"))
    assert recorder.run.calls == [call]
    assert (written["record"], written["op"], written["client"]) == ("Call", "renew", 3)


def test_the_wall_clock_is_told_on_the_clock_of_the_history() -> None:
    before = boot_ns()
    shown = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
    assert before - 2 * MILLISECOND <= boot_of_wall(shown) <= boot_ns() + 2 * MILLISECOND
