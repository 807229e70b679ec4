"""The simulated services as real processes: each has a pid, a port and a parent that /proc can tell.

Owns: starting and ending them, and ollama's runner in a process of its own. Must not: be kinder than the simulation.

``python -m tests.services NAME --card DIR --library FILE`` serves until its standard input ends: so it also ends when
the test that started it is gone. Its one line on stdout is its address.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from gpumgr.sim.comfyui import ComfyUI
from gpumgr.sim.memory import ProcessMemory
from gpumgr.sim.ollama import Ollama
from gpumgr.sim.service import SimulatedService
from gpumgr.sim.speech import Speech
from gpumgr.sim.stage import MODEL, RESIDENT_MIB
from tests.brokers import ROOT
from tests.driver_card import DriverCard

END_SECONDS = 10.0


class ChildProcess:
    """A process of this test, or of a service, that ends with whoever started it."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """The next one it says; empty once it has ended."""
        return "" if self.process.stdout is None else self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate(timeout=END_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()


class Sleeper(ChildProcess):
    """Does nothing, and its command line ends with ``words``: a game, or where a service computes."""

    def __init__(self, *words: str) -> None:
        super().__init__(sys.executable, "-c", "import sys; sys.stdin.read()", *words)


class ServerProcess(ChildProcess):
    """A module of the tests that computes on the card and says its address once it serves. Several start side by side:
    only who asks for an address waits."""

    def __init__(self, module: str, card: DriverCard, *words: str) -> None:
        places = ("--card", str(card.directory), "--library", str(card.library))
        super().__init__(sys.executable, "-m", module, *words, *places)

    @cached_property
    def url(self) -> str:
        """Empty where it does not come up; its stderr tells why."""
        return self.line()


class ServiceProcess(ServerProcess):
    """``worker`` is the process whose memory it takes, where that is not its own."""

    def __init__(self, name: str, card: DriverCard, worker: ChildProcess | None = None) -> None:
        super().__init__("tests.services", card, name, *([] if worker is None else ["--worker", str(worker.pid)]))


class OllamaWithRunner(Ollama):
    """As the real one: its model is in a child process, which ends when the model is unloaded. One model at a time."""

    card: DriverCard

    def _load(self, part: str, mib: int) -> None:
        self._runner = Sleeper("runner", "--model", part)
        self.card.admit(self._runner.pid)
        self._memory = ProcessMemory(self.card, self._runner.pid, self.gpu, self.context_mib, self._gone)
        super()._load(part, mib)

    def _unload(self, part: str) -> None:
        super()._unload(part)
        self.card.end_process(self._runner.pid)
        self._runner.end()


SERVICES: dict[str, Callable[[DriverCard], SimulatedService]] = {
    "comfyui": lambda card: ComfyUI("comfyui", card, resident_mib=RESIDENT_MIB["comfyui"]),
    "mvoice": lambda card: Speech("mvoice", card, resident_mib=RESIDENT_MIB["mvoice"]),
    "whisper": lambda card: Speech("whisper", card, resident_mib=RESIDENT_MIB["whisper"]),
    "ollama": lambda card: Ollama("ollama", card, models={MODEL: RESIDENT_MIB["ollama"]}),
    "ollama-with-runner": lambda card: OllamaWithRunner("ollama", card, models={MODEL: RESIDENT_MIB["ollama"]}),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.services")
    parser.add_argument("name", choices=SERVICES)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--worker", type=int, help="the pid whose memory it takes; default: its own")
    chosen = parser.parse_args()
    with SERVICES[chosen.name](DriverCard(chosen.library, chosen.card, chosen.worker)) as service:
        sys.stdout.write(f"{service.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
