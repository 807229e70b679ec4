"""Broken orders: each must be noticed, by the machine that runs with quanta, or, where that would be luck, by a story.

As test_mutants.py, which has what both orders share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from gpumgr.core import quantum, queue, yielding
from gpumgr.core.catalog import Catalog
from gpumgr.core.lease import Lease
from gpumgr.core.placement import View
from gpumgr.core.quantum import (
    FACTOR,
    FLOOR_SECONDS,
    GAPS_NEEDED,
    LINGER_SHARE,
    PATIENCE,
    URGENT,
    WAITING_EACH,
    Quantum,
)
from gpumgr.core.queue import HEAD_START_SECONDS, Entry, Hold, Line, Next, Priority, Queue, Stay, Turns
from gpumgr.core.resuming import Resuming
from gpumgr.core.yielding import YieldRequest
from gpumgr.runtime import state
from gpumgr.runtime.views import Views
from tests.core import test_quantum, test_queue, test_sharing, test_yielding
from tests.core.model import MIN_HOLD_SECONDS
from tests.core.test_machine import QuantumMachine
from tests.core.test_mutants import Mutant, fits_its_place, notices
from tests.runtime import test_order
from tests.worlds import World, catalog, consumer

FOREVER_SECONDS = 1e9
MOMENTS = 12
MUTANTS: dict[str, Mutant] = {}
RARE: dict[str, tuple[Mutant, Callable[[], None]]] = {}


def mutant(install: Mutant) -> Mutant:
    MUTANTS[install.__name__] = install
    return install


def rare(story: Callable[[], None]) -> Callable[[Mutant], Mutant]:
    def enter(install: Mutant) -> Mutant:
        RARE[install.__name__] = install, story
        return install

    return enter


def one_that_usually_comes_back() -> World:
    world = World(catalog(consumer("chat", 9000), consumer("paint", 14000)), totals_mib=[16000])
    world.broker.state.queue._swap_seconds = lambda _leaving, _coming: FLOOR_SECONDS
    for _ in range(GAPS_NEEDED + 1):
        world.broker.release(world.grant("chat", loaded=True).token)
        world.pass_time(0.1)
    return world


# -- turns --------------------------------------------------------------------------------------------------


@rare(test_quantum.test_7_the_resident_goes_ahead_of_who_needs_a_swap_until_its_quantum_is_over)
def a_turn_never_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "quantum_seconds_of", lambda _self, _round_trip, _times: FOREVER_SECONDS)


@rare(test_quantum.test_7_the_resident_goes_ahead_of_who_needs_a_swap_until_its_quantum_is_over)
def nobody_keeps_a_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "quantum_seconds_of", lambda _self, _round_trip, _times: 0.0)


def one_waits_while_another_is_asked_for_again_and_again() -> None:
    world = World(catalog(consumer("chat", 9000), consumer("paint", 14000)), totals_mib=[16000])
    held, paint = world.grant("chat", loaded=True), world.ask("paint", wait_seconds=600)
    for _ in range(MOMENTS):
        chat = world.ask("chat", wait_seconds=600)
        world.pass_time(FACTOR * FLOOR_SECONDS / MOMENTS)
        world.broker.release(held.token)
        world.prepare()
        if isinstance(paint.answer, Lease):
            return
        held = chat.lease()
    raise AssertionError("its turn never comes")


@rare(one_waits_while_another_is_asked_for_again_and_again)
def each_request_begins_a_turn_anew(patch: pytest.MonkeyPatch) -> None:
    real = queue.stays_after

    def stays_after(stays: Mapping[str, Stay], line: Line, holds: Any, catalog: Catalog, now: float) -> dict[str, Stay]:
        some = list(holds)
        after = real(stays, line, some, catalog, now)
        return after | {hold.consumer: replace(after[hold.consumer], since=now) for hold in some}

    patch.setattr(queue, "stays_after", stays_after)


@rare(test_quantum.test_7_the_resident_goes_ahead_of_who_needs_a_swap_until_its_quantum_is_over)
def the_resident_overtakes_who_is_due(patch: pytest.MonkeyPatch) -> None:
    """Who needs no swap goes first, and not only until then."""
    real, order = Quantum.turns, queue.in_order
    resident: set[str] = set()

    def turns(self: Quantum, *asked: Any) -> Turns:
        resident.clear()
        resident.update(name for name, stay in asked[4].items() if stay.since is not None)
        return real(self, *asked)

    def in_order(entries: Iterable[Entry], ahead: Counter[str], catalog: Catalog) -> list[Entry]:
        return order(sorted(entries, key=lambda entry: entry.consumer not in resident), ahead, catalog)

    patch.setattr(Quantum, "turns", turns)
    patch.setattr(quantum, "in_order", in_order)


def one_is_due_and_an_older_one_is_not() -> None:
    costs = {"paint": 100.0, "voice": 1.0, "chat": 1.0}
    some = (consumer("paint", 14000), consumer("voice", 9000), consumer("chat", 9000))
    line = Queue(catalog(*some), Quantum(), lambda _from, to: costs[to])
    line.enter("chat", 0.0)
    (hold,) = line.begin(0.0)
    hold.phase = queue.Phase.LIVE
    for name in ("paint", "voice", "chat"):
        line.enter(name, 0.0)
    line.leave(hold.seq)
    now = FLOOR_SECONDS * max(PATIENCE, 3 / WAITING_EACH)  # by what its own swap costs, which is little
    assert [hold.consumer for hold in line.begin(now)] == ["chat"]


@rare(one_is_due_and_an_older_one_is_not)
def who_is_due_overtakes_whom_it_holds_up(patch: pytest.MonkeyPatch) -> None:
    """Rule 8, for whoever is due."""
    patch.setattr(quantum, "_held_up", lambda _entry, _behind, _catalog: False)


@rare(test_quantum.test_8_when_a_turn_is_over_the_oldest_is_next)
def the_youngest_is_next(patch: pytest.MonkeyPatch) -> None:
    """Rule 8, when a turn is over."""
    real = queue.heads
    patch.setattr(quantum, "heads", lambda line, catalog: real(line, catalog)[::-1])


@mutant
def the_youngest_of_a_consumer_is_next(patch: pytest.MonkeyPatch) -> None:
    def heads(line: Line, _catalog: Catalog) -> list[Entry]:
        return sorted((max(each.values(), key=lambda e: e.order) for each in line.values()), key=lambda e: e.order)

    patch.setattr(quantum, "heads", heads)


def one_waits_for_a_card_that_is_idle_and_nobody_comes() -> None:
    world = one_that_usually_comes_back()
    paint = world.ask("paint", wait_seconds=60)
    assert world.begun() == [], "nobody lingers"
    world.pass_time(LINGER_SHARE * 2 * FLOOR_SECONDS, watchdog=True)
    assert world.begun() == [paint.ticket.seq], "nobody looks"


@rare(one_waits_for_a_card_that_is_idle_and_nobody_comes)
def nobody_looks_again(patch: pytest.MonkeyPatch) -> None:
    real = Quantum.turns
    patch.setattr(Quantum, "turns", lambda *asked: replace(real(*asked), look_again_at=None))


@rare(one_waits_for_a_card_that_is_idle_and_nobody_comes)
def somebody_looks_again_a_minute_late(patch: pytest.MonkeyPatch) -> None:
    real = Quantum.turns

    def turns(*asked: Any) -> Turns:
        found = real(*asked)
        at = found.look_again_at
        return replace(found, look_again_at=None if at is None else at + 60)

    patch.setattr(Quantum, "turns", turns)


# -- who is idle --------------------------------------------------------------------------------------------


@rare(test_quantum.test_10_who_usually_comes_back_late_goes_at_once)
def who_is_idle_lingers_until_others_are_due(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "linger_seconds", lambda _self, stay, _trip: FOREVER_SECONDS if stay.gaps else 0.0)


def who_left_the_card_is_not_waited_for() -> None:
    world = one_that_usually_comes_back()
    world.services["chat"].take(0)
    world.broker.observe_card()
    paint = world.ask("paint", wait_seconds=60)
    world.prepare()
    assert isinstance(paint.answer, Lease), "it waits for a turn of one who has left"


@rare(who_left_the_card_is_not_waited_for)
def who_left_the_card_keeps_its_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "end_stay", lambda _self, _consumer: None)


# -- classes, making way and coming back --------------------------------------------------------------------


def one_who_came_long_before_is_ahead_of_who_is_more_urgent() -> None:
    world = World(catalog(consumer("chat", 9000)))
    lease = world.grant("chat", ttl_seconds=600)
    first = world.ask("chat", wait_seconds=600)
    world.pass_time(HEAD_START_SECONDS + 1)
    world.ask("chat", wait_seconds=600, priority=Priority.INTERACTIVE)
    world.broker.release(lease.token)
    world.prepare()
    assert isinstance(first.answer, Lease), "it does not age"


@rare(one_who_came_long_before_is_ahead_of_who_is_more_urgent)
def nobody_ages(patch: pytest.MonkeyPatch) -> None:
    """Whoever is more urgent is ahead, however long others have waited."""
    _ordered_by(patch, lambda entry: (entry.arrived_at + FOREVER_SECONDS * entry.priority.rank, entry.seq, 0))


@rare(test_queue.test_more_urgent_requests_go_first_and_within_a_class_who_came_first)
def a_class_changes_nothing(patch: pytest.MonkeyPatch) -> None:
    _ordered_by(patch, lambda entry: (entry.arrived_at, entry.seq, 0))


def a_chat_waits_and_somebody_more_urgent_comes() -> None:
    world = World(catalog(consumer("chat", 9000), consumer("paint", 14000)), totals_mib=[16000])
    lease = world.grant("chat", loaded=True)
    for _ in range(int(WAITING_EACH * 20)):
        world.ask("chat", wait_seconds=600)
    paint = world.ask("paint", wait_seconds=600, priority=Priority.INTERACTIVE)
    world.pass_time(URGENT * FLOOR_SECONDS)
    world.broker.release(lease.token)
    world.prepare()
    assert isinstance(paint.answer, Lease), "it waits for a whole turn of who is less urgent"


@rare(a_chat_waits_and_somebody_more_urgent_comes)
def who_is_more_urgent_waits_for_a_whole_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantum, "URGENT", FOREVER_SECONDS)


def one_resumes_behind_the_one_it_made_way_for() -> None:
    line = Queue(catalog(consumer("chat", 9000), consumer("paint", 14000)), Quantum())
    first, to = line.enter("chat", 0.0), line.enter("paint", 1.0)
    last, back = line.enter("chat", 2.0), line.enter("chat", 3.0, behind=to.seq)
    assert line.waiting() == [first, to, back, last]


@rare(one_resumes_behind_the_one_it_made_way_for)
def who_resumes_is_ahead_of_everybody(patch: pytest.MonkeyPatch) -> None:
    real = Entry.__post_init__

    def order(self: Entry) -> None:
        real(self)
        if self.behind is not None:
            object.__setattr__(self, "order", (-FOREVER_SECONDS, *self.order[1:]))

    patch.setattr(Entry, "__post_init__", order)


@rare(one_resumes_behind_the_one_it_made_way_for)
def who_resumes_is_the_last_one(patch: pytest.MonkeyPatch) -> None:
    real = Queue.enter
    patch.setattr(Queue, "enter", lambda self, *asked, **how: real(self, *asked, **how | {"behind": None}))


def somebody_more_urgent_comes_just_after_a_grant() -> None:
    world = World(catalog(consumer("chat", 9000), consumer("paint", 14000)), totals_mib=[16000])
    lease = world.grant("chat", loaded=True, priority=Priority.BATCH)
    world.ask("paint", wait_seconds=60, priority=Priority.INTERACTIVE)
    world.pass_time(MIN_HOLD_SECONDS - 1)
    assert world.broker.state.wish(lease) is None, "asked to yield before it was of use"
    world.pass_time(1)
    assert world.broker.state.wish(lease)


@rare(somebody_more_urgent_comes_just_after_a_grant)
def a_holder_is_asked_to_yield_at_once(patch: pytest.MonkeyPatch) -> None:
    def yield_request(hold: Any, line: Queue, since: Any, _min_hold_seconds: float, now: float) -> YieldRequest | None:
        return yielding.yield_request(hold, line, since, 0.0, now)

    patch.setattr(state, "yield_request", yield_request)


@rare(test_yielding.test_2_nobody_is_asked_for_someone_whose_turn_it_would_not_be)
def a_holder_is_asked_to_yield_to_whoever_is_first_in_line(patch: pytest.MonkeyPatch) -> None:
    """Also where it would not be that one's turn."""

    def next_without(self: Queue, _ended: Any, now: float) -> list[Next]:
        return [Next(entry, now) for entry in self.waiting()]

    patch.setattr(Queue, "next_without", next_without)


