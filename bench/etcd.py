"""A durable lease of ours against one of etcd: what a grant that survives the power costs over HTTP.

How: 300 times in turn, on one kept-alive connection each: our acquire and release, and etcd's lease grant, lock, unlock
and lease revoke through its JSON gateway, which is what a mutex with a time limit takes there. Both keep their files on
the same file system and sync them before they answer (etcd's --unsafe-no-fsync is off, as it is by default). Nobody
waits, nothing is unloaded.

Bar: ours at most 2/3 of etcd's time at p50. Not part of `make bench`, as it needs etcd: apt install etcd-server.

Beside them in the same rounds what no code of ours can go below in this shape: ``empty`` is two requests that ask for
nothing (/healthz), ``commits`` two transactions of one row in a database of SQLite that is kept as ours is.
"""

from __future__ import annotations

import base64
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

from bench.figure import Bar, Figure, keep, quantile, spread, table
from bench.rig import Caller, rig
from tests.brokers import free_port
from tests.waiting import until

AT_MOST = 0.667
WARM_UP = 20
TTL_SECONDS = 60
LEASE_BYTES = 400
NAME = base64.b64encode(b"mvoice").decode()
START_SECONDS = 20


def run(rounds: int = 300) -> Figure:
    with tempfile.TemporaryDirectory(prefix="gpumgr-bench-etcd-") as directory, rig() as stage:
        stage.load_speech()
        with _etcd(Path(directory)) as port, Caller(port) as theirs, Caller(stage.broker().port) as ours:
            commit = _commits(Path(directory))
            rows = [(_ours(ours), _theirs(theirs), _empty(ours), commit()) for _ in range(rounds + WARM_UP)][WARM_UP:]
    own, etcds, empty, commits = ([row[column] for row in rows] for column in range(4))
    ratio = quantile(own, 0.5) / quantile(etcds, 0.5)
    return Figure(
        name="etcd",
        unit="ms",
        measured=spread("ours", own) | spread("etcd", etcds) | spread("empty", empty) | spread("commits", commits),
        bars=[Bar("durable acquire and release / etcd's, p50", round(ratio, 3), AT_MOST, "times")],
    )


def _ours(caller: Caller) -> float:
    start = time.perf_counter()
    caller.release(caller.acquire("mvoice"))
    return time.perf_counter() - start


def _theirs(caller: Caller) -> float:
    start = time.perf_counter()
    lease = caller.call("POST", "/v3/lease/grant", {"TTL": TTL_SECONDS}).require()["ID"]
    key = caller.call("POST", "/v3/lock/lock", {"name": NAME, "lease": lease}).require()["key"]
    caller.call("POST", "/v3/lock/unlock", {"key": key}).require()
    caller.call("POST", "/v3/lease/revoke", {"ID": lease}).require()
    return time.perf_counter() - start


def _empty(caller: Caller) -> float:
    start = time.perf_counter()
    for _ in range(2):
        caller.call("GET", "/healthz").require()
    return time.perf_counter() - start


def _commits(directory: Path) -> Callable[[], float]:
    database = sqlite3.connect(directory / "commits.sqlite3", isolation_level=None)
    for statement in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "CREATE TABLE lease (told TEXT)"):
        database.execute(statement)

    def commit() -> float:
        start = time.perf_counter()
        for _ in range(2):
            database.execute("INSERT INTO lease VALUES (?)", ("x" * LEASE_BYTES,))
        return time.perf_counter() - start

    return commit


@contextmanager
def _etcd(directory: Path) -> Iterator[int]:
    """Its port. Beside the broker's state in the directory for temporary files."""
    port, peers = free_port(), free_port()
    here, between = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peers}"
    command = ["etcd", "--data-dir", str(directory / "data"), "--log-level", "error"]
    command += ["--listen-client-urls", here, "--advertise-client-urls", here]
    command += ["--listen-peer-urls", between, "--initial-advertise-peer-urls", between]
    command += ["--initial-cluster", f"default={between}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as etcd:
        try:
            until(lambda: _healthy(here), START_SECONDS, every_seconds=0.05)
            yield port
        finally:
            etcd.terminate()
            etcd.wait(START_SECONDS)


def _healthy(url: str) -> bool:
    try:
        return bool(requests.get(f"{url}/health", timeout=2).json()["health"] == "true")
    except (requests.RequestException, ValueError, KeyError):
        return False


if __name__ == "__main__":
    figure = run()
    keep(figure)
    print(table([figure]))
    sys.exit(0)
