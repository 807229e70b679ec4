"""Whose process is it: from a pid to the consumer that it belongs to.

Owns: matching a process against what each consumer claims, and remembering the answer. Must not: look over the
whole machine (it starts from the few pids the driver names and walks up), signal anything, or raise.

Facts of Linux, checked 2026-11: another user's ``/proc/PID/fd`` cannot be listed, so whose socket it is stays
unknown then, while its name, command line, cgroup, parent and ``/proc/PID/net/tcp`` can be read. A broker that runs as
a user of its own therefore tells owners by patterns and cgroups, and by port only among its own user's processes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase

import psutil

from gpumgr.adapters.cgroups import (
    SHORTEST_ID,
    Containers,
    container_ids_of,
    lxc_names_of,
    paths_of,
    units_of,
)
from gpumgr.adapters.listeners import listening

STRANGER_SECONDS = 2.0
LONGEST_STRANGER_SECONDS = 10.0
"""A process that nobody claims may start to listen later. It is looked at again after this long, each time twice as
long as before, up to the longest: a game is one for hours."""

TABLE_SECONDS = 1.0
"""One table of listening sockets serves all processes looked at within this."""

_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Claim:
    """What makes a process a consumer's: ``patterns`` on its names and command line, the systemd ``unit`` or the
    ``container`` (name, or id from 12 digits on) it runs in, its dialect's ``usual`` patterns, or a listening TCP
    ``port``.

    Patterns are those of ``fnmatch``, in the case they are written in; ``*`` also matches ``/``.
    """

    consumer: str
    patterns: tuple[str, ...] = ()
    port: int | None = None
    unit: str | None = None
    container: str | None = None
    usual: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Remembered:
    started: int
    owner: str | None
    look_again_at: float
    pause_seconds: float

    def holds(self, started: int, now: float) -> bool:
        return self.started == started and (self.owner is not None or now < self.look_again_at)


@dataclass(frozen=True, slots=True)
class _Table:
    """Ports by the inode of the listening socket."""

    ports: dict[int, int]
    read_again_at: float


class Ownership:
    """Answers for any thread. A look costs half a millisecond, and the table of sockets where ports are claimed; an
    answer from memory costs 0.02 ms.

    No lock: the memory is values that never change, and two threads that look at one pid at a time find the same.
    """

    def __init__(
        self,
        claims: Sequence[Claim],
        clock: Callable[[], float] = time.monotonic,
        *,
        cgroups: Callable[[int], Sequence[str]] = paths_of,
        containers: Containers | None = None,
    ) -> None:
        """``cgroups`` tells the paths of a pid's cgroups."""
        self._claims = tuple(claims)
        self._clock = clock
        self._cgroups = cgroups
        self._containers = Containers(clock=clock) if containers is None else containers
        self._ports = frozenset(claim.port for claim in claims if claim.port is not None)
        self._remembered: dict[int, _Remembered] = {}
        self._table: _Table | None = None

    def owner(self, pid: int, name: str) -> str | None:
        """The consumer that this process belongs to, or None: a stranger, or one that cannot be looked at.

        ``name`` is what the driver calls it, path included. The first rule that applies, for each in the order of the
        claims:

        1. A pattern matches the driver's name, the system's name, an argument, or the whole command line.
        2. It runs in the unit or the container.
        3. A usual pattern of the dialect matches, in the same way.
        4. It listens on a claimed port of this machine, or its parent does, and so on up; a process that serves often
           computes in a child. Process 1 is nobody's: with socket activation it listens for everyone.
        """
        started = started_ticks(pid)
        if started is None:
            return None
        known = self._remembered.get(pid)
        if known is not None and known.holds(started, self._clock()):
            return known.owner
        owner = self._look(pid, name)
        if started_ticks(pid) != started:
            return None  # the pid went to another process meanwhile: what was seen may be of either
        again = known is not None and known.started == started
        pause = min(2 * known.pause_seconds, LONGEST_STRANGER_SECONDS) if known and again else STRANGER_SECONDS
        self._remember(pid, _Remembered(started, owner, self._clock() + pause, pause))
        return owner

    def _look(self, pid: int, name: str) -> str | None:
        stat = _stat(pid)
        if stat is None or stat.dead:
            return None
        words = _words(pid, name) if any(claim.patterns or claim.usual for claim in self._claims) else []
        return (
            self._by_words(words, lambda claim: claim.patterns)  # 1
            or self._by_cgroup(pid)  # 2
            or self._by_words(words, lambda claim: claim.usual)  # 3
            or self._by_port(pid)  # 4
        )

    def _by_words(self, words: Sequence[str], patterns_of: Callable[[Claim], Sequence[str]]) -> str | None:
        for claim in self._claims:
            if any(fnmatchcase(word, pattern) for pattern in patterns_of(claim) for word in words):
                return claim.consumer
        return None

    def _by_cgroup(self, pid: int) -> str | None:
        if not any(claim.unit or claim.container for claim in self._claims):
            return None
        paths = self._cgroups(pid)
        units, ids, names = units_of(paths), container_ids_of(paths), lxc_names_of(paths)
        for claim in self._claims:
            if claim.unit in units or (claim.container and self._is_in(claim.container, ids, names)):
                return claim.consumer
        return None

    def _is_in(self, container: str, ids: set[str], names: set[str]) -> bool:
        by_id = len(container) >= SHORTEST_ID and any(each.startswith(container) for each in ids)
        return by_id or container in names or any(self._containers.name(each) == container for each in ids)

    def _by_port(self, pid: int) -> str | None:
        if not self._ports:
            return None
        listeners = self._listeners(pid)
        if not listeners:
            return None
        for ancestor in lineage(pid):
            ports = {listeners[inode] for inode in _socket_inodes(ancestor) if inode in listeners}
            for claim in self._claims:
                if claim.port in ports:
                    return claim.consumer
        return None

    def _listeners(self, pid: int) -> dict[int, int]:
        """The claimed ports that someone listens on, by the socket's inode; none where the process is in another
        network namespace than we are: a container's port is not the machine's of that number.
        """
        if _network_namespace(pid) != _network_namespace(os.getpid()):
            return {}
        if self._table is None or self._clock() >= self._table.read_again_at:
            ports = {inode: port for inode, port in listening() if port in self._ports}
            self._table = _Table(ports, self._clock() + TABLE_SECONDS)
        return self._table.ports

    def _remember(self, pid: int, what: _Remembered) -> None:
        if len(self._remembered) >= _REMEMBERED:
            for old, known in list(self._remembered.items()):
                if started_ticks(old) != known.started:
                    self._remembered.pop(old, None)
        self._remembered[pid] = what


