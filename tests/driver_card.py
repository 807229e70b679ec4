"""One card for many processes: a ledger in a directory, and the stand-in driver that says what stands in it.

Owns: whose memory it is, by real pids; the refusal of what does not fit, whoever asks; the driver's state file.
Must not: know services. It believes whoever calls it, as a driver does.

    card = DriverCard(library, directory)          # in the test, and in each process that computes
    with RunningBroker(tmp_path, config, card.env()): ...
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpumgr.sim.card import NoSuchProcess, OutOfMemory, SimulatedCard, SimulatedGpu
from tests.stand_in import Gpu, Process, StandInDriver

TOTAL_MIB = 24000
UUID = "GPU-5eed5eed-0000-4000-8000-000000024000"


@dataclass
class Row:
    name: str
    used_mib: int = 0


@dataclass
class Ledger:
    """``peak_mib``: the most that all held together at any time."""

    rows: dict[int, Row] = field(default_factory=dict)
    over_commits: int = 0
    peak_mib: int = 0

    @property
    def used_mib(self) -> int:
        return sum(row.used_mib for row in self.rows.values())

    def listed(self) -> list[Process]:
        """A driver lists the processes that have a context, so none with 0 MiB."""
        return [Process(pid, row.used_mib, name=row.name) for pid, row in self.rows.items() if row.used_mib]

    def set_used(self, pid: int, mib: int) -> None:
        """Raises: OutOfMemory, NoSuchProcess."""
        if pid not in self.rows:
            raise NoSuchProcess(f"no process {pid}")
        row, free = self.rows[pid], TOTAL_MIB - self.used_mib
        if mib - row.used_mib > free:
            self.over_commits += 1
            raise OutOfMemory(f"CUDA out of memory. Tried to allocate {mib - row.used_mib} MiB. {free} MiB are free.")
        row.used_mib = mib
        self.peak_mib = max(self.peak_mib, self.used_mib)


class DriverCard(SimulatedCard):
    """What a service does with a simulated card, on one that processes share. It has one GPU.

    A change takes the ledger's lock, is refused or done, and is in the driver's state before it returns: no copy lags
    behind, and no total above the card is written anywhere. ``pid`` is whose memory a service takes; default: its own.
    """

    def __init__(self, library: Path, directory: Path, pid: int | None = None) -> None:
        super().__init__((SimulatedGpu(total_mib=TOTAL_MIB, uuid=UUID),))
        self._pid = pid or os.getpid()
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._file = directory / "ledger.json"
        with self._locked():
            gpu = Gpu(UUID, total_mib=TOTAL_MIB)
            self._driver = StandInDriver(library, directory / "driver", [gpu], self._load().listed())

    @property
    def library(self) -> Path:
        return self._driver.library

    def env(self) -> dict[str, str]:
        """What the broker needs to find this card's driver."""
        return self._driver.env()

    def read(self) -> Ledger:
        with self._locked():
            return self._load()

    def start_process(self, name: str, *, port: int | None = None, gpu: int = 0) -> int:  # noqa: ARG002 - /proc tells
        """Under the pid and the name that a driver tells."""
        return self.admit(self._pid, sys.executable)

    def admit(self, pid: int, name: str = "") -> int:
        """Another process. ``name`` is what the driver says; empty: it does not know it."""
        with self._changing() as ledger:
            ledger.rows[pid] = Row(name)
        return pid

    def end_process(self, pid: int) -> None:
        with self._changing() as ledger:
            ledger.rows.pop(pid, None)

    def allocate(self, pid: int, mib: int, gpu: int | None = None) -> None:
        self._change(pid, gpu, lambda used: used + mib)

    def free(self, pid: int, mib: int, gpu: int | None = None) -> None:
        self._change(pid, gpu, lambda used: max(0, used - mib))

    def set_used(self, pid: int, mib: int, gpu: int | None = None) -> None:
        self._change(pid, gpu, lambda _: mib)

    def used_mib(self, pid: int, gpu: int | None = None) -> int:
        self._gpu(gpu or 0)
        row = self.read().rows.get(pid)
        return 0 if row is None else row.used_mib

    def free_mib(self, gpu: int = 0) -> int:
        return self.total_mib(gpu) - self.read().used_mib

    def _change(self, pid: int, gpu: int | None, to: Callable[[int], int]) -> None:
        self._gpu(gpu or 0)
        with self._changing() as ledger:
            row = ledger.rows.get(pid)
            ledger.set_used(pid, to(0 if row is None else row.used_mib))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """By a file opened for this alone, which excludes other threads as well as other processes."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _changing(self) -> Iterator[Ledger]:
        with self._locked():
            ledger = self._load()
            try:
                yield ledger
            finally:  # a refusal is counted too
                self._file.write_text(json.dumps(asdict(ledger)), encoding="utf-8")
                self._driver.processes = ledger.listed()
                self._driver.write()

    def _load(self) -> Ledger:
        if not self._file.exists():
            return Ledger()
        found = json.loads(self._file.read_text(encoding="utf-8"))
        return Ledger({int(pid): Row(**row) for pid, row in found.pop("rows").items()}, **found)
