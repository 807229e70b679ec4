"""The order of turns: the numbers are those of gpumgr/core/quantum.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpumgr.core.catalog import Consumer
from gpumgr.core.quantum import (
    FACTOR,
    FLOOR_SECONDS,
    GRACE_SECONDS,
    PATIENCE,
    URGENT,
    WAITING_EACH,
    Quantum,
)
from gpumgr.core.queue import HEAD_START_SECONDS, Entry, Phase, Policy, Priority, Queue, Stay, Turns
from gpumgr.simulate.bound import beyond_promise
from gpumgr.simulate.engine import Card, Run
from gpumgr.simulate.peers import HeadAge
from gpumgr.simulate.workload import Arrival, Kind
from tests.worlds import catalog, consumer

SWAP = 10.0
MANY = int(FACTOR * WAITING_EACH)
LONGEST = FACTOR * 2 * SWAP


class Bench:
    """A queue under a clock that the test moves; whoever has the turn is live at once."""

    def __init__(self, *consumers: Consumer, policy: Policy | None = None) -> None:
        self.queue = Queue(catalog(*consumers), policy or Quantum(), lambda _from, _to: SWAP)
        self.now = 0.0

    def ask(self, *names: str, priority: Priority = Priority.NORMAL) -> list[Entry]:
        return [self.queue.enter(name, self.now, priority=priority) for name in names]

    def go(self) -> list[str]:
        went = []
        while begun := self.queue.begin(self.now):
            for hold in begun:
                hold.phase = Phase.LIVE
                went.append(hold.consumer)
        return went

    def end(self) -> None:
        for seq in list(self.queue.holds):
            self.queue.leave(seq)

    def serve(self, name: str, seconds: float = 1.0) -> None:
        """One request from its arrival to its end, with nobody else there."""
        self.ask(name)
        assert self.go() == [name]
        self.now += seconds
        self.end()
        assert self.go() == []


THREE = (consumer("chat"), consumer("voice"), consumer("paint"))


def full(bench: Bench, name: str) -> None:
    """So many wait that a quantum is as long as it gets."""
    bench.ask(*[name] * MANY)


def test_6_within_one_consumer_first_come_first_served() -> None:
    bench = Bench(*THREE)
    came = [entry.seq for entry in bench.ask("chat", "voice", "chat", "voice", "chat")]
    went = []
    while bench.go():
        went += list(bench.queue.holds)
        bench.now += 1
        bench.end()
    assert went == [came[0], came[2], came[4], came[1], came[3]]


def test_7_the_resident_goes_ahead_of_who_needs_a_swap_until_its_quantum_is_over() -> None:
    bench = Bench(*THREE)
    bench.ask("chat")
    assert bench.go() == ["chat"]
    bench.ask("voice")
    full(bench, "chat")
    bench.now = LONGEST - 1
    bench.end()
    assert bench.go() == ["chat"]
    bench.ask("chat")
    bench.now = LONGEST
    bench.end()
    assert bench.go() == ["voice"]


def test_7_a_quantum_is_counted_from_the_arrival_of_who_waits() -> None:
    bench = Bench(*THREE)
    bench.ask("chat")
    assert bench.go() == ["chat"]
    bench.now = 1000
    bench.ask("voice")
    full(bench, "chat")
    bench.end()
    assert bench.go() == ["chat"]
    bench.ask("chat")
    bench.now = 1000 + LONGEST
    bench.end()
    assert bench.go() == ["voice"]


def test_7_a_turn_that_has_just_begun_lasts_for_less_than_who_comes_then_has_to_wait() -> None:
    turn = 2 / WAITING_EACH
    assert turn < PATIENCE
    for came_at, seconds in ((0.0, 100.0 + turn * 2 * SWAP), (100.0, 100.0 + PATIENCE * 2 * SWAP)):
        bench = Bench(*THREE, policy=Quantum(floor_seconds=2 * SWAP))
        bench.queue.stays["chat"] = Stay(since=100.0)
        bench.now = came_at
        bench.ask("voice")
        bench.now = seconds - 1
        bench.ask("chat")
        assert bench.go() == ["chat"]
        bench.end()
        bench.now = seconds
        bench.ask("chat")
        assert bench.go() == ["voice"]


def test_7_who_is_held_up_by_younger_ones_alone_goes_when_it_is_due_and_not_when_somebody_ends() -> None:
    hear, see = consumer("hear", beside=["chat", "see"]), consumer("see", beside=["hear", "voice"])
    chat, voice = consumer("chat", beside=["hear"]), consumer("voice", beside=["see"])
    bench = Bench(hear, chat, see, voice)
    bench.queue._swap_seconds = lambda *pair: 4 * SWAP if set(pair) == {"chat", "see"} else 0.0
    bench.ask("hear", "chat")
    assert bench.go() == ["hear", "chat"]
    bench.now = 1.0
    bench.ask("see", "voice", "chat")
    assert bench.go() == []
    bench.now = PATIENCE * FLOOR_SECONDS + 1.0  # voice is due and waits for hear; the other chat waits for voice
    bench.queue.leave(next(seq for seq, hold in bench.queue.holds.items() if hold.consumer == "chat"))
    assert bench.go() == []
    assert bench.queue.look_again_at == PATIENCE * 8 * SWAP + 1.0
    bench.now = bench.queue.look_again_at
    assert bench.go() == ["see"]


def test_7_nor_when_a_preparation_ends_that_somebody_younger_waits_for() -> None:
    both, right = consumer("both", gpus=(0, 1), beside=["right"]), consumer("right", gpus=(1,), beside=["both"])
    bench = Bench(consumer("left"), both, right)
    bench.ask("both")
    assert bench.go() == ["both"]
    bench.ask("right")
    (preparing,) = bench.queue.begin(0.0)
    bench.ask("left")
    bench.queue.leave(1)
    bench.ask("both")
    assert bench.queue.begin(0.0) == []
    assert preparing.phase is Phase.PREPARING
    bench.now = bench.queue.look_again_at or 0.0
    assert bench.now == PATIENCE * 2 * SWAP
    assert bench.go() == ["left"]


def test_7_it_has_to_send_away_the_last_of_several() -> None:
    left, right = consumer("left", gpus=(0,)), consumer("right", gpus=(1,))
    bench = Bench(left, right, consumer("both", gpus=(0, 1)))
    bench.ask("left")
    assert bench.go() == ["left"]
    bench.now = LONGEST - 1
    bench.ask("right")
    assert bench.go() == ["right"]
    bench.ask("both")
    full(bench, "left")
    full(bench, "right")
    for bench.now in (LONGEST - 0.5, 2 * LONGEST - 2):
        bench.end()
        assert bench.go() == ["left", "right"]
        bench.ask("left", "right")
    bench.now = 2 * LONGEST
    bench.end()
    assert bench.go() == ["both"]


def test_8_when_a_turn_is_over_the_oldest_is_next() -> None:
    bench = Bench(*THREE)
    bench.ask("chat", "voice", "paint", "chat")
    assert bench.go() == ["chat"]
    bench.now = LONGEST
    bench.end()
    assert bench.go() == ["voice"]
    bench.end()
    assert bench.go() == ["paint"]  # voice has nobody left, and chat is younger


def test_8_one_that_is_due_goes_ahead_of_younger_ones_only() -> None:
    bench = Bench(*THREE)
    bench.ask("chat")
    assert bench.go() == ["chat"]
    older, _ = bench.ask("chat", "voice")
    bench.now = LONGEST
    bench.end()
    assert bench.go() == ["chat"]
    assert list(bench.queue.holds) == [older.seq]


def test_8_who_is_resident_goes_first_where_nobody_waits_for_long() -> None:
    bench = Bench(*THREE)
    bench.serve("chat")
    bench.ask("voice", "chat")
    assert bench.go() == ["chat"]


def test_8_a_shorter_quantum_overtakes_nobody() -> None:
    costs = {"paint": 100.0, "voice": 1.0, "chat": 1.0}
    queue = Queue(catalog(*THREE), Quantum(), lambda _from, to: costs[to])
    queue.enter("chat", 0.0)
    (hold,) = queue.begin(0.0)
    hold.phase = Phase.LIVE
    for name in ("paint", "voice", "chat"):
        queue.enter(name, 0.0)
    queue.leave(hold.seq)
    now = 60.0  # voice is due by its own costs, paint is not
    assert [hold.consumer for hold in queue.begin(now)] == ["chat"]


def test_8_one_of_those_that_need_a_swap_goes() -> None:
    line = {"voice": {1: Entry(1, "voice")}, "paint": {2: Entry(2, "paint")}}
    stays = {"chat": Stay(since=0.0, idle_since=1.0)}
    found = Quantum().turns(line, [], catalog(*THREE), 2.0, stays, lambda _from, _to: SWAP)
    assert found == Turns([Entry(1, "voice")], due_at=dict.fromkeys((1, 2), PATIENCE * 2 * SWAP))


def test_7_a_turn_lasts_however_long_who_waits_has_waited() -> None:
    bench = Bench(*THREE)
    bench.ask("chat", *["voice"] * MANY, "paint")
    assert bench.go() == ["chat"]
    bench.now = 10 * LONGEST
    bench.ask("voice")
    bench.end()
    assert bench.go() == ["voice"]
    for _ in range(MANY):  # also the one that is younger than paint
        bench.now += 1
        bench.end()
        assert bench.go() == ["voice"]
    bench.end()
    assert bench.go() == ["paint"]


def test_who_was_sent_away_is_on_the_card_no_more() -> None:
    bench = Bench(*THREE)
    bench.serve("chat")
    bench.serve("voice")
    bench.ask("paint", "voice")
    assert bench.go() == ["voice"]


def test_who_waits_on_the_card_is_not_idle() -> None:
    bench = Bench(consumer("chat", beside=["hear"]), consumer("hear", beside=["chat"]))
    bench.serve("chat")
    bench.now += 5
    bench.ask("hear")
    assert len(bench.queue.begin(bench.now)) == 1  # and is being prepared: chat has to wait
    for _ in range(2):
        bench.ask("chat")
        bench.now += 1
        assert bench.queue.begin(bench.now) == []
    assert bench.queue.stays["chat"].gaps == (5.0,)


@pytest.mark.parametrize(
    ("waiting", "policy", "seconds"),
    [
        (MANY, Quantum(), LONGEST),
        (3 * MANY, Quantum(), LONGEST),
        (int(6 * WAITING_EACH), Quantum(), 6 * 2 * SWAP),
        (2, Quantum(), PATIENCE * 2 * SWAP),
        (MANY, Quantum(factor=1.0), 2 * SWAP),
        (MANY, Quantum(floor_seconds=60.0), FACTOR * 60.0),
        (MANY, Quantum(quantum_seconds=7.0), 7.0),
    ],
)
def test_9_a_quantum_follows_the_swaps_and_how_many_wait(waiting: int, policy: Quantum, seconds: float) -> None:
    bench = Bench(*THREE, policy=policy)
    bench.ask("chat")
    assert bench.go() == ["chat"]
    bench.ask("voice", *["chat"] * (waiting - 1))
    bench.now = seconds - 0.01
    bench.end()
    assert bench.go() == ["chat"]
    bench.ask("chat")
    bench.now = seconds
    bench.end()
    assert bench.go() == ["voice"]


@pytest.mark.parametrize(
    ("gaps", "times"),
    [
        ((0.0, 0.0, 0.0), FACTOR),
        ((0.0, 4.0, 4.0), FACTOR),
        ((0.0, 6.0, 6.0), PATIENCE),  # more than a swap is worth waiting for
        ((0.0, 0.0, 6.0), PATIENCE),  # not this time
        ((9.0, 9.0, 0.0), PATIENCE),  # this time, but not usually
        ((0.0,), PATIENCE),
    ],
)
def test_9_a_quantum_is_the_longest_against_who_asks_again_at_once(gaps: tuple[float, ...], times: float) -> None:
    bench = Bench(*THREE)
    bench.serve("chat")
    bench.queue.stays["voice"] = Stay(gaps=gaps)
    came_at = bench.now
    bench.ask("voice", "chat")
    bench.now = came_at + times * 2 * SWAP - 1
    assert bench.go() == ["chat"]
    bench.ask("chat")
    bench.end()
    bench.now += 1
    assert bench.go() == ["voice"]


def cheap(leaving: str, coming: str) -> float:
    """Between these two; not where painting comes in."""
    return 1.0 if {leaving, coming} == {"chat", "voice"} else SWAP


@pytest.mark.parametrize(("beside", "times"), [([], PATIENCE), (["paint"], FACTOR)])
def test_9_who_asks_again_at_once_has_at_stake_what_all_who_wait_cost(beside: list[str], times: float) -> None:
    bench = Bench(*THREE)
    bench.queue._swap_seconds = cheap
    bench.serve("chat")
    bench.queue.stays["voice"] = Stay(gaps=(1.0, 1.0))
    came_at = bench.now
    bench.ask("voice", *beside, "chat")
    bench.now = came_at + times * FLOOR_SECONDS - 1
    assert bench.go() == ["chat"]
    bench.ask("chat")
    bench.end()
    bench.now += 1
    assert bench.go() == ["voice"]


def returns_after(bench: Bench, name: str, *gaps: float) -> None:
    for gap in gaps:
        bench.serve(name)
        bench.now += gap
    bench.serve(name)


def test_10_who_usually_comes_back_soon_keeps_the_card_for_a_moment() -> None:
    bench = Bench(*THREE)
    returns_after(bench, "chat", 1.0, 2.0, 3.0)
    idle_since = bench.now
    bench.ask("voice")
    assert bench.go() == []
    assert bench.queue.look_again_at == idle_since + 2 * 2.0 + GRACE_SECONDS
    bench.now += 2
    bench.ask("chat")
    assert bench.go() == ["chat"]
    bench.end()
    assert bench.go() == []
    bench.now = bench.queue.look_again_at or 0
    assert bench.go() == ["voice"]
    assert bench.queue.look_again_at is None


def test_10_who_usually_comes_back_late_goes_at_once() -> None:
    bench = Bench(*THREE)
    returns_after(bench, "chat", 1.0, 6.0, 7.0)
    bench.ask("voice")
    assert bench.go() == ["voice"]


@pytest.mark.parametrize(("asked", "waited_for"), [(["voice"], False), (["voice", "paint"], True)])
def test_10_who_leaves_comes_back_after_all_who_wait(asked: list[str], waited_for: bool) -> None:
    """It is not worth a moment to save a cheap swap alone."""
    bench = Bench(*THREE)
    bench.queue._swap_seconds = cheap
    returns_after(bench, "chat", 1.0, 1.0, 1.0)
    bench.ask(*asked)
    assert bench.go() == ([] if waited_for else ["voice"])


def test_10_nobody_knows_what_is_at_stake_with_who_was_never_seen() -> None:
    bench = Bench(*THREE)
    bench.queue._swap_seconds = lambda *pair: 1.0 if "paint" not in pair else None
    returns_after(bench, "chat", 1.0, 1.0, 1.0)
    bench.ask("voice", "paint")
    assert bench.go() == ["voice"]


def test_10_nothing_is_expected_of_who_was_hardly_seen() -> None:
    bench = Bench(*THREE)
    returns_after(bench, "chat", 1.0)
    bench.ask("voice")
    assert bench.go() == ["voice"]


def test_10_nobody_waits_who_needs_no_swap() -> None:
    bench = Bench(consumer("chat", beside=["hear"]), consumer("hear", beside=["chat"]), consumer("paint", gpus=(1,)))
    returns_after(bench, "chat", 0.0, 0.0, 0.0)
    bench.ask("hear", "paint")
    assert bench.go() == ["hear", "paint"]


def test_10_nobody_waits_longer_than_until_they_are_due() -> None:
    bench = Bench(*THREE, policy=Quantum(quantum_seconds=3.0, linger_share=1.0))
    returns_after(bench, "chat", 5.0, 5.0, 5.0)
    bench.ask("voice")
    assert bench.go() == []
    assert bench.queue.look_again_at == pytest.approx(bench.now + 3.0 * PATIENCE / FACTOR)


def test_10_a_second_request_of_who_waits_is_no_return() -> None:
    bench = Bench(*THREE)
    bench.serve("chat")
    bench.now += 5
    bench.ask("voice", "chat")
    bench.queue.take_out("chat")  # it cannot be served yet
    assert bench.go() == ["voice"]
    bench.ask("chat", "chat")
    assert bench.queue.stays["chat"].gaps == (5.0,)


def test_11_who_joins_the_card_joins_the_turn() -> None:
    beside = (consumer("chat", beside=["hear"]), consumer("hear", beside=["chat"]))
    bench = Bench(*beside, consumer("paint"))
    bench.ask("chat")
    assert bench.go() == ["chat"]
    bench.ask("paint")
    full(bench, "chat")
    bench.now = LONGEST - 1
    bench.ask("hear")  # needs no swap, as paint does
    assert bench.go() == ["hear"]
    bench.ask("hear")
    bench.now = LONGEST
    bench.end()
    assert bench.go() == ["paint"]


def test_different_gpus_are_independent() -> None:
    bench = Bench(consumer("chat"), consumer("voice"), consumer("draw", gpus=(1,)), consumer("write", gpus=(1,)))
    bench.ask("chat", "voice", "draw")
    assert bench.go() == ["chat", "draw"]
    full(bench, "write")
    bench.ask("chat")
    bench.now = LONGEST / 2  # long for two that wait for the first card
    bench.end()
    assert bench.go()[0] == "voice"


def test_whoever_was_unloaded_stays_no_more() -> None:
    bench = Bench(*THREE)
    bench.serve("chat")
    bench.queue.take_out("chat")
    bench.queue.put_back("chat")
    bench.ask("voice", "chat")
    assert bench.go() == ["voice"]


@pytest.mark.parametrize("priority", list(Priority))
def test_7_among_the_equally_urgent_nobody_has_a_head_start(priority: Priority) -> None:
    bench = Bench(*THREE)
    bench.serve("chat")
    bench.now = 1000
    bench.ask("voice", "chat", priority=priority)
    bench.now = 1000 + PATIENCE * 2 * SWAP - 1
    assert bench.go() == ["chat"]
    bench.ask("chat", priority=priority)
    bench.end()
    bench.now += 1
    assert bench.go() == ["voice"]


@pytest.mark.parametrize(("priority", "went"), [(Priority.INTERACTIVE, ["voice"]), (Priority.NORMAL, [])])
def test_7_who_has_a_head_start_waits_for_nobody_to_come_back(priority: Priority, went: list[str]) -> None:
    bench = Bench(*THREE)
    bench.now = 1000
    returns_after(bench, "chat", 1.0, 1.0, 1.0)
    bench.queue.stays["chat"] = replace(bench.queue.stays["chat"], since=bench.now - HEAD_START_SECONDS)
    bench.ask("voice", priority=priority)
    assert bench.go() == went


@pytest.mark.parametrize(
    ("asked", "waiting", "seconds"),
    [
        (Priority.INTERACTIVE, Priority.NORMAL, URGENT * 2 * SWAP),
        (Priority.NORMAL, Priority.BATCH, URGENT * 2 * SWAP),
        (Priority.NORMAL, Priority.NORMAL, LONGEST),
        (Priority.INTERACTIVE, Priority.INTERACTIVE, LONGEST),
        (Priority.BATCH, Priority.BATCH, LONGEST),
    ],
)
def test_9_a_quantum_is_short_for_who_is_more_urgent(asked: Priority, waiting: Priority, seconds: float) -> None:
    bench = Bench(*THREE)
    bench.ask("chat", priority=waiting)
    assert bench.go() == ["chat"]
    bench.ask("voice", priority=asked)
    bench.ask(*["chat"] * MANY, priority=waiting)
    bench.now = seconds - 1
    bench.end()
    assert bench.go() == ["chat"]
    bench.now = seconds
    bench.end()
    assert bench.go() == ["voice"]


# -- the bound ------------------------------------------------------------------------------------------------

SECONDS = st.floats(0.0, 40.0, allow_nan=False).map(lambda seconds: round(seconds, 1))


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Kind], list[Arrival], Quantum]:
    kinds = [Kind(name, draw(SECONDS), 1.0, 1.0) for name in "abcd"[: draw(st.integers(2, 4))]]
    at, arrivals = 0.0, []
    classes = draw(st.sampled_from([[Priority.NORMAL], list(Priority)]))
    for _ in range(draw(st.integers(1, 60))):
        at += draw(st.sampled_from([0.0, 0.0, 0.5, 3.0, 30.0]))
        name, priority = draw(st.sampled_from(kinds)).name, draw(st.sampled_from(classes))
        arrivals.append(Arrival(at, name, draw(SECONDS), priority))
    policy = Quantum(
        quantum_seconds=draw(st.sampled_from([None, None, 0.0, 5.0, 60.0])),
        factor=draw(st.sampled_from([1.0, 6.0])),
        floor_seconds=draw(st.sampled_from([0.0, 60.0])),
        linger_share=draw(st.sampled_from([0.0, 0.5, 5.0])),
    )
    return kinds, arrivals, policy


TWO = [Kind("a", 0.0, 1.0, 1.0), Kind("b", 0.0, 1.0, 1.0)]
AT_ONCE = TWO, [Arrival(0.0, "a", 0.0)] * 2, Quantum()
HELD = (
    TWO,
    [Arrival(0.0, "a", 99.0), Arrival(1.0, "a", 1.0, Priority.INTERACTIVE)],
    Quantum(factor=1.0, floor_seconds=0.0),
)
BATCHES = (
    TWO,
    [Arrival(0.0, "b", 1.0, Priority.INTERACTIVE)]
    + [Arrival(0.0, name, 1.0, Priority.BATCH) for name in ("a", "b", "b")],
    Quantum(factor=1.0, floor_seconds=0.0),
)


@settings(max_examples=100, deadline=None)
@given(workloads())
@example(BATCHES)  # by others that are no more urgent than itself
@example(AT_ONCE)  # the second one ends at the instant at which the first one came
@example(HELD)  # by one that is less urgent
def test_nobody_waits_longer_than_the_bound(workload: tuple[list[Kind], list[Arrival], Quantum]) -> None:
    kinds, arrivals, policy = workload
    run = Card(policy, kinds).play(arrivals)
    assert len(run.requests) == len(arrivals)
    assert all(request.ended_at <= run.ended_at for request in run.requests), "somebody was never served"
    assert run.over_commits == 0
    assert beyond_promise(run, policy, kinds) == 0


def starving(policy: Policy) -> Run:
    """A voice among chats that never end."""
    chats = [Arrival(float(second), "chat", 1.0) for second in range(600)]
    arrivals = sorted([*chats, Arrival(10.5, "voice", 1.0)], key=lambda arrival: arrival.at)
    return Card(policy, [Kind("chat", 3.0, 1.0, 0.9), Kind("voice", 1.0, 1.0, 0.1)]).play(arrivals)


def test_an_order_without_a_bound_does_not_keep_it() -> None:
    kinds = [Kind("chat", 3.0, 1.0, 0.9), Kind("voice", 1.0, 1.0, 0.1)]
    assert beyond_promise(starving(Quantum()), Quantum(), kinds) == 0
    assert beyond_promise(starving(HeadAge()), Quantum(), kinds) == 1


# -- what deciding costs ----------------------------------------------------------------------------------------


def test_a_long_line_costs_no_more_than_its_heads() -> None:
    asked = []

    class Counted(dict[int, Entry]):
        def values(self):  # type: ignore[no-untyped-def]
            for entry in super().values():
                asked.append(entry)
                yield entry

    queued = {"chat": Counted({seq: Entry(seq, "chat") for seq in range(1, 5000)})}
    Quantum().turns(queued, [], catalog(*THREE), 0.0, {}, lambda _from, _to: SWAP)
    assert len(asked) <= 2