def last_component(name: str) -> str:
    """What follows the last ``/`` or ``\\``: NVML names a Wine game by its Windows path.

    Chromium writes its whole command line into its first argument, so the name ends before `` --``.
    """
    return re.split(r"[/\\]", name.split(" --", 1)[0].rstrip("/\\ "))[-1]


def started_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where there is none or it is hidden from us.

    With the pid it names one process for as long as the machine runs. Reads one small file (psutil's
    ``create_time`` does the same at five times the cost, which each reading would pay for each pid).
    """
    fields = _fields(pid)
    return None if fields is None else int(fields[_STARTED])


_STARTED = 19
_STAT_BYTES = 4096
"""More than its 52 numbers and one name can take."""


@dataclass(frozen=True, slots=True)
class _Stat:
    """The fields of ``/proc/PID/stat`` that matter here (proc_pid_stat(5))."""

    state: str
    parent: int
    started: int

    @property
    def dead(self) -> bool:
        return self.state in "ZXx"


def _stat(pid: int) -> _Stat | None:
    fields = _fields(pid)
    return None if fields is None else _Stat(fields[0].decode(), int(fields[1]), int(fields[_STARTED]))


def _fields(pid: int) -> list[bytes] | None:
    """Without a file object, which costs more than all the rest: each reading of the card asks for each pid on it."""
    try:
        opened = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        line = os.read(opened, _STAT_BYTES)
    except OSError:  # it ended in between
        return None
    finally:
        os.close(opened)
    # The name stands in brackets and may itself hold brackets and blanks: fields are counted after the last one.
    return line[line.rfind(b")") + 2 :].split()


def _words(pid: int, name: str) -> list[str]:
    """Everything that a pattern may match; what cannot be read is left out."""
    words = [name, last_component(name)]
    with suppress(psutil.Error, OSError, ValueError):
        process = psutil.Process(pid)
        words.append(process.name())
        arguments = process.cmdline()
        words += [*arguments, " ".join(arguments)]
    return [word for word in words if word]


def lineage(pid: int) -> Iterator[int]:
    """The pid, its parent, and so on, without process 1. A reused pid cannot make this endless."""
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        seen.add(pid)
        yield pid
        stat = _stat(pid)
        pid = 0 if stat is None else stat.parent


def _network_namespace(pid: int) -> int:
    """Its table's inode is the namespace's own, and unlike ``/proc/PID/ns/net`` shown to every user."""
    try:
        return os.stat(f"/proc/{pid}/net/tcp").st_ino
    except OSError:
        return 0


def _socket_inodes(pid: int) -> Iterator[int]:
    """The sockets the process holds, inherited ones included; none where it may not be told."""
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # closed meanwhile
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if target.startswith("socket:["):
                    yield int(target[8:-1])
