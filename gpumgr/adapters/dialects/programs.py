"""One program run to its end, over after a stated time whatever it does.

Owns: the process, its deadline and the tail of what it said. Must not: know what is run.

No shell reads the arguments, nothing stands on its input, and it has a process group of its own, which is killed when
the time is over. What it leaves running when it ends by itself stays: it may be the service that it started. That has
to send its output elsewhere, as with cron or ssh: the pipe is closed.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from gpumgr.runtime.ports import BackendError

TAIL_BYTES = 2000
SHOWN = 300
PIECE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Ended:
    """``code``: its exit code; below 0 the signal that ended it. ``said``: the end of its output, on one line."""

    program: str
    code: int
    said: str

    def require(self) -> Ended:
        """Raises: BackendError unless it exited with 0."""
        if self.code != 0:
            how = f"exits with {self.code}" if self.code > 0 else f"was ended by signal {-self.code}"
            raise BackendError("failed", f"{self.program} {how} {self.said}".rstrip())
        return self


def run(arguments: Sequence[str], within_seconds: float) -> Ended:
    """Raises: BackendError: ``hung`` after ``within_seconds``, ``failed`` where it cannot be started."""
    program = os.path.basename(arguments[0])
    until = time.monotonic() + within_seconds
    try:
        process = subprocess.Popen(  # noqa: S603 - what the operator's own file says
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BackendError("failed", f"{arguments[0]} cannot be run: {why}") from None
    with process:
        try:
            over, tail = _watched(process, until)
        except OSError as error:  # no descriptor left, or a sandbox that shuts a call
            over, tail = True, f"it could not be watched: {error}".encode()
        if over:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    said = " ".join(tail.decode(errors="replace").split())[-SHOWN:]
    if over:
        raise BackendError("hung", f"{program} did not end within {within_seconds:.3g} s {said}".rstrip())
    return Ended(program, code, said)


def _watched(process: subprocess.Popen[bytes], until: float) -> tuple[bool, bytes]:
    """Whether its time was over before it was, and the end of what it said. Its end is what counts, not its pipe's: a
    service that it started may hold that open for ever."""
    if process.stdout is None:
        return False, b""
    out = process.stdout.fileno()
    os.set_blocking(out, False)
    tail = b""
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(out, select.POLLIN)
        while True:
            left = until - time.monotonic()
            ready = poll.poll(max(0.0, left) * 1000)
            piece = _read(out)
            tail = (tail + piece)[-TAIL_BYTES:]
            if any(fd == pidfd for fd, _ in ready):
                return False, tail
            if left <= 0:
                return True, tail
            if ready and not piece:
                poll.unregister(out)  # closed: from now on only its end is waited for
    finally:
        os.close(pidfd)


def _read(out: int) -> bytes:
    try:
        return os.read(out, PIECE_BYTES)
    except BlockingIOError:
        return b""
