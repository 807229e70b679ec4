"""What is on the disk before which reply, as the kernel saw it.

A kill -9 cannot tell a synced commit from one that the kernel still holds: only a loss of power can, or a look at the
system calls. SQLite with ``synchronous=NORMAL`` would pass every other test here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker

ROUNDS = 5
SYNCS = ("fdatasync", "fsync")
CALLS = "trace=fdatasync,fsync,recvfrom,recvmsg,read,sendto,sendmsg,write,writev"
LINE = re.compile(r"^\d+ +(?:<\.\.\. )?(?P<call>\w+)(?:\(| resumed>)(?P<rest>.*)$")

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None and "CI" not in os.environ, reason="no strace here; .ci/run installs it"
)


@contextmanager
def traced(pid: int, file: Path) -> Iterator[None]:
    """Every thread of the process. Complete when it ends."""
    command = ["strace", "-f", "-y", "-s", "64", "-e", CALLS, "-o", str(file), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        said = strace.stderr.readline() if strace.stderr is not None else ""
        if "attached" not in said:
            raise AssertionError(f"strace cannot look at the worker: {said}")
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.wait(10)


def syncs_before_replies(trace: str, request: str) -> list[int]:
    """For each such request: how many syncs of the database began and ended between its arrival and its 200."""
    counts: list[int] = []
    begun, arrived = 0, False
    for call, rest in _parsed(trace):
        if request in rest and call in ("recvfrom", "recvmsg", "read"):
            counts.append(0)
            arrived, begun = True, 0
        elif call in SYNCS and arrived:
            begun += "gpumgr.db" in rest
            counts[-1] += begun > 0 and rest.endswith("= 0")
        elif '"HTTP/1.1 200' in rest and call in ("sendto", "sendmsg", "write", "writev"):
            arrived = False
    return counts


def _parsed(trace: str) -> Iterator[tuple[str, str]]:
    for line in trace.splitlines():
        found = LINE.match(line)
        if found is not None:
            yield found["call"], found["rest"]


def test_grants_and_releases_are_synced_before_they_are_told_and_renews_are_not(tmp_path: Path, stage: Stage) -> None:
    stage.warm("mvoice")
    trace = tmp_path / "trace"
    with RunningBroker(tmp_path, stage.config()) as broker:
        for _ in range(2):  # the first commits begin the database's log, and sync its head as well
            broker.release(broker.acquire(kind="tts").json()["token"])
        with traced(broker.worker_pid(), trace):
            for _ in range(ROUNDS):
                token = broker.acquire(kind="tts").json()["token"]
                assert broker.renew(token).status_code == 200
                assert broker.release(token).json() == {"released": True}
    seen = trace.read_text(encoding="utf-8")
    assert syncs_before_replies(seen, '"POST /v1/lease HTTP') == [1] * ROUNDS
    assert syncs_before_replies(seen, '"DELETE /v1/lease/') == [1] * ROUNDS
    assert syncs_before_replies(seen, "/renew HTTP") == [0] * ROUNDS


ACQUIRED = """\
71 recvfrom(9<socket:[1]>, "POST /v1/lease HTTP/1.1\\r\\n", 8192, 0, NULL, NULL) = 190
72 fdatasync(7</state/gpumgr.db-wal> <unfinished ...>
71 write(2</log>, "grant", 5) = 5
72 <... fdatasync resumed>)         = 0
71 sendto(9<socket:[1]>, "HTTP/1.1 200 OK\\r\\n", 160, 0, NULL, 0) = 160
"""


def test_a_sync_that_comes_too_late_or_is_of_something_else_does_not_count() -> None:
    request = '"POST /v1/lease HTTP'
    lines = ACQUIRED.splitlines()
    assert syncs_before_replies(ACQUIRED, request) == [1]
    assert syncs_before_replies("\n".join([lines[0], lines[1], lines[2], lines[4], lines[3]]), request) == [0]
    assert syncs_before_replies("\n".join([lines[1], lines[0], *lines[2:]]), request) == [0]
    assert syncs_before_replies(ACQUIRED.replace("gpumgr.db-wal", "broker.log"), request) == [0]
