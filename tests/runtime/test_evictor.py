"""The proof of an unload: on the simulated services in real time, and where time itself is the matter with a clock
that the evictor's own ``pause`` moves on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import requests

from gpumgr.adapters.clock import SystemClock
from gpumgr.adapters.dialects import dialect_of
from gpumgr.adapters.simulated import SimulatedProbe
from gpumgr.config import Call, ConsumerSettings, Report
from gpumgr.core.card import Reading
from gpumgr.core.catalog import Consumer, GpuRef
from gpumgr.core.following import Work
from gpumgr.core.placement import Holding, Victim
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.evictor import Evictor
from gpumgr.runtime.ports import BackendError, BackendReason
from gpumgr.sim.card import SimulatedCard, SimulatedGpu
from gpumgr.sim.comfyui import ComfyUI
from gpumgr.sim.ollama import Ollama
from gpumgr.sim.service import SimulatedService
from gpumgr.sim.speech import Speech
from tests.waiting import until
from tests.worlds import ManualClock, consumer

Known = Mapping[tuple[str, GpuRef], Holding]

CONTEXT_MIB = 400
POLL_SLACK_SECONDS = 0.5
"""How much later than its limit the evictor may return on a loaded machine."""


def holdings_of(victims: Sequence[Consumer], reading: Reading) -> Known:
    """What the driver tells of them, as the broker would know it."""
    found: dict[tuple[str, GpuRef], Holding] = {}
    for victim in victims:
        for ref in victim.gpus:
            gpu = reading.gpu(ref)
            held = None if gpu is None else gpu.held_mib(victim.name)
            if held is not None:
                found[victim.name, ref] = Holding(held, exact=True, resident=held > 0)
    return found


# -- in real time, on the simulated services ----------------------------------------------------------------


@dataclass
class Services:
    """The three dialects' services on one card, and an evictor over them."""

    card: SimulatedCard
    comfyui: ComfyUI
    ollama: Ollama
    mvoice: Speech

    @property
    def all(self) -> list[SimulatedService]:
        return [self.comfyui, self.ollama, self.mvoice]

    def restore(self) -> None:
        raise AssertionError("an evictor brings nothing back")

    def load(self) -> None:
        requests.post(f"{self.comfyui.url}/prompt", json={"prompt": {"1": {}}}, timeout=5).raise_for_status()
        requests.post(f"{self.ollama.url}/api/generate", json={"model": "llama3.1:8b"}, timeout=5).raise_for_status()
        requests.post(f"{self.mvoice.url}/v1/audio/speech", json={"input": "x"}, timeout=5).raise_for_status()
        until(lambda: self.comfyui.busy == 0 and all(s.used_mib == s.resident_mib for s in self.all))

    def unload(self, *victims: Consumer, known: Known | None = None) -> list[Victim]:
        settings = {
            "comfyui": ConsumerSettings("comfyui", "comfyui", self.comfyui.url),
            "ollama": ConsumerSettings("ollama", "ollama", self.ollama.url),
            "mvoice": ConsumerSettings(
                "mvoice", "http", self.mvoice.url, unload=Call(path="/unload"), busy=Report("/busy", "running")
            ),
        }
        dialects = {name: dialect_of(s) for name, s in settings.items()}
        ports = {service.port: service.name for service in self.all}
        probe = SimulatedProbe(self.card.state, ports)
        reading = probe.read()
        evictor = Evictor(probe, dialects, SystemClock(), time.sleep)
        return evictor.unload(victims, holdings_of(victims, reading) if known is None else known, reading)


@pytest.fixture
def services() -> Iterator[Services]:
    card = SimulatedCard()
    with (
        ComfyUI("comfyui", card, resident_mib=9000, load_seconds=0.04, unload_seconds=0.04) as comfyui,
        Ollama("ollama", card, models={"llama3.1:8b": 9000}, load_seconds=0.04, unload_seconds=0.04) as ollama,
        Speech("mvoice", card, resident_mib=3000, load_seconds=0.04, unload_seconds=0.04, work_seconds=0.02) as mvoice,
    ):
        found = Services(card, comfyui, ollama, mvoice)
        found.load()
        yield found


def named(name: str, limit_seconds: float = 3.0) -> Consumer:
    return consumer(name, unload_timeout_seconds=limit_seconds)


