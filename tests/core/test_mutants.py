"""A machine that cannot fail proves nothing: each broken rule here must be noticed by the machine.

A mutant replaces one real rule by a wrong one. One that survives means that test_machine.py is too weak.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from gpumgr.config import LeaseSettings
from gpumgr.core import placement, queue
from gpumgr.core.catalog import Catalog, Consumer
from gpumgr.core.lease import Lease, LeaseBook, RequestKey
from gpumgr.core.placement import Decision, Grant, View
from gpumgr.core.queue import Entry, Fifo, Hold, Queue
from gpumgr.errors import GpumgrError
from gpumgr.runtime import preparation
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.refusals import scheduler_timeout
from gpumgr.runtime.state import State
from gpumgr.runtime.ticket import Ask, Ticket
from tests.core.test_machine import BrokerMachine

HUNT = settings(
    max_examples=400,
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


def mutant(install: Mutant) -> Mutant:
    MUTANTS[install.__name__] = install
    return install


# -- the turn -----------------------------------------------------------------------------------------------


@mutant
def last_come_first_served(patch: pytest.MonkeyPatch) -> None:
    def heads(line: Mapping[str, Mapping[int, Entry]], _catalog: Catalog) -> list[Entry]:
        return sorted((e for entries in line.values() for e in entries.values()), key=lambda entry: -entry.seq)

    patch.setattr(queue, "_heads", heads)


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
    def turns(
        _self: Fifo, line: Mapping[str, Mapping[int, Entry]], holds: Iterable[Hold], catalog: Catalog
    ) -> list[Entry]:
        ahead = Counter(hold.consumer for hold in holds)
        found = []
        for entry in queue._heads(line, catalog):
            if not queue.blocked(entry.consumer, ahead, catalog):
                found.append(entry)
                ahead[entry.consumer] += 1
        return found

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

    def finish_end(self: Broker, lease: Lease, _event: str) -> None:
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

    def renew(self: LeaseBook, token: str, now: float, ttl_seconds: float | None) -> Lease:
        lease = get(self, token, now)
        ttl = lease.ttl_seconds if ttl_seconds is None else ttl_seconds
        self._live[token] = dataclasses.replace(lease, ttl_seconds=ttl, expires_at=now + ttl)
        return self._live[token]

    patch.setattr(LeaseBook, "renew", renew)


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

    def enter(
        self: State, ask: Ask, consumer: Consumer, now: float, deadline: float, *, proxied: bool = False
    ) -> Ticket:
        ticket = real(self, ask, consumer, now, deadline, proxied=proxied)
        self.by_request.clear()
        return ticket

    patch.setattr(State, "enter", enter)


# -- the card -----------------------------------------------------------------------------------------------


@mutant
def ignores_what_was_promised(patch: pytest.MonkeyPatch) -> None:
    def promised(_self: State, _holders: Iterable[str], _holdings: object) -> dict[Any, int]:
        return {}

    patch.setattr(State, "promised", promised)


@mutant
def lends_the_headroom(patch: pytest.MonkeyPatch) -> None:
    real = State.view
    patch.setattr(State, "view", lambda *a: dataclasses.replace(real(*a), headroom_mib=0))


@mutant
def unloads_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    real = placement._idle_residents
    patch.setattr(
        placement, "_idle_residents", lambda target, view: real(target, dataclasses.replace(view, in_use=frozenset()))
    )


@mutant
def believes_the_200(patch: pytest.MonkeyPatch) -> None:
    """After an unload it grants, whatever the card says."""
    real = placement.decide

    def decide(target: Consumer, view: View) -> Decision:
        return Grant() if view.tried else real(target, view)

    patch.setattr(preparation, "decide", decide)


@mutant
def leaves_the_excluded_on_the_card(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placement, "_excluded_residents", lambda _target, _view: [])


@mutant
def always_insufficient(patch: pytest.MonkeyPatch) -> None:
    """Never says that a victim kept its memory."""
    patch.setattr(placement, "kept_or_insufficient", placement.insufficient)


@mutant
def refuses_instead_of_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placement, "would_fit_later", lambda _target, _view: False)


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_the_machine_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    # AssertionError alone: a mutant that merely crashes the broker was not noticed by the model.
    with pytest.raises(AssertionError):
        run_state_machine_as_test(BrokerMachine, settings=HUNT)