def _ordered_by(patch: pytest.MonkeyPatch, of: Callable[[Entry], queue.Order]) -> None:
    def order(self: Entry) -> None:
        object.__setattr__(self, "order", of(self) if self.behind is None else (*self.behind[:2], self.seq))

    patch.setattr(Entry, "__post_init__", order)


# -- sharing ------------------------------------------------------------------------------------------------


def one_does_not_fit_beside_what_was_promised() -> None:
    some = [consumer(name, mib, by_size=True) for name, mib in (("chat", 12000), ("paint", 14000))]
    world = World(catalog(*some))
    world.broker.observe_card()
    world.grant("chat")  # nothing of it is on the card yet
    paint = world.ask("paint", wait_seconds=60)
    world.prepare()
    assert paint.waits, "lent twice"
    assert world.begun() == [], "it keeps everybody from being prepared"


@rare(one_does_not_fit_beside_what_was_promised)
def sizes_are_not_added_up(patch: pytest.MonkeyPatch) -> None:
    for room in (queue, quantum):
        patch.setattr(room, "crowded", lambda _consumer, _ahead, _catalog: False)


@rare(one_does_not_fit_beside_what_was_promised)
def only_what_is_on_the_card_counts(patch: pytest.MonkeyPatch) -> None:
    """Of the sizes of those who hold, and of what was promised to them."""
    sizes_are_not_added_up(patch)
    patch.setattr(Views, "promised", lambda _self, _holders, _holdings, *_more: {})


