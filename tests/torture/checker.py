"""Was every promise kept? Pure: a run in, what is wrong with it out.

Owns: the rules. Must not: read a clock or a file, or talk to anybody.

A *certain hold* of a lease lies from its grant's arrival to its release's departure, or to the last expiry that an
answer promised, whichever is sooner. Within it the lease was live whatever else happened: nothing revives a lease, so
also before a renew that was answered late. All consumers of a run conflict, on one card.

    R0   a grant's stamp lies inside its call, and it is written down with no more time than it was promised
    R1   certain holds do not overlap
    R2   fences are unique, and grow in real time, over all lives of the broker
    R3   one request has one lease, and who repeats it is told the same one
    R4   a renew inside a certain hold is not answered 404
    R5   a lease that is over stays so: after a 404, after a release, after the end that the broker wrote down
    R6   in one life of the broker, the order of arrival is the order of fences and that of real time; with a quantum,
         within each consumer
    R7   nobody is refused for want of time while a later caller was served; with a quantum, one for the same consumer
    R8   what callers saw is what the broker wrote down: every grant and every release, with fences without a gap
    R9   when everybody has gone, nobody waits and nobody holds
    R10  the card's own list of holders is the broker's, after every fault, and nothing was put on it that does not fit
    R11  nobody is granted who hung up, alone, a second before: a ghost
    R12  with a quantum, who is overtaken is so by one turn of another consumer, and by nobody who is granted later than
         a quantum from when both had begun, the turn and the wait
    R13  with a quantum, nobody waits for longer than core/quantum.py promises: for the holds of all who came before,
         with a swap for each, for its own swap, and once for each other consumer for its longest quantum and the hold
         that runs when that is over

R13 counts what of a wait was spent on others than those who came before: their holds, and the time before each of
them in which nobody held. What passes before the grant of one who came before is its swap, up to ``SWAP_NS``; beyond
that it counts as well, so that an idle card does. Not counted is the time of faults, in which a stopped broker can end
no turn. Whoever was refused in the end has waited too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tests.torture.history import MILLISECOND, SECOND, Call, Event, Fault, Run

CLOCKS_NS = 5 * MILLISECOND
"""What a wall clock of milliseconds may be off."""
NOTED_NS = 100 * MILLISECOND
"""How long before its end an event's stamp may be: it is made with the lock down."""
ARRIVAL_NS = 300 * MILLISECOND
"""From a request's departure to its number of arrival, on a machine whose two cores are busy."""
GHOST_NS = SECOND
TURN_NS = 300 * MILLISECOND
"""From a turn to its grant, where nobody has to be sent away."""
SWAP_NS = 600 * MILLISECOND
"""Unload, proof and commit take a tenth of that; but a victim that computes is asked again after half a second."""
FOREVER_NS = 1 << 62


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    what: str


@dataclass(frozen=True, slots=True)
class Hold:
    """A certain one."""

    lease_id: str
    fence: int
    from_ns: int
    until_ns: int