ALL = ("comfyui", "ollama", "mvoice")


def test_all_at_once_and_in_order(services: Services) -> None:
    outcome = services.unload(*(named(name) for name in ALL))
    assert [(v.consumer, v.held_mib, v.reason) for v in outcome] == [
        ("comfyui", 9000, None),
        ("ollama", 9000, None),
        ("mvoice", 3000, None),
    ]
    for victim, service in zip(outcome, services.all, strict=True):
        assert service.used_mib <= 768
        assert CONTEXT_MIB <= victim.still_held_mib <= 768
        assert service.unload_calls == 1
    assert services.card.free_mib() >= 24000 - 3 * 768


@pytest.mark.parametrize("name", ALL)
def test_a_200_that_keeps_the_memory_is_no_proof(services: Services, name: str) -> None:
    service = getattr(services, name)
    service.faults.keeps_memory = True
    began = time.monotonic()
    (victim,) = services.unload(named(name, 0.4))
    assert (victim.reason, victim.held_mib, victim.still_held_mib) == ("kept", service.resident_mib, service.used_mib)
    assert 0.4 <= time.monotonic() - began < 0.4 + POLL_SLACK_SECONDS
    assert victim.seconds >= 0.4


@pytest.mark.parametrize("name", ALL)
def test_half_of_it_is_no_proof(services: Services, name: str) -> None:
    service = getattr(services, name)
    service.faults.frees_share = 0.5
    (victim,) = services.unload(named(name, 0.4))
    assert (victim.reason, victim.still_held_mib) == ("kept", service.used_mib)
    assert 768 < service.used_mib < service.resident_mib


@pytest.mark.parametrize("name", ["comfyui", "ollama"])
def test_a_lost_call_is_cured_by_asking_again(services: Services, name: str) -> None:
    service = getattr(services, name)
    service.faults.lose_first_unload = True
    (victim,) = services.unload(named(name))
    assert (victim.reason, service.used_mib, service.unload_calls) == (None, CONTEXT_MIB, 2)
    assert 1.0 <= victim.seconds < 1.0 + POLL_SLACK_SECONDS


@pytest.mark.parametrize("name", ALL)
def test_a_slow_unload_is_proved_when_it_falls(services: Services, name: str) -> None:
    service = getattr(services, name)
    service.faults.slow_unload_seconds = 0.4
    (victim,) = services.unload(named(name))
    assert victim.reason is None
    assert victim.seconds >= 0.4
    assert service.used_mib <= 768


@pytest.mark.parametrize("name", ALL)
def test_a_gate_opened_late(services: Services, name: str) -> None:
    service = getattr(services, name)
    gate = service.faults.unload_gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(services.unload, named(name, 10))
        until(lambda: service.unload_calls > 0)
        with pytest.raises(TimeoutError):
            outcome.result(0.2)
        assert service.used_mib == service.resident_mib
        gate.set()
        (victim,) = outcome.result(5)
    assert (victim.reason, service.used_mib <= 768) == (None, True)


def test_one_that_hangs_does_not_delay_the_proof_of_another(services: Services) -> None:
    services.comfyui.faults.hang = True
    slow, quick = services.unload(named("comfyui", 0.6), named("mvoice", 0.6))
    assert (slow.reason, slow.still_held_mib) == ("hung", 9000)
    assert (quick.reason, quick.seconds < 0.4) == (None, True)


@pytest.mark.parametrize("name", ALL)
def test_one_that_dies_has_given_back(services: Services, name: str) -> None:
    service = getattr(services, name)
    service.faults.dies_on_unload = True
    (victim,) = services.unload(named(name))
    assert (victim.reason, victim.still_held_mib, service.running) == (None, 0, False)
    assert victim.seconds < 1.0


def test_a_dead_server_whose_memory_stays_is_unreachable(services: Services) -> None:
    """Its workers outlive it, say: whose port it was is remembered, and nobody answers there."""
    orphan = services.card.start_process("mvoice-worker", port=services.mvoice.port)
    services.mvoice.die()
    services.card.set_used(orphan, 2500)
    (victim,) = services.unload(named("mvoice", 0.4))
    assert (victim.reason, victim.held_mib, victim.still_held_mib) == ("unreachable", 2500, 2500)


