"""A small world for the broker: an in-memory card, services that are ledgers, and time that the test owns.

``World`` is never started: its broker's ``acquire`` runs up to the wait, and the test itself plays the threads
(``step`` a preparation, ``pass_time``, let a caller's deadline wake it). ``started`` is the same world with real
threads, real time and a running broker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gpumgr.adapters.clock import SystemClock
from gpumgr.adapters.holders import HolderProbe, HolderProcesses
from gpumgr.adapters.simulated import SimulatedProbe
from gpumgr.config import GpuSettings, LeaseSettings, Rest, SchedulingSettings, ServerSettings, Settings
from gpumgr.core.catalog import Catalog, Consumer, GpuRef
from gpumgr.core.following import Work
from gpumgr.core.lease import Call, EndReason, Lease, RequestKey
from gpumgr.core.ledger import Account, Entry
from gpumgr.core.placement import Report
from gpumgr.core.queue import Priority
from gpumgr.errors import GpumgrError
from gpumgr.runtime.broker import Broker, _hung_up
from gpumgr.runtime.ports import BackendError, BackendReason, Clock, Dialect, Kept, KeptLease, Paused, StoreError, Total
from gpumgr.runtime.preparation import Preparation, Step
from gpumgr.runtime.state import Quarantine
from gpumgr.runtime.ticket import Ask, Ticket
from gpumgr.runtime.ticket import Caller as Line
from gpumgr.sim.card import SimulatedCard, SimulatedGpu

HEADROOM_MIB = 512
CONTEXT_MIB = 300
"""What a process keeps of its memory when its models are gone."""


def consumer(
    name: str,
    size_mib: int | tuple[int, ...] = 1000,
    *,
    gpus: tuple[GpuRef, ...] = (0,),
    beside: Sequence[str] = (),
    at_once: int = 1,
    residual_mib: int = 768,
    unload_timeout_seconds: float = 1.0,
    pinned: bool = False,
    by_size: bool = False,
) -> Consumer:
    sizes = (size_mib,) * len(gpus) if isinstance(size_mib, int) else size_mib
    return Consumer(
        name=name,
        url=f"http://{name}.test",
        public_url=f"http://{name}.test",
        dialect="http",
        gpus=gpus,
        vram_resident_mib=sizes,
        residual_mib=residual_mib,
        can_coexist_with=frozenset(beside),
        max_concurrency=at_once,
        unload_timeout_seconds=unload_timeout_seconds,
        pinned=pinned,
        by_size=by_size,
    )


def catalog(*consumers: Consumer, **routing: str) -> Catalog:
    return Catalog({c.name: c for c in consumers}, routing)


def request(request_id: str, holder: str | None = None) -> RequestKey:
    return RequestKey(bearer=None, holder=holder, request_id=request_id)


class ManualClock:
    """Moves when the test says so; both faces together."""

    START = datetime(2026, 11, 23, 9, tzinfo=UTC)

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.asleep = 0.0
        self._began = now

    def monotonic(self) -> float:
        return self.now

    def utc(self) -> datetime:
        return self.START + timedelta(seconds=self.now + self.asleep - self._began)

    def slept(self) -> float:
        return self.asleep


class Service:
    """A consumer's server as a ledger: it counts what it was asked, and it can lie, hang or be away.

    ``deferred``: an unload takes effect when ``settle`` is called, as a real one comes after its 200.
    """

    ask_again_seconds: float | None = 1.0
    can_unload = True
    load_starts_service = False
    cuts_work = False

    def __init__(self, of: Consumer, card: SimulatedCard, port: int, *, can_load: bool, deferred: bool) -> None:
        self.consumer = of
        self.can_load = can_load
        self.lies = False
        self.fails: BackendReason | None = None
        self.unhealthy: str | None = None
        self.unload_gate: threading.Event | None = None
        self.health_gate: threading.Event | None = None
        self.before_unload: Callable[[str], None] = lambda _name: None
        self.computing: bool | BackendError | None = None
        """What it says when it is asked whether it is busy; None: it has no such report. A BackendError is raised."""
        self.asked_whether_busy = 0
        self.works: dict[str, bool | BackendError] = {}
        """What it says of each: whether it is done, or a BackendError that is raised; of others it knows nothing."""
        self.asked_for_work = 0
        self.unloads_while_computing = 0
        self.asked_to_unload = 0
        self.asked_to_interrupt = 0
        self.asked_for_health = 0
        self._card = card
        self._deferred = deferred
        self._pending = False
        self.pid = card.start_process(of.name, port=port)

    def used_mib(self, gpu: GpuRef = 0) -> int:
        return self._card.used_mib(self.pid, int(gpu))

    def take(self, mib: int | None = None) -> None:
        """Hold its declared size, or ``mib`` on every GPU of it."""
        for gpu in self.consumer.gpus:
            self._card.set_used(self.pid, self.consumer.needs_mib(gpu) if mib is None else mib, int(gpu))

    def settle(self) -> None:
        if self._pending and not self.lies:
            for gpu in self.consumer.gpus:
                self._card.set_used(self.pid, min(self.used_mib(gpu), CONTEXT_MIB), int(gpu))
        self._pending = False

    # -- the dialect ----------------------------------------------------------------------------------------

    def health(self) -> None:
        self.asked_for_health += 1
        if self.health_gate is not None:
            self.health_gate.wait(30)
        if self.unhealthy is not None:
            raise BackendError("failed", self.unhealthy)

    def unload(self, within_seconds: float) -> None:
        self.asked_to_unload += 1
        self.unloads_while_computing += self.computing is True
        self.before_unload(self.consumer.name)
        if self.unload_gate is not None and not self.unload_gate.wait(within_seconds):
            raise BackendError("hung", "no answer in time")
        if self.fails is not None:
            raise BackendError(self.fails, f"it is {self.fails}")
        self._pending = True
        if not self._deferred:
            self.settle()

    def load(self) -> None:
        self.take()

    can_restore = False

    def restore(self) -> None:
        self.take()

    def loaded(self) -> Report | None:
        return None

    def busy(self) -> bool | None:
        self.asked_whether_busy += 1
        if isinstance(self.computing, BackendError):
            raise self.computing
        return self.computing

    def interrupt(self) -> None:
        self.asked_to_interrupt += 1

    def begins_work(self, method: str, path: str) -> bool:
        return (method, path) == ("POST", "/work")

    def work_begun(self, status: int, body: bytes) -> Work | None:
        return Work("job", body.decode()) if body and status == 200 else None

    def is_done(self, work: Work) -> bool | None:
        self.asked_for_work += 1
        state = self.works.get(work.id)
        if isinstance(state, BackendError):
            raise state
        return state


class LedgerStore:
    """A disk: what was written outlives the broker. ``fails`` is raised by every write while it is set. ``boot`` is the
    machine's."""

    def __init__(self, clock: Clock) -> None:
        self.written: list[tuple[str, Lease]] = []
        self.fails: Exception | None = None
        self.boot = self._opened_in = "boot-1"
        self.writes = 0
        self.intents: list[tuple[int, str, tuple[str, ...]]] = []
        self.quarantined: set[str] = set()
        self.pause: Paused | None = None
        self._clock = clock
        self._fence = 0
        self._live: dict[str, tuple[KeptLease, str]] = {}
        self._over: dict[str, tuple[KeptLease, EndReason, float]] = {}
        self._totals: dict[str, Total] = {}
        self.learned: dict[str, Account] = {}
        self._owed: list[Callable[[], None]] = []

    def open(self) -> Kept:
        self._require()
        rebooted = [kept for kept, boot in self._live.values() if boot != self.boot]
        for kept in rebooted:
            self._end(kept.lease, EndReason.HOST_REBOOT, False)
        if self.boot != self._opened_in:
            self.quarantined.clear()
        self._opened_in = self.boot
        quarantined = [replace(self._over[lease_id][0], quarantined=True) for lease_id in sorted(self.quarantined)]
        self.intents.clear()
        return Kept(
            fence=self._fence,
            leases=[kept for kept, _ in self._live.values()] + quarantined,
            ended=[
                (kept.lease.request, kept.lease.consumer, reason, at)
                for kept, reason, at in self._over.values()
                if kept.lease.request is not None
            ],
            rebooted=[kept.lease for kept in rebooted],
            totals=dict(self._totals),
            pause=self.pause,
            holders=[
                (lease.process, lease.consumer)
                for lease in [
                    *(kept.lease for kept, _ in self._live.values()),
                    *(k.lease for k, _, _ in self._over.values()),
                ]
                if lease.process is not None
            ],
            learned=dict(self.learned),
        )

    def note(self, event: dict[str, Any]) -> None:
        pass

    def intend(self, seq: int, target: str, victims: Sequence[str]) -> None:
        self._require()
        self.intents.append((seq, target, tuple(victims)))

    def forget_intent(self, seq: int) -> None:
        self.intents = [intent for intent in self.intents if intent[0] != seq]

    def granted(self, kept: KeptLease, event: dict[str, Any], totals: Mapping[str, Total]) -> None:
        self._require()
        self._fence = max(self._fence, kept.lease.fence)
        lease = replace(kept.lease, written_ttl_seconds=kept.lease.ttl_seconds)
        self._live[lease.lease_id] = (replace(kept, lease=lease), self.boot)
        self._totals |= totals
        self.intents = [intent for intent in self.intents if intent[0] != lease.seq]
        self.written.append((event["type"], kept.lease))

    def ended(self, lease: Lease, reason: EndReason, event: dict[str, Any], *, quarantined: bool) -> None:
        self._owing(lambda: self._end(lease, reason, quarantined))
        self.written.append((event["type"], lease))

    def _end(self, lease: Lease, reason: EndReason, quarantined: bool) -> None:
        kept, _ = self._live.pop(lease.lease_id)
        self._over[lease.lease_id] = (kept, reason, self._clock.monotonic())
        if quarantined:
            self.quarantined.add(lease.lease_id)

    def raised(self, lease: Lease) -> None:
        self._owing(lambda: self._raise(lease))

    def _raise(self, lease: Lease) -> None:
        kept, boot = self._live[lease.lease_id]
        ttl = max(kept.lease.ttl_seconds, lease.ttl_seconds)
        written = replace(kept.lease, ttl_seconds=ttl, written_ttl_seconds=ttl)
        self._live[lease.lease_id] = (replace(kept, lease=written), boot)

    def paused(self, pause: Paused | None) -> None:
        self._owing(lambda: setattr(self, "pause", pause))

    def keep(self, totals: Mapping[str, Total], idle: Sequence[str], learned: Sequence[tuple[str, Entry]] = ()) -> None:
        self._require()
        self._totals |= totals
        for name, entry in learned:
            self.learned[name] = self.learned.get(name, Account()).with_entry(entry)
        self.quarantined -= set(idle)

    def try_again(self) -> None:
        self._require()

    def close(self) -> None:
        pass

    def _owing(self, write: Callable[[], None]) -> None:
        self._owed.append(write)
        self._require()

    def _require(self) -> None:
        if self.fails is not None:
            raise self.fails
        self.writes += 1
        while self._owed:
            self._owed.pop(0)()


