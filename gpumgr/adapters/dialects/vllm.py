"""vLLM: put to sleep and woken, and never put to sleep while it computes.

Facts (vLLM docs/features/sleep_mode.md and entrypoints/serve/.../sleep/api_router.py, read 2026-11; nothing of it ran):
``POST /sleep`` aborts running requests unless told otherwise (``mode=abort`` is its default; other modes wait on the
server's side, where our time limit could not end them), and its 200 is not freed memory (#47654, #32714). It is there
only with ``--enable-sleep-mode`` and ``VLLM_SERVER_DEV_MODE=1``. Level 1 keeps the weights in RAM, level 2 drops them,
so that waking needs ``reload_weights`` as well. Some 1 GB stays in the process. Names of the metrics: as dashboards of
the field use them.
"""

from __future__ import annotations

from typing import ClassVar

from gpumgr.adapters.dialects.http import LOAD_SECONDS, REPORT_SECONDS, Http
from gpumgr.adapters.dialects.wire import Answer
from gpumgr.config import Call, ConsumerSettings
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

SLEEP = Call(method="POST", path="/sleep?level=1")
WORKING = ("vllm:num_requests_running", "vllm:num_requests_waiting")
DEV_MODE = "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment and the flag --enable-sleep-mode"


class Vllm(Http):
    health_default: ClassVar[str | None] = "/health"
    proxy_path_default: ClassVar[str | None] = "/v1/chat/completions"
    usual_processes: ClassVar[tuple[str, ...]] = ("*/vllm", "VLLM::*")

    def __init__(self, settings: ConsumerSettings) -> None:
        super().__init__(settings)
        self.can_load = True

    @property
    def can_unload(self) -> bool:
        return True

    @property
    def cuts_work(self) -> bool:
        return True

    def unload(self, within_seconds: float) -> None:
        call = self._settings.unload if self._settings.unload.path is not None else SLEEP
        self._dev("POST", call.path or "/sleep", within_seconds)

    def load(self) -> None:
        """Wakes it, if it sleeps."""
        if self._settings.load is not None:
            super().load()
            return
        if self._sleeps() is not True:
            return
        self._dev("POST", "/wake_up", LOAD_SECONDS)
        if "level=2" in (self._settings.unload.path or ""):
            self._call(Call(path="/collective_rpc", json={"method": "reload_weights"}), LOAD_SECONDS)

    def busy(self) -> bool | None:
        if self._settings.busy is not None:
            return super().busy()
        try:
            return self._metrics("/metrics", WORKING, REPORT_SECONDS) > 0
        except BackendError as error:
            if "does not tell" in str(error):
                raise BackendError("failed", f"{error}: is vLLM started with --disable-log-stats?") from None
            raise

    def loaded(self) -> LoadedReport | None:
        if self._settings.loaded is not None:
            return super().loaded()
        return LoadedReport(loaded=self._sleeps() is not True)

    def _sleeps(self) -> bool | None:
        """None: without its developer mode it never sleeps, and does not say so either."""
        answer = self._send("GET", "/is_sleeping", timeout_seconds=REPORT_SECONDS)
        if answer.status == 404:
            return None
        told = answer.require().json()
        sleeps = told.get("is_sleeping") if isinstance(told, dict) else None
        if not isinstance(sleeps, bool):
            raise BackendError("failed", "GET /is_sleeping: it does not tell is_sleeping")
        return sleeps

    def _dev(self, method: str, path: str, within_seconds: float) -> Answer:
        answer = self._send(method, path, timeout_seconds=within_seconds)
        if answer.status == 404:
            raise BackendError("failed", f"{method} {path} answers 404: {DEV_MODE}")
        return answer.require()