def test_one_that_computes_is_busy(services: Services) -> None:
    services.mvoice.work_seconds = 5
    with ThreadPoolExecutor(1) as pool:
        pool.submit(requests.post, f"{services.mvoice.url}/v1/audio/speech", json={"input": "x"}, timeout=10)
        until(lambda: services.mvoice.busy == 1)
        (victim,) = services.unload(named("mvoice", 0.3))
        services.mvoice.die()
    assert (victim.reason, victim.still_held_mib) == ("busy", 3000)


def test_ollama_lets_its_answer_end_first(services: Services) -> None:
    services.ollama.token_seconds = 0.05
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "llama3.1:8b", "prompt": "why", "stream": False}
        answer = pool.submit(requests.post, f"{services.ollama.url}/api/generate", json=body, timeout=10)
        until(lambda: services.ollama.busy == 1)
        (victim,) = services.unload(named("ollama"))
        assert answer.result().json()["done_reason"] == "stop"
    assert (victim.reason, services.ollama.used_mib) == (None, CONTEXT_MIB)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("share", "reason"),
    [(1.0, None), (0.5, "kept")],
)
def test_where_processes_cannot_be_read_free_memory_is_the_proof(
    services: Services, name: str, share: float, reason: str | None
) -> None:
    service = getattr(services, name)
    service.faults.frees_share = share
    services.card.set_processes_readable(False)
    known: Known = {(name, 0): Holding(service.resident_mib - CONTEXT_MIB, exact=False, resident=True)}
    (victim,) = services.unload(named(name, 0.5), known=known)
    assert victim.reason == reason
    still = service.used_mib - CONTEXT_MIB
    assert victim.still_held_mib == still


# -- where time is the matter -------------------------------------------------------------------------------


@dataclass
class Backend:
    """A victim's server whose every call ends at once, at an instant of the clock; ``falls_after`` seconds later its
    memory falls. ``fails`` and ``fails_first`` are what its calls come to; ``hangs`` holds them until ``release``."""

    clock: ManualClock
    card: SimulatedCard
    name: str = "victim"
    port: int = 9001
    gpus: tuple[int, ...] = (0,)
    ask_again_seconds: float | None = 1.0
    can_unload: bool = True
    can_load: bool = False
    load_starts_service: bool = False
    can_restore: bool = False
    cuts_work: bool = False
    falls_after: float | None = 0.0
    falls_to_mib: int = CONTEXT_MIB
    loses: int = 0
    fails: BackendReason | None = None
    fails_first: int = 0
    computes: bool | BackendReason | None = None
    hangs: threading.Event | None = None
    asked_at: list[float] = field(default_factory=list)
    given: list[float] = field(default_factory=list)
    """What each call was given as its limit."""

    def __post_init__(self) -> None:
        self.pid = self.card.start_process(self.name, port=self.port)
        self._falls_at: float | None = None
        self._began = self.clock.now

    def take(self, mib: int) -> None:
        for gpu in self.gpus:
            self.card.set_used(self.pid, mib, gpu)

    def settle(self) -> None:
        """What is due by now happens."""
        if self._falls_at is not None and self.clock.now >= self._falls_at:
            self.take(self.falls_to_mib)
            self._falls_at = None

    def restore(self) -> None:
        raise AssertionError("an evictor brings nothing back")

    def unload(self, within_seconds: float) -> None:
        self.asked_at.append(round(self.clock.now - self._began, 6))
        self.given.append(within_seconds)
        if self.hangs is not None:
            self.hangs.wait(30)
            raise BackendError("hung", "no answer")
        if self.fails is not None and (not self.fails_first or len(self.asked_at) <= self.fails_first):
            raise BackendError(self.fails, "it does not", refused=self.fails == "unreachable")
        if len(self.asked_at) > self.loses and self.falls_after is not None and self._falls_at is None:
            self._falls_at = self.clock.now + self.falls_after

    def busy(self) -> bool | None:
        if isinstance(self.computes, str):
            raise BackendError(self.computes, "no answer")
        return self.computes

    def interrupt(self) -> None:
        pass

    def begins_work(self, method: str, path: str) -> bool:  # noqa: ARG002
        return False

    def work_begun(self, status: int, body: bytes) -> Work | None:  # noqa: ARG002
        return None

    def is_done(self, work: Work) -> bool | None:  # noqa: ARG002
        return None

    def health(self) -> None:
        return

    def load(self) -> None:
        return

    def loaded(self) -> LoadedReport | None:
        return None


