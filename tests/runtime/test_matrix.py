"""Every dialect of victim with every way to misbehave, through a started broker on the simulated services.

One cell plays the same story: the victim is on the card, somebody acquires a consumer that may not stand beside it,
and works under the lease if there is one, while somebody else wants the victim. Then the fault is cleared, the victim
works again under a lease of its own, and must make room after all. What must never happen is counted all along.

The cells play side by side, as most of their time is waiting; each test looks at the outcome of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from gpumgr import config
from gpumgr.adapters.clock import SystemClock
from gpumgr.adapters.dialects import dialect_of
from gpumgr.adapters.simulated import SimulatedProbe
from gpumgr.adapters.store import NoStore
from gpumgr.core.lease import Lease
from gpumgr.errors import EvictionFailed, GpumgrError, SchedulerTimeout
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.ticket import Ask
from gpumgr.sim.comfyui import ComfyUI
from gpumgr.sim.ollama import Ollama
from gpumgr.sim.service import Faults, SimulatedService
from gpumgr.sim.speech import Speech
from gpumgr.sim.stage import MODEL, RESIDENT_MIB, Stage
from tests.waiting import until

TARGET_OF = {"comfyui": "ollama", "ollama": "comfyui", "mvoice": "comfyui"}
"""Whom each victim has to make room for. mvoice speaks the generic dialect."""
HEADROOM_MIB = 512
RESIDUAL_MIB = 768
SIDE_BY_SIDE = 8
DIRECT_USE_SECONDS = 1.5


@dataclass(frozen=True)
class Fault:
    """``reason`` is None where the lease must be granted. ``limit_seconds`` is the victim's unload.timeout_seconds.
    ``busy``: somebody uses it without a lease when it is wanted."""

    reason: str | None
    lies: dict[str, Any] = field(default_factory=dict)
    limit_seconds: float = 1.0
    wait_seconds: float = 10.0
    busy: bool = False

    def drains(self, victim: str) -> bool:
        """Whether it looks busy for as long as the fault lasts: ollama alone has no such report."""
        return "hang" in self.lies and victim != "ollama"


FAULTS = {
    "honest": Fault(None),
    "slow": Fault(None, {"slow_unload_seconds": 0.5}, 3.0),
    "answers-200-and-keeps-it": Fault("kept", {"keeps_memory": True}),
    "first-call-lost": Fault(None, {"lose_first_unload": True}, 8.0),
    "busy": Fault(None, limit_seconds=8.0, busy=True),
    "hangs": Fault("hung", {"hang": True}, wait_seconds=3.0),
    "hangs-at-the-unload": Fault("hung", {"hang_unload": True}),
    "dies": Fault(None, {"dies_on_unload": True}),
    "frees-only-half": Fault("kept", {"frees_share": 0.5}),
    "its-list-flickers": Fault(None, {"unlisted_polls": 2}, 8.0),
}
SEEN = "seen"
BLIND = "blind"
"""The driver tells how much is free but not whose the rest is, as in some containers: the 90 % rule proves."""
LISTS = "its-list-flickers"  # ollama alone has one
CELLS = [(victim, fault, SEEN) for victim in TARGET_OF for fault in FAULTS if fault != LISTS or victim == "ollama"]
# mvoice has no report of its own, so a broker that sees no processes knows nothing of it before its first grant.
BLIND_CELLS = [
    (victim, fault, BLIND)
    for victim in ("comfyui", "ollama")
    for fault in FAULTS
    if (victim, fault) != ("comfyui", LISTS)
]
ALL_CELLS = CELLS + BLIND_CELLS
Key = tuple[str, str, str]


@dataclass
class Outcome:
    """What a cell saw. Memory is in MiB, at the instant of the answer."""

    answer: Lease | GpumgrError
    seconds: float
    free_mib: int
    target_mib: int
    victim_mib: int
    over_commits: int = -1
    unloads_under_a_lease: int = 0
    unloads_while_busy: int = -1
    too_soon: Lease | GpumgrError | None = None
    direct_use: str = ""
    rival: Lease | GpumgrError | None = None
    victim_again: Lease | GpumgrError | None = None
    target_again: Lease | GpumgrError | None = None
    victim_mib_again: int = -1
    events: list[dict[str, Any]] = field(default_factory=list)
    left_holds: int = -1


@contextmanager
def running(directory: Path, limits: dict[str, float]) -> Iterator[tuple[Stage, Broker]]:
    """A stage and a started broker on it, wired by hand: the card is read where it is, not from its file."""
    with Stage(directory, speed=20) as stage:
        written = stage.config()
        for name, seconds in limits.items():
            written["consumers"][name].setdefault("unload", {})["timeout_seconds"] = seconds
        file = directory / "consumers.yaml"
        file.write_text(yaml.safe_dump(written), encoding="utf-8")
        settings = config.load_file(file)
        ports = {service.port: name for name, service in stage.services.items()}
        dialects = {name: dialect_of(consumer) for name, consumer in settings.consumers.items()}
        broker = Broker(settings, SimulatedProbe(stage.card.state, ports), dialects, SystemClock(), NoStore())
        broker.start()
        try:
            yield stage, broker
        finally:
            broker.close()


def acquire(broker: Broker, name: str, wait_seconds: float = 10) -> Lease | GpumgrError:
    try:
        return broker.acquire(Ask(consumer=name, wait_seconds=wait_seconds, ttl_seconds=60))
    except GpumgrError as error:
        return error


@dataclass
class Cell:
    """One story on its way."""

    stage: Stage
    broker: Broker
    victim: SimulatedService
    target: SimulatedService
    unloads_under_a_lease: int = 0

    def play(self, fault: Fault) -> Outcome:
        self.stage.warm(self.victim.name)
        until(lambda: self.victim.busy == 0)
        self._lie(fault.lies)
        outcome = self._wanted_while_used() if fault.busy else self._target_is_wanted(fault.wait_seconds)
        if isinstance(outcome.answer, Lease):
            outcome.rival = self._work_while_wanted(outcome.answer, self.target, self.victim)
        self._be_honest()
        outcome.victim_again = acquire(self.broker, self.victim.name)
        if isinstance(outcome.victim_again, Lease):
            self._work_while_wanted(outcome.victim_again, self.victim, self.target)
        outcome.target_again = acquire(self.broker, self.target.name)
        outcome.victim_mib_again = self.victim.used_mib
        if isinstance(outcome.target_again, Lease):
            self._work_while_wanted(outcome.target_again, self.target, self.victim)
        return self._counted(outcome)

    def _lie(self, lies: dict[str, Any]) -> None:
        for name, value in lies.items():
            setattr(self.victim.faults, name, value)

    def _be_honest(self) -> None:
        self.victim.faults = Faults()
        self.victim.start()  # where it died

    def _wanted_while_used(self) -> Outcome:
        """Somebody works at the victim's own page: an impatient caller is told so, a patient one waits for the end."""
        with ThreadPoolExecutor(1) as pool:
            direct = pool.submit(self._use_directly)
            until(lambda: self.victim.busy)
            too_soon = None if self.victim.name == "ollama" else acquire(self.broker, self.target.name, 0.3)
            outcome = self._target_is_wanted()
            outcome.direct_use = direct.result(0 if isinstance(outcome.answer, Lease) else 10)
        outcome.too_soon = too_soon
        return outcome

    def _use_directly(self) -> str:
        """What came of it. Blocks for some DIRECT_USE_SECONDS."""
        if isinstance(self.victim, ComfyUI):
            render, self.victim.render_seconds = self.victim.render_seconds, DIRECT_USE_SECONDS
        elif isinstance(self.victim, Ollama):
            token, self.victim.token_seconds = self.victim.token_seconds, DIRECT_USE_SECONDS / self.victim.tokens
            answer = requests.post(f"{self.victim.url}/api/generate", json={"model": MODEL, "prompt": "hi"}, timeout=30)
            self.victim.token_seconds = token
            return "whole" if b'"done": true' in answer.content.splitlines()[-1] else answer.text
        elif isinstance(self.victim, Speech):
            work, self.victim.work_seconds = self.victim.work_seconds, DIRECT_USE_SECONDS
        self.stage.warm(self.victim.name)  # raises where it was cut
        if isinstance(self.victim, ComfyUI):
            self.victim.render_seconds = render
        elif isinstance(self.victim, Speech):
            self.victim.work_seconds = work
        return "whole"

    def _target_is_wanted(self, wait_seconds: float = 10.0) -> Outcome:
        began = time.monotonic()
        answer = acquire(self.broker, self.target.name, wait_seconds)
        return Outcome(
            answer,
            time.monotonic() - began,
            free_mib=self.stage.card.free_mib(),
            target_mib=self.target.used_mib,
            victim_mib=self.victim.used_mib,
        )

    def _work_while_wanted(
        self, lease: Lease, holder: SimulatedService, rival: SimulatedService
    ) -> Lease | GpumgrError:
        """The holder takes its memory and computes, somebody else presses, and nobody unloads the holder."""
        before = holder.unload_calls
        with ThreadPoolExecutor(1) as pool:
            pressed = pool.submit(acquire, self.broker, rival.name, 0.3)
            self.stage.warm(holder.name)
            answer = pressed.result()
        self.unloads_under_a_lease += holder.unload_calls - before
        self.broker.release(lease.token)
        return answer

    def _counted(self, outcome: Outcome) -> Outcome:
        outcome.over_commits = self.stage.card.over_commits
        outcome.unloads_under_a_lease = self.unloads_under_a_lease
        outcome.unloads_while_busy = sum(service.unloads_while_busy for service in self.stage.services.values())
        outcome.events = [dict(event) for event in self.broker.state.events]
        with self.broker.state.lock:
            outcome.left_holds = len(self.broker.state.queue.holds) + len(self.broker.state.queue.waiting())
        return outcome


