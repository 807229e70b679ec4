"""Any order of events: the broker's rules against a model of their own.

The broker is real and never started: Hypothesis plays callers, holders, proxied calls, preparation threads, the
watchdog, the observers, somebody who uses a consumer directly, a game, a victim that lies and a driver that cannot be
read. The model (model.py and below) shares no decision with gpumgr.core: it knows who conflicts with whom from its own
table, computes expiry and fit from the card itself, and says after each step what must never have happened.
``test_mutants.py`` shows that it does notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gpumgr.core.card import Reading
from gpumgr.core.lease import Call, Lease, RequestKey
from gpumgr.core.quantum import FACTOR, FLOOR_SECONDS, LINGER_SHARE, PATIENCE
from gpumgr.core.queue import Priority, WaitingFor
from gpumgr.errors import (
    ConsumerUnhealthy,
    EvictionFailed,
    GpumgrError,
    GpuUnreadable,
    GpuYielded,
    InsufficientVram,
    LeaseMismatch,
    LeaseUnknown,
    PrepareTimeout,
    RequestEnded,
    RequestMismatch,
    SchedulerTimeout,
)
from gpumgr.runtime import preparation
from gpumgr.runtime.ports import BackendError, KeptLease, Total
from gpumgr.runtime.preparation import Step
from gpumgr.runtime.ticket import Ask
from tests.core.model import (
    AT_ONCE,
    BESIDE,
    GPUS,
    MAX_PREPARE,
    MIN_HOLD_SECONDS,
    MUTE,
    NAMES,
    QUARANTINE_SECONDS,
    REPORTING,
    SIZES,
    TOTALS,
    WORN_MIB,
    Called,
    Held,
    Wanted,
    blocked,
    conflicts,
    excludes,
    share_gpu,
)
from tests.worlds import HEADROOM_MIB, Caller, HadIt, Service, World, catalog, consumer, request

KEEP_UP = st.sampled_from([True, True, False])
PICK = st.integers(0, 99)


class BrokerMachine(RuleBasedStateMachine):
    policy = "fifo"

    def __init__(self) -> None:
        super().__init__()
        consumers = [
            consumer(
                name,
                tuple(sizes.values()),
                gpus=tuple(sizes),
                beside=[other for other in NAMES if frozenset((name, other)) in BESIDE],
                at_once=AT_ONCE.get(name, 1),
            )
            for name, sizes in SIZES.items()
        ]
        kinds = {name: name for name in NAMES}
        self.world = World(catalog(*consumers, **kinds), TOTALS, loads=["span"], policy=self.policy)
        self.wanted: dict[int, Wanted] = {}
        self.held: list[Held] = []
        self.called: list[Called] = []
        self.tails: set[str] = set()
        """Who computes since before the end of the last hold: gpumgr has to know of it."""
        self.quarantined: dict[str, float] = {}
        """Who computes for a holder whose lease expired, and until when that is waited for at the most."""
        self.outlasted: set[str] = set()
        """Who still did at the end of that: it may be unloaded all the same."""
        self.unasked: set[str] = set()
        """Who loaded for somebody and was not asked to unload since."""
        self.on_its_word: set[tuple[str, int]] = set()
        """Whose unload nothing but its own word has proved, on which GPU; or nobody needed it there."""
        self.unseen: set[int] = set()
        """The GPUs that cannot be read."""
        self.overdrawn: set[int] = set()
        """GPUs where a call went ahead over budget: others than leases may find that their memory is not there."""
        self.lent_blindly: set[int] = set()
        """GPUs where that is so for leases as well: lent on declared sizes alone."""
        self.free_until: datetime | None = None
        """Until when an operator keeps the card free."""
        self.free_for_at_most = 0.0
        self.coming: tuple[str, str, int] | None = None
        """When, what, and of whom: what happens in the middle of something else."""
        self.stepping: list[Wanted] = []
        self.observing = False
        self.writing: list[Wanted] = []
        self.out_of_memory: set[int] = set()
        self.wrong: list[str] = []
        """Found where an assertion would be lost: on other threads, and inside a preparation."""
        self.watchdog_runs = False
        self.world.each_instant = self.each_instant
        for service in self.world.services.values():
            service.before_unload = self.note_unload
            service.computing = None if service.consumer.name in MUTE else False
            service.busy = self.asker(service.busy)  # type: ignore[method-assign]
            service.load = self.loader(service)  # type: ignore[method-assign]
        self.read_card, self.world.probe.read = self.world.probe.read, self.read  # type: ignore[method-assign]
        self.written, self.world.store.granted = self.world.store.granted, self.write_down  # type: ignore[method-assign]

    # -- the model's own numbers ----------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.world.now

    def waiting(self) -> list[Wanted]:
        """In the line, in order of arrival."""
        return [w for _, w in sorted(self.wanted.items()) if not w.over and w.turn_at is None]

    def preparing(self) -> list[Wanted]:
        return [self.wanted[seq] for seq in self.world.begun()]

    def leases(self) -> list[Held]:
        """Whose lease excludes others: alive, or over and not noticed yet."""
        return [held for held in self.held if not held.noticed]

    def calls(self) -> list[Called]:
        return [called for called in self.called if not called.ended]

    def holding(self) -> list[str]:
        """The consumers of all holds, each as often as it is held."""
        held = [held.name for held in self.leases()] + [c.name for c in self.calls() if c.under is None]
        held += [w.name for w in self.preparing()]
        return held + [name for name in self.quarantined if name not in held]  # whom somebody holds needs none

    def users(self) -> set[str]:
        """Who may load what it has not taken yet: holders, calls, and what goes on after them."""
        holders = {held.name for held in self.leases()} | {called.name for called in self.calls()}
        return holders | self.tails | self.quarantined.keys()

    def leased_beside(self, name: str) -> bool:
        """Whether a lease shares a GPU with it, also one that is being written down."""
        leased = [held.name for held in self.leases()] + [wanted.name for wanted in self.writing if not wanted.proxied]
        return any(share_gpu(name, other) for other in leased)

    def says_busy(self, name: str) -> bool:
        said = self.world.services[name].computing
        return said is True or isinstance(said, BackendError)

    def seen(self, name: str) -> bool:
        """Whether each of its GPUs can be read."""
        return self.unseen.isdisjoint(SIZES[name])

    def on_card(self, name: str, gpu: int) -> int:
        return self.world.services[name].used_mib(gpu)

    def missing(self, name: str, gpu: int) -> int:
        return max(0, SIZES[name].get(gpu, 0) - self.on_card(name, gpu))

    def owed(self, names: set[str], gpu: int) -> int:
        return sum(self.missing(name, gpu) for name in names)

    def promised(self, gpu: int, *, beside: str | None = None) -> int:
        return self.owed((self.users() | {w.name for w in self.preparing()}) - {beside}, gpu)

    def promised_at_most(self, gpu: int, *, beside: str) -> int:
        """Whether direct use is promised something depends on whether gpumgr has heard of it."""
        users = self.users() | {w.name for w in self.preparing()} | {name for name in NAMES if self.says_busy(name)}
        return self.owed(users - {beside}, gpu)

    def lendable(self, gpu: int) -> int:
        return self.world.card.free_mib(gpu) - HEADROOM_MIB

    # -- callers --------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        ttl=st.sampled_from([None, 10, 11, 60, 600, 9999]),
        wait=st.sampled_from([120, 5, 0]),
        request_id=st.sampled_from([None, None, None, "r1", "r2", "r3"]),
        eager=st.booleans(),
        keep_up=KEEP_UP,
    )
    def acquire(
        self, name: str, ttl: float | None, wait: float, request_id: str | None, eager: bool, keep_up: bool
    ) -> None:
        self.ask(name, ttl, wait, None if request_id is None else request(request_id), eager)
        self.let_threads_run(keep_up)

    @rule(name=st.sampled_from(NAMES), wait=st.sampled_from([120, 5, 0]), eager=st.booleans(), keep_up=KEEP_UP)
    def call(self, name: str, wait: float, eager: bool, keep_up: bool) -> None:
        self.ask_call(name, wait, eager)
        self.let_threads_run(keep_up)

    @rule(
        wants=st.lists(st.tuples(st.sampled_from(NAMES), st.booleans()), min_size=2, max_size=6),
        wait=st.sampled_from([120, 5]),
        keep_up=KEEP_UP,
    )
    def crowd(self, wants: list[tuple[str, bool]], wait: float, keep_up: bool) -> None:
        """Several at the same instant, for leases and calls; each second one loads at once."""
        for number, (name, proxied) in enumerate(wants):
            if proxied:
                self.ask_call(name, wait, bool(number % 2))
            else:
                self.ask(name, 60, wait, None, bool(number % 2))
        self.let_threads_run(keep_up)

    @precondition(lambda self: any(w.key for w in self.wanted.values()))
    @rule(pick=PICK, wait=st.sampled_from([120, 5, 0]))
    def ask_again(self, pick: int, wait: float) -> None:
        """The same call once more, as after a lost answer."""
        known = [(w.key, w.name) for w in self.wanted.values() if w.key is not None]
        key, name = known[-1 - pick % len(known)]
        self.ask(name, None, wait, key, True)

    def ask(
        self,
        name: str,
        ttl: float | None,
        wait: float,
        key: RequestKey | None,
        eager: bool,
        *,
        priority: Priority = Priority.NORMAL,
        resume_of: str | None = None,
        behind: Wanted | None = None,
    ) -> None:
        expected = self.expected_of(key, name)
        self.notice_expiry()
        words: dict[str, Any] = {"priority": priority, "resume_of": resume_of}
        answer = self.answer_at_once(Ask(consumer=name, ttl_seconds=ttl, wait_seconds=wait, request=key, **words))
        self.follow()  # whoever asks lets the broker notice what has expired
        if not isinstance(answer, Caller):
            assert answer == (expected.token if isinstance(expected, Held) else expected), "not what the id leads to"
            return
        assert expected is None or isinstance(expected, Wanted), f"{expected}, and yet it waits"
        if isinstance(expected, Wanted):
            assert answer.ticket.seq == expected.seq, "one request, two places in the line"
        else:
            clamped = 120.0 if ttl is None else min(max(ttl, 10.0), 600.0)
            behind = None if answer.ticket.resumes is None else behind
            rank = list(Priority).index(priority)
            seq = answer.ticket.seq
            self.enter(Wanted(seq, name, clamped, key, eager, arrived_at=self.now, rank=rank, behind=behind))
        self.join(answer, wait)

    def ask_call(self, name: str, wait: float, eager: bool) -> None:
        self.notice_expiry()
        try:
            caller = self.world.call(name, wait_seconds=wait)
        except GpuYielded:
            assert self.kept_free(), "refused for nobody's sake"
            self.follow()
            return
        assert not self.kept_free(), "let in while the card is kept free"
        self.follow()
        self.enter(Wanted(caller.ticket.seq, name, 0.0, None, eager, proxied=True, arrived_at=self.now))
        self.join(caller, wait)

    def enter(self, wanted: Wanted) -> None:
        assert wanted.seq not in self.wanted, "a new request joined another one"
        self.wanted[wanted.seq] = wanted

    def join(self, caller: Caller, wait: float) -> None:
        self.wanted[caller.ticket.seq].callers.append(caller)
        assert caller.deadline == self.now + wait
        self.follow()

    def answer_at_once(self, ask: Ask) -> Caller | str:
        """The caller that waits; or the token it has already, or why it cannot."""
        try:
            return self.world.acquire(ask)
        except GpuYielded:
            return "yielded"
        except HadIt as had:
            return had.lease.token
        except RequestMismatch:
            return "mismatch"
        except RequestEnded as ended:
            return str(ended.details["reason"])

    def restarted(self) -> None:
        """Its next life has begun."""

    def expected_of(self, key: RequestKey | None, name: str) -> Wanted | Held | str | None:
        """What the id leads to: a waiting request, a lease, why it is over, a mismatch, or None: it is new. A new one
        is refused while the card is kept free."""
        new = "yielded" if self.kept_free() else None
        if key is None:
            return new
        for held in self.held:
            if held.key == key:
                if held.name != name:
                    return "mismatch"
                return held if held.alive(self.now) else held.ended or "expired"
        for wanted in self.wanted.values():
            if wanted.key == key and not wanted.over:
                return wanted if wanted.name == name else "mismatch"
        return new

    # -- holders --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.held)
    @rule(pick=PICK, ttl=st.sampled_from([None, None, 10, 9999]))
    def renew(self, pick: int, ttl: float | None) -> None:
        held = self.held[-1 - pick % len(self.held)]
        try:
            lease = self.world.broker.renew(held.token, ttl).lease
        except LeaseUnknown:
            assert not held.alive(self.now), "a live lease was not renewed"
            self.notice_expiry()
            self.follow()
            return
        assert held.alive(self.now), "a dead lease was renewed"
        held.ttl = held.ttl if ttl is None else min(max(ttl, 10.0), 600.0)
        held.written_ttl = max(held.written_ttl, held.ttl)
        held.expires_at = self.now + held.ttl
        assert abs(lease.expires_at - held.expires_at) < 1e-9

    @precondition(lambda self: self.held)
    @rule(pick=PICK, goes_on=st.booleans(), outlived=st.booleans(), keep_up=KEEP_UP)
    def release(self, pick: int, goes_on: bool, outlived: bool, keep_up: bool) -> None:
        """``outlived``: by a call under it."""
        held = self.held[-1 - pick % len(self.held)]
        if outlived:
            self.pass_under(held, held.name)
        self.end_lease(held, goes_on)
        self.let_threads_run(keep_up)

    def end_lease(self, held: Held, goes_on: bool) -> None:
        """``goes_on``: what its holder began is not done."""
        alive = held.alive(self.now)
        if alive:
            self.compute(held.name, goes_on)
            held.ended, held.noticed = "released", True
            self.note_end(held.name)
        else:
            self.notice_expiry()
        assert self.world.broker.release(held.token) is alive
        self.follow()

    @precondition(lambda self: self.held)
    @rule(pick=PICK, kind=st.sampled_from([None, None, None, None, "span", "hear"]))
    def call_under_lease(self, pick: int, kind: str | None) -> None:
        """Also under one that is over, or with a kind that is another consumer's."""
        held = self.held[-1 - pick % len(self.held)]
        self.pass_under(held, kind or held.name)

    def pass_under(self, held: Held, kind: str) -> None:
        alive, right = held.alive(self.now), kind == held.name
        try:
            call = self.world.broker.call_under_lease(held.token, kind)
        except LeaseUnknown:
            assert not alive, "a live lease opened nothing"
            self.notice_expiry()
            self.follow()
        except LeaseMismatch:
            assert alive, "a dead lease was compared"
            assert not right, "a lease did not open its own consumer"
        else:
            assert alive, "a dead lease let a call pass"
            assert right, "a lease opened another consumer"
            self.called.append(Called(call, held.name, under=held))

    @precondition(lambda self: self.called)
    @rule(pick=PICK, goes_on=st.booleans(), keep_up=KEEP_UP)
    def end_call(self, pick: int, goes_on: bool, keep_up: bool) -> None:
        """Also a second time."""
        self.end_called(self.called[-1 - pick % len(self.called)], goes_on)
        self.let_threads_run(keep_up)

    def end_called(self, called: Called, goes_on: bool) -> None:
        if not called.ended:
            self.compute(called.name, goes_on)
            called.ended = True
            self.note_end(called.name)
        self.world.broker.end_call(called.call)
        self.follow()

    def note_end(self, name: str) -> None:
        """Somebody's use of it has ended: what it computes now is a tail."""
        self.outlasted.discard(name)
        if self.says_busy(name):
            self.tails.add(name)

    @precondition(lambda self: self.loadable())
    @rule(pick=PICK, share=st.sampled_from([1.0, 0.3]))
    def take_memory(self, pick: int, share: float) -> None:
        names = self.loadable()
        self.load(names[pick % len(names)], share)

    def loadable(self) -> list[str]:
        leased = {held.name for held in self.held if held.alive(self.now)}
        names = leased | {called.name for called in self.calls()} | self.tails
        return sorted(name for name in names if any(self.missing(name, gpu) for gpu in SIZES[name]))

    def load(self, name: str, share: float = 1.0) -> None:
        """A holder, a call or a tail loads, up to its declared size: what it was promised is there."""
        service = self.world.services[name]
        for gpu, size in SIZES[name].items():
            used, free = service.used_mib(gpu), self.world.card.free_mib(gpu)
            more = max(0, int(size * share) - used)
            if gpu in self.overdrawn:
                more = min(more, max(0, free - self.owed(self.leased() - {name}, gpu)))
            assert more <= free, f"{name} was promised what is not there"
            self.world.card.set_used(service.pid, used + more, gpu)
        if any(service.used_mib(gpu) for gpu in SIZES[name]):  # a game may have left it nothing to take
            self.unasked.add(name)

    def leased(self) -> set[str]:
        """Also those whose lease is being written down."""
        return {held.name for held in self.leases()} | {wanted.name for wanted in self.writing}

    def loader(self, service: Service) -> Callable[[], None]:
        """Its load call, made by a preparation. What is not there, or promised to a lease, it cannot take: that is a
        defect, unless it is for a call that may go ahead over budget, or lent on declared sizes."""
        name = service.consumer.name

        def load() -> None:
            wanted = self.stepping[-1]
            left = [self.world.card.free_mib(gpu) - self.owed(self.leased() - {name}, gpu) for gpu in SIZES[name]]
            if all(self.missing(name, gpu) <= mib for gpu, mib in zip(SIZES[name], left, strict=True)):
                service.take()
                self.unasked.add(name)
                if wanted.proxied or not self.seen(name):
                    self.overdrawn |= SIZES[name].keys()
                return
            if self.seen(name) and (not wanted.proxied or self.leased_beside(name)):
                self.wrong.append(f"{name} was to load what is not there")
            self.out_of_memory.add(wanted.seq)
            raise BackendError("failed", "CUDA out of memory")

        return load

    # -- the world ------------------------------------------------------------------------------------------

    @rule(gpu=st.sampled_from(GPUS), share=st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0]))
    def play(self, gpu: int, share: float) -> None:
        """A game takes what is free or gives back; what was promised to holders it does not take."""
        game = self.world.games[gpu]
        mine = self.world.card.used_mib(game.pid)
        game.set_used(int(max(0, mine + self.unpromised(gpu)) * share) if share else 0)

    def unpromised(self, gpu: int) -> int:
        return self.world.card.free_mib(gpu) - self.owed(self.users(), gpu)

    @rule(name=st.sampled_from(NAMES), lies=st.booleans())
    def lie(self, name: str, lies: bool) -> None:
        """From now on it answers 200 to its unload and keeps its memory, or no longer does."""
        self.world.services[name].lies = lies

    @rule(
        name=st.sampled_from(REPORTING),
        share=st.sampled_from([1.0, 0.3, 0.0]),
        hangs=st.sampled_from([False] * 3 + [True]),
    )
    def work(self, name: str, share: float, hangs: bool) -> None:
        """Its holder has it compute; or somebody does who asked nobody, with the memory that nobody was promised.
        ``hangs``: its report, while it does."""
        self.compute(name, BackendError("hung", "no answer in time") if hangs else True)
        if name not in self.users():
            service = self.world.services[name]
            for gpu, size in SIZES[name].items():
                more = min(int(size * share) - service.used_mib(gpu), self.unpromised(gpu))
                self.world.card.set_used(service.pid, service.used_mib(gpu) + max(0, more), gpu)

    @precondition(lambda self: any(self.says_busy(name) for name in REPORTING))
    @rule(pick=PICK, keep_up=KEEP_UP)
    def rest(self, pick: int, keep_up: bool) -> None:
        """Somebody's computing ends."""
        busy = [name for name in REPORTING if self.says_busy(name)]
        self.compute(busy[pick % len(busy)], False)
        self.let_threads_run(keep_up)

    def compute(self, name: str, said: bool | BackendError) -> None:
        if name not in MUTE:
            self.world.services[name].computing = said
        if not self.says_busy(name):
            self.tails.discard(name)

    @rule(sight=st.sampled_from([None, "driver", *GPUS]), keep_up=KEEP_UP)
    def lose_sight(self, sight: str | int | None, keep_up: bool) -> None:
        """The driver, or one GPU of it, cannot be read from now on; or everything can."""
        self.world.card.unreadable = "the driver is gone" if sight == "driver" else None
        for gpu in GPUS:
            self.world.card.set_gpu_error("it has fallen off the bus" if sight == gpu else None, gpu)
        self.unseen = {gpu for gpu in GPUS if sight in ("driver", gpu)}
        self.let_threads_run(keep_up)

    # -- an operator, and the card at rest ------------------------------------------------------------------

    @rule(seconds=st.sampled_from([5.0, 60.0, 600.0]), keep_up=KEEP_UP)
    def hold(self, seconds: float, keep_up: bool) -> None:
        """Keep the card free: whoever waits is told so at once, holders go on."""
        self.world.broker.outsiders.hold("a game", seconds, "ada")
        self.free_until = self.world.clock.utc() + timedelta(seconds=seconds)
        self.free_for_at_most = self.now + seconds
        self.world.wake()
        for wanted in self.wanted.values():
            if not wanted.over and wanted not in self.writing:
                said = {type(caller.answer) for caller in wanted.callers if caller.answered_at == self.now}
                assert said <= {GpuYielded, SchedulerTimeout, PrepareTimeout, RequestEnded}, said
                assert not any(caller.waits for caller in wanted.callers), f"{wanted.name} still waits"
        self.follow()
        self.let_threads_run(keep_up)

    @rule(keep_up=KEEP_UP)
    def resume(self, keep_up: bool) -> None:
        self.world.broker.outsiders.end_what_is_over()
        assert self.world.broker.outsiders.resume("ada") is self.kept_free()
        self.free_until = None
        self.follow()
        self.let_threads_run(keep_up)

    def kept_free(self) -> bool:
        """Until the wall clock says so, or for as long as was said where somebody has set it back."""
        until = self.free_until
        return until is not None and self.world.clock.utc() < until and self.now < self.free_for_at_most

    @rule(keep_up=KEEP_UP)
    def keep_house(self, keep_up: bool) -> None:
        """One round of it: nobody in use may be unloaded (``note_unload``), and while the card is kept free nobody idle
        and honest stays on it."""
        world = self.world
        world.broker.observe_card()
        world.broker.housekeeping.round()
        if self.kept_free() and not self.unseen:
            users = self.users() | {w.name for w in self.preparing()}
            for name in NAMES:
                service = world.services[name]
                asked_in_vain = world.broker.state.memory[name].unload_not_before > self.now
                if name not in users and not self.says_busy(name) and not service.lies and not asked_in_vain:
                    held = [service.used_mib(gpu) for gpu in SIZES[name]]
                    assert max(held) <= WORN_MIB, f"{name} stays on a card that is kept free: {held}"
        self.follow()
        self.let_threads_run(keep_up)

    # -- callers that go, other lives, other boots ----------------------------------------------------------

    @precondition(lambda self: self.world.callers)
    @rule(pick=PICK, seen=st.booleans(), keep_up=KEEP_UP)
    def hang_up(self, pick: int, seen: bool, keep_up: bool) -> None:
        """``seen``: by the thread that watches for it; else only a look just before the grant can tell."""
        callers = self.world.callers
        self.world.hang_up(callers[-1 - pick % len(callers)], seen=seen)
        self.follow()
        self.let_threads_run(keep_up)

    @rule(reboot=st.sampled_from([False, False, True]), keep_up=KEEP_UP)
    def restart(self, reboot: bool, keep_up: bool) -> None:
        """kill -9 of the broker, or of the machine."""
        for held in self.held:
            if held.ended is None and reboot:
                held.ended, held.noticed = "host_reboot", True
            elif held.ended is None:
                held.ttl, held.expires_at = held.written_ttl, self.now + held.written_ttl
        self.wanted.clear()
        self.called.clear()
        if reboot:
            self.quarantined.clear()
            self.tails.clear()
            for name, service in self.world.services.items():
                self.compute(name, False)
                service.take(0)
            for game in self.world.games:
                game.set_used(0)
            self.unasked.clear()
        self.outlasted.clear()
        for name in self.quarantined:
            self.quarantined[name] = self.now + QUARANTINE_SECONDS
        self.free_for_at_most = math.inf  # the next life has the wall clock alone
        self.world.restart(reboot=reboot)
        self.restarted()
        self.quarantined = {name: until for name, until in self.quarantined.items() if self.says_busy(name)}
        self.follow()
        self.let_threads_run(keep_up)

    @rule(seconds=st.sampled_from([0.5, 30.0, 86400.0]), keep_up=KEEP_UP)
    def suspend(self, seconds: float, keep_up: bool) -> None:
        """The machine sleeps: nobody could renew meanwhile."""
        self.world.sleep(seconds)
        if seconds > 1.0:
            for held in self.held:
                if held.alive(self.now):
                    held.expires_at = self.now + held.ttl
        self.notice_expiry()
        self.world.broker.tick()
        self.follow()
        self.let_threads_run(keep_up)

    @precondition(lambda self: self.quarantined)
    @rule(keep_up=KEEP_UP)
    def look_at_quarantines(self, keep_up: bool) -> None:
        self.look_at_them()
        self.let_threads_run(keep_up)

    def look_at_them(self) -> None:
        for name, until in list(self.quarantined.items()):
            if not self.says_busy(name) or self.now >= until:
                del self.quarantined[name]
                if self.says_busy(name):
                    self.outlasted.add(name)
        self.world.broker.look_at_quarantines()
        self.follow()

    @rule()
    def observe_card(self) -> None:
        self.world.broker.observe_card()

    @rule(name=st.sampled_from(REPORTING), used=st.booleans())
    def observe_server(self, name: str, used: bool) -> None:
        """As the observer asks one of them. ``used``: after its answer, and before that is noted, a holder comes and
        goes, and leaves a tail."""
        state = self.world.broker.state
        if state.may_ask_busy(name):
            self.coming = ("asked", "use", NAMES.index(name)) if used else self.coming
            self.observing = True
            preparation.ask_busy(state, name, self.world.services[name])
            self.observing = False

    @rule(dt=st.sampled_from([0.5, 5.0, 10.0, 10.999, 60.0, 120.0]), watchdog_ran=st.booleans(), keep_up=KEEP_UP)
    def tick(self, dt: float, watchdog_ran: bool, keep_up: bool) -> None:
        self.pass_time(dt, watchdog_ran)
        self.let_threads_run(keep_up)

    def pass_time(self, dt: float, watchdog_ran: bool) -> None:
        self.watchdog_runs = watchdog_ran
        self.world.pass_time(dt, watchdog=watchdog_ran)
        self.watchdog_runs = False
        self.follow()

    def each_instant(self) -> None:
        if self.watchdog_runs:
            self.notice_expiry()
        self.follow()

    @precondition(lambda self: any(held.alive(self.now) for held in self.held))
    @rule(pick=PICK, early=st.sampled_from([0.0, 0.001]), watchdog_ran=st.booleans(), keep_up=KEEP_UP)
    def reach_an_expiry(self, pick: int, early: float, watchdog_ran: bool, keep_up: bool) -> None:
        alive = [held for held in self.held if held.alive(self.now)]
        left = alive[pick % len(alive)].expires_at - self.now
        self.pass_time(max(0.0, left - early), watchdog_ran)
        self.let_threads_run(keep_up)

    # -- in the middle of something -------------------------------------------------------------------------

    @rule(
        when=st.sampled_from(["read", "asked", "written"]),
        what=st.sampled_from(["release", "end", "ask", "call"]),
        pick=PICK,
    )
    def plan(self, when: str, what: str, pick: int) -> None:
        """Happens once, when the card has been read, when somebody has said whether it is busy, and nothing was made of
        it yet, or while a grant is written down."""
        self.coming = (when, what, pick)

    def read(self, at_most_seconds: float | None = None) -> Reading:
        reading = self.read_card(at_most_seconds)
        self.meanwhile("read")
        return reading

    def asker(self, busy: Callable[[], bool | None]) -> Callable[[], bool | None]:
        def asked() -> bool | None:
            said = busy()
            if self.stepping or self.observing:  # not in a quarantine: it asks in the middle of an end
                self.meanwhile("asked")
            return said

        return asked

    def write_down(self, kept: KeptLease, event: dict[str, Any], totals: Mapping[str, Total]) -> None:
        self.writing.append(self.wanted[kept.lease.seq])
        self.meanwhile("written")
        self.writing.pop()
        self.written(kept, event, totals)

    def meanwhile(self, when: str) -> None:
        if self.coming is None or self.coming[0] != when:
            return
        (_, what, pick), self.coming = self.coming, None
        alive = [held for held in self.held if held.alive(self.now)]
        if what == "release" and alive:
            held = alive[pick % len(alive)]
            self.load(held.name)
            self.end_lease(held, goes_on=False)
        elif what == "end" and self.calls():
            self.end_called(self.calls()[pick % len(self.calls())], goes_on=bool(pick % 2))
        elif what == "ask":
            self.ask(NAMES[pick % len(NAMES)], 60, 5.0, None, True)
        elif what == "call":
            self.ask_call(NAMES[pick % len(NAMES)], 5.0, True)
        elif what == "use":
            self.use(NAMES[pick])
        self.let_threads_run(True)

    def use(self, name: str) -> None:
        """Somebody holds it for a moment, and what is left is a tail that has loaded nothing yet."""
        self.ask(name, 60, 5.0, None, False)
        self.let_threads_run(True)
        if self.held and self.held[-1].name == name:
            self.end_lease(self.held[-1], goes_on=True)

    # -- threads --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.begun())
    @rule(pick=PICK)
    def step(self, pick: int) -> None:
        begun = self.world.begun()
        self.step_one(begun[pick % len(begun)])

    def let_threads_run(self, keep_up: bool) -> None:
        """The preparation threads have the time they need, or none at all."""
        for _ in range(12 if keep_up else 0):
            if all(self.step_one(seq) is Step.WAIT for seq in self.world.begun() if self.may_step(seq)):
                return

    def may_step(self, seq: int) -> bool:
        return seq in self.world.preparations and self.wanted[seq] not in self.stepping

    def step_one(self, seq: int) -> Step:
        wanted = self.wanted[seq]
        shown = [self.lendable(gpu) - self.promised(gpu, beside=wanted.name) for gpu in GPUS]
        unloads = sum(service.asked_to_unload for service in self.world.services.values())
        events = self.world.broker.state.events
        last, before = events[-1] if events else None, self.now
        self.stepping.append(wanted)
        outcome = self.world.step(seq)
        self.stepping.pop()
        if sum(service.asked_to_unload for service in self.world.services.values()) == unloads:
            assert self.now == before, "time passed where nothing was unloaded"
        warned = self.warned_since(last, wanted.name)
        answers = [c.answer for c in wanted.callers if c.answer is not None and c.answered_at == self.now]
        granted = wanted.callers[0].ticket.outcome
        if isinstance(granted, Lease | Call) and not wanted.over:
            self.granted(wanted, granted, shown, warned)
        elif outcome is Step.DONE and answers and isinstance(answers[0], GpumgrError):
            self.refused(wanted, answers[0])
        elif outcome is Step.WAIT:
            self.waits_for_a_reason(wanted)
        self.follow()
        return outcome

    def warned_since(self, last: dict[str, Any] | None, name: str) -> str | None:
        """The code of what a call went ahead in spite of."""
        for event in reversed(self.world.broker.state.events):
            if event is last:
                return None
            if event["type"] == "proxy_over_budget" and event["consumer"] == name:
                return str(event["code"])
        return None

    # -- what must be true of an answer ---------------------------------------------------------------------

    def granted(self, wanted: Wanted, granted: Lease | Call, shown: list[int], warned: str | None) -> None:
        wanted.over = True
        name = wanted.name
        assert wanted.turn_at is not None
        assert granted.consumer == name
        assert not self.kept_free(), "granted a card that is kept free"
        assert isinstance(granted, Call) is wanted.proxied, "a lease for a call"
        patient = [c for c in wanted.callers if not isinstance(c.answer, SchedulerTimeout | RequestEnded)]
        assert all(caller.answer is granted for caller in patient), "joined callers with different answers"
        assert any(caller.answer is granted for caller in wanted.callers), "a grant that nobody waits for"
        assert any(caller.line.here() for caller in wanted.callers), "a grant for callers that have all gone"
        at_once = wanted.turn_at == wanted.callers[0].ticket.entered_at  # wait_seconds: 0 is now or never
        assert wanted.turn_at < wanted.deadline or at_once, "a turn after the deadline"
        assert self.now <= wanted.deadline + MAX_PREPARE, "answered too late"

        holding = [held.name for held in self.held if held.alive(self.now)]
        holding += [called.name for called in self.calls() if called.under is None]
        for other in holding:
            assert not excludes(name, other), f"{name} beside {other}"
        assert holding.count(name) < AT_ONCE.get(name, 1), f"too many for {name}"
        fits = all(self.missing(name, gpu) <= shown[gpu] for gpu in SIZES[name])
        if isinstance(granted, Lease):
            self.leased_out(wanted, granted, fits)
        else:
            self.let_go_ahead(wanted, granted, fits, warned)
        if wanted.eager:
            self.load(name)

    def leased_out(self, wanted: Wanted, lease: Lease, fits: bool) -> None:
        name = wanted.name
        if self.seen(name):
            self.nobody_stayed_that_may_not(name)
            assert fits, "it does not fit"
        else:
            assert self.world.broker.state.believes, "granted without a look at the card"
            self.nobody_stayed_unasked(name)
            if not fits:
                self.overdrawn |= SIZES[name].keys()
                self.lent_blindly |= SIZES[name].keys()

        for held in self.held:
            assert lease.fence != held.fence, "one fence for two"
            assert lease.fence > held.fence or not blocked(name, [held.name]), "the fence did not grow"
        assert wanted.key is None or all(held.key != wanted.key for held in self.held), "a second lease for one request"
        assert lease.token not in [held.token for held in self.held]
        assert lease.ttl_seconds == wanted.ttl
        assert abs(lease.granted_at - self.now) < 1e-9
        assert abs(lease.expires_at - (self.now + wanted.ttl)) < 1e-9
        expires_at = self.now + wanted.ttl
        held = Held(lease.token, name, wanted.ttl, expires_at, wanted.key, lease.fence, self.now, wanted.ttl)
        self.held.append(held)

    def let_go_ahead(self, wanted: Wanted, call: Call, fits: bool, warned: str | None) -> None:
        """What a lease would have been refused for it is only warned of, beside no lease."""
        name = wanted.name
        assert warned is None or not self.leased_beside(name), f"over budget beside a lease: {warned}"
        if not self.seen(name):
            self.nobody_stayed_unasked(name)
        elif warned is None:
            self.nobody_stayed_that_may_not(name)
            assert fits, "it does not fit, and nobody was told"
        elif warned == "insufficient_vram":
            assert self.short_without_others(name), "warned, and it would fit with every other consumer gone"
        if not fits:
            self.overdrawn |= SIZES[name].keys()
        self.called.append(Called(call, name))

    def nobody_stayed_that_may_not(self, name: str) -> None:
        for other in NAMES:
            for gpu in SIZES[other].keys() & SIZES[name].keys():
                if excludes(name, other) and (other, gpu) not in self.on_its_word:
                    assert self.on_card(other, gpu) <= WORN_MIB, f"{other} was still on the card"

    def nobody_stayed_unasked(self, name: str) -> None:
        """All that can be done where the card cannot be read."""
        for other in self.unasked:
            assert not excludes(name, other), f"{other} was not even asked to unload"

    def refused(self, wanted: Wanted, error: GpumgrError) -> None:
        name = wanted.name
        if isinstance(error, ConsumerUnhealthy):
            assert wanted.seq in self.out_of_memory, error
            return
        if isinstance(error, GpuUnreadable):
            assert not self.seen(name), "refused for a card that can be read"
            assert not wanted.proxied, "a call was refused for a card that cannot be read"
            assert not self.world.broker.state.believes
            return
        if isinstance(error, RequestEnded):
            waited = [c for c in wanted.callers if c.answer is None or isinstance(c.answer, RequestEnded)]
            assert not any(caller.line.here() for caller in waited), "withdrawn, and somebody waits"
            return
        if isinstance(error, SchedulerTimeout | PrepareTimeout):
            return
        if isinstance(error, GpuYielded):
            told_then = wanted.over  # by the hold itself; its preparation has only just come to its end
            assert told_then or self.free_until is not None, "refused for nobody's sake"
            return
        assert isinstance(error, InsufficientVram | EvictionFailed), error
        assert not wanted.proxied, f"a call was refused: {error}"
        if self.seen(name):
            self.refused_for_a_reason(name, error)

    def refused_for_a_reason(self, name: str, error: InsufficientVram | EvictionFailed) -> None:
        if isinstance(error, InsufficientVram):
            gpu = error.details["gpu"]
            assert error.details["needed_mib"] == SIZES[name][gpu]
            assert error.details["free_mib"] == self.world.card.free_mib(gpu)
            assert error.details["held_mib"] == self.on_card(name, gpu)
            promised = error.details["promised_mib"]
            assert self.owed(self.users() - {name}, gpu) <= promised <= self.promised_at_most(gpu, beside=name)
            used = self.world.card.used_mib(self.world.games[gpu].pid)
            assert sum(process["used_mib"] for process in error.details["untracked"]) == used
            assert self.short_without_others(name), "it would fit with every other consumer gone"
        else:
            victims = {victim["consumer"] for victim in error.details["victims"]}
            assert victims
            excluded = {victim for victim in victims if excludes(name, victim)}
            assert excluded or self.short_now(name), "it fits beside those that kept their memory"
            held = [
                self.on_card(victim, gpu) for victim in victims for gpu in SIZES[victim].keys() & SIZES[name].keys()
            ]
            assert max(held) > 0, "the victims hold nothing"

    def short_now(self, name: str) -> bool:
        return any(
            self.missing(name, gpu) > self.lendable(gpu) - self.promised_at_most(gpu, beside=name)
            for gpu in SIZES[name]
        )

    def short_without_others(self, name: str) -> bool:
        for gpu in SIZES[name]:
            may_go = [o for o in NAMES if o != name and gpu in SIZES[o] and (o, gpu) not in self.on_its_word]
            others = [self.on_card(other, gpu) for other in may_go if not self.world.services[other].lies]
            if self.missing(name, gpu) > self.lendable(gpu) + sum(mib for mib in others if mib > WORN_MIB):
                return True
        return False

    def waits_for_a_reason(self, wanted: Wanted) -> None:
        """Whoever waits with the turn kept says for what, and it is so."""
        name, reason = wanted.name, wanted.callers[0].ticket.waiting_for
        if reason is WaitingFor.DRAINING:
            called = {called.name for called in self.calls()}
            assert any(excludes(name, other) and (self.says_busy(other) or other in called) for other in NAMES), (
                f"{name} waits until nobody computes, and nobody does"
            )
        elif reason is WaitingFor.VRAM and self.seen(name):
            leased = wanted.proxied and self.leased_beside(name)
            assert leased or self.short_now(name), f"{name} waits for memory that is there"

    # -- after every step -----------------------------------------------------------------------------------

    def follow(self) -> None:
        """Note who got the turn and who went away."""
        holds = self.world.broker.state.queue.holds
        for wanted in self.wanted.values():
            if wanted.over:
                continue
            if wanted.turn_at is None and wanted.seq in holds:
                for other in self.waiting():
                    if other is not wanted and other.seq not in holds:
                        assert not self.overtaken(wanted, other), f"{wanted.name} overtook {other.name}"
                wanted.turn_at = self.now
                self.note_turn(wanted.name)
            if not any(caller.waits for caller in wanted.callers):
                wanted.over = True

    def overtaken(self, wanted: Wanted, other: Wanted) -> bool:
        """Whether this was not this one's turn, as the other came earlier."""
        return other.seq < wanted.seq and conflicts(wanted.name, other.name)

    def note_turn(self, name: str) -> None:
        """Somebody has the turn with it."""

    def notice_expiry(self) -> None:
        """Whoever still computes for one that has expired is in quarantine, if nobody else holds it."""
        for held in self.held:
            if held.ended is None and not held.alive(self.now):
                alone = self.holding().count(held.name) == 1
                held.ended, held.noticed = "expired", True
                if alone and self.says_busy(held.name):
                    self.quarantined[held.name] = self.now + QUARANTINE_SECONDS
                else:
                    self.note_end(held.name)

    def note_unload(self, name: str) -> None:
        """Called on the unload's own thread, where an assertion would be lost."""
        self.unasked.discard(name)
        self.tails.discard(name)  # one that computes for too long is unloaded too, and is promised nothing more
        needed = SIZES[self.stepping[-1].name].keys() if self.stepping else SIZES[name].keys()
        for gpu in SIZES[name]:
            if gpu in needed and gpu not in self.unseen:
                self.on_its_word.discard((name, gpu))
            else:
                self.on_its_word.add((name, gpu))
        others = [seq for seq in self.world.preparations if self.wanted[seq] not in self.stepping[-1:]]
        if any(held.alive(self.now) for held in self.held if held.name == name):
            self.wrong.append(f"{name} was unloaded under a lease")
        if any(called.name == name for called in self.calls()):
            self.wrong.append(f"{name} was unloaded in the middle of a call")
        if any(self.wanted[seq].name == name for seq in others):
            self.wrong.append(f"{name} was unloaded while it is prepared")
        if self.says_busy(name) and name not in self.outlasted:
            self.wrong.append(f"{name} was unloaded while it computes")
        if name in self.quarantined:
            self.wrong.append(f"{name} was unloaded in its quarantine")

    @initialize(when_unreadable=st.sampled_from(["refuse", "refuse", "declared"]), at_once=st.booleans())
    def empty(self, when_unreadable: str, at_once: bool) -> None:
        """``at_once``: who asks prepares by itself where it can."""
        self.world.broker.state.believes = when_unreadable == "declared"
        self.world.broker.fresh = set() if at_once else None
        self.follow()

    @invariant()
    def the_broker_has_the_leases_of_the_model(self) -> None:
        live = {lease.token: lease.expires_at for lease in self.world.broker.state.leases if lease.alive(self.now)}
        expected = {held.token: held.expires_at for held in self.held if held.alive(self.now)}
        assert live.keys() == expected.keys()
        assert all(abs(live[token] - expected[token]) < 1e-9 for token in live)

    @invariant()
    def the_broker_has_the_calls_of_the_model(self) -> None:
        assert self.world.broker.state.calls.keys() == {called.call.seq for called in self.calls()}

    @invariant()
    def nobody_waits_past_the_deadline(self) -> None:
        for wanted in self.waiting():
            assert self.now < wanted.deadline
        for wanted in self.preparing():
            assert wanted.over or self.now < wanted.deadline + MAX_PREPARE

    @invariant()
    def nothing_was_asked_of_the_card_that_did_not_fit(self) -> None:
        assert self.world.card.over_commits == 0

    @invariant()
    def what_was_promised_is_there(self) -> None:
        for gpu in GPUS:
            free = self.world.card.free_mib(gpu)
            if free >= self.owed(self.users(), gpu):
                self.overdrawn.discard(gpu)
                self.lent_blindly.discard(gpu)
            else:
                assert gpu in self.overdrawn, f"more was promised on GPU {gpu} than it has"
                assert gpu in self.lent_blindly or free >= self.owed(self.leased(), gpu), "a lease has less than it was"

    @invariant()
    def nothing_went_wrong_elsewhere(self) -> None:
        assert self.wrong == [], self.wrong

    @invariant()
    def holders_do_not_conflict(self) -> None:
        names = self.holding()
        for name in set(names):
            assert names.count(name) <= AT_ONCE.get(name, 1)
            assert not any(excludes(name, other) for other in names)
        prepared = [gpu for w in self.preparing() for gpu in SIZES[w.name]]
        assert len(prepared) == len(set(prepared)), "two preparations on one GPU"

    @invariant()
    def whoever_has_the_turn_keeps_it(self) -> None:
        assert self.world.preparations.keys() <= self.world.broker.state.queue.holds.keys()

    @invariant()
    def nobody_who_may_go_is_left_waiting(self) -> None:
        state = self.world.broker.state
        assert state.queue.begin(self.now) == [], "a wake-up was lost"
        ahead = self.holding()
        taken = {gpu for w in self.preparing() for gpu in SIZES[w.name]}
        for wanted in self.waiting():
            if not blocked(wanted.name, ahead):
                assert not taken.isdisjoint(SIZES[wanted.name]), f"{wanted.name} may go and waits"
                taken |= SIZES[wanted.name].keys()
            ahead.append(wanted.name)

    @invariant()
    def nothing_is_left_behind(self) -> None:
        """Whoever was answered is in no book any more, but as the holder of a lease, or as a call."""
        state = self.world.broker.state
        pending = {w.seq for w in self.wanted.values() if not w.over}
        assert set(state.tickets) == pending
        holders = {lease.seq for lease in state.leases} | {c.call.seq for c in self.calls() if c.under is None}
        holders |= state.quarantines.keys()
        assert sorted(q.consumer for q in state.quarantines.values()) == sorted(self.quarantined)
        assert set(state.queue.holds) - pending - self.world.preparations.keys() == holders
        assert not any(state.queue.is_unloading(name) for name in NAMES)

    @precondition(lambda self: self.world.broker.state.queue.holds)
    @rule()
    def everybody_leaves(self) -> None:
        """Nobody computes, plays or lies any more, and each holder ends at once: whoever waits is served, one after the
        other, long before the deadlines of those who have time, and nothing is left."""
        self.lose_sight(None, False)
        for name, service in self.world.services.items():
            service.lies = False
            self.compute(name, False)
        for game in self.world.games:
            game.set_used(0)
        for _ in range(self.rounds() + 2 * len(self.world.broker.state.tickets)):
            for held in self.leases():
                self.end_lease(held, goes_on=False)
            self.notice_expiry()
            self.world.broker.tick()
            self.look_at_them()
            for called in self.calls():
                self.end_called(called, goes_on=False)
            self.let_threads_run(True)
            self.pass_time(0.5, False)
        state = self.world.broker.state
        assert not state.queue.holds, "somebody holds whom nobody knows"
        assert not state.tickets, "somebody waits for nobody"
        assert not any((state.calls, state.inside, state.begun, state.by_request, self.world.preparations))

    def rounds(self) -> int:
        return 4

    def teardown(self) -> None:
        self.world.broker.stop()