class Bench:
    """One card, some backends, an evictor whose pauses move the clock, and every pause written down."""

    def __init__(self, *gpus: SimulatedGpu) -> None:
        self.clock = ManualClock()
        self.began = self.clock.now
        self.card = SimulatedCard(gpus or (SimulatedGpu(),))
        self.backends: list[Backend] = []
        self.pauses: list[float] = []
        self.at: dict[float, Callable[[], object]] = {}
        """What else happens, by seconds after the start."""
        self.reads = 0

    def backend(self, **what: object) -> Backend:
        number = len(self.backends)
        backend = Backend(self.clock, self.card, port=9001 + number, **what)  # type: ignore[arg-type]
        self.backends.append(backend)
        return backend

    def state(self) -> Mapping[str, object]:
        self.reads += 1
        return self.card.state()

    def probe(self) -> SimulatedProbe:
        return SimulatedProbe(self.state, {b.port: b.name for b in self.backends}, self.clock.monotonic)

    @property
    def elapsed(self) -> float:
        return round(self.clock.now - self.began, 6)

    def pause(self, seconds: float) -> None:
        """The calls under way end, the time passes, and what is due happens. Never a real wait."""
        for thread in threading.enumerate():
            if thread.name.startswith("unload-") and not any(b.hangs for b in self.backends):
                thread.join(10)
        self.pauses.append(seconds)
        self.clock.now = round(self.clock.now + seconds, 6)
        for backend in self.backends:
            backend.settle()
        for due in [instant for instant in self.at if instant <= self.elapsed]:
            self.at.pop(due)()

    def unload(self, *victims: Consumer, known: Known | None = None) -> tuple[Victim, ...]:
        reading = self.probe().read()
        self.reads = 0
        evictor = Evictor(self.probe(), {b.name: b for b in self.backends}, self.clock, self.pause)
        holdings = holdings_of(victims, reading) if known is None else known
        return tuple(evictor.unload(victims, holdings, reading))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def victim_of(backend: Backend, limit_seconds: float = 30.0, residual_mib: int = 768) -> Consumer:
    return consumer(backend.name, gpus=backend.gpus, unload_timeout_seconds=limit_seconds, residual_mib=residual_mib)


def test_it_looks_each_25_ms_for_2_s_and_then_each_50_ms(bench: Bench) -> None:
    backend = bench.backend(falls_after=None)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend, 5.0))
    assert victim.reason == "kept"
    assert bench.pauses == [0.025] * 80 + [0.05] * 60
    assert bench.reads == len(bench.pauses) + 1
    assert bench.elapsed == 5.0


def test_the_proof_is_seen_at_the_next_look(bench: Bench) -> None:
    backend = bench.backend(falls_after=0.31)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend))
    assert (victim.reason, victim.seconds, victim.still_held_mib) == (None, 0.325, CONTEXT_MIB)
    assert bench.elapsed == 0.325


def test_it_is_asked_again_each_second_until_it_falls(bench: Bench) -> None:
    backend = bench.backend(loses=3, falls_after=0.2)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend))
    assert victim.reason is None
    assert backend.asked_at == [0.0, 1.0, 2.0, 3.0]
    assert victim.seconds == pytest.approx(3.2, abs=0.1)
    assert backend.given == [30.0, 29.0, 28.0, 27.0]  # what is left of its own limit


# Whoever was idle at the first call may compute by the second, and where an unload cuts, that one would.
@pytest.mark.parametrize("cuts_work", [True, False])
def test_who_computes_by_now_is_not_asked_again_where_that_would_cut(bench: Bench, cuts_work: bool) -> None:
    backend = bench.backend(loses=1, cuts_work=cuts_work, computes=True)
    bench.at[3.5] = lambda: setattr(backend, "computes", False)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend))
    assert (victim.reason, backend.asked_at) == (None, [0.0, 4.0] if cuts_work else [0.0, 1.0])


def test_a_victim_that_computes_to_its_limit_is_busy_and_was_not_cut(bench: Bench) -> None:
    backend = bench.backend(loses=9, cuts_work=True, computes=True)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend, 3.0))
    assert (victim.reason, victim.cause) == ("busy", "it computes: it was not asked again")
    assert backend.asked_at == [0.0]


