"""A lease's time, on the real clock, moved by freezegun.

freezegun freezes both faces of the clock for this thread, while a Condition would wait in real time: so nothing
here waits. Expiry is a call, ``tick``, and a preparation is stepped by the test.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import freezegun
import pytest
from freezegun.api import FrozenDateTimeFactory, StepTickTimeFactory, TickingDateTimeFactory

from gpumgr.adapters.clock import SystemClock
from gpumgr.core.lease import Lease
from gpumgr.errors import LeaseUnknown, RequestEnded, SchedulerTimeout
from tests.worlds import World, catalog, consumer, request

Frozen = FrozenDateTimeFactory | StepTickTimeFactory | TickingDateTimeFactory


def in_frozen_time(test: Callable[..., None]) -> Callable[..., None]:
    """Hand ``world`` and ``frozen`` to the test. Not a fixture: pytest's own stopwatch would be frozen with it."""

    def run(**words: Any) -> None:
        with freezegun.freeze_time("2026-11-23T09:00:00Z") as frozen:
            consumers = catalog(consumer("paint", 14000), consumer("chat", 9000))
            world = World(consumers, clock=SystemClock(), move=lambda seconds: frozen.tick(seconds))
            test(world=world, frozen=frozen, **words)

    asked = inspect.signature(test).parameters
    rest = [parameter for name, parameter in asked.items() if name not in ("world", "frozen")]
    functools.update_wrapper(run, test)
    run.__signature__ = inspect.Signature(rest)  # type: ignore[attr-defined]
    return run


def events(world: World) -> list[str]:
    return [event["type"] for event in world.broker.state.events]


@in_frozen_time
def test_freezegun_moves_both_faces_of_the_clock(world: World, frozen: Frozen) -> None:
    clock = world.clock
    assert isinstance(clock, SystemClock)
    monotonic, utc = clock.monotonic(), clock.utc()
    frozen.tick(100)
    assert clock.monotonic() - monotonic == pytest.approx(100)
    assert (clock.utc() - utc).total_seconds() == pytest.approx(100)


@in_frozen_time
def test_alive_until_the_instant_and_dead_at_it(world: World, frozen: Frozen) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    assert lease.expires_at - lease.granted_at == 60
    frozen.tick(59.5)
    assert world.broker.tick() == 0
    assert world.broker.lease(lease.token) == lease
    frozen.tick(0.5)
    assert world.now >= lease.expires_at
    with pytest.raises(LeaseUnknown):
        world.broker.lease(lease.token)
    assert world.broker.tick() == 0, "whoever looks first ends it"
    assert [(kind, noted.lease_id) for kind, noted in world.store.written] == [
        ("grant", lease.lease_id),
        ("expire", lease.lease_id),
    ]


@in_frozen_time
def test_renew_at_the_last_moment(world: World, frozen: Frozen) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    for _ in range(3):
        frozen.tick(59.5)
        renewed, waiting, healthy = world.broker.renew(lease.token, None)[:3]
        assert renewed.expires_at == pytest.approx(world.now + 60)
        assert (waiting, healthy) == (0, True)
        assert world.broker.tick() == 0
    assert renewed.fence == lease.fence
    frozen.tick(60)
    assert world.broker.tick() == 1


@in_frozen_time
def test_never_revived_whoever_looks_first(world: World, frozen: Frozen) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    frozen.tick(60)
    for _ in range(2):  # before the watchdog, and after it
        with pytest.raises(LeaseUnknown):
            world.broker.renew(lease.token, 600)
        assert world.broker.release(lease.token) is False
        world.broker.tick()
    assert events(world) == ["grant", "expire"]


@pytest.mark.parametrize(("asked", "given"), [(None, 120), (0.5, 10), (10, 10), (11, 11), (600, 600), (9999, 600)])
@in_frozen_time
def test_clamped_at_the_grant_and_at_each_renew(
    world: World, frozen: Frozen, asked: float | None, given: float
) -> None:
    lease = world.grant("paint", ttl_seconds=asked)
    assert lease.ttl_seconds == given
    renewed = world.broker.renew(lease.token, asked).lease
    assert renewed.ttl_seconds == given
    frozen.tick(given - 0.5)
    assert world.broker.tick() == 0
    frozen.tick(0.5)
    assert world.broker.tick() == 1


@in_frozen_time
def test_a_renew_may_shorten(world: World, frozen: Frozen) -> None:
    lease = world.grant("paint", ttl_seconds=600)
    assert world.broker.renew(lease.token, 3)[0].ttl_seconds == 10
    frozen.tick(10)
    assert world.broker.tick() == 1


@in_frozen_time
def test_the_watchdog_gives_the_gpu_to_who_waits(world: World, frozen: Frozen) -> None:
    lease = world.grant("paint", ttl_seconds=60)
    waiter = world.ask("chat", wait_seconds=120)
    assert world.broker.renew(lease.token, None)[1] == 1
    frozen.tick(60)
    world.prepare()
    assert waiter.waits, "nobody looked yet"
    assert world.broker.tick() == 1
    world.prepare()
    assert waiter.lease().fence == lease.fence + 1
    assert events(world) == ["grant", "expire", "grant"]


@in_frozen_time
def test_whoever_asks_ends_what_is_over_though_the_watchdog_is_late(world: World, frozen: Frozen) -> None:
    world.grant("paint", ttl_seconds=60)
    frozen.tick(60)
    assert isinstance(world.grant("chat", wait_seconds=0), Lease)


@in_frozen_time
def test_the_ttl_begins_with_the_grant_not_with_the_request(world: World, frozen: Frozen) -> None:
    first = world.grant("paint", ttl_seconds=60)
    waiter = world.ask("chat", ttl_seconds=10)
    frozen.tick(40)
    world.broker.release(first.token)
    world.prepare()
    assert waiter.lease().expires_at == pytest.approx(world.now + 10)


@in_frozen_time
def test_a_deadline_ends_at_its_instant_and_names_the_holder(world: World, frozen: Frozen) -> None:
    world.grant("paint", ttl_seconds=600, holder="imagen")
    waiter = world.ask("chat", wait_seconds=5)
    frozen.tick(4.5)
    world.wake()
    assert waiter.waits
    frozen.tick(0.5)
    world.wake()
    error = waiter.error()
    assert isinstance(error, SchedulerTimeout)
    assert "imagen has held paint for 5 s" in error.message
    assert error.details["waiting_for"] == "holder"
    assert error.details["holders"][0]["expires_at"] == "2026-11-23T09:10:00.000Z"
    assert world.broker.state.queue.waiting() == []


@in_frozen_time
def test_a_request_of_an_expired_lease_has_ended_for_a_day(world: World, frozen: Frozen) -> None:
    world.grant("paint", ttl_seconds=60, request=request("r1"))
    frozen.tick(60)
    with pytest.raises(RequestEnded, match="expired"):
        world.ask("paint", request=request("r1"))
    frozen.tick(24 * 3600 + 1)
    assert world.grant("paint", request=request("r1")).fence == 2
