"""The turn: the numbers are those of gpumgr/core/queue.py."""

from __future__ import annotations

from gpumgr.core.catalog import Catalog, Consumer
from gpumgr.core.queue import HEAD_START_SECONDS, Entry, Fifo, Hold, Line, Phase, Priority, Queue, WaitingFor
from tests.worlds import catalog, consumer


def line(*consumers: Consumer) -> Queue:
    return Queue(catalog(*consumers), Fifo())


def names(begun: list[Hold]) -> list[str]:
    return [hold.consumer for hold in begun]


def go_live(queue: Queue) -> list[str]:
    """Everyone whose turn it is, as far as preparations one after the other let them."""
    went = []
    while begun := queue.begin(0.0):
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
    first, _ = queue.enter("paint", 0.0), queue.enter("chat", 0.0)
    assert go_live(queue) == ["paint"]
    queue.leave(first.seq)
    assert go_live(queue) == ["chat"]


def test_1_coexisting_consumers_run_side_by_side() -> None:
    queue = line(*BESIDE)
    queue.enter("chat", 0.0)
    queue.enter("hear", 0.0)
    assert go_live(queue) == ["chat", "hear"]


def test_1_a_one_sided_coexistence_is_none() -> None:
    queue = line(consumer("chat", beside=["hear"]), consumer("hear"))
    queue.enter("chat", 0.0)
    queue.enter("hear", 0.0)
    assert go_live(queue) == ["chat"]


def test_1_every_phase_of_a_hold_excludes() -> None:
    for phase in Phase:
        queue = line(*EXCLUSIVE)
        queue.enter("paint", 0.0)
        (hold,) = queue.begin(0.0)
        hold.phase = phase
        queue.enter("chat", 0.0)
        assert queue.begin(0.0) == [], phase


def test_2_requests_for_one_consumer_conflict_beyond_its_concurrency() -> None:
    queue = line(consumer("hear", at_once=2))
    first, *_ = [queue.enter("hear", 0.0) for _ in range(4)]
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
    chat = queue.enter("chat", 0.0)
    assert go_live(queue) == ["chat"]
    paint = queue.enter("paint", 0.0)  # waits for chat
    queue.enter("hear", 0.0)  # may stand beside chat, but it would hold up paint
    assert go_live(queue) == []
    queue.leave(chat.seq)
    assert go_live(queue) == ["paint"]
    queue.leave(paint.seq)
    assert go_live(queue) == ["hear"]


def test_3_who_conflicts_with_nobody_ahead_goes_before_them() -> None:
    queue = line(consumer("hear", beside=["chat"]), consumer("chat", beside=["hear"]))
    queue.enter("hear", 0.0)
    assert go_live(queue) == ["hear"]
    queue.enter("hear", 0.0)  # beyond its concurrency
    queue.enter("chat", 0.0)
    assert go_live(queue) == ["chat"]


def test_3_the_line_is_in_order_of_arrival_across_consumers() -> None:
    queue = line(*EXCLUSIVE)
    came = [queue.enter(name, 0.0).seq for name in ("chat", "paint", "chat", "paint", "paint", "chat")]
    went = []
    while begun := queue.begin(0.0):
        (hold,) = begun
        went.append(hold.seq)
        queue.leave(hold.seq)
    assert went == came == sorted(came)


def served(queue: Queue) -> list[int]:
    """Everyone in the line, one after the other."""
    went = []
    while begun := queue.begin(0.0):
        for hold in begun:
            went.append(hold.seq)
            queue.leave(hold.seq)
    return went


INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


def test_more_urgent_requests_go_first_and_within_a_class_who_came_first() -> None:
    queue = line(*EXCLUSIVE)
    wanted = [("paint", BATCH), ("chat", Priority.NORMAL), ("paint", INTERACTIVE), ("paint", BATCH), ("chat", BATCH)]
    wanted += [("chat", INTERACTIVE), ("paint", Priority.NORMAL)]
    came = [queue.enter(name, 1.0, priority=priority) for name, priority in wanted]
    expected = [came[number].seq for number in (2, 5, 1, 6, 0, 3, 4)]
    assert [entry.seq for entry in queue.waiting()] == expected
    assert [queue.ahead(entry) for entry in came] == [4, 2, 0, 5, 6, 1, 3]
    assert served(queue) == expected
    assert [priority.rank for priority in Priority] == [0, 1, 2]


def test_nobody_who_waited_longer_than_a_head_start_is_overtaken() -> None:
    queue = line(*EXCLUSIVE)
    batch, young = queue.enter("paint", 0.0, priority=BATCH), queue.enter("chat", 1.0)
    first = queue.enter("chat", 2 * HEAD_START_SECONDS, priority=INTERACTIVE)
    late = queue.enter("chat", 2 * HEAD_START_SECONDS + 1.5, priority=INTERACTIVE)
    assert served(queue) == [young.seq, batch.seq, first.seq, late.seq]