def test_once_is_enough_for_a_dialect_that_says_so(bench: Bench) -> None:
    backend = bench.backend(loses=1, ask_again_seconds=None)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend, 4.0))
    assert (victim.reason, backend.asked_at) == ("kept", [0.0])


def test_a_call_that_failed_is_made_again_after_a_second_whatever_the_dialect_says(bench: Bench) -> None:
    backend = bench.backend(fails="failed", fails_first=2, ask_again_seconds=None)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend))
    assert (victim.reason, backend.asked_at) == (None, [0.0, 1.0, 2.0])


def test_a_call_under_way_is_not_made_twice(bench: Bench) -> None:
    held = threading.Event()
    backend = bench.backend(hangs=held)
    backend.take(9000)
    try:
        (victim,) = bench.unload(victim_of(backend, 5.0))
    finally:
        held.set()
    assert (victim.reason, len(backend.asked_at)) == ("hung", 1)


def test_nobody_is_asked_after_the_limit(bench: Bench) -> None:
    backend = bench.backend(loses=99)
    backend.take(9000)
    bench.unload(victim_of(backend, 2.0))
    assert backend.asked_at == [0.0, 1.0]


def test_a_dialect_without_an_unload_is_not_waited_for(bench: Bench) -> None:
    backend = bench.backend(can_unload=False)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend))
    assert (victim.reason, victim.seconds, backend.asked_at) == ("kept", 0.0, [])


def test_each_victim_has_its_own_limit(bench: Bench) -> None:
    keeps, slow = bench.backend(name="keeps", falls_after=None), bench.backend(name="slow", falls_after=3.0)
    for backend in (keeps, slow):
        backend.take(9000)
    short, long = bench.unload(victim_of(keeps, 1.0), victim_of(slow, 10.0))
    assert (short.reason, long.reason) == ("kept", None)
    assert bench.elapsed < 3.2


def test_what_falls_after_its_own_limit_while_another_is_watched_still_counts(bench: Bench) -> None:
    """The memory is back, whoever looked when: to call it kept would be untrue."""
    late, slow = bench.backend(name="late", falls_after=2.0), bench.backend(name="slow", falls_after=3.0)
    for backend in (late, slow):
        backend.take(9000)
    first, _ = bench.unload(victim_of(late, 1.5), victim_of(slow, 10.0))
    assert (first.reason, first.still_held_mib) == (None, CONTEXT_MIB)


@pytest.mark.parametrize(("left_mib", "reason"), [(768, None), (769, "kept")])
def test_the_residual_is_the_line(bench: Bench, left_mib: int, reason: str | None) -> None:
    backend = bench.backend(falls_to_mib=left_mib)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend, 1.0))
    assert (victim.reason, victim.still_held_mib) == (reason, left_mib)


def test_every_gpu_of_a_victim_must_fall() -> None:
    bench = Bench(SimulatedGpu(0, 24000, "GPU-0"), SimulatedGpu(1, 24000, "GPU-1"))
    backend = bench.backend(gpus=(0, 1), falls_after=None)
    backend.take(5000)
    bench.at[0.1] = lambda: bench.card.set_used(backend.pid, 0, 0)
    (victim,) = bench.unload(victim_of(backend, 1.0))
    assert (victim.reason, victim.held_mib, victim.still_held_mib) == ("kept", 10000, 5000)


@pytest.mark.parametrize(
    ("computes", "reason"),
    [(True, "busy"), (False, "kept"), (None, "kept"), ("failed", "kept")],
)
def test_why_it_kept(bench: Bench, computes: bool | BackendReason | None, reason: str) -> None:
    backend = bench.backend(falls_after=None, computes=computes)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend, 0.5))
    assert victim.reason == reason


@pytest.mark.parametrize(
    ("fails", "reason"),
    [("unreachable", "unreachable"), ("hung", "hung"), ("failed", "kept")],
)
def test_a_call_that_fails_names_the_reason(bench: Bench, fails: BackendReason, reason: str) -> None:
    backend = bench.backend(fails=fails)
    backend.take(9000)
    (victim,) = bench.unload(victim_of(backend, 1.5))
    assert (victim.reason, victim.still_held_mib) == (reason, 9000)


