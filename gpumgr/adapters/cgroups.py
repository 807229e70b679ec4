"""Which systemd unit and which container a process runs in.

Owns: reading ``/proc/PID/cgroup``, what its paths mean, and asking a container engine for a name. Must not: decide
whose process it is (ownership.py), raise, or ask an engine for anything but names.

Every user may read another's cgroup, so that this tells owners where sockets and executables are hidden. Its paths, as
they were seen (systemd.unit(5), Docker 24, Podman 4, LXC 5, Proxmox 8; read 2026-11):

    /system.slice/ollama.service
    /user.slice/user-1000.slice/user@1000.service/app.slice/comfyui.service
    /system.slice/docker-ID.scope          /docker/ID            Docker, by its cgroup driver
    /machine.slice/libpod-ID.scope/container                     Podman
    /kubepods.slice/…/cri-containerd-ID.scope                    Kubernetes
    /lxc/101/ns/…                          /lxc.payload.voice/…  LXC, by its name itself
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]+\.(service|scope|slice)")
_CONTAINER_ID = re.compile(r"(?:^|[-/])([0-9a-f]{64})(?=\.scope|/|$)")
_LXC = re.compile(r"/lxc(?:\.payload\.|/)([^/]+)")
SHORTEST_ID = 12
"""As ``docker ps`` writes it."""

ENGINES = ("/var/run/docker.sock", "/run/podman/podman.sock")
ENGINE_SECONDS = 1.0
ASK_AGAIN_SECONDS = 30.0
_REMEMBERED = 256


def paths_of(pid: int) -> list[str]:
    """The paths of its cgroups, one in cgroup v2 and several in v1; none where there is no such process."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return [path for line in file if (path := line.rstrip("\n").split(":", 2)[-1]) != "/"]
    except OSError:
        return []


def units_of(paths: Sequence[str]) -> set[str]:
    """Every unit that it is part of: its service, and the slices around it."""
    return {part for path in paths for part in path.split("/") if UNIT.fullmatch(part)}


def container_ids_of(paths: Sequence[str]) -> set[str]:
    """More than one where containers stand in containers."""
    return {found for path in paths for found in _CONTAINER_ID.findall(path)}


def lxc_names_of(paths: Sequence[str]) -> set[str]:
    return {name for path in paths for name in _LXC.findall(path)}


class Containers:
    """The names of containers by their ids. An id is never given twice, so that a name is asked for once; an engine
    that cannot be asked is left alone for a while."""

    def __init__(self, engines: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._engines = engine_sockets() if engines is None else tuple(engines)
        self._clock = clock
        self._names: dict[str, str] = {}
        self._ask_again_at: dict[str, float] = {}
        self._silent_until: dict[str, float] = {}

    def name(self, container_id: str) -> str | None:
        """None where no engine knows it, or none may be asked."""
        known = self._names.get(container_id)
        if known is not None:
            return known
        if self._clock() < self._ask_again_at.get(container_id, float("-inf")):
            return None
        found = self._ask(container_id)
        if len(self._names) + len(self._ask_again_at) >= _REMEMBERED:
            self._names.clear()
            self._ask_again_at.clear()
        if found is None:
            self._ask_again_at[container_id] = self._clock() + ASK_AGAIN_SECONDS
            return None
        self._names[container_id] = found
        return found

    def _ask(self, container_id: str) -> str | None:
        problems = []
        for engine in self._engines:
            if self._clock() < self._silent_until.get(engine, float("-inf")):
                continue  # it hung a moment ago: one second for each container would add up
            try:
                return _name_from(engine, container_id)
            except TimeoutError:
                self._silent_until[engine] = self._clock() + ASK_AGAIN_SECONDS
                problems.append(f"{engine}: no answer within {ENGINE_SECONDS:g} s")
            except (OSError, http.client.HTTPException, ValueError) as error:
                problems.append(f"{engine}: {getattr(error, 'strerror', None) or error}")
        log.warning(
            "no name for container %s (%s): let gpumgr read the engine's socket, or write the container's id",
            container_id[:SHORTEST_ID],
            "; ".join(problems) or "no engine's socket is known",
        )
        return None


class _Engine(http.client.HTTPConnection):
    """An engine's HTTP on its own socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ENGINE_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(ENGINE_SECONDS)
        self.sock.connect(self._path)


def _name_from(engine: str, container_id: str) -> str:
    """Docker's API, which Podman speaks too (docs.docker.com, Engine API, ContainerInspect; read 2026-11).

    Raises: OSError, HTTPException, ValueError.
    """
    connection = _Engine(engine)
    try:
        connection.request("GET", f"/containers/{container_id}/json")
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(f"answers {answer.status}")
    told = json.loads(body)
    name = told.get("Name") if isinstance(told, dict) else None
    if not isinstance(name, str) or not name.strip("/"):
        raise ValueError("answers without a name")
    return name.strip("/")


def engine_sockets() -> tuple[str, ...]:
    """The sockets where a container engine may listen, the likeliest first."""
    host = os.environ.get("DOCKER_HOST", "")
    return (host.removeprefix("unix://"), *ENGINES) if host.startswith("unix://") else ENGINES
