"""The rules of the order broken one by one: each time the test that is meant to hold the rule must say so.

``QuantumMachine`` hunts those that show in what callers see, in `make long`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test

from gpumgr.core import placement, quantum, queue, sharing, yielding
from gpumgr.core.catalog import Catalog
from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Entry, Hold, Next, Phase, Priority, Queue
from gpumgr.core.resuming import Resuming
from tests.core import test_placement, test_quantum, test_queue, test_sharing, test_yielding
from tests.core.test_machine import QuantumMachine
from tests.core.test_mutants import HUNT
from tests.runtime import test_order
from tests.worlds import World, catalog

Mutant = Callable[[pytest.MonkeyPatch], None]
NOTICED_BY: dict[Mutant, Callable[[], None]] = {}
HUNTED: dict[str, Mutant] = {}
FOR_EVER = 1e9


def noticed_by(story: Callable[[], None]) -> Callable[[Mutant], Mutant]:
    def enter(mutant: Mutant) -> Mutant:
        NOTICED_BY[mutant] = story
        return mutant

    return enter


def hunted(mutant: Mutant) -> Mutant:
    HUNTED[mutant.__name__] = mutant
    return mutant


def in_a_world(story: Callable[..., None], **words: Any) -> Callable[[], None]:
    return lambda: story(World(catalog(test_order.CHAT, test_order.PAINT), totals_mib=[16000]), **words)


# -- 6 to 9: the turn ---------------------------------------------------------------------------------------


@hunted
@noticed_by(test_quantum.test_6_within_one_consumer_first_come_first_served)
def the_youngest_of_a_consumer_first(patch: pytest.MonkeyPatch) -> None:
    def heads(line: Mapping[str, Mapping[int, Entry]], _catalog: Catalog) -> list[Entry]:
        return sorted((list(entries.values())[-1] for entries in line.values()), key=lambda entry: entry.order)

    patch.setattr(quantum, "heads", heads)


@noticed_by(test_quantum.test_7_the_resident_goes_ahead_of_who_needs_a_swap_until_its_quantum_is_over)
def a_turn_without_an_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "quantum_seconds_of", lambda _self, _round_trip, _times: FOR_EVER)


@noticed_by(test_quantum.test_7_the_resident_goes_ahead_of_who_needs_a_swap_until_its_quantum_is_over)
def no_turn_at_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "quantum_seconds_of", lambda _self, _round_trip, _times: 0.0)


@noticed_by(test_quantum.test_7_a_turn_that_has_just_begun_lasts_for_less_than_who_comes_then_has_to_wait)
def no_patience(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantum, "PATIENCE", 0.0)


@noticed_by(lambda: test_quantum.test_7_among_the_equally_urgent_nobody_has_a_head_start(Priority.INTERACTIVE))
def a_head_start_against_everybody(patch: pytest.MonkeyPatch) -> None:
    due_at = Quantum._due_at

    def as_if_it_came_earlier(self: Quantum, entry: Entry, *more: Any) -> float:
        earlier = replace(entry, arrived_at=entry.counts_from, priority=Priority.NORMAL)
        return due_at(self, earlier, *more)

    patch.setattr(Quantum, "_due_at", as_if_it_came_earlier)


@noticed_by(test_quantum.test_8_a_shorter_quantum_overtakes_nobody)
def who_is_due_overtakes_who_is_not(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantum, "_held_up", lambda _entry, _behind, _catalog: False)


@noticed_by(lambda: test_quantum.test_9_a_quantum_is_the_longest_against_who_asks_again_at_once((0.0, 0.0, 0.0), 8.0))
def nobody_insists(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "_asked_again_at_once", lambda _self, _stay, _round_trip: False)


@noticed_by(
    lambda: test_quantum.test_9_a_quantum_is_short_for_who_is_more_urgent(Priority.INTERACTIVE, Priority.NORMAL, 20.0)
)
def no_haste_for_the_urgent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantum, "URGENT", 8.0)


# -- 10 and 11: who stays -----------------------------------------------------------------------------------


@noticed_by(test_quantum.test_10_who_usually_comes_back_late_goes_at_once)
def everybody_lingers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "linger_seconds", lambda _self, _stay, _round_trip: FOR_EVER)


@noticed_by(test_quantum.test_10_who_usually_comes_back_soon_keeps_the_card_for_a_moment)
def nobody_lingers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Quantum, "linger_seconds", lambda _self, _stay, _round_trip: 0.0)


@noticed_by(test_quantum.test_11_who_joins_the_card_joins_the_turn)
def who_joins_begins_a_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Catalog, "share_gpu", lambda _self, _one, _other: False)


@hunted
@noticed_by(in_a_world(test_order.test_who_comes_back_soon_is_waited_for_and_the_watchdog_ends_that))
def nobody_looks_again(patch: pytest.MonkeyPatch) -> None:
    turns = Quantum.turns
    patch.setattr(Quantum, "turns", lambda self, *words: replace(turns(self, *words), look_again_at=None))


@noticed_by(in_a_world(test_order.test_who_left_the_card_by_itself_is_not_waited_for))
def who_left_the_card_keeps_its_turn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "end_stay", lambda _self, _consumer: None)


# -- 0: classes, and coming back ----------------------------------------------------------------------------


@noticed_by(test_queue.test_nobody_who_waited_longer_than_a_head_start_is_overtaken)
def urgency_without_ageing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queue, "HEAD_START_SECONDS", FOR_EVER)


@noticed_by(in_a_world(test_order.test_who_made_way_comes_back_directly_behind_that_one))
def who_comes_back_goes_to_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Queue, "_order_of", lambda _self, _seq: None)


@noticed_by(in_a_world(test_order.test_who_made_way_comes_back_directly_behind_that_one))
def a_place_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resuming, "resume", Resuming.behind)


@noticed_by(in_a_world(test_order.test_who_came_back_and_got_nothing_may_come_back_again))
def a_place_that_is_lost_with_a_refusal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resuming, "give_back", lambda _self, _lease_id: None)


@noticed_by(in_a_world(test_order.test_otherwise_it_is_a_request_like_any, why_not="another's"))
def anybody_s_place(patch: pytest.MonkeyPatch) -> None:
    yielded, behind = Resuming.yielded, Resuming.behind
    patch.setattr(
        Resuming, "yielded", lambda self, lease_id, name, to, now, _bearer: yielded(self, lease_id, name, to, now)
    )
    patch.setattr(Resuming, "behind", lambda self, lease_id, name, now, _bearer: behind(self, lease_id, name, now))


# -- asking to yield ----------------------------------------------------------------------------------------


@noticed_by(test_yielding.test_1_nobody_is_asked_before_they_held_for_long_enough)
def asked_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(yielding, "_may_be_asked", lambda hold, _asked_from, _now: hold.phase is Phase.LIVE)


@noticed_by(test_yielding.test_2_nobody_is_asked_for_someone_whose_turn_it_would_not_be)
def asked_for_anybody(patch: pytest.MonkeyPatch) -> None:
    def next_without(self: Queue, _ended: Iterable[Hold], _now: float) -> list[Next]:
        return [Next(entry, None) for entry in self.waiting()]

    patch.setattr(Queue, "next_without", next_without)


@noticed_by(test_yielding.test_2_nobody_is_asked_beside_someone_who_is_not)
def asked_in_vain(patch: pytest.MonkeyPatch) -> None:
    without = Queue.next_without

    def next_without(self: Queue, _ended: Iterable[Hold], now: float) -> list[Next]:
        return without(self, list(self.holds.values()), now)

    patch.setattr(Queue, "next_without", next_without)


@noticed_by(test_yielding.test_4_for_someone_who_needs_a_swap_when_the_quantum_is_over)
def asked_before_the_quantum_is_over(patch: pytest.MonkeyPatch) -> None:
    reason = yielding._reason

    def at_once(after: Next, hold: Hold, now: float) -> yielding.YieldReason | None:
        return reason(after, hold, now + FOR_EVER)

    patch.setattr(yielding, "_reason", at_once)


# -- sharing, and who is pinned -----------------------------------------------------------------------------


@hunted
@noticed_by(test_sharing.test_1_they_run_side_by_side_while_the_sizes_fit)
def sizes_do_not_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sharing, "fullest", lambda _sizes, _lends: 0)


@noticed_by(test_sharing.test_2_nobody_goes_ahead_of_whom_they_would_hold_up)
def who_waits_fills_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queue, "crowded", lambda _consumer, _there, _catalog: False)


@noticed_by(test_sharing.test_3_who_sends_others_away_begins_a_turn_of_its_own)
def who_leaves_by_size_is_joined(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queue, "leaving_for", lambda _consumer, _there, _catalog: [])


@noticed_by(test_placement.test_6_who_is_pinned_goes_where_it_must_alone)
def pinned_like_anybody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(placement, "_unpinned", lambda names, _view: list(names))


@pytest.mark.parametrize("mutant", NOTICED_BY, ids=lambda mutant: mutant.__name__)
def test_its_own_test_notices(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    NOTICED_BY[mutant]()
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        NOTICED_BY[mutant]()


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(HUNTED))
def test_the_machine_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    HUNTED[name](monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(QuantumMachine, settings=HUNT)
