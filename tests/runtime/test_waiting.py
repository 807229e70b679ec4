"""Real threads on the real Conditions, against a running broker and an in-memory card.

Nothing sleeps in the hope of a state: a test waits until it is there, and servers are held by gates.
"""

from __future__ import annotations

import threading
import time

import pytest

from gpumgr.core.lease import Call, Lease
from gpumgr.core.queue import WaitingFor
from gpumgr.errors import (
    ConsumerUnhealthy,
    EvictionFailed,
    InsufficientVram,
    PrepareTimeout,
    RequestMismatch,
    SchedulerTimeout,
    ShuttingDown,
)
from gpumgr.runtime import broker as broker_module
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.ticket import Caller, Ticket
from tests.waiting import until
from tests.worlds import Calling, StartedWorld, consumer, request, started

PAINT = consumer("paint", 14000)
CHAT = consumer("chat", 9000)
BESIDE = (consumer("chat", 9000, beside=["talk"]), consumer("talk", 14700, beside=["chat"]))


class SpiedCondition(threading.Condition):
    """Counts how often a wait returned."""

    woken = 0

    def wait(self, timeout: float | None = None) -> bool:
        notified = super().wait(timeout)
        self.woken += 1
        return notified


class SpiedBroker(Broker):
    """The real broker; its tickets' callers wait on spied conditions of the same lock."""

    def _await(self, ticket: Ticket, deadline: float, caller: Caller) -> Lease | Call:
        if not isinstance(ticket.woken, SpiedCondition):
            ticket.woken = SpiedCondition(self.state.lock)
        return super()._await(ticket, deadline, caller)


def queued(world: StartedWorld, count: int) -> None:
    until(lambda: len(world.waiting()) == count)


def waiting_for(world: StartedWorld) -> list[WaitingFor | None]:
    with world.broker.state.lock:
        return [ticket.waiting_for for ticket in world.broker.state.tickets.values()]


# -- waking -------------------------------------------------------------------------------------------------


def test_a_release_wakes_exactly_the_one_who_may_go() -> None:
    with started(PAINT, broker=SpiedBroker) as world:
        lease = world.lease("paint")
        callers = []
        for number in range(1, 6):
            callers.append(Calling(world, "paint", holder=f"c{number}"))
            queued(world, number)
        with world.broker.state.lock:
            spies = [ticket.woken for ticket in world.broker.state.tickets.values()]
        world.broker.release(lease.token)
        first = callers[0].lease()
        assert first.holder == "c1"
        assert [spy.woken for spy in spies if isinstance(spy, SpiedCondition)] == [1, 0, 0, 0, 0]
        world.broker.release(first.token)
        assert callers[1].lease().holder == "c2"
        assert [spy.woken for spy in spies if isinstance(spy, SpiedCondition)] == [1, 1, 0, 0, 0]


