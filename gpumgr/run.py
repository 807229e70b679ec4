"""A program under a lease: it starts with the grant, and the lease ends with it. Needs the client alone.

Owns: the program's process, from before the grant to its end. Must not: end it, whatever becomes of the lease.

    fork       the program's process waits, so that its pid can be told before it computes
    acquire    with that pid: what it and its children take on the card is the lease's
    go         it becomes the program; without a grant it ends without having begun
    its end    release, and its exit code

Signals that are meant for it are passed on; Ctrl-C reaches it from the terminal by itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from gpumgr.client import BrokerUnreachable, Gpu, HeldLease
from gpumgr.errors import GpumgrError

NOT_FOUND = 127
"""As shells have it."""
PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def under_lease(program: Sequence[str], url: str, **wanted: Any) -> int:
    """The program's exit code; 128 and the signal's number where one ended it; 1 where it got no lease.

    ``wanted``: what ``Gpu.acquire`` takes. To be called by the only thread of its process, as it forks.
    """
    pid, go = _forked(program)
    try:
        with Gpu(url) as gpu:
            lease = gpu.acquire(holder_pid=pid, **wanted)
            return _ran(lease, pid, go)
    except (GpumgrError, BrokerUnreachable) as error:
        print(f"gpumgr run: {program[0]} was not started: {error}", file=sys.stderr)
        return 1
    finally:
        _close(go)  # whoever still waits for the word ends without it
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _forked(program: Sequence[str]) -> tuple[int, int]:
    """Its pid, and where to write the word."""
    waits, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(go)
            _begin_when_told(program, waits)
        finally:  # nothing of the parent's may run on in here
            os._exit(NOT_FOUND)
    os.close(waits)
    return pid, go


def _begin_when_told(program: Sequence[str], waits: int) -> NoReturn:
    told = os.read(waits, 1)
    os.close(waits)
    if not told:
        os._exit(0)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what it becomes would as well
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(program[0], list(program))  # noqa: S606 - that is the point
    except OSError as error:
        os.write(2, f"gpumgr run: {program[0]} cannot be run: {error.strerror}\n".encode())
    os._exit(NOT_FOUND)


def _ran(lease: HeldLease, pid: int, go: int) -> int:
    before = {number: signal.signal(number, lambda got, _: os.kill(pid, got)) for number in PASSED_ON}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the program as well
    lease.keep()
    try:
        with suppress(BrokenPipeError):
            os.write(go, b"g")
        _, status = os.waitpid(pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _release(lease)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _release(lease: HeldLease) -> None:
    try:
        if not lease.release():
            print("gpumgr run: the lease was lost while the program ran", file=sys.stderr)
    except (GpumgrError, BrokerUnreachable) as error:
        print(f"gpumgr run: the lease ends at its TTL, it could not be released: {error}", file=sys.stderr)


def _close(go: int) -> None:
    with suppress(OSError):
        os.close(go)
