"""Any order of events: the broker's rules against a model of their own.

The broker is real and never started: Hypothesis plays callers, holders, preparation threads, the watchdog, a game
and a victim that lies. The model below shares no decision with gpumgr.core: it knows who conflicts with whom from
its own table, computes expiry and fit from the card itself, and says after each step what must never have happened.
``test_mutants.py`` shows that it does notice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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

from gpumgr.core.lease import Lease, RequestKey
from gpumgr.errors import (
    EvictionFailed,
    GpumgrError,
    InsufficientVram,
    LeaseUnknown,
    PrepareTimeout,
    RequestEnded,
    RequestMismatch,
    SchedulerTimeout,
)
from gpumgr.runtime.preparation import Step
from gpumgr.runtime.ticket import Ask
from tests.worlds import HEADROOM_MIB, Caller, HadIt, World, catalog, consumer, request

TOTALS = (24000, 12000)
MAX_PREPARE = 120.0

SIZES: dict[str, dict[int, int]] = {
    "paint": {0: 14000},  # big, alone
    "chat": {0: 9000},  # chat and talk fit side by side, with hear they do not
    "talk": {0: 10000},
    "hear": {0: 6000},
    "span": {0: 4000, 1: 8000},  # two GPUs, and a load call
    "film": {1: 7000},  # film and clip coexist and do not fit together
    "clip": {1: 5000},
}
BESIDE = {frozenset(pair) for pair in (("chat", "talk"), ("chat", "hear"), ("talk", "hear"), ("film", "clip"))}
AT_ONCE = {"hear": 2}
NAMES = sorted(SIZES)
KEEP_UP = st.sampled_from([True, True, False])
WORN_MIB = 768 + 64
"""Held beyond this, a consumer is certainly on the card."""


def excludes(a: str, b: str) -> bool:
    return a != b and bool(SIZES[a].keys() & SIZES[b].keys()) and frozenset((a, b)) not in BESIDE


def conflicts(a: str, b: str) -> bool:
    return a == b or excludes(a, b)


def blocked(name: str, ahead: list[str]) -> bool:
    return ahead.count(name) >= AT_ONCE.get(name, 1) or any(excludes(name, other) for other in ahead)


@dataclass(eq=False)
class Wanted:
    """One request, as the model sees it. ``eager``: its holder loads at once, not some time later."""

    seq: int
    name: str
    ttl: float
    key: RequestKey | None
    eager: bool
    callers: list[Caller] = field(default_factory=list)
    turn_at: float | None = None
    over: bool = False
    """Answered, or abandoned by its last caller."""

    @property
    def deadline(self) -> float:
        return max(caller.deadline for caller in self.callers)


@dataclass(eq=False)
class Held:
    """One lease, as the model sees it. ``noticed``: the broker had occasion to see that it is over."""

    token: str
    name: str
    ttl: float
    expires_at: float
    key: RequestKey | None
    ended: str | None = None
    noticed: bool = False

    def alive(self, now: float) -> bool:
        return self.ended is None and now < self.expires_at


class BrokerMachine(RuleBasedStateMachine):
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
        self.world = World(catalog(*consumers), TOTALS, loads=["span"])
        self.wanted: dict[int, Wanted] = {}
        self.held: list[Held] = []
        self.fences: list[int] = []
        self.unloaded_in_use: list[str] = []
        self.watchdog_runs = False
        self.world.each_instant = self.each_instant
        for service in self.world.services.values():
            service.before_unload = self.note_unload

    # -- the model's own numbers ----------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.world.now

    def waiting(self) -> list[Wanted]:
        """In the line, in order of arrival."""
        return [w for _, w in sorted(self.wanted.items()) if not w.over and w.turn_at is None]

    def preparing(self) -> list[Wanted]:
        return [self.wanted[seq] for seq in self.world.begun()]

    def holders(self) -> list[Held]:
        """Whose lease excludes others: alive, or over and not noticed yet."""
        return [held for held in self.held if not held.noticed]

    def on_card(self, name: str, gpu: int) -> int:
        return self.world.services[name].used_mib(gpu)

    def missing(self, name: str, gpu: int) -> int:
        return max(0, SIZES[name].get(gpu, 0) - self.on_card(name, gpu))

    def promised(self, gpu: int, *, beside: str | None = None) -> int:
        users = {held.name for held in self.holders()} | {w.name for w in self.preparing()}
        return sum(self.missing(name, gpu) for name in users if name != beside)

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

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=6), wait=st.sampled_from([120, 5]), keep_up=KEEP_UP
    )
    def crowd(self, names: list[str], wait: float, keep_up: bool) -> None:
        """Several at the same instant; each second one loads at once."""
        for number, name in enumerate(names):
            self.ask(name, 60, wait, None, bool(number % 2))
        self.let_threads_run(keep_up)

    @precondition(lambda self: any(w.key for w in self.wanted.values()))
    @rule(pick=st.integers(0, 99), wait=st.sampled_from([120, 5, 0]))
    def ask_again(self, pick: int, wait: float) -> None:
        """The same call once more, as after a lost answer."""
        known = [(w.key, w.name) for w in self.wanted.values() if w.key is not None]
        key, name = known[-1 - pick % len(known)]
        self.ask(name, None, wait, key, True)

    def ask(self, name: str, ttl: float | None, wait: float, key: RequestKey | None, eager: bool) -> None:
        expected = self.expected_of(key, name)
        self.notice_expiry()
        answer = self.answer_at_once(Ask(consumer=name, ttl_seconds=ttl, wait_seconds=wait, request=key))
        self.follow()  # whoever asks lets the broker notice what has expired
        if not isinstance(answer, Caller):
            assert answer == (expected.token if isinstance(expected, Held) else expected), "not what the id leads to"
            return
        caller = answer
        assert expected is None or isinstance(expected, Wanted), f"{expected}, and yet it waits"
        seq = caller.ticket.seq
        if isinstance(expected, Wanted):
            assert seq == expected.seq, "one request, two places in the line"
        else:
            assert seq not in self.wanted, "a new request joined another one"
            clamped = 120.0 if ttl is None else min(max(ttl, 10.0), 600.0)
            self.wanted[seq] = Wanted(seq, name, clamped, key, eager)
        self.wanted[seq].callers.append(caller)
        assert caller.deadline == self.now + wait
        self.follow()

    def answer_at_once(self, ask: Ask) -> Caller | str:
        """The caller that waits; or the token it has already, or why it cannot."""
        try:
            return self.world.acquire(ask)
        except HadIt as had:
            return had.lease.token
        except RequestMismatch:
            return "mismatch"
        except RequestEnded as ended:
            return str(ended.details["reason"])

    def expected_of(self, key: RequestKey | None, name: str) -> Wanted | Held | str | None:
        """What the id leads to: a waiting request, a lease, why it is over, a mismatch, or None: it is new."""
        if key is None:
            return None
        for held in self.held:
            if held.key == key:
                if held.name != name:
                    return "mismatch"
                return held if held.alive(self.now) else held.ended or "expired"
        for wanted in self.wanted.values():
            if wanted.key == key and not wanted.over:
                return wanted if wanted.name == name else "mismatch"
        return None

    # -- holders --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 99), ttl=st.sampled_from([None, None, 10, 9999]))
    def renew(self, pick: int, ttl: float | None) -> None:
        held = self.held[-1 - pick % len(self.held)]
        try:
            lease, _, _ = self.world.broker.renew(held.token, ttl)
        except LeaseUnknown:
            assert not held.alive(self.now), "a live lease was not renewed"
            return
        assert held.alive(self.now), "a dead lease was renewed"
        held.ttl = held.ttl if ttl is None else min(max(ttl, 10.0), 600.0)
        held.expires_at = self.now + held.ttl
        assert abs(lease.expires_at - held.expires_at) < 1e-9

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 99), keep_up=KEEP_UP)
    def release(self, pick: int, keep_up: bool) -> None:
        held = self.held[-1 - pick % len(self.held)]
        alive = held.alive(self.now)
        if alive:
            held.ended, held.noticed = "released", True
        assert self.world.broker.release(held.token) is alive
        self.follow()
        self.let_threads_run(keep_up)

    @precondition(lambda self: self.loadable())
    @rule(pick=st.integers(0, 99), share=st.sampled_from([1.0, 0.3]))
    def take_memory(self, pick: int, share: float) -> None:
        names = self.loadable()
        self.load(names[pick % len(names)], share)

    def loadable(self) -> list[str]:
        names = {held.name for held in self.held if held.alive(self.now)}
        return sorted(name for name in names if any(self.missing(name, gpu) for gpu in SIZES[name]))

    def load(self, name: str, share: float = 1.0) -> None:
        """A holder loads, up to its declared size: what it was promised is there."""
        service = self.world.services[name]
        for gpu, size in SIZES[name].items():
            mib = max(service.used_mib(gpu), int(size * share))
            self.world.card.set_used(service.pid, mib, gpu)  # raises where it does not fit

    # -- the world ------------------------------------------------------------------------------------------

    @rule(gpu=st.sampled_from([0, 1]), share=st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0]))
    def play(self, gpu: int, share: float) -> None:
        """A game takes what is free or gives back; what was promised to holders it does not take."""
        game = self.world.games[gpu]
        mine = self.world.card.used_mib(game.pid)
        users = {held.name for held in self.holders()}
        promised = sum(self.missing(name, gpu) for name in users)
        game.set_used(int(max(0, mine + self.world.card.free_mib(gpu) - promised) * share))

    @rule(name=st.sampled_from(NAMES), lies=st.booleans())
    def lie(self, name: str, lies: bool) -> None:
        """From now on it answers 200 to its unload and keeps its memory, or no longer does."""
        self.world.services[name].lies = lies

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
    @rule(pick=st.integers(0, 99), early=st.sampled_from([0.0, 0.001]), watchdog_ran=st.booleans(), keep_up=KEEP_UP)
    def reach_an_expiry(self, pick: int, early: float, watchdog_ran: bool, keep_up: bool) -> None:
        alive = [held for held in self.held if held.alive(self.now)]
        left = alive[pick % len(alive)].expires_at - self.now
        self.pass_time(max(0.0, left - early), watchdog_ran)
        self.let_threads_run(keep_up)

    @precondition(lambda self: self.world.begun())
    @rule(pick=st.integers(0, 99))
    def step(self, pick: int) -> None:
        begun = self.world.begun()
        self.step_one(begun[pick % len(begun)])

    def let_threads_run(self, keep_up: bool) -> None:
        """The preparation threads have the time they need, or none at all."""
        for _ in range(12 if keep_up else 0):
            if all(self.step_one(seq) is Step.WAIT for seq in self.world.begun() if seq in self.world.preparations):
                return

    def step_one(self, seq: int) -> Step:
        wanted = self.wanted[seq]
        shown = [self.lendable(gpu) - self.promised(gpu, beside=wanted.name) for gpu in range(len(TOTALS))]
        held = {name: dict.fromkeys(sizes, 0) for name, sizes in SIZES.items()}
        for name, sizes in held.items():
            for gpu in sizes:
                sizes[gpu] = self.on_card(name, gpu)
        unloads = sum(service.asked_to_unload for service in self.world.services.values())
        before = self.now
        outcome = self.world.step(seq)
        if sum(service.asked_to_unload for service in self.world.services.values()) == unloads:
            assert self.now == before, "time passed where nothing was unloaded"
        answers = [c.answer for c in wanted.callers if c.answer is not None and c.answered_at == self.now]
        if isinstance(wanted.callers[0].ticket.outcome, Lease) and not wanted.over:
            self.granted(wanted, wanted.callers[0].ticket.outcome, shown)
        elif outcome is Step.DONE and answers and isinstance(answers[0], GpumgrError):
            self.refused(wanted, answers[0])
        self.follow()
        return outcome

    # -- what must be true of an answer ---------------------------------------------------------------------

    def granted(self, wanted: Wanted, lease: Lease, shown: list[int]) -> None:
        wanted.over = True
        name = wanted.name
        assert wanted.turn_at is not None
        assert lease.consumer == name
        patient = [c for c in wanted.callers if not isinstance(c.answer, SchedulerTimeout)]
        assert all(caller.answer is lease for caller in patient), "joined callers with different answers"
        assert any(caller.answer is lease for caller in wanted.callers), "a grant that nobody waits for"
        at_once = wanted.turn_at == wanted.callers[0].ticket.entered_at  # wait_seconds: 0 is now or never
        assert wanted.turn_at < wanted.deadline or at_once, "a turn after the deadline"
        assert self.now <= wanted.deadline + MAX_PREPARE, "answered too late"

        alive = [held for held in self.held if held.alive(self.now)]
        for held in alive:
            assert not excludes(name, held.name), f"{name} beside {held.name}"
        assert sum(held.name == name for held in alive) < AT_ONCE.get(name, 1), f"too many for {name}"
        for ahead in self.waiting():
            if ahead.seq < wanted.seq:
                assert not conflicts(name, ahead.name), f"{name} overtook {ahead.name}"

        for other in NAMES:
            for gpu in SIZES[other].keys() & SIZES[name].keys():
                if excludes(name, other):
                    assert self.on_card(other, gpu) <= WORN_MIB, f"{other} was still on the card"
        for gpu in SIZES[name]:
            assert self.missing(name, gpu) <= shown[gpu], "it does not fit"

        assert not self.fences or lease.fence > self.fences[-1], "the fence did not grow"
        self.fences.append(lease.fence)
        assert wanted.key is None or all(held.key != wanted.key for held in self.held), "a second lease for one request"
        assert lease.token not in [held.token for held in self.held]
        assert lease.ttl_seconds == wanted.ttl
        assert abs(lease.granted_at - self.now) < 1e-9
        assert abs(lease.expires_at - (self.now + wanted.ttl)) < 1e-9
        self.held.append(Held(lease.token, name, wanted.ttl, self.now + wanted.ttl, wanted.key))
        if wanted.eager:
            self.load(name)

    def refused(self, wanted: Wanted, error: GpumgrError) -> None:
        assert isinstance(error, InsufficientVram | EvictionFailed | SchedulerTimeout | PrepareTimeout), error
        name = wanted.name
        if isinstance(error, InsufficientVram):
            gpu = error.details["gpu"]
            assert error.details["needed_mib"] == SIZES[name][gpu]
            assert error.details["free_mib"] == self.world.card.free_mib(gpu)
            assert error.details["held_mib"] == self.on_card(name, gpu)
            users = {held.name for held in self.holders()} - {name}
            assert error.details["promised_mib"] == sum(self.missing(user, gpu) for user in users)
            used = self.world.card.used_mib(self.world.games[gpu].pid)
            assert sum(process["used_mib"] for process in error.details["untracked"]) == used
            assert self.short_without_others(name), "it would fit with every other consumer gone"
        if isinstance(error, EvictionFailed):
            victims = {victim["consumer"] for victim in error.details["victims"]}
            assert victims
            excluded = {victim for victim in victims if excludes(name, victim)}
            short = any(
                self.missing(name, gpu) > self.lendable(gpu) - self.promised(gpu, beside=name) for gpu in SIZES[name]
            )
            assert excluded or short, "it fits beside those that kept their memory"
            held = [self.on_card(victim, gpu) for victim in victims for gpu in SIZES[victim]]
            assert max(held) > 0, "the victims hold nothing"

    def short_without_others(self, name: str) -> bool:
        for gpu in SIZES[name]:
            others = [self.on_card(other, gpu) for other in NAMES if other != name and gpu in SIZES[other]]
            if self.missing(name, gpu) > self.lendable(gpu) + sum(mib for mib in others if mib > WORN_MIB):
                return True
        return False

    # -- after every step -----------------------------------------------------------------------------------

    def follow(self) -> None:
        """Note who got the turn and who went away."""
        holds = self.world.broker.state.queue.holds
        for wanted in self.wanted.values():
            if wanted.over:
                continue
            if wanted.turn_at is None and wanted.seq in holds:
                for other in self.waiting():
                    if other.seq < wanted.seq:
                        assert not conflicts(wanted.name, other.name), f"{wanted.name} overtook {other.name}"
                wanted.turn_at = self.now
            if not any(caller.waits for caller in wanted.callers):
                wanted.over = True

    def notice_expiry(self) -> None:
        for held in self.held:
            if held.ended is None and not held.alive(self.now):
                held.ended, held.noticed = "expired", True

    def note_unload(self, name: str) -> None:
        """Called on the unload's own thread, where an assertion would be lost."""
        leased = any(held.alive(self.now) for held in self.held if held.name == name)
        others = [seq for seq in self.world.preparations if seq != self.world.stepping]
        if leased or any(self.wanted[seq].name == name for seq in others):
            self.unloaded_in_use.append(name)

    @initialize()
    def empty(self) -> None:
        self.follow()

    @invariant()
    def the_broker_has_the_leases_of_the_model(self) -> None:
        live = {lease.token: lease.expires_at for lease in self.world.broker.state.leases if lease.alive(self.now)}
        expected = {held.token: held.expires_at for held in self.held if held.alive(self.now)}
        assert live.keys() == expected.keys()
        assert all(abs(live[token] - expected[token]) < 1e-9 for token in live)

    @invariant()
    def nobody_waits_past_the_deadline(self) -> None:
        for wanted in self.waiting():
            assert self.now < wanted.deadline

    @invariant()
    def nothing_was_asked_of_the_card_that_did_not_fit(self) -> None:
        assert self.world.card.over_commits == 0

    @invariant()
    def no_consumer_in_use_was_unloaded(self) -> None:
        assert self.unloaded_in_use == []

    @invariant()
    def holders_do_not_conflict(self) -> None:
        names = [held.name for held in self.holders()] + [w.name for w in self.preparing()]
        for name in set(names):
            assert names.count(name) <= AT_ONCE.get(name, 1)
            assert not any(excludes(name, other) for other in names)
        prepared = [gpu for w in self.preparing() for gpu in SIZES[w.name]]
        assert len(prepared) == len(set(prepared)), "two preparations on one GPU"

    @invariant()
    def nobody_who_may_go_is_left_waiting(self) -> None:
        state = self.world.broker.state
        assert state.queue.begin() == [], "a wake-up was lost"
        ahead = [held.name for held in self.holders()] + [w.name for w in self.preparing()]
        taken = {gpu for w in self.preparing() for gpu in SIZES[w.name]}
        for wanted in self.waiting():
            if not blocked(wanted.name, ahead):
                assert not taken.isdisjoint(SIZES[wanted.name]), f"{wanted.name} may go and waits"
                taken |= SIZES[wanted.name].keys()
            ahead.append(wanted.name)

    @invariant()
    def nothing_is_left_behind(self) -> None:
        """Whoever was answered is in no book any more, but as the holder of a lease."""
        state = self.world.broker.state
        pending = {w.seq for w in self.wanted.values() if not w.over}
        assert set(state.tickets) == pending
        assert set(state.queue.holds) - pending - self.world.preparations.keys() == {
            lease.seq for lease in state.leases
        }
        assert not any(state.queue.is_unloading(name) for name in NAMES)

    def teardown(self) -> None:
        self.world.broker.stop()


MACHINE = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def test_no_order_of_events_breaks_a_rule() -> None:
    run_state_machine_as_test(BrokerMachine, settings=MACHINE)
