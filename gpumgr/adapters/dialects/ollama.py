"""ollama: every loaded model unloaded by name, graceful, and looked at again.

Facts (ollama 0.33, read and run 2026-08 to 2026-11): ``keep_alive: 0`` without a prompt answers 200 ``unload`` at
once; the memory comes back after the running answer. While a model loads, ``/api/ps`` hangs, or shows nothing and
the unload is forgotten: so it is asked again each second until the card shows the memory back. ``/api/ps`` may
leave out a busy model for a poll or two: gone from there proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, ClassVar

from gpumgr.adapters.dialects.http import REPORT_SECONDS, Http
from gpumgr.config import Call
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError


class Ollama(Http):
    ask_again_seconds: float | None = 1.0
    health_default: ClassVar[Call] = Call(path="/api/version")

    @property
    def can_unload(self) -> bool:
        return True

    def unload(self, within_seconds: float) -> None:
        if self._settings.unload.path is not None:
            super().unload(within_seconds)
            return
        until = time.monotonic() + within_seconds
        for model in self._models():
            left = max(0.1, min(5.0, until - time.monotonic()))
            body = {"model": model["name"], "keep_alive": 0}
            self._call(Call(method="POST", path="/api/generate", json=body), left)

    def loaded(self) -> LoadedReport | None:
        """A hanging ``/api/ps`` is a model that loads: loaded, size unknown."""
        if self._settings.loaded is not None:
            return super().loaded()
        try:
            models = self._models()
        except BackendError as error:
            if error.reason == "hung":
                return LoadedReport(loaded=True)
            raise
        used = sum(int(model.get("size_vram") or 0) for model in models)
        return LoadedReport(loaded=used > 0, used_mib=used // 2**20)

    def _models(self) -> list[Mapping[str, Any]]:
        answer = self._json("/api/ps", timeout_seconds=REPORT_SECONDS)
        models = answer.get("models") if isinstance(answer, Mapping) else None
        if models is None:
            return []
        if not all(isinstance(model, Mapping) and isinstance(model.get("name"), str) for model in models):
            raise BackendError("failed", "GET /api/ps: its answer has models without a name")
        return list(models)