def a_call_comes_where_somebody_is_pinned() -> None:
    some = (consumer("paint", 14000), consumer("chat", 9000), consumer("voice", 3000, pinned=True))
    world = World(catalog(*some))
    world.services["voice"].take()
    world.services["chat"].take()
    world.call("paint")
    world.prepare()
    assert world.services["chat"].asked_to_unload
    assert not world.services["voice"].asked_to_unload, "it was pinned"


@rare(a_call_comes_where_somebody_is_pinned)
def who_is_pinned_goes_like_anybody(patch: pytest.MonkeyPatch) -> None:
    real = Views.of

    def view(*asked: Any) -> View:
        seen = real(*asked)
        consumers = {name: replace(each, pinned=False) for name, each in seen.catalog.consumers.items()}
        return replace(seen, catalog=replace(seen.catalog, consumers=consumers))

    patch.setattr(Views, "of", view)


# -- rules that a test of their own holds -------------------------------------------------------------------


def in_a_world(story: Callable[..., None], **words: Any) -> Callable[[], None]:
    return lambda: story(World(catalog(test_order.CHAT, test_order.PAINT), totals_mib=[16000]), **words)


@rare(test_quantum.test_7_a_turn_that_has_just_begun_lasts_for_less_than_who_comes_then_has_to_wait)
def no_patience(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantum, "PATIENCE", 0.0)


