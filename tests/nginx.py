"""A real nginx before a broker, as docs/operations.md says it is set up."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.brokers import free_port
from tests.waiting import until

NOBODY = "nobody"
CONFIG = """\
daemon off;
worker_processes 1;
error_log stderr warn;
pid {directory}/nginx.pid;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 0;
        client_header_timeout {client_timeout_seconds}s;
        client_body_timeout {client_timeout_seconds}s;
        proxy_http_version 1.1;
        proxy_set_header Host $http_host;
        proxy_set_header Connection "";
        proxy_buffering off;
        proxy_read_timeout 750s;
        location / {{
            proxy_pass http://127.0.0.1:{upstream_port};
            proxy_request_buffering off;
        }}
        location /v1/lease {{
            proxy_pass http://127.0.0.1:{upstream_port};
            client_max_body_size 1m;
        }}
    }}
}}
"""


class Nginx:
    """In the foreground, on a port of its own, and never as root."""

    def __init__(self, upstream_port: int, client_timeout_seconds: int = 10) -> None:
        self.port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="gpumgr-nginx-"))  # pytest's own is closed to other users
        config = self._directory / "nginx.conf"
        config.write_text(
            CONFIG.format(
                directory=self._directory,
                port=self.port,
                upstream_port=upstream_port,
                client_timeout_seconds=client_timeout_seconds,
            ),
            encoding="utf-8",
        )
        command = [_nginx(), "-e", "stderr", "-p", str(self._directory), "-c", str(config)]
        self._log = self._directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self._user())
        until(self._serving, 10)

    def _user(self) -> str | None:
        if os.geteuid() != 0:
            return None  # it stays who it is
        shutil.chown(self._directory, NOBODY)
        return NOBODY

    def _serving(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"nginx did not start:\n{self._log.read_text(encoding='utf-8', errors='replace')}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2):
            return True
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._directory)


def _nginx() -> str:
    """Skips the test where there is none, unless it must be there."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("nginx is not installed, and CI must not skip what stands behind it")
    if found is None:
        pytest.skip("nginx is not installed")
    return found
