"""Who may be on the card together by size: the numbers are those of gpumgr/core/sharing.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumgr.core.catalog import Catalog, Consumer, GpuRef
from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Fifo, Hold, Phase, Policy, Queue, WaitingFor
from gpumgr.core.sharing import crowded, intrudes, leaving_for
from tests.worlds import catalog, consumer

LENDS = 23500


def sized(name: str, mib: int, at_once: int = 1) -> Consumer:
    return consumer(name, mib, by_size=True, at_once=at_once)


CHAT, VOICE, PAINT = sized("chat", 12000), sized("voice", 3000, at_once=2), sized("paint", 14000)
HEAR = sized("hear", 7000)
ALL = (CHAT, VOICE, PAINT, HEAR)


def lending(*consumers: Consumer, mib: int = LENDS) -> Catalog:
    return replace(catalog(*consumers), lends_mib={0: mib, 1: mib})


def line(*consumers: Consumer, policy: Policy | None = None) -> Queue:
    return Queue(lending(*consumers), policy or Fifo())


def go(queue: Queue, now: float = 0.0) -> list[str]:
    """Whoever has the turn goes through its preparation at once."""
    found = []
    while begun := queue.begin(now):
        for hold in begun:
            hold.phase = Phase.LIVE
            found.append(hold.consumer)
    return found


def hold_of(queue: Queue, name: str) -> Hold:
    return queue.holds_of(name)[0]


def test_both_must_say_so_and_have_a_size() -> None:
    assert lending(*ALL).mates["chat"] == {"voice", "paint", "hear"}
    assert not lending(*ALL).excluded["chat"]
    for other in (
        consumer("voice", 3000),
        replace(VOICE, unsized=True),
        replace(VOICE, gpus=("GPU-x",)),
        replace(VOICE, gpus=(1,)),
    ):
        known = lending(CHAT, other)
        assert not known.mates["chat"]
        assert known.exclude("chat", "voice") is (other.gpus != (1,))
    pair = lending(
        replace(CHAT, can_coexist_with=frozenset({"voice"})), replace(VOICE, can_coexist_with=frozenset({"chat"}))
    )
    assert not pair.mates["chat"], "who was named coexists whatever the sizes are"
    assert pair.may_coexist("chat", "voice")


def test_1_they_run_side_by_side_while_the_sizes_fit() -> None:
    queue = line(*ALL)
    for name in ("chat", "voice", "hear", "paint"):
        queue.enter(name, 0.0)
    assert go(queue) == ["chat", "voice", "hear"]  # 22000
    (waits,) = queue.waiting()
    assert queue.why(waits) is WaitingFor.HOLDER
    assert [hold.consumer for hold in queue.blockers(PAINT)] == ["chat", "voice", "hear"]
    assert [queue.held_up_by(hold_of(queue, name)) for name in ("chat", "voice", "hear")] == [1, 1, 1]
    queue.leave(hold_of(queue, "hear").seq)
    assert [hold.consumer for hold in queue.blockers(PAINT)] == ["chat"], "paint fits beside voice"
    assert [queue.held_up_by(hold_of(queue, name)) for name in ("chat", "voice")] == [1, 0]
    queue.enter("hear", 0.0)
    assert go(queue) == [], "it would hold paint up beside voice: 24000 of 23500"
    queue.leave(hold_of(queue, "chat").seq)
    assert go(queue) == ["paint"]
    queue.leave(hold_of(queue, "voice").seq)
    assert go(queue) == ["hear"]


def test_1_a_card_that_nobody_has_read_is_not_shared() -> None:
    assert crowded("voice", ["chat"], catalog(*ALL))
    assert not crowded("voice", [], catalog(*ALL))


def test_1_one_that_is_too_large_alone_is_not_the_line_s_to_hold_back() -> None:
    assert not crowded("paint", ["voice"], lending(*ALL, mib=13000))


def test_1_on_each_gpu() -> None:
    span = consumer("span", (4000, 20000), gpus=(0, 1), by_size=True)
    far = consumer("far", 5000, gpus=(1,), by_size=True)
    known = lending(span, far, VOICE)
    assert crowded("span", ["far"], known)
    assert crowded("far", ["span"], known)
    assert not crowded("voice", ["span", "far"], known)


def test_2_nobody_goes_ahead_of_whom_they_would_hold_up() -> None:
    queue = line(*ALL)
    queue.enter("chat", 0.0)
    assert go(queue) == ["chat"]
    queue.enter("paint", 0.0)  # waits for chat: 26000
    queue.enter("voice", 0.0)  # beside either of them
    assert go(queue) == ["voice"]
    big = queue.enter("hear", 0.0)  # beside chat and voice, but not beside paint and voice
    assert go(queue) == []
    assert queue.why(big) is WaitingFor.AHEAD
    queue.leave(hold_of(queue, "chat").seq)
    assert go(queue) == ["paint"]


def test_2_a_large_one_is_not_starved_by_small_ones() -> None:
    """Some film is always there that fits beside chat, and not beside paint, which came before it."""
    film = sized("film", 10000, at_once=2)
    queue = line(CHAT, PAINT, film)
    for name in ("film", "chat", "paint"):
        queue.enter(name, 0.0)
    assert go(queue) == ["film", "chat"]
    served = []
    for _ in range(3):
        queue.enter("film", 0.0)
        served += go(queue)
        queue.leave(hold_of(queue, "chat").seq if not served and queue.holds_of("chat") else 0)
        queue.leave(queue.holds_of("film")[0].seq if queue.holds_of("film") else 0)
    assert served[0] == "paint"


NAMES = "abcde"


@given(st.lists(st.integers(1, 12), min_size=3, max_size=5), st.integers(12, 30), st.data())
def test_2_whatever_goes_together_leaves_room(sizes: list[int], lends: int, data: st.DataObject) -> None:
    """Against the definition: with no feasible set of those ahead is the newcomer too much."""
    known = lending(*(sized(name, mib) for name, mib in zip(NAMES, sizes, strict=False)), mib=lends)
    new, *others = known.consumers
    ahead = data.draw(st.sets(st.sampled_from(others), min_size=1))
    mib = {name: each.needs_mib(0) for name, each in known.consumers.items()}
    feasible = [some for some in _subsets(ahead) if sum(mib[name] for name in some) <= lends]
    expected = any(sum(mib[name] for name in some) + mib[new] > lends for some in feasible)
    assert crowded(new, ahead, known) is expected


def _subsets(names: set[str]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, size) for size in range(len(names) + 1)))


def test_3_as_many_leave_as_makes_room() -> None:
    known = lending(*ALL)
    assert leaving_for("paint", ["voice", "hear"], known) == ["voice"]
    assert leaving_for("paint", ["hear", "voice"], known) == ["hear"]
    assert leaving_for("paint", ["voice", "chat"], known) == ["voice", "chat"]
    assert leaving_for("voice", ["hear", "chat"], known) == []


@pytest.mark.parametrize(("newcomer", "waits"), [("voice", False), ("hear", False), ("paint", True)])
def test_3_a_swap_is_needed_only_where_the_sizes_do_not_fit(newcomer: str, waits: bool) -> None:
    """chat keeps the card for its quantum; who fits beside it does not wait for that."""
    queue = line(*ALL, policy=Quantum(quantum_seconds=60))
    queue.enter("chat", 0.0)
    assert go(queue) == ["chat"]
    queue.leave(hold_of(queue, "chat").seq)
    queue.enter("chat", 1.0)
    queue.enter(newcomer, 1.0)
    assert go(queue, 1.0) == ["chat"] + ([] if waits else [newcomer])
    queue.enter("chat", 2.0)
    queue.leave(hold_of(queue, "chat").seq)
    assert go(queue, 2.0) == ["chat"]
    queue.leave(hold_of(queue, "chat").seq)
    queue.enter("chat", 3.0)
    assert go(queue, 100.0) == ([newcomer] if waits else ["chat"]), "its quantum is over"


def test_3_who_sends_others_away_begins_a_turn_of_its_own() -> None:
    queue = line(*ALL, policy=Quantum())
    queue.enter("chat", 0.0)
    assert go(queue) == ["chat"]
    queue.leave(hold_of(queue, "chat").seq)
    queue.enter("voice", 5.0)
    assert go(queue, 5.0) == ["voice"]
    assert queue.stays["voice"].since == 0.0, "it joined"
    queue.leave(hold_of(queue, "voice").seq)
    queue.take_out("voice")
    queue.enter("paint", 30.0)
    assert go(queue, 30.0) == ["paint"]
    assert queue.stays["paint"].since == 30.0


def test_4_who_fits_beside_what_was_granted_is_no_intruder() -> None:
    known = lending(*ALL)

    def judged(held: Mapping[str, int], holders: Sequence[str] = ("paint",)) -> list[str]:
        there: dict[tuple[str, GpuRef], int] = {(name, 0): mib for name, mib in held.items()}
        return [name for name in held if intrudes(name, holders[0], holders, there, known)]

    assert judged({"chat": 9500}) == []
    assert judged({"chat": 9501}) == ["chat"]
    assert judged({"voice": 3000, "hear": 7000}) == ["voice", "hear"]
    assert judged({"voice": 3000, "hear": 6000}) == []
    assert judged({"hear": 7000}, ["paint", "voice"]) == ["hear"]
    assert not intrudes("chat", "other", ["other"], {("chat", 0): 99999}, lending(*ALL, consumer("other", 1)))


def test_a_copy_of_the_line_is_asked_and_nothing_changes() -> None:
    """With an order that goes by stays and the time: voice needs no swap, paint waits for the end of a quantum."""
    queue = line(*ALL, policy=Quantum(quantum_seconds=60))
    queue.enter("chat", 0.0)
    assert go(queue) == ["chat"]
    queue.enter("paint", 1.0)
    before = (dict(queue.stays), len(queue.waiting()), {seq: hold.phase for seq, hold in queue.holds.items()})
    for name, expected in (("voice", ["voice"]), ("paint", [])):
        asked = queue.copy()
        entry = asked.enter(name, 2.0)
        assert go(asked, 2.0) == expected
        assert asked.is_waiting(entry) is not bool(expected)
        asked.leave(hold_of(asked, "chat").seq)
        assert go(asked, 100.0)[:1] == ["paint"]
    after = (dict(queue.stays), len(queue.waiting()), {seq: hold.phase for seq, hold in queue.holds.items()})
    assert after == before
    assert queue.number() == 3, "its numbers are its own"