class QuantumMachine(BrokerMachine):
    """The same with the order that goes by time as well: whoever waits for a quantum's end or a linger has an instant
    at which somebody looks."""

    policy = "quantum"
    LONGEST_WAIT = FACTOR * FLOOR_SECONDS
    """Of anybody for a quantum: a swap there and back counts as so long here, whether it is known or not."""
    LONGEST_LINGER = LINGER_SHARE * FLOOR_SECONDS

    def __init__(self) -> None:
        super().__init__()
        self.known = False
        self.turns: dict[str, float] = {}
        """Who stays on the card, and since when its turn goes on."""
        self.look_into_the_queue()

    @precondition(lambda self: self.again_at() is not None)
    @rule(early=st.sampled_from([0.0, 0.001]), watchdog_ran=st.booleans(), keep_up=KEEP_UP)
    def reach_a_turn(self, early: float, watchdog_ran: bool, keep_up: bool) -> None:
        left = (self.again_at() or self.now) - self.now
        self.pass_time(max(0.0, left - early), watchdog_ran)
        self.let_threads_run(keep_up)

    def rounds(self) -> int:
        """Of half a second each, until the last linger is over."""
        return 4 + int(self.LONGEST_WAIT)

    def again_at(self) -> float | None:
        return self.world.broker.state.queue.look_again_at

    @initialize(known=st.booleans())
    def swaps(self, known: bool) -> None:
        """``known``: what they cost; else nobody lingers."""
        self.known = known
        self.look_into_the_queue()

    def look_into_the_queue(self) -> None:
        """Of each life. Who is sent away or leaves the card is a fact, not a decision of the order."""
        queue = self.world.broker.state.queue
        end_stay = queue.end_stay

        def noted(name: str) -> None:
            end_stay(name)
            self.turns.pop(name, None)

        queue.end_stay = noted  # type: ignore[method-assign, assignment]
        seconds = FLOOR_SECONDS / 2 if self.known else None  # and not what is learned here, where time jumps
        queue._swap_seconds = lambda _leaving, _coming: seconds
        self.turns = dict.fromkeys(self.holding(), self.now)

    def restarted(self) -> None:
        self.look_into_the_queue()

    def note_turn(self, name: str) -> None:
        """Whom it excludes is sent away for it; whom it joins it shares the turn with."""
        self.turns = {other: since for other, since in self.turns.items() if not excludes(name, other)}
        beside = [since for other, since in self.turns.items() if share_gpu(name, other)]
        self.turns.setdefault(name, min(beside, default=self.now))

    def overtaken(self, wanted: Wanted, other: Wanted) -> bool:
        ahead = other.order < wanted.order
        if wanted.name == other.name:
            return ahead
        if not excludes(wanted.name, other.name):
            return False
        if any(excludes(wanted.name, resident) for resident in self.turns):
            return ahead or (other.name in self.turns and self.was_impatient(wanted, other))
        return ahead and self.was_due(other)

    def was_due(self, other: Wanted) -> bool:
        """Whether nobody goes ahead any more of this one, who waits for the end of a turn, and for nobody before it."""
        before = [each for each in self.waiting() if each.order < other.order and conflicts(each.name, other.name)]
        turns = [since for resident, since in self.turns.items() if excludes(resident, other.name)]
        return not before and self.now > max([other.arrived_at, *turns]) + self.LONGEST_WAIT + 1e-6

    def was_impatient(self, wanted: Wanted, other: Wanted) -> bool:
        """Whether this one has sent the other one's consumer away, which is asked for, before it waited for long."""
        residents = [each.rank for each in self.waiting() if each.name == other.name]
        return wanted.rank >= max(residents) and self.now < wanted.arrived_at + PATIENCE * FLOOR_SECONDS - 1e-6

    @rule(
        name=st.sampled_from(NAMES),
        priority=st.sampled_from(Priority),
        wait=st.sampled_from([120, 5, 0]),
        keep_up=KEEP_UP,
    )
    def acquire_by_class(self, name: str, priority: Priority, wait: float, keep_up: bool) -> None:
        self.ask(name, None, wait, None, True, priority=priority)
        self.let_threads_run(keep_up)

    @precondition(lambda self: any(held.alive(self.now) for held in self.held))
    @rule(pick=PICK, at_once=st.booleans(), keep_up=KEEP_UP)
    def make_way(self, pick: int, at_once: bool, keep_up: bool) -> None:
        """Where its holder is asked to, with all who are asked for the same one's sake, as far as that takes them. It
        comes back, when the other one has it or before."""
        alive = [held for held in self.held if held.alive(self.now)]
        held = alive[pick % len(alive)]
        wish = self.world.broker.state.wish(self.world.broker.lease(held.token))
        assert wish is None or self.now >= held.since + MIN_HOLD_SECONDS, "asked to yield before it was of use"
        lease_id = self.world.broker.lease(held.token).lease_id
        if wish is not None:
            assert wish.seq in [wanted.seq for wanted in self.waiting()], "asked to yield to nobody who waits"
            for each in [held, *(other for other in alive if other is not held and self.asked_for(other) == wish.seq)]:
                if wish.seq not in self.world.broker.state.queue.holds:
                    self.end_lease(each, goes_on=False)
            goes = wish.seq in self.world.broker.state.queue.holds
            prepared = any(share_gpu(self.wanted[wish.seq].name, each.name) for each in self.preparing())
            assert goes or prepared, "they made way, and the other one does not go"
            self.let_threads_run(not at_once)
            self.ask(held.name, held.ttl, 120, None, True, resume_of=lease_id, behind=self.wanted[wish.seq])
        self.let_threads_run(keep_up)

    def asked_for(self, held: Held) -> int | None:
        """For whose sake its holder is asked to make way."""
        wish = self.world.broker.state.wish(self.world.broker.lease(held.token))
        return None if wish is None else wish.seq

    @invariant()
    def nobody_who_may_go_is_left_waiting(self) -> None:
        """Nor is anybody who may not go yet, with nobody to look again when he may."""
        state = self.world.broker.state
        again_at = self.again_at()
        if again_at is not None and again_at <= self.now:  # time has passed, and the watchdog was late
            self.notice_expiry()
            self.world.broker.tick()
            self.follow()
        assert state.queue.begin(self.now) == [], "a wake-up was lost"
        again_at = self.again_at()
        assert again_at is None or self.now < again_at <= self.now + self.LONGEST_WAIT
        if self.waiting() and not self.holding():
            assert again_at is None or again_at <= self.now + self.LONGEST_LINGER, (
                "an idle card, for longer than it saves"
            )
        ahead, taken = self.holding(), {gpu for w in self.preparing() for gpu in SIZES[w.name]}
        for wanted in self.waiting():
            beside = any(conflicts(wanted.name, other.name) for other in self.waiting() if other is not wanted)
            if not ahead or (not beside and not blocked(wanted.name, ahead) and taken.isdisjoint(SIZES[wanted.name])):
                assert again_at is not None, f"{wanted.name} waits for nobody, and nobody will look again"


MACHINE = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
MACHINES = pytest.mark.parametrize("machine", [BrokerMachine, QuantumMachine])


@MACHINES
def test_no_order_of_events_breaks_a_rule(machine: type[BrokerMachine]) -> None:
    run_state_machine_as_test(machine, settings=MACHINE)


@pytest.mark.long
@MACHINES
def test_no_order_of_events_breaks_a_rule_in_a_long_search(machine: type[BrokerMachine]) -> None:
    """The same one each time: what nobody has looked into yet shall not stop what has nothing to do with it."""
    run_state_machine_as_test(machine, settings=settings(MACHINE, max_examples=400, derandomize=True))
