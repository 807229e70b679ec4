"""A short torture: the broker as it is breaks no rule, and three that only their callers can tell from it do.

``make torture`` runs longer, and all the mutants.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from tests.torture.checker import check
from tests.torture.history import Run
from tests.torture.mutants import MUTANTS
from tests.torture.nemesis import Moods
from tests.torture.plan import QUANTUM_SECONDS, Plan
from tests.torture.run import torture

pytestmark = pytest.mark.long
OFTEN = Moods(every_seconds=(0.3, 1.2))


@pytest.mark.parametrize("quantum_seconds", [None, QUANTUM_SECONDS])
def test_no_rule_is_broken_under_kills_and_pauses(tmp_path: Path, quantum_seconds: float | None) -> None:
    outcome = torture(tmp_path, Plan(7, quantum_seconds=quantum_seconds, moods=OFTEN))
    assert not outcome.broken
    assert not check(outcome.run)
    assert len(outcome.run.grants()) >= 20
    assert len(outcome.run.faults) >= 3
    assert (overtakings(outcome.run) > 0) == (quantum_seconds is not None)


def overtakings(run: Run) -> int:
    return sum(
        1
        for one, other in combinations(sorted(run.grants(), key=lambda event: event.fence), 2)
        if one.life == other.life and one.facts["arrival"] > other.facts["arrival"]
    )


@pytest.mark.parametrize("name", ["reply_before_commit", "ghost_waiter", "endless_turn"])
def test_a_broken_broker_is_caught(tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    outcome = torture(tmp_path, mutant.plan(4), name)
    assert {violation.rule for violation in check(outcome.run)} & set(mutant.caught_by)
