"""Which games run: processes that a pattern names, or that Steam started.

Owns: looking through ``/proc`` for new processes. Must not: signal one, or ask the driver: a game is to be seen
before it takes memory.

A look reads only pids that are new or young: what a pid is shows after its ``exec`` (a launcher's child is first its
launcher once more), and Wine names its processes late. One that is young is read at twice the age at which it was read
before. Listing ``/proc`` takes 2 ms with 500 processes, so that it is done only where the kernel has given a pid away
since (the last field of ``/proc/loadavg``, proc_loadavg(5)); else a look takes 0.02 ms.

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
SOON_SECONDS = 0.25
_STEAM_OWN = (
    *("steam*", "srt-*", "reaper", "pressure-vessel*", "pv-*", "*gameoverlay*", "fossilize*", "*driverque*"),
    *("sh", "bash"),
)
_STEAM = ("steam", "steam.exe")
_PROTON = ("waitforexitandrun", "waitforexit")


_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Process:
    """``look_again_at``: None once it is old."""

    started: int
    look_again_at: float | None
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
        self._pids: set[int] = set()
        self._watched: dict[int, _Process] = {}
        """Those that are young, or games."""
        self._last_pid: str | None = None
        self._own = os.getpid()

    def running(self) -> list[tuple[int, str]]:
        """Pid and name, in the order in which they were first seen. Never raises."""
        now = self._clock()
        last_pid = self._newest()
        if last_pid is None or last_pid != self._last_pid:
            self._last_pid = last_pid
            before, self._pids = self._pids, self._list()
            for pid in sorted(self._pids - before):
                self._look(pid, now)
        for pid, known in list(self._watched.items()):
            if self._must_look_again(pid, known, now):
                self._look(pid, now)
        return [(pid, each.game) for pid, each in self._watched.items() if each.game is not None]

    def _newest(self) -> str | None:
        """The pid that was given away last; None where the kernel does not say."""
        try:
            with open(f"{self._proc}/loadavg", "rb") as file:
                return file.read().split()[-1].decode()
        except (OSError, IndexError):
            return None

    def _list(self) -> set[int]:
        try:
            return {int(name) for name in os.listdir(self._proc) if name.isdigit()}
        except OSError:
            return self._pids

    @staticmethod
    def _must_look_again(pid: int, known: _Process, now: float) -> bool:
        """A game's pid may have gone to somebody else; what is young may have become a game."""
        if known.game is not None:
            return started_ticks(pid) != known.started or _is_dead(pid)
        return known.look_again_at is not None and now >= known.look_again_at

    def _look(self, pid: int, now: float) -> None:
        started = started_ticks(pid)
        game = None if started is None or _is_dead(pid) or pid == self._own else self._game(pid)
        age = 0.0 if started is None else time.clock_gettime(time.CLOCK_BOOTTIME) - started / _TICKS
        again = now + max(age, SOON_SECONDS) if age < YOUNG_SECONDS else None
        if started is None or (game is None and again is None):
            self._watched.pop(pid, None)
            return
        if game is not None:
            self._watched.pop(pid, None)  # another process than before: it comes last
        self._watched[pid] = _Process(started, again, game)

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
