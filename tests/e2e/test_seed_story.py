"""The story gpumgr was made for, through NVML: three services fill the card, a picture needs it, a game takes it.

The broker reads the stand-in driver; every service is a process of its own, and the driver tells its memory under a
real pid. Whose it is then comes from /proc, each in the one way that can tell it: whisper and ComfyUI by the port that
they listen on; mvoice, which computes in a worker that is neither listener nor child of one, by a pattern on the
command line; ollama by its port, or, as the real one, by a runner that is the child of the listener.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from gpumgr.sim.stage import MODEL, RESIDENT_MIB, ROUTING, SMALL
from tests.brokers import RunningBroker
from tests.driver_card import TOTAL_MIB, UUID, DriverCard
from tests.services import ServiceProcess, Sleeper
from tests.stand_in import build_or_skip
from tests.waiting import until

GAME = r"Z:\games\BG3\bin\bg3_dx11.exe"
RESIDUAL_MIB = 768
IMAGE = {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}


class World:
    """Four services, a card and a broker, all of them processes."""

    def __init__(self, directory: Path, stack: ExitStack, library: Path, *, ollama: str) -> None:
        self.card = DriverCard(library, directory / "card")
        self.has_runner = ollama == "ollama-with-runner"
        worker = stack.enter_context(Sleeper("mvoice-worker"))
        self.services = {
            "comfyui": ServiceProcess("comfyui", self.card),
            "ollama": ServiceProcess(ollama, self.card),
            "mvoice": ServiceProcess("mvoice", self.card, worker),
            "whisper": ServiceProcess("whisper", self.card),
        }
        for service in self.services.values():
            stack.enter_context(service)
        self.broker = stack.enter_context(RunningBroker(directory, self._config(), self.card.env()))

    def _config(self) -> dict[str, Any]:
        """Nothing of the probe: a broker reads the driver unless told otherwise."""
        return {"routing": dict(ROUTING), "consumers": {name: self._consumer(name) for name in self.services}}

    def _consumer(self, name: str) -> dict[str, Any]:
        consumer: dict[str, Any] = {
            "dialect": name if name in ("comfyui", "ollama") else "http",
            "url": self.services[name].url,
            "vram_resident_mib": RESIDENT_MIB[name],
            "can_coexist_with": [other for other in SMALL if other != name and name in SMALL],
        }
        if consumer["dialect"] == "http":
            consumer["health"] = {"path": "/health"}
            consumer["busy"] = {"path": "/busy", "json": "running"}
            consumer["unload"] = {"path": "/unload", "json": {}}
        if name == "mvoice":
            consumer["processes"] = ["*mvoice-worker"]
        return consumer

    def ask(self, name: str, path: str, **body: Any) -> requests.Response:
        """As a user who works there."""
        answer = requests.post(self.services[name].url + path, timeout=20, **body)
        answer.raise_for_status()
        return answer

    def warm(self) -> None:
        self.ask("mvoice", "/v1/audio/speech", json={"input": "Good evening."})
        self.ask("whisper", "/v1/audio/transcriptions", files={"file": ("said.wav", b"RIFF")})
        self.chat(self.services["ollama"].url)

    def chat(self, url: str) -> None:
        requests.post(f"{url}/api/generate", json={"model": MODEL, "prompt": "Hello"}, timeout=20).raise_for_status()

    def render(self, url: str) -> None:
        """One picture, with the calls of ComfyUI's own page."""
        prompt_id = requests.post(f"{url}/prompt", json=IMAGE, timeout=20).json()["prompt_id"]
        done = until(lambda: requests.get(f"{url}/history/{prompt_id}", timeout=20).json(), 20)
        assert done[prompt_id]["status"]["status_str"] == "success"

    def shown(self) -> dict[str | None, int]:
        """MiB by consumer as status tells it; None: a stranger's."""
        return {p["consumer"]: p["used_mib"] for p in self.broker.status()["gpus"][0]["processes"]}

    def parents(self) -> dict[str | None, int]:
        """Of the processes that hold the memory: their parents."""
        listed = self.broker.status()["gpus"][0]["processes"]
        return {p["consumer"]: psutil.Process(p["pid"]).ppid() for p in listed}

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.broker.status()["events"] if event["type"] == kind]


