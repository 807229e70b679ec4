"""vLLM as it is described: on the card from its start, put to sleep and woken, and cut in its work by that.

Owns: its routes and whether it sleeps. Must not: free memory before its 200, or be kinder than the real server is said
to be (docs/features/sleep_mode.md, read 2026-11; none ran).
"""

from __future__ import annotations

from collections.abc import Callable

from gpumgr.sim.card import OutOfMemory, SimulatedCard
from gpumgr.sim.server import Reply, Request, json_reply
from gpumgr.sim.service import Answer, SimulatedService

WEIGHTS = "weights"


class Vllm(SimulatedService):
    """``dev_mode``: started with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode. ``starts_asleep``: it takes its memory
    when it is woken, not when it starts."""

    def __init__(
        self,
        name: str,
        card: SimulatedCard,
        *,
        resident_mib: int,
        context_mib: int = 1000,
        load_seconds: float = 0.1,
        unload_seconds: float = 0.05,
        work_seconds: float = 0.05,
        port: int = 0,
    ) -> None:
        self.dev_mode = True
        self.starts_asleep = False
        super().__init__(
            name,
            card,
            resident_mib=resident_mib,
            context_mib=context_mib,
            load_seconds=load_seconds,
            unload_seconds=unload_seconds,
            port=port,
        )
        self.work_seconds = work_seconds

    def _forget(self) -> None:
        super()._forget()
        self._sleeps = self.starts_asleep
        self._ready = self.starts_asleep

    def _background(self) -> list[Callable[[], None]]:
        return [] if self.starts_asleep else [self._take]

    def _take(self) -> None:
        self._load(WEIGHTS, self.resident_mib)
        with self._changed:
            self._sleeps, self._ready = False, True
            self._changed.notify_all()

    def _routes(self) -> dict[tuple[str, str], Answer]:
        return {
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/is_sleeping"): self._in_dev_mode(lambda _: json_reply({"is_sleeping": self._sleeps})),
            ("POST", "/sleep"): self._in_dev_mode(self._sleep_call),
            ("POST", "/wake_up"): self._in_dev_mode(self._wake),
            ("POST", "/v1/chat/completions"): self._chat,
        }

    def _in_dev_mode(self, answer: Answer) -> Answer:
        return lambda request: answer(request) if self.dev_mode else json_reply({"detail": "Not Found"}, 404)

    def _health(self, _: Request) -> Reply:
        return Reply(200 if self._ready and not self.faults.unhealthy else 503)

    def _metrics(self, _: Request) -> Reply:
        label = '{engine="0",model_name="m"}'
        text = f"vllm:num_requests_running{label} {float(self.busy)}\nvllm:num_requests_waiting{label} 0.0\n"
        return Reply(200, text.encode(), "text/plain; version=0.0.4")

    def _sleep_call(self, _: Request) -> Reply:
        if self._unload_wanted():
            with self._changed:
                self._sleeps = True
                self._changed.notify_all()
            self._spawn(lambda: self._unload(WEIGHTS))
        return Reply(200)

    def _wake(self, _: Request) -> Reply:
        try:
            self._take()
        except OutOfMemory as error:
            return json_reply({"error": str(error)}, 500)
        return Reply(200)

    def _chat(self, _: Request) -> Reply:
        with self._working(), self._changed:
            if self._sleeps:
                return json_reply({"error": "the engine sleeps"}, 500)
            aborted = self._until(lambda: self._sleeps, self.work_seconds)
        if aborted:
            return json_reply({"choices": [{"finish_reason": "abort"}]})
        return json_reply({"choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}]})
