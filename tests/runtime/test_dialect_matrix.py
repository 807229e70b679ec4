"""The dialects of test_matrix.py's neighbours, each with every way to misbehave: llama-server's router, vLLM, a systemd
unit, a container, programs of the operator's. Real sockets and real processes, through a started broker.

One cell plays one story. The victim is on the card; somebody acquires a consumer that may not stand beside it, and
works under the lease while somebody else presses for the victim. Then the fault is cleared, the victim is leased
(woken, or started again), works, and makes room after all. The cells play side by side: most of their time is waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from gpumgr import config
from gpumgr.adapters.clock import SystemClock
from gpumgr.adapters.dialects import REGISTERED, dialect_of
from gpumgr.adapters.dialects.http import Http
from gpumgr.adapters.dialects.systemd import Systemd
from gpumgr.adapters.simulated import SimulatedProbe
from gpumgr.adapters.store import NoStore
from gpumgr.core.lease import Lease
from gpumgr.errors import EvictionFailed, GpumgrError, SchedulerTimeout
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.ticket import Ask
from gpumgr.sim.card import SimulatedCard
from gpumgr.sim.llama_server import LlamaServer
from gpumgr.sim.service import Faults, SimulatedService
from gpumgr.sim.speech import Speech
from gpumgr.sim.vllm import Vllm
from tests.keepers import Engine, Executable, Keeper
from tests.runtime.test_matrix import TARGET_OF
from tests.waiting import until

SIZE_MIB = 14000
"""Two of them do not fit on the card of 24000 MiB: whoever is granted too soon over-commits."""
RESIDUAL_MIB = 1536
SIDE_BY_SIDE = 8
WORK_SECONDS = 1.5
LIMIT_SECONDS = 1.0
PROGRAM_SECONDS = 2.0
"""The same where a program has to begin within it, on a loaded machine."""
PATIENT_SECONDS = 8.0
SERVERS = ("llama_server", "vllm")
KEPT = ("systemd", "docker", "command")
FAULTS = ("honest", "slow", "answers-200-and-keeps-it", "busy", "hangs", "dies", "refuses")
CELLS = [(victim, fault) for victim in (*SERVERS, *KEPT) for fault in FAULTS]
REFUSAL = {
    "llama_server": "start it as a router",
    "vllm": "VLLM_SERVER_DEV_MODE=1",
    "systemd": "systemctl exits with 1 Job failed: Access denied",
    "docker": "answers 500",
    "command": "ctl exits with 1 Job failed: Access denied",
}
"""What each of them says that will not unload; it has to reach whoever asked for the GPU."""


@dataclass
class Outcome:
    answer: Lease | GpumgrError
    victim_mib: int
    over_commits: int = -1
    unloads_while_busy: int = -1
    unloads_under_a_lease: int = -1
    work: str = "whole"
    too_soon: Lease | GpumgrError | None = None
    rival: Lease | GpumgrError | None = None
    victim_again: Lease | GpumgrError | None = None
    target_again: Lease | GpumgrError | None = None
    victim_mib_again: int = -1
    left_holds: int = -1


@dataclass
class Stage:
    """A card, the victim and whoever wants its place, and a started broker."""

    card: SimulatedCard
    victim: SimulatedService
    target: Speech
    keeper: Keeper | None
    written: dict[str, Any]
    broker: Broker = field(init=False)

    @property
    def unloads(self) -> int:
        return self.victim.unload_calls if self.keeper is None else self.keeper.stops

    @property
    def unloads_while_busy(self) -> int:
        kept = 0 if self.keeper is None else self.keeper.stopped_while_busy
        return self.victim.unloads_while_busy + self.target.unloads_while_busy + kept

    def work(self, service: SimulatedService) -> str:
        """As one of its users, without the broker: ``whole``, or what came instead."""
        path = "/v1/audio/speech" if isinstance(service, Speech) else "/v1/chat/completions"
        answer = requests.post(service.url + path, json={"input": "hi", "model": "m"}, timeout=30)
        cut = not answer.ok or b"abort" in answer.content or b"proxy error" in answer.content
        return answer.text if cut else "whole"

    def acquire(self, name: str, wait_seconds: float = 10) -> Lease | GpumgrError:
        try:
            return self.broker.acquire(Ask(consumer=name, wait_seconds=wait_seconds, ttl_seconds=60))
        except GpumgrError as error:
            return error

    def misbehave(self, fault: str) -> None:
        if self.keeper is not None:
            self.keeper.slow_seconds = 0.3 if fault == "slow" else 0.0
            self.keeper.keeps = fault == "answers-200-and-keeps-it"
            self.keeper.hangs = fault == "hangs"
            self.keeper.dies = fault == "dies"
            self.keeper.refuses = "Access denied" if fault == "refuses" else ""
            return
        self.victim.faults = Faults(
            slow_unload_seconds=0.3 if fault == "slow" else 0.0,
            keeps_memory=fault == "answers-200-and-keeps-it",
            hang=fault == "hangs",
            dies_on_unload=fault == "dies",
        )
        if isinstance(self.victim, Vllm):
            self.victim.dev_mode, self.victim.starts_asleep = fault != "refuses", True
        elif isinstance(self.victim, LlamaServer):
            self.victim.single = fault == "refuses"

    def play(self, fault: str) -> Outcome:
        if not isinstance(self.victim, Vllm):
            self.work(self.victim)
        until(lambda: self.victim.used_mib == SIZE_MIB and not self.victim.busy, 20)
        self.misbehave(fault)
        outcome = self._while_busy() if fault == "busy" else self._wanted(1.0 if fault == "hangs" else 10.0)
        under = 0
        if isinstance(outcome.answer, Lease):
            outcome.rival, under = self._under_lease(outcome.answer, self.target, "victim")
        self.misbehave("honest")
        if self.keeper is None:
            self.victim.start()  # where it died
        outcome.victim_again = self.acquire("victim")
        if isinstance(outcome.victim_again, Lease):
            _, more = self._under_lease(outcome.victim_again, self.victim, "target")
            under += more
        outcome.target_again = self.acquire("target")
        outcome.victim_mib_again = self.victim.used_mib
        if isinstance(outcome.target_again, Lease):
            self.broker.release(outcome.target_again.token)
        outcome.over_commits, outcome.unloads_while_busy = self.card.over_commits, self.unloads_while_busy
        outcome.unloads_under_a_lease = under
        with self.broker.state.lock:
            outcome.left_holds = len(self.broker.state.queue.holds)
        return outcome

    def _wanted(self, wait_seconds: float = 10.0) -> Outcome:
        answer = self.acquire("target", wait_seconds)
        return Outcome(answer, self.victim.used_mib)

    def _while_busy(self) -> Outcome:
        """Somebody works at the victim's own page: who is impatient is told so, who is patient waits for its end."""
        quick, self.victim.work_seconds = self.victim.work_seconds, WORK_SECONDS  # type: ignore[attr-defined]
        with ThreadPoolExecutor(1) as pool:
            direct = pool.submit(self.work, self.victim)
            until(lambda: self.victim.busy, 20)
            too_soon = self.acquire("target", 0.2)
            outcome = self._wanted()
            outcome.work, outcome.too_soon = direct.result(10), too_soon
        self.victim.work_seconds = quick  # type: ignore[attr-defined]
        return outcome

    def _under_lease(self, lease: Lease, holder: SimulatedService, rival: str) -> tuple[Lease | GpumgrError, int]:
        """The holder works, somebody else presses, and nobody unloads the holder."""
        before = self.target.unload_calls if holder is self.target else self.unloads
        with ThreadPoolExecutor(1) as pool:
            pressed = pool.submit(self.acquire, rival, 0.2)
            assert self.work(holder) == "whole"
            answer = pressed.result()
        after = self.target.unload_calls if holder is self.target else self.unloads
        self.broker.release(lease.token)
        return answer, after - before


