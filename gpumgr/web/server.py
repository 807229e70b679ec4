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
import errno
import gc
import logging
import logging.handlers
import os
import queue
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from gunicorn.glogging import Logger

from gpumgr import config
from gpumgr.adapters import store
from gpumgr.adapters.filelock import FileLock, LockHeldError, make_state_dir
from gpumgr.config.access import TOKENS_VARIABLE, environment_tokens, require_private
from gpumgr.runtime.broker import Broker

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
TOKEN = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]{32}(?![A-Za-z0-9_-])")
"""As `secrets.token_urlsafe(24)` writes it, wherever it stands."""
TOKEN_IN_PATH = re.compile(r"(/v1/lease/)[^/\s?\"']+(/renew)?[^\s\"']*")
CREDENTIALS = re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"']+")
"""A header that cannot be read is logged by gunicorn as it came."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LOG_LINES_KEPT = 1000
PORT_SECONDS = 2.0
COLLECT_EACH = 10_000
"""New objects between two looks of the collector of cycles; Python's own 700 are some two requests."""

_master: dict[str, Any] = {}
"""This process's lock and the settings it runs on. A process has one state directory, whatever is imported how
often: gunicorn executes its configuration file again on SIGHUP."""


def settings_or_exit() -> config.Settings:
    """The settings, with the master's lock taken. A wrong file or a second broker: one sentence and exit 2.

    On SIGHUP with a file that has become wrong, the old settings stay in force and the sentence is printed: a typo
    must not end a running broker.
    """
    try:
        settings = config.load(tokens=environment_tokens_taken())
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
        _require_usable_store(settings)
        _require_free_port(settings.server.bind)
    _master["settings"] = settings
    return settings


def environment_tokens_taken() -> tuple[config.Token, ...]:
    """Taken out of the environment, so that no child and no later look at it finds the secrets; what a SIGHUP finds is
    what the start has found, hashed."""
    written = os.environ.pop(TOKENS_VARIABLE, None)
    if written is not None:
        _master["tokens"] = environment_tokens({TOKENS_VARIABLE: written})
    found: tuple[config.Token, ...] = _master.get("tokens", ())
    return found


def forget_secrets(arbiter: Any) -> None:
    """gunicorn keeps a copy of the environment for the program it would start at SIGUSR2. In the master."""
    arbiter.cfg.env_orig.pop(TOKENS_VARIABLE, None)


def require_private_listeners(arbiter: Any) -> None:
    """``--bind`` and a socket handed over by systemd are none of the file's. In the master, before a worker serves."""
    server = _running().server
    for listener in arbiter.LISTENERS:
        address = listener.getsockname()
        bind = "unix:" if isinstance(address, str | bytes) else f"{address[0]}:{address[1]}"
        try:
            require_private(server, bind, "the address")
        except config.ConfigError as error:
            arbiter.log.error("%s", error)
            arbiter.halt(exit_status=2)


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


def _require_usable_store(settings: config.Settings) -> None:
    """Here, as a worker's exit code does not reach the shell."""
    try:
        store.examine(settings.server.state_dir / store.FILE)
    except store.Unusable as error:
        _exit(str(error))


def _require_free_port(bind: str) -> None:
    """gunicorn would try for five seconds and print ten lines. A worker that dies with its master may hold the port
    for a moment longer."""
    host, _, port = bind.rpartition(":")
    if bind.startswith("unix:") or "LISTEN_FDS" in os.environ:
        return
    until = time.monotonic() + PORT_SECONDS
    while (trouble := _cannot_listen(host.strip("[]"), int(port))) is not None:
        if trouble.errno != errno.EADDRINUSE or time.monotonic() > until:
            _exit(f"{bind} cannot be listened on ({trouble.strerror}): choose another with GPUMGR_BIND")
        time.sleep(0.05)


def _cannot_listen(host: str, port: int) -> OSError | None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return error
    return None


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


def ignore_worker_count_signals() -> None:
    """SIGTTIN would start a second worker, which ends the broker when it does not get the lock; SIGTTOU would end
    the only one. In the master."""
    for number in (signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)


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


def spare_collector() -> None:
    """In the worker, when its modules and routes are there: they stay, so the collector of cycles need not walk through
    them, and what a request makes is mostly gone with it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EACH)


def start_worker(broker: Broker, wait_seconds: float) -> None:
    """Wait for the old worker's end, start the threads, take the signals. Raises: LockHeldError, OSError."""
    state_dir = broker.settings.server.state_dir
    make_state_dir(state_dir)
    _log_to_stderr()
    lock = FileLock(state_dir / "worker.lock")
    lock.take(wait_seconds)
    _master["worker_lock"] = lock
    broker.start()
    stopping = _SignalThread(broker.stop)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        stopping.chain(number)


def _log_to_stderr() -> None:
    """One line per change of state, beside gunicorn's own; systemd adds the time."""
    ours = logging.getLogger("gpumgr")
    if not ours.handlers:
        stderr = logging.StreamHandler()
        stderr.setFormatter(logging.Formatter("[%(asctime)s] [%(threadName)s] [%(levelname)s] %(message)s"))
        lines: queue.Queue[Any] = queue.Queue(LOG_LINES_KEPT)
        handler = DroppingHandler(lines)
        logging.handlers.QueueListener(lines, stderr).start()
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


class DroppingHandler(logging.handlers.QueueHandler):
    """Hands lines to a thread that writes them. Nobody else ever waits for stderr: a pipe that nobody drains (a
    stalled journald, a pager) would stop renews and expiries. What does not fit is dropped, and the next line that
    does says how many were."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                record.msg = f"{record.msg} ({self.dropped} lines before this one were dropped)"
            self.queue.put_nowait(record)
            self.dropped = 0
        except queue.Full:
            self.dropped += 1

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """A holder's label or a process's name must not begin a line of its own."""
        prepared: logging.LogRecord = super().prepare(record)
        if not prepared.exc_text and record.exc_info is None:
            prepared.msg = prepared.message = CONTROL.sub(_escaped, prepared.getMessage())
        return prepared


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()


class _SignalThread:
    """Runs ``stop`` when a signal comes. The thread is there before the signal: starting one inside a handler can
    wait for a lock that the interrupted main thread holds, as gunicorn's main loop starts threads itself."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._read, self._write = os.pipe()
        self._done = threading.Event()
        threading.Thread(target=self._run, name="stop", daemon=True).start()

    def _run(self) -> None:
        os.read(self._read, 1)
        try:
            self._stop()
        finally:
            self._done.set()

    def chain(self, number: signal.Signals) -> None:
        previous = signal.getsignal(number)

        def handler(signum: int, frame: FrameType | None) -> None:
            os.write(self._write, b"x")
            self._done.wait(0.5)
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
    said = CREDENTIALS.sub(r"\1 [token]", record.getMessage())
    record.msg = TOKEN.sub("[token]", TOKEN_IN_PATH.sub(r"\1[token]\2", said))
    record.args = None
    return True
