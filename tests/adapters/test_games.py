"""Games among real processes: by name, by command line, by who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpumgr.adapters.games import YOUNG_SECONDS, Games
from tests.waiting import until

WAITS = "import sys; print('up', flush=True); sys.stdin.read()"
STARTS = f"import subprocess, sys\nsubprocess.run(sys.argv[sys.argv.index('--') + 1 :], executable={sys.executable!r})"
"""Python does not know its own file where ``argv[0]`` is made up."""


class Processes:
    """Python under other names: ``argv[0]`` is free, and a link gives a file and so the kernel's name."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        self._stack = stack

    def start(self, *argv: str, file: str | None = None, code: str = WAITS, more: Sequence[str] = ()) -> int:
        executable = Path(sys.executable)
        if file is not None:
            executable = self._directory / file
            executable.symlink_to(sys.executable)
        child = subprocess.Popen(
            [*argv, "-c", code, *more],
            executable=executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._stack.callback(self._end, child)
        assert child.stdout is not None
        if code is WAITS:
            assert child.stdout.readline() == b"up\n"
        return child.pid

    @staticmethod
    def _end(child: subprocess.Popen[bytes]) -> None:
        os.killpg(child.pid, signal.SIGKILL)  # with its children, who hold the other end of its pipes
        child.communicate()

    def child_of(self, pid: int) -> int:
        def children() -> list[str]:
            return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()

        until(children, 10)
        return int(children()[0])


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with ExitStack() as stack:
        yield Processes(tmp_path, stack)


def found(games: Games) -> dict[int, str]:
    return dict(games.running())


def test_a_pattern_meets_a_name_or_a_command_line_in_any_case(processes: Processes) -> None:
    games = Games(["*BG3*", "blender-4", "* --render *"])
    by_name = processes.start("python", file="Blender-4")
    by_argument = processes.start("C:\\Games\\bg3_dx11.exe")
    nobody = processes.start("notebook")
    running = found(games)
    assert running[by_name] == "Blender-4"
    assert running[by_argument] == "bg3_dx11.exe"
    assert nobody not in running


def test_a_game_that_ended_is_gone_at_once_also_as_a_zombie(processes: Processes) -> None:
    games = Games(["bg3"])
    pid = processes.start("bg3")
    assert pid in found(games)
    os.kill(pid, 9)
    until(lambda: Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split(")")[1].split()[0] == "Z", 10)
    assert found(games) == {}


def test_what_becomes_a_game_after_it_was_seen_is_found() -> None:
    """A launcher's child is its launcher once more, until it has its own program."""
    games = Games(["bg3"])
    code = (
        "import os, sys; print('here', flush=True); sys.stdin.readline();"
        f"os.execv({sys.executable!r}, ['bg3', '-c', {WAITS!r}])"
    )
    child = subprocess.Popen(
        ["launcher", "-c", code], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        assert found(games) == {}
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"up\n"
        until(lambda: child.pid in found(games), 10)
    finally:
        child.kill()
        child.communicate()


def test_old_processes_are_not_read_again(processes: Processes) -> None:
    """That is what a look costs: 500 processes of which none is new are one listing."""
    now = 0.0
    games = Games(["bg3"], clock=lambda: now)
    read: list[int] = []
    look = games._game

    def counting(pid: int) -> str | None:
        read.append(pid)
        return look(pid)

    games._game = counting  # type: ignore[method-assign]
    pid = processes.start("notebook")
    games.running()
    assert pid in read
    read.clear()
    games.running()
    assert pid not in read  # it is young, and was read just now
    now = YOUNG_SECONDS + 1.0
    games.running()
    assert pid in read
    assert 1 not in read  # it was old from the start


def test_whatever_steam_launched_is_a_game_and_steam_itself_is_not(processes: Processes) -> None:
    games = Games([])
    run = ["--", "python", "-c", "import time; time.sleep(600)"]
    reaper = processes.start("reaper", code=STARTS, more=["SteamLaunch", "AppId=1086940", *run])
    game = processes.child_of(reaper)
    steam = processes.start("python", file="steam", code=STARTS, more=run)
    native = processes.child_of(steam)
    proton = processes.start("python", code=WAITS, more=["waitforexitandrun", "/games/Z/bg3_dx11.exe"])
    running = found(games)
    assert {game, native, proton} <= running.keys()
    assert running[proton] == "bg3_dx11.exe"
    assert steam not in running


def test_a_look_survives_a_proc_that_cannot_be_listed(tmp_path: Path) -> None:
    assert Games(["bg3"], time.monotonic, str(tmp_path / "nowhere")).running() == []
