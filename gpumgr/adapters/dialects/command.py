"""A service that programs of the operator unload, load and ask: argument lists, no shell, time limits.

``unload``, ``load`` and ``health`` have done it when they exit with 0; ``busy`` and ``loaded`` say yes with 0 and no
with 1, and anything else is a failure: a busy report that fails counts as busy. Where a call names a path instead of a
command, it is asked over HTTP as the generic dialect does. A load that starts the service says so
(``starts_service: true``).
"""

from __future__ import annotations

from gpumgr.adapters.dialects.http import LOAD_SECONDS, REPORT_SECONDS, Http
from gpumgr.adapters.dialects.programs import run
from gpumgr.adapters.dialects.started import StartedService, State
from gpumgr.config import Call, ConsumerSettings, Report
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError


class Command(StartedService):
    def __init__(self, settings: ConsumerSettings) -> None:
        super().__init__(settings)
        self.can_load = settings.load is not None
        self.load_starts_service = settings.load is not None and settings.load.starts_service
        self._put_down = self.load_starts_service
        """Nobody says that it runs until we have started it, or it passes its health check."""

    @property
    def can_unload(self) -> bool:
        return bool(self._settings.unload.command) or self._settings.unload.path is not None

    def health(self) -> None:
        try:
            self._ask_health()
        except BackendError as error:
            stopped = self.load_starts_service and self._put_down
            raise BackendError(error.reason, str(error), refused=error.refused, stopped=stopped) from None
        self._put_down = False

    def load(self) -> None:
        if self.load_starts_service:
            super().load()
        elif self._settings.load is not None:
            self._start(self._settings.load.timeout_seconds or LOAD_SECONDS)

    def busy(self) -> bool | None:
        return None if self._settings.busy is None else self._says(self._settings.busy)

    def loaded(self) -> LoadedReport | None:
        return None if self._settings.loaded is None else LoadedReport(loaded=self._says(self._settings.loaded))

    def _ask_health(self) -> None:
        call = self._settings.health
        if call.command:
            run(call.command, call.timeout_seconds or REPORT_SECONDS).require()
        elif self._settings.url is not None:
            Http.health(self)

    def _says(self, report: Report) -> bool:
        if not report.command:
            return self._ask(report)
        ended = run(report.command, report.timeout_seconds)
        return False if ended.code == 1 else ended.require().code == 0

    def _state(self, within_seconds: float) -> State:  # noqa: ARG002 - its own limits hold
        return State(runs=not self._put_down, said="it does not run")

    def _stop(self, within_seconds: float) -> None:
        self._do(self._settings.unload, within_seconds)

    def _start(self, within_seconds: float) -> None:
        if self._settings.load is not None:
            self._do(self._settings.load, within_seconds)

    def _do(self, call: Call, within_seconds: float) -> None:
        if call.command:
            run(call.command, within_seconds).require()
        else:
            Http.unload(self, within_seconds) if call is self._settings.unload else self._call(call, within_seconds)
