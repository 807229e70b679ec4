"""What the benchmarks measure with: the simulation in a process of its own, the real broker, callers that cost little.

Owns: starting and ending these, and the line of callers. Must not: know a figure.

A caller is a bare socket, because a client library's own milliseconds would hide the broker's; one that waits is
a socket nobody reads, so a thousand of them cost the measuring process nothing.
"""

from __future__ import annotations

import json
import resource
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
import yaml

from gpumgr.sim.stage import MODEL
from tests.brokers import ROOT, RunningBroker
from tests.waiting import until

ANSWER_SECONDS = 60.0
LONG_WAIT_SECONDS = 600
WARM: dict[str, tuple[str, dict[str, Any]]] = {
    "mvoice": ("/v1/audio/speech", {"input": "warm"}),
    "ollama": ("/api/generate", {"model": MODEL}),
}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: dict[str, Any]

    def require(self) -> dict[str, Any]:
        """Raises: RuntimeError where the status says no."""
        if self.status != 200:
            raise RuntimeError(f"the broker answers {self.status}: {self.body}")
        return self.body


class Caller:
    """One kept-alive connection to the broker. ``send`` does not wait for the answer, ``receive`` does."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else "Content-Type: application/json\r\n"
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}Content-Length: {len(content)}\r\n\r\n"
        self.socket.sendall(head.encode() + content)

    def receive(self) -> Answer:
        """Raises: ConnectionError, TimeoutError."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._piece()
        head, _, body = received.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(body) < length:
            body += self._piece()
        return Answer(int(head.split(b" ", 2)[1]), json.loads(body))

    def _piece(self) -> bytes:
        piece = self.socket.recv(65536)
        if not piece:
            raise ConnectionError("the broker closed the connection")
        return piece

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        self.send(method, path, body)
        return self.receive()

    def ask(self, consumer: str, wait_seconds: float = LONG_WAIT_SECONDS) -> None:
        """Send an acquire and do not wait for its answer."""
        self.send("POST", "/v1/lease", {"consumer": consumer, "wait_seconds": wait_seconds, "ttl_seconds": 600})

    def acquire(self, consumer: str, wait_seconds: float = LONG_WAIT_SECONDS) -> str:
        """The token. Raises: RuntimeError."""
        self.ask(consumer, wait_seconds)
        return str(self.receive().require()["token"])

    def renew(self, token: str) -> dict[str, Any]:
        return self.call("POST", f"/v1/lease/{token}/renew").require()

    def release(self, token: str) -> None:
        self.call("DELETE", f"/v1/lease/{token}").require()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Line:
    """One consumer's holder and the callers that wait behind it."""

    def __init__(self, port: int, consumer: str, waiting: int = 0) -> None:
        self.consumer = consumer
        self.port = port
        self._waiters = selectors.DefaultSelector()
        self._spare: list[Caller] = []
        self.waiting = 0
        self.holder = Caller(port)
        self.token = self.holder.acquire(consumer)
        for _ in range(waiting):
            self.join()
        self.settle()

    def join(self, consumer: str | None = None) -> None:
        """One more caller at the end of the line, for another consumer if one is named."""
        caller = self._spare.pop() if self._spare else Caller(self.port)
        caller.ask(consumer or self.consumer)
        self._waiters.register(caller.socket, selectors.EVENT_READ, caller)
        self.waiting += 1

    def settle(self) -> None:
        """Wait until the broker counts everyone who joined as held up by the holder."""
        until(lambda: self.holder.renew(self.token)["waiting"] == self.waiting, ANSWER_SECONDS)

    def hand_over(self) -> float:
        """Release to whoever is first; seconds from sending the release until that one's grant has arrived."""
        start = time.perf_counter()
        self.holder.send("DELETE", f"/v1/lease/{self.token}")
        heir = self._first_answered()
        granted = heir.receive()
        seconds = time.perf_counter() - start
        self.token = str(granted.require()["token"])
        self.holder.receive().require()
        self._spare.append(self.holder)
        self.holder = heir
        self.waiting -= 1
        return seconds

    def _first_answered(self) -> Caller:
        ready = self._waiters.select(ANSWER_SECONDS)
        if len(ready) != 1:
            raise RuntimeError(f"{len(ready)} of {self.waiting} waiting callers were answered by one release")
        caller = ready[0][0].data
        if not isinstance(caller, Caller):
            raise TypeError("only callers wait in a line")
        self._waiters.unregister(caller.socket)
        return caller

    def release_and_acquire(self) -> float:
        """The holder's own release, then its own acquire, with nobody else there; seconds for both."""
        start = time.perf_counter()
        self.holder.release(self.token)
        self.token = self.holder.acquire(self.consumer)
        return time.perf_counter() - start

    def close(self) -> None:
        """Hang up. Nothing is withdrawn: whoever closes a line ends its broker next."""
        for key in list(self._waiters.get_map().values()):
            key.data.close()
        self._waiters.close()
        for caller in [self.holder, *self._spare]:
            caller.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Rig:
    """A simulation and as many brokers on it as are asked for, all ended together."""

    def __init__(self, directory: Path, simulation: dict[str, Any], stack: ExitStack) -> None:
        self.services: dict[str, str] = simulation["services"]
        self.card_file = Path(simulation["card"])
        self._directory = directory
        self._config: dict[str, Any] = yaml.safe_load(Path(simulation["config"]).read_text(encoding="utf-8"))
        self._stack = stack
        self._brokers = 0

    def broker(
        self, *, lease: dict[str, Any] | None = None, gpu: dict[str, Any] | None = None, **server: Any
    ) -> RunningBroker:
        """A started one; ``server``, ``lease`` and ``gpu`` are keys of these sections, else as an operator has it by
        default."""
        self._brokers += 1
        directory = self._directory / f"broker-{self._brokers}"
        directory.mkdir()
        config = self._config | {"server": self._config["server"] | server}
        config |= {} if lease is None else {"lease": lease}
        config |= {"gpu": self._config["gpu"] | (gpu or {})}
        return self._stack.enter_context(RunningBroker(directory, config))

    def line(self, broker: RunningBroker, consumer: str, waiting: int = 0) -> Line:
        return self._stack.enter_context(Line(broker.port, consumer, waiting))

    def load_speech(self) -> None:
        """Make mvoice resident."""
        self.load("mvoice")

    def load(self, name: str) -> None:
        """Make ollama or mvoice resident, by a request of their own."""
        path, body = WARM[name]
        requests.post(f"{self.services[name]}{path}", json=body, timeout=60).raise_for_status()


@contextmanager
def rig(speed: float = 20.0) -> Iterator[Rig]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpumgr-bench-")))
        simulation = stack.enter_context(_simulation(directory / "simulation", speed))
        yield Rig(directory, simulation, stack)


@contextmanager
def _simulation(directory: Path, speed: float) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "gpumgr.sim", "--dir", str(directory), "--speed", str(speed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            if running.stdout is None:
                raise RuntimeError("the simulation has no stdout")
            yield json.loads(running.stdout.readline())
        finally:
            running.terminate()
            running.wait(30)


def allow_open_files() -> None:
    """As many as the system allows, for this process and the brokers it starts: each waiter is a socket in both."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
