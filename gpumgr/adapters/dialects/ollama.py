"""ollama: every loaded model unloaded by name, graceful, and looked at again.

Facts (ollama 0.33, read and run 2026-08 to 2026-11): ``keep_alive: 0`` without a prompt answers 200 ``unload`` at
once; the memory comes back after the running answer. While a model loads, ``/api/ps`` hangs, or shows nothing and
the unload is forgotten: so it is asked again each second until the card shows the memory back. ``/api/ps`` may
leave out a busy model for a poll or two: gone from there proves nothing.
"""

from __future__ import annotations

import time
from typing import ClassVar, TypedDict

from gpumgr.adapters.dialects.http import LOAD_SECONDS, REPORT_SECONDS, Http
from gpumgr.config import Call, ConsumerSettings
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

UNLOAD_SECONDS = 5.0
SAME_UNLOAD_SECONDS = 2 * UNLOAD_SECONDS
"""A call that comes so soon after another one is part of the same unload."""
FLICKERS = 2
"""So many polls in a row were seen to leave out a model that was busy."""
FLICKER_SECONDS = 0.05


class _Model(TypedDict):
    name: str
    size_vram: int


class Ollama(Http):
    ask_again_seconds: float | None = 1.0
    health_default: ClassVar[str | None] = "/api/version"
    proxy_path_default: ClassVar[str | None] = "/api/chat"
    free_paths_default: ClassVar[tuple[str, ...]] = (
        *("GET /api/tags", "GET /api/ps", "GET /api/version", "POST /api/show"),
        *("GET /v1/models", "GET /v1/models/*"),
    )
    usual_processes: ClassVar[tuple[str, ...]] = ("*/ollama", "*/ollama_llama_server")
    """A runner is started by its whole path: its own, or until 0.5 that of a server beside it."""

    def __init__(self, settings: ConsumerSettings) -> None:
        super().__init__(settings)
        self._unloaded: list[str] = []
        """What the last unload took from the card, by name."""
        self._asked_at = float("-inf")

    @property
    def can_unload(self) -> bool:
        return True

    @property
    def can_restore(self) -> bool:
        return self.can_load or bool(self._unloaded)

    def restore(self) -> None:
        """A request without a prompt loads a model (docs/api.md of ollama, "Load a model"). One that says no, as it was
        removed meanwhile or only embeds, keeps none of the others away. Raises: BackendError where nothing loads."""
        if self.can_load:
            self.load()
            return
        refusals: list[BackendError] = []
        names = list(self._unloaded)
        for name in names:
            try:
                self._call(Call(method="POST", path="/api/generate", json={"model": name}), LOAD_SECONDS)
            except BackendError as error:
                if error.reason != "failed":
                    raise
                refusals.append(error)
        if refusals and len(refusals) == len(names):
            raise refusals[0]

    def unload(self, within_seconds: float) -> None:
        """Every model is asked for, also where one fails: a name removed while it is loaded is a 404."""
        if self._settings.unload.path is not None:
            super().unload(within_seconds)
            return
        until = time.monotonic() + within_seconds
        failure: BackendError | None = None
        models = self._models(min(REPORT_SECONDS, within_seconds))
        again = time.monotonic() - self._asked_at < SAME_UNLOAD_SECONDS
        self._asked_at = time.monotonic()
        if models:  # asked again it lists only what has not gone yet
            before = self._unloaded if again else []
            self._unloaded = list(dict.fromkeys([*before, *(model["name"] for model in models)]))
        for model in models:
            body = {"model": model["name"], "keep_alive": 0}
            left = max(0.1, min(UNLOAD_SECONDS, until - time.monotonic()))
            try:
                self._call(Call(method="POST", path="/api/generate", json=body), left)
            except BackendError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def loaded(self) -> LoadedReport | None:
        """A hanging ``/api/ps`` is a model that loads: loaded, size unknown. One that lists nothing is asked again."""
        if self._settings.loaded is not None:
            return super().loaded()
        try:
            models = self._models_looked_at_twice()
        except BackendError as error:
            if error.reason == "hung":
                return LoadedReport(loaded=True)
            raise
        used = sum(model["size_vram"] for model in models)
        return LoadedReport(loaded=used > 0, used_mib=used // 2**20)

    def _models_looked_at_twice(self) -> list[_Model]:
        for _ in range(FLICKERS):
            if models := self._models(REPORT_SECONDS):
                return models
            time.sleep(FLICKER_SECONDS)
        return self._models(REPORT_SECONDS)

    def _models(self, within_seconds: float) -> list[_Model]:
        answer = self._json("/api/ps", timeout_seconds=within_seconds)
        try:
            listed = answer.get("models") or []
            return [{"name": str(model["name"]), "size_vram": int(model.get("size_vram") or 0)} for model in listed]
        except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
            raise BackendError("failed", "GET /api/ps: its answer is not a list of models") from None
