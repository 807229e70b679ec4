"""What all simulated services have in common: a life, a ledger, memory, and lies.

Owns: start, stop and death; counting; the faults of health and unload calls.
Must not: know one service's protocol.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gpumgr.sim.card import NoSuchProcess, SimulatedCard
from gpumgr.sim.memory import Gone, ProcessMemory
from gpumgr.sim.server import JOIN_SECONDS, Reply, Request, Server, json_reply

Answer = Callable[[Request], Reply]


@dataclass(slots=True)
class Faults:
    """The lies a service tells. Change them while it runs; each is looked at when its moment comes."""

    keeps_memory: bool = False
    """Unload is answered 200 and nothing happens."""
    lose_first_unload: bool = False
    """The next unload is answered 200 and lost; the fault then clears itself."""
    slow_unload_seconds: float = 0.0
    """The memory begins to fall only after this long."""
    unload_gate: threading.Event | None = None
    """The memory falls only once this is set."""
    hang: bool = False
    """Requests are taken and never answered, until the service ends."""
    hang_unload: bool = False
    """The same for unload calls alone."""
    dies_on_unload: bool = False
    unhealthy: bool = False
    """Health is answered 503; all else works."""
    unlisted_polls: int = 0
    """So many of the next reports of what is loaded are empty although something is; it then clears itself."""
    frees_share: float = 1.0
    """Only this share of the memory comes back; the service itself believes that all did."""


@dataclass(slots=True)
class Ledger:
    """What happened. What must never happen is counted as well, so that a test can assert zero."""

    calls: list[tuple[float, str, str]]
    """(monotonic seconds, method, path), every request."""
    work_calls: int = 0
    unload_calls: int = 0
    unloads_while_busy: int = 0
    loads: int = 0


class SimulatedService:
    """One process with one port. It may be started again after its end: a new pid on the same port.

    ``resident_mib`` is what a driver shows while it is loaded, the context included.
    """

    def __init__(
        self,
        name: str,
        card: SimulatedCard,
        *,
        resident_mib: int,
        context_mib: int = 400,
        load_seconds: float = 0.2,
        unload_seconds: float = 0.1,
        gpu: int = 0,
        port: int = 0,
    ) -> None:
        self.name = name
        self.card = card
        self.resident_mib = resident_mib
        self.context_mib = context_mib
        self.load_seconds = load_seconds
        self.unload_seconds = unload_seconds
        self.gpu = gpu
        self.faults = Faults()
        self.ledger = Ledger(calls=[])
        self._server = Server(self._receive, port)
        self._life = threading.RLock()
        self._alive = False
        self._gone = threading.Event()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._table = self._routes()
        self._pid: int | None = None
        self._memory: ProcessMemory | None = None
        self._forget()

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int:
        """Of this life, or of the last one. Raises: RuntimeError before the first start."""
        if self._pid is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._pid

    @property
    def running(self) -> bool:
        return self._alive

    @property
    def busy(self) -> int:
        """Work accepted and not yet done."""
        return self._busy

    @property
    def used_mib(self) -> int:
        return 0 if self._pid is None else self.card.used_mib(self._pid, self.gpu)

    @property
    def calls(self) -> list[tuple[float, str, str]]:
        return self.ledger.calls

    @property
    def work_calls(self) -> int:
        return self.ledger.work_calls

    @property
    def unload_calls(self) -> int:
        return self.ledger.unload_calls

    @property
    def unloads_while_busy(self) -> int:
        return self.ledger.unloads_while_busy

    @property
    def loads(self) -> int:
        return self.ledger.loads

    def counters(self) -> dict[str, int | bool]:
        """The ledger in figures, JSON-ready."""
        return {
            "running": self.running,
            "busy": self.busy,
            "used_mib": self.used_mib,
            "calls": len(self.calls),
            "work_calls": self.work_calls,
            "unload_calls": self.unload_calls,
            "unloads_while_busy": self.unloads_while_busy,
            "loads": self.loads,
        }

    # Life

    def start(self) -> None:
        with self._life:
            if self._alive:
                return
            self._join()
            self._gone.clear()
            self._forget()
            self._server.start()
            self._pid = self.card.start_process(self.name, port=self.port, gpu=self.gpu)
            self._memory = ProcessMemory(self.card, self._pid, self.gpu, self.context_mib, self._gone)
            self._alive = True
            for run in self._background():
                self._spawn(run)

    def stop(self) -> None:
        """The end of the process, waited for. Work under way is cut."""
        self.die()
        # Not under the lock: a request that is just dying by a fault needs it in order to end.
        self._join()

    def die(self) -> None:
        """As kill -9: connections are cut in the middle, the port refuses, the memory is free."""
        with self._life:
            if not self._alive:
                return
            self._alive = False
            self._gone.set()
            # Before the connections: whoever sees them break may rely on the memory being free.
            self.card.end_process(self.pid)
            self._server.stop()
            with self._changed:
                self._changed.notify_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _join(self) -> None:
        self._server.join()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_SECONDS)
        self._threads.clear()

    def _spawn(self, run: Callable[[], None]) -> None:
        def until_gone() -> None:
            try:
                run()
            except (Gone, NoSuchProcess):
                return

        thread = threading.Thread(target=until_gone, name=f"sim-{self.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _sleep(self, seconds: float) -> None:
        """Raises: Gone."""
        if self._gone.wait(seconds):
            raise Gone

    def _until(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait on ``_changed``, which the caller holds. False after ``seconds``. Raises: Gone."""
        came = self._changed.wait_for(lambda: self._gone.is_set() or ready(), seconds)
        if self._gone.is_set():
            raise Gone
        return came

    # What a service fills in

    def _routes(self) -> dict[tuple[str, str], Answer]:
        raise NotImplementedError

    def _background(self) -> list[Callable[[], None]]:
        """Threads that run from start to end."""
        return []

    def _forget(self) -> None:
        """A new process remembers nothing of the last one. Called by the constructor as well."""
        self._busy = 0

    def _answer(self, request: Request) -> Reply:
        answer = self._table.get((request.method, request.path))
        if answer is None:
            return json_reply({"error": f"no route {request.method} {request.path}"}, 404)
        return answer(request)

    # Requests

    def _receive(self, request: Request) -> Reply:
        self.ledger.calls.append((time.monotonic(), request.method, request.path))
        if self.faults.hang:
            self._hang()
        return self._answer(request)

    def _hang(self) -> None:
        self._gone.wait()
        raise Gone

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._changed:
            self._busy += 1
            self.ledger.work_calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    # Memory

    def _load(self, part: str, mib: int) -> None:
        """Takes ``load_seconds``. Raises: OutOfMemory, Gone."""
        if self._memory is None:
            raise Gone
        self._memory.take(part, mib, self.load_seconds)
        with self._changed:
            self.ledger.loads += 1

    def _unload_wanted(self) -> bool:
        """An unload call came: count it, and say whether anything is to follow. Raises: Gone."""
        faults = self.faults
        with self._changed:
            self.ledger.unload_calls += 1
            if self.busy:
                self.ledger.unloads_while_busy += 1
            lost, faults.lose_first_unload = faults.lose_first_unload, False
        if faults.dies_on_unload:
            self.die()
            raise Gone
        if faults.hang_unload:
            self._hang()
        return not lost and not faults.keeps_memory

    def _unload(self, part: str) -> None:
        """Blocks until the memory is back, or is said to be. Raises: Gone."""
        self._sleep(self.faults.slow_unload_seconds)
        gate = self.faults.unload_gate
        while gate is not None and not gate.is_set():
            # In small steps, because nothing waits for two events at once.
            self._sleep(0.005)
        if self._memory is not None:
            self._memory.give_back(part, self.unload_seconds, self.faults.frees_share)
