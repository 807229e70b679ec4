"""What systemd is told: ready, handing over, stopping, and that everything that must live does.

Owns: the notify socket, the thread ``notify``, and what counts as alive. Must not: change anything in the broker.
Without systemd nothing is sent and there is no thread.

    master   takes the variables away: gunicorn's arbiter would say READY=1 before it has a worker
             SIGHUP → RELOADING=1; SIGTERM, SIGINT, SIGQUIT → STOPPING=1. A worker cannot say it: its SIGTERM may be
             a hand-over, and systemd would take the unit for ending
    worker   lock, pool, threads and probe live → READY=1, once, and WATCHDOG=1 each third of WatchdogSec

A restart cuts whoever waits or streams, so a ping is kept back only for what it cures: our own parts. A driver that
answers with an error, or hangs, is told by a probe that is alive: without it nothing new is granted, and renew, release
and expiry go on. Restarting for it would make that worse. A call that hangs does so in the kernel, beyond SIGKILL: the
killed worker would keep the port and its lock, and the next broker find them taken and exit with 2, which is for good.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any

from gpumgr.runtime.broker import Broker
from gpumgr.runtime.watchdog import Rounds

log = logging.getLogger(__name__)

PROOF_SECONDS = 2.0
LOOK_SECONDS = 30.0
"""The card is looked at each 2 s, and a probe says after 5 s that the driver hangs."""
EACH_SECONDS = 20.0
"""Where the unit has no WatchdogSec."""
AGAIN_SECONDS = 1.0
"""While something fails: on a stalled machine one good moment in all of WatchdogSec is enough."""
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to connect to where that was bound
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: gpumgr\r\nConnection: close\r\n\r\n"
BROKERS_THREADS = ("watchdog", "prepare-", "observe-", "keep-store", "housekeeping", "watch-games")


@dataclass(frozen=True, slots=True)
class Manager:
    """Where the service manager listens, None: there is none; and the unit's WatchdogSec (sd_notify(3))."""

    address: str | None = None
    watchdog_seconds: float | None = None

    def tell(self, message: str) -> bool:
        """Whether it was sent. Never raises, and waits only where the manager's queue is full."""
        if self.address is None:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(PROOF_SECONDS)
                sock.connect(self.address)
                sock.send(message.encode())
        except OSError as error:
            log.debug("systemd was not told: %s", error)
            return False
        return True


def manager_of(environ: MutableMapping[str, str]) -> Manager:
    """The variables are taken away, so that neither gunicorn nor a child uses them.

    WATCHDOG_PID is the process that the unit started. Where that is another one, the watchdog is not for us.
    """
    address = environ.pop("NOTIFY_SOCKET", "")
    usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", str(os.getpid()))
    if address[:1] not in ("/", "@"):
        return Manager()
    ours = usec.isdecimal() and int(usec) > 0 and pid == str(os.getpid())
    return Manager(address.replace("@", "\0", 1) if address[0] == "@" else address, int(usec) / 1e6 if ours else None)


@cache
def manager() -> Manager:
    """In the master, when gunicorn executes its configuration file: the first time finds the variables, and a SIGHUP
    and every worker what was found then."""
    return manager_of(os.environ)


def tell_signals() -> None:
    """In the master, after gunicorn has taken its signals."""
    _tell_at(signal.SIGHUP, "RELOADING=1\nSTATUS=handing over to a new worker")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        _tell_at(number, "STOPPING=1\nSTATUS=answering everyone who waits")


