"""A probe that never keeps anybody waiting for a driver that hangs.

Owns: the thread that asks the driver (``read-card``), and for how long the others wait for it. Must not: look into a
reading.

A call into a driver that hangs cannot be ended. Made on a preparation's own thread it would take that GPU's preparation
with it; here everybody else is told that the card cannot be read, which is the same as any other unreadable card, until
the driver answers again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from gpumgr.core.card import Reading

READ_SECONDS = 5.0
"""Opening a session of NVML wakes a card that nobody uses, which may take a second or two without persistence mode."""


class Driver(Protocol):
    """A probe that may hang."""

    def read(self) -> Reading: ...

    def close(self) -> None: ...


class PatientProbe:
    """Implements ``Probe`` around another one. Readers that ask at one time share a reading that began after they did.

    The thread starts with the first reading, not before: gunicorn forks.
    """

    def __init__(
        self, probe: Driver, limit_seconds: float = READ_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe = probe
        self._limit_seconds = limit_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._asked = 0
        self._began_at: float | None = None
        self._answered = 0
        self._reading = Reading(float("-inf"), error="the card was not read yet")
        self._thread: threading.Thread | None = None
        self._closed = False

    def read(self, at_most_seconds: float | None = None) -> Reading:
        """Never raises. Waits for at most ``limit_seconds``, or less where that is asked for, counted from the
        beginning of the call that hangs."""
        asked_at = self._clock()
        limit_seconds = self._limit_seconds if at_most_seconds is None else min(self._limit_seconds, at_most_seconds)
        with self._lock:
            self._start()
            self._asked += 1
            ticket = self._asked
            self._wanted.notify()
            while self._answered < ticket:
                since = asked_at if self._began_at is None else min(asked_at, self._began_at)
                left = since + limit_seconds - self._clock()
                if left <= 0:
                    hung = self._clock() - since
                    return Reading(
                        asked_at, error=f"the NVIDIA driver does not answer, for {hung:.0f} s now: see dmesg"
                    )
                self._done.wait(left)
            return self._reading

    def close(self) -> None:
        """End the thread and close the probe. A driver that hangs keeps its thread, which ends with the process."""
        with self._lock:
            self._closed = True
            self._wanted.notify()
        thread = self._thread
        if thread is not None:
            thread.join(1.0)
        if thread is None or not thread.is_alive():
            self._probe.close()

    def _start(self) -> None:
        self._closed = False
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="read-card", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._began_at = None
                while self._answered == self._asked:
                    if self._closed:
                        return
                    self._wanted.wait()
                serves = self._asked
                self._began_at = self._clock()
            reading = self._probe.read()
            with self._lock:
                self._reading = reading
                self._answered = serves
                self._done.notify_all()
