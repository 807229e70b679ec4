"""Why somebody waits, and when the turn comes: what is told is what the order then does."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gpumgr.core.catalog import Consumer
from gpumgr.core.outlook import Expected, forecast, why
from gpumgr.core.quantum import FLOOR_SECONDS, PATIENCE, Quantum
from gpumgr.core.queue import Fifo, Phase, Policy, Queue, WaitingFor
from tests.worlds import catalog, consumer

CHAT, PAINT, VOICE = consumer("chat"), consumer("paint"), consumer("voice")
FILM = consumer("film", gpus=(1,))
USUAL = {"chat": 8.0, "paint": 15.0, "voice": 3.0}
SWAP = 4.0


class Bench:
    """A queue in which ``chat`` holds since 0.0."""

    def __init__(self, *consumers: Consumer, policy: Policy | None = None, usual: Mapping[str, float] = USUAL) -> None:
        self.queue = Queue(catalog(*(consumers or (CHAT, PAINT, VOICE))), policy or Quantum(), lambda _from, _to: SWAP)
        self.usual = usual
        self.over_by: dict[int, float] = {}
        self.since = dict.fromkeys(self.enter("chat"), 0.0)

    def enter(self, *names: str, at: float = 0.0) -> list[int]:
        entries = [self.queue.enter(name, at) for name in names]
        for hold in self.queue.begin(at):
            hold.phase = Phase.LIVE
        return [entry.seq for entry in entries]

    def foreseen(self, now: float, most: int = 200) -> list[Expected]:
        found = forecast(self.queue.fork(), now, self.usual.get, self.since, self.over_by, most)
        return [found[seq] for seq in sorted(found)]


def test_a_place_and_a_time_as_the_order_will_have_it() -> None:
    bench = Bench()
    bench.enter("paint", "chat", "chat", at=1.0)
    waiting = bench.queue.waiting()
    assert bench.foreseen(2.0) == [Expected(3, 24.0 + SWAP), Expected(1, 8.0), Expected(2, 16.0)]
    assert bench.queue.waiting() == waiting, "the forecast has changed the queue"
    assert bench.queue.look_again_at is None


def test_who_is_due_goes_before_those_who_overtook_it() -> None:
    bench = Bench(policy=Quantum(quantum_seconds=24.0))
    bench.enter("paint", *["chat"] * 5, at=1.0)
    places = [each.place for each in bench.foreseen(2.0)]
    assert places == [2, 1, 3, 4, 5, 6]


def test_fifo_has_a_forecast_too() -> None:
    bench = Bench(policy=Fifo())
    bench.enter("paint", "chat", at=1.0)
    assert [each.place for each in bench.foreseen(2.0)] == [1, 2]


def test_one_that_holds_for_longer_than_usual_is_taken_to_go_on_for_as_long() -> None:
    bench = Bench()
    bench.enter("chat", at=1.0)
    assert bench.foreseen(20.0) == [Expected(1, 40.0)]


def test_one_after_the_other_is_prepared_on_a_card() -> None:
    bench = Bench(CHAT, consumer("see", beside=["hear"]), consumer("hear", beside=["see"]))
    bench.enter("see", "hear", at=1.0)
    assert bench.foreseen(2.0) == [Expected(1, 8.0 + SWAP), Expected(2, 8.0 + SWAP)]


def test_nobody_is_taken_to_hold_for_longer_than_they_may() -> None:
    bench = Bench()
    bench.enter("chat", at=1.0)
    bench.over_by = dict.fromkeys(bench.since, 23.0)
    assert bench.foreseen(20.0) == [Expected(1, 23.0)]
    assert bench.foreseen(24.0) == [Expected(1, 24.0)]


def test_what_hangs_on_an_unknown_end_has_a_place_alone() -> None:
    bench = Bench(CHAT, PAINT, VOICE, FILM, usual={"paint": 15.0, "film": 5.0})
    (film,) = bench.enter("film")
    bench.since[film] = 0.0
    bench.enter("paint", "film", "voice", at=1.0)
    assert bench.foreseen(2.0) == [Expected(2, None), Expected(1, 5.0), Expected(3, None)]


def test_beyond_the_turns_that_are_played_there_is_a_place_alone() -> None:
    bench = Bench()
    bench.enter(*["chat"] * 4, at=1.0)
    assert bench.foreseen(2.0, most=2) == [Expected(1, 8.0), Expected(2, 16.0), Expected(3, None), Expected(4, None)]


def lingering() -> Bench:
    bench = Bench()
    for now in (1.0, 2.0, 3.0):
        (seq,) = bench.queue.holds
        bench.queue.leave(seq)
        bench.queue.begin(now - 0.5)
        bench.enter("chat", at=now)
    (seq,) = bench.queue.holds
    bench.queue.leave(seq)
    bench.queue.begin(4.0)
    bench.since.clear()
    return bench


def test_why_a_quantum_and_until_when() -> None:
    bench = Bench()
    bench.enter("paint", at=1.0)
    (paint,) = bench.queue.waiting()
    assert why(bench.queue, paint, 1.0).reason is WaitingFor.HOLDER, "nobody overtakes it yet"
    bench.enter("chat", at=2.0)
    found, due_at = why(bench.queue, paint, 2.0), 1.0 + PATIENCE * FLOOR_SECONDS
    assert (found.reason, found.until, found.whose, found.lingers) == (WaitingFor.QUANTUM, due_at, ("chat",), False)
    assert why(bench.queue, paint, due_at).reason is WaitingFor.HOLDER, "it is due: what runs is all it waits for"


def test_a_quantum_lasts_for_longer_where_more_requests_come() -> None:
    bench = Bench()
    bench.enter("paint", "chat", at=1.0)
    paint, _ = bench.queue.waiting()
    before = why(bench.queue, paint, 2.0).until
    bench.enter(*["chat"] * 20, at=3.0)
    after = why(bench.queue, paint, 3.0).until
    assert before is not None
    assert after is not None
    assert before < after


def test_who_came_earlier_overtakes_nobody() -> None:
    bench = Bench()
    bench.enter("chat", "paint", at=1.0)
    _, paint = bench.queue.waiting()
    assert why(bench.queue, paint, 2.0).reason is WaitingFor.HOLDER


def test_why_a_linger_and_until_when() -> None:
    bench = lingering()
    bench.enter("paint", at=4.1)
    (paint,) = bench.queue.waiting()
    found = why(bench.queue, paint, 4.1)
    assert (found.reason, found.lingers, found.whose) == (WaitingFor.QUANTUM, True, ("chat",))
    assert found.until == bench.queue.look_again_at == pytest.approx(5.2)
    (expected,) = bench.foreseen(4.1)
    assert expected.start_at == pytest.approx(5.2 + SWAP)


def test_why_without_a_quantum() -> None:
    bench = Bench(policy=Fifo())
    bench.enter("paint", "chat", at=1.0)
    paint, chat = bench.queue.waiting()
    assert [why(bench.queue, each, 2.0).reason for each in (paint, chat)] == [WaitingFor.HOLDER, WaitingFor.HOLDER]
