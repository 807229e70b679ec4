"""Defects of the running broker that were found once and must not come back: tokens and labels in its log, bodies that
do not end, signals, and a log that nobody reads."""

from __future__ import annotations

import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import requests

from gpumgr.sim.stage import Stage
from tests.brokers import ROOT, RunningBroker
from tests.waiting import until


def config(stage: Stage) -> dict[str, Any]:
    """Two places for waiters, two threads for everything else."""
    written = stage.config()
    written["server"] |= {"threads": 4, "reserved_threads": 2}
    written["lease"] = {"min_ttl_seconds": 0.5}
    return written


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """With an access log; every test gives back what it leased."""
    directory = tmp_path_factory.mktemp("shared")
    with Stage(directory, speed=20) as stage:
        broker = RunningBroker(directory, config(stage))
        with broker.http:
            broker.start("--access-logfile", "-")
            try:
                yield broker
            finally:
                broker.stop()


@pytest.fixture
def token(shared: RunningBroker) -> Iterator[str]:
    token = shared.acquire(kind="llm").json()["token"]
    yield token
    shared.release(token)


def connected(broker: RunningBroker) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", broker.port), timeout=8)
    sock.settimeout(8)
    return sock


def answer_of(sock: socket.socket) -> tuple[int, bytes]:
    with http.client.HTTPResponse(sock) as response:
        response.begin()
        return response.status, response.read()


def head(path: str, *headers: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers)
    return "\r\n".join([*lines, "", ""]).encode()


# -- the log ------------------------------------------------------------------------------------------------


def test_no_spelling_of_a_path_brings_a_token_into_the_log(shared: RunningBroker, token: str) -> None:
    # Only /v1/lease/TOKEN, written exactly so, was looked for.
    paths = (f"/v1/%6cease/{token}/renew", f"/v1//lease/{token}/renew", f"/v1/lease//{token}")
    answers = []
    for path in paths:
        connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=8)
        connection.request("POST", path, headers={"User-Agent": "odd-path"})
        with connection.getresponse() as response:
            answers.append((response.status, response.read()))
        connection.close()
    until(lambda: shared.log().count("odd-path") == len(paths))
    assert token not in shared.log()
    assert [status for status, _ in answers] == [200, 404, 404]
    assert not any(token.encode() in body for status, body in answers if status == 404)


def test_a_label_begins_no_line_of_the_log(shared: RunningBroker) -> None:
    # A holder could write grants that never were.
    forged = "[2026-11-23 09:00:00,000] [prepare-0] [INFO] grant consumer=comfyui"
    holders = [f"x{newline}{forged}" for newline in ("\n", "\r", "\u2028", "\x85")]
    for holder in holders:
        lease = shared.acquire(kind="llm", holder=holder).json()
        refused = shared.acquire(kind="image", holder=holder, wait_seconds=0)
        assert refused.json()["error"]["code"] == "scheduler_timeout"
        shared.release(lease["token"])
    # In a grant and a release, and in a refusal twice: who asked, and who holds.
    until(lambda: shared.log().count(forged) >= 4 * len(holders))
    assert not [line for line in shared.log().splitlines() if line.startswith(forged)]


# -- bodies that do not end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/lease", "/v1/lease/nobody/renew"])
@pytest.mark.parametrize(
    "chunks", [b"ZZ\r\n{}\r\n0\r\n\r\n", b"2\r\n{", b"2\r\n{}XX0\r\n\r\n"], ids=["size", "end", "rim"]
)
def test_a_broken_chunked_body_is_an_invalid_request(shared: RunningBroker, path: str, chunks: bytes) -> None:
    # It was a defect of the server: 500 internal_error and a traceback in the log.
    with connected(shared) as sock:
        sock.sendall(head(path, "Transfer-Encoding: chunked", "Connection: close") + chunks)
        sock.shutdown(socket.SHUT_WR)
        status, body = answer_of(sock)
    assert (status, b'"invalid_request"' in body) == (400, True), body
    assert "Traceback" not in shared.log()


