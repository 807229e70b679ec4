"""The turn: the numbers are those of gpumgr/core/queue.py."""

from __future__ import annotations

from gpumgr.core.catalog import Catalog, Consumer
from gpumgr.core.queue import Entry, Fifo, Hold, Line, Phase, Queue, WaitingFor
from tests.worlds import catalog, consumer


def line(*consumers: Consumer) -> Queue:
    return Queue(catalog(*consumers), Fifo())


def names(begun: list[Hold]) -> list[str]:
    return [hold.consumer for hold in begun]


def go_live(queue: Queue) -> list[str]:
    """Everyone whose turn it is, as far as preparations one after the other let them."""
    went = []
    while begun := queue.begin():
        for hold in begun:
            hold.phase = Phase.LIVE
            went.append(hold.consumer)
    return went


def first_come(entries: Line, holds: list[Hold], consumers: Catalog) -> list[Entry]:
    return Fifo().turns(entries, holds, consumers, 0.0, {}, lambda _from, _to: None).entries


EXCLUSIVE = (consumer("paint"), consumer("chat"))
BESIDE = (consumer("chat", beside=["hear"]), consumer("hear", beside=["chat"]))


def test_1_two_that_share_a_gpu_and_do_not_coexist_conflict() -> None:
    queue = line(*EXCLUSIVE)
    first, _ = queue.enter("paint"), queue.enter("chat")
    assert go_live(queue) == ["paint"]
    queue.leave(first.seq)
    assert go_live(queue) == ["chat"]


def test_1_coexisting_consumers_run_side_by_side() -> None:
    queue = line(*BESIDE)
    queue.enter("chat")
    queue.enter("hear")
    assert go_live(queue) == ["chat", "hear"]


def test_1_a_one_sided_coexistence_is_none() -> None:
    queue = line(consumer("chat", beside=["hear"]), consumer("hear"))
    queue.enter("chat")
    queue.enter("hear")
    assert go_live(queue) == ["chat"]


def test_1_every_phase_of_a_hold_excludes() -> None:
    for phase in Phase:
        queue = line(*EXCLUSIVE)
        queue.enter("paint")
        (hold,) = queue.begin()
        hold.phase = phase
        queue.enter("chat")
        assert queue.begin() == [], phase


def test_2_requests_for_one_consumer_conflict_beyond_its_concurrency() -> None:
    queue = line(consumer("hear", at_once=2))
    first, *_ = [queue.enter("hear") for _ in range(4)]
    assert go_live(queue) == ["hear", "hear"]
    queue.leave(first.seq)
    assert go_live(queue) == ["hear"]
    assert len(queue.waiting()) == 1


def test_3_nobody_overtakes_someone_they_would_hold_up() -> None:
    queue = line(
        consumer("paint"),
        consumer("chat", beside=["hear"]),
        consumer("hear", beside=["chat"]),
    )
    chat = queue.enter("chat")
    assert go_live(queue) == ["chat"]
    paint = queue.enter("paint")  # waits for chat
    queue.enter("hear")  # may stand beside chat, but it would hold up paint
    assert go_live(queue) == []
    queue.leave(chat.seq)
    assert go_live(queue) == ["paint"]
    queue.leave(paint.seq)
    assert go_live(queue) == ["hear"]


def test_3_who_conflicts_with_nobody_ahead_goes_before_them() -> None:
    queue = line(consumer("hear", beside=["chat"]), consumer("chat", beside=["hear"]))
    queue.enter("hear")
    assert go_live(queue) == ["hear"]
    queue.enter("hear")  # beyond its concurrency
    queue.enter("chat")
    assert go_live(queue) == ["chat"]


def test_3_the_line_is_in_order_of_arrival_across_consumers() -> None:
    queue = line(*EXCLUSIVE)
    came = [queue.enter(name).seq for name in ("chat", "paint", "chat", "paint", "paint", "chat")]
    went = []
    while begun := queue.begin():
        (hold,) = begun
        went.append(hold.seq)
        queue.leave(hold.seq)
    assert went == came == sorted(came)


def test_different_gpus_never_wait_for_each_other() -> None:
    queue = line(consumer("paint", gpus=(0,)), consumer("draw", gpus=(1,)))
    queue.enter("paint")
    queue.enter("paint")
    queue.enter("draw")
    assert names(queue.begin()) == ["paint", "draw"]


def test_one_that_spans_two_gpus_joins_their_lines() -> None:
    queue = line(consumer("paint", gpus=(0,)), consumer("both", gpus=(0, 1)), consumer("draw", gpus=(1,)))
    paint = queue.enter("paint")
    both = queue.enter("both")
    queue.enter("draw")
    assert go_live(queue) == ["paint"]
    queue.leave(paint.seq)
    assert go_live(queue) == ["both"]
    queue.leave(both.seq)
    assert go_live(queue) == ["draw"]


