"""The whole set: one card, four services, a control server, and the configuration that fits them.

Owns: what the standard services are and how long they take. Must not: start a broker.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from gpumgr.sim.card import SimulatedCard, SimulatedGpu
from gpumgr.sim.comfyui import ComfyUI
from gpumgr.sim.control import Control
from gpumgr.sim.ollama import Ollama
from gpumgr.sim.service import SimulatedService
from gpumgr.sim.speech import Speech
from gpumgr.sim.untracked import UntrackedProcess, game

MODEL = "llama3.1:8b"
RESIDENT_MIB = {"comfyui": 14000, "ollama": 9000, "mvoice": 3000, "whisper": 2000}
SMALL = ("ollama", "mvoice", "whisper")
"""These fit beside each other."""
ROUTING = {"image": "comfyui", "llm": "ollama", "tts": "mvoice", "stt": "whisper"}
PROXY_PATHS = {"mvoice": "/v1/audio/speech", "whisper": "/v1/audio/transcriptions"}
WARM_SECONDS = 120.0


class Stage:
    """``speed`` 1 takes about as long as real services with fast disks; 20 suits a test.

    The card is ``directory/card.json``, written from construction on; the directory must exist.
    """

    def __init__(self, directory: Path, *, speed: float = 1.0, total_mib: int = 24000) -> None:
        self.directory = directory.resolve()
        self.card_path = self.directory / "card.json"
        self.card = SimulatedCard((SimulatedGpu(total_mib=total_mib),), self.card_path)
        self.comfyui = ComfyUI(
            "comfyui",
            self.card,
            resident_mib=RESIDENT_MIB["comfyui"],
            load_seconds=4 / speed,
            unload_seconds=0.4 / speed,
            render_seconds=3 / speed,
        )
        self.ollama = Ollama(
            "ollama",
            self.card,
            models={MODEL: RESIDENT_MIB["ollama"]},
            load_seconds=2.5 / speed,
            unload_seconds=0.1 / speed,
            tokens=40,
            token_seconds=0.025 / speed,
        )
        self.mvoice = self._speech("mvoice", speed)
        self.whisper = self._speech("whisper", speed)
        self.services: dict[str, SimulatedService] = {
            service.name: service for service in (self.comfyui, self.ollama, self.mvoice, self.whisper)
        }
        self.control = Control(self.card, self.services)

    def _speech(self, name: str, speed: float) -> Speech:
        return Speech(
            name,
            self.card,
            resident_mib=RESIDENT_MIB[name],
            load_seconds=1 / speed,
            unload_seconds=0.3 / speed,
            work_seconds=1 / speed,
        )

    def start(self) -> None:
        for service in self.services.values():
            service.start()
        self.control.start()

    def stop(self) -> None:
        self.control.stop()
        for service in self.services.values():
            service.stop()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def addresses(self) -> dict[str, Any]:
        return {
            "services": {name: service.url for name, service in self.services.items()},
            "control": self.control.url,
            "card": str(self.card_path),
        }

    def warm(self, name: str) -> None:
        """Make a service resident by the request that a user would make; returns when it is.

        Raises: requests.RequestException, RuntimeError.
        """
        url = self.services[name].url
        if name == "comfyui":
            self._render_once(url)
        elif name == "ollama":
            _ok(requests.post(f"{url}/api/generate", json={"model": MODEL}, timeout=WARM_SECONDS))
        elif name == "mvoice":
            _ok(requests.post(url + PROXY_PATHS[name], json={"input": "warm"}, timeout=WARM_SECONDS))
        else:
            _ok(requests.post(url + PROXY_PATHS[name], files={"file": ("warm.wav", b"RIFF")}, timeout=WARM_SECONDS))

    def _render_once(self, url: str) -> None:
        graph = {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}
        prompt_id = _ok(requests.post(f"{url}/prompt", json=graph, timeout=5)).json()["prompt_id"]
        deadline = time.monotonic() + WARM_SECONDS
        while time.monotonic() < deadline:
            entry = _ok(requests.get(f"{url}/history/{prompt_id}", timeout=5)).json().get(prompt_id)
            if entry is not None:
                if entry["status"]["status_str"] != "success":
                    raise RuntimeError(f"comfyui did not render: {entry['status']['messages'][-1]}")
                return
            time.sleep(0.01)
        raise RuntimeError(f"comfyui did not render within {WARM_SECONDS} s")

    def take_game(self, name: str = "game", mib: int = 6000) -> UntrackedProcess:
        """Raises: OutOfMemory."""
        return game(self.card, name, mib)

    def config(
        self,
        bind: str = "127.0.0.1:0",
        *,
        state_dir: Path | None = None,
        headroom_mib: int = 512,
    ) -> dict[str, Any]:
        """The consumers' configuration for these services; started, because only then the ports are known."""
        return {
            "server": {"bind": bind, "state_dir": str(state_dir or self.directory / "state")},
            "gpu": {"probe": "simulated", "simulated_card": str(self.card_path), "headroom_mib": headroom_mib},
            "routing": dict(ROUTING),
            "consumers": {name: self._consumer(name) for name in self.services},
        }

    def _consumer(self, name: str) -> dict[str, Any]:
        consumer: dict[str, Any] = {
            "dialect": name if name in ("comfyui", "ollama") else "http",
            "url": self.services[name].url,
            "vram_resident_mib": RESIDENT_MIB[name],
        }
        if name in SMALL:
            consumer["can_coexist_with"] = [other for other in SMALL if other != name]
        if name in PROXY_PATHS:
            consumer["health"] = {"path": "/health", "timeout_seconds": 2}
            consumer["busy"] = {"path": "/busy", "json": "running", "above": 0}
            consumer["unload"] = {"method": "POST", "path": "/unload", "json": {}, "timeout_seconds": 30}
            consumer["proxy_path"] = PROXY_PATHS[name]
        return consumer


def _ok(response: requests.Response) -> requests.Response:
    response.raise_for_status()
    return response
