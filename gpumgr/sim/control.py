"""The stage's switches over HTTP, so that another process can drive it.

Owns: the control routes. Must not: be found on any service's port; a broker never sees it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from gpumgr.sim.card import NoSuchProcess, OutOfMemory, SimulatedCard
from gpumgr.sim.server import Reply, Request, Server, json_reply
from gpumgr.sim.service import Faults, SimulatedService
from gpumgr.sim.untracked import UntrackedProcess

FAULTS = frozenset(fault.name for fault in fields(Faults))
ARGUMENTS = {
    **dict.fromkeys((("GET", "ledger"), ("POST", "die"), ("POST", "start")), "/SERVICE"),
    ("POST", "faults"): "/SERVICE with a JSON object of faults",
    ("POST", "processes"): " with name, used_mib",
    ("DELETE", "processes"): "/PID",
}
"""What a route takes after its first word, and in its body."""


class Control:
    """``GET /`` lists the addresses, the faults and the other routes; each is one of the methods below."""

    def __init__(self, card: SimulatedCard, services: Mapping[str, SimulatedService], port: int = 0) -> None:
        self._card = card
        self._services = services
        self._untracked: dict[int, UntrackedProcess] = {}
        self._server = Server(self._answer, port)

    @property
    def url(self) -> str:
        return self._server.url

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop()
        self._server.join()

    def _answer(self, request: Request) -> Reply:
        room, _, name = request.path.strip("/").partition("/")
        answer = self._routes().get((request.method, room))
        if answer is None:
            return _no(404, f"no route {request.method} {request.path}")
        try:
            return answer(request, name)
        except KeyError as missing:
            return _no(404 if missing.args[0] == name else 400, f"{missing} is not here")
        except (NoSuchProcess, ValueError, TypeError) as error:
            return _no(400, str(error))
        except OutOfMemory as error:
            return _no(409, str(error))

    def _routes(self) -> dict[tuple[str, str], Callable[[Request, str], Reply]]:
        return {
            ("GET", ""): self._show_all,
            ("GET", "card"): self._show_card,
            ("POST", "card"): self._change_card,
            ("GET", "ledger"): self._ledger,
            ("POST", "processes"): self._start_process,
            ("DELETE", "processes"): self._end_process,
            ("POST", "faults"): self._change_faults,
            ("POST", "die"): self._die,
            ("POST", "start"): self._start,
        }

    def _show_all(self, _: Request, __: str) -> Reply:
        routes = [f"{method} /{room}{ARGUMENTS.get((method, room), '')}" for method, room in self._routes()]
        return json_reply({**self._addressed(), "faults": sorted(FAULTS), "routes": routes})

    def _addressed(self) -> dict[str, Any]:
        return {"services": {name: service.url for name, service in self._services.items()}, "control": self.url}

    def _addresses(self, _: Request, __: str) -> Reply:
        return json_reply(self._addressed())

    def _show_card(self, _: Request, __: str) -> Reply:
        return json_reply(self._card.state())

    def _change_card(self, request: Request, _: str) -> Reply:
        """``{"unreadable": "sentence" | null}``"""
        unreadable = _body(request)["unreadable"]
        self._card.unreadable = None if unreadable is None else str(unreadable)
        return json_reply(self._card.state())

    def _ledger(self, _: Request, __: str) -> Reply:
        counters = {name: service.counters() for name, service in self._services.items()}
        return json_reply({"services": counters, "over_commits": self._card.over_commits})

    def _start_process(self, request: Request, pid: str) -> Reply:
        """``{"name", "used_mib"}`` starts one; ``POST /processes/{pid} {"used_mib"}`` lets it grow or shrink."""
        body = _body(request)
        used_mib = int(body["used_mib"])
        if pid:
            self._card.set_used(int(pid), used_mib)
            return json_reply({"pid": int(pid)})
        process = UntrackedProcess(self._card, str(body["name"]), used_mib)
        self._untracked[process.pid] = process
        return json_reply({"pid": process.pid}, 201)

    def _end_process(self, _: Request, pid: str) -> Reply:
        """Only those started here: a service's end is ``/die``."""
        process = self._untracked.pop(int(pid), None)
        if process is None:
            return _no(404, f"no untracked process {pid}")
        process.end()
        return json_reply({"pid": process.pid})

    def _change_faults(self, request: Request, name: str) -> Reply:
        """Fields of Faults; ``unload_gate`` true shuts a gate, false opens and removes it."""
        faults = self._services[name].faults
        changes = _body(request)
        unknown = set(changes) - FAULTS
        if unknown:
            return _no(400, f"no fault {', '.join(sorted(unknown))}; there are {', '.join(sorted(FAULTS))}")
        checked = {key: _checked(faults, key, value) for key, value in changes.items() if key != "unload_gate"}
        for key, value in checked.items():
            setattr(faults, key, value)
        if "unload_gate" in changes:
            gate, faults.unload_gate = faults.unload_gate, threading.Event() if changes["unload_gate"] else None
            if gate is not None:
                gate.set()
        shown = {key: getattr(faults, key) for key in FAULTS}
        return json_reply(shown | {"unload_gate": faults.unload_gate is not None})

    def _die(self, _: Request, name: str) -> Reply:
        self._services[name].die()
        return self._addresses(_, name)

    def _start(self, _: Request, name: str) -> Reply:
        self._services[name].start()
        return self._addresses(_, name)


def _body(request: Request) -> dict[str, Any]:
    body = request.json()
    if not isinstance(body, dict):
        raise TypeError("the body must be a JSON object")
    return body


def _checked(faults: Faults, key: str, value: object) -> bool | float:
    """Of the kind the fault has: the text "false" would else be true. Raises: TypeError."""
    if isinstance(getattr(faults, key), bool):
        if isinstance(value, bool):
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{key} cannot be {value!r}")


def _no(status: int, sentence: str) -> Reply:
    return json_reply({"error": sentence}, status)
