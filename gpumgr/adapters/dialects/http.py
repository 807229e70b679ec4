"""The generic dialect: health, unload, load and reports as the configuration writes them.

Owns: which call is which. The other dialects build on it and bring their own calls; what the file says still wins.
Must not: watch the card or decide anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, ClassVar

from gpumgr.adapters.dialects import answers
from gpumgr.adapters.dialects.wire import Answer, send
from gpumgr.config import Call, ConsumerSettings, Each, Report
from gpumgr.core.following import Work
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

REPORT_SECONDS = 2.0
LOAD_SECONDS = 60.0
EACH_SECONDS = 5.0
"""One of many unloads; LocalAI waits up to 30 s for a model that computes, and is asked again."""


class Http:
    ask_again_seconds: float | None = 2.0
    health_default: ClassVar[str | None] = None
    proxy_path_default: ClassVar[str | None] = None
    free_paths_default: ClassVar[tuple[str, ...]] = ()
    """What callers may have without the GPU (config/free_paths.py): it never loads anything onto the card."""
    usual_processes: ClassVar[tuple[str, ...]] = ()
    """Patterns of its processes, for a file that says nothing of them (ownership.py)."""
    strips_headers: ClassVar[frozenset[str]] = frozenset()
    """Headers of a proxied call that the server must not see, in small letters."""

    def __init__(self, settings: ConsumerSettings) -> None:
        self._settings = settings
        self.can_load = settings.load is not None
        self.load_starts_service = False

    @property
    def cuts_work(self) -> bool:
        return self._settings.unload.cuts_work

    @property
    def can_unload(self) -> bool:
        return self._settings.unload.path is not None

    def health(self) -> None:
        """Any answer below 300; without a configured path, any answer below 500 to ``/``."""
        call = self._settings.health
        path = call.path or self.health_default
        answer = self._send("GET", path or "/", timeout_seconds=call.timeout_seconds or REPORT_SECONDS)
        if path is not None:
            answer.require()
        elif answer.status >= 500:
            raise BackendError("failed", f"{answer.asked} answers {answer.status}")

    def unload(self, within_seconds: float) -> None:
        call = self._settings.unload
        if call.for_each is None:
            self._call(call, within_seconds)
            return
        until = time.monotonic() + within_seconds
        items = self._items(call.for_each, min(REPORT_SECONDS, within_seconds))
        self._call_each((answers.filled(call, item) for item in items), until)

    def load(self) -> None:
        if self._settings.load is not None:
            self._call(self._settings.load, self._settings.load.timeout_seconds or LOAD_SECONDS)

    @property
    def can_restore(self) -> bool:
        return self.can_load

    def restore(self) -> None:
        self.load()

    def loaded(self) -> LoadedReport | None:
        return None if self._settings.loaded is None else LoadedReport(loaded=self._ask(self._settings.loaded))

    def busy(self) -> bool | None:
        return None if self._settings.busy is None else self._ask(self._settings.busy)

    def interrupt(self) -> None:
        """There is no such call that all servers know."""

    def begins_work(self, method: str, path: str) -> bool:  # noqa: ARG002
        return False

    def work_begun(self, status: int, body: bytes) -> Work | None:  # noqa: ARG002
        return None

    def is_done(self, work: Work) -> bool | None:  # noqa: ARG002
        return None

    # -- calls ----------------------------------------------------------------------------------------------

    def _call(self, call: Call, within_seconds: float) -> Answer:
        answer = self._send(call.method or "POST", call.path or "/", body=call.json, timeout_seconds=within_seconds)
        return answer.require()

    def _call_each(self, calls: Iterable[Call], until: float) -> None:
        """Every one, also where one fails. Raises: BackendError, the first of them."""
        failure: BackendError | None = None
        for call in calls:
            try:
                self._call(call, max(0.1, min(EACH_SECONDS, until - time.monotonic())))
            except BackendError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _items(self, each: Each, within_seconds: float) -> list[str]:
        return answers.items(each, self._json(each.path, timeout_seconds=within_seconds))

    def _ask(self, report: Report) -> bool:
        """Whether what the report's answer says is what its condition wants."""
        path = report.path or "/"
        if report.metrics:
            return answers.holds(report, self._metrics(path, report.metrics, report.timeout_seconds))
        return answers.holds(report, answers.at(report, self._json(path, timeout_seconds=report.timeout_seconds)))

    def _metrics(self, path: str, names: Iterable[str], timeout_seconds: float) -> float:
        """The sum of these metrics over all their labels."""
        text = self._send("GET", path, timeout_seconds=timeout_seconds).require().body.decode(errors="replace")
        return answers.metrics(text, tuple(names), path)

    def _json(self, path: str, *, timeout_seconds: float) -> Any:
        return self._send("GET", path, timeout_seconds=timeout_seconds).require().json()

    def _send(self, method: str, path: str, *, body: Any = None, timeout_seconds: float) -> Answer:
        url, headers = self._settings.url, self._settings.headers
        if url is None:  # the configuration sees to it that nothing is asked there
            raise BackendError("failed", f"{method} {path}: {self._settings.name} has no url")
        return send(method, url, path, body=body, headers=headers, timeout_seconds=timeout_seconds)
