"""``python -m tests.torture --seconds 60``: once with each order. ``--policy quantum``: with that one. ``--mutant
NAME``: with that defect. ``--all``: as it is with each order, then every mutant, with a table. Exit code 1 where the
broker broke a rule, or where a mutant did not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.torture.checker import Violation, check
from tests.torture.figures import figures
from tests.torture.mutants import MUTANTS
from tests.torture.plan import QUANTUM_SECONDS, Plan
from tests.torture.run import Outcome, torture

SHOWN = 5
"""Violations of one rule that are told in full."""


QUANTA = {"fifo": None, "quantum": QUANTUM_SECONDS}


@dataclass(frozen=True, slots=True)
class Verdict:
    name: str
    mutant: str | None
    violations: Sequence[Violation]
    broken: Sequence[str]

    @property
    def counts(self) -> Counter[str]:
        return Counter(violation.rule for violation in self.violations)

    @property
    def as_it_must_be(self) -> bool:
        if self.mutant is None:
            return not self.violations and not self.broken
        return any(self.counts[rule] for rule in MUTANTS[self.mutant].caught_by)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Prove the broker's promises.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long callers call; a mutant has its own time")
    parser.add_argument("--policy", choices=QUANTA, help="the order of the run without a defect; default: each")
    parser.add_argument("--mutant", choices=MUTANTS, help="run with this defect")
    parser.add_argument("--all", action="store_true", help="once without a defect, then with each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keep history, log and rows there")
    chosen = parser.parse_args()
    verdicts = []
    if chosen.mutant is None:
        for policy in QUANTA if chosen.policy is None else [chosen.policy]:
            plan = Plan(chosen.seconds, chosen.seed, QUANTA[policy])
            verdicts.append(_one(policy, plan, None, chosen.out))
    for name in MUTANTS if chosen.all else [chosen.mutant] if chosen.mutant else []:
        seconds = chosen.seconds if chosen.mutant else MUTANTS[name].seconds
        verdicts.append(_one(name, MUTANTS[name].plan(seconds, chosen.seed), name, chosen.out))
    print("\n" + table(verdicts))
    return 0 if all(verdict.as_it_must_be for verdict in verdicts) else 1


def _one(name: str, plan: Plan, mutant: str | None, out: Path | None) -> Verdict:
    with _directory(out, name) as directory:
        outcome = torture(directory, plan, mutant)
        verdict = Verdict(name, mutant, check(outcome.run), outcome.broken)
    _tell(verdict, outcome)
    return verdict


@contextmanager
def _directory(out: Path | None, name: str) -> Iterator[Path]:
    if out is None:
        with tempfile.TemporaryDirectory(prefix="gpumgr-torture-") as directory:
            yield Path(directory)
    else:
        (out / name).mkdir(parents=True)
        yield out / name


def _tell(verdict: Verdict, outcome: Outcome) -> None:
    print(f"{verdict.name}: {figures(outcome.run)}", flush=True)
    if verdict.mutant is not None and verdict.as_it_must_be:
        return
    told: Counter[str] = Counter()
    for violation in verdict.violations:
        told[violation.rule] += 1
        if told[violation.rule] <= SHOWN:
            print(f"  {violation.rule} {violation.what}")
    for what in verdict.broken[:SHOWN]:
        print(f"  {what}")


def table(verdicts: Sequence[Verdict]) -> str:
    rows = [("run", "found", "must be", "")]
    for verdict in verdicts:
        found = ", ".join(f"{rule} {count}x" for rule, count in sorted(verdict.counts.items())) or "nothing"
        must = "nothing" if verdict.mutant is None else " or ".join(MUTANTS[verdict.mutant].caught_by)
        rows.append((verdict.name, found, must, "ok" if verdict.as_it_must_be else "FAILED"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
