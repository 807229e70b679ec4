"""What happens around the application in a gunicorn master and its one worker.

Owns: the two locks, the signals, the order of start and stop. Must not: serve. ``config/gunicorn.conf.py`` calls
each function from the hook of the same moment.

    master   settings → state_dir → broker.lock (or one sentence and exit 2)
    worker   dies with the master → worker.lock (waited for, as a SIGHUP starts the new worker before the old one
             ends) → broker.start → signals
    SIGTERM  every waiter is answered ``shutting_down`` → gunicorn's own graceful end → broker.close
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from gunicorn.glogging import Logger

from gpumgr import config
from gpumgr.adapters.filelock import FileLock, LockHeldError, make_state_dir
from gpumgr.runtime.broker import Broker

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
TOKEN_IN_PATH = re.compile(r"(/v1/lease/)[^/\s?\"']+(/renew)?[^\s\"']*")

_master: dict[str, Any] = {}
"""This process's lock and the settings it runs on. A process has one state directory, whatever is imported how
often: gunicorn executes its configuration file again on SIGHUP."""


def settings_or_exit() -> config.Settings:
    """The settings, with the master's lock taken. A wrong file or a second broker: one sentence and exit 2.

    On SIGHUP with a file that has become wrong, the old settings stay in force and the sentence is printed: a typo
    must not end a running broker.
    """
    try:
        settings = config.load()
    except config.ConfigError as error:
        if "settings" not in _master:
            _exit(str(error))
        print(f"gpumgr: {error}; the old settings stay in force", file=sys.stderr, flush=True)  # noqa: T201
        return _running()
    running = _master.get("settings")
    if running is not None and running.server != settings.server:
        print("gpumgr: changes of server: need a restart, not a SIGHUP", file=sys.stderr, flush=True)  # noqa: T201
        return _running()
    if running is None:
        _take_master_lock(settings)
    _master["settings"] = settings
    return settings


def _running() -> config.Settings:
    settings = _master["settings"]
    if not isinstance(settings, config.Settings):
        raise TypeError("the master runs without settings")
    return settings


def _take_master_lock(settings: config.Settings) -> None:
    state_dir = settings.server.state_dir
    try:
        make_state_dir(state_dir)
        lock = FileLock(state_dir / "broker.lock")
        lock.take()
    except LockHeldError as error:
        _exit(str(error))
    except OSError as error:
        _exit(f"server.state_dir {state_dir} cannot be used ({error.strerror}): name another with GPUMGR_STATE_DIR")
    _master["lock"] = lock


def _exit(sentence: str) -> None:
    print(f"gpumgr: {sentence}", file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(2)


def worker_settings() -> config.Settings:
    """What the master runs on, in its worker; the file itself where there is no master (``flask run``)."""
    return _running() if "settings" in _master else config.load()


def raise_descriptor_limit() -> int:
    """The soft limit of open files, raised as far as the hard one and 65536 allow: each waiter holds a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return 65536 if soft == resource.RLIM_INFINITY else soft


def die_with_master() -> None:
    """In the worker, just after the fork: a master that is killed takes the worker along, so that the next one
    finds the port and the lock free (measured: 0.17 s to serving again, 7 s without)."""
    master = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != master:  # it died before the call above
        os._exit(1)
    lock = _master.get("lock")
    if isinstance(lock, FileLock):
        lock.put_down()  # the master's descriptor alone keeps the lock


def start_worker(broker: Broker, wait_seconds: float) -> None:
    """Wait for the old worker's end, start the threads, take the signals. Raises: LockHeldError, OSError."""
    state_dir = broker.settings.server.state_dir
    make_state_dir(state_dir)
    _log_to_stderr()
    lock = FileLock(state_dir / "worker.lock")
    lock.take(wait_seconds)
    _master["worker_lock"] = lock
    broker.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        _chain(number, broker.stop)


def _log_to_stderr() -> None:
    """One line per change of state, beside gunicorn's own; systemd adds the time."""
    ours = logging.getLogger("gpumgr")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(threadName)s] [%(levelname)s] %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


def _chain(number: signal.Signals, stop: Callable[[], None]) -> None:
    previous = signal.getsignal(number)

    def handler(signum: int, frame: FrameType | None) -> None:
        # A helper thread takes the lock: the main thread may hold it at this very moment.
        thread = threading.Thread(target=stop, name="stop", daemon=True)
        thread.start()
        thread.join(0.5)
        if callable(previous):
            previous(signum, frame)

    signal.signal(number, handler)


class TokenlessLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's logger, with every lease token in a path replaced: it logs the URI of a request that fails, and of
    every request where an access log is switched on."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        for logger in (self.error_log, self.access_log):
            for handler in logger.handlers:
                handler.addFilter(_without_token)


def _without_token(record: logging.LogRecord) -> bool:
    record.msg = TOKEN_IN_PATH.sub(r"\1[token]\2", record.getMessage())
    record.args = None
    return True