def play(directory: Path, victim: str, fault: Fault, sight: str) -> Outcome:
    limits = {victim: fault.limit_seconds, TARGET_OF[victim]: 5.0}
    with running(directory, limits) as (stage, broker):
        stage.card.set_processes_readable(sight == SEEN)
        cell = Cell(stage, broker, stage.services[victim], stage.services[TARGET_OF[victim]])
        return cell.play(fault)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Key, Future[Outcome]]]:
    """All cells that were asked for, the longest first."""
    items = [i for i in request.session.items if isinstance(i, pytest.Function) and i.module is request.module]
    asked_for = {tuple(item.callspec.params.get(name) for name in ("victim", "fault", "sight")) for item in items}
    cells = sorted((cell for cell in ALL_CELLS if cell in asked_for), key=lambda cell: -FAULTS[cell[1]].limit_seconds)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {
            cell: pool.submit(play, tmp_path_factory.mktemp("-".join(cell)), cell[0], FAULTS[cell[1]], cell[2])
            for cell in cells
        }


def names_the_silent(answer: Lease | GpumgrError, victim: str) -> None:
    """A report that hangs counts as busy: it is waited for, and named."""
    assert isinstance(answer, SchedulerTimeout), repr(answer)
    assert answer.details["waiting_for"] == "draining"
    assert f"{victim} says whether it is busy" in answer.message


