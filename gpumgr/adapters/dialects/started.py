"""A service that loading starts and unloading stops: what systemd, docker and command have in common.

Owns: when such a service counts as well, as stopped on purpose, and as started. Must not: know how it is started.

Its own server, where it has a ``url``, is asked with the calls of the generic dialect.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass

from gpumgr.adapters.dialects.http import LOAD_SECONDS, REPORT_SECONDS, Http
from gpumgr.config import ConsumerSettings
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

HEALTH_AGAIN_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class State:
    """What the service's keeper says of it. ``runs``: it has processes, or is about to. ``failed``: it ended by itself,
    and badly. ``said`` is for the sentence."""

    runs: bool
    said: str
    failed: bool = False
    starting: bool = False


class StartedService(Http):
    def __init__(self, settings: ConsumerSettings) -> None:
        super().__init__(settings)
        self.can_load = True
        self.load_starts_service = True
        self._put_down = False
        """We stopped it: many services call that a failure."""

    @property
    def can_unload(self) -> bool:
        return True

    def health(self) -> None:
        state = self._state(REPORT_SECONDS)
        if not state.runs:
            raise BackendError("failed", state.said, stopped=self._put_down or not state.failed)
        if state.starting or state.failed:
            raise BackendError("failed", state.said)
        if self._settings.url is not None:
            super().health()

    def unload(self, within_seconds: float) -> None:
        self._stop(within_seconds)
        self._put_down = True

    def load(self) -> None:
        """Returns when it serves: a process that runs may need a while until it listens."""
        within_seconds = (self._settings.load and self._settings.load.timeout_seconds) or LOAD_SECONDS
        until = time.monotonic() + within_seconds
        self._put_down = False
        self._start(within_seconds)
        while True:
            try:
                self.health()
            except BackendError as error:
                if error.stopped or not self._state(REPORT_SECONDS).runs:
                    raise BackendError("failed", f"it was started and ended again: {error}") from None
                if time.monotonic() >= until:
                    said = f"it was started and does not serve within {within_seconds:.3g} s: {error}"
                    raise BackendError("hung", said) from None
                time.sleep(HEALTH_AGAIN_SECONDS)
            else:
                return

    def loaded(self) -> LoadedReport | None:
        if self._settings.loaded is not None:
            return super().loaded()
        return LoadedReport(loaded=self._state(REPORT_SECONDS).runs)

    @abstractmethod
    def _state(self, within_seconds: float) -> State:
        """Raises: BackendError."""

    @abstractmethod
    def _stop(self, within_seconds: float) -> None:
        """Raises: BackendError."""

    @abstractmethod
    def _start(self, within_seconds: float) -> None:
        """Raises: BackendError."""
