"""Whether a holder is asked to yield: the numbers are those of gpumgr/core/yielding.py."""

from __future__ import annotations

from gpumgr.core.quantum import PATIENCE, URGENT, Quantum
from gpumgr.core.queue import Entry, Fifo, Hold, Phase, Policy, Priority, Queue
from gpumgr.core.yielding import YieldReason, YieldRequest, yield_request
from tests.worlds import catalog, consumer

SWAP = 10.0
DUE = PATIENCE * 2 * SWAP
NORMAL, INTERACTIVE, BATCH = Priority.NORMAL, Priority.INTERACTIVE, Priority.BATCH


class Held:
    """Chat holds the card since 0, as a normal request."""

    def __init__(self, policy: Policy | None = None, priority: Priority = NORMAL) -> None:
        consumers = (consumer("chat", beside=["hear"]), consumer("paint"), consumer("hear", beside=["chat"]))
        self.queue = Queue(catalog(*consumers), policy or Quantum(), lambda _from, _to: SWAP)
        self.queue.enter("chat", 0.0, priority=priority)
        (self.hold,) = self.queue.begin(0.0)
        self.hold.phase = Phase.LIVE

    def ask(self, name: str, at: float, priority: Priority = NORMAL) -> Entry:
        return self.queue.enter(name, at, priority=priority)

    def asked(self, now: float, min_hold_seconds: float = 5.0, hold: Hold | None = None) -> YieldRequest | None:
        held_since = dict.fromkeys(self.queue.holds, 0.0)
        return yield_request(hold or self.hold, self.queue, held_since, min_hold_seconds, now)


def test_1_nobody_is_asked_before_they_held_for_long_enough() -> None:
    held = Held()
    paint = held.ask("paint", 1.0, INTERACTIVE)
    assert held.asked(4.9) is None
    assert held.asked(5.0) == held.asked(99.0) == YieldRequest(paint, YieldReason.PRIORITY, 5.0)
    assert held.asked(99.0, min_hold_seconds=0.0) == YieldRequest(paint, YieldReason.PRIORITY, 1.0)
    held.hold.phase = Phase.ENDING
    assert held.asked(99.0) is None


def test_2_nobody_is_asked_for_someone_whom_they_do_not_keep_waiting() -> None:
    held = Held(priority=BATCH)
    assert held.asked(99.0) is None
    held.ask("hear", 1.0, INTERACTIVE)  # a GPU's one preparation may be all that it waits for
    assert held.asked(99.0) is None


def test_2_nobody_is_asked_for_someone_whose_turn_it_would_not_be() -> None:
    held = Held()
    held.ask("chat", 1.0)
    paint = held.ask("paint", 300.0, INTERACTIVE)
    assert held.asked(300.0) is None  # chat has waited for longer than a head start, and goes first
    held.queue.leave(2)
    assert held.asked(300.0) == YieldRequest(paint, YieldReason.PRIORITY, 300.0)
    held.ask("chat", 301.0)
    assert held.asked(301.0) is not None
    held.queue.stays["chat"] = held.queue.stays["chat"].__class__(since=300.0)
    assert held.asked(301.0) is None  # its turn has just begun
    assert held.asked(300.0 + URGENT * 2 * SWAP) is not None


def test_2_for_any_of_those_who_would_go_side_by_side() -> None:
    held = Held(Quantum(quantum_seconds=300.0))
    held.ask("paint", 1.0)
    held.queue.leave(1)
    (held.hold,) = held.queue.begin(2.0)
    held.hold.phase = Phase.LIVE
    chat = held.ask("chat", 3.0)
    hear = held.ask("hear", 130.0, INTERACTIVE)  # behind chat, which has waited for longer than its head start
    assert [each.entry for each in held.queue.next_without([held.hold], 131.0)] == [chat, hear]
    assert held.asked(131.0) == YieldRequest(hear, YieldReason.PRIORITY, 130.0)


def test_2_for_who_has_several_in_its_way_all_of_them_are_asked() -> None:
    held = Held(priority=BATCH)
    held.ask("hear", 0.0, BATCH)
    (hear,) = held.queue.begin(0.0)
    paint = held.ask("paint", 1.0, INTERACTIVE)
    assert held.asked(99.0) is None  # hear is being prepared
    hear.phase = Phase.LIVE
    asked = YieldRequest(paint, YieldReason.PRIORITY, 5.0)
    assert (held.asked(99.0), held.asked(99.0, hold=hear)) == (asked, asked)
    later = {held.hold.seq: 0.0, hear.seq: 50.0}
    assert yield_request(held.hold, held.queue, later, 5.0, 54.0) is None  # it would not help
    assert yield_request(held.hold, held.queue, later, 5.0, 55.0) == YieldRequest(paint, YieldReason.PRIORITY, 55.0)
    assert yield_request(held.hold, held.queue, {held.hold.seq: 0.0}, 5.0, 99.0) is None  # hear is a proxied call


def test_2_nobody_is_asked_beside_someone_who_is_not() -> None:
    held = Held(Fifo(), BATCH)
    held.ask("hear", 0.0, INTERACTIVE)
    (hear,) = held.queue.begin(0.0)
    hear.phase = Phase.LIVE
    held.ask("paint", 1.0, INTERACTIVE)
    assert (held.asked(99.0), held.asked(99.0, hold=hear)) == (None, None)


def test_2_one_of_two_is_enough_where_there_is_one_place_too_few() -> None:
    queue = Queue(catalog(consumer("chat", at_once=2)), Fifo(), lambda _from, _to: SWAP)
    queue.enter("chat", 0.0, priority=BATCH)
    queue.enter("chat", 0.0, priority=INTERACTIVE)
    holds = []
    while begun := queue.begin(0.0):
        begun[0].phase = Phase.LIVE
        holds += begun
    chat = queue.enter("chat", 1.0, priority=INTERACTIVE)
    since = {hold.seq: 0.0 for hold in holds}
    asked = {hold.priority: yield_request(hold, queue, since, 5.0, 9.0) for hold in holds}
    assert asked == {BATCH: YieldRequest(chat, YieldReason.PRIORITY, 5.0), INTERACTIVE: None}


def test_3_for_someone_more_urgent_also_of_the_same_consumer() -> None:
    for policy in (Quantum(), Fifo()):
        held = Held(policy, BATCH)
        held.ask("chat", 1.0, BATCH)
        assert held.asked(99.0) is None
        chat = held.ask("chat", 2.0)
        assert held.asked(99.0) == YieldRequest(chat, YieldReason.PRIORITY, 5.0)


def test_4_for_someone_who_needs_a_swap_when_the_quantum_is_over() -> None:
    held = Held()
    paint = held.ask("paint", 2.0)
    assert held.asked(2.0 + DUE - 0.1) is None
    assert held.asked(2.0 + DUE) == YieldRequest(paint, YieldReason.QUANTUM, 2.0 + DUE)
    assert held.asked(99.0, min_hold_seconds=98.0) == YieldRequest(paint, YieldReason.QUANTUM, 98.0)


def test_4_first_come_first_served_has_no_quanta() -> None:
    held = Held(Fifo())
    held.ask("paint", 2.0)
    assert held.asked(9999.0) is None
