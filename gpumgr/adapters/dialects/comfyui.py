"""ComfyUI: freed between prompts, asked again each second.

Facts (ComfyUI server.py and main.py 0.3.64 and 0.33.0, read and run 2026-08 to 2026-11):
``POST /free`` only sets flags for the prompt worker and answers 200 with an empty body before anything is freed;
the worker reads them between prompts, and a wake-up can be lost, which asking again cures. ``unload_models`` alone
keeps the memory while cached outputs hold the model: both flags, always. There is no list of loaded models.
``POST /prompt`` answers at once with a ``prompt_id``; ``GET /history/{id}`` has it when it is done (success, error or
interrupted). It moves from what waits to what runs, and from there to the history, under one lock (execution.py,
PromptQueue): asked in this order, queue and history miss it only where it was deleted, or the process is another one.
On loopback an Origin that is not its own Host is answered 403, 0.33.0 does so with ``Sec-Fetch-Site: cross-site`` too:
a browser's page, proxied, has another host by nature.
"""

from __future__ import annotations

import json
import posixpath
from typing import ClassVar
from urllib.parse import quote, unquote

from gpumgr.adapters.dialects.http import REPORT_SECONDS, Http
from gpumgr.config import Call
from gpumgr.core.following import Work
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError

FREE = Call(method="POST", path="/api/free", json={"unload_models": True, "free_memory": True})
CONTEXT_MIB = 768
"""What torch keeps reserved without a model: below this the consumer counts as not loaded."""
LONGEST_ID = 128
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

    def begins_work(self, method: str, path: str) -> bool:
        """However the path is written: aiohttp resolves escapes and ``..`` before it looks for a route."""
        resolved = posixpath.normpath("/" + unquote(path).replace("\\", "/").lstrip("/"))
        return method == "POST" and resolved in ("/prompt", "/api/prompt")

    def work_begun(self, status: int, body: bytes) -> Work | None:
        try:
            prompt_id = json.loads(body)["prompt_id"] if status < 300 else None
        except (ValueError, RecursionError, LookupError, TypeError):
            return None
        if not isinstance(prompt_id, str) or not prompt_id.isprintable() or not 0 < len(prompt_id) <= LONGEST_ID:
            return None
        return Work("prompt", prompt_id)

    def is_done(self, work: Work) -> bool | None:
        """The queue first: an id that is used again is in the history already."""
        running, pending = self._prompts()
        if work.id in running or work.id in pending:
            return False
        try:
            history = self._json(f"/history/{quote(work.id, safe='')}", timeout_seconds=REPORT_SECONDS)
        except BackendError as error:
            if error.reason != "failed":
                raise
            return None  # larger than is read here, or no such route: that it left the queue is all there is to know
        return True if isinstance(history, dict) and work.id in history else None

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
