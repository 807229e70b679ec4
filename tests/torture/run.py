"""One run: a card, a broker, callers and a nemesis, until the time is over and everything has come to rest.

Owns: the order of it. Must not: judge.

    callers and nemesis begin → the time is over → the nemesis rests, callers end what they hold → whatever is left
    expires → last look at status → the broker stops → its rows are read
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.torture.checker import CLOCKS_NS
from tests.torture.clients import CONSUMERS, Client
from tests.torture.history import SECOND, Final, Ledger, Recorder, Run, Truth, boot_ns, boot_of_wall
from tests.torture.mutants import ENV
from tests.torture.nemesis import Nemesis
from tests.torture.plan import Plan
from tests.waiting import until

CARD_MIB = 4500
"""Each of the two consumers fits, and not both: the card notices who is let in too early."""
LOOKS = 50
MUTANT_CONF = ("-c", "tests/torture/mutant.conf.py")


@dataclass(frozen=True, slots=True)
class Outcome:
    run: Run
    broken: Sequence[str]
    """What no caller should see, and a broker that did not come back."""


def torture(directory: Path, plan: Plan, mutant: str | None = None) -> Outcome:
    quantum_ns = None if plan.quantum_seconds is None else round(plan.quantum_seconds * SECOND)
    with closing(Recorder(directory / "history.jsonl", quantum_ns)) as recorder:
        return _recorded(recorder, directory, plan, mutant)


def _recorded(recorder: Recorder, directory: Path, plan: Plan, mutant: str | None) -> Outcome:
    env = {} if mutant is None else {ENV: mutant}
    arguments = () if mutant is None else MUTANT_CONF
    with Stage(directory, speed=50, total_mib=CARD_MIB) as stage:
        broker = RunningBroker(directory, _config(stage, directory, plan), env)
        ledger = Ledger(broker.state_dir / "gpumgr.db")
        with _started(broker, arguments):
            broken = _under_torture(broker, stage, recorder, ledger, arguments, plan)
            recorder.add(_drained(broker, stage, plan.drain_seconds))
        ledger.read()
    ledger.into(recorder.run)
    return Outcome(recorder.run, broken)


def _config(stage: Stage, directory: Path, plan: Plan) -> dict[str, Any]:
    config = stage.config(state_dir=directory / "state")
    config["lease"] = {"min_ttl_seconds": 1}
    config["scheduling"] = {"policy": "fifo"}
    if plan.quantum_seconds is not None:
        config["scheduling"] = {"policy": "quantum", "quantum_seconds": plan.quantum_seconds}
    config["consumers"] = {name: config["consumers"][name] | {"can_coexist_with": []} for name in CONSUMERS}
    config["routing"] = {kind: name for kind, name in config["routing"].items() if name in CONSUMERS}
    return config


@contextmanager
def _started(broker: RunningBroker, arguments: Sequence[str]) -> Iterator[None]:
    try:
        broker.start(*arguments)
        yield
    finally:
        broker.http.close()
        if broker.process is not None and broker.process.poll() is None:
            broker.stop()


def _under_torture(
    broker: RunningBroker, stage: Stage, recorder: Recorder, ledger: Ledger, arguments: Sequence[str], plan: Plan
) -> list[str]:
    over = threading.Event()
    clients = [
        Client(number, broker.port, recorder, stage, plan.manners, plan.seed, over) for number in range(plan.clients)
    ]
    threads = [threading.Thread(target=client.run, name=f"client-{n}") for n, client in enumerate(clients)]
    nemesis = Nemesis(broker, arguments, plan.moods, plan.seed)
    timer = threading.Timer(plan.seconds, over.set)
    timer.start()
    for thread in threads:
        thread.start()
    broken = []
    try:
        while nemesis.wait(over):
            recorder.add(nemesis.strike())
            recorder.add(_look(broker, stage))
            with suppress(sqlite3.Error):  # in the middle of a start; the next time, or the last one, reads it
                ledger.read()
    except (AssertionError, TimeoutError) as error:
        broken.append(str(error))
    finally:
        timer.cancel()
        over.set()
        for thread in threads:
            thread.join()
    return broken + [what for client in clients for what in client.broken]


def _look(broker: RunningBroker, stage: Stage) -> Truth:
    """The card and status at one time: again where the card has changed meanwhile, or where status had no time to
    read it anew and shows what it read before."""
    for _ in range(LOOKS):
        began_ns, before = boot_ns(), _on_card(stage.card.state())
        with requests.Session() as http:
            status = http.get(f"{broker.url}/v1/status", timeout=10).json()
        read_ns = boot_of_wall(status["gpus"][0]["read_at"])
        if before == _on_card(stage.card.state()) and read_ns + CLOCKS_NS >= began_ns:
            break
    return Truth(boot_ns(), before, _on_card(status))


def _on_card(state: Mapping[str, Any]) -> dict[str, int]:
    return {
        process.get("consumer") or process["name"]: process["used_mib"]
        for gpu in state["gpus"]
        for process in gpu["processes"]
    }


def _drained(broker: RunningBroker, stage: Stage, seconds: float) -> Final:
    """Everybody has gone: what is left then is left for good."""
    broker.http.close()
    with suppress(TimeoutError):
        until(lambda: _left(broker) == (0, 0), seconds, every_seconds=0.05)
    waiting, held = _left(broker)
    return Final(queue=waiting, leases=held, over_commits=stage.card.over_commits)


def _left(broker: RunningBroker) -> tuple[int, int]:
    status = broker.status()
    return len(status["queue"]), len(status["leases"])
