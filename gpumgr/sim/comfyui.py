"""ComfyUI as it behaves, not as one would like it to.

Owns: ComfyUI's routes and its one prompt worker. Must not: be kinder than the real server.

Run against ComfyUI 0.3.64 and 0.33.0 on a CPU, 2026-11:

- ``POST /free`` sets flags and answers 200 with an empty body before anything is freed; missing or bad JSON is 500.
- The worker reads the flags between prompts, so a running prompt frees nothing and a pending one loads again at once.
- ``unload_models`` alone frees nothing while cached node outputs hold the model; ``free_memory`` implies it.
- ``/free`` can come between the worker's look at the flags and its sleep: answered 200, and nothing happens until
  something else wakes the worker. Posting again cures it. Here ``Faults.lose_first_unload`` provokes it.
- 0.33.0 answers 403 to a foreign Origin or ``Sec-Fetch-Site: cross-site``, and 400 to a prompt_id that is no UUID.
"""

from __future__ import annotations

import bisect
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gpumgr.sim.card import OutOfMemory, SimulatedCard
from gpumgr.sim.samples import form_parts, png
from gpumgr.sim.server import Reply, Request, json_reply
from gpumgr.sim.service import Answer, SimulatedService

MODEL = "checkpoint"
MIB = 1024 * 1024
STEPS = 10
NODES: dict[str, Any] = {
    "KSampler": {"input": {"required": {"seed": ["INT", {"default": 0}]}}, "output": ["LATENT"], "name": "KSampler"},
    "SaveImage": {"input": {"required": {"images": ["IMAGE"]}}, "output": [], "name": "SaveImage", "output_node": True},
}


@dataclass(order=True, slots=True)
class _Prompt:
    number: float
    id: str
    graph: Any = field(compare=False)
    extra: dict[str, Any] = field(compare=False)

    def listed(self) -> list[object]:
        return [self.number, self.id, self.graph, self.extra, []]


