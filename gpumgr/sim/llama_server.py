"""llama.cpp's llama-server as a router: models by name, and an unload that cuts what runs.

Owns: the router's routes and the states of its models. Must not: wait for work before an unload: the real one does not.

Run against the real router (b11434) on a CPU, 2026-11: ``/models/load`` and ``/models/unload`` answer before they take
effect; an unload cuts a running stream. ``single`` plays a server with one model. The real one has a process for each
model; here all belongs to one, which keeps its context: the harder case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gpumgr.sim.card import OutOfMemory, SimulatedCard
from gpumgr.sim.memory import Gone
from gpumgr.sim.server import Reply, Request, json_reply
from gpumgr.sim.service import Answer, SimulatedService


class LlamaServer(SimulatedService):
    """``has_metrics``: started with ``--metrics``."""

    def __init__(
        self,
        name: str,
        card: SimulatedCard,
        *,
        models: Mapping[str, int],
        has_metrics: bool = True,
        single: bool = False,
        work_seconds: float = 0.05,
        context_mib: int = 400,
        load_seconds: float = 0.1,
        unload_seconds: float = 0.05,
        port: int = 0,
    ) -> None:
        self.models = dict(models)
        super().__init__(
            name,
            card,
            resident_mib=max(self.models.values()),
            context_mib=context_mib,
            load_seconds=load_seconds,
            unload_seconds=unload_seconds,
            port=port,
        )
        self.has_metrics = has_metrics
        self.single = single
        self.work_seconds = work_seconds
        self.woken = 0
        """How often a report woke a model that slept."""

    def _forget(self) -> None:
        super()._forget()
        self._states = dict.fromkeys(self.models, "unloaded")
        self._requests = dict.fromkeys(self.models, 0)

    def sleep(self, model: str) -> None:
        """``--sleep-idle-seconds`` are over."""
        self._unload(model)
        self._become(model, "sleeping")

    def _routes(self) -> dict[tuple[str, str], Answer]:
        return {
            ("GET", "/health"): lambda _: Reply(503) if self.faults.unhealthy else json_reply({"status": "ok"}),
            ("GET", "/models"): self._list,
            ("POST", "/models/unload"): self._unload_call,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/slots"): self._slots,
            ("POST", "/v1/chat/completions"): self._chat,
        }

    def _list(self, _: Request) -> Reply:
        with self._changed:
            listed = [{"id": n} | ({} if self.single else {"status": {"value": s}}) for n, s in self._states.items()]
        return json_reply({"data": listed})

    def _unload_call(self, request: Request) -> Reply:
        name = str(request.json().get("model"))
        if self.single or name not in self.models:
            return json_reply({"error": {"code": 404, "message": "File Not Found"}}, 404)
        if self._unload_wanted():
            self._spawn(lambda: self._leave(name))
        return json_reply({"success": True})

    def _leave(self, name: str) -> None:
        self._become(name, "unloaded")
        self._unload(name)

    def _become(self, name: str, state: str) -> None:
        with self._changed:
            self._states[name] = state
            self._changed.notify_all()

    def _metrics(self, request: Request) -> Reply:
        if not self.has_metrics:
            return json_reply({"error": {"code": 501, "message": "metrics are off"}}, 501)
        working = self._requests.get(self._named(request), 0)
        text = f"llamacpp:requests_processing {working}\nllamacpp:requests_deferred 0\n"
        return Reply(200, text.encode(), "text/plain; version=0.0.4")

    def _slots(self, request: Request) -> Reply:
        name = self._named(request)
        if self._states.get(name) == "sleeping":
            self.woken += 1
        return json_reply([{"id": 0, "is_processing": self._requests.get(name, 0) > 0}])

    def _named(self, request: Request) -> str:
        return request.query.get("model") or next(iter(self.models))

    def _chat(self, request: Request) -> Reply:
        body: dict[str, Any] = request.json()
        name = str(body.get("model") or next(iter(self.models)))
        if name not in self.models:
            return json_reply({"error": {"code": 404, "message": f"model {name} not found"}}, 404)
        with self._working_on(name):
            try:
                self._bring(name)
            except OutOfMemory as error:
                return json_reply({"error": {"code": 500, "message": str(error)}}, 500)
            with self._changed:
                cut = self._until(lambda: self._states[name] != "loaded", self.work_seconds)
        if cut:
            return Reply(200, b"proxy error: Failed to read connection", "text/plain")
        return json_reply({"model": name, "choices": [{"message": {"role": "assistant", "content": "yes"}}]})

    @contextmanager
    def _working_on(self, name: str) -> Iterator[None]:
        with self._working():
            self._requests[name] += 1
            try:
                yield
            finally:
                self._requests[name] -= 1

    def _bring(self, name: str) -> None:
        """Raises: OutOfMemory, Gone."""
        with self._changed:
            self._until(lambda: self._states[name] != "loading")
            if self._states[name] == "loaded":
                return
            self._states[name] = "loading"
        try:
            self._load(name, self.models[name])
        except (OutOfMemory, Gone):
            self._become(name, "unloaded")
            raise
        self._become(name, "loaded")
