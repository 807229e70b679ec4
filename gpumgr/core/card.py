"""What the driver says of the card, as values.

Owns: the shape of a reading. Must not: read anything, or guess what the driver did not say.

Unreadable is not zero: a number the driver withholds is None, a GPU it does not show carries ``error``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNEXPLAINED_MIB = 1024
"""More than drivers keep for themselves."""

UNKNOWN_TOTAL_MIB = 2**31
"""Stands for the size of a card that was never read: every declared size fits it."""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One process with memory on one GPU. ``consumer`` is None for an untracked process."""

    pid: int
    name: str
    used_mib: int | None
    consumer: str | None
    holder_pid: int | None = None
    """The process that a holder named, of which this is one: itself, or a descendant."""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one instant. ``error`` is a sentence where its memory cannot be read; the numbers are then 0."""

    index: int
    uuid: str | None
    name: str
    total_mib: int
    used_mib: int
    free_mib: int
    processes: tuple[GpuProcess, ...] = ()
    processes_readable: bool = True
    error: str | None = None

    @property
    def readable(self) -> bool:
        return self.error is None

    @property
    def untracked(self) -> tuple[GpuProcess, ...]:
        return tuple(p for p in self.processes if p.consumer is None)

    @property
    def hides_processes(self) -> bool:
        """Whether somebody may be on it whom the list does not tell from others: a stranger, or memory that no listed
        process explains (a container without the host's pids sees an empty list)."""
        listed = sum(process.used_mib or 0 for process in self.processes)
        return bool(self.untracked) or self.used_mib - listed > UNEXPLAINED_MIB

    def held_mib(self, consumer: str) -> int | None:
        """MiB that the consumer's processes hold here; None where the driver does not say."""
        if not self.readable or not self.processes_readable:
            return None
        total = 0
        for process in self.processes:
            if process.consumer == consumer:
                if process.used_mib is None:
                    return None
                total += process.used_mib
        return total


@dataclass(frozen=True, slots=True)
class Reading:
    """The driver's answer for all GPUs at one instant (``read_at``: monotonic seconds).

    ``error`` is a sentence where the driver as a whole cannot be read; ``gpus`` is then empty.
    """

    read_at: float
    gpus: tuple[GpuReading, ...] = ()
    error: str | None = None

    def gpu(self, ref: int | str) -> GpuReading | None:
        """The GPU with this NVML index or UUID, or None where the driver does not show it."""
        for gpu in self.gpus:
            if gpu.index == ref or (isinstance(ref, str) and gpu.uuid == ref):
                return gpu
        return None

    def believing(
        self, refs: Iterable[int | str], last: Mapping[int | str, GpuReading], held_mib: Mapping[int | str, int]
    ) -> Reading:
        """The same reading, with an assumption in the place of each of these GPUs that cannot be read: the card and the
        untracked processes of its last reading, and what its consumers are thought to hold."""
        missing = [ref for ref in refs if self.problems([ref])]
        assumed = tuple(_assumed(ref, last.get(ref), held_mib.get(ref, 0)) for ref in missing)
        kept = tuple(gpu for gpu in self.gpus if gpu.index not in missing and gpu.uuid not in missing)
        return Reading(self.read_at, kept + assumed)

    def problems(self, refs: Iterable[int | str]) -> list[str]:
        """One sentence for each of these GPUs that cannot be read now."""
        if self.error is not None:
            return [self.error]
        found = []
        for ref in refs:
            gpu = self.gpu(ref)
            if gpu is None:
                found.append(f"GPU {ref} is not among the {len(self.gpus)} the driver shows")
            elif gpu.error is not None:
                found.append(f"GPU {ref}: {gpu.error}")
        return found


def _assumed(ref: int | str, last: GpuReading | None, held_mib: int) -> GpuReading:
    total = UNKNOWN_TOTAL_MIB if last is None else last.total_mib
    strangers = () if last is None else last.untracked
    free = max(0, total - held_mib - sum(process.used_mib or 0 for process in strangers))
    return GpuReading(
        index=ref if isinstance(ref, int) else -1,
        uuid=ref if isinstance(ref, str) else None if last is None else last.uuid,
        name="" if last is None else last.name,
        total_mib=total,
        used_mib=total - free,
        free_mib=free,
        processes=strangers,
        processes_readable=False,
    )