@rare(lambda: test_quantum.test_7_among_the_equally_urgent_nobody_has_a_head_start(Priority.INTERACTIVE))
def a_head_start_against_everybody(patch: pytest.MonkeyPatch) -> None:
    due_at = Quantum._due_at

    def as_if_it_came_earlier(self: Quantum, entry: Entry, *more: Any) -> float:
        earlier = replace(entry, arrived_at=entry.counts_from, priority=Priority.NORMAL)
        return due_at(self, earlier, *more)

    patch.setattr(Quantum, "_due_at", as_if_it_came_earlier)


@rare(lambda: test_quantum.test_9_a_quantum_is_the_longest_against_who_asks_again_at_once((0.0, 0.0, 0.0), 8.0))
def nobody_insists(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "_asked_again_at_once", lambda _self, _stay, _round_trip: False)


@rare(test_quantum.test_10_who_usually_comes_back_soon_keeps_the_card_for_a_moment)
def nobody_lingers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "linger_seconds", lambda _self, _stay, _round_trip: 0.0)


@rare(test_quantum.test_11_who_joins_the_card_joins_the_turn)
def who_joins_begins_a_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Catalog, "share_gpu", lambda _self, _one, _other: False)


@rare(in_a_world(test_order.test_who_made_way_comes_back_directly_behind_that_one))
def a_place_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resuming, "resume", Resuming.behind)