def test_half_sent_renews_do_not_hold_the_threads_for_ever(shared: RunningBroker, token: str) -> None:
    # Each waited for the rest of its body without a limit: as many as there are threads, and nobody was answered.
    with ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(connected(shared))
            sock.sendall(head("/v1/lease/nobody/renew", "Content-Length: 20") + b"{")
        assert requests.post(f"{shared.url}/v1/lease/{token}/renew", timeout=8).status_code == 200


# On a kept-alive connection its next byte would give it a thread that drops the rest of the refused body without a
# limit. Four of them, and nobody would be answered until they go.
def test_the_rest_of_a_refused_body_does_not_hold_the_threads_for_ever(shared: RunningBroker, token: str) -> None:
    with ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(connected(shared))
            sock.sendall(head("/v1/lease", "Content-Length: 10000000"))
            assert answer_of(sock)[0] == 413
            with suppress(ConnectionError):  # it may be closed already
                sock.sendall(b"x")
        assert requests.post(f"{shared.url}/v1/lease/{token}/renew", timeout=8).status_code == 200


# -- signals ------------------------------------------------------------------------------------------------


def test_sigttin_starts_no_second_worker(shared: RunningBroker, token: str) -> None:
    # The second one did not get the lock, and its end was the end of the broker and of every lease.
    if shared.process is None:
        raise AssertionError
    master, worker = psutil.Process(shared.process.pid), shared.worker_pid()
    master.send_signal(signal.SIGTTIN)
    master.send_signal(signal.SIGWINCH)  # has the higher number, so the master comes to it later; it only logs it
    until(lambda: "Handling signal: winch" in shared.log())
    assert [child.pid for child in master.children()] == [worker]
    assert shared.renew(token).status_code == 200


# -- a log that nobody reads --------------------------------------------------------------------------------


class UnreadBroker(RunningBroker):
    """Its log goes into a small pipe that nobody drains before ``drain``."""

    def start(self, *arguments: str, wait: bool = True) -> Self:
        self._drained: list[bytes] = []
        self._draining: threading.Thread | None = None
        self._end, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", *arguments, "wsgi:app"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=self._env, stdout=write, stderr=write)
        os.close(write)
        if wait:
            until(self.serving, 20)
        return self

    def drain(self) -> None:
        if self._draining is None:
            self._draining = threading.Thread(target=self._drain, daemon=True)
            self._draining.start()

    def _drain(self) -> None:
        while read := os.read(self._end, 65536):
            self._drained.append(read)

    def log(self) -> str:
        return b"".join(self._drained).decode(errors="replace")

    def stop(self, sig: signal.Signals = signal.SIGTERM, seconds: float = 15) -> int:
        self.drain()  # the master itself writes before it stops
        code = super().stop(sig, seconds)
        if self._draining is not None:
            self._draining.join(5)
        os.close(self._end)
        return code


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path, stage: Stage) -> None:
    # A stalled journald, or `| less`: after some 300 refusals the pipe was full. Whoever had a line to write waited for
    # it, some of them with the lock held: no renew, no status, no end of a lease.
    with UnreadBroker(tmp_path, config(stage)) as broker:

        def refused(kind: str) -> bool:
            ask = {"kind": kind, "wait_seconds": 0, "holder": "h" * 100}
            answer = broker.http.post(f"{broker.url}/v1/lease", json=ask, timeout=4)
            return bool(answer.json()["error"]["code"] == "scheduler_timeout")

        lease = broker.acquire(kind="llm").json()
        assert all(refused("image") for _ in range(1100))
        assert [shown["lease_id"] for shown in broker.status()["leases"]] == [lease["lease_id"]]
        assert broker.renew(lease["token"], ttl_seconds=0.5).status_code == 200
        assert broker.acquire(kind="image", wait_seconds=8).status_code == 200  # when that lease has expired
        broker.drain()
        until(lambda: refused("llm") and "lines before this one were dropped" in broker.log())
