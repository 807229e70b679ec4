"""The simulator: what it plays, what it counts, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpumgr import cli
from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Fifo, Policy
from gpumgr.simulate.bound import least_longest_wait, least_mean_wait
from gpumgr.simulate.compare import (
    AFFINITY,
    FIFO,
    ORDERS,
    OURS,
    compare,
    one_client_each,
    open_loop,
    play,
    two_agents,
    urgent,
)
from gpumgr.simulate.engine import Card
from gpumgr.simulate.figures import figures_of
from gpumgr.simulate.peers import HeadAge, SkipLimit
from gpumgr.simulate.report import table
from gpumgr.simulate.sharing import SHARING, SIZES_MIB, LeastRecentlyUsed, Loads, choices, loads
from gpumgr.simulate.workload import CASE, Arrival, Kind, from_trace, mean_service_seconds, poisson, read_trace

KINDS = (Kind("chat", 3.0, 8.0, 0.5), Kind("paint", 12.0, 15.0, 0.5))
ROWS = [
    f"2023-11-16 18:15:{second:02d}.1234567,10,{tokens}" for second, tokens in ((0, 100), (1, 1), (2, 300), (40, 9))
]


def served(policy: Policy, *arrivals: tuple[float, str, float]) -> list[tuple[str, float, float]]:
    run = Card(policy, KINDS).play([Arrival(*each) for each in arrivals])
    return [(request.consumer, request.granted_at, request.ended_at) for request in run.requests]


def test_who_is_not_on_the_card_is_loaded_first_and_waits_for_that() -> None:
    assert served(Fifo(), (0.0, "chat", 5.0), (1.0, "chat", 2.0), (4.0, "paint", 1.0)) == [
        ("chat", 3.0, 8.0),
        ("chat", 8.0, 10.0),
        ("paint", 22.0, 23.0),
    ]


def test_the_orders_differ_as_they_say() -> None:
    arrivals = [(0.0, "chat", 1.0), (0.5, "paint", 1.0), *((float(second), "chat", 1.0) for second in range(1, 40))]
    orders: dict[str, Policy] = {
        "fifo": Fifo(),
        "age": HeadAge(20.0),
        "skip": SkipLimit(),
        "affinity": HeadAge(),
    }
    waits = {}
    for name, policy in orders.items():
        (paint,) = [granted - 12.0 - 0.5 for consumer, granted, _ in served(policy, *arrivals) if consumer == "paint"]
        waits[name] = paint
    assert waits == {"fifo": 3.5, "age": 20.5, "skip": 6.5, "affinity": 42.5}


def test_seeds_decide_everything() -> None:
    first, same, other = (poisson(CASE, 0.5, 50, seed) for seed in (1, 1, 2))
    assert first == same != other
    once, again = (figures_of(play(two_agents(1.0), Quantum, 3)) for _ in range(2))
    assert once == again


def test_a_load_is_the_share_of_time_that_services_take() -> None:
    arrivals = poisson(CASE, 0.5, 20_000, 1)
    assert sum(arrival.service_seconds for arrival in arrivals) / arrivals[-1].at == pytest.approx(0.5, rel=0.05)


def test_a_trace_is_thinned_stretched_and_keeps_its_bursts(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *ROWS]), encoding="utf-8")
    whole = [arrival for arrival in from_trace(read_trace(file), CASE, 0.5, every=1) if arrival.consumer == "llm"]
    rate = 0.5 / mean_service_seconds(CASE) * 0.45
    assert [arrival.at for arrival in whole] == pytest.approx([at / 40 * 4 / rate for at in (0, 1, 2, 40)])
    assert sum(arrival.service_seconds for arrival in whole) == pytest.approx(4 * 8.0)
    assert whole[2].service_seconds == pytest.approx(3 * whole[0].service_seconds)
    assert len([1 for arrival in from_trace(read_trace(file), CASE, 0.5, every=2) if arrival.consumer == "llm"]) == 2
    with pytest.raises(ValueError, match="too few rows"):
        from_trace(read_trace(file), CASE, 0.5, every=4)


def test_nobody_beats_the_clairvoyant() -> None:
    long, short = Arrival(0.0, "chat", 10.0), Arrival(1.0, "chat", 2.0)
    assert least_mean_wait([long, short]) == 1.0  # the short one at once, which the long one is interrupted for
    assert least_longest_wait([long, short]) == 2.0
    for scene in (open_loop(0.3, 150), open_loop(0.9, 150)):
        arrivals, _ = scene.draw(1)
        for figures in compare(scene, [1]).values():
            assert figures.all.mean > least_mean_wait(arrivals)
            assert figures.all.longest > least_longest_wait(arrivals)


def test_few_swaps_and_short_waits_at_once() -> None:
    """The bars with all their draws are bench/order.py's; these are far from the edge."""
    orders = {name: ORDERS[name] for name in (FIFO, AFFINITY, OURS)}
    found = compare(open_loop(0.7, 1500), range(1, 3), orders)
    assert found[OURS].all.longest < 0.95 * found[AFFINITY].all.longest
    assert found[OURS].all.mean < 0.8 * found[FIFO].all.mean
    assert found[OURS].swaps < 1.15 * found[AFFINITY].swaps
    one_each = compare(one_client_each(0.0), [1], orders)
    assert one_each[OURS].served_per_hour > 1.7 * one_each[FIFO].served_per_hour
    agents = compare(two_agents(0.0), [1], orders)
    assert agents[OURS].each["image"].longest < 0.2 * agents[AFFINITY].each["image"].longest
    every = [*found.values(), *one_each.values(), *agents.values()]
    assert not any(figures.over_commits or figures.beyond_promise for figures in every)


