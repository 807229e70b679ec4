"""The stand-in driver from Python: compile it, say what the card holds, load it.

Owns: the compiler call and the state file, whose format stands at the top of nvml.c. Must not: know gpumgr.

    library = build(directory)
    driver = StandInDriver(library, directory / "card")
    driver.gpus[0].total_mib = 16_384
    driver.processes = [Process(pid=4711, mib=9_000, name="/usr/bin/game")]
    driver.write()                                        # free follows from the processes, unless it is set
    subprocess.run(..., env=os.environ | driver.env())    # or: with driver.in_process(): ...
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pynvml
import pytest

SONAME = "libnvidia-ml.so.1"
STATE_VARIABLE = "GPUMGR_STAND_IN_NVML"

Kind = Literal["compute", "graphics", "mps"]


class NoCompiler(RuntimeError):
    """There is no ``cc`` here to build the stand-in with."""


def build(directory: Path) -> Path:
    """Compile the library into ``directory`` and return its path. What is there and up to date is kept.

    The directory holds nothing else by this name, so that it can go into LD_LIBRARY_PATH.

    Raises: NoCompiler.
    """
    source, library = Path(__file__).with_name("nvml.c"), directory / SONAME
    if library.exists() and library.stat().st_mtime >= source.stat().st_mtime:
        return library
    if shutil.which("cc") is None:
        raise NoCompiler("the stand-in driver needs a C compiler: install gcc or clang, so that `cc` is found")
    directory.mkdir(parents=True, exist_ok=True)
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC", f"-Wl,-soname,{SONAME}"]
    fresh = directory / f"{SONAME}.{os.getpid()}"
    subprocess.run(["cc", *flags, "-o", fresh, source], check=True)
    fresh.replace(library)
    return library


def build_or_skip(directory: Path) -> Path:
    """``build`` for a session fixture. Without a compiler tests skip, except where CI promises one."""
    try:
        return build(directory)
    except NoCompiler as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@dataclass
class Process:
    """``mib`` None: the driver withholds it. A pid may be listed twice, under two kinds or on two GPUs."""

    pid: int
    mib: float | None
    kind: Kind = "compute"
    gpu: int = 0
    name: str = ""


@dataclass
class Gpu:
    """One card. ``free_mib`` None: what the processes and the reserve leave; ``used_mib`` None: what is not free."""

    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    name: str = "Stand-in GPU"
    total_mib: float = 24_576
    free_mib: float | None = None
    used_mib: float | None = None
    reserved_mib: float = 0
    memory_v2: int = 0
    memory_error: int = 0
    handle_error: int = 0
    list_errors: dict[Kind, int] = field(default_factory=dict)


@dataclass
class Step:
    """What the next call of each kind sees: other processes, and free memory by GPU where it differs."""

    processes: list[Process] = field(default_factory=list)
    free_mib: dict[int, float] = field(default_factory=dict)


class StandInDriver:
    """The state of the driver. Change the attributes, then ``write()``; every call of the library reads it anew.

    Codes are NVML's (``pynvml.NVML_ERROR_...``), 0 for success. ``then`` holds the steps after the first: a card
    that changes between two calls of one reading.
    """

    def __init__(
        self, library: Path, state_file: Path, gpus: Sequence[Gpu] = (), processes: Sequence[Process] = ()
    ) -> None:
        self.library = library
        self.state_file = state_file
        self.gpus: list[Gpu] = list(gpus) or [Gpu()]
        self.processes: list[Process] = list(processes)
        self.then: list[Step] = []
        self.init = 0
        self.session = 1
        self.version = "580.95.05"
        self.delay_ms = 0
        self.understate = 0
        self.missing: list[str] = []
        self.write()

    def write(self) -> None:
        """Put the state in place at once: no call sees half of it. The steps start from the first again."""
        fresh = self.state_file.with_name(f"{self.state_file.name}.new")
        fresh.write_text("".join(f"{line}\n" for line in self._lines()), encoding="utf-8")
        fresh.replace(self.state_file)

    def remove(self) -> None:
        """Take the driver away: its library stays and answers that it is not loaded."""
        self.state_file.unlink()

    @property
    def log(self) -> list[str]:
        """Every nvmlInit and nvmlShutdown so far with its result: ``init 0``, ``shutdown 0``."""
        file = self.state_file.with_name(f"{self.state_file.name}.log")
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def env(self) -> dict[str, str]:
        """What a subprocess needs to find this driver instead of the machine's. Add it to os.environ."""
        path = [str(self.library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        return {"LD_LIBRARY_PATH": ":".join(filter(None, path)), STATE_VARIABLE: str(self.state_file)}

    @contextmanager
    def in_process(self) -> Iterator[None]:
        """Let pynvml of this very process speak to this driver, and leave no trace of it afterwards.

        pynvml keeps the library and its functions in two globals; they are exchanged, because a library that was
        once loaded by its name cannot be loaded from elsewhere.
        """
        kept = pynvml.nvmlLib, pynvml._nvmlGetFunctionPointer_cache, os.environ.get(STATE_VARIABLE)
        pynvml.nvmlLib, pynvml._nvmlGetFunctionPointer_cache = ctypes.CDLL(str(self.library)), {}
        os.environ[STATE_VARIABLE] = str(self.state_file)
        try:
            yield
        finally:
            pynvml.nvmlLib, pynvml._nvmlGetFunctionPointer_cache, before = kept
            if before is None:
                del os.environ[STATE_VARIABLE]
            else:
                os.environ[STATE_VARIABLE] = before

    # -- the state file; its format stands at the top of nvml.c --

    def _lines(self) -> Iterator[str]:
        yield f"revision {time.monotonic_ns()}"
        yield f"init {self.init}"
        yield f"session {self.session}"
        yield f"driver {self.version}"
        yield f"delay_ms {self.delay_ms}"
        yield f"understate {self.understate}"
        yield from (f"missing {function}" for function in self.missing)
        steps = [Step(self.processes), *self.then]
        names = {p.pid: p.name for step in steps for p in step.processes if p.name}
        yield from (f"process_name {pid} {name}" for pid, name in names.items())
        for index, gpu in enumerate(self.gpus):
            yield from _gpu_lines(gpu)
            for number, step in enumerate(steps):
                if number:
                    yield "then"
                yield from _step_lines(index, gpu, step)


def _gpu_lines(gpu: Gpu) -> Iterator[str]:
    yield f"gpu {gpu.uuid}"
    yield f"name {gpu.name}"
    yield f"handle_error {gpu.handle_error}"
    yield f"memory_v2 {gpu.memory_v2}"
    yield f"memory_error {gpu.memory_error}"
    yield from (f"list_error {kind} {code}" for kind, code in gpu.list_errors.items())


def _step_lines(index: int, gpu: Gpu, step: Step) -> Iterator[str]:
    here = [p for p in step.processes if p.gpu == index]
    free = step.free_mib.get(index, gpu.free_mib)
    if free is None:
        free = max(0, gpu.total_mib - gpu.reserved_mib - _held(here))
    used = gpu.total_mib - gpu.reserved_mib - free if gpu.used_mib is None else gpu.used_mib
    yield f"memory {gpu.total_mib} {free} {used} {gpu.reserved_mib}"
    yield from (f"process {p.kind} {p.pid} {'N/A' if p.mib is None else p.mib}" for p in here)


def _held(processes: list[Process]) -> float:
    """Each pid once: a process that renders and computes has its whole memory in both lists."""
    held: dict[int, float] = {}
    for process in processes:
        held[process.pid] = max(held.get(process.pid, 0), process.mib or 0)
    return sum(held.values())
