"""The probe of the NVIDIA driver: NVML through nvidia-ml-py.

Owns: the NVML session, and every sentence about a driver that cannot be read. Must not: decide whose a process is
(it is handed ``owner``), or turn what the driver withholds into a number.

Facts about the outside, nvidia-ml-py 13.615 and NVML's reference, read 2026-11:

- ``NVMLLibraryMismatchError`` is no ``NVMLError``. Names are decoded as UTF-8 and may raise UnicodeDecodeError.
- Version 1 of the memory call counts what the driver keeps for itself as used, version 2 does not: ``used`` and
  ``total - free`` differ by that much. ``free`` is the same in both, and the one to decide by.
- Drivers before R510 have no version 2, and WSL's had one that answered "unknown error" (nvitop, pull request 30,
  2022). GB10 answers "not supported" to both: it has no memory of its own.
- ``usedGpuMemory`` is None under WDDM and in some containers. Unreadable is not zero.
- A process that renders and computes is in both lists with the whole of its memory in each.
- An NVML session does not survive a fork, and gunicorn forks: it is opened by the first reading, nothing before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pynvml

from gpumgr.adapters.ownership import last_component, started_ticks
from gpumgr.core.card import GpuProcess, GpuReading, Reading

REOPEN_SECONDS = 1.0
"""At most one attempt per this to open a driver that fails; a reading in between repeats the last error."""
REOPEN_FOR_GPU_SECONDS = 10.0
"""A lost GPU comes back in a new session only. Opening one can take the driver 0.1 s, and the other GPUs wait."""
CLOSE_SECONDS = 1.0

_ROUNDS = 3
_MIB = 1024 * 1024

_DRIVER_WIDE = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
_GPU_GONE = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED})
_ABSENT = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND})
_NO_MEMORY_V2 = _ABSENT | {
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_UNKNOWN,
}

_SENTENCES = {
    pynvml.NVML_ERROR_UNINITIALIZED: "the NVIDIA driver has ended our session; it is opened again within a second",
    pynvml.NVML_ERROR_NO_PERMISSION: "the NVIDIA driver denies access: let the broker's user open /dev/nvidia*",
    pynvml.NVML_ERROR_NOT_SUPPORTED: (
        "the NVIDIA driver does not tell this GPU's memory (not supported); "
        "a GPU that shares the machine's memory, such as GB10, cannot be leased by memory"
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded: run nvidia-smi to see why",
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        "libnvidia-ml.so.1 was not found: install the NVIDIA driver, or give the container its GPU"
    ),
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU is lost, it no longer answers: dmesg tells why, often only a reboot helps",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU must be reset before it works again: nvidia-smi --gpu-reset, or reboot",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        "the NVIDIA library and kernel driver are of different versions, as after an update: reboot, "
        "or reload the kernel modules and restart the broker"
    ),
}

# What runs on a GPU, newest version of each call first; v2 is that of drivers R450 to R505, with the same struct.
_DECISIVE_LISTS = (
    ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"),
    ("nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v2"),
)
_MPS_LIST = ("nvmlDeviceGetMPSComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2")

# The binding of 12.535 does not have the second yet.
_NVML_ERRORS = (pynvml.NVMLError, getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError))


@dataclass(frozen=True, slots=True)
class _Memory:
    total_mib: int
    free_mib: int
    used_mib: int


@dataclass(frozen=True, slots=True)
class _Listing:
    """MiB by pid as one pass over the lists tells them; None: withheld. Not readable: some may be missing."""

    held: dict[int, int | None]
    readable: bool


@dataclass(frozen=True, slots=True)
class _Card:
    """``handle`` is good until the session ends."""

    handle: Any
    uuid: str | None
    name: str


class NvmlProbe:
    """Implements ``Probe``. Any thread may read; one reading at a time asks the driver.

    ``owner`` is called with a pid and the driver's name of it, path included, outside the lock.
    """

    def __init__(self, owner: Callable[[int, str], str | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._owner = owner
        self._clock = clock
        self._lock = threading.Lock()
        self._opened_at: float | None = None
        self._error: str | None = None
        self._retry_at = 0.0
        self._gpu_gone = False
        self._cards: dict[int, _Card] = {}
        self._last_seen: dict[int, _Card] = {}
        self._names: dict[int, tuple[int, str]] = {}

    def read(self) -> Reading:
        """What the driver says now. Never raises. Waits for a reading under way, and as long as the driver takes.

        ``read_at`` is from before the first question, so nothing in the reading is older than it.
        """
        with self._lock:
            now = self._clock()
            if self._error is not None and now < self._retry_at:
                return Reading(now, error=self._error)
            try:
                seen = self._read_driver(now)
            except Exception as error:  # whatever it is, the lease path must hear that there is no reading
                self._driver_failed(now, error)
                return Reading(now, error=self._error)
        try:
            return Reading(now, self._with_owners(seen))
        except Exception as error:
            return Reading(now, error=f"whose the processes on the GPU are cannot be told: {error!r}")

    def close(self) -> None:
        """End the session. Waits a second for a reading under way: a hung driver must not hold up a shutdown.

        A later read opens a new one.
        """
        if self._lock.acquire(timeout=CLOSE_SECONDS):
            try:
                self._end_session()
                self._error = None
            finally:
                self._lock.release()

    # -- the session; the lock is held --

    def _read_driver(self, now: float) -> list[GpuReading]:
        self._ensure_session(now)
        count = pynvml.nvmlDeviceGetCount()
        if any(index >= count for index in self._last_seen):
            self._last_seen.clear()  # a GPU was taken out: indexes mean other cards now
        seen = [self._read_gpu(index) for index in range(count)]
        self._names = {p.pid: self._names[p.pid] for gpu in seen for p in gpu.processes if p.pid in self._names}
        return seen

    def _ensure_session(self, now: float) -> None:
        if self._opened_at is not None and not (self._gpu_gone and now - self._opened_at >= REOPEN_FOR_GPU_SECONDS):
            return
        self._end_session()
        pynvml.nvmlInit()
        self._opened_at = now
        self._error = None

    def _end_session(self) -> None:
        was_open = self._opened_at is not None
        self._opened_at = None
        self._gpu_gone = False
        self._cards.clear()
        if was_open:
            with suppress(Exception):  # a driver that fails often fails this too, and the next session needs none of it
                pynvml.nvmlShutdown()

    def _driver_failed(self, now: float, error: Exception) -> None:
        """The next reading opens a new session, unless one was tried within the last second."""
        tried_at = now if self._opened_at is None else self._opened_at
        self._retry_at = tried_at + REOPEN_SECONDS
        self._error = _sentence(error)
        self._end_session()

    # -- one GPU; the lock is held --

    def _read_gpu(self, index: int) -> GpuReading:
        try:
            card = self._card(index)
            memory, listing = _settled(card.handle)
        except _NVML_ERRORS as error:
            code = getattr(error, "value", None)
            if code in _DRIVER_WIDE:
                raise
            self._cards.pop(index, None)
            self._gpu_gone = self._gpu_gone or code in _GPU_GONE
            return self._unreadable(index, _sentence(error))
        return GpuReading(
            index=index,
            uuid=card.uuid,
            name=card.name,
            total_mib=memory.total_mib,
            used_mib=memory.used_mib,
            free_mib=memory.free_mib,
            processes=tuple(GpuProcess(pid, self._name(pid), mib, None) for pid, mib in sorted(listing.held.items())),
            processes_readable=listing.readable,
        )

    def _card(self, index: int) -> _Card:
        if index not in self._cards:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            card = _Card(handle, pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
            self._cards[index] = self._last_seen[index] = card
        return self._cards[index]

    def _unreadable(self, index: int, sentence: str) -> GpuReading:
        """A lost GPU may not even tell its UUID: it is still the one that was seen there last."""
        last = self._last_seen.get(index)
        uuid, name = (last.uuid, last.name) if last else (None, "")
        return GpuReading(index, uuid, name, total_mib=0, used_mib=0, free_mib=0, error=sentence)

    def _name(self, pid: int) -> str:
        """The driver's name with its path, asked once for each process."""
        started = started_ticks(pid)
        known = self._names.get(pid)
        if known is not None and known[0] == started:
            return known[1]
        name = _driver_name(pid) or _system_name(pid) or f"pid {pid}"
        if started is not None:
            self._names[pid] = (started, name)
        return name

    # -- without the lock --

    def _with_owners(self, seen: list[GpuReading]) -> tuple[GpuReading, ...]:
        """Each pid is asked for once, so that a reading never tells one process two owners."""
        owners: dict[int, str | None] = {}
        for process in (p for gpu in seen for p in gpu.processes):
            if process.pid not in owners:
                owners[process.pid] = self._owner(process.pid, process.name)
        return tuple(
            replace(
                gpu,
                processes=tuple(
                    GpuProcess(p.pid, last_component(p.name) or p.name, p.used_mib, owners[p.pid])
                    for p in gpu.processes
                ),
            )
            for gpu in seen
        )