def test_4_a_consumer_out_of_service_keeps_its_place_and_waits() -> None:
    queue = line(*BESIDE)
    queue.take_out("chat")
    assert queue.is_unloading("chat")
    chat = queue.enter("chat")
    assert queue.begin() == []
    assert queue.why(chat) is WaitingFor.PREPARING
    queue.put_back("chat")
    assert not queue.is_unloading("chat")
    assert names(queue.begin()) == ["chat"]


def test_4_two_unloads_of_one_consumer_both_count() -> None:
    queue = line(*BESIDE)
    queue.take_out("chat")
    queue.take_out("chat")
    queue.put_back("chat")
    assert queue.is_unloading("chat")
    queue.put_back("chat")
    assert not queue.is_unloading("chat")


def test_5_one_preparation_per_gpu() -> None:
    queue = line(*BESIDE)
    queue.enter("chat")
    queue.enter("hear")
    (chat,) = queue.begin()
    assert queue.begin() == []
    chat.phase = Phase.GRANTING
    assert names(queue.begin()) == ["hear"]


def test_5_who_waits_for_a_slot_holds_back_whoever_comes_later_for_that_gpu() -> None:
    both = consumer("both", gpus=(0, 1), beside=["left", "right"])
    left, right = consumer("left", gpus=(0,), beside=["both"]), consumer("right", gpus=(1,), beside=["both"])
    queue = line(both, left, right)
    queue.enter("left")
    (preparing,) = queue.begin()
    queue.enter("both")  # GPU 0 is being prepared
    queue.enter("right")  # GPU 1 is free, but `both` came first
    assert queue.begin() == []
    preparing.phase = Phase.LIVE
    (preparing,) = queue.begin()
    assert preparing.consumer == "both"
    preparing.phase = Phase.LIVE
    assert names(queue.begin()) == ["right"]


def test_who_leaves_the_line_is_never_begun_and_lets_others_pass() -> None:
    queue = line(*EXCLUSIVE)
    paint, chat = queue.enter("paint"), queue.enter("chat")
    queue.leave(paint.seq)
    queue.leave(paint.seq)
    queue.leave(99)
    assert queue.waiting() == [chat]
    assert names(queue.begin()) == ["chat"]
    assert queue.waiting() == []


def test_why() -> None:
    queue = line(*BESIDE, consumer("paint"))
    chat = queue.enter("chat")
    (hold,) = queue.begin()
    hear = queue.enter("hear")
    assert queue.why(hear) is WaitingFor.PREPARING
    hold.phase = Phase.LIVE
    paint = queue.enter("paint")
    queue.leave(hear.seq)
    late = queue.enter("hear")
    assert queue.why(paint) is WaitingFor.HOLDER
    assert queue.why(late) is WaitingFor.AHEAD
    assert (queue.ahead(paint), queue.ahead(late)) == (0, 1)
    assert [h.seq for h in queue.blockers(queue.catalog.consumers["paint"])] == [chat.seq]
    assert queue.blockers(queue.catalog.consumers["hear"]) == []


def test_held_up_by_counts_whom_this_hold_alone_keeps_waiting() -> None:
    queue = line(consumer("hear", at_once=2, beside=["chat"]), consumer("chat", beside=["hear"]), consumer("paint"))
    queue.enter("hear")
    (first,) = queue.begin()
    first.phase = Phase.LIVE
    queue.enter("paint")
    queue.enter("chat")  # behind paint, but not held up by hear
    assert queue.held_up_by(first) == 1
    queue.enter("hear")
    assert queue.held_up_by(first) == 1  # one of two: hear's concurrency is not full
    full = line(consumer("hear", at_once=2))
    for _ in range(4):
        full.enter("hear")
    go_live(full)
    assert [full.held_up_by(hold) for hold in full.holds.values()] == [2, 2]


def test_the_policy_is_pure() -> None:
    consumers = catalog(*EXCLUSIVE)
    entries = {"chat": {1: Entry(1, "chat"), 3: Entry(3, "chat")}, "paint": {2: Entry(2, "paint")}}
    assert first_come(entries, [], consumers) == [Entry(1, "chat")]
    assert first_come(entries, [Hold(9, "chat", (0,))], consumers) == []
    assert list(entries["chat"]) == [1, 3]


def test_a_long_line_costs_no_more_than_its_heads() -> None:
    consumers: Catalog = catalog(*EXCLUSIVE)
    asked = []

    class Counted(dict[int, Entry]):
        def values(self):  # type: ignore[no-untyped-def]
            for entry in super().values():
                asked.append(entry)
                yield entry

    queued = {"paint": Counted({seq: Entry(seq, "paint") for seq in range(1, 5000)})}
    first_come(queued, [], consumers)
    assert len(asked) <= 2
