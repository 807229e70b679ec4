"""A systemd service: stopped to unload, started to load.

Facts (systemctl(1) and systemd.service(5) of systemd 252, read 2026-11; no systemd ran): ``stop`` and ``start`` return
when the job is done; ``show`` exits with 0 whatever the unit's state, also for one that does not exist
(``LoadState=not-found``). Without ``--no-ask-password`` a call that may not do it would wait for somebody to type one.
A unit with ``Restart=`` that was stopped stays so; a socket or a timer of its name would start it again. A program that
does not exit with 0 on SIGTERM leaves its unit ``failed``.
"""

from __future__ import annotations

from gpumgr.adapters.dialects.programs import Ended, run
from gpumgr.adapters.dialects.started import StartedService, State
from gpumgr.runtime.ports import BackendError

RUNS = frozenset({"active", "reloading", "refreshing", "activating", "deactivating", "maintenance"})
STARTING = frozenset({"activating", "deactivating"})


class Systemd(StartedService):
    systemctl: str = "systemctl"

    def _stop(self, within_seconds: float) -> None:
        self._systemctl("stop", within_seconds=within_seconds).require()

    def _start(self, within_seconds: float) -> None:
        self._systemctl("start", within_seconds=within_seconds).require()

    def _state(self, within_seconds: float) -> State:
        asked = ("show", "--property=LoadState,ActiveState,SubState,Result")
        told = self._systemctl(*asked, within_seconds=within_seconds).require().said
        facts = dict(word.split("=", 1) for word in told.split() if "=" in word)
        unit, active = self._settings.unit, facts.get("ActiveState", "")
        if facts.get("LoadState") in ("not-found", "masked", "bad-setting", "error"):
            where = "its user" if self._settings.scope == "user" else "the system"
            raise BackendError("failed", f"systemd of {where} has {unit} as {facts['LoadState']}: see scope and unit")
        if not active:
            raise BackendError("failed", f"systemctl show {unit} tells no state: {told}")
        why = f", {facts['Result']}" if active == "failed" and "Result" in facts else ""
        return State(
            runs=active in RUNS,
            said=f"{unit} is {active} ({facts.get('SubState', '')}{why})",
            failed=active == "failed",
            starting=active in STARTING,
        )

    def _systemctl(self, verb: str, *options: str, within_seconds: float) -> Ended:
        scope = f"--{self._settings.scope}"
        unit = self._settings.unit or ""
        return run((self.systemctl, "--no-ask-password", scope, verb, *options, "--", unit), within_seconds)
