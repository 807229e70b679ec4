"""Start, stop and the hazards of gunicorn: each was measured once, and must not come back with another version."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from gpumgr.sim.stage import Stage
from tests.brokers import ROOT, RunningBroker
from tests.waiting import until


def config(stage: Stage, tmp_path: Path, **server: Any) -> dict[str, Any]:
    written = stage.config(state_dir=tmp_path / "state", bind="127.0.0.1:8770")
    written["server"] |= server
    written["lease"] = {"min_ttl_seconds": 1}
    return written


@pytest.fixture
def small(tmp_path: Path, stage: Stage) -> Iterator[RunningBroker]:
    """Two places for waiters, two threads for everything else."""
    with RunningBroker(tmp_path, config(stage, tmp_path, threads=4, reserved_threads=2)) as running:
        yield running


def waiters(broker: RunningBroker, kind: str, count: int) -> tuple[list[threading.Thread], list[requests.Response]]:
    answers: list[requests.Response] = []

    def wait() -> None:
        answers.append(requests.post(f"{broker.url}/v1/lease", json={"kind": kind}, timeout=60))

    threads = [threading.Thread(target=wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    until(lambda: len(broker.status()["queue"]) == count)
    return threads, answers


def test_sigterm_answers_every_waiter_and_exits(broker: RunningBroker) -> None:
    broker.acquire(kind="image")
    threads, answers = waiters(broker, "llm", 20)
    if broker.process is None:
        raise AssertionError
    broker.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(5)
    assert {a.json()["error"]["code"] for a in answers} == {"shutting_down"}
    assert len(answers) == 20
    assert broker.process.wait(5) == 0


def test_a_second_broker_prints_one_sentence_and_exits_2(broker: RunningBroker) -> None:
    command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "wsgi:app"]
    env = os.environ | {
        "GPUMGR_CONFIG": str(broker.config_file),
        "GPUMGR_BIND": "127.0.0.1:0",
        "GPUMGR_STATE_DIR": str(broker.state_dir),
    }
    second = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=20, check=False)
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()) == 1
    assert "broker.lock" in second.stderr
    assert broker.status()["version"]


def test_a_port_in_use_prints_one_sentence_and_exits_2(tmp_path: Path, stage: Stage) -> None:
    broker = RunningBroker(tmp_path, config(stage, tmp_path))
    broker.http.close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", broker.port))
        taken.listen()
        broker.start(wait=False)
        if broker.process is None:
            raise AssertionError
        assert broker.process.wait(20) == 2
    assert "GPUMGR_BIND" in broker.log()
    assert len(broker.log().strip().splitlines()) == 1


def test_state_dir_is_private(broker: RunningBroker) -> None:
    assert stat.S_IMODE(broker.state_dir.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in broker.state_dir.iterdir()}
    store = {f"gpumgr.db{more}": 0o600 for more in ("", "-wal", "-shm")}
    assert modes == {"broker.lock": 0o600, "worker.lock": 0o600, **store}


def test_a_wrong_configuration_prints_one_sentence_and_exits_2(tmp_path: Path, stage: Stage) -> None:
    wrong = config(stage, tmp_path)
    wrong["consumers"]["comfyui"]["base_url"] = "http://127.0.0.1:8188"
    broker = RunningBroker(tmp_path, wrong).start(wait=False)
    if broker.process is None:
        raise AssertionError
    assert broker.process.wait(20) == 2
    broker.http.close()
    lines = broker.log().strip().splitlines()
    assert lines == [
        f"gpumgr: {broker.config_file}: consumers.comfyui.base_url is not a known key: it is now written url"
    ]


def test_two_workers_are_refused(tmp_path: Path, stage: Stage) -> None:
    broker = RunningBroker(tmp_path, config(stage, tmp_path)).start("--workers", "2", wait=False)
    if broker.process is None:
        raise AssertionError
    assert broker.process.wait(20) == 2
    broker.http.close()
    assert "exactly one worker" in broker.log()


def test_sighup_hands_over_to_a_new_worker(broker: RunningBroker) -> None:
    broker.acquire(kind="image")
    threads, answers = waiters(broker, "llm", 3)
    old = broker.worker_pid()
    if broker.process is None:
        raise AssertionError
    broker.process.send_signal(signal.SIGHUP)
    for thread in threads:
        thread.join(10)
    assert {a.json()["error"]["code"] for a in answers} == {"shutting_down"}
    until(lambda: not psutil.pid_exists(old) and broker.serving_again(), 10)
    assert not Path(f"/proc/{old}/fd").exists() or not os.listdir(f"/proc/{old}/fd")
    with requests.Session() as fresh:
        assert fresh.get(f"{broker.url}/readyz", timeout=5).json() == {"ready": True, "missing": []}


def test_sighup_with_a_broken_file_keeps_the_old_settings(broker: RunningBroker) -> None:
    broker.config_file.write_text("server: [", encoding="utf-8")
    old = broker.worker_pid()
    if broker.process is None:
        raise AssertionError
    broker.process.send_signal(signal.SIGHUP)
    until(lambda: "the old settings stay in force" in broker.log(), 10)
    until(lambda: not psutil.pid_exists(old) and broker.serving_again(), 10)
    with requests.Session() as fresh:
        assert fresh.post(f"{broker.url}/v1/lease", json={"kind": "llm"}, timeout=20).status_code == 200


@pytest.mark.parametrize("victim", ["worker", "master"])
def test_kill_9_is_followed_by_service(broker: RunningBroker, victim: str) -> None:
    broker.acquire(kind="image")
    sock = socket.create_connection(("127.0.0.1", broker.port))
    with sock:
        body = b'{"kind":"llm"}'
        sock.sendall(
            b"POST /v1/lease HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        until(lambda: len(broker.status()["queue"]) == 1)
        broker.http.close()
        if victim == "worker":
            os.kill(broker.worker_pid(), signal.SIGKILL)
        elif broker.process is not None:
            broker.process.kill()
            broker.process.wait(5)
            broker.start(wait=False)
        until(lambda: reachable(broker), 10)


def reachable(broker: RunningBroker) -> bool:
    try:
        return requests.get(f"{broker.url}/readyz", timeout=2).ok
    except requests.ConnectionError:
        return False


def test_full_places_refuse_at_once_and_renew_stays_quick(small: RunningBroker) -> None:
    lease = small.acquire(kind="image").json()
    threads, _ = waiters(small, "llm", 2)
    full = small.acquire(kind="llm")
    assert full.status_code == 503
    assert full.json()["error"]["code"] == "queue_full"
    assert int(full.headers["Retry-After"]) >= 1
    assert small.renew(lease["token"]).json()["waiting"] == 2
    small.release(lease["token"])
    until(lambda: small.status()["leases"])
    small.release(small.status()["leases"][0]["token"])
    for thread in threads:
        thread.join(10)


def test_silent_and_lingering_connections_do_not_delay_a_renew(small: RunningBroker) -> None:
    """gunicorn 25.3 and later give a silent connection a thread for 5 s; 26.0 and later wait on the main loop for
    clients that keep their end open after Connection: close."""
    lease = small.acquire(kind="image").json()
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(socket.create_connection(("127.0.0.1", small.port)))
        for _ in range(4):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", small.port)))
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            sock.settimeout(5)
            assert sock.recv(16).startswith(b"HTTP/1.1 200")
        answer = requests.post(f"{small.url}/v1/lease/{lease['token']}/renew", timeout=4)  # slower than that: fails
        assert answer.status_code == 200


def test_no_token_is_ever_logged(tmp_path: Path, stage: Stage) -> None:
    broker = RunningBroker(tmp_path, config(stage, tmp_path))
    with broker.http:
        broker.start("--access-logfile", "-", "--log-level", "debug")
        try:
            token = broker.acquire(kind="llm").json()["token"]
            broker.renew(token)
            broker.http.post(f"{broker.url}/v1/lease/{token}/renew", data="{", timeout=5)
            broker.http.get(f"{broker.url}/v1/lease/{token}?again={token}", timeout=5)
            broker.http.put(f"{broker.url}/v1/lease/{token}", timeout=5)
            broker.release(token)
            until(lambda: "release consumer=ollama" in broker.log())
        finally:
            broker.stop()
    assert "/v1/lease/[token]" in broker.log()
    assert token not in broker.log()


def test_an_expired_lease_frees_the_gpu_for_the_waiter(tmp_path: Path, stage: Stage) -> None:
    with RunningBroker(tmp_path, config(stage, tmp_path)) as broker:
        lease = broker.acquire(kind="image", ttl_seconds=1).json()
        granted = broker.acquire(kind="llm", wait_seconds=10)
        assert granted.status_code == 200
        assert granted.json()["granted_at"] >= lease["expires_at"]
        assert broker.renew(lease["token"]).status_code == 404
        assert [e["type"] for e in broker.status()["events"]].count("expire") == 1
