"""llama.cpp's llama-server as a router: every loaded model unloaded by name, and never while one of them computes.

Facts (llama.cpp b11434, run 2026-11; tools/server/README.md, read 2026-11): ``POST /models/unload`` answers before it
takes effect (14 to 27 ms), and **cuts a stream that runs**. ``GET /models`` tells each model's state; one that sleeps
(``--sleep-idle-seconds``) has given its memory back. ``/metrics`` is passed on to the model's own server and does not
wake it, but is there only with ``--metrics``; ``/slots`` does wake it, so that it is asked of models that are awake
alone. Both would load a model that has gone meanwhile: ``autoload=false``. A server with one model (``-m``) lists it
without a state, and has no unload.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar
from urllib.parse import quote

from gpumgr.adapters.dialects import answers
from gpumgr.adapters.dialects.http import REPORT_SECONDS, Http
from gpumgr.config import Call
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

WORKING = ("llamacpp:requests_processing", "llamacpp:requests_deferred")
SINGLE = "llama-server serves one model (-m), which it cannot unload: start it as a router, without a model"
NO_METRICS = (404, 501)
"""501 without ``--metrics``; 404 where its model has gone meanwhile."""


class LlamaServer(Http):
    health_default: ClassVar[str | None] = "/health"
    proxy_path_default: ClassVar[str | None] = "/v1/chat/completions"
    usual_processes: ClassVar[tuple[str, ...]] = ("*/llama-server",)

    @property
    def can_unload(self) -> bool:
        return True

    @property
    def cuts_work(self) -> bool:
        return True

    def unload(self, within_seconds: float) -> None:
        if self._settings.unload.path is not None:
            super().unload(within_seconds)
            return
        until = time.monotonic() + within_seconds
        states = self._states(min(REPORT_SECONDS, within_seconds))
        if states is None:
            raise BackendError("failed", f"{SINGLE}; or let systemd, docker or command stop and start it")
        loaded = [name for name, state in states.items() if state in ("loaded", "loading")]
        self._call_each((Call(method="POST", path="/models/unload", json={"model": name}) for name in loaded), until)

    def busy(self) -> bool | None:
        """A model that loads is somebody's who waits for it; one that sleeps computes nothing."""
        if self._settings.busy is not None:
            return super().busy()
        states = self._states(REPORT_SECONDS)
        if states is None:
            return self._computes(None)
        if "loading" in states.values():
            return True
        return any(self._computes(name) for name, state in states.items() if state == "loaded")

    def loaded(self) -> LoadedReport | None:
        if self._settings.loaded is not None:
            return super().loaded()
        states = self._states(REPORT_SECONDS)
        if states is None:
            return LoadedReport(loaded=True)
        return LoadedReport(loaded=any(state in ("loaded", "loading") for state in states.values()))

    def _states(self, within_seconds: float) -> dict[str, str] | None:
        """Each model's state; None: a server with one model."""
        answer = self._json("/models", timeout_seconds=within_seconds)
        try:
            listed = answer["data"]
            if listed and all("status" not in model for model in listed):
                return None
            return {str(model["id"]): str(model["status"]["value"]) for model in listed}
        except (LookupError, TypeError):
            raise BackendError("failed", "GET /models: its answer is not a list of models") from None

    def _computes(self, model: str | None) -> bool:
        """``model`` None: the only one there is."""
        which = "" if model is None else f"?model={quote(model, safe='')}&autoload=false"
        answer = self._send("GET", f"/metrics{which}", timeout_seconds=REPORT_SECONDS)
        if answer.status not in NO_METRICS:
            text = answer.require().body.decode(errors="replace")
            return answers.metrics(text, WORKING, "/metrics") > 0
        answer = self._send("GET", f"/slots{which}", timeout_seconds=REPORT_SECONDS)
        return _any_slot_works(answer.require().json())


def _any_slot_works(slots: Any) -> bool:
    try:
        return any(bool(slot["is_processing"]) for slot in slots)
    except (LookupError, TypeError):
        raise BackendError("failed", "GET /slots: its answer is not a list of slots") from None
