"""A lease for a program of the holder's own, over HTTP and through ``gpumgr run``: the real broker, real pids, the
stand-in driver."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumgr.client import Gpu
from gpumgr.errors import InvalidRequest
from tests.brokers import ROOT, RunningBroker
from tests.driver_card import DriverCard
from tests.services import Sleeper
from tests.stand_in import build_or_skip
from tests.waiting import until

CONFIG = {
    "routing": {"batch": "batch"},
    "consumers": {
        "batch": {"dialect": "none", "vram_resident_mib": 10000},
        "voice": {"dialect": "http", "url": "http://127.0.0.1:9", "vram_resident_mib": 3000},
    },
}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> DriverCard:
    library = build_or_skip(tmp_path_factory.getbasetemp() / "stand-in")
    return DriverCard(library, tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def batch(card: DriverCard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with RunningBroker(tmp_path_factory.mktemp("batch"), CONFIG, card.env()) as running:
        yield running


def held(broker: RunningBroker) -> tuple[int, str | None]:
    (found,) = [c for c in broker.status()["consumers"] if c["name"] == "batch"]
    return found["held_mib"], found["in_use"]


def test_a_program_of_the_holders_own(batch: RunningBroker, card: DriverCard) -> None:
    with Sleeper("train.py") as program, Gpu(batch.url) as gpu:
        card.admit(program.pid, "python3")
        lease = gpu.acquire(consumer="batch", holder_pid=program.pid)
        assert lease.grant["url"] is None
        with pytest.raises(ValueError, match="batch has no url"):
            _ = lease.url
        card.set_used(program.pid, 6000)
        until(lambda: held(batch) == (6000, "lease"))
        batch.stop(signal.SIGKILL)
        batch.start()
        until(lambda: held(batch) == (6000, "lease"))  # its process is kept with the lease
        assert lease.release()
        until(lambda: held(batch) == (6000, "tail"))
        refused = batch.acquire(consumer="voice", wait_seconds=0).json()["error"]
        card.end_process(program.pid)
    assert refused["code"] in ("consumer_unhealthy", "scheduler_timeout")
    until(lambda: held(batch) == (0, None))


@pytest.mark.parametrize("pid", [0, -1, True, 1.5, "7", None, 2**40])
def test_a_holder_pid_is_a_whole_number_above_0(batch: RunningBroker, pid: object) -> None:
    error = batch.acquire(consumer="batch", holder_pid=pid).json()["error"]
    assert (error["code"], error["details"]["field"]) == ("invalid_request", "holder_pid")


def test_a_pid_of_nobody_says_what_to_do(batch: RunningBroker) -> None:
    with Gpu(batch.url) as gpu, pytest.raises(InvalidRequest, match="leave holder_pid out"):
        gpu.acquire("batch", holder_pid=1)


def test_there_is_nobody_to_pass_a_call_on_to(batch: RunningBroker) -> None:
    answer = batch.http.post(f"{batch.url}/v1/batch/v1/jobs", json={})
    assert answer.status_code == 404
    assert "batch, which has no url" in answer.json()["error"]["message"]
    assert batch.status()["leases"] == []


def gpumgr_run(batch: RunningBroker, *program: str, consumer: str = "batch") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpumgr.cli", "run", "--url", batch.url, "--consumer", consumer, "--wait", "5"]
    return subprocess.Popen(
        [*command, "--", *program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def test_run_holds_the_lease_while_the_program_runs(batch: RunningBroker) -> None:
    script = "import os, sys; print(os.getpid(), flush=True); sys.exit(len(sys.stdin.read()))"
    with gpumgr_run(batch, sys.executable, "-c", script) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        (lease,) = batch.status()["leases"]
        assert (lease["consumer"], lease["holder_pid"]) == ("batch", pid)
        assert lease["holder"] == Path(sys.executable).name
        running.communicate("1234567", timeout=20)
    assert running.returncode == 7
    assert batch.status()["leases"] == []


def test_run_passes_signals_on_and_ends_with_the_program(batch: RunningBroker) -> None:
    with gpumgr_run(batch, "sh", "-c", "echo begun; exec sleep 60") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "begun\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 128 + signal.SIGTERM
    assert batch.status()["leases"] == []


def test_run_without_a_lease_begins_nothing(batch: RunningBroker, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with gpumgr_run(batch, "touch", str(begun), consumer="nobody") as running:
        _, said = running.communicate(timeout=20)
    assert running.returncode == 1
    assert "touch was not started: no consumer 'nobody'" in said
    assert not begun.exists()


def test_run_of_a_program_that_is_not_there(batch: RunningBroker) -> None:
    with gpumgr_run(batch, "/nowhere/train") as running:
        _, said = running.communicate(timeout=20)
    assert running.returncode == 127
    assert "/nowhere/train cannot be run" in said
    assert batch.status()["leases"] == []
