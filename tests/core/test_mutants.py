"""A machine that cannot fail proves nothing: each broken rule here must be noticed by the machine.

A mutant replaces one real rule by a wrong one. One that survives means that test_machine.py is too weak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import run_state_machine_as_test

from gpumgr.config import LeaseSettings
from gpumgr.core import placement, queue, rest
from gpumgr.core.card import Reading
from gpumgr.core.catalog import Catalog, Consumer
from gpumgr.core.lease import Call, EndReason, Lease, LeaseBook, RequestKey
from gpumgr.core.placement import Decision, Grant, Holding, Report, View
from gpumgr.core.queue import Entry, Fifo, Hold, Line, Queue, Turns, WaitingFor
from gpumgr.errors import GpumgrError, LeaseUnknown
from gpumgr.runtime import broker, preparation, state, views
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.housekeeping import Housekeeping
from gpumgr.runtime.outsiders import Outsiders
from gpumgr.runtime.ports import Dialect
from gpumgr.runtime.preparation import Preparation
from gpumgr.runtime.refusals import scheduler_timeout
from gpumgr.runtime.state import State
from gpumgr.runtime.ticket import Ask, Caller, Ticket
from gpumgr.runtime.views import Views
from tests.core.model import WORN_MIB
from tests.core.test_machine import BrokerMachine
from tests.worlds import World, catalog, consumer

HUNT = settings(
    max_examples=600,  # it ends with the first that notices; most need fewer than 100
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    print_blob=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutant] = {}


RARE: dict[str, Mutant] = {}


def rare(install: Mutant) -> Mutant:
    RARE[install.__name__] = install
    return install


def mutant(install: Mutant) -> Mutant:
    MUTANTS[install.__name__] = install
    return install


# -- the turn -----------------------------------------------------------------------------------------------


@mutant
def last_come_first_served(patch: pytest.MonkeyPatch) -> None:
    def heads(line: Mapping[str, Mapping[int, Entry]], _catalog: Catalog) -> list[Entry]:
        return sorted((e for entries in line.values() for e in entries.values()), key=lambda entry: -entry.seq)

    patch.setattr(queue, "heads", heads)


@mutant
def no_conflict_check(patch: pytest.MonkeyPatch) -> None:
    def blocked(consumer: str, ahead: Mapping[str, int], catalog: Catalog) -> bool:
        return ahead.get(consumer, 0) >= catalog.consumers[consumer].max_concurrency

    patch.setattr(queue, "blocked", blocked)


@mutant
def one_more_than_max_concurrency(patch: pytest.MonkeyPatch) -> None:
    def blocked(consumer: str, ahead: Mapping[str, int], catalog: Catalog) -> bool:
        if ahead.get(consumer, 0) > catalog.consumers[consumer].max_concurrency:
            return True
        return any(count and catalog.exclude(consumer, other) for other, count in ahead.items())

    patch.setattr(queue, "blocked", blocked)


@mutant
def overtakes_who_is_ahead(patch: pytest.MonkeyPatch) -> None:
    def turns(_self: Fifo, line: Line, holds: Iterable[Hold], catalog: Catalog, _now: float, *_more: object) -> Turns:
        ahead = Counter(hold.consumer for hold in holds)
        found = []
        for entry in queue.heads(line, catalog):
            if not queue.blocked(entry.consumer, ahead, catalog):
                found.append(entry)
                ahead[entry.consumer] += 1
        return Turns(found)

    patch.setattr(Fifo, "turns", turns)


@mutant
def two_preparations_on_one_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "_slots", lambda _self: set())


@mutant
def ghost_waiter(patch: pytest.MonkeyPatch) -> None:
    """Its time is over and it stays in the line."""

    def give_up(self: Broker, ticket: Ticket) -> GpumgrError:
        return scheduler_timeout(self.state, ticket)

    begin = State._begin
    patch.setattr(Broker, "_give_up", give_up)
    patch.setattr(State, "_begin", lambda self, ticket, _now: begin(self, ticket, ticket.entered_at))


@mutant
def lost_wake_up(patch: pytest.MonkeyPatch) -> None:
    """A release lets nobody go."""

    def finish_end(self: Broker, lease: Lease, _reason: EndReason, **_more: str) -> None:
        with self.state.lock:
            self.state.queue.leave(lease.seq)
            self.state.note_used(lease.consumer)

    patch.setattr(Broker, "_finish_end", finish_end)


# -- leases -------------------------------------------------------------------------------------------------


@mutant
def dead_only_a_second_later(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "alive", lambda self, now: now < self.expires_at + 1)


@mutant
def renew_revives(patch: pytest.MonkeyPatch) -> None:
    real = LeaseBook.get

    def get(self: LeaseBook, token: str, now: float) -> Lease:
        lease = self._live.get(token)
        return real(self, token, now) if lease is None else lease

    patch.setattr(LeaseBook, "get", get)


@mutant
def fence_stuck(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseBook, "next_fence", lambda _self: 1)


@mutant
def ttl_not_clamped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseSettings, "clamp_ttl", lambda _self, seconds: seconds)


@mutant
def one_request_many_leases(patch: pytest.MonkeyPatch) -> None:
    def of_request(_self: LeaseBook, _key: RequestKey, _consumer: str, _now: float) -> None:
        return None

    patch.setattr(LeaseBook, "of_request", of_request)


@mutant
def one_request_many_places_in_the_line(patch: pytest.MonkeyPatch) -> None:
    real = State.enter

    def enter(self: State, *asked: Any, **how: Any) -> Ticket:
        ticket = real(self, *asked, **how)
        self.by_request.clear()
        return ticket

    patch.setattr(State, "enter", enter)


# -- the card -----------------------------------------------------------------------------------------------


@mutant
def ignores_what_was_promised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Views, "promised", lambda _self, _holders, _holdings, *_more: {})


@mutant
def lends_the_headroom(patch: pytest.MonkeyPatch) -> None:
    real = Views.of
    patch.setattr(Views, "of", lambda *a: dataclasses.replace(real(*a), headroom_mib=0))


@mutant
def unloads_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    real = placement._idle_residents
    patch.setattr(
        placement, "_idle_residents", lambda target, view: real(target, dataclasses.replace(view, in_use=frozenset()))
    )


@rare
def believes_the_200(patch: pytest.MonkeyPatch) -> None:
    """After an unload it grants, whatever the card says."""
    real = placement.decide

    def decide(target: Consumer, view: View) -> Decision:
        return Grant() if view.tried else real(target, view)

    patch.setattr(preparation, "decide", decide)


@mutant
def leaves_the_excluded_on_the_card(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placement, "_excluded_residents", lambda _target, _view: [])


@rare
def always_insufficient(patch: pytest.MonkeyPatch) -> None:
    """Never says that a victim kept its memory."""
    patch.setattr(placement, "kept_or_insufficient", placement.insufficient)


@mutant
def refuses_instead_of_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placement, "would_fit_later", lambda _target, _view, *_more: False)


# -- calls --------------------------------------------------------------------------------------------------


@rare
def a_call_goes_ahead_beside_a_lease(patch: pytest.MonkeyPatch) -> None:
    real = Views.of
    patch.setattr(Views, "of", lambda *a: dataclasses.replace(real(*a), leased=False))


@rare
def a_call_is_refused_like_a_lease(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(preparation, "decide_call", placement.decide)


@rare
def a_call_goes_over_budget_in_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Preparation, "_warn", lambda _self, _grant, _reading: None)


@mutant
def a_call_waits_for_nobody(patch: pytest.MonkeyPatch) -> None:
    """It goes past the line."""
    real = Broker._granted

    def granted(self: Broker, ask: Ask, caller: Caller, *, proxied: bool) -> Lease | Call:
        self._lets_pass = proxied
        return real(self, ask, caller, proxied=proxied)

    patch.setattr(Broker, "_granted", granted)


@mutant
def calls_overtake_leases(patch: pytest.MonkeyPatch) -> None:
    calls: set[int] = set()
    heads, real = queue.heads, State.enter

    def enter(self: State, *asked: Any, proxied: bool = False, **how: Any) -> Ticket:
        ticket = real(self, *asked, proxied=proxied, **how)
        (calls.add if proxied else calls.discard)(ticket.seq)
        return ticket

    patch.setattr(State, "enter", enter)
    patch.setattr(queue, "heads", lambda *a: sorted(heads(*a), key=lambda entry: entry.seq not in calls))


@mutant
def a_call_that_ends_twice_frees_another(patch: pytest.MonkeyPatch) -> None:
    real = Broker.end_call

    def end_call(self: Broker, call: Call) -> None:
        with self.state.lock:
            if call.seq not in self.state.calls:
                for hold in self.state.queue.holds_of(call.consumer)[:1]:
                    self.state.queue.leave(hold.seq)
                    self.state.advance()
        real(self, call)

    patch.setattr(Broker, "end_call", end_call)


@mutant
def a_call_that_ends_lets_nobody_go(patch: pytest.MonkeyPatch) -> None:
    def end_call(self: Broker, call: Call) -> None:
        with self.state.lock:
            if self.state.calls.pop(call.seq, None) is not None:
                self.state.queue.leave(call.seq)
                self.state.note_used(call.consumer)

    patch.setattr(Broker, "end_call", end_call)


@rare
def a_call_under_a_lease_is_not_in_use(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "in_use", lambda self: frozenset(hold.consumer for hold in self.queue.holds.values()))


@rare
def a_call_ends_with_its_lease(patch: pytest.MonkeyPatch) -> None:
    real = Broker._begin_end

    def begin_end(self: Broker, lease: Lease, reason: EndReason = EndReason.RELEASED) -> None:
        real(self, lease, reason)
        calls = self.state.calls
        self.state.calls = {seq: call for seq, call in calls.items() if call.lease_id != lease.lease_id}

    patch.setattr(Broker, "_begin_end", begin_end)


# -- who computes without a holder --------------------------------------------------------------------------


@mutant
def unloads_without_asking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Preparation, "_asked", lambda _self, _victims: True)


@mutant
def asks_once_for_ever(patch: pytest.MonkeyPatch) -> None:
    """It said once that it is idle."""
    real = Preparation._asked

    def asked(self: Preparation, victims: Sequence[str]) -> bool:
        return real(self, [name for name in victims if self._state.memory[name].busy_asked is None])

    patch.setattr(Preparation, "_asked", asked)


@rare
def believes_an_answer_from_before_the_last_use(patch: pytest.MonkeyPatch) -> None:
    real = State.note_busy

    def note_busy(self: State, consumer: str, _uses: int, busy: bool | None, error: str | None) -> None:
        real(self, consumer, self.memory[consumer].uses, busy, error)

    patch.setattr(State, "note_busy", note_busy)


@rare
def believes_a_card_read_before_an_end(patch: pytest.MonkeyPatch) -> None:
    real = State.note_loading

    def note_loading(self: State, consumer: str) -> None:
        real(self, consumer)
        self.ends -= 1

    patch.setattr(State, "note_loading", note_loading)


@mutant
def takes_a_hanging_report_for_idle(patch: pytest.MonkeyPatch) -> None:
    real = preparation.ask_busy

    def ask_busy(state: State, name: str, dialect: Dialect) -> bool | None:
        busy = real(state, name, dialect)
        return busy and state.memory[name].busy_error is None

    patch.setattr(preparation, "ask_busy", ask_busy)


@rare
def forgets_a_tail_at_its_holder_s_end(patch: pytest.MonkeyPatch) -> None:
    real = State.note_used

    def note_used(self: State, consumer: str, *, granted: bool = True) -> None:
        real(self, consumer, granted=granted)
        self.memory[consumer].tail = False

    patch.setattr(State, "note_used", note_used)


@rare
def promises_nothing_to_a_tail(patch: pytest.MonkeyPatch) -> None:
    real = Views.of

    def view(self: Views, ticket: Ticket, *a: Any) -> View:
        seen = real(self, ticket, *a)
        held = self._state.in_use() - {ticket.consumer.name}
        return dataclasses.replace(seen, promised_mib=self.promised(held, seen.holdings, seen.reading, ticket))

    patch.setattr(Views, "of", view)


@mutant
def a_draining_wait_gives_up_its_turn(patch: pytest.MonkeyPatch) -> None:
    real = State.wait_inside

    def wait_inside(self: State, ticket: Ticket, reason: WaitingFor) -> None:
        real(self, ticket, reason)
        if reason is WaitingFor.DRAINING:
            self.queue.leave(ticket.seq)
            self.advance()

    patch.setattr(State, "wait_inside", wait_inside)


@mutant
def once_busy_always_busy(patch: pytest.MonkeyPatch) -> None:
    real = Preparation._look

    def look(self: Preparation) -> tuple[int, Reading, dict[str, Report]]:
        before = {name: True for name, busy in self._said.items() if busy}
        looked = real(self)
        self._said |= before
        return looked

    patch.setattr(Preparation, "_look", look)


# -- other lives, callers that have gone, quarantine ---------------------------------------------------------


@mutant
def nothing_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Broker, "_restore", lambda _self: None)


@mutant
def the_fence_begins_anew(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeaseBook, "start_fence", lambda _self, _fence: None)


@rare
def a_restart_gives_half_a_ttl(patch: pytest.MonkeyPatch) -> None:
    real = LeaseBook.restore
    patch.setattr(
        LeaseBook,
        "restore",
        lambda self, lease, now: real(self, dataclasses.replace(lease, ttl_seconds=lease.ttl_seconds / 2), now),
    )


@rare
def a_raised_ttl_is_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Broker, "_write_ttl", lambda _self, _lease: None)


@rare
def told_before_it_is_written(patch: pytest.MonkeyPatch) -> None:
    """Who is told that a lease is over may find it live after a restart."""
    patch.setattr(Broker, "_told_once", lambda _self, _token: contextlib.nullcontext())


@rare
def sleep_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "note_sleep", lambda _self: False)


@rare
def a_caller_that_hung_up_is_granted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Preparation, "_require_caller", lambda _self: None)


@mutant
def a_withdrawn_request_keeps_its_place(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "withdraw", lambda _self, _ticket: None)


@mutant
def a_hold_stops_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placement, "keeps_out", lambda _target, _view: None)
    patch.setattr(state, "keeps_out", lambda _target, _view: None)
    patch.setattr(broker, "keeps_out", lambda _target, _view: None)


@mutant
def a_hold_tells_nobody_who_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "_outside_changed", lambda self: self.advance())


@rare
def a_hold_is_forgotten_at_a_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Outsiders, "restore", lambda _self, _kept: None)


@mutant
def a_hold_unloads_without_asking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Housekeeping, "_computes", lambda _self, _name: False)


@rare
def a_hold_unloads_whom_somebody_uses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rest, "_may_go", lambda each, _now: each.resident)


@rare
def an_expired_holder_is_forgotten_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Broker, "_may_still_compute", lambda _self, _lease: False)


@mutant
def a_quarantine_never_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Broker, "_end_quarantine", lambda _self, _quarantine, **_how: None)


# -- a card that cannot be read -----------------------------------------------------------------------------


@rare
def grants_on_a_card_that_cannot_be_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Views, "_may_believe", lambda _self, _ticket: True)


@mutant
def refuses_calls_on_a_card_that_cannot_be_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Views, "_may_believe", lambda self, _ticket: self._state.believes)


@rare
def leaves_whom_it_cannot_see(patch: pytest.MonkeyPatch) -> None:
    real = placement.assess

    def assess(*a: Any, driver_mib: int | None, **facts: Any) -> Holding:
        return real(*a, driver_mib=driver_mib or 0, **facts)

    patch.setattr(views, "assess", assess)


# -- too rare or too long for a hunt: each has a story in which it shows ---------------------------------------


def a_holder_takes_its_memory_and_ends_while_the_card_is_read() -> None:
    world = World(catalog(consumer("chat", 9000, beside=["talk"]), consumer("talk", 16000, beside=["chat"])))
    lease = world.grant("chat")
    read = world.probe.read

    def read_just_before_that(at_most_seconds: float | None = None) -> Reading:
        reading = read(at_most_seconds)
        if world.broker.release(lease.token):
            world.services["chat"].take()
        return reading

    world.probe.read = read_just_before_that  # type: ignore[method-assign]
    talk = world.ask("talk")
    world.prepare()
    assert talk.lease().consumer == "talk"
    assert world.services["chat"].used_mib() <= WORN_MIB, "granted on a card that was read before the end"


def a_call_finds_no_room_beside_a_lease() -> None:
    world = World(catalog(consumer("chat", 2000, beside=["talk"]), consumer("talk", 10000, beside=["chat"])))
    world.grant("chat", loaded=True)
    world.games[0].set_used(15000)
    call = world.call("talk")
    world.prepare()
    assert call.waits, "over budget beside a lease"


def a_lease_expires_and_its_holder_goes_on() -> None:
    world = World(catalog(consumer("chat", 9000), consumer("paint", 14000)))
    world.grant("chat", ttl_seconds=10, loaded=True)
    world.services["chat"].computing = True
    world.pass_time(10, watchdog=True)
    assert [quarantine.consumer for quarantine in world.broker.state.quarantines.values()] == ["chat"]


def a_victim_keeps_its_memory() -> None:
    world = World(catalog(consumer("chat", 9000), consumer("paint", 14000)))
    world.services["chat"].take()
    world.services["chat"].lies = True
    assert world.refusal("paint").code == "eviction_failed"


def a_tail_has_not_taken_its_memory_yet() -> None:
    world = World(catalog(consumer("chat", 9000, beside=["talk"]), consumer("talk", 16000, beside=["chat"])))
    world.services["chat"].computing = False
    preparation.ask_busy(world.broker.state, "chat", world.services["chat"])
    lease = world.grant("chat")
    world.services["chat"].computing = True
    world.broker.release(lease.token)
    talk = world.ask("talk", wait_seconds=60)
    world.prepare()
    assert talk.waits, "what the tail still takes was lent to another one"


def a_holder_comes_and_goes_while_its_consumer_is_asked() -> None:
    world = World(catalog(consumer("chat", 9000)))

    def busy_later() -> bool:
        world.broker.release(world.grant("chat").token)
        return False  # it was idle when it was asked

    world.services["chat"].busy = busy_later  # type: ignore[method-assign]
    preparation.ask_busy(world.broker.state, "chat", world.services["chat"])
    assert world.broker.state.memory["chat"].tail


def nobody_can_read_the_card() -> None:
    world = World(catalog(consumer("chat", 9000)))
    world.card.unreadable = "the driver is gone"
    chat = world.ask("chat")
    world.prepare()
    assert not isinstance(chat.answer, Lease), "granted without a look"


def a_longer_ttl_survives_a_restart() -> None:
    world = World(catalog(consumer("chat", 9000)))
    lease = world.grant("chat", ttl_seconds=10)
    world.broker.renew(lease.token, 600)
    world.restart()
    world.pass_time(500, watchdog=True)
    assert [live.lease_id for live in world.broker.state.leases] == [lease.lease_id]


def who_was_told_that_it_is_over_stays_so_after_a_restart() -> None:
    world = World(catalog(consumer("chat", 9000)))
    lease = world.grant("chat", ttl_seconds=10)
    world.pass_time(11)
    with contextlib.suppress(LeaseUnknown):
        world.broker.renew(lease.token, None)
    world.restart()
    assert not list(world.broker.state.leases), "told that it is over, and revived"


def a_call_outlives_its_lease() -> None:
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000), paint="paint"))
    lease = world.grant("paint", loaded=True)
    world.broker.call_under_lease(lease.token, "paint")
    world.broker.release(lease.token)
    chat = world.ask("chat", wait_seconds=60)
    world.prepare()
    assert chat.waits, "unloaded in the middle of a call"


def a_caller_goes_before_its_turn_is_over() -> None:
    world = World(catalog(consumer("chat", 9000)))
    chat = world.ask("chat", wait_seconds=60)
    world.hang_up(chat, seen=False)
    world.prepare()
    assert not isinstance(chat.ticket.outcome, Lease), "a grant for nobody"


def a_lease_has_its_full_ttl_after_a_restart() -> None:
    world = World(catalog(consumer("chat", 9000)))
    lease = world.grant("chat", ttl_seconds=60)
    world.pass_time(50)
    world.restart()
    world.pass_time(59, watchdog=True)
    assert [live.lease_id for live in world.broker.state.leases] == [lease.lease_id]


def a_hold_outlives_the_broker() -> None:
    world = World(catalog(consumer("chat", 9000)))
    world.broker.outsiders.hold("a game", 600, "ada")
    world.restart()
    with contextlib.suppress(GpumgrError):
        world.ask("chat")
        raise AssertionError("let in while the card is kept free")


def a_hold_meets_a_holder() -> None:
    world = World(catalog(consumer("chat", 9000)))
    world.grant("chat", loaded=True)
    world.broker.observe_card()
    world.broker.outsiders.hold("a game", 600, "ada")
    world.broker.housekeeping.round()
    assert not world.services["chat"].asked_to_unload, "unloaded under a lease"


def the_driver_names_nobody() -> None:
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000)), when_unreadable="declared")
    world.broker.release(world.grant("chat", loaded=True).token)
    world.card.set_gpu_error("it has fallen off the bus", 0)
    world.ask("paint", wait_seconds=60)
    world.prepare()
    assert world.services["chat"].asked_to_unload, "whom it cannot see was left on the card"


def a_call_finds_no_room() -> None:
    world = World(catalog(consumer("chat", 9000)))
    world.games[0].set_used(20000)
    chat = world.call("chat", wait_seconds=60)
    world.prepare()
    assert isinstance(chat.answer, Call), "refused like a lease"
    assert any(event["type"] == "proxy_over_budget" for event in world.broker.state.events), "nobody is told"


def a_victim_says_yes_and_keeps_its_memory() -> None:
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000)))
    world.services["chat"].take()
    world.services["chat"].lies = True
    paint = world.ask("paint", wait_seconds=60)
    world.prepare()
    assert not isinstance(paint.answer, Lease), "granted beside whom it may not stand"


def the_machine_sleeps_longer_than_a_ttl() -> None:
    world = World(catalog(consumer("chat", 9000)))
    lease = world.grant("chat", ttl_seconds=60)
    world.pass_time(50)
    world.sleep(3600)
    world.broker.tick()
    world.pass_time(50, watchdog=True)
    assert [live.lease_id for live in world.broker.state.leases] == [lease.lease_id], "a TTL counted what nobody heard"


STORIES = {
    "a_raised_ttl_is_not_written": a_longer_ttl_survives_a_restart,
    "told_before_it_is_written": who_was_told_that_it_is_over_stays_so_after_a_restart,
    "a_call_under_a_lease_is_not_in_use": a_call_outlives_its_lease,
    "a_caller_that_hung_up_is_granted": a_caller_goes_before_its_turn_is_over,
    "a_restart_gives_half_a_ttl": a_lease_has_its_full_ttl_after_a_restart,
    "a_hold_is_forgotten_at_a_restart": a_hold_outlives_the_broker,
    "a_hold_unloads_whom_somebody_uses": a_hold_meets_a_holder,
    "a_call_ends_with_its_lease": a_call_outlives_its_lease,
    "leaves_whom_it_cannot_see": the_driver_names_nobody,
    "a_call_is_refused_like_a_lease": a_call_finds_no_room,
    "a_call_goes_over_budget_in_silence": a_call_finds_no_room,
    "believes_the_200": a_victim_says_yes_and_keeps_its_memory,
    "promises_nothing_to_a_tail": a_tail_has_not_taken_its_memory_yet,
    "sleep_counts": the_machine_sleeps_longer_than_a_ttl,
    "always_insufficient": a_victim_keeps_its_memory,
    "forgets_a_tail_at_its_holder_s_end": a_tail_has_not_taken_its_memory_yet,
    "believes_an_answer_from_before_the_last_use": a_holder_comes_and_goes_while_its_consumer_is_asked,
    "grants_on_a_card_that_cannot_be_read": nobody_can_read_the_card,
    "believes_a_card_read_before_an_end": a_holder_takes_its_memory_and_ends_while_the_card_is_read,
    "a_call_goes_ahead_beside_a_lease": a_call_finds_no_room_beside_a_lease,
    "an_expired_holder_is_forgotten_at_once": a_lease_expires_and_its_holder_goes_on,
}


class _Misfits(logging.Handler):
    """Told by the broker's log, which goes on after its own defects."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, TypeError | AttributeError | NameError):
            self.found.append(error)


