"""The simulated card, read as a driver is read.

Owns: turning a card's state (JSON) into a ``Reading``. Must not: change the card, or know who simulates it.

A state that is missing, late or garbled is told in the reading's ``error``: unreadable is not zero.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from gpumgr.core.card import GpuProcess, GpuReading, Reading


def read_card_file(
    path: Path, default_total_mib: int = 24000, indexes: Iterable[int] = (0,)
) -> Callable[[], Mapping[str, object]]:
    """A source for ``SimulatedProbe``: the file that a simulated card writes.

    Before that file exists the card is one unused GPU for each of ``indexes``, so that the broker may be started
    first, or without any simulation beside it.
    """
    bare: dict[str, object] = {"uuid": None, "name": "Simulated GPU", "total_mib": default_total_mib, "processes": []}
    empty: dict[str, object] = {"gpus": [{"index": index, **bare} for index in indexes]}

    def read() -> Mapping[str, object]:
        try:
            with open(path, "rb", buffering=0) as file:  # half the time of read_text
                text = file.read()
        except FileNotFoundError:
            return empty
        return _mapping(json.loads(text), "the card")

    return read


class SimulatedProbe:
    """``owner_of_port`` names the consumer behind each listening port; a process with no such port is untracked."""

    def __init__(
        self,
        source: Callable[[], Mapping[str, object]],
        owner_of_port: Mapping[int, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._owner_of_port = owner_of_port
        self._clock = clock

    def read(self, at_most_seconds: float | None = None) -> Reading:  # noqa: ARG002 - a file does not keep anybody waiting
        """Never raises."""
        # Before the look, as a reading may only be older than it says, never newer: whoever waits for memory
        # to fall would else take what was seen before the unload for what came after it.
        read_at = self._clock()
        try:
            state = _mapping(self._source(), "the card")
            unreadable = state.get("unreadable")
            if unreadable is not None:
                return Reading(read_at, error=str(unreadable))
            return Reading(read_at, tuple(self._gpu(entry) for entry in _list(state.get("gpus"), "gpus")))
        except Exception as wrong:  # whatever the source does, a probe answers
            return Reading(read_at, error=f"the simulated card cannot be read: {type(wrong).__name__}: {wrong}")

    def close(self) -> None:
        """Nothing is held open between two reads."""

    def _gpu(self, entry: object) -> GpuReading:
        gpu = _mapping(entry, "a gpu")
        index, name, uuid = _number(gpu.get("index"), "index"), str(gpu.get("name", "")), gpu.get("uuid")
        named = None if uuid is None else str(uuid)
        if gpu.get("error") is not None:
            return GpuReading(index, named, name, 0, 0, 0, processes_readable=False, error=str(gpu["error"]))
        processes = tuple(self._process(listed) for listed in _list(gpu.get("processes"), "processes"))
        total = _number(gpu.get("total_mib"), "total_mib")
        used = _used(gpu, processes)
        if used > total:
            raise ValueError(f"GPU {index} uses {used} of {total} MiB")
        return GpuReading(
            index, named, name, total, used, total - used, processes, gpu.get("processes_readable") is not False
        )

    def _process(self, entry: object) -> GpuProcess:
        process = _mapping(entry, "a process")
        used, port = process.get("used_mib"), process.get("port")
        return GpuProcess(
            pid=_number(process.get("pid"), "pid"),
            name=str(process.get("name", "")),
            used_mib=None if used is None else _number(used, "used_mib"),
            consumer=None if port is None else self._owner_of_port.get(_number(port, "port")),
        )


def _used(gpu: Mapping[str, object], processes: tuple[GpuProcess, ...]) -> int:
    """The GPU's own word; the processes' sum where it says none and all of them are told."""
    if gpu.get("used_mib") is not None:
        return _number(gpu["used_mib"], "used_mib")
    told = [process.used_mib for process in processes if process.used_mib is not None]
    if len(told) < len(processes) or gpu.get("processes_readable") is False:
        raise ValueError("the gpu has no used_mib, and not all of its processes tell theirs")
    return sum(told)


def _mapping(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} is {type(value).__name__}, not an object")
    return value


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"{what} is {type(value).__name__}, not a list")
    return value


def _number(value: object, what: str) -> int:
    # bool is an int to Python, but not in JSON.
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{what} is {value!r}, not a whole number")
    return value