Rule = Callable[[Run], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    def enter(judge: Rule) -> Rule:
        RULES[name] = judge
        return judge

    return enter


def check(run: Run) -> list[Violation]:
    return [Violation(name, what) for name, judge in RULES.items() for what in judge(run)]


# -- what the rules look at ---------------------------------------------------------------------------------


def granted(run: Run) -> list[Call]:
    """Each lease's first 200, in order of arrival at the caller."""
    first: dict[str, Call] = {}
    for call in sorted(run.calls, key=lambda call: call.ok_ns):
        if call.op == "acquire" and call.code == 200 and call.lease_id is not None:
            first.setdefault(call.lease_id, call)
    return list(first.values())


def asked_ns(run: Run) -> dict[str, int]:
    """When each request was sent for the first time."""
    asked: dict[str, int] = {}
    for call in run.calls:
        if call.op == "acquire" and call.request_id is not None:
            asked[call.request_id] = min(call.inv_ns, asked.get(call.request_id, FOREVER_NS))
    return asked


def of_lease(run: Run) -> dict[str, list[Call]]:
    """Every call about a lease, as its answers came."""
    found: dict[str, list[Call]] = defaultdict(list)
    for call in sorted(run.calls, key=lambda call: call.ok_ns):
        if call.lease_id is not None:
            found[call.lease_id].append(call)
    return found


def holds(run: Run) -> list[Hold]:
    about = of_lease(run)
    found = []
    for call in granted(run):
        calls = about[str(call.lease_id)]
        promised = [c.expires_ns for c in calls if c.code == 200 and c.expires_ns is not None]
        released = [c.inv_ns for c in calls if c.op == "release"]
        until_ns = min([max(promised, default=call.ok_ns), *released])
        if until_ns > call.ok_ns:
            found.append(Hold(str(call.lease_id), call.fence or 0, call.ok_ns, until_ns))
    return found


def promised_until(calls: Sequence[Call], before_ns: int) -> int:
    """The end of a lease as its holder knew it at that instant; 0 where it did not hold it."""
    known = [call for call in calls if call.ok_ns <= before_ns]
    if any(call.op == "release" for call in calls if call.inv_ns <= before_ns):
        return 0
    return max((c.expires_ns for c in known if c.code == 200 and c.expires_ns is not None), default=0)


def grant_rows(run: Run) -> dict[str, Event]:
    return {event.lease_id: event for event in run.grants()}


def arrived_ns(call: Call, faults: Iterable[Fault]) -> int:
    """By then the broker has given the call its number. A stopped one cannot, and who meets a dead one tries again."""
    by_ns = call.sent_ns + ARRIVAL_NS
    for fault in sorted(faults, key=lambda fault: fault.inv_ns):
        if fault.inv_ns <= by_ns and fault.ok_ns >= call.sent_ns:
            by_ns = max(by_ns, fault.ok_ns + ARRIVAL_NS)
    return by_ns


def stamp_ns(event: Event, name: str) -> int | None:
    """A fact in seconds of the same clock."""
    value = event.facts.get(name)
    return None if value is None else round(float(value) * SECOND)


# -- the rules ----------------------------------------------------------------------------------------------


@rule("R0")
def stamps_lie_inside_the_call(run: Run) -> Iterator[str]:
    rows, asked = grant_rows(run), asked_ns(run)
    for call in granted(run):
        row = rows.get(str(call.lease_id))
        if row is None:
            continue  # R8
        at_ns, until_ns = stamp_ns(row, "granted_boot"), stamp_ns(row, "expires_boot")
        if at_ns is None or until_ns is None:
            yield f"the grant of {call.lease_id} carries no stamps"
        elif not asked.get(call.request_id or "", call.inv_ns) <= at_ns <= call.ok_ns:
            yield f"{call.lease_id} was granted {_off(at_ns, call)} outside its call"
        elif call.expires_ns is not None and until_ns > call.expires_ns + CLOCKS_NS:
            yield f"{call.lease_id} was promised for less than was written down"


@rule("R1")
def certain_holds_do_not_overlap(run: Run) -> Iterator[str]:
    longest: Hold | None = None
    for hold in sorted(holds(run), key=lambda hold: hold.from_ns):
        if longest is not None and hold.from_ns < longest.until_ns - CLOCKS_NS:
            both_ms = (min(hold.until_ns, longest.until_ns) - hold.from_ns) / MILLISECOND
            yield f"{longest.lease_id} and {hold.lease_id} both held for {both_ms:.0f} ms"
        if longest is None or hold.until_ns > longest.until_ns:
            longest = hold


@rule("R2")
def fences_grow(run: Run) -> Iterator[str]:
    yield from _twice([(call.fence, call.lease_id) for call in granted(run)], "callers")
    yield from _twice([(event.fence, event.lease_id) for event in run.grants()], "rows")
    asked = asked_ns(run)
    before = sorted(granted(run), key=lambda call: call.ok_ns)
    highest, position = 0, 0
    for call in sorted(before, key=lambda call: asked.get(call.request_id or "", call.inv_ns)):
        since_ns = asked.get(call.request_id or "", call.inv_ns)
        while position < len(before) and before[position].ok_ns < since_ns:
            highest = max(highest, before[position].fence or 0)
            position += 1
        if (call.fence or 0) <= highest:
            yield f"{call.lease_id} has fence {call.fence}, and {highest} was given before it was asked for"


def _twice(pairs: Iterable[tuple[int | None, str | None]], where: str) -> Iterator[str]:
    owners: dict[int | None, str | None] = {}
    for fence, lease_id in pairs:
        if owners.setdefault(fence, lease_id) != lease_id:
            yield f"fence {fence} was given to {owners[fence]} and to {lease_id} ({where})"


@rule("R3")
def one_request_has_one_lease(run: Run) -> Iterator[str]:
    yield from _two_leases([(call.request_id, call.lease_id) for call in granted(run)], "callers")
    rows = [(event.facts.get("request_id"), event.lease_id) for event in run.grants()]
    yield from _two_leases(rows, "rows")
    first, about = {call.request_id: call for call in reversed(granted(run))}, of_lease(run)
    for call in run.calls:
        known = first.get(call.request_id)
        if call.op != "acquire" or known is None or call.inv_ns <= known.ok_ns or call.code in (0, 503):
            continue
        in_time = call.ok_ns + CLOCKS_NS < promised_until(about[str(known.lease_id)], call.inv_ns)
        if in_time and call.lease_id != known.lease_id:
            yield f"{call.request_id} has {known.lease_id}, and its repetition was told {call.code} {call.lease_id}"


def _two_leases(pairs: Iterable[tuple[str | None, str | None]], where: str) -> Iterator[str]:
    leases: dict[str, str | None] = {}
    for request_id, lease_id in pairs:
        if request_id is not None and leases.setdefault(request_id, lease_id) != lease_id:
            yield f"{request_id} was granted {leases[request_id]} and {lease_id} ({where})"


@rule("R4")
def a_live_lease_can_be_renewed(run: Run) -> Iterator[str]:
    for calls in of_lease(run).values():
        for call in calls:
            known_ns = promised_until([other for other in calls if other is not call], call.inv_ns)
            if call.op == "renew" and call.code == 404 and call.ok_ns + CLOCKS_NS < known_ns:
                left_ms = (known_ns - call.ok_ns) / MILLISECOND
                yield f"{call.lease_id} was unknown {left_ms:.0f} ms before its promised end"


@rule("R5")
def over_stays_over(run: Run) -> Iterator[str]:
    written = {event.lease_id: event.at_ns + NOTED_NS for event in run.ends()}
    for lease_id, calls in of_lease(run).items():
        over_ns = min((c.ok_ns for c in calls if _ends(c)), default=FOREVER_NS)
        over_ns = min(over_ns, written.get(lease_id, FOREVER_NS))
        for call in calls:
            if call.op == "renew" and call.code == 200 and call.inv_ns > over_ns:
                yield f"{lease_id} was over, and was renewed {(call.inv_ns - over_ns) / MILLISECOND:.0f} ms later"


def _ends(call: Call) -> bool:
    return (call.op == "release" and call.code == 200) or (call.op == "renew" and call.code == 404)


@rule("R6")
def first_come_first_served(run: Run) -> Iterator[str]:
    by_life: dict[str, list[Event]] = defaultdict(list)
    for event in run.grants():
        by_life[event.life].append(event)
    calls, asked = {str(call.lease_id): call for call in granted(run)}, asked_ns(run)
    for life, events in by_life.items():
        if any("arrival" not in event.facts for event in events):
            yield f"grants of life {life} carry no number of arrival"
            continue
        in_order = sorted(events, key=lambda event: event.fence)
        for line in [in_order] if run.quantum_ns is None else _each_consumer(in_order):
            yield from _served_in_order(line)
        yield from _numbered_in_order(events, calls, asked, run.faults)


def _each_consumer(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    for consumer in sorted({str(event.consumer) for event in events}):
        yield [event for event in events if event.consumer == consumer]


def _served_in_order(events: Sequence[Event]) -> Iterator[str]:
    latest = 0
    for event in events:
        arrival = int(event.facts["arrival"])
        if arrival < latest:
            yield f"{event.lease_id} came as number {arrival}, and was served after number {latest}"
        latest = max(latest, arrival)


def _numbered_in_order(
    events: Sequence[Event], calls: dict[str, Call], asked: dict[str, int], faults: Sequence[Fault]
) -> Iterator[str]:
    """Who had certainly arrived before another was sent has the smaller number."""
    known = [(calls[event.lease_id], int(event.facts["arrival"])) for event in events if event.lease_id in calls]
    arrived = sorted((arrived_ns(call, faults), arrival) for call, arrival in known)
    highest, position = 0, 0
    for call, arrival in sorted(known, key=lambda pair: asked.get(pair[0].request_id or "", pair[0].inv_ns)):
        since_ns = asked.get(call.request_id or "", call.inv_ns)
        while position < len(arrived) and arrived[position][0] < since_ns:
            highest = max(highest, arrived[position][1])
            position += 1
        if arrival < highest:
            yield f"{call.lease_id} was sent after number {highest} had arrived, and is number {arrival}"


@rule("R7")
def nobody_is_overtaken(run: Run) -> Iterator[str]:
    rows, asked = grant_rows(run), asked_ns(run)
    served = [(call, row) for call in granted(run) if (row := rows.get(str(call.lease_id))) is not None]
    for refused in run.calls:
        if refused.op != "acquire" or refused.error != "scheduler_timeout" or _disturbed(refused, run.faults):
            continue
        for call, row in served:
            if run.quantum_ns is not None and row.consumer != refused.consumer:
                continue
            sent_ns, at_ns = asked.get(call.request_id or "", call.inv_ns), stamp_ns(row, "granted_boot") or 0
            if refused.sent_ns + ARRIVAL_NS < sent_ns and at_ns < refused.ok_ns - ARRIVAL_NS:
                yield f"{refused.request_id} waited in vain, and {call.request_id} came later and was served"


def _disturbed(call: Call, faults: Iterable[Fault]) -> bool:
    return any(fault.inv_ns <= call.ok_ns and fault.ok_ns >= call.inv_ns for fault in faults)


@rule("R8")
def the_ledger_is_the_history(run: Run) -> Iterator[str]:
    rows, states = grant_rows(run), {row.lease_id: row.state for row in run.leases}
    for call in granted(run):
        row = rows.get(str(call.lease_id))
        if row is None:
            yield f"{call.lease_id} was granted and not written down"
        elif (row.fence, row.facts.get("request_id")) != (call.fence, call.request_id):
            yield f"{call.lease_id} was written down with another fence or request than it was told"
    released = {event.lease_id for event in run.ends() if event.type == "release"}
    for call in run.calls:
        if call.released and call.lease_id not in released:
            yield f"{call.lease_id} was released and that is not written down"
    for event in run.ends():
        if event.type == "release" and states.get(event.lease_id) != "released":
            yield f"{event.lease_id} was released, and its row says {states.get(event.lease_id)}"
    yield from _gaps(sorted(event.fence for event in run.grants()))


def _gaps(fences: Sequence[int]) -> Iterator[str]:
    for before, after in pairwise(fences):
        if after - before > 1:
            yield f"no grant has a fence between {before} and {after}"


@rule("R9")
def nobody_is_left(run: Run) -> Iterator[str]:
    if run.final.queue:
        yield f"{run.final.queue} requests still wait"
    if run.final.leases:
        yield f"{run.final.leases} leases are still live"


@rule("R10")
def the_card_agrees(run: Run) -> Iterator[str]:
    for truth in run.truths:
        if truth.card != truth.status:
            yield f"the card holds {truth.card}, and status says {truth.status}"
    if run.final.over_commits:
        yield f"{run.final.over_commits} allocations did not fit"


@rule("R11")
def ghosts_are_not_granted(run: Run) -> Iterator[str]:
    left: dict[str, int] = {}
    for call in run.calls:
        if call.op == "acquire" and call.request_id is not None:
            gone_ns = call.ok_ns if call.error == "hung_up" else FOREVER_NS
            left[call.request_id] = max(gone_ns, left.get(call.request_id, 0))
    for event in run.grants():
        gone_ns = left.get(str(event.facts.get("request_id")), FOREVER_NS)
        at_ns = stamp_ns(event, "granted_boot") or event.at_ns
        if awake_ns(gone_ns, at_ns, run.faults) >= GHOST_NS:
            yield f"{event.lease_id} was granted to a caller who had hung up {(at_ns - gone_ns) / SECOND:.1f} s before"


@rule("R12")
def nobody_is_overtaken_for_longer_than_a_turn(run: Run) -> Iterator[str]:
    if run.quantum_ns is None:
        return
    calls = {str(call.lease_id): call for call in granted(run)}
    by_life: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(run.grants(), key=lambda event: event.fence):
        by_life[event.life].append(event)
    for events in by_life.values():
        for event in events:
            if event.lease_id in calls:
                came_ns = arrived_ns(calls[event.lease_id], run.faults)
                yield from _overtaken(event, came_ns, events, run.quantum_ns, run.faults)


def _overtaken(
    event: Event, came_ns: int, events: Sequence[Event], quantum_ns: int, faults: Sequence[Fault]
) -> Iterator[str]:
    """``events``: the grants of this life, in their order."""
    turn_ns, turns, before = 0, set[int](), None
    for other in events:
        if other.fence >= event.fence:
            return
        at_ns = stamp_ns(other, "granted_boot") or 0
        if other.consumer != before:
            turn_ns, before = at_ns, other.consumer
        if other.consumer == event.consumer or other.facts["arrival"] < event.facts["arrival"]:
            continue
        turns.add(turn_ns)
        if len(turns) == 2:
            yield f"{event.lease_id} was overtaken in a second turn of {other.consumer}, by {other.lease_id}"
        over_ns = awake_ns(max(turn_ns, came_ns), at_ns, faults) - quantum_ns
        if over_ns > TURN_NS:
            late_ms = over_ns / MILLISECOND
            yield f"{event.lease_id} was overtaken by {other.lease_id} {late_ms:.0f} ms after the quantum was over"


@dataclass(frozen=True, slots=True)
class Served:
    """A grant on the card's own line of time."""

    row: Event
    from_ns: int
    until_ns: int
    asked_ns: int

    @property
    def arrival(self) -> int:
        return int(self.row.facts["arrival"])


@dataclass(frozen=True, slots=True)
class Wait:
    """``row``: of its grant; None: it was refused for want of time. From when it certainly had its number."""

    who: str
    from_ns: int
    until_ns: int
    row: Event | None

    def is_behind(self, other: Served) -> bool:
        """Whether the other one is ahead of it, or may be."""
        if self.row is None:
            return other.asked_ns <= self.from_ns
        return other.row.life != self.row.life or other.arrival < int(self.row.facts["arrival"])


@rule("R13")
def nobody_waits_beyond_the_bound(run: Run) -> Iterator[str]:
    if run.quantum_ns is None:
        return
    card, left = _card(run), sorted(call.ok_ns for call in run.calls if call.error in ("hung_up", "scheduler_timeout"))
    faults = list(_apart(replace(fault, ok_ns=fault.ok_ns + ARRIVAL_NS) for fault in run.faults))
    for wait in _waits(run):
        spent_ns, allowed_ns = _beyond_who_is_ahead(wait, card, left, faults, run.quantum_ns)
        if spent_ns > allowed_ns:
            yield (
                f"{wait.who} waited for {spent_ns / MILLISECOND:.0f} ms beyond those who are ahead of it, and "
                f"{allowed_ns / MILLISECOND:.0f} ms is the most"
            )


def _card(run: Run) -> list[Served]:
    """Everybody who was served, in order of time."""
    ended = {event.lease_id: event.at_ns for event in run.ends()}
    asked = asked_ns(run)
    found = []
    for row in run.grants():
        from_ns = stamp_ns(row, "granted_boot")
        if from_ns is not None and "arrival" in row.facts:
            asked_at_ns = asked.get(str(row.facts.get("request_id")), from_ns)
            found.append(Served(row, from_ns, ended.get(row.lease_id, FOREVER_NS), asked_at_ns))
    return sorted(found, key=lambda served: served.from_ns)


def _waits(run: Run) -> Iterator[Wait]:
    rows = grant_rows(run)
    for call in granted(run):
        row = rows.get(str(call.lease_id))
        until_ns = None if row is None else stamp_ns(row, "granted_boot")
        if row is not None and until_ns is not None and "arrival" in row.facts:
            yield Wait(str(call.lease_id), arrived_ns(call, run.faults), until_ns, row)
    for call in run.calls:
        if call.op == "acquire" and call.error == "scheduler_timeout" and not _disturbed(call, run.faults):
            yield Wait(str(call.request_id), call.sent_ns + ARRIVAL_NS, call.ok_ns, None)


def _apart(faults: Iterable[Fault]) -> Iterator[Fault]:
    """The same time, none of it twice."""
    over_ns = 0
    for fault in sorted(faults, key=lambda fault: fault.inv_ns):
        if fault.ok_ns > over_ns:
            yield replace(fault, inv_ns=max(fault.inv_ns, over_ns))
            over_ns = fault.ok_ns


def _beyond_who_is_ahead(
    wait: Wait, card: Sequence[Served], left: Sequence[int], faults: Sequence[Fault], quantum_ns: int
) -> tuple[int, int]:
    """What of a wait was spent on others than those who are ahead, and how much may be."""
    spent_ns, longest_ns = 0, 0
    others: set[str | None] = set()
    at_ns = wait.from_ns
    holds_then = max(0, bisect_left(card, wait.from_ns, key=lambda served: served.from_ns) - 1)
    for other in card[holds_then:]:
        if other.from_ns >= wait.until_ns or (wait.row is not None and other.row.lease_id == wait.row.lease_id):
            break
        if other.until_ns <= at_ns:
            continue
        from_ns, until_ns = max(at_ns, other.from_ns), min(other.until_ns, wait.until_ns)
        before_ns = awake_ns(at_ns, from_ns, faults)
        if wait.is_behind(other):
            spent_ns += max(0, before_ns - _swaps_ns(at_ns, from_ns, left))
        else:
            its_ns = before_ns + awake_ns(from_ns, until_ns, faults)
            spent_ns, longest_ns = spent_ns + its_ns, max(longest_ns, its_ns)
            others.add(other.row.consumer)
        at_ns = until_ns
    until_ns = max(at_ns, wait.until_ns)
    spent_ns += max(0, awake_ns(at_ns, until_ns, faults) - _swaps_ns(at_ns, until_ns, left))
    return spent_ns, max(1, len(others)) * (quantum_ns + longest_ns) + TURN_NS


def _swaps_ns(from_ns: int, until_ns: int, left: Sequence[int]) -> int:
    """What the swaps before one grant may take: its own, and those of whoever left in the middle of theirs."""
    return SWAP_NS * (1 + bisect_left(left, until_ns) - bisect_left(left, from_ns))


def awake_ns(from_ns: int, until_ns: int, faults: Iterable[Fault]) -> int:
    """How much of it the broker was in a state to notice anything."""
    asleep = sum(max(0, min(until_ns, f.ok_ns) - max(from_ns, f.inv_ns)) for f in faults)
    return until_ns - from_ns - asleep


def _off(at_ns: int, call: Call) -> str:
    off_ns = call.inv_ns - at_ns if at_ns < call.inv_ns else at_ns - call.ok_ns
    return f"{off_ns / MILLISECOND:.0f} ms"