@pytest.mark.parametrize(("victim", "fault", "sight"), CELLS)
def test_a_grant_is_proved_and_a_refusal_names_its_cause(
    outcomes: dict[Key, Future[Outcome]], victim: str, fault: str, sight: str
) -> None:
    outcome = outcomes[victim, fault, sight].result(60)
    target = TARGET_OF[victim]
    expected = FAULTS[fault].reason
    if expected is None:
        assert isinstance(outcome.answer, Lease), repr(outcome.answer)
        assert outcome.victim_mib <= RESIDUAL_MIB
        assert outcome.free_mib - HEADROOM_MIB >= RESIDENT_MIB[target] - outcome.target_mib
        assert isinstance(outcome.rival, SchedulerTimeout), repr(outcome.rival)
    elif FAULTS[fault].drains(victim):
        names_the_silent(outcome.answer, victim)
    else:
        assert isinstance(outcome.answer, EvictionFailed), repr(outcome.answer)
        assert outcome.victim_mib > RESIDUAL_MIB
        assert outcome.answer.details["victims"] == [
            {
                "consumer": victim,
                "held_mib": RESIDENT_MIB[victim],
                "still_held_mib": outcome.victim_mib,
                "reason": expected,
            }
        ]
        assert outcome.answer.details["evicted"] == []
        assert victim in outcome.answer.message
        assert str(outcome.victim_mib) in outcome.answer.message
        assert outcome.seconds < FAULTS[fault].limit_seconds + 1.5


