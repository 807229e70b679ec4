"""Back to serving after a kill -9, of the worker and of the master.

How: 8 times each, with a live lease and ten callers waiting for it: from the kill until the lease can be renewed on a
fresh connection, asked each 5 ms. Where the master is killed, it is started again at once: what a service manager waits
before that is its own affair. The waiters lose their connections and are put there anew for the next kill.

Bar: the slowest at most 1 s.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from bench.figure import Bar, Figure, spread
from bench.rig import Caller, rig
from tests.brokers import RunningBroker
from tests.waiting import until

AT_MOST_SECONDS = 1.0
WAITING = 10
BACK_SECONDS = 30


def run(rounds: int = 8) -> Figure:
    with rig() as stage:
        stage.load_speech()
        broker = stage.broker()
        with Caller(broker.port) as holder:
            token = holder.acquire("mvoice")
        worker = [_back(broker, token, _kill_worker) for _ in range(rounds)]
        master = [_back(broker, token, _kill_master) for _ in range(rounds)]
    return Figure(
        name="restart",
        unit="ms",
        measured=spread("worker", worker) | spread("master", master) | {"rounds": rounds, "waiting": WAITING},
        bars=[
            Bar("worker killed until its lease is renewed, slowest", round(max(worker), 3), AT_MOST_SECONDS, "s"),
            Bar("master killed until its lease is renewed, slowest", round(max(master), 3), AT_MOST_SECONDS, "s"),
        ],
    )


def _back(broker: RunningBroker, token: str, kill: Callable[[RunningBroker], None]) -> float:
    waiting = [Caller(broker.port) for _ in range(WAITING)]
    try:
        for caller in waiting:
            caller.ask("mvoice")
        until(lambda: _waiting(broker, token) == WAITING, BACK_SECONDS)
        start = time.perf_counter()
        kill(broker)
        until(lambda: _waiting(broker, token) is not None, BACK_SECONDS)
        return time.perf_counter() - start
    finally:
        for caller in waiting:
            caller.close()


def _waiting(broker: RunningBroker, token: str) -> int | None:
    """How many the lease holds up; None where nobody answers. Raises: RuntimeError where the lease is unknown."""
    try:
        with Caller(broker.port) as caller:
            return int(caller.renew(token)["waiting"])
    except OSError:
        return None


def _kill_worker(broker: RunningBroker) -> None:
    os.kill(broker.worker_pid(), signal.SIGKILL)


def _kill_master(broker: RunningBroker) -> None:
    if broker.process is None:
        raise RuntimeError("the broker was never started")
    broker.process.kill()
    broker.process.wait(BACK_SECONDS)
    broker.start(wait=False)
