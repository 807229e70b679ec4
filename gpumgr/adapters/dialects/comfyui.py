"""ComfyUI: freed between prompts, asked again each second.

Facts (ComfyUI server.py and main.py 0.3.64 and 0.33.0, read and run 2026-08 to 2026-11):
``POST /free`` only sets flags for the prompt worker and answers 200 with an empty body before anything is freed;
the worker reads them between prompts, and a wake-up can be lost, which asking again cures. ``unload_models`` alone
keeps the memory while cached outputs hold the model: both flags, always. There is no list of loaded models.
On loopback an Origin that is not its own Host is answered 403, 0.33.0 does so with ``Sec-Fetch-Site: cross-site`` too:
a browser's page, proxied, has another host by nature.
"""

from __future__ import annotations

from typing import ClassVar

from gpumgr.adapters.dialects.http import REPORT_SECONDS, Http
from gpumgr.config import Call
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

FREE = Call(method="POST", path="/api/free", json={"unload_models": True, "free_memory": True})
CONTEXT_MIB = 768
"""What torch keeps reserved without a model: below this the consumer counts as not loaded."""
FREE_PATHS = (
    *("GET /history", "GET /history/*", "GET /view", "GET /view_metadata/*", "GET /queue", "GET /prompt"),
    *("GET /system_stats", "GET /object_info", "GET /object_info/*", "GET /features", "GET /extensions"),
    *("GET /embeddings", "GET /models", "GET /models/*", "GET /jobs", "GET /jobs/*"),
    *("POST /upload/image", "POST /upload/mask", "POST /interrupt", "POST /queue"),
)
"""``POST /queue`` deletes what waits: whoever gives up a prompt must not wait for its end first."""


class ComfyUI(Http):
    ask_again_seconds: float | None = 1.0
    health_default: ClassVar[str | None] = "/system_stats"
    proxy_path_default: ClassVar[str | None] = "/prompt"
    free_paths_default: ClassVar[tuple[str, ...]] = FREE_PATHS + tuple(
        free.replace(" /", " /api/", 1) for free in FREE_PATHS
    )
    usual_processes: ClassVar[tuple[str, ...]] = ("*/ComfyUI/main.py",)
    strips_headers: ClassVar[frozenset[str]] = frozenset(
        {"origin", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user"}
    )

    @property
    def can_unload(self) -> bool:
        return True

    def unload(self, within_seconds: float) -> None:
        self._call(self._settings.unload if self._settings.unload.path else FREE, min(within_seconds, 5.0))

    def busy(self) -> bool | None:
        if self._settings.busy is not None:
            return super().busy()
        return any(self._prompts())

    def interrupt(self) -> None:
        """Each by its id, so that a prompt which begins meanwhile goes on; a server that knows no id in ``/interrupt``
        (before 0.3.57) ends whatever runs then."""
        if self._settings.on_expiry == "wait":
            return
        running, pending = self._prompts()
        if pending:
            self._call(Call(method="POST", path="/queue", json={"delete": pending}), REPORT_SECONDS)
        for prompt_id in running:
            self._call(Call(method="POST", path="/interrupt", json={"prompt_id": prompt_id}), REPORT_SECONDS)

    def _prompts(self) -> tuple[list[str], list[str]]:
        """The ids of those that run and of those that wait; an item of the queue begins with number and id."""
        queue = self._json("/queue", timeout_seconds=REPORT_SECONDS)
        try:
            running, pending = ([str(item[1]) for item in queue[f"queue_{key}"]] for key in ("running", "pending"))
        except (LookupError, TypeError):
            raise BackendError("failed", "GET /queue: its answer has no queue_running and queue_pending") from None
        return running, pending

    def loaded(self) -> LoadedReport | None:
        if self._settings.loaded is not None:
            return super().loaded()
        stats = self._json("/system_stats", timeout_seconds=REPORT_SECONDS)
        try:
            reserved_mib = int(stats["devices"][0]["torch_vram_total"]) // 2**20
        except (LookupError, TypeError, ValueError, OverflowError):
            return None
        return LoadedReport(loaded=reserved_mib > CONTEXT_MIB, used_mib=reserved_mib)