@pytest.fixture(params=["ollama", "ollama-with-runner"])
def world(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    library = build_or_skip(tmp_path_factory.getbasetemp() / "stand-in")
    with ExitStack() as stack:
        yield World(tmp_path, stack, library, ollama=request.param)


def test_the_card_goes_from_three_services_to_a_picture_to_a_game_and_back(world: World) -> None:
    world.warm()
    _all_three_are_on_the_card(world)
    _a_picture_gets_the_card(world)
    _then_a_chat(world)
    _a_game_keeps_it_from_the_next_picture(world)
    lease = world.broker.acquire(kind="image", holder="imagen").json()
    world.render(lease["url"])
    assert world.broker.release(lease["token"]).json() == {"released": True}
    told = world.card.read()
    assert told.over_commits == 0
    assert told.peak_mib <= TOTAL_MIB
    assert world.events("evict_failed") == []
    assert "Traceback" not in world.broker.log()


def _all_three_are_on_the_card(world: World) -> None:
    until(lambda: world.shown() == {name: RESIDENT_MIB[name] for name in SMALL})
    gpu = world.broker.status()["gpus"][0]
    assert (gpu["uuid"], gpu["total_mib"], gpu["used_mib"], gpu["free_mib"]) == (UUID, TOTAL_MIB, 14000, 10000)
    here = os.getpid()
    parents = {"whisper": here, "mvoice": here, "ollama": world.services["ollama"].pid if world.has_runner else here}
    assert world.parents() == parents


def _a_picture_gets_the_card(world: World) -> None:
    lease = world.broker.acquire(kind="image", holder="imagen", ttl_seconds=30).json()
    assert all(row.used_mib <= RESIDUAL_MIB for row in world.card.read().rows.values())
    assert (lease["consumer"], lease["url"]) == ("comfyui", world.services["comfyui"].url)
    assert (lease["gpus"], lease["gpu_uuids"]) == ([0], [UUID])
    evicted = {event["consumer"]: event for event in world.events("evict")}
    assert {name: event["held_mib"] for name, event in evicted.items()} == {name: RESIDENT_MIB[name] for name in SMALL}
    assert all(event["still_held_mib"] <= RESIDUAL_MIB for event in evicted.values())
    assert all(event["for"] == "comfyui" for event in evicted.values())
    world.render(lease["url"])
    until(lambda: world.shown().get("comfyui") == RESIDENT_MIB["comfyui"])
    renewed = world.broker.renew(lease["token"]).json()
    assert (renewed["ttl_seconds"], renewed["waiting"], renewed["consumer_healthy"]) == (30, 0, True)
    assert world.broker.release(lease["token"]).json() == {"released": True}


def _then_a_chat(world: World) -> None:
    """Who evicts ComfyUI: a game that starts beside 14000 MiB would not fit."""
    lease = world.broker.acquire(kind="llm", holder="chat").json()
    world.chat(lease["url"])
    until(lambda: world.shown().get("ollama") == RESIDENT_MIB["ollama"])
    world.broker.release(lease["token"])


def _a_game_keeps_it_from_the_next_picture(world: World) -> None:
    with Sleeper() as game:
        world.card.admit(game.pid, GAME)
        world.card.set_used(game.pid, 10600)
        answer = world.broker.acquire(kind="image", holder="imagen")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["retryable"]) == (503, "insufficient_vram", False)
        assert answer.headers["x-should-retry"] == "false"
        assert error["details"]["untracked"] == [{"pid": game.pid, "name": "bg3_dx11.exe", "used_mib": 10600}]
        assert error["details"]["evicted"] == ["ollama"]
        assert f"bg3_dx11.exe (pid {game.pid}) 10600 MiB" in error["message"]
        until(lambda: world.shown().get(None) == 10600)
    world.card.end_process(game.pid)