class ComfyUI(SimulatedService):
    """A prompt takes ``render_seconds`` and can be interrupted between its ten steps."""

    def __init__(
        self,
        name: str,
        card: SimulatedCard,
        *,
        resident_mib: int = 14000,
        context_mib: int = 400,
        load_seconds: float = 0.2,
        unload_seconds: float = 0.1,
        render_seconds: float = 0.1,
        gpu: int = 0,
        port: int = 0,
    ) -> None:
        super().__init__(
            name,
            card,
            resident_mib=resident_mib,
            context_mib=context_mib,
            load_seconds=load_seconds,
            unload_seconds=unload_seconds,
            gpu=gpu,
            port=port,
        )
        self.render_seconds = render_seconds
        self._interrupt = threading.Event()

    def _forget(self) -> None:
        """Queue, history and uploads live in the process; so they end with it."""
        super()._forget()
        self._pending: list[_Prompt] = []
        self._current: _Prompt | None = None
        self._history: dict[str, dict[str, Any]] = {}
        self._files: dict[str, bytes] = {}
        self._flags: dict[str, bool] = {}
        self._woken = False
        self._counter = 0
        self._loaded = False
        self._outputs_cached = False

    @property
    def busy(self) -> int:
        """Prompts running and pending."""
        return len(self._pending) + (self._current is not None)

    def _routes(self) -> dict[tuple[str, str], Answer]:
        return {
            ("GET", "/system_stats"): self._system_stats,
            ("GET", "/queue"): self._queue,
            ("POST", "/queue"): self._change_queue,
            ("GET", "/prompt"): lambda _: json_reply({"exec_info": {"queue_remaining": self.busy}}),
            ("POST", "/prompt"): self._prompt,
            ("GET", "/history"): self._all_history,
            ("GET", "/view"): self._view,
            ("POST", "/upload/image"): self._upload,
            ("POST", "/interrupt"): self._interrupt_call,
            ("GET", "/object_info"): lambda _: json_reply(NODES),
            ("POST", "/free"): self._free,
        }

    def _background(self) -> list[Callable[[], None]]:
        return [self._work]

    def _answer(self, request: Request) -> Reply:
        if _is_foreign(request):
            return Reply(403)
        path = request.path.removeprefix("/api")
        answer = self._table.get((request.method, path))
        if answer is not None:
            return answer(request)
        if request.method == "GET" and path.startswith("/history/"):
            prompt_id = path.removeprefix("/history/")
            with self._changed:
                entry = self._history.get(prompt_id)
            return json_reply({} if entry is None else {prompt_id: entry})
        return Reply(404, b"404: Not Found", "text/plain; charset=utf-8")

    # Reports

    def _system_stats(self, _: Request) -> Reply:
        if self.faults.unhealthy:
            return Reply(503)
        used = self.used_mib
        device = {
            "name": "cuda:0 Simulated GPU : cudaMallocAsync",
            "type": "cuda",
            "index": self.gpu,
            "vram_total": self.card.total_mib(self.gpu) * MIB,
            "vram_free": self.card.free_mib(self.gpu) * MIB,
            "torch_vram_total": max(0, used - self.context_mib) * MIB,
            "torch_vram_free": 0,
        }
        return json_reply({"system": {"os": "posix", "comfyui_version": "0.33.0"}, "devices": [device]})

    def _queue(self, _: Request) -> Reply:
        with self._changed:
            running = [self._current.listed()] if self._current else []
            return json_reply({"queue_running": running, "queue_pending": [p.listed() for p in self._pending]})

    def _all_history(self, _: Request) -> Reply:
        with self._changed:
            return json_reply(self._history)

    def _view(self, request: Request) -> Reply:
        content = self._files.get(request.query.get("filename", ""))
        return Reply(404) if content is None else Reply(200, content, "image/png")

    # Work

    def _prompt(self, request: Request) -> Reply:
        try:
            body = request.json()
        except ValueError:
            return Reply(500)
        if not isinstance(body, dict) or not isinstance(body.get("prompt"), dict):
            return _refusal("no_prompt", "No prompt provided")
        prompt_id = body.get("prompt_id") or str(uuid.uuid4())
        if not _is_uuid(prompt_id):
            return _refusal("invalid_prompt_id", "prompt_id must be a UUID")
        prompt = self._enqueue(prompt_id, body)
        return json_reply({"prompt_id": prompt.id, "number": prompt.number, "node_errors": {}})

    def _enqueue(self, prompt_id: str, body: dict[str, Any]) -> _Prompt:
        extra = dict(body.get("extra_data") or {})
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        with self._changed:
            number = -self._counter if body.get("front") else self._counter
            self._counter += 1
            prompt = _Prompt(body.get("number", number), prompt_id, body["prompt"], extra)
            bisect.insort(self._pending, prompt)
            self.ledger.work_calls += 1
            self._changed.notify_all()
        return prompt

    def _upload(self, request: Request) -> Reply:
        parts = form_parts(request)
        image = parts.get("image")
        if image is None or not image.filename:
            return Reply(400)
        fields = {name: parts[name].content.decode() for name in ("type", "subfolder") if name in parts}
        self._files[image.filename] = image.content
        return json_reply(
            {"name": image.filename, "subfolder": fields.get("subfolder", ""), "type": fields.get("type", "input")}
        )

    def _change_queue(self, request: Request) -> Reply:
        body = request.json()
        with self._changed:
            unwanted = [p.id for p in self._pending] if body.get("clear") else body.get("delete", [])
            self._pending = [p for p in self._pending if p.id not in unwanted]
            self._changed.notify_all()
        return Reply(200)

    def _interrupt_call(self, request: Request) -> Reply:
        try:
            wanted = request.json().get("prompt_id")
        except (ValueError, AttributeError):
            wanted = None
        with self._changed:
            if wanted is None or (self._current is not None and self._current.id == wanted):
                self._interrupt.set()
        return Reply(200)

    def _free(self, request: Request) -> Reply:
        try:
            body = request.json()
            wanted = {flag: True for flag in ("unload_models", "free_memory") if body.get(flag)}
        except (ValueError, AttributeError):
            return Reply(500, b"500 Internal Server Error", "text/plain; charset=utf-8")
        if not wanted:
            return Reply(200)
        is_lost = self.faults.lose_first_unload
        if self._unload_wanted() or is_lost:
            with self._changed:
                # A lost call has set its flags as well; only nobody wakes up to read them.
                self._flags.update(wanted)
                self._woken = self._woken or not is_lost
                self._changed.notify_all()
        return Reply(200)

    # The prompt worker

    def _work(self) -> None:
        while True:
            with self._changed:
                self._until(lambda: bool(self._pending) or self._woken)
                self._woken = False
                self._current = self._pending.pop(0) if self._pending else None
            if self._current is not None:
                self._run(self._current)
            self._obey_flags()

    def _run(self, prompt: _Prompt) -> None:
        # An interrupt that came before the prompt began is cleared by it (ComfyUI execution.py).
        self._interrupt.clear()
        started = _message("execution_start", prompt)
        try:
            if not self._loaded:
                self._load(MODEL, self.resident_mib)
                self._loaded = True
            rendered = self._render()
        except OutOfMemory as error:
            what = {"exception_type": "torch.OutOfMemoryError", "exception_message": str(error)}
            ended = _message("execution_error", prompt, **what)
        else:
            ended = _message("execution_success" if rendered else "execution_interrupted", prompt)
        self._record(prompt, [started, ended])

    def _render(self) -> bool:
        """False when it was interrupted. Raises: Gone."""
        for _ in range(STEPS):
            self._sleep(self.render_seconds / STEPS)
            if self._interrupt.is_set():
                return False
        return True

    def _record(self, prompt: _Prompt, messages: list[list[Any]]) -> None:
        success = messages[-1][0] == "execution_success"
        image = {"filename": f"ComfyUI_{prompt.id}.png", "subfolder": "", "type": "output"}
        with self._changed:
            if success:
                self._files[image["filename"]] = png()
                self._outputs_cached = True
            self._history[prompt.id] = {
                "prompt": prompt.listed(),
                "outputs": {"9": {"images": [image]}} if success else {},
                "status": {
                    "status_str": "success" if success else "error",
                    "completed": success,
                    "messages": messages,
                },
                "meta": {},
            }
            self._current = None
            self._changed.notify_all()

    def _obey_flags(self) -> None:
        with self._changed:
            flags, self._flags = self._flags, {}
        if flags.get("free_memory"):
            self._outputs_cached = False
        if flags and self._loaded and not self._outputs_cached:
            # Before the memory falls: whatever the fall does, the worker's next prompt loads again.
            self._loaded = False
            self._unload(MODEL)


def _message(kind: str, prompt: _Prompt, **facts: str) -> list[Any]:
    return [kind, {"prompt_id": prompt.id, "timestamp": int(time.time() * 1000)} | facts]


def _refusal(kind: str, message: str) -> Reply:
    return json_reply(
        {"error": {"type": kind, "message": message, "details": message, "extra_info": {}}, "node_errors": {}}, 400
    )


def _is_uuid(text: object) -> bool:
    try:
        return isinstance(text, str) and str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _is_foreign(request: Request) -> bool:
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site") == "cross-site":
        return True
    return origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")
