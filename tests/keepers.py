"""What keeps a service running, played with the real protocols: ``systemctl`` and a program of the operator's as real
executables, and a container engine on a real unix socket.

Owns: stopping and starting one simulated service, and the ways to misbehave at it. Must not: know who asks.
"""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gpumgr.sim.service import SimulatedService

HANDS_OVER = """#!{python} -ISE
import socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({socket!r})
link.sendall("\\0".join(sys.argv).encode() + b"\\n")
told = b""
while piece := link.recv(65536):
    told += piece
code, _, said = told.partition(b"\\n")
sys.stdout.buffer.write(said)
sys.exit(int(code or b"70"))
"""


@dataclass
class Keeper:
    """``keeps``: says that it stopped the service, and does not. ``refuses``: says no, in these words."""

    service: SimulatedService
    slow_seconds: float = 0.0
    keeps: bool = False
    hangs: bool = False
    dies: bool = False
    refuses: str = ""
    stops: int = 0
    starts: int = 0
    stopped_while_busy: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> str:
        """Empty: done; else why not."""
        self.stops += 1
        if self.hangs:
            self.over.wait(30)
            return "nobody waits any more"
        if self.refuses:
            return self.refuses
        if self.service.busy:
            self.stopped_while_busy += 1
        if self.dies:
            self.service.die()
            return "it was ended in the middle of this"
        time.sleep(self.slow_seconds)
        if not self.keeps:
            self.service.stop()
        return ""

    def start(self) -> str:
        self.starts += 1
        self.service.start()
        return ""

    @property
    def runs(self) -> bool:
        return self.service.running


class _Link(socketserver.StreamRequestHandler):
    """One call of an executable."""

    server: Executable

    def handle(self) -> None:
        words = self.rfile.readline().decode().rstrip("\n").split("\0")
        code, said = self.server.answer([Path(words[0]).name, *words[1:]])
        self.wfile.write(f"{code}\n{said}".encode())


class Executable(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """``systemctl``, or ``ctl``: what it is asked is answered here, by the keeper."""

    daemon_threads = True

    def __init__(self, directory: Path, name: str, keeper: Keeper) -> None:
        self.keeper = keeper
        self.program = directory / name
        self.asked: list[list[str]] = []
        self.program.write_text(
            HANDS_OVER.format(python=sys.executable, socket=str(directory / "link")), encoding="utf-8"
        )
        self.program.chmod(0o755)
        super().__init__(str(directory / "link"), _Link)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that was killed breaks its connection."""

    def answer(self, words: list[str]) -> tuple[int, str]:
        self.asked.append(words)
        verbs = {"stop": self.keeper.stop, "start": self.keeper.start}
        for verb, does in verbs.items():
            if verb in words:
                why = does()
                return (1, f"Job failed: {why}\n") if why else (0, "")
        if "show" in words:
            state, sub = ("active", "running") if self.keeper.runs else ("inactive", "dead")
            return 0, f"LoadState=loaded\nActiveState={state}\nSubState={sub}\nResult=success\n"
        if "busy" in words:
            return (0 if self.keeper.service.busy else 1), ""
        return (0 if self.keeper.runs else 3), "not there\n"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.keeper.over.set()
        self.shutdown()
        self.server_close()


class _EngineCall(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def _serve(self) -> None:
        _, _, name, what = self.path.split("/")
        self.server.asked.append((self.command, self.path))
        keeper = self.server.keeper
        if name != self.server.container:
            self._say(404, {"message": f"No such container: {name}"})
        elif what == "json":
            status = "running" if keeper.runs else "exited"
            self._say(200, {"Name": f"/{name}", "State": {"Status": status, "ExitCode": 0, "OOMKilled": False}})
        elif what == "start":
            self._say(304 if keeper.runs else 204, None if keeper.start() == "" else {})
        else:
            was = keeper.runs
            why = keeper.stop()
            self._say(500 if why else (204 if was else 304), {"message": why} if why else None)

    do_GET = do_POST = _serve  # noqa: N815 http.server's names

    def _say(self, status: int, content: object) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 http.server's name
        """Silent."""


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A container engine with one container."""

    daemon_threads = True

    def __init__(self, directory: Path, container: str, keeper: Keeper) -> None:
        self.keeper = keeper
        self.container = container
        self.path = str(directory / "engine.sock")
        self.asked: list[tuple[str, str]] = []
        super().__init__(self.path, _EngineCall)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = super().get_request()
        return connection, ("unix", 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller whose time is over breaks its connection."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.keeper.over.set()
        self.shutdown()
        self.server_close()