def _settled(handle: Any) -> tuple[_Memory, _Listing]:
    """Memory and processes that belong together. NVML cannot tell both at one instant, so the order matters.

    1. List the processes.
    2. Read the memory.
    3. List the processes again. Nothing moved: (2) and (3) are of one state. Else (3) is the next (1), three times.
    4. Still moving: of each process the lower of the last two numbers, and the lowest free memory read.

    What is promised to a holder and not yet taken is ``declared - held``; a request fits in ``free - promised``.
    A process that grows between the two calls does this:

        t0  read the memory         free 10000
        t1  the process takes 4000
        t2  list the processes      held 4000     promised 4000 less, although free is from before: 4000 too many
                                                  are given away

    and in the other order a process that shrinks does it. Listing on both sides catches both. Where it does not
    settle, a held number that is too low is the safe side: the promise is then larger, and something waits.
    """
    before = _listing(handle)  # 1
    free_mib: list[int] = []
    while True:
        memory = _memory(handle)  # 2
        after = _listing(handle)  # 3
        if after == before:
            return memory, after
        free_mib.append(memory.free_mib)
        if len(free_mib) == _ROUNDS:
            return replace(memory, free_mib=min(free_mib)), _lower(before, after)  # 4
        before = after


def _lower(before: _Listing, after: _Listing) -> _Listing:
    """For each process of the later listing the lower number; one that was not there before held nothing."""
    held: dict[int, int | None] = {}
    for pid, mib in after.held.items():
        earlier = before.held.get(pid, 0)
        held[pid] = None if mib is None or earlier is None else min(mib, earlier)
    return _Listing(held, before.readable and after.readable)


