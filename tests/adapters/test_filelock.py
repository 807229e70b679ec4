"""The locks of the state directory, between real processes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumgr.adapters.filelock import FileLock, LockHeldError, make_state_dir
from tests.waiting import until

OWNER = """
import sys, pathlib
from gpumgr.adapters.filelock import FileLock
lock = FileLock(pathlib.Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
sys.stdin.read()
lock.put_down()
print("put down", flush=True)
sys.stdin.read()
"""
"""Takes the lock and holds it until its stdin ends."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.lock"


@contextmanager
def owner_of(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    command = [sys.executable, "-c", OWNER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.kill()


def in_a_child(run: Callable[[], int]) -> int:
    """What ``run`` returns in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        os._exit(run())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def is_free(path: Path) -> bool:
    """Whether somebody else could take it now."""
    other = FileLock(path)
    try:
        other.take()
    except LockHeldError:
        return False
    other.put_down()
    return True


def test_one_process_at_a_time(path: Path) -> None:
    lock = FileLock(path)
    with owner_of(path) as owner:
        began = time.monotonic()
        with pytest.raises(LockHeldError) as held:
            lock.take()
        assert time.monotonic() - began < 0.5  # without waiting
        assert not lock.held
        assert f"pid {owner.pid}" in str(held.value)
        assert str(path) in str(held.value)
        assert "GPUMGR_STATE_DIR" in str(held.value)  # the remedy
        assert "\n" not in str(held.value)


def test_it_ends_with_its_owner_however_that_ends(path: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        with owner_of(path) as owner:
            owner.send_signal(number)
            owner.wait(5)
            lock = FileLock(path)
            lock.take()
            assert lock.held
            assert path.read_text() == f"{os.getpid()}\n"
            lock.put_down()


def test_put_down_lets_the_next_one_in(path: Path) -> None:
    first, second = FileLock(path), FileLock(path)
    first.take()
    with pytest.raises(LockHeldError):
        second.take()
    first.put_down()
    second.take()
    assert (first.held, second.held) == (False, True)
    second.put_down()
    second.put_down()  # twice does no harm
    assert path.exists()  # its file stays: removing it could remove the next owner's


def test_it_can_be_waited_for(path: Path) -> None:
    lock = FileLock(path)
    with owner_of(path) as owner:
        began = time.monotonic()
        with pytest.raises(LockHeldError):
            lock.take(wait_seconds=0.3)
        assert 0.3 <= time.monotonic() - began < 1.0
        owner.kill()
        lock.take(wait_seconds=5)
    assert lock.held
    lock.put_down()


def test_a_waiting_one_gets_it_as_soon_as_it_is_free(path: Path) -> None:
    with owner_of(path) as owner:
        waiting = "lock.take()", "lock.take(wait_seconds=20)"
        command = [sys.executable, "-c", OWNER.replace(*waiting), str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as next_one:
            try:
                until(lambda: _has_open(next_one.pid, path))
                assert path.read_text() == f"{owner.pid}\n"
                owner.kill()
                assert next_one.stdout is not None
                assert next_one.stdout.readline() == "taken\n"
                assert path.read_text() == f"{next_one.pid}\n"
                assert not is_free(path)
            finally:
                next_one.kill()


def _has_open(pid: int, path: Path) -> bool:
    try:
        return any(os.readlink(fd) == str(path) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # one of them was closed meanwhile
        return False


def test_a_child_that_puts_down_what_it_inherited_leaves_the_parents_lock(path: Path) -> None:
    lock = FileLock(path)
    lock.take()

    def child() -> int:
        lock.put_down()
        return 1 if lock.held or is_free(path) else 0

    assert in_a_child(child) == 0
    assert lock.held
    assert not is_free(path)
    lock.put_down()
    assert is_free(path)


def test_a_child_that_keeps_what_it_inherited_keeps_the_lock(path: Path) -> None:
    """Why the worker has to put the master's lock down: a killed master's lock would live on in it."""
    lock = FileLock(path)
    lock.take()

    def child() -> int:
        return 0 if lock.held and not is_free(path) else 1

    assert in_a_child(child) == 0
    gate_in, gate_out = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(gate_out)
        os.read(gate_in, 1)
        os._exit(0)
    os.close(gate_in)
    lock.put_down()
    assert not is_free(path)  # the child still has it
    os.close(gate_out)
    os.waitpid(pid, 0)
    assert is_free(path)


def test_a_program_that_is_started_does_not_inherit_it(path: Path) -> None:
    lock = FileLock(path)
    lock.take()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, close_fds=False
    ) as program:
        lock.put_down()
        until(lambda: is_free(path))  # exec() closes what is not inherited, a moment after Popen has returned
        assert program.poll() is None
        program.kill()


def test_a_refused_take_leaves_nothing_open(path: Path) -> None:
    with owner_of(path):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(LockHeldError):
                FileLock(path).take()
        assert len(os.listdir("/proc/self/fd")) == before


def test_the_content_is_the_last_owners_pid_alone(path: Path) -> None:
    path.write_text("123456789 and more words\n")
    lock = FileLock(path)
    lock.take()
    assert path.read_text() == f"{os.getpid()}\n"
    lock.put_down()


@pytest.fixture(params=[0o022, 0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    state_dir = tmp_path / "deep" / "state"
    make_state_dir(state_dir)
    lock = FileLock(state_dir / "broker.lock")
    lock.take()
    assert (mode(state_dir), mode(lock.path)) == (0o700, 0o600)
    lock.put_down()


# The mode given to open() counts only for a file that it makes.
@pytest.mark.parametrize("was", [0o644, 0o666])
def test_a_file_that_was_there_wider_becomes_private(path: Path, was: int) -> None:
    path.touch()
    path.chmod(was)
    lock = FileLock(path)
    lock.take()
    lock.put_down()
    assert mode(path) == 0o600


@pytest.mark.parametrize("was", [0o755, 0o777, 0o700, 0o500])
def test_a_directory_that_was_there_becomes_private(tmp_path: Path, was: int) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    state_dir.chmod(was)
    make_state_dir(state_dir)
    assert mode(state_dir) == 0o700
    make_state_dir(state_dir)
    assert mode(state_dir) == 0o700


def test_what_is_in_the_directory_stays(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text("{}")
    make_state_dir(tmp_path)
    assert (tmp_path / "card.json").read_text() == "{}"


def test_a_file_in_the_way_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(OSError, match="state"):
        make_state_dir(tmp_path / "state")
    with pytest.raises(OSError, match="state"):
        FileLock(tmp_path / "state" / "broker.lock").take()
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "nowhere" / "broker.lock").take()