class _Waits(Exception):
    """``acquire`` came as far as its wait."""

    def __init__(self, ticket: Ticket, deadline: float, line: Line) -> None:
        super().__init__("waits")
        self.ticket = ticket
        self.deadline = deadline
        self.line = line


class UnthreadedBroker(Broker):
    """The real broker, but where a caller's thread would wait, it says so and returns to the test; a quarantine is
    looked at when the test says so. ``at_once``: the thread that asks may prepare by itself; else each step is the
    test's."""

    looks: dict[int, Callable[[], bool]]
    at_once = False
    fresh: set[int] | None = None
    """Requests whose own thread may still prepare, as the first step that the test lets it do; None: no such thing."""

    def _prepare(self, ticket: Ticket) -> None:
        if self.at_once:
            super()._prepare(ticket)
            return
        if self.fresh is not None:
            self.fresh.add(ticket.seq)
        with self.state.lock:
            self.state.hand_over(ticket)

    def _await(self, waited: Ticket, deadline: float, line: Line) -> Lease | Call:
        raise _Waits(waited, deadline, line)

    def _await_end(self, token: str) -> None:
        """There is no other thread that could be writing it down."""
        assert token not in self.state.ending, "a lease is over and nobody writes that down"

    def _begin_quarantine(self, quarantine: Quarantine) -> None:
        look = self._watchman.looker(quarantine, self._end_quarantine)
        if look():
            self.looks[quarantine.seq] = look

    def look_at_quarantines(self) -> None:
        """Each once, as its thread does each half second."""
        for seq, look in list(self.looks.items()):
            if not look():
                del self.looks[seq]


