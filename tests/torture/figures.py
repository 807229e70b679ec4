"""How a run went, beside whether it was right. Owns: the numbers of one line. Must not: judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.figure import quantile
from tests.torture.checker import granted, stamp_ns
from tests.torture.history import MILLISECOND, Run

DEADLY = ("kill master and worker", "kill master", "kill worker")


def figures(run: Run) -> str:
    renews = [call.ok_ns - call.inv_ns for call in run.calls if call.op == "renew" and call.tries == 1]
    down = [fault.ok_ns - fault.inv_ns for fault in run.faults if fault.kind in DEADLY]
    codes = Counter(call.error or str(call.code) for call in run.calls if call.op == "acquire" and call.code != 200)
    return (
        f"{len(granted(run))} grants, {len(run.calls)} calls, {len(run.faults)} faults; renew {_spread(renews)}; "
        f"handed over in {_spread(handovers(run))}; down per kill {_spread(down)}; not granted: "
        + (", ".join(f"{what} {count}" for what, count in codes.most_common()) or "nobody")
    )


def handovers(run: Run) -> list[int]:
    """From a release's departure to the next grant, where somebody waited already."""
    asked = {call.lease_id: call for call in granted(run)}
    grants = sorted(
        (at_ns, event.lease_id) for event in run.grants() if (at_ns := stamp_ns(event, "granted_boot")) is not None
    )
    found, position = [], 0
    for call in sorted((call for call in run.calls if call.released), key=lambda call: call.inv_ns):
        while position < len(grants) and grants[position][0] < call.inv_ns:
            position += 1
        heir = asked.get(grants[position][1]) if position < len(grants) else None
        if heir is not None and heir.inv_ns < call.inv_ns:
            found.append(grants[position][0] - call.inv_ns)
    return found


def _spread(ns: Sequence[int]) -> str:
    if not ns:
        return "never"
    p50, p99 = (quantile(ns, share) / MILLISECOND for share in (0.5, 0.99))
    return f"p50 {p50:.1f} p99 {p99:.1f} max {max(ns) / MILLISECOND:.1f} ms"