def limit_of(kind: str, fault: str) -> float:
    """``unload.timeout_seconds``: what is waited for is short, what ends is given its time."""
    if fault not in ("answers-200-and-keeps-it", "hangs", "refuses"):
        return PATIENT_SECONDS
    return PROGRAM_SECONDS if kind in ("systemd", "command") else LIMIT_SECONDS


def a_stage(kind: str, fault: str, directory: Path, stack: ExitStack) -> tuple[Stage, dict[str, Http]]:
    card = SimulatedCard()
    victim: SimulatedService
    keeper: Keeper | None = None
    if kind == "llama_server":
        victim = LlamaServer("victim", card, models={"m": SIZE_MIB})
    elif kind == "vllm":
        victim = Vllm("victim", card, resident_mib=SIZE_MIB)
    else:
        victim = Speech("victim", card, resident_mib=SIZE_MIB)
        keeper = Keeper(victim)
    target = Speech("target", card, resident_mib=SIZE_MIB)
    stack.callback(victim.stop)
    stack.enter_context(target)
    victim.start()
    written: dict[str, Any] = {"dialect": kind, "url": victim.url}
    written |= {"vram_resident_mib": SIZE_MIB, "unload": {"timeout_seconds": limit_of(kind, fault)}}
    program = ""
    if keeper is not None:
        written |= {"health": {"path": "/health"}, "busy": {"path": "/busy", "json": "running"}}
    if kind == "systemd" and keeper is not None:
        program = str(stack.enter_context(Executable(directory, "systemctl", keeper)).program)
        written["unit"] = "victim"
    elif kind == "docker" and keeper is not None:
        written |= {"container": "victim", "socket": stack.enter_context(Engine(directory, "victim", keeper)).path}
    elif kind == "command" and keeper is not None:
        program = str(stack.enter_context(Executable(directory, "ctl", keeper)).program)
        written["unload"]["command"] = [program, "stop"]
        written["load"] = {"command": [program, "start"], "starts_service": True}
        written["busy"] = {"command": [program, "busy"]}
    stage = Stage(card, victim, target, keeper, written)
    wanted = {
        "dialect": "http",
        "url": target.url,
        "vram_resident_mib": SIZE_MIB,
        "busy": {"path": "/busy", "json": "running"},
        "unload": {"path": "/unload", "timeout_seconds": 5},
    }
    file = directory / "consumers.yaml"
    file.write_text(yaml.safe_dump({"consumers": {"victim": written, "target": wanted}}), encoding="utf-8")
    settings = config.load_file(file)
    dialects = {name: dialect_of(consumer) for name, consumer in settings.consumers.items()}
    if isinstance(dialects["victim"], Systemd):
        dialects["victim"].systemctl = program
    probe = SimulatedProbe(card.state, {victim.port: "victim", target.port: "target"})
    stage.broker = Broker(settings, probe, dialects, SystemClock(), NoStore())
    stage.broker.start()
    stack.callback(stage.broker.close)
    return stage, dialects


