"""What is done to the broker while callers use it: it is killed, stopped for a moment, and told to begin anew.

Owns: the faults, and seeing that the broker serves again. Must not: choose when to stop; know callers.
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tests.brokers import RunningBroker
from tests.torture.history import Fault, boot_ns
from tests.waiting import until

BACK_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Moods:
    """How often, and how likely each fault is."""

    every_seconds: tuple[float, float] = (1.1, 2.9)
    weights: tuple[float, float, float, float, float] = (0.25, 0.1, 0.25, 0.2, 0.2)


class Nemesis:
    def __init__(self, broker: RunningBroker, arguments: Sequence[str], moods: Moods, seed: int) -> None:
        """``arguments`` start the broker again as it was started."""
        self._broker = broker
        self._arguments = arguments
        self._moods = moods
        self._draw = random.Random(seed)  # noqa: S311 - a workload, not a secret
        self._faults: list[tuple[str, Callable[[], None]]] = [
            ("kill master and worker", self._kill_both),
            ("kill master", self._kill_master),
            ("kill worker", self._kill_worker),
            ("stop", self._pause),
            ("hang up", self._hang_up),
        ]

    def wait(self, over: threading.Event) -> bool:
        """Until the next fault is due; False where the run is over before that."""
        return not over.wait(self._draw.uniform(*self._moods.every_seconds))

    def strike(self) -> Fault:
        """Returns when the broker serves again."""
        ((kind, strike),) = self._draw.choices(self._faults, self._moods.weights)
        inv_ns = boot_ns()
        strike()
        until(self._serves, BACK_SECONDS)
        return Fault(kind, inv_ns, boot_ns())

    def _kill_both(self) -> None:
        _kill(self._broker.worker_pid(), signal.SIGKILL)
        self._kill_master()

    def _kill_master(self) -> None:
        """Its worker must not outlive it: two brokers would grant one card."""
        process = self._broker.process
        if process is None:
            raise AssertionError("the broker was never started")
        process.kill()
        process.wait(BACK_SECONDS)
        self._broker.start(*self._arguments, wait=False)

    def _kill_worker(self) -> None:
        worker = self._broker.worker_pid()
        _kill(worker, signal.SIGKILL)
        self._wait_for_another(worker)

    def _pause(self) -> None:
        worker = self._broker.worker_pid()
        _kill(worker, signal.SIGSTOP)
        time.sleep(self._draw.uniform(0.2, 1.0))  # this is the fault
        _kill(worker, signal.SIGCONT)

    def _hang_up(self) -> None:
        worker = self._broker.worker_pid()
        if self._broker.process is not None:
            self._broker.process.send_signal(signal.SIGHUP)
        self._wait_for_another(worker)
        until(lambda: not Path(f"/proc/{worker}").exists(), BACK_SECONDS)  # until then it may answer for the new one

    def _wait_for_another(self, worker: int) -> None:
        until(lambda: self._broker.worker_pid() != worker, BACK_SECONDS)

    def _serves(self) -> bool:
        """On a connection of its own: one that is kept alive may still lead to the old worker."""
        process = self._broker.process
        if process is None or process.poll() is not None:
            raise AssertionError(f"the broker did not come back:\n{self._broker.log()[-3000:]}")
        try:
            with closing(http.client.HTTPConnection("127.0.0.1", self._broker.port, timeout=2)) as connection:
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def _kill(pid: int, sig: signal.Signals) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        return  # a worker that has just died by itself: of the last fault, or with its master