def test_whoever_resumes_comes_directly_behind_the_one_it_yielded_to() -> None:
    queue = line(*EXCLUSIVE)
    first, urgent, late = (
        queue.enter("chat", 1.0),
        queue.enter("chat", 2.0, priority=INTERACTIVE),
        queue.enter("paint", 3.0, priority=INTERACTIVE),
    )
    back = queue.enter("paint", 9.0, priority=BATCH, behind=urgent.seq)
    again = queue.enter("paint", 9.0, behind=back.seq)
    assert [queue.waiting()[number].seq for number in range(5)] == [e.seq for e in (urgent, back, again, late, first)]
    assert (urgent.place, back.place, again.place) == ((2, 0), (2, back.seq), (2, again.seq))
    assert queue.begin(9.0)[0].seq == urgent.seq  # it is served, and has gone:
    same = queue.enter("paint", 9.0, behind=urgent.seq)
    queue.leave(urgent.seq)
    assert queue.enter("paint", 9.0, behind=urgent.seq).place[0] == same.place[0] == urgent.seq
    unknown = queue.enter("paint", 9.0, behind=99)
    assert unknown.place == (unknown.seq, 0)


def test_a_clock_that_was_read_earlier_overtakes_nobody() -> None:
    queue = line(*EXCLUSIVE)
    came = [queue.enter("paint", at).seq for at in (2.0, 1.0, 3.0)]
    assert served(queue) == came


def test_different_gpus_never_wait_for_each_other() -> None:
    queue = line(consumer("paint", gpus=(0,)), consumer("draw", gpus=(1,)))
    queue.enter("paint", 0.0)
    queue.enter("paint", 0.0)
    queue.enter("draw", 0.0)
    assert names(queue.begin(0.0)) == ["paint", "draw"]


def test_one_that_spans_two_gpus_joins_their_lines() -> None:
    queue = line(consumer("paint", gpus=(0,)), consumer("both", gpus=(0, 1)), consumer("draw", gpus=(1,)))
    paint = queue.enter("paint", 0.0)
    both = queue.enter("both", 0.0)
    queue.enter("draw", 0.0)
    assert go_live(queue) == ["paint"]
    queue.leave(paint.seq)
    assert go_live(queue) == ["both"]
    queue.leave(both.seq)
    assert go_live(queue) == ["draw"]


def test_4_a_consumer_out_of_service_keeps_its_place_and_waits() -> None:
    queue = line(*BESIDE)
    queue.take_out("chat")
    assert queue.is_unloading("chat")
    chat = queue.enter("chat", 0.0)
    assert queue.begin(0.0) == []
    assert queue.why(chat) is WaitingFor.PREPARING
    queue.put_back("chat")
    assert not queue.is_unloading("chat")
    assert names(queue.begin(0.0)) == ["chat"]


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
    queue.enter("chat", 0.0)
    queue.enter("hear", 0.0)
    (chat,) = queue.begin(0.0)
    assert queue.begin(0.0) == []
    chat.phase = Phase.GRANTING
    assert names(queue.begin(0.0)) == ["hear"]


def test_5_who_waits_for_a_slot_holds_back_whoever_comes_later_for_that_gpu() -> None:
    both = consumer("both", gpus=(0, 1), beside=["left", "right"])
    left, right = consumer("left", gpus=(0,), beside=["both"]), consumer("right", gpus=(1,), beside=["both"])
    queue = line(both, left, right)
    queue.enter("left", 0.0)
    (preparing,) = queue.begin(0.0)
    queue.enter("both", 0.0)  # GPU 0 is being prepared
    queue.enter("right", 0.0)  # GPU 1 is free, but `both` came first
    assert queue.begin(0.0) == []
    preparing.phase = Phase.LIVE
    (preparing,) = queue.begin(0.0)
    assert preparing.consumer == "both"
    preparing.phase = Phase.LIVE
    assert names(queue.begin(0.0)) == ["right"]


def test_who_leaves_the_line_is_never_begun_and_lets_others_pass() -> None:
    queue = line(*EXCLUSIVE)
    paint, chat = queue.enter("paint", 0.0), queue.enter("chat", 0.0)
    queue.leave(paint.seq)
    queue.leave(paint.seq)
    queue.leave(99)
    assert queue.waiting() == [chat]
    assert names(queue.begin(0.0)) == ["chat"]
    assert queue.waiting() == []


def test_why() -> None:
    queue = line(*BESIDE, consumer("paint"))
    chat = queue.enter("chat", 0.0)
    (hold,) = queue.begin(0.0)
    hear = queue.enter("hear", 0.0)
    assert queue.why(hear) is WaitingFor.PREPARING
    hold.phase = Phase.LIVE
    paint = queue.enter("paint", 0.0)
    queue.leave(hear.seq)
    late = queue.enter("hear", 0.0)
    assert queue.why(paint) is WaitingFor.HOLDER
    assert queue.why(late) is WaitingFor.AHEAD
    assert (queue.ahead(paint), queue.ahead(late)) == (0, 1)
    assert [h.seq for h in queue.blockers(queue.catalog.consumers["paint"])] == [chat.seq]
    assert queue.blockers(queue.catalog.consumers["hear"]) == []


def test_held_up_by_counts_whom_this_hold_alone_keeps_waiting() -> None:
    queue = line(consumer("hear", at_once=2, beside=["chat"]), consumer("chat", beside=["hear"]), consumer("paint"))
    queue.enter("hear", 0.0)
    (first,) = queue.begin(0.0)
    first.phase = Phase.LIVE
    queue.enter("paint", 0.0)
    queue.enter("chat", 0.0)  # behind paint, but not held up by hear
    assert queue.held_up_by(first) == 1
    queue.enter("hear", 0.0)
    assert queue.held_up_by(first) == 1  # one of two: hear's concurrency is not full
    full = line(consumer("hear", at_once=2))
    for _ in range(4):
        full.enter("hear", 0.0)
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