def _memory(handle: Any) -> _Memory:
    """Free rounds down and used rounds up: a MiB that is not wholly free is not free."""
    try:
        told = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except _NVML_ERRORS as error:
        if getattr(error, "value", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND) not in _NO_MEMORY_V2:
            raise
        told = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return _Memory(total_mib=told.total // _MIB, free_mib=told.free // _MIB, used_mib=-(-told.used // _MIB))


def _listing(handle: Any) -> _Listing:
    """One pass over all lists. Readable: compute or graphics was told, and the other was told or does not exist.

    The list of MPS clients only adds to them: no MPS is the normal case, whatever the driver answers for it.
    """
    held: dict[int, int | None] = {}
    told = withheld = False
    for versions in _DECISIVE_LISTS:
        try:
            rows = _rows(handle, versions)
        except _NVML_ERRORS as error:
            _raise_if_grave(error)
            withheld = True
        else:
            told = told or rows is not None
            _merge(held, rows or [])
    try:
        _merge(held, _rows(handle, _MPS_LIST) or [])
    except _NVML_ERRORS as error:
        _raise_if_grave(error)
    return _Listing(held, told and not withheld)


def _raise_if_grave(error: Exception) -> None:
    if getattr(error, "value", None) in _DRIVER_WIDE | _GPU_GONE:
        raise error


def _merge(held: dict[int, int | None], rows: list[Any]) -> None:
    """A pid counts once, with the larger number; withheld in one list is withheld. Rounded down: see _settled."""
    for row in rows:
        mib = None if row.usedGpuMemory is None else row.usedGpuMemory // _MIB
        known = held.get(row.pid, 0)
        held[row.pid] = None if mib is None or known is None else max(mib, known)


def _rows(handle: Any, versions: tuple[str, ...]) -> list[Any] | None:
    """What the newest version of the call answers; None where this driver or GPU has no such list.

    The binding asks for the size and leaves room for twice as many and five; where even that was outgrown between
    its two calls, it is asked again.
    """
    for version in versions:
        call = getattr(pynvml, version, None)
        if call is None:
            continue
        for attempt in range(_ROUNDS):
            try:
                rows: list[Any] = call(handle)
            except pynvml.NVMLError as error:
                if error.value == pynvml.NVML_ERROR_INSUFFICIENT_SIZE and attempt + 1 < _ROUNDS:
                    continue
                if error.value not in _ABSENT:
                    raise
                break
            return rows
    return None


def _driver_name(pid: int) -> str:
    """Empty where the driver does not know it, as for a process of another pid namespace, or cannot spell it."""
    try:
        return str(pynvml.nvmlSystemGetProcessName(pid))
    except (*_NVML_ERRORS, UnicodeDecodeError):
        return ""


def _system_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, OSError, ValueError):
        return ""


def _sentence(error: Exception) -> str:
    """What an operator is told: the cause and, where there is one, the remedy."""
    code = getattr(error, "value", None)
    if code in _SENTENCES:
        return _SENTENCES[code]
    if isinstance(error, pynvml.NVMLError):
        return f"the NVIDIA driver answers: {error} (NVML code {code})"
    return f"the NVIDIA driver's library cannot be used: {type(error).__name__}: {error}"
