"""Each rule passes what is right and notices what is wrong. Times are milliseconds of a made-up clock."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.torture.checker import ARRIVAL_NS, RULES, SWAP_NS, TURN_NS, check
from tests.torture.history import MILLISECOND, Call, Event, Fault, Final, Op, Row, Run, Truth


def call(op: Op, lease: int | None, inv: int, ok: int, *, code: int = 200, until: int | None = None) -> Call:
    """A call about the lease with this fence, of the request with this number, that promises until then."""
    return Call(
        op=op,
        client=0,
        inv_ns=inv * MILLISECOND,
        sent_ns=(inv + 1) * MILLISECOND,
        ok_ns=ok * MILLISECOND,
        code=code,
        request_id=f"request-{lease}" if op == "acquire" else None,
        lease_id=None if lease is None else f"lease-{lease}",
        fence=lease,
        expires_ns=None if until is None else until * MILLISECOND,
        released=True if op == "release" and code == 200 else None,
    )


def grant(
    lease: int, at: int, until: int, *, arrival: int | None = None, life: str = "one", consumer: str = "mvoice"
) -> Event:
    facts = {
        "lease_id": f"lease-{lease}",
        "fence": lease,
        "request_id": f"request-{lease}",
        "arrival": lease if arrival is None else arrival,
        "granted_boot": at / 1000,
        "expires_boot": until / 1000,
    }
    return Event(lease * 10, at * MILLISECOND, life, "grant", consumer, facts)


def end(lease: int, at: int, how: str = "release") -> Event:
    return Event(lease * 10 + 5, at * MILLISECOND, "one", how, "mvoice", {"lease_id": f"lease-{lease}", "fence": lease})


@pytest.fixture
def right() -> Run:
    """Two leases, one after the other; the second caller waited for the first one. Then one who hung up at once."""
    return Run(
        calls=[
            call("acquire", 1, 1000, 1010, until=3010),
            call("renew", 1, 1100, 1110, until=3110),
            call("release", 1, 1200, 1210),
            call("acquire", 2, 1005, 1215, until=3205),
            call("acquire", 2, 1220, 1230, until=3205),
            call("release", 2, 1300, 1310),
            call("renew", 2, 1320, 1330, code=404),
            replace(call("acquire", 3, 1000, 1100, code=0), lease_id=None, fence=None, error="hung_up"),
        ],
        faults=[Fault("stop", 500 * MILLISECOND, 600 * MILLISECOND)],
        truths=[Truth(600 * MILLISECOND, {"mvoice": 3000}, {"mvoice": 3000})],
        events=[grant(1, 1005, 3005), end(1, 1205), grant(2, 1206, 3206), end(2, 1305)],
        leases=[Row("lease-1", 1, "released"), Row("lease-2", 2, "released")],
        final=Final(queue=0, leases=0, over_commits=0),
    )


def broken(run: Run) -> set[str]:
    return {violation.rule for violation in check(run)}


def moved(run: Run, position: int, **changes: object) -> None:
    run.calls[position] = replace(run.calls[position], **changes)  # type: ignore[arg-type]


def test_the_right_run_breaks_no_rule(right: Run) -> None:
    assert check(right) == []


def test_nothing_breaks_no_rule() -> None:
    assert check(Run()) == []


def test_every_rule_has_a_case_below() -> None:
    tested = {name.removeprefix("test_").split("_")[0] for name in globals() if name.startswith("test_r")}
    assert {rule.lower() for rule in RULES} <= tested


# -- R0 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [999, 1011])
def test_r0_a_grant_outside_its_call(right: Run, at: int) -> None:
    right.events[0] = grant(1, at, 3005)
    assert broken(right) == {"R0"}


def test_r0_a_grant_without_stamps(right: Run) -> None:
    del right.events[0].facts["granted_boot"]
    assert broken(right) == {"R0"}


def test_r0_a_lease_that_was_promised_less_than_it_has(right: Run) -> None:
    right.events[0] = grant(1, 1005, 3100)
    assert broken(right) == {"R0"}


def test_r0_a_grant_between_the_first_try_and_a_later_one(right: Run) -> None:
    right.events[2] = grant(2, 1206, 3206, life="two")
    right.events[2].facts["arrival"] = 1
    moved(right, 3, tries=3, sent_ns=1210 * MILLISECOND)
    assert broken(right) == set()


# -- R1 -----------------------------------------------------------------------------------------------------


def test_r1_two_at_one_time(right: Run) -> None:
    moved(right, 2, inv_ns=1260 * MILLISECOND, ok_ns=1270 * MILLISECOND)
    assert "R1" in broken(right)


def test_r1_a_release_that_nobody_heard_ends_the_certainty(right: Run) -> None:
    moved(right, 2, code=0, released=None)
    assert broken(right) == set()


def test_r1_an_expiry_that_was_promised_ends_the_certainty(right: Run) -> None:
    del right.calls[2]
    right.events[1] = end(1, 1205, "expire")
    right.leases[0] = Row("lease-1", 1, "expired")
    assert "R1" in broken(right)
    moved(right, 0, expires_ns=1150 * MILLISECOND)
    moved(right, 1, expires_ns=1200 * MILLISECOND)
    right.events[0] = grant(1, 1005, 1145)
    assert broken(right) == set()


def test_r1_a_renew_that_brings_an_expired_lease_back(right: Run) -> None:
    """It is known to be live then, so it was all the time: whoever was granted in between had company."""
    right.calls[2] = call("renew", 1, 1280, 1290, until=3290)
    right.events[1] = end(1, 1290, "expire")
    assert "R1" in broken(right)


# -- R2 -----------------------------------------------------------------------------------------------------


def test_r2_a_fence_twice(right: Run) -> None:
    moved(right, 3, fence=1)
    moved(right, 4, fence=1)
    assert "R2" in broken(right)


def test_r2_a_fence_twice_in_the_rows(right: Run) -> None:
    right.events[2].facts["fence"] = 1
    assert "R2" in broken(right)


def test_r2_a_smaller_fence_after_a_larger_one(right: Run) -> None:
    right.calls += [call("acquire", 5, 1400, 1410, until=1420), call("acquire", 4, 1500, 1510, until=1520)]
    right.events += [grant(4, 1505, 1520), grant(5, 1405, 1420)]
    right.events[-2].facts["arrival"], right.events[-1].facts["arrival"] = 5, 4
    assert "R2" in broken(right)


def test_r2_fences_of_requests_at_one_time_may_come_in_any_order(right: Run) -> None:
    right.calls += [call("acquire", 4, 1400, 1600, until=1610), call("acquire", 3, 1401, 1500, until=1510)]
    assert "R2" not in broken(right)


# -- R3 -----------------------------------------------------------------------------------------------------


def test_r3_a_repetition_that_gets_another_lease(right: Run) -> None:
    right.calls[4] = replace(call("acquire", 3, 1220, 1230, until=3205), request_id="request-2")
    assert "R3" in broken(right)


@pytest.mark.parametrize("code", [409, 404, 500])
def test_r3_a_repetition_inside_the_hold_that_is_refused(right: Run, code: int) -> None:
    moved(right, 4, code=code, lease_id=None, expires_ns=None)
    assert broken(right) == {"R3"}


def test_r3_a_repetition_after_the_release_is_refused(right: Run) -> None:
    right.calls.append(replace(call("acquire", 2, 1400, 1410, code=409), lease_id=None))
    assert broken(right) == set()


def test_r3_two_rows_of_one_request(right: Run) -> None:
    right.events[2].facts["request_id"] = "request-1"
    assert "R3" in broken(right)


# -- R4 -----------------------------------------------------------------------------------------------------


def test_r4_a_live_lease_that_is_unknown(right: Run) -> None:
    moved(right, 1, code=404, expires_ns=None)
    assert broken(right) == {"R4"}


def test_r4_an_answer_after_the_promised_end(right: Run) -> None:
    moved(right, 0, expires_ns=1105 * MILLISECOND)
    moved(right, 1, code=404, expires_ns=None)
    del right.calls[2]
    right.events[0] = grant(1, 1005, 1100)
    right.events[1] = end(1, 1106, "expire")
    right.leases[0] = Row("lease-1", 1, "expired")
    assert broken(right) == set()


def test_r4_a_raised_ttl_is_a_promise(right: Run) -> None:
    """Also to a broker that has begun anew since."""
    right.calls[2:2] = [call("renew", 1, 1190, 1195, code=404)]
    moved(right, 0, expires_ns=1050 * MILLISECOND)
    assert "R4" in broken(right)


# -- R5 -----------------------------------------------------------------------------------------------------


def test_r5_a_renew_after_the_release(right: Run) -> None:
    moved(right, 6, code=200, expires_ns=1400 * MILLISECOND)
    assert "R5" in broken(right)


def test_r5_a_renew_after_a_404(right: Run) -> None:
    right.calls.append(call("renew", 2, 1400, 1410, until=1500))
    assert "R5" in broken(right)


def test_r5_a_renew_after_the_end_that_was_written_down(right: Run) -> None:
    right.events[1] = end(1, 900, "expire")
    assert "R5" in broken(right)


# -- R6 -----------------------------------------------------------------------------------------------------


def test_r6_the_later_one_first(right: Run) -> None:
    right.events[0] = grant(1, 1005, 3005, arrival=2)
    right.events[2] = grant(2, 1206, 3206, arrival=1)
    assert "R6" in broken(right)


def test_r6_numbers_against_real_time(right: Run) -> None:
    """In order of fences, and still not in the order in which they came."""
    del right.calls[-1]
    right.calls += [call("acquire", 4, 2000, 2600, until=2700), call("acquire", 3, 2400, 2500, until=2550)]
    right.events += [grant(3, 2450, 2550), grant(4, 2590, 2700)]
    assert broken(right) == {"R6"}


def test_r6_a_stopped_broker_numbers_late(right: Run) -> None:
    test_r6_numbers_against_real_time(right)
    right.faults.append(Fault("stop", 2010 * MILLISECOND, 2250 * MILLISECOND))
    assert broken(right) == set()


def test_r6_each_life_counts_anew(right: Run) -> None:
    right.events[2] = grant(2, 1206, 3206, arrival=1, life="two")
    assert broken(right) == set()


def test_r6_a_grant_without_a_number(right: Run) -> None:
    del right.events[0].facts["arrival"]
    assert broken(right) == {"R6"}


def test_r6_with_a_quantum_each_consumer_has_an_order_of_its_own(right: Run) -> None:
    right.quantum_ns = 1000 * MILLISECOND
    right.events[0] = grant(1, 1005, 3005, arrival=2)
    right.events[2] = grant(2, 1206, 3206, arrival=1)
    assert broken(right) == {"R6"}
    right.events[0] = grant(1, 1005, 3005, arrival=2, consumer="whisper")
    assert broken(right) == set()


# -- R7 -----------------------------------------------------------------------------------------------------


def refusal(inv: int, ok: int) -> Call:
    refused = call("acquire", 9, inv, ok, code=503)
    return replace(refused, lease_id=None, fence=None, error="scheduler_timeout")


def test_r7_a_later_caller_was_served(right: Run) -> None:
    right.calls.append(refusal(650, 1600))
    assert broken(right) == {"R7"}


def test_r7_earlier_callers_were_served(right: Run) -> None:
    right.calls.append(refusal(1050, 1500))
    assert broken(right) == set()


def test_r7_who_waited_through_a_restart_lost_its_place(right: Run) -> None:
    right.calls.append(refusal(550, 1500))
    assert broken(right) == set()


def test_r7_with_a_quantum_only_the_same_consumer_counts(right: Run) -> None:
    right.quantum_ns = 1000 * MILLISECOND
    right.calls.append(replace(refusal(650, 1600), consumer="whisper"))
    assert broken(right) == set()
    moved(right, -1, consumer="mvoice")
    assert broken(right) == {"R7"}


# -- R8 -----------------------------------------------------------------------------------------------------


def test_r8_a_grant_that_was_not_written_down(right: Run) -> None:
    del right.events[2]
    assert "R8" in broken(right)


def test_r8_a_grant_with_another_fence(right: Run) -> None:
    moved(right, 3, fence=3)
    moved(right, 4, fence=3)
    assert "R8" in broken(right)


def test_r8_a_release_that_was_not_written_down(right: Run) -> None:
    del right.events[1]
    assert broken(right) == {"R8"}


def test_r8_a_released_row_that_is_live(right: Run) -> None:
    right.leases[1] = Row("lease-2", 2, "live")
    assert broken(right) == {"R8"}


def test_r8_a_gap_in_the_fences(right: Run) -> None:
    right.events.append(grant(4, 1400, 1500))
    assert broken(right) == {"R8"}


def test_r8_a_grant_that_nobody_heard_of_is_none(right: Run) -> None:
    right.events.append(grant(3, 1100, 1500))
    assert broken(right) == set()


# -- R9 to R11 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [Final(1, 0, 0), Final(0, 1, 0)])
def test_r9_somebody_is_left(right: Run, final: Final) -> None:
    right.final = final
    assert broken(right) == {"R9"}


def test_r10_the_card_says_something_else(right: Run) -> None:
    right.truths.append(Truth(700 * MILLISECOND, {"mvoice": 3000}, {"whisper": 2000}))
    assert broken(right) == {"R10"}


def test_r10_something_did_not_fit(right: Run) -> None:
    right.final = Final(0, 0, 1)
    assert broken(right) == {"R10"}


def ghost(right: Run, at: int) -> None:
    right.events.append(grant(3, at, at + 100))


def test_r11_a_grant_to_nobody(right: Run) -> None:
    ghost(right, 2101)
    assert broken(right) == {"R11"}


def test_r11_a_grant_as_the_caller_left(right: Run) -> None:
    ghost(right, 2099)
    assert broken(right) == set()


def test_r11_a_stopped_broker_sees_nobody_leave(right: Run) -> None:
    ghost(right, 2300)
    right.faults.append(Fault("stop", 1050 * MILLISECOND, 1400 * MILLISECOND))
    assert broken(right) == set()


def test_r11_one_of_two_callers_is_still_there(right: Run) -> None:
    right.calls.append(call("acquire", 3, 1050, 2510, until=2600))
    ghost(right, 2505)
    assert broken(right) == set()


# -- R12 ----------------------------------------------------------------------------------------------------


def overtaken(right: Run, *others: tuple[int, str, int], came: int = 2000) -> None:
    """A whisper that came as number 10, and before its own grant, at 5000, one that came before and these: when, for
    whom, and its number."""
    right.quantum_ns = 1000 * MILLISECOND
    del right.calls[-1]
    right.events.append(grant(3, 1850, 1860, consumer="whisper"))
    for lease, (at, consumer, arrival) in enumerate(others, 4):
        right.events.append(grant(lease, at, at + 10, arrival=arrival, consumer=consumer))
    last = 4 + len(others)
    right.events.append(grant(last, 5000, 5010, arrival=10, consumer="whisper"))
    right.calls.append(call("acquire", last, came, 5001, until=5010))


@pytest.mark.parametrize(("at", "found"), [(3590, set()), (3610, {"R12"})])
def test_r12_overtaken_within_a_quantum_from_when_it_came(right: Run, at: int, found: set[str]) -> None:
    overtaken(right, (1900, "mvoice", 11), (2500, "mvoice", 12), (at, "mvoice", 13))
    assert broken(right) - {"R13"} == found


@pytest.mark.parametrize(("at", "found"), [(3790, set()), (3810, {"R12"})])
def test_r12_overtaken_within_a_quantum_from_when_the_turn_began(right: Run, at: int, found: set[str]) -> None:
    overtaken(right, (2500, "mvoice", 11), (at, "mvoice", 12), came=1500)
    assert broken(right) - {"R13"} == found


def test_r12_time_in_which_the_broker_stood_still_does_not_count(right: Run) -> None:
    overtaken(right, (1900, "mvoice", 11), (3900, "mvoice", 12))
    assert broken(right) - {"R13"} == {"R12"}
    right.faults.append(Fault("stop", 3000 * MILLISECOND, 3500 * MILLISECOND))
    assert broken(right) - {"R13"} == set()


def test_r12_overtaken_in_a_second_turn(right: Run) -> None:
    overtaken(right, (2100, "mvoice", 11), (2200, "other", 9), (2300, "mvoice", 12))
    assert broken(right) - {"R13"} == {"R12"}


def test_r12_who_came_before_overtakes_nobody(right: Run) -> None:
    overtaken(right, (1900, "mvoice", 8), (2200, "other", 11), (4900, "mvoice", 9))
    assert broken(right) - {"R13"} == set()


def test_r12_first_come_first_served_has_no_turns(right: Run) -> None:
    overtaken(right, (1900, "mvoice", 11), (4900, "mvoice", 12))
    right.quantum_ns = None
    assert broken(right) - {"R13"} == {"R6"}


# -- R13 ----------------------------------------------------------------------------------------------------


QUANTUM = 800
TURN = TURN_NS // MILLISECOND
SWAP = SWAP_NS // MILLISECOND
CAME = 10_000
SENT_FOR = ARRIVAL_NS // MILLISECOND
"""So long before its number is certain."""


def turn(right: Run, *served: tuple[int, int], waits_until: int, ahead: bool = False) -> None:
    """One who came at ``CAME`` and was served after these: from when until when each held, for another consumer. All of
    them came later, or (``ahead``) before."""
    right.quantum_ns = QUANTUM * MILLISECOND
    for number, (at, until) in enumerate(served, 3):
        arrival = number if ahead else 100 + number
        right.events.append(grant(number, at, until, arrival=arrival, consumer="whisper"))
        right.events.append(end(number, until))
        right.leases.append(Row(f"lease-{number}", number, "released"))
        sent = CAME - SENT_FOR - 9 if ahead else at - 1
        right.calls.append(replace(call("acquire", number, sent, at, until=until), ok_ns=at * MILLISECOND))
    last = 3 + len(served)
    right.events.append(grant(last, waits_until, waits_until + 100, arrival=50))
    right.calls.append(call("acquire", last, CAME - SENT_FOR - 1, waits_until, until=waits_until + 100))


def during(*steps: int) -> list[tuple[int, int]]:
    """One holds from each of these until the next one."""
    return [(CAME + since, CAME + until) for since, until in pairwise(steps)]


def test_r13_a_turn_of_others_and_the_hold_that_runs_then(right: Run) -> None:
    turn(right, *during(0, 400, QUANTUM, QUANTUM + 500), waits_until=CAME + QUANTUM + 500 + SWAP)
    assert broken(right) - {"R12"} == set()


def test_r13_a_turn_that_does_not_end(right: Run) -> None:
    turn(right, *during(0, 400, 800, 1200, 1600, 2000), waits_until=CAME + 2000)
    assert broken(right) - {"R12"} == {"R13"}
    right.quantum_ns = None
    assert broken(right) == {"R6"}


def test_r13_the_holds_of_who_came_before_are_their_own(right: Run) -> None:
    turn(right, *during(0, 1000, 3000, 9000), waits_until=CAME + 9000, ahead=True)
    assert broken(right) - {"R12"} == set()


def test_r13_one_that_came_before_anybody_was_served(right: Run) -> None:
    right.events.clear()
    right.calls.clear()
    turn(right, *during(10, 3000, 9000), waits_until=CAME + 9000, ahead=True)
    assert "R13" not in broken(right)


def test_r13_a_card_that_nobody_uses(right: Run) -> None:
    """Idle, for who may come back: no longer than a turn."""
    turn(right, waits_until=CAME + SWAP + QUANTUM + TURN)
    assert broken(right) - {"R12"} == set()


def test_r13_a_card_that_nobody_uses_for_longer(right: Run) -> None:
    turn(right, waits_until=CAME + SWAP + QUANTUM + TURN + 10)
    assert broken(right) - {"R12"} == {"R13"}


def test_r13_who_left_had_a_swap_too(right: Run) -> None:
    turn(right, waits_until=CAME + SWAP + QUANTUM + TURN + 10)
    gone = call("acquire", 9, CAME - 900, CAME + 100, code=0)
    right.calls.append(replace(gone, lease_id=None, fence=None, error="hung_up"))
    assert broken(right) - {"R12"} == set()


def test_r13_who_left_before_it_came_had_none(right: Run) -> None:
    """Also where somebody holds since then."""
    turn(right, (CAME - 100, CAME + 50), waits_until=CAME + 150, ahead=True)
    gone = call("acquire", 9, CAME - 900, CAME - 50, code=0)
    right.calls += [replace(gone, lease_id=None, fence=None, request_id=f"gone-{n}", error="hung_up") for n in range(9)]
    assert broken(right) - {"R12"} == set()


def test_r13_a_stopped_broker_ends_no_turn(right: Run) -> None:
    turn(right, *during(0, 400, 800, 1200, 1600, 2000), waits_until=CAME + 2000)
    right.faults.append(Fault("stop", (CAME + 100) * MILLISECOND, (CAME + 900) * MILLISECOND))
    assert broken(right) - {"R12"} == set()


def test_r13_one_that_was_refused_waited_too(right: Run) -> None:
    turn(right, *during(0, 400, 800, 1200, 1600, 2000), waits_until=CAME + 2001)
    del right.calls[-1], right.events[-1]
    refused = replace(call("acquire", 99, CAME - SENT_FOR - 1, CAME + 2000, code=503), lease_id=None, fence=None)
    right.calls.append(replace(refused, error="scheduler_timeout"))
    assert broken(right) - {"R12"} == {"R13"}
