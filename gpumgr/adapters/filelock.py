"""The two locks of a broker's state directory, and the directory itself.

Owns: ``broker.lock`` (one master at a time) and ``worker.lock`` (one worker at a time, also while a SIGHUP hands
over). Must not: remove a lock file, as another process may hold the lock of a file that has just been unlinked.

flock(2) belongs to the open file description: it ends with its last descriptor, so also with kill -9.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


class LockHeldError(Exception):
    """Another process has it. The message is one sentence."""


def make_state_dir(state_dir: Path) -> None:
    """0700, also where it was there with other rights. Raises: OSError."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if state_dir.stat().st_mode & 0o777 != 0o700:
        state_dir.chmod(0o700)


class FileLock:
    """An exclusive flock on a file of mode 0600, whose content is the owner's pid, for people."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def take(self, wait_seconds: float = 0.0) -> None:
        """Raises: LockHeldError after ``wait_seconds``, OSError where the file cannot be made."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)  # it may have been there with other rights
        until = time.monotonic() + wait_seconds
        while not _locked(fd):
            if time.monotonic() >= until:
                owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
                os.close(fd)
                raise LockHeldError(
                    f"another gpumgr{f' (pid {owner})' if owner else ''} holds {self.path}: stop that one first, or "
                    "give this one another state_dir with GPUMGR_STATE_DIR"
                )
            time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    @property
    def held(self) -> bool:
        return self._fd is not None

    def put_down(self) -> None:
        """Close this process's descriptor; a descriptor inherited by a fork counts as its own."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
