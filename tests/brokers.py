"""The real broker: gunicorn as an operator starts it, on a port and a state directory of its own."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
import yaml

from tests.waiting import until

ROOT = Path(__file__).parents[1]


_ports = itertools.count(os.getpid() * 37 % 11_000)


def free_port() -> int:
    """Hardly anybody else is given it: each test process counts from a number of its own, below the ports that the
    kernel gives away for any connection."""
    for number in _ports:
        port = 20_000 + number % 12_000
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is always a next port")


class RunningBroker:
    """``config`` is written as consumers.yaml; server.bind and state_dir come through the environment."""

    def __init__(self, directory: Path, config: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.state_dir = directory / "state"
        self.config_file = directory / "consumers.yaml"
        self.config_file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        self.log_file = directory / "broker.log"
        self._env = {
            **os.environ,
            "GPUMGR_CONFIG": str(self.config_file),
            "GPUMGR_BIND": f"127.0.0.1:{self.port}",
            "GPUMGR_STATE_DIR": str(self.state_dir),
            **(env or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.http = requests.Session()

    def start(self, *arguments: str, wait: bool = True) -> Self:
        command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", *arguments, "wsgi:app"]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self._env, stdout=log, stderr=log)
        if wait:
            until(self.serving, 20)
        return self

    def serving(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise AssertionError(f"the broker did not start:\n{self.log()}")
        try:
            return self.http.get(f"{self.url}/healthz", timeout=2).ok
        except requests.ConnectionError:
            return False

    def serving_again(self) -> bool:
        """As ``serving``, where nobody may be there for a moment."""
        try:
            return requests.get(f"{self.url}/readyz", timeout=2).ok
        except (requests.ConnectionError, requests.Timeout):
            return False

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def worker_pid(self) -> int:
        """The newest worker."""
        return [int(line.split()[-1]) for line in self.log().splitlines() if "Booting worker" in line][-1]

    def stop(self, sig: signal.Signals = signal.SIGTERM, seconds: float = 15) -> int:
        if self.process is None:
            raise AssertionError("not started")
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(seconds)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.http.close()
        if self.process is not None:
            self.stop()

    # -- calls ----------------------------------------------------------------------------------------------

    def acquire(self, **body: Any) -> requests.Response:
        return self.http.post(f"{self.url}/v1/lease", json=body, timeout=60)

    def renew(self, token: str, **body: Any) -> requests.Response:
        return self.http.post(f"{self.url}/v1/lease/{token}/renew", json=body or None, timeout=10)

    def release(self, token: str) -> requests.Response:
        return self.http.delete(f"{self.url}/v1/lease/{token}", timeout=10)

    def status(self) -> dict[str, Any]:
        answer = self.http.get(f"{self.url}/v1/status", timeout=10)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found