@dataclass(eq=False)
class Caller:
    """One caller of one request: where its thread would wait, and what it was answered in the end."""

    ticket: Ticket
    deadline: float
    line: Line
    answer: Lease | Call | GpumgrError | None = None
    answered_at: float | None = None

    @property
    def waits(self) -> bool:
        return self.answer is None

    def lease(self) -> Lease:
        assert isinstance(self.answer, Lease), self.answer
        return self.answer

    def call(self) -> Call:
        assert isinstance(self.answer, Call), self.answer
        return self.answer

    def error(self) -> GpumgrError:
        assert isinstance(self.answer, GpumgrError), self.answer
        return self.answer


@dataclass
class Game:
    """A process of nobody's."""

    card: SimulatedCard
    gpu: int
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.pid = self.card.start_process("game.exe", gpu=self.gpu)

    def set_used(self, mib: int) -> None:
        self.card.set_used(self.pid, mib)


class RunningGames:
    """What a look for games finds: whatever the test says."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def running(self) -> list[tuple[int, str]]:
        return list(self.found)


class Programs:
    """Programs of holders on the simulated card: their starts and parents, as /proc would tell them."""

    def __init__(self, card: SimulatedCard) -> None:
        self._card = card
        self._parents: dict[int, int] = {}
        self._starts: dict[int, int] = {}

    def begin(self, mib: int = 0, *, parent: int = 0) -> int:
        pid = self._card.start_process("train.py")
        self._starts[pid], self._parents[pid] = 7000 + pid, parent
        self._card.set_used(pid, mib)
        return pid

    def end(self, pid: int) -> None:
        self._card.end_process(pid)
        del self._starts[pid]

    def started(self, pid: int) -> int | None:
        return self._starts.get(pid)

    def ancestors(self, pid: int) -> Iterator[int]:
        while pid:
            yield pid
            pid = self._parents.get(pid, 0)


class Stand:
    """Card, services, probe and store: what both worlds have."""

    def __init__(
        self,
        consumers: Catalog,
        totals_mib: Sequence[int] = (24000,),
        *,
        clock: Clock,
        loads: Sequence[str] = (),
        deferred: bool,
    ) -> None:
        self.catalog = consumers
        self.clock = clock
        self.card = SimulatedCard([SimulatedGpu(i, mib, f"GPU-{i}") for i, mib in enumerate(totals_mib)])
        self.programs = Programs(self.card)
        self.services: dict[str, Service] = {}
        ports: dict[int, str] = {}
        for port, of in enumerate(consumers.consumers.values(), 9001):
            ports[port] = of.name
            self.services[of.name] = Service(of, self.card, port, can_load=of.name in loads, deferred=deferred)
        self.games = [Game(self.card, gpu) for gpu in range(len(totals_mib))]
        self.probe = SimulatedProbe(self.card.state, ports, clock.monotonic)
        self.store = LedgerStore(clock)
        self.running = RunningGames()

    @property
    def dialects(self) -> Mapping[str, Dialect]:
        return self.services

    def settings(
        self,
        headroom_mib: int = HEADROOM_MIB,
        mode: str = "evicting",
        when_unreadable: str = "refuse",
        gpu: Mapping[str, Any] | None = None,
        rest: Mapping[str, Rest] | None = None,
        policy: str = "quantum",
        priorities: Mapping[str, Priority] | None = None,
        **lease: float,
    ) -> Settings:
        """Strangers are held at their peak only where ``gpu`` says so."""
        more = {"untracked_peak_seconds": 0.0, **(gpu or {})}
        return Settings(
            file=Path("consumers.yaml"),
            server=ServerSettings(),
            gpu=GpuSettings(probe="simulated", headroom_mib=headroom_mib, when_unreadable=when_unreadable, **more),
            lease=LeaseSettings(**lease),
            scheduling=SchedulingSettings(policy, mode),
            catalog=self.catalog,
            consumers={},
            rest=rest or {},
            priorities=priorities or {},
        )


class World(Stand):
    """The broker without its threads; ``clock`` is a ManualClock unless the test brings another."""

    def __init__(
        self,
        consumers: Catalog,
        totals_mib: Sequence[int] = (24000,),
        *,
        loads: Sequence[str] = (),
        headroom_mib: int = HEADROOM_MIB,
        mode: str = "evicting",
        when_unreadable: str = "refuse",
        clock: Clock | None = None,
        move: Callable[[float], object] | None = None,
        read_first: bool = True,
        gpu: Mapping[str, Any] | None = None,
        rest: Mapping[str, Rest] | None = None,
        policy: str = "quantum",
        priorities: Mapping[str, Priority] | None = None,
        **lease: float,
    ) -> None:
        """``move`` lets that many seconds pass on ``clock``; with a ManualClock it is known."""
        manual = ManualClock()
        super().__init__(consumers, totals_mib, clock=clock or manual, loads=loads, deferred=True)
        self._move = move if clock is not None else self._forward
        self._manual = manual
        self.callers: list[Caller] = []
        self.preparations: dict[int, Preparation] = {}
        self.stepping: int | None = None
        self.each_instant: Callable[[], None] = lambda: None
        self._settings = self.settings(headroom_mib, mode, when_unreadable, gpu, rest, policy, priorities, **lease)
        self.broker = self._started_broker()
        if read_first:
            self.broker.observe_card()

    def _started_broker(self) -> UnthreadedBroker:
        holders = HolderProcesses(self.programs.started, self.programs.ancestors)
        probe = HolderProbe(self.probe, holders)
        world = (probe, self.dialects, self.clock, self.store, self.pause)
        broker = UnthreadedBroker(self._settings, *world, games=self.running, holder_processes=holders)
        broker.looks = {}
        broker._restore()
        for quarantine in list(broker.state.quarantines.values()):
            broker._begin_quarantine(quarantine)
        return broker

    def restart(self, *, reboot: bool = False) -> None:
        """kill -9, and a new life: whoever waited has lost the connection. ``reboot``: of the whole machine."""
        self.callers.clear()
        self.preparations.clear()
        with suppress(StoreError):
            state = self.broker.state
            self.store.keep(
                state.take_totals(), self.broker._idle, state.ledger.take()
            )  # its thread had the moment it needs
        if reboot:
            self.store.boot += "'"
        believes, asks_itself = self.broker.state.believes, self.broker.fresh is not None
        self.broker = self._started_broker()
        self.broker.state.believes = believes
        self.broker.fresh = set() if asks_itself else None
        self.broker.observe_card()

    def set_wall_clock(self, seconds: float) -> None:
        """Somebody sets it, or NTP does."""
        self._manual._began -= seconds

    def sleep(self, seconds: float) -> None:
        """The machine is suspended: monotonic time stands still."""
        self._manual.asleep += seconds

    def hang_up(self, caller: Caller, *, seen: bool = True) -> None:
        """``seen``: somebody has noticed it already."""
        caller.line.here = lambda: False
        if seen:
            self.broker.hang_up(caller.line)
            self.wake()

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def _forward(self, seconds: float) -> None:
        self._manual.now += seconds

    def pause(self, seconds: float) -> None:
        """Where the evictor would sleep: the unload calls return, what they promised happens, callers wake."""
        for thread in threading.enumerate():
            if thread.name.startswith("unload-"):
                thread.join(10)
        for service in self.services.values():
            service.settle()
        self.pass_time(seconds)

    # -- callers --------------------------------------------------------------------------------------------

    def ask(self, name: str, **words: Any) -> Caller:
        """An acquire, as far as its wait. Raises what the broker refuses at once."""
        return self.acquire(Ask(consumer=name, **words))

    def call(self, name: str, **words: Any) -> Caller:
        """A proxied call, as far as its wait."""
        return self._waiting(self.broker.call, Ask(consumer=name, **words))

    def acquire(self, ask: Ask) -> Caller:
        return self._waiting(self.broker.acquire, ask)

    def _waiting(self, wanted: Callable[[Ask], Lease | Call], ask: Ask) -> Caller:
        try:
            granted = wanted(ask)
        except _Waits as waits:
            caller = Caller(waits.ticket, waits.deadline, waits.line)
            self.callers.append(caller)
            self.wake()
            return caller
        raise _HadIt(granted)

    def wake(self) -> None:
        """Every caller looks whether it has its answer or its time is over, as its thread does when woken."""
        with self.broker.state.lock:
            for caller in [c for c in self.callers if c.waits]:
                self._look(caller)
        self.callers = [c for c in self.callers if c.waits]

    def _look(self, caller: Caller) -> None:
        ticket = caller.ticket
        if ticket.outcome is not None:
            caller.answer = ticket.outcome
        elif caller.line.gone and not ticket.granting:
            if all(other.gone for other in ticket.callers):
                self.broker.state.withdraw(ticket)
            caller.answer = _hung_up()
        else:
            limit = ticket.limit(caller.deadline)
            if limit is None or limit > self.now:
                return
            caller.answer = self.broker._give_up(ticket)
        caller.answered_at = self.now
        ticket.callers.remove(caller.line)

    def pass_time(self, seconds: float, *, watchdog: bool = False) -> None:
        """Instant by instant: every caller wakes on time, and so does the watchdog where it runs."""
        end = self.now + seconds
        self._at_this_instant(watchdog)
        while (instant := self._next_instant(watchdog)) is not None and instant <= end:
            self._move_to(instant)
            self._at_this_instant(watchdog)
        self._move_to(end)
        self._at_this_instant(watchdog)

    def _at_this_instant(self, watchdog: bool) -> None:
        self.wake()
        if watchdog:
            self.broker.tick()
            self.wake()
        self.each_instant()

    def _move_to(self, instant: float) -> None:
        assert self._move is not None
        if self.clock is self._manual:
            self._manual.now = max(self._manual.now, instant)
        else:
            self._move(max(0.0, instant - self.now))

    def _next_instant(self, watchdog: bool) -> float | None:
        limits = [c.ticket.limit(c.deadline) for c in self.callers]
        instants = [limit for limit in limits if limit is not None]
        if watchdog:
            instants += [lease.expires_at for lease in self.broker.state.leases]
            again = self.broker.state.queue.look_again_at
            instants += [] if again is None else [again]
        return min((instant for instant in instants if instant > self.now), default=None)

    # -- preparations ---------------------------------------------------------------------------------------

    def begun(self) -> list[int]:
        """The requests in preparation, oldest first; new ones are picked up as a preparation thread does."""
        state = self.broker.state
        with state.lock:
            while state.begun:
                ticket = state.begun.popleft()
                self.preparations[ticket.seq] = Preparation(state, self.broker._world, ticket)
        return sorted(self.preparations)

    def step(self, seq: int) -> Step:
        self.stepping = seq
        try:
            outcome = self._first_step(seq) or self.preparations[seq].step()
        finally:
            self.stepping = None
        if outcome is Step.DONE:
            del self.preparations[seq]
        self.wake()
        return outcome

    def _first_step(self, seq: int) -> Step | None:
        """By the thread that asks, where it may; where that comes to nothing a preparation thread begins anew."""
        if self.broker.fresh is None or seq not in self.broker.fresh:
            return None
        self.broker.fresh.discard(seq)
        if self.preparations[seq].at_once():
            return Step.DONE
        state = self.broker.state
        self.preparations[seq] = Preparation(state, self.broker._world, self.preparations[seq]._ticket)
        return Step.AGAIN

    def prepare(self, rounds: int = 50) -> None:
        """Step every preparation until all of them are done or wait."""
        for _ in range(rounds):
            if all(self.step(seq) is Step.WAIT for seq in self.begun() if seq in self.preparations):
                return
        raise AssertionError("the preparations come to no end")

    def grant(self, name: str, *, loaded: bool = False, **words: Any) -> Lease:
        """Ask, prepare, and expect a lease; ``loaded``: its holder takes its memory at once."""
        caller = self.ask(name, **words)
        self.prepare()
        if loaded:
            self.services[name].take()
        return caller.lease()

    def refusal(self, name: str, **words: Any) -> GpumgrError:
        """Ask, prepare, and expect an error."""
        try:
            caller = self.ask(name, **words)
        except GpumgrError as error:
            return error
        self.prepare()
        return caller.error()


class _HadIt(Exception):
    """``acquire`` answered at once with the lease that this request has already."""

    def __init__(self, granted: Lease | Call) -> None:
        super().__init__("had it")
        assert isinstance(granted, Lease)
        self.lease = granted


HadIt = _HadIt


class StartedWorld(Stand):
    """A running broker on the in-memory card: real threads, real time."""

    def __init__(
        self,
        consumers: Catalog,
        totals_mib: Sequence[int] = (24000,),
        *,
        broker: type[Broker] = Broker,
        headroom_mib: int = HEADROOM_MIB,
        mode: str = "evicting",
        when_unreadable: str = "refuse",
        gpu: Mapping[str, Any] | None = None,
        rest: Mapping[str, Rest] | None = None,
        policy: str = "quantum",
        **lease: float,
    ) -> None:
        super().__init__(consumers, totals_mib, clock=SystemClock(), deferred=False)
        self.broker = broker(
            self.settings(headroom_mib, mode, when_unreadable, gpu, rest, policy, None, **lease),
            self.probe,
            self.dialects,
            self.clock,
            self.store,
            time.sleep,
        )

    def lease(self, name: str, **words: Any) -> Lease:
        return self.broker.acquire(Ask(consumer=name, **words))

    def waiting(self) -> list[str]:
        """The consumers in the line, in order of arrival."""
        with self.broker.state.lock:
            return [entry.consumer for entry in self.broker.state.queue.waiting()]

    def open_gates(self) -> None:
        for service in self.services.values():
            for gate in (service.unload_gate, service.health_gate):
                if gate is not None:
                    gate.set()


@contextmanager
def started(*consumers: Consumer, **settings: Any) -> Iterator[StartedWorld]:
    world = StartedWorld(catalog(*consumers), **settings)
    world.broker.start()
    try:
        yield world
    finally:
        world.open_gates()
        world.broker.close()


class Calling:
    """One caller on a thread of its own."""

    def __init__(self, world: StartedWorld, name: str, **words: Any) -> None:
        self._ask = Ask(consumer=name, **words)
        self._world = world
        self.answer: Lease | GpumgrError | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=f"caller-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self.answer = self._world.broker.acquire(self._ask)
        except GpumgrError as error:
            self.answer = error
        self.seconds = time.monotonic() - began

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    @property
    def ident(self) -> int | None:
        return self._thread.ident

    def lease(self, within_seconds: float = 5.0) -> Lease:
        self._thread.join(within_seconds)
        assert isinstance(self.answer, Lease), self.answer
        return self.answer

    def error(self, within_seconds: float = 5.0) -> GpumgrError:
        self._thread.join(within_seconds)
        assert isinstance(self.answer, GpumgrError), self.answer
        return self.answer
