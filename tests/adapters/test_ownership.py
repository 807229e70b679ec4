"""Whose process is it, asked of real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumgr.adapters.cgroups import Containers
from gpumgr.adapters.ownership import (
    LONGEST_STRANGER_SECONDS,
    STRANGER_SECONDS,
    TABLE_SECONDS,
    Claim,
    Ownership,
    last_component,
    started_ticks,
)

# Children live until their standard input ends. None inherits a socket from here: Python closes them at exec.
LISTENS = """
import socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""
LISTENS_WHEN_TOLD = """
import socket, sys
server = socket.socket()
server.bind(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
for line in sys.stdin:
    server.listen() if line == "listen\\n" else server.close()
    print(line, end="", flush=True)
"""
PARENT_LISTENS = """
import socket, subprocess, sys
server = socket.create_server(("127.0.0.1", 0))
middle = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
works = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
print(server.getsockname()[1], flush=True)
subprocess.run([sys.executable, "-c", middle, works])
"""
WAITS = "import sys; print('ready', flush=True); sys.stdin.read()"
NO_SUCH_PID = 5_000_001  # Linux gives no pid above 4 194 304


class Hands:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Child:
    """A running child and what it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def number(self) -> int:
        return int(self.line())

    def tell(self, word: str) -> None:
        """Returns when the child has done it and said so."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        assert self.line() == word

    def become_a_zombie(self) -> None:
        """Killed, and not waited for: its entry stays."""
        self._process.kill()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