@contextlib.contextmanager
def fits_its_place() -> Iterator[None]:
    """A mutant that does not take what the real rule is given crashes the broker, and was not noticed by the model."""
    misfits = _Misfits()
    logging.getLogger().addHandler(misfits)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(misfits)
    assert not misfits.found, f"it breaks the broker and no rule: {misfits.found[0]}"


@pytest.mark.parametrize("name", sorted(RARE))
def test_its_story_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    STORIES[name]()
    RARE[name](monkeypatch)
    with fits_its_place(), pytest.raises(AssertionError):
        STORIES[name]()


def notices(machine: type[BrokerMachine]) -> bool:
    """By an AssertionError of the model, also by one that does not come again, as unloads have threads of their own."""
    with fits_its_place():
        try:
            run_state_machine_as_test(machine, settings=HUNT)
        except AssertionError:
            return True
        except FlakyFailure as group:
            return group.subgroup(AssertionError) is not None
    return False


@pytest.mark.long
class Hunt:
    """How long one takes is luck; a class is what the suite gives to one process."""

    def test_the_machine_notices(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        MUTANTS[name](monkeypatch)
        assert notices(BrokerMachine)


@pytest.mark.parametrize("name", sorted(MUTANTS)[0::4])
class TestHunt0(Hunt):
    pass


@pytest.mark.parametrize("name", sorted(MUTANTS)[1::4])
class TestHunt1(Hunt):
    pass


@pytest.mark.parametrize("name", sorted(MUTANTS)[2::4])
class TestHunt2(Hunt):
    pass


@pytest.mark.parametrize("name", sorted(MUTANTS)[3::4])
class TestHunt3(Hunt):
    pass
