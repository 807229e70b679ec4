"""A simulated card: who holds how much memory on which GPU.

Owns: the ledger of processes, the refusal of what does not fit, and the file another process may read.
Must not: know services, consumers or leases; it believes whoever calls it, as a driver does.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIRST_PID = 40001
HISTORY_LENGTH = 20_000


class OutOfMemory(Exception):
    """The allocation does not fit. Nothing was allocated, and the card counted one over-commit."""


class NoSuchProcess(Exception):
    """The process never was, or has ended."""


@dataclass(frozen=True, slots=True)
class SimulatedGpu:
    """One GPU as it was bought."""

    index: int = 0
    total_mib: int = 24000
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    name: str = "Simulated GPU"


@dataclass(slots=True)
class _Process:
    name: str
    port: int | None
    home_gpu: int
    used_mib: dict[int, int] = field(default_factory=dict)
    readable: bool = True


@dataclass(slots=True)
class _Gpu:
    made: SimulatedGpu
    processes_readable: bool = True
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the ledger. ``at`` is monotonic seconds, ``free_mib`` that of the GPU after the change."""

    at: float
    free_mib: int
    name: str
    used_mib: int


class SimulatedCard:
    """A thread-safe ledger. With ``path``, each change is a whole new file there: a reader never sees half of one."""

    def __init__(self, gpus: Sequence[SimulatedGpu] = (SimulatedGpu(),), path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._path = path
        self._gpus = {gpu.index: _Gpu(gpu) for gpu in gpus}
        self._processes: dict[int, _Process] = {}
        self._pids = itertools.count(FIRST_PID)
        self._over_commits = 0
        self._unreadable: str | None = None
        self._history: deque[Change] = deque(maxlen=HISTORY_LENGTH)
        with self._lock:
            self._publish()

    def start_process(self, name: str, *, port: int | None = None, gpu: int = 0) -> int:
        """A new process without memory; returns its pid. A driver shows it from its first MiB on."""
        with self._lock:
            self._gpu(gpu)
            pid = next(self._pids)
            self._processes[pid] = _Process(name, port, gpu)
            return pid

    def end_process(self, pid: int) -> None:
        """All its memory is free. Ending it twice is no error."""
        with self._lock:
            process = self._processes.pop(pid, None)
            if process is None:
                return
            for gpu in process.used_mib:
                self._note(gpu, process.name, 0)
            self._publish()

    def allocate(self, pid: int, mib: int, gpu: int | None = None) -> None:
        """On the process's own GPU unless ``gpu`` says another.

        Raises: OutOfMemory, NoSuchProcess.
        """
        with self._lock:
            process, gpu = self._at(pid, gpu)
            self._set(process, gpu, process.used_mib.get(gpu, 0) + mib)

    def free(self, pid: int, mib: int, gpu: int | None = None) -> None:
        """Give back up to ``mib``. Raises: NoSuchProcess."""
        with self._lock:
            process, gpu = self._at(pid, gpu)
            self._set(process, gpu, max(0, process.used_mib.get(gpu, 0) - mib))

    def set_used(self, pid: int, mib: int, gpu: int | None = None) -> None:
        """Raises: OutOfMemory, NoSuchProcess."""
        with self._lock:
            process, gpu = self._at(pid, gpu)
            self._set(process, gpu, mib)

    def used_mib(self, pid: int, gpu: int | None = None) -> int:
        """0 for a process that has ended."""
        with self._lock:
            process = self._processes.get(pid)
            if process is None:
                return 0
            return process.used_mib.get(process.home_gpu if gpu is None else gpu, 0)

    def total_mib(self, gpu: int = 0) -> int:
        with self._lock:
            return self._gpu(gpu).made.total_mib

    def free_mib(self, gpu: int = 0) -> int:
        with self._lock:
            return self._free(gpu)

    @property
    def over_commits(self) -> int:
        """How often something was asked for that did not fit."""
        with self._lock:
            return self._over_commits

    @property
    def history(self) -> list[Change]:
        """The last changes, oldest first."""
        with self._lock:
            return list(self._history)

    @property
    def unreadable(self) -> str | None:
        """A sentence while the driver as a whole cannot be read; the memory itself is untouched."""
        with self._lock:
            return self._unreadable

    @unreadable.setter
    def unreadable(self, sentence: str | None) -> None:
        with self._lock:
            self._unreadable = sentence
            self._publish()

    def set_gpu_error(self, sentence: str | None, gpu: int = 0) -> None:
        """One GPU that the driver shows but cannot read."""
        with self._lock:
            self._gpu(gpu).error = sentence
            self._publish()

    def set_processes_readable(self, readable: bool, gpu: int = 0) -> None:
        """False: the GPU tells its memory but not whose it is, as in some containers."""
        with self._lock:
            self._gpu(gpu).processes_readable = readable
            self._publish()

    def set_used_readable(self, pid: int, readable: bool) -> None:
        """False: it is listed with its memory withheld, as NVML's ``usedGpuMemory`` None. Raises: NoSuchProcess."""
        with self._lock:
            self._at(pid, None)[0].readable = readable
            self._publish()

    def state(self) -> dict[str, object]:
        """JSON-ready; the same as the file."""
        with self._lock:
            return self._state()

    # Below: the lock is held.

    def _gpu(self, index: int) -> _Gpu:
        try:
            return self._gpus[index]
        except KeyError:
            raise ValueError(f"this card has no GPU {index}, only {sorted(self._gpus)}") from None

    def _at(self, pid: int, gpu: int | None) -> tuple[_Process, int]:
        process = self._processes.get(pid)
        if process is None:
            raise NoSuchProcess(f"no process {pid}")
        index = process.home_gpu if gpu is None else gpu
        self._gpu(index)
        return process, index

    def _used(self, gpu: int) -> int:
        return sum(process.used_mib.get(gpu, 0) for process in self._processes.values())

    def _free(self, gpu: int) -> int:
        return self._gpu(gpu).made.total_mib - self._used(gpu)

    def _set(self, process: _Process, gpu: int, mib: int) -> None:
        if mib < 0:
            raise ValueError(f"a process cannot hold {mib} MiB")
        more = mib - process.used_mib.get(gpu, 0)
        free = self._free(gpu)
        if more > free:
            self._over_commits += 1
            self._publish()
            raise OutOfMemory(f"CUDA out of memory. Tried to allocate {more} MiB. GPU {gpu} has {free} MiB free.")
        process.used_mib[gpu] = mib
        self._note(gpu, process.name, mib)
        self._publish()

    def _note(self, gpu: int, name: str, used_mib: int) -> None:
        self._history.append(Change(time.monotonic(), self._free(gpu), name, used_mib))

    def _state(self) -> dict[str, object]:
        return {
            "gpus": [self._gpu_state(gpu) for gpu in self._gpus.values()],
            "over_commits": self._over_commits,
            "unreadable": self._unreadable,
        }

    def _gpu_state(self, gpu: _Gpu) -> dict[str, object]:
        index = gpu.made.index
        return {
            "index": index,
            "uuid": gpu.made.uuid,
            "name": gpu.made.name,
            "total_mib": gpu.made.total_mib,
            # Told apart from the processes: a driver knows it even where a process's share is withheld.
            "used_mib": self._used(index),
            "error": gpu.error,
            "processes_readable": gpu.processes_readable,
            "processes": self._listed(index) if gpu.processes_readable else [],
        }

    def _listed(self, gpu: int) -> list[dict[str, object]]:
        """A driver lists the processes that have a context, so none with 0 MiB."""
        return [
            {
                "pid": pid,
                "name": process.name,
                "used_mib": process.used_mib[gpu] if process.readable else None,
                "port": process.port,
            }
            for pid, process in self._processes.items()
            if process.used_mib.get(gpu, 0) > 0
        ]

    def _publish(self) -> None:
        if self._path is None:
            return
        # Beside the file: os.replace is atomic only within one file system.
        fresh = self._path.with_name(self._path.name + ".tmp")
        fresh.write_text(json.dumps(self._state()), encoding="utf-8")
        os.replace(fresh, self._path)