@contextmanager
def child(script: str, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[Child]:
    command = [*prefix, sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Child(process)
        finally:
            if process.stdin is not None:
                process.stdin.close()
            process.wait(timeout=20)


@pytest.fixture
def clock() -> Hands:
    return Hands()


# -- patterns --


@pytest.mark.parametrize(
    "pattern",
    [
        "python*",  # the system's name
        "/opt/ComfyUI/*",  # an argument
        "*--port 8188*",  # the whole command line
        "*/ComfyUI/main.py",
    ],
)
def test_a_pattern_matches_name_arguments_or_command_line(clock: Hands, pattern: str) -> None:
    ownership = Ownership([Claim("ollama", ("*/ollama",)), Claim("comfyui", (pattern,))], clock)
    with child(WAITS, "/opt/ComfyUI/main.py", "--port", "8188") as process:
        process.line()
        assert ownership.owner(process.pid, "") == "comfyui"


@pytest.mark.parametrize("pattern", ["*comfyui/main.py", "/opt/ComfyUI", "main.py", ""])
def test_a_pattern_means_its_case_and_the_whole_word(clock: Hands, pattern: str) -> None:
    ownership = Ownership([Claim("comfyui", (pattern,))], clock)
    with child(WAITS, "/opt/ComfyUI/main.py") as process:
        process.line()
        assert ownership.owner(process.pid, "") is None


@pytest.mark.parametrize("pattern", [r"C:[\]Games[\]*", "witcher3.exe"])
def test_a_pattern_matches_what_the_driver_calls_it(clock: Hands, pattern: str) -> None:
    ownership = Ownership([Claim("game", (pattern,))], clock)
    with child(WAITS) as process:
        process.line()
        assert ownership.owner(process.pid, r"C:\Games\witcher3.exe") == "game"


def test_the_first_claim_wins(clock: Hands) -> None:
    with child(WAITS, "/srv/tts/ComfyUI") as process:
        process.line()
        claims = [Claim("tts", ("/srv/tts/*",)), Claim("comfyui", ("*/ComfyUI",))]
        assert Ownership(claims, clock).owner(process.pid, "") == "tts"
        assert Ownership(claims[::-1], clock).owner(process.pid, "") == "comfyui"


# -- ports --


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_who_listens_on_a_claimed_port_is_its_consumer(clock: Hands, address: str) -> None:
    if ":" in address and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    with child(LISTENS, address) as process:
        port = process.number()
        claims = [Claim("other", port=1), Claim("patterns-only", ("*/nothing",)), Claim("whisper", port=port)]
        assert Ownership(claims, clock).owner(process.pid, "python") == "whisper"


def test_a_worker_belongs_to_the_ancestor_that_listens(clock: Hands) -> None:
    with child(PARENT_LISTENS) as process:
        port, worker = process.number(), process.number()
        assert worker != process.pid
        assert Ownership([Claim("ollama", port=port)], clock).owner(worker, "") == "ollama"


def test_a_child_of_our_own_that_listens_does_not_claim_its_siblings(clock: Hands) -> None:
    with child(LISTENS, "127.0.0.1") as server, child(WAITS) as sibling:
        port = server.number()
        sibling.line()
        assert Ownership([Claim("whisper", port=port)], clock).owner(sibling.pid, "") is None


def test_the_table_of_sockets_is_read_anew_after_a_second(clock: Hands) -> None:
    """Reading it is dear, so strangers share one; a server that starts is found when the next is read."""
    with child(LISTENS_WHEN_TOLD) as process, child(WAITS) as stranger:
        stranger.line()
        ownership = Ownership([Claim("whisper", port=process.number())], clock)
        assert ownership.owner(stranger.pid, "") is None
        process.tell("listen")
        clock.now += TABLE_SECONDS
        assert ownership.owner(process.pid, "") == "whisper"


def test_a_port_in_another_network_namespace_is_another_port(clock: Hands) -> None:
    """Two containers may listen on one number inside, and neither on the machine's."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "--net", "true"], stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("no network namespace may be made here")
    with child(LISTENS, "0.0.0.0", prefix=("unshare", "--net")) as process:  # noqa: S104 - nothing can reach it
        claims = [Claim("contained", port=process.number())]
        assert Ownership(claims, clock).owner(process.pid, "") is None


def test_a_pattern_comes_before_any_port(clock: Hands) -> None:
    with child(LISTENS, "127.0.0.1", "/srv/tts") as process:
        claims = [Claim("by-port", port=process.number()), Claim("by-pattern", ("/srv/tts",))]
        assert Ownership(claims, clock).owner(process.pid, "") == "by-pattern"


# -- units and containers --

CONTAINER = "3949fff2e8dd8d0df1a7419b3f1f99cb0530558df91f627bf8d50e18e9cb5e6c"


class Names(Containers):
    def name(self, container_id: str) -> str | None:
        return {CONTAINER: "studio-comfyui-1"}.get(container_id)


@pytest.mark.parametrize(
    ("claim", "path"),
    [
        (Claim("x", unit="ollama.service"), "/system.slice/ollama.service"),
        (Claim("x", unit="gpu.slice"), "/gpu.slice/tts.service"),
        (Claim("x", container="studio-comfyui-1"), f"/system.slice/docker-{CONTAINER}.scope"),
        (Claim("x", container=CONTAINER[:12]), f"/docker/{CONTAINER}"),
        (Claim("x", container=CONTAINER), f"/machine.slice/libpod-{CONTAINER}.scope/container"),
        (Claim("x", container="101"), "/lxc/101/ns/system.slice/tts.service"),
    ],
)
def test_a_unit_or_a_container_tells(clock: Hands, claim: Claim, path: str) -> None:
    def owner(paths: list[str]) -> str | None:
        claims = [Claim("other", unit="other.service", container="nothing"), claim]
        return Ownership(claims, clock, cgroups=lambda _: paths, containers=Names()).owner(os.getpid(), "")

    assert owner([path]) == "x"
    assert (
        owner([path.replace("ollama", "llama").replace("gpu", "cpu").replace("39", "40").replace("101", "102")]) is None
    )
    assert owner([]) is None


def test_patterns_then_cgroup_then_usual_patterns_then_port(clock: Hands) -> None:
    with child(LISTENS, "127.0.0.1", "/srv/tts/main.py") as process:
        claims = [
            Claim("by-port", port=process.number()),
            Claim("by-usual", usual=("*/main.py",)),
            Claim("by-unit", unit="tts.service"),
            Claim("by-pattern", ("/srv/tts/*",)),
        ]
        found = []
        while claims:
            paths = ["/system.slice/tts.service"]
            found.append(Ownership(claims, clock, cgroups=lambda _, p=paths: p).owner(process.pid, ""))  # type: ignore[misc]
            claims.pop()
    assert found == ["by-pattern", "by-unit", "by-usual", "by-port"]


# -- what is remembered --


def test_a_stranger_is_looked_at_again_after_a_while(clock: Hands) -> None:
    with child(LISTENS_WHEN_TOLD) as process:
        ownership = Ownership([Claim("whisper", port=process.number())], clock)
        assert ownership.owner(process.pid, "") is None
        process.tell("listen")
        clock.now += STRANGER_SECONDS * 0.9
        assert ownership.owner(process.pid, "") is None
        clock.now += STRANGER_SECONDS * 0.1
        assert ownership.owner(process.pid, "") == "whisper"


def test_the_longer_it_is_a_stranger_the_rarer_it_is_looked_at_but_never_forgotten(clock: Hands) -> None:
    with child(LISTENS_WHEN_TOLD) as process:
        looks: list[int] = []
        claims = [Claim("whisper", port=process.number(), unit="nobody.service")]

        def cgroups(pid: int) -> list[str]:
            looks.append(pid)
            return []

        ownership = Ownership(claims, clock, cgroups=cgroups)
        for _ in range(60):
            assert ownership.owner(process.pid, "") is None
            clock.now += 1
        assert len(looks) == 8  # after 0, 2, 6, 14, 24, 34, 44 and 54 s
        process.tell("listen")
        clock.now += LONGEST_STRANGER_SECONDS
        assert ownership.owner(process.pid, "") == "whisper"


def test_an_owner_is_kept_while_the_process_lives_and_not_longer(clock: Hands) -> None:
    with child(LISTENS_WHEN_TOLD) as process:
        ownership = Ownership([Claim("whisper", port=process.number())], clock)
        process.tell("listen")
        assert ownership.owner(process.pid, "") == "whisper"
        process.tell("close")
        clock.now += 3_600
        assert ownership.owner(process.pid, "") == "whisper"
        process.become_a_zombie()  # its memory on the card may outlive it for a moment, and is still its consumer's
        assert ownership.owner(process.pid, "") == "whisper"
    assert ownership.owner(process.pid, "") is None


def test_hundreds_of_processes_that_came_and_went_are_forgotten(clock: Hands) -> None:
    ownership = Ownership([Claim("waiter", ("*",))], clock)
    for _ in range(260):
        pid = os.posix_spawn("/bin/true", ["true"], {})
        assert ownership.owner(pid, "true") in {"waiter", None}
        os.waitpid(pid, 0)
    assert len(ownership._remembered) <= 256


# -- what cannot be looked at --


@pytest.mark.parametrize("pid", [NO_SUCH_PID, 0, -1, 2**32 - 1])
def test_a_pid_without_a_process_is_nobody_s(clock: Hands, pid: int) -> None:
    assert Ownership([Claim("all", ("*",), port=1)], clock).owner(pid, "python") is None


def test_a_zombie_is_nobody_s(clock: Hands) -> None:
    with child(WAITS) as process:
        process.become_a_zombie()
        assert Ownership([Claim("all", ("*",))], clock).owner(process.pid, "python") is None


def test_process_1_is_nobody_s_by_its_ports(clock: Hands) -> None:
    everything = [Claim("all", port=port) for port in (22, 80, 443, 8188, 11434)]
    assert Ownership(everything, clock).owner(1, "init") is None


LOOKS_AS_NOBODY = """
import os, sys
from gpumgr.adapters.ownership import Claim, Ownership
os.setgroups([]), os.setgid(65534), os.setuid(65534)  # after the imports: nobody may not see this Python
pid, port = map(int, sys.argv[1:])
claims = Claim("w", port=port), Claim("w", ("/srv/whisper",)), Claim("w", usual=("/srv/*",))
print(*(Ownership([claim]).owner(pid, "") for claim in claims), bool(open(f"/proc/{pid}/cgroup").read()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_of_another_user_the_patterns_still_tell_and_the_port_does_not(clock: Hands) -> None:
    with child(LISTENS, "127.0.0.1", "/srv/whisper") as process:
        port = process.number()
        assert Ownership([Claim("w", port=port)], clock).owner(process.pid, "") == "w"
        command = [sys.executable, "-c", LOOKS_AS_NOBODY, str(process.pid), str(port)]
        looked = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=20, check=True)
        assert looked.stdout.split() == ["None", "w", "w", "True"]


# -- the two small facts --


def test_a_process_is_told_by_when_it_started() -> None:
    """Brackets and blanks in its name do not move the fields."""
    with child("open('/proc/self/comm', 'w').write('a) Z (b');" + WAITS) as process:
        assert process.line() == "ready"
        started = started_ticks(process.pid)
        assert started is not None
        assert started_ticks(process.pid) == started
        assert started >= (started_ticks(os.getpid()) or 0)
        assert Ownership([Claim("odd", ("a) Z (b",))]).owner(process.pid, "") == "odd"
    assert started_ticks(process.pid) is None


@pytest.mark.parametrize(
    ("name", "last"), [("/usr/bin/python3", "python3"), (r"C:\a\b.exe", "b.exe"), ("plain", "plain"), ("/opt/x/", "x")]
)
def test_the_last_component_follows_either_slash(name: str, last: str) -> None:
    assert last_component(name) == last