def test_a_call_that_fails_while_the_memory_falls_is_no_failure(bench: Bench) -> None:
    backend = bench.backend(fails="hung")
    backend.take(9000)
    bench.at[0.7] = lambda: backend.take(0)
    (victim,) = bench.unload(victim_of(backend))
    assert (victim.reason, victim.seconds) == (None, 0.7)


# -- what is no proof ---------------------------------------------------------------------------------------


def test_a_card_that_becomes_unreadable_is_no_proof(bench: Bench) -> None:
    backend = bench.backend(falls_after=0.2)
    backend.take(9000)

    def break_down() -> None:
        bench.card.unreadable = "Unknown Error"

    bench.at[0.1] = break_down
    (victim,) = bench.unload(victim_of(backend, 1.0))
    assert (victim.reason, victim.still_held_mib) == ("kept", 9000)


def test_a_card_that_is_readable_again_proves_it(bench: Bench) -> None:
    backend = bench.backend(falls_after=0.2)
    backend.take(9000)
    bench.at[0.1] = lambda: bench.card.set_gpu_error("GPU is lost")
    bench.at[0.6] = lambda: bench.card.set_gpu_error(None)
    (victim,) = bench.unload(victim_of(backend, 2.0))
    assert (victim.reason, victim.seconds) == (None, 0.6)


def test_one_gpu_that_is_lost_says_nothing_of_the_other() -> None:
    bench = Bench(SimulatedGpu(0, 24000, "GPU-0"), SimulatedGpu(1, 24000, "GPU-1"))
    here = bench.backend(name="here", gpus=(0,), falls_after=0.2)
    there = bench.backend(name="there", gpus=(1,), falls_after=0.2)
    here.take(5000)
    there.take(5000)
    bench.at[0.1] = lambda: bench.card.set_gpu_error("GPU is lost", 1)
    first, second = bench.unload(victim_of(here, 1.0), victim_of(there, 1.0))
    assert (first.reason, second.reason) == (None, "kept")


def test_processes_that_vanish_from_the_list_are_no_proof_while_the_memory_stays(bench: Bench) -> None:
    """As in a container whose list of processes breaks down: now None, which is not zero."""
    backend = bench.backend(falls_after=None)
    backend.take(9000)
    bench.at[0.1] = lambda: bench.card.set_processes_readable(False)
    (victim,) = bench.unload(victim_of(backend, 1.0))
    assert (victim.reason, victim.still_held_mib) == ("kept", 9000)


@pytest.mark.parametrize(("given_mib", "reason"), [(8100, None), (8099, "kept")])
def test_where_processes_cannot_be_read_90_percent_must_be_free(
    bench: Bench, given_mib: int, reason: str | None
) -> None:
    backend = bench.backend(falls_to_mib=9000 - given_mib)
    backend.take(9000)
    bench.card.set_processes_readable(False)
    known: Known = {("victim", 0): Holding(9000, exact=False, resident=True)}
    (victim,) = bench.unload(victim_of(backend, 1.0), known=known)
    assert (victim.reason, victim.still_held_mib) == (reason, 9000 - given_mib)


def test_a_process_whose_memory_is_withheld_is_measured_by_free_memory(bench: Bench) -> None:
    backend = bench.backend(falls_after=0.2)
    backend.take(9000)
    bench.card.set_used_readable(backend.pid, False)
    known: Known = {("victim", 0): Holding(9000, exact=False, resident=True)}
    (victim,) = bench.unload(victim_of(backend), known=known)
    assert (victim.reason, victim.seconds) == (None, 0.2)


def test_memory_that_somebody_else_takes_is_no_memory_given_back(bench: Bench) -> None:
    """Without the list of processes, nobody can tell: no proof, so no grant."""
    backend = bench.backend(falls_after=0.2)
    backend.take(9000)
    game = bench.card.start_process("game.exe")
    bench.card.set_processes_readable(False)
    bench.at[0.1] = lambda: bench.card.set_used(game, 4000)
    known: Known = {("victim", 0): Holding(9000, exact=False, resident=True)}
    (victim,) = bench.unload(victim_of(backend, 1.0), known=known)
    assert (victim.reason, victim.still_held_mib) == ("kept", 4000 + CONTEXT_MIB)