# Two that went wrong once: ollama that frees only half says in the next round that nothing is loaded, and a failed
# unload was forgiven; of a ComfyUI that hangs nothing is known, and an unload of nothing was proved before its answer.
@pytest.mark.parametrize(("victim", "fault", "sight"), BLIND_CELLS)
def test_where_the_driver_names_no_processes_free_memory_proves(
    outcomes: dict[Key, Future[Outcome]], victim: str, fault: str, sight: str
) -> None:
    outcome = outcomes[victim, fault, sight].result(60)
    target = TARGET_OF[victim]
    expected = FAULTS[fault].reason
    if expected is None:
        assert isinstance(outcome.answer, Lease), repr(outcome.answer)
        assert outcome.victim_mib <= RESIDUAL_MIB
        assert outcome.free_mib - HEADROOM_MIB >= RESIDENT_MIB[target] - outcome.target_mib
    elif FAULTS[fault].drains(victim):
        names_the_silent(outcome.answer, victim)
    else:
        assert isinstance(outcome.answer, EvictionFailed), repr(outcome.answer)
        (named,) = outcome.answer.details["victims"]
        assert (named["consumer"], named["reason"]) == (victim, expected)
        came_free_mib = RESIDENT_MIB[victim] - outcome.victim_mib
        assert named["still_held_mib"] == named["held_mib"] - came_free_mib


@pytest.mark.parametrize(("victim", "fault", "sight"), ALL_CELLS)
def test_what_must_never_happen(outcomes: dict[Key, Future[Outcome]], victim: str, fault: str, sight: str) -> None:
    outcome = outcomes[victim, fault, sight].result(60)
    assert outcome.over_commits == 0
    assert outcome.unloads_under_a_lease == 0
    graceful = victim == "ollama" and FAULTS[fault].busy  # it has no report, and its unload waits for the answer
    assert outcome.unloads_while_busy == 0 or graceful
    assert outcome.left_holds == 0


@pytest.mark.parametrize(("victim", "fault", "sight"), [cell for cell in ALL_CELLS if FAULTS[cell[1]].busy])
def test_direct_use_comes_to_its_end(outcomes: dict[Key, Future[Outcome]], victim: str, fault: str, sight: str) -> None:
    outcome = outcomes[victim, fault, sight].result(60)
    assert outcome.direct_use == "whole"
    assert outcome.seconds > 0.5
    if victim != "ollama":
        assert isinstance(outcome.too_soon, SchedulerTimeout), repr(outcome.too_soon)
        assert outcome.too_soon.details["waiting_for"] == "draining"
        assert outcome.too_soon.details["in_use"] == [{"consumer": victim, "in_use": "direct"}]


@pytest.mark.parametrize(("victim", "fault", "sight"), ALL_CELLS)
def test_the_victim_serves_again_and_makes_room_after_all(
    outcomes: dict[Key, Future[Outcome]], victim: str, fault: str, sight: str
) -> None:
    outcome = outcomes[victim, fault, sight].result(60)
    assert isinstance(outcome.victim_again, Lease), repr(outcome.victim_again)
    assert isinstance(outcome.target_again, Lease), repr(outcome.target_again)
    assert outcome.victim_mib_again <= RESIDUAL_MIB


@pytest.mark.parametrize(("victim", "fault", "sight"), CELLS)
def test_every_unload_is_told(outcomes: dict[Key, Future[Outcome]], victim: str, fault: str, sight: str) -> None:
    outcome = outcomes[victim, fault, sight].result(60)
    told = [event for event in outcome.events if event["type"] in ("evict", "evict_failed")]
    first = told[0]
    expected = None if FAULTS[fault].drains(victim) else FAULTS[fault].reason
    refusals = {"scheduler_timeout"} | (set() if expected is None else {"eviction_failed"})
    assert (first["consumer"], first["for"]) == (victim, TARGET_OF[victim])
    assert (first["type"], first.get("reason")) == ("evict" if expected is None else "evict_failed", expected)
    assert first["held_mib"] == RESIDENT_MIB[victim]
    refused = [event for event in outcome.events if event["type"] == "refuse"]
    codes = {event["code"] for event in refused}
    assert codes == refusals
