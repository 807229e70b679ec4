"""Which games run: processes that a pattern names, or that Steam started.

Owns: looking through ``/proc`` for new processes. Must not: signal one, or ask the driver: a game is to be seen
before it takes memory.

A look lists ``/proc`` and reads only pids that are new or young: what a pid is shows after its ``exec`` (a launcher's
child is first its launcher once more), and Wine names its processes late. 500 processes cost about 0.3 ms a look.

Facts about the outside (Steam for Linux and Proton's script, from their process lists, 2026-11): Steam starts each game
as ``reaper SteamLaunch AppId=N -- …``, of which everything that belongs to the game descends, Proton as well
(``proton waitforexitandrun game.exe``). Steam's own helpers are not below a reaper with ``SteamLaunch``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from gpumgr.adapters.ownership import last_component, lineage, started_ticks

YOUNG_SECONDS = 15.0
_STEAM_OWN = ("steam*", "srt-*", "reaper", "pressure-vessel*", "pv-*", "*gameoverlay*", "fossilize*", "sh", "bash")
_STEAM = ("steam", "steam.exe")
_PROTON = ("waitforexitandrun", "waitforexit")


@dataclass(frozen=True, slots=True)
class _Process:
    started: int
    seen_at: float
    game: str | None


class Games:
    """``running`` is one look. Patterns are those of ``fnmatch`` on the process's name, each argument and the whole
    command line, without regard to case; ``*`` also matches ``/``. One thread at a time."""

    def __init__(
        self, patterns: Sequence[str], clock: Callable[[], float] = time.monotonic, proc: str = "/proc"
    ) -> None:
        self._patterns = tuple(pattern.casefold() for pattern in patterns)
        self._clock = clock
        self._proc = proc
        self._known: dict[int, _Process] = {}
        self._own = os.getpid()

    def running(self) -> list[tuple[int, str]]:
        """Pid and name, in the order in which they were first seen. Never raises."""
        now = self._clock()
        pids = self._pids()
        for gone in self._known.keys() - pids:
            del self._known[gone]
        for pid in sorted(pids):
            known = self._known.get(pid)
            if known is None or self._must_look_again(pid, known, now):
                self._look(pid, known, now)
        return [(pid, each.game) for pid, each in self._known.items() if each.game is not None]

    def _pids(self) -> set[int]:
        try:
            return {int(name) for name in os.listdir(self._proc) if name.isdigit()}
        except OSError:
            return set(self._known)

    def _must_look_again(self, pid: int, known: _Process, now: float) -> bool:
        """A game's pid may have gone to somebody else; what is young may have become a game."""
        if known.game is not None:
            return started_ticks(pid) != known.started or _is_dead(pid)
        return now - known.seen_at < YOUNG_SECONDS

    def _look(self, pid: int, known: _Process | None, now: float) -> None:
        started = started_ticks(pid)
        if started is None or _is_dead(pid):
            self._known.pop(pid, None)
            return
        seen_at = known.seen_at if known is not None and known.started == started else now
        if known is not None and known.game is not None:
            self._known.pop(pid)  # another process: it comes last again
        self._known[pid] = _Process(started, seen_at, None if pid == self._own else self._game(pid))

    def _game(self, pid: int) -> str | None:
        """What it is called, where it is one."""
        name, arguments = _name(pid), _arguments(pid)
        words = [name, *arguments, last_component(arguments[0]) if arguments else "", " ".join(arguments)]
        folded = [word.casefold() for word in words if word]
        if any(fnmatchcase(word, pattern) for pattern in self._patterns for word in folded):
            return _shown(name, arguments)
        return _shown(name, arguments) if _is_steams(pid, name, arguments) else None


def _is_steams(pid: int, name: str, arguments: Sequence[str]) -> bool:
    """Below a reaper of a game, or Proton's; or a child of Steam's that is none of its own helpers."""
    if "SteamLaunch" in arguments or any(word in _PROTON for word in arguments):
        return True
    if any(fnmatchcase(name, own) for own in _STEAM_OWN):
        return False
    for number, ancestor in enumerate(lineage(pid)):
        if number == 0:
            continue
        said = _arguments(ancestor)
        if "SteamLaunch" in said or any(word in _PROTON for word in said):
            return True
        if number == 1 and _name(ancestor) in _STEAM:
            return True
    return False


def _shown(name: str, arguments: Sequence[str]) -> str:
    """A game's own file says more than what runs it: the last argument that names a Windows program, else the name."""
    windows = [last_component(word) for word in arguments if word.casefold().endswith(".exe")]
    return (windows[-1] if windows else name) or "a game"


def _is_dead(pid: int) -> bool:
    """A zombie has given its memory back."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except OSError:
        return True
    return line[line.rfind(b")") + 2 :][:1] in b"ZXx"


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().decode("utf-8", "replace").rstrip("\n")
    except OSError:
        return ""


def _arguments(pid: int) -> list[str]:
    return list(_split(pid))


def _split(pid: int) -> Iterator[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            line = file.read(65536)
    except OSError:
        return
    yield from (word.decode("utf-8", "replace") for word in line.split(b"\0") if word)