def test_two_hundred_hand_overs_lose_no_wake_up() -> None:
    fences: list[int] = []
    inside = [0]
    together = [0]
    with started(PAINT, CHAT) as world:

        def work(name: str) -> None:
            for _ in range(25):
                lease = world.lease(name, wait_seconds=30)
                inside[0] += 1
                together[0] = max(together[0], inside[0])
                fences.append(lease.fence)
                inside[0] -= 1
                assert world.broker.release(lease.token)

        threads = [threading.Thread(target=work, args=(("paint", "chat")[n % 2],), daemon=True) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
        assert fences == list(range(1, 201))
        assert together == [1]
        assert world.broker.state.queue.waiting() == []
        assert world.broker.state.queue.holds == {}


def test_they_go_in_the_order_in_which_they_came() -> None:
    with started(PAINT, CHAT, policy="fifo") as world:
        lease = world.lease("paint")
        callers = []
        for number, name in enumerate(["chat", "paint", "chat", "chat", "paint"], 1):
            callers.append(Calling(world, name))
            queued(world, number)
        fences = []
        for caller in callers:
            world.broker.release(lease.token)
            lease = caller.lease()
            fences.append(lease.fence)
        assert fences == [2, 3, 4, 5, 6]


# -- deadlines ----------------------------------------------------------------------------------------------


def test_now_or_never() -> None:
    with started(PAINT, CHAT) as world:
        assert world.lease("paint", wait_seconds=0, holder="imagen").fence == 1
        late = Calling(world, "chat", wait_seconds=0)
        error = late.error()
        assert isinstance(error, SchedulerTimeout)
        assert late.seconds < 0.5
        assert "imagen has held paint" in error.message


def test_the_deadline_ends_on_time_and_names_the_holder() -> None:
    with started(PAINT, CHAT) as world:
        lease = world.lease("paint", holder="imagen")
        late = Calling(world, "chat", wait_seconds=0.3)
        error = late.error()
        assert isinstance(error, SchedulerTimeout)
        assert 0.3 <= late.seconds < 0.6
        (holder,) = error.details["holders"]
        assert (holder["holder"], holder["lease_id"], holder["phase"]) == ("imagen", lease.lease_id, "live")
        assert lease.token not in error.message
        assert lease.token not in str(error.details)
        assert world.waiting() == []


def test_who_gave_up_lets_those_behind_pass() -> None:
    chat = consumer("chat", 1000, beside=["hear"])
    hear = consumer("hear", 1000, beside=["chat"])
    with started(PAINT, chat, hear, policy="fifo") as world:
        world.lease("chat")
        paint = Calling(world, "paint", wait_seconds=0.3)
        queued(world, 1)
        behind = Calling(world, "hear")
        queued(world, 2)
        assert isinstance(paint.error(), SchedulerTimeout)
        assert behind.lease().consumer == "hear"


def test_a_lease_that_nobody_renews_makes_way() -> None:
    with started(PAINT, CHAT, min_ttl_seconds=0.2, default_ttl_seconds=0.2) as world:
        expires_at = world.lease("paint").expires_at
        granted_at = world.lease("chat").granted_at
        assert 0 <= granted_at - expires_at < 1


def test_a_shortened_lease_ends_when_it_says() -> None:
    with started(PAINT, CHAT, min_ttl_seconds=0.2) as world:
        lease = world.lease("paint", ttl_seconds=600)
        waiter = Calling(world, "chat")
        queued(world, 1)
        renewed, waiting = world.broker.renew(lease.token, 0.2)[:2]
        assert waiting == 1
        assert 0 <= waiter.lease().granted_at - renewed.expires_at < 1


# -- joined callers -----------------------------------------------------------------------------------------


def test_joined_callers_have_one_request_and_each_its_own_deadline() -> None:
    key = request("r1")
    with started(PAINT, CHAT) as world:
        lease = world.lease("paint")
        patient = Calling(world, "chat", wait_seconds=30, request=key)
        queued(world, 1)
        hasty = Calling(world, "chat", wait_seconds=0.2, request=key)
        late = hasty.error()
        assert isinstance(late, SchedulerTimeout)
        assert hasty.seconds < 0.5
        assert patient.waits
        assert world.waiting() == ["chat"]
        second = Calling(world, "chat", wait_seconds=30, request=key)
        until(lambda: [len(ticket.callers) for ticket in world.broker.state.tickets.values()] == [2])
        with pytest.raises(RequestMismatch):
            world.lease("paint", request=key)
        world.broker.release(lease.token)
        assert patient.lease() == second.lease()
        assert world.lease("chat", request=key) == patient.lease()


def test_the_request_goes_with_its_last_caller() -> None:
    key = request("r1")
    with started(PAINT, CHAT) as world:
        lease = world.lease("paint")
        callers = [Calling(world, "chat", wait_seconds=seconds, request=key) for seconds in (0.2, 0.3)]
        for caller in callers:
            assert isinstance(caller.error(), SchedulerTimeout)
        assert world.waiting() == []
        world.broker.release(lease.token)
        assert world.lease("chat", request=key).fence == 2, "the id may be used again"


# -- stop ---------------------------------------------------------------------------------------------------


def test_stop_answers_everyone_who_waits() -> None:
    with started(PAINT, CHAT) as world:
        lease = world.lease("paint")
        callers = []
        for number in range(1, 5):
            callers.append(Calling(world, "chat"))
            queued(world, number)
        world.broker.stop()
        for caller in callers:
            assert isinstance(caller.error(), ShuttingDown)
        with pytest.raises(ShuttingDown):
            world.lease("chat")
        assert world.broker.lease(lease.token) == lease, "a live lease is not touched"
        assert world.broker.release(lease.token)


def test_stop_answers_who_is_being_prepared() -> None:
    with started(PAINT, CHAT) as world:
        world.services["chat"].take()
        world.services["chat"].unload_gate = threading.Event()
        caller = Calling(world, "paint")
        until(lambda: world.services["chat"].asked_to_unload)
        world.broker.stop()
        assert isinstance(caller.error(), ShuttingDown)


def test_close_ends_every_thread() -> None:
    before = set(threading.enumerate())
    with started(PAINT, CHAT) as world:
        world.lease("paint")
        assert len(set(threading.enumerate()) - before) == 6
    assert set(threading.enumerate()) <= before


# -- preparing ----------------------------------------------------------------------------------------------


def test_a_preparation_that_hangs_is_answered_with_its_step() -> None:
    chat = consumer("chat", 9000, unload_timeout_seconds=1.5)
    with started(PAINT, chat, max_prepare_seconds=0.3) as world:
        world.services["chat"].take()
        gate = world.services["chat"].unload_gate = threading.Event()
        caller = Calling(world, "paint", wait_seconds=0)
        error = caller.error()
        assert isinstance(error, PrepareTimeout)
        assert 0.3 <= caller.seconds < 0.8
        assert error.details["step"] == "unloading chat"
        assert world.broker.state.queue.is_unloading("chat"), "the running step goes on"
        gate.set()
        until(lambda: not world.broker.state.queue.holds)
        assert world.broker.state.leases.next_expiry() is None, "nobody was granted"
        assert world.lease("paint").fence == 1


def test_a_failed_unload_puts_the_victim_back_into_service() -> None:
    chat = consumer("chat", 9000, unload_timeout_seconds=0.3)
    with started(PAINT, chat) as world:
        world.services["chat"].take()
        world.services["chat"].lies = True
        painter = Calling(world, "paint")
        until(lambda: world.broker.state.queue.is_unloading("chat"))
        waiter = Calling(world, "chat")
        queued(world, 1)
        error = painter.error()
        assert isinstance(error, EvictionFailed)
        assert error.details["victims"] == [
            {"consumer": "chat", "held_mib": 9000, "still_held_mib": 9000, "reason": "kept"}
        ]
        assert waiter.lease().consumer == "chat"
        assert world.services["chat"].used_mib() == 9000


def test_one_that_hangs_does_not_hide_what_another_gave_back() -> None:
    chat = consumer("chat", 5000, unload_timeout_seconds=0.6)
    hear = consumer("hear", 5000, unload_timeout_seconds=0.6)
    with started(PAINT, chat, hear) as world:
        for name in ("chat", "hear"):
            world.services[name].take()
        world.services["chat"].unload_gate = threading.Event()
        error = Calling(world, "paint").error()
        assert isinstance(error, EvictionFailed)
        assert [(v["consumer"], v["reason"]) for v in error.details["victims"]] == [("chat", "hung")]
        assert error.details["evicted"] == ["hear"]
        assert world.broker.state.memory["hear"].evictions == 1
        assert world.broker.state.memory["chat"].evictions == 0


def test_one_that_is_away_is_told_as_such() -> None:
    chat = consumer("chat", 5000, unload_timeout_seconds=0.3)
    with started(PAINT, chat) as world:
        world.services["chat"].take()
        world.services["chat"].fails = "unreachable"
        error = Calling(world, "paint").error()
        assert isinstance(error, EvictionFailed)
        assert error.details["victims"][0]["reason"] == "unreachable"


def test_an_unhealthy_target_unloads_nobody() -> None:
    with started(PAINT, CHAT) as world:
        world.services["chat"].take()
        world.services["paint"].unhealthy = "500 Internal Server Error"
        world.broker.state.memory["paint"].checked = None
        error = Calling(world, "paint").error()
        assert isinstance(error, ConsumerUnhealthy)
        assert world.services["chat"].asked_to_unload == 0
        world.services["paint"].unhealthy = None
        assert world.lease("paint").fence == 1


# -- waiting for memory -------------------------------------------------------------------------------------


def test_it_waits_for_what_a_coexisting_holder_was_promised() -> None:
    with started(*BESIDE) as world:
        chat = world.lease("chat")
        talk = Calling(world, "talk")
        until(lambda: waiting_for(world) == [WaitingFor.VRAM])
        assert world.broker.renew(chat.token, None)[1] == 1
        began = time.monotonic()
        world.broker.release(chat.token)
        assert talk.lease().consumer == "talk"
        assert time.monotonic() - began < 0.4, "it was stirred, not found by looking again"
        assert world.services["chat"].asked_to_unload == 0


def test_what_the_holder_leaves_behind_is_unloaded_then() -> None:
    with started(*BESIDE) as world:
        chat = world.lease("chat")
        world.services["chat"].take()
        talk = Calling(world, "talk")
        until(lambda: waiting_for(world) == [WaitingFor.VRAM])
        assert world.services["chat"].asked_to_unload == 0
        world.broker.release(chat.token)
        talk.lease()
        assert world.services["chat"].asked_to_unload == 1
        world.services["talk"].take()
        assert world.card.over_commits == 0


def test_waiting_for_memory_ends_with_the_deadline() -> None:
    with started(*BESIDE) as world:
        chat = world.lease("chat", holder="bot")
        late = Calling(world, "talk", wait_seconds=0.3)
        error = late.error()
        assert isinstance(error, SchedulerTimeout)
        assert 0.3 <= late.seconds < 0.7
        assert error.details["waiting_for"] == "vram"
        assert "bot has held chat" in error.message
        until(lambda: len(world.broker.state.queue.holds) == 1)
        assert world.broker.lease(chat.token) == chat


def test_memory_that_a_game_gives_back_is_found() -> None:
    chat, talk = consumer("chat", 9000, beside=["talk"]), consumer("talk", 14000, beside=["chat"])
    with started(chat, talk) as world:
        world.lease("chat")
        world.services["chat"].take()
        world.games[0].set_used(1000)
        caller = Calling(world, "talk")
        until(lambda: waiting_for(world) == [WaitingFor.VRAM])
        world.games[0].set_used(0)
        assert caller.lease(2).consumer == "talk"


def test_a_game_that_stays_is_refused_with_its_name() -> None:
    with started(PAINT, CHAT) as world:
        world.games[0].set_used(10000)
        error = Calling(world, "paint").error()
        assert isinstance(error, InsufficientVram)
        assert error.details["untracked"] == [{"pid": world.games[0].pid, "name": "game.exe", "used_mib": 10000}]


# -- threads that must not wait for each other --------------------------------------------------------------


def test_a_dialect_that_hangs_does_not_keep_the_watchdog_from_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "HEALTH_EACH_SECONDS", 0.02)
    monkeypatch.setattr(broker_module, "HEALTH_IN_USE_EACH_SECONDS", 0.02)
    with started(PAINT, CHAT, consumer("slow"), min_ttl_seconds=0.2) as world:
        slow = world.services["slow"]
        until(lambda: slow.asked_for_health)
        slow.health_gate = threading.Event()
        asked = slow.asked_for_health
        until(lambda: slow.asked_for_health > asked)
        expires_at = world.lease("paint", ttl_seconds=0.2).expires_at
        assert 0 <= world.lease("chat").granted_at - expires_at < 1
        assert not slow.health_gate.is_set()


def test_a_lease_ends_while_an_unload_hangs_on_the_other_gpu() -> None:
    left, right = consumer("left", 9000), consumer("right", 9000, unload_timeout_seconds=5)
    far, other = consumer("far", 9000, gpus=(1,)), consumer("other", 9000, gpus=(1,))
    with started(left, right, far, other, totals_mib=(24000, 24000), min_ttl_seconds=0.2) as world:
        world.services["right"].take()
        world.services["right"].unload_gate = threading.Event()
        hanging = Calling(world, "left")
        until(lambda: world.services["right"].asked_to_unload)
        expires_at = world.lease("far", ttl_seconds=0.2).expires_at
        assert 0 <= world.lease("other").granted_at - expires_at < 1
        assert hanging.waits
        world.services["right"].unload_gate.set()
        assert hanging.lease().consumer == "left"