@rare(in_a_world(test_order.test_who_came_back_and_got_nothing_may_come_back_again))
def a_place_that_is_lost_with_a_refusal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resuming, "give_back", lambda _self, _lease_id: None)


@rare(in_a_world(test_order.test_otherwise_it_is_a_request_like_any, why_not="another's"))
def anybody_s_place(patch: pytest.MonkeyPatch) -> None:
    yielded, behind = Resuming.yielded, Resuming.behind
    patch.setattr(
        Resuming, "yielded", lambda self, lease_id, name, to, now, _bearer: yielded(self, lease_id, name, to, now)
    )
    patch.setattr(Resuming, "behind", lambda self, lease_id, name, now, _bearer: behind(self, lease_id, name, now))


@rare(test_yielding.test_2_nobody_is_asked_beside_someone_who_is_not)
def asked_in_vain(patch: pytest.MonkeyPatch) -> None:
    without = Queue.next_without

    def next_without(self: Queue, _ended: Iterable[Hold], now: float) -> list[Next]:
        return without(self, list(self.holds.values()), now)

    patch.setattr(Queue, "next_without", next_without)


@rare(test_yielding.test_4_for_someone_who_needs_a_swap_when_the_quantum_is_over)
def asked_before_the_quantum_is_over(patch: pytest.MonkeyPatch) -> None:
    reason = yielding._reason

    def at_once(after: Next, hold: Hold, now: float) -> yielding.YieldReason | None:
        return reason(after, hold, now + FOREVER_SECONDS)

    patch.setattr(yielding, "_reason", at_once)


@rare(test_sharing.test_2_nobody_goes_ahead_of_whom_they_would_hold_up)
def who_waits_fills_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queue, "crowded", lambda _consumer, _there, _catalog: False)


@rare(test_sharing.test_3_who_sends_others_away_begins_a_turn_of_its_own)
def who_leaves_by_size_is_joined(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queue, "leaving_for", lambda _consumer, _there, _catalog: [])


@pytest.mark.parametrize("name", sorted(RARE))
def test_its_story_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install, story = RARE[name]
    story()
    install(monkeypatch)
    with fits_its_place(), pytest.raises(AssertionError):
        story()


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(MUTANTS))
class TestHuntOfTheOrder:
    def test_the_machine_notices(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        MUTANTS[name](monkeypatch)
        assert notices(QuantumMachine)