def _tell_at(number: signal.Signals, message: str) -> None:
    previous, master = signal.getsignal(number), os.getpid()

    def handler(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == master:  # a worker has the master's handlers until it has its own
            manager().tell(message)
        if callable(previous):
            previous(signum, frame)

    signal.signal(number, handler)


def start(broker: Broker, listener: Any) -> None:
    """In the worker, when the broker's threads run; ``listener`` is the address that gunicorn listens on."""
    if manager().address is not None:
        Rounds("notify", Pulse(broker, listener, manager()).beat).start()


class Pulse:
    """What the thread ``notify`` does. ``threads`` are those of the broker that live until it stops."""

    def __init__(
        self,
        broker: Broker,
        listener: Any,
        manager: Manager,
        proof_seconds: float = PROOF_SECONDS,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._broker = broker
        self._listener = listener
        self._manager = manager
        self._proof_seconds = proof_seconds
        self._look_seconds = look_seconds
        self._each = EACH_SECONDS if manager.watchdog_seconds is None else manager.watchdog_seconds / 3
        self.threads = [t for t in threading.enumerate() if t.name.startswith(BROKERS_THREADS)]
        self._ready = False
        self._logged: str | None = None

    def beat(self) -> float:
        """Look and tell; the seconds until the next time."""
        failure = None if self._broker.state.stopping else self.failure()
        if self._broker.state.stopping:
            return self._each  # neither a failure nor a proof: the pool may be that of the next worker
        self._log(failure)
        if failure is not None:
            self._tell(failure)
            return min(AGAIN_SECONDS, self._each)
        lines = ["WATCHDOG=1"] if self._ready else ["READY=1", "WATCHDOG=1"]
        told = self._tell("; ".join(self._broker.missing()) or "granting", *lines)
        self._ready = self._ready or told
        return self._each if told else min(AGAIN_SECONDS, self._each)

    def _tell(self, status: str, *lines: str) -> bool:
        return self._manager.tell("\n".join([*lines, f"STATUS={' '.join(status.split())}"]))

    def _log(self, failure: str | None) -> None:
        if failure == self._logged:
            return
        self._logged = failure
        if failure is None:
            log.info("everything lives again: systemd is pinged")
        else:
            log.error("%s: systemd is not pinged", failure)

    def failure(self) -> str | None:
        """The first thing that does not live, in one sentence."""
        return self._lock() or silence(self._listener, self._proof_seconds) or self._dead_thread() or self._idle_probe()

    def _lock(self) -> str | None:
        if not self._broker.state.lock.acquire(timeout=self._proof_seconds):
            return f"the broker's lock was not free within {self._proof_seconds:g} s"
        self._broker.state.lock.release()
        return None

    def _dead_thread(self) -> str | None:
        return next((f"the thread {thread.name} is dead" for thread in self.threads if not thread.is_alive()), None)

    def _idle_probe(self) -> str | None:
        """Not before the first look: what never worked is not cured by a restart, tried again and again."""
        read_at = self._broker.state.reading.read_at
        if read_at == float("-inf") or self._broker.clock.monotonic() - read_at <= self._look_seconds:
            return None
        return f"the card was not looked at for {self._look_seconds:g} s"


def silence(listener: Any, seconds: float) -> str | None:
    """Why no thread of the pool answers; None where one does, whatever it says, and where the address is not this
    machine's at the moment: a restart could not listen on it."""
    family, address = _reachable(listener)
    try:
        with socket.socket(family) as sock, sock.makefile("rb") as answer:
            sock.settimeout(seconds)
            if family != socket.AF_UNIX:
                sock.bind((address[0], 0, *address[2:]))  # fails where the address is not here, unlike a connect
            sock.connect(address)
            sock.sendall(REQUEST)
            return None if answer.read().startswith(b"HTTP/") else "the pool closed GET /healthz without an answer"
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        return f"the pool did not answer GET /healthz within {seconds:g} s ({error})"


def _reachable(listener: Any) -> tuple[socket.AddressFamily, Any]:
    """As ``getsockname`` told it: a path, or a tuple of two for IPv4 and of four for IPv6."""
    if isinstance(listener, str | bytes):
        return socket.AF_UNIX, listener
    host, *rest = listener
    return (socket.AF_INET6 if len(rest) > 1 else socket.AF_INET), (ANYWHERE.get(host, host), *rest)