# Nobody knows what it holds (its processes cannot be read, it has no report, and this broker has never granted it): no
# memory has to fall, so at the least its call has to come back without an error.
@pytest.mark.parametrize("fails", ["failed", "hung"])
def test_nothing_known_is_no_proof_where_the_call_fails(bench: Bench, fails: BackendReason) -> None:
    backend = bench.backend(fails=fails)
    backend.take(9000)
    bench.card.set_processes_readable(False)
    known: Known = {("victim", 0): Holding(0, exact=False, resident=None)}
    (victim,) = bench.unload(victim_of(backend, 1.0), known=known)
    assert victim.reason is not None


def test_nothing_known_of_a_service_that_does_not_run_is_nothing(bench: Bench) -> None:
    backend = bench.backend(fails="unreachable")
    bench.card.set_processes_readable(False)
    known: Known = {("victim", 0): Holding(0, exact=False, resident=None)}
    (victim,) = bench.unload(victim_of(backend, 1.0), known=known)
    assert victim.reason is None


def test_small_from_the_start_is_no_proof_before_an_answer(bench: Bench) -> None:
    """A model that is just being loaded looks as small as one that is gone, and its server does not answer. At the
    limit it has given back by definition: it must not block everybody for a context."""
    backend = bench.backend(fails="hung")
    backend.take(400)
    (victim,) = bench.unload(victim_of(backend, 1.0))
    assert (victim.reason, victim.seconds) == (None, 1.0)


def test_small_from_the_start_and_still_falling_is_not_done_yet(bench: Bench) -> None:
    backend = bench.backend(falls_to_mib=700, ask_again_seconds=None)
    backend.take(700)
    bench.at[0.3] = lambda: backend.take(550)
    bench.at[0.6] = lambda: backend.take(400)
    (victim,) = bench.unload(victim_of(backend, 5.0))
    assert (victim.reason, victim.still_held_mib) == (None, 400)


def test_small_without_an_unload_call_blocks_nobody(bench: Bench) -> None:
    backend = bench.backend(can_unload=False)
    backend.take(400)
    (victim,) = bench.unload(victim_of(backend, 5.0))
    assert (victim.reason, victim.seconds) == (None, 0.0)


# -- free memory that lags behind ---------------------------------------------------------------------------


class Lagging:
    """A driver whose process list is quicker than its free memory: ``withheld_mib`` are not free yet."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.withheld_mib = 0

    def state(self) -> Mapping[str, object]:
        state = self._bench.card.state()
        for gpu in state["gpus"]:  # type: ignore[attr-defined]
            gpu["used_mib"] += self.withheld_mib
        return state


def lagging_unload(bench: Bench, backend: Backend, lags_seconds: float | None, limit_seconds: float) -> Victim:
    """The memory falls after 100 ms; it is free ``lags_seconds`` later, or never."""
    driver = Lagging(bench)

    def fall() -> None:
        backend.take(CONTEXT_MIB)
        driver.withheld_mib = 9000 - CONTEXT_MIB

    def catch_up() -> None:
        driver.withheld_mib = 0

    bench.at[0.1] = fall
    if lags_seconds is not None:
        bench.at[0.1 + lags_seconds] = catch_up
    probe = SimulatedProbe(driver.state, {backend.port: backend.name}, bench.clock.monotonic)
    reading = probe.read()
    victims = [victim_of(backend, limit_seconds)]
    evictor = Evictor(probe, {backend.name: backend}, bench.clock, bench.pause)
    (victim,) = evictor.unload(victims, holdings_of(victims, reading), reading)
    return victim


@pytest.mark.parametrize(
    ("lags_seconds", "limit_seconds", "proved_at"),
    [
        (0.3, 30.0, 0.4),  # it is waited for
        (None, 30.0, 0.6),  # but not for ever: after half a second it is believed as it is
        (None, 0.3, 0.3),  # nor longer than the limit
    ],
)
def test_free_memory_may_lag_behind_the_list_of_processes(
    bench: Bench, lags_seconds: float | None, limit_seconds: float, proved_at: float
) -> None:
    backend = bench.backend(falls_after=None)
    backend.take(9000)
    victim = lagging_unload(bench, backend, lags_seconds, limit_seconds)
    assert (victim.reason, victim.still_held_mib) == (None, CONTEXT_MIB)
    assert victim.seconds == pytest.approx(proved_at, abs=0.026)