def play(directory: Path, kind: str, fault: str) -> Outcome:
    with ExitStack() as stack:
        stage, _ = a_stage(kind, fault, directory, stack)
        return stage.play(fault)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Future[Outcome]]]:
    items = [i for i in request.session.items if isinstance(i, pytest.Function) and i.module is request.module]
    asked = {(i.callspec.params["victim"], i.callspec.params["fault"]) for i in items if hasattr(i, "callspec")}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        yield {
            (kind, fault): pool.submit(play, tmp_path_factory.mktemp(f"{kind}-{fault[:5]}"), kind, fault)
            for kind, fault in sorted(CELLS, key=lambda cell: cell[1] != "hangs")
            if (kind, fault) in asked
        }


@pytest.mark.parametrize(("victim", "fault"), CELLS)
def test_a_grant_is_proved_and_a_failure_names_its_cause(
    outcomes: dict[tuple[str, str], Future[Outcome]], victim: str, fault: str
) -> None:
    outcome = outcomes[victim, fault].result(60)
    answer = outcome.answer
    if fault in ("honest", "slow", "busy", "dies"):
        assert isinstance(answer, Lease), repr(answer)
        assert outcome.victim_mib <= RESIDUAL_MIB
        assert isinstance(outcome.rival, SchedulerTimeout)
    elif fault == "hangs" and victim in SERVERS:
        assert isinstance(answer, SchedulerTimeout), repr(answer)
        assert "victim says whether it is busy" in answer.message
        assert "not answered within" in answer.message
    else:
        assert isinstance(answer, EvictionFailed), repr(answer)
        (named,) = answer.details["victims"]
        assert (named["consumer"], named["reason"]) == ("victim", "hung" if fault == "hangs" else "kept")
        assert named["still_held_mib"] == outcome.victim_mib == SIZE_MIB
        if fault == "refuses":
            assert REFUSAL[victim] in answer.message
            assert REFUSAL[victim] in named["cause"]


@pytest.mark.parametrize(("victim", "fault"), CELLS)
def test_what_must_never_happen(outcomes: dict[tuple[str, str], Future[Outcome]], victim: str, fault: str) -> None:
    outcome = outcomes[victim, fault].result(60)
    assert (outcome.over_commits, outcome.unloads_while_busy, outcome.unloads_under_a_lease) == (0, 0, 0)
    assert outcome.work == "whole"
    assert outcome.left_holds == 0
    if fault == "busy":
        assert isinstance(outcome.too_soon, SchedulerTimeout)
        assert outcome.too_soon.details["in_use"] == [{"consumer": "victim", "in_use": "direct"}]


@pytest.mark.parametrize(("victim", "fault"), CELLS)
def test_it_serves_again_and_makes_room_after_all(
    outcomes: dict[tuple[str, str], Future[Outcome]], victim: str, fault: str
) -> None:
    outcome = outcomes[victim, fault].result(60)
    assert isinstance(outcome.victim_again, Lease), repr(outcome.victim_again)
    assert isinstance(outcome.target_again, Lease), repr(outcome.target_again)
    assert outcome.victim_mib_again <= RESIDUAL_MIB


def test_every_coded_dialect_is_in_a_matrix() -> None:
    here = {victim for victim, _ in CELLS}
    there = {name if name in REGISTERED else "http" for name in TARGET_OF}
    assert here | there == set(REGISTERED) - {"none"}