def test_who_still_waits_at_the_end_has_waited_so_far() -> None:
    scene = two_agents(0.0)
    figures = figures_of(play(scene, HeadAge, 1))
    assert figures.seconds == 3600
    assert figures.each["image"].count > figures.served.get("image", 0)
    assert 1800 < figures.each["image"].longest <= 3600


def test_choices_of_victims_differ_as_they_say() -> None:
    requests = ["tts", "embed", "llm", "stt", "image", "tts", "embed", "llm"]
    found = {name: loads(requests, SHARING, 20_000, choice()) for name, choice in choices(SHARING).items()}
    assert {name: (each.seconds * 8, each.loads * 8, each.unloads * 8) for name, each in found.items()} == {
        "least recently used": (24, 8, 5),  # the image sends away all but stt: all come back
        "smallest set": (22, 6, 2),  # the llm alone goes for the image, and the image for it
        "greedy dual size": (22, 6, 5),  # the llm as well; and for it all others, as they cost less for their size
    }
    assert loads(["stt"] * 4, SHARING, SIZES_MIB["stt"], LeastRecentlyUsed()) == Loads(0.5, 0.25, 0.0)


def test_urgent_voices_wait_less_and_nobody_beyond_the_bound() -> None:
    ours = {OURS: ORDERS[OURS]}
    without, found = (compare(scene(0.5, 600), [1], ours)[OURS] for scene in (open_loop, urgent))
    assert found.each["tts"].p95 < 0.7 * without.each["tts"].p95
    assert found.each["image"].count == without.each["image"].count
    assert not found.beyond_promise


def test_the_command_prints_a_table_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--load", "0.5", "--requests", "40", "--seeds", "2", "--open-only", "--no-pictures"]
    assert cli.main(["simulate", *options, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("open loop, load 0.5", "skip limit 3", "quantum", "nobody can beat"))
    kept = json.loads((tmp_path / "simulate.json").read_text(encoding="utf-8"))
    assert kept["scenes"]["open loop, load 0.5"][OURS]["all"]["count"] == 40


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--load", "-1"], "above 0, such as 0.5"),
        (["--load", "nan"], "above 0, such as 0.5"),
        (["--load", "half"], "above 0, such as 0.5"),
        (["--requests", "0"], "--requests: must be a whole number of 1 or more"),
        (["--seeds", "-4"], "--seeds: must be a whole number of 1 or more"),
        (["--every", "0"], "--every: must be a whole number of 1 or more"),
    ],
)
def test_the_command_refuses_what_cannot_be_played(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["simulate", *wrong])
    assert said in capsys.readouterr().err


def test_an_order_that_serves_nobody_of_a_kind_has_its_row() -> None:
    figures = figures_of(Card(Fifo(), KINDS).play([Arrival(0.0, "chat", 5.0)]))
    nothing = {"mean": -1e-9, "longest": -1e-9}
    shown = table("a scene", {"ours": figures, "theirs": replace(figures, each={})}, nothing)
    assert "chat: mean" in shown
    assert shown.splitlines()[-1].split()[-2:] == ["0.0", "0"], "nobody waits for less than nothing"


def test_the_command_says_what_is_wrong_with_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.csv"
    assert cli.main(["simulate", "--trace", str(file), "--requests", "5", "--open-only"]) == 1
    file.write_text("when,what\n1,2\n", encoding="utf-8")
    assert cli.main(["simulate", "--trace", str(file), "--requests", "5", "--open-only"]) == 1
    assert "TIMESTAMP" in capsys.readouterr().err
