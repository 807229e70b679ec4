"""Services that loading starts, and servers that sleep: when health is asked, what is loaded, what status says."""

from __future__ import annotations

from typing import Any

import pytest

from gpumgr.core.placement import Report
from gpumgr.errors import ConsumerUnhealthy
from gpumgr.runtime.ports import BackendError
from gpumgr.runtime.snapshot import snapshot
from tests.worlds import Service, World, catalog, consumer

SIZE_MIB = 4000
CONTEXT_MIB = 300


class Started(Service):
    """A unit or a container: down until it is loaded. ``serves``: it passes its health check when it runs."""

    load_starts_service = True
    runs = False
    serves = True
    loads = 0

    def health(self) -> None:
        self.asked_for_health += 1
        if not self.runs:
            raise BackendError("failed", "it is inactive", stopped=True)
        if not self.serves:
            raise BackendError("failed", "it answers 500")

    def load(self) -> None:
        self.loads += 1
        self.runs = True
        self.take()

    def loaded(self) -> Report | None:
        return Report(loaded=self.runs)


def world_of() -> tuple[World, Started]:
    world = World(catalog(consumer("paint", SIZE_MIB), consumer("voice", SIZE_MIB)))
    of = world.catalog.consumers["paint"]
    service = world.services["paint"] = Started(of, world.card, 9001, can_load=True, deferred=True)
    return world, service


def paint(world: World) -> dict[str, Any]:
    world.broker.glance()
    world.broker._observe_servers()
    (found,) = [c for c in snapshot(world.broker)["consumers"] if c["name"] == "paint"]
    return dict(found)


def test_one_that_is_down_on_purpose_is_neither_healthy_nor_not() -> None:
    world, _ = world_of()
    assert (paint(world)["healthy"], paint(world)["health_error"]) == (None, None)


def test_its_health_is_asked_only_after_the_load() -> None:
    world, service = world_of()
    lease = world.grant("paint")
    assert (service.loads, service.asked_for_health) == (1, 1)
    assert lease.consumer == "paint"


def test_under_a_lease_one_that_is_down_is_unhealthy() -> None:
    world, service = world_of()
    world.grant("paint")
    service.runs = False
    world.pass_time(10)
    assert (paint(world)["healthy"], paint(world)["health_error"]) == (False, "it is inactive")


# One that was on the card already was granted without anybody having asked whether it serves.
@pytest.mark.parametrize("serves", [True, False])
def test_one_that_runs_already_is_asked_before_the_grant_and_not_loaded(serves: bool) -> None:
    world, service = world_of()
    service.runs, service.serves = True, serves
    service.take()
    world.services["voice"].take(CONTEXT_MIB)
    if serves:
        assert world.grant("paint").consumer == "paint"
        assert service.asked_for_health == 1
    else:
        assert isinstance(world.refusal("paint"), ConsumerUnhealthy)
    assert service.loads == 0


# vLLM asleep keeps a GB: it looked loaded after a restart of the broker, and nobody woke it.
def test_one_that_says_it_is_not_loaded_is_loaded_whatever_the_card_shows() -> None:
    world, service = world_of()
    service.take(1000)
    world.grant("paint")
    assert (service.loads, service.used_mib()) == (1, SIZE_MIB)
