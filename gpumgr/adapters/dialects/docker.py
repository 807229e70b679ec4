"""A container: stopped to unload, started to load, over the engine's own socket.

The socket and not the ``docker`` command: it is there wherever the engine is, its answers are JSON and say why, one
time limit holds for the whole call, and gpumgr reads names of containers there already. Podman's socket speaks the
same calls.

Facts (docs.docker.com, Engine API v1.43: ContainerStop, ContainerStart, ContainerInspect; read 2026-11, no engine ran):
204 done, 304 was so already, 404 no such container. ``stop`` waits for the container's own grace period (10 s unless it
says another), then kills. One that was stopped this way is not restarted by its restart policy.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from gpumgr.adapters.cgroups import engine_sockets
from gpumgr.adapters.dialects.started import StartedService, State
from gpumgr.adapters.dialects.wire import Answer, send
from gpumgr.runtime.ports import BackendError

RUNS = frozenset({"running", "restarting", "paused", "removing"})


class Docker(StartedService):
    def _stop(self, within_seconds: float) -> None:
        self._did(self._engine("POST", "/stop", within_seconds))

    def _start(self, within_seconds: float) -> None:
        self._did(self._engine("POST", "/start", within_seconds))

    def _state(self, within_seconds: float) -> State:
        told = self._engine("GET", "/json", within_seconds).require().json()
        try:
            return _state(self._settings.container or "", told["State"])
        except (LookupError, TypeError, AttributeError):
            raise BackendError("failed", "the container engine tells no state of the container") from None

    @staticmethod
    def _did(answer: Answer) -> None:
        if answer.status != 304:
            answer.require()

    def _engine(self, method: str, what: str, within_seconds: float) -> Answer:
        path = f"/containers/{quote(self._settings.container or '', safe='')}{what}"
        sockets = (self._settings.socket,) if self._settings.socket is not None else engine_sockets()
        missing: BackendError | None = None
        for socket in sockets:
            try:
                return send(method, f"unix:{socket}", path, timeout_seconds=within_seconds)
            except BackendError as error:
                if error.reason != "unreachable":
                    raise
                missing = missing or error
        said = f"{missing}: is the engine running, and may gpumgr's user open its socket (group docker)?"
        raise BackendError("unreachable", said)


def _state(container: str, told: Any) -> State:
    status = str(told["Status"])
    health = str((told.get("Health") or {}).get("Status", ""))
    code = told.get("ExitCode")
    badly = status in ("exited", "dead") and (code not in (0, None) or bool(told.get("OOMKilled")))
    said = f"the container {container} is {status}"
    if status in ("exited", "dead"):
        said += f" (exit code {code}{', out of memory' if told.get('OOMKilled') else ''})"
    elif health not in ("", "none"):
        said += f" ({health})"
    return State(
        runs=status in RUNS,
        said=said,
        failed=badly or status in ("paused", "removing") or (status == "running" and health == "unhealthy"),
        starting=status == "restarting" or (status == "running" and health == "starting"),
    )
