"""A short torture: the broker as it is breaks no rule, and two that only their callers can tell from it do.

``make torture`` runs longer, and all the mutants.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.checker import check
from tests.torture.mutants import MUTANTS
from tests.torture.nemesis import Moods
from tests.torture.plan import Plan
from tests.torture.run import torture

pytestmark = pytest.mark.long
OFTEN = Moods(every_seconds=(0.3, 1.2))


def test_no_rule_is_broken_under_kills_and_pauses(tmp_path: Path) -> None:
    outcome = torture(tmp_path, Plan(7, moods=OFTEN))
    assert not outcome.broken
    assert not check(outcome.run)
    assert len(outcome.run.grants()) >= 20
    assert len(outcome.run.faults) >= 3


@pytest.mark.parametrize("name", ["reply_before_commit", "ghost_waiter"])
def test_a_broken_broker_is_caught(tmp_path: Path, name: str) -> None:
    mutant = MUTANTS[name]
    outcome = torture(tmp_path, mutant.plan(4), name)
    assert {violation.rule for violation in check(outcome.run)} & set(mutant.caught_by)
