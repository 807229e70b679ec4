"""The processes that holders name as theirs, and whose the memory of their descendants is.

Owns: which process belongs to which lease's consumer, and telling a reading so. Must not: look over the whole machine
(it walks up from the few pids the driver names), signal anything, or decide what follows from it.

A process is told by its pid and its start, as a pid is given again. What was seen once as a descendant stays one: the
system makes init the parent of whoever outlives its own. A descendant whose parents ended before it was first seen on
the card, or between two lives of the broker, is not recognised: it counts as untracked, and is held against everyone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from gpumgr.adapters.ownership import lineage, started_ticks
from gpumgr.core.card import GpuProcess, GpuReading, Reading
from gpumgr.core.lease import HolderProcess
from gpumgr.runtime.ports import Probe

INIT = 1
"""Everybody's ancestor, and in a container the likeliest number for its only program."""


class HolderProcesses:
    """Implements ``runtime.ports.HolderProcesses``. Any thread. What is configured of a process stands before it."""

    def __init__(
        self,
        started: Callable[[int], int | None] = started_ticks,
        ancestors: Callable[[int], Iterable[int]] = lineage,
    ) -> None:
        """``ancestors``: the pid itself, its parent, and so on."""
        self._started = started
        self._ancestors = ancestors
        self._lock = threading.Lock()
        self._named: dict[HolderProcess, str] = {}
        """The latest one that named it counts."""
        self._seen: dict[HolderProcess, HolderProcess | None] = {}
        """Whose descendant a process on the card is; None: nobody's. As it was born, so that it is looked at once."""

    def started(self, pid: int) -> int | None:
        return None if pid == INIT else self._started(pid)

    def follow(self, process: HolderProcess, consumer: str) -> None:
        with self._lock:
            self._forget_the_dead()
            self._named[process] = consumer
            self._seen = {seen: holder for seen, holder in self._seen.items() if holder is not None}

    def attributed(self, reading: Reading) -> Reading:
        """With the consumer of each process that nobody configured and a holder named."""
        with self._lock:
            if not self._named:
                return reading
            return replace(reading, gpus=tuple(self._of_gpu(gpu) for gpu in reading.gpus))

    def _of_gpu(self, gpu: GpuReading) -> GpuReading:
        if not gpu.untracked:
            return gpu
        return replace(gpu, processes=tuple(self._of_process(process) for process in gpu.processes))

    def _of_process(self, process: GpuProcess) -> GpuProcess:
        holder = self._holder(process.pid) if process.consumer is None else None
        if holder is None:
            return process
        return replace(process, consumer=self._named[holder], holder_pid=holder.pid)

    def _holder(self, pid: int) -> HolderProcess | None:
        started = self._started(pid)
        if started is None:
            return None
        this = HolderProcess(pid, started)
        if this in self._named:
            return this
        if this not in self._seen:
            self._seen[this] = self._look(pid)
        return self._seen[this]

    def _look(self, pid: int) -> HolderProcess | None:
        for ancestor in self._ancestors(pid):
            started = self._started(ancestor)
            if started is not None and HolderProcess(ancestor, started) in self._named:
                return HolderProcess(ancestor, started)
        return None

    def _forget_the_dead(self) -> None:
        self._seen = {seen: holder for seen, holder in self._seen.items() if self._lives(seen)}
        needed = {holder for holder in self._seen.values() if holder is not None}
        self._named = {named: name for named, name in self._named.items() if named in needed or self._lives(named)}

    def _lives(self, process: HolderProcess) -> bool:
        return self._started(process.pid) == process.started


class HolderProbe:
    """Implements ``Probe`` around another one."""

    def __init__(self, probe: Probe, holders: HolderProcesses) -> None:
        self._probe = probe
        self._holders = holders

    def read(self, at_most_seconds: float | None = None) -> Reading:
        return self._holders.attributed(self._probe.read(at_most_seconds))

    def close(self) -> None:
        self._probe.close()
