"""Voice over chat: speech is heard and spoken while a chat model streams, over real HTTP; nobody waits for its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from gpumgr.sim.stage import MODEL, SMALL, Stage
from tests.brokers import RunningBroker

ENDLESS = 1_000_000
"""Tokens: the answer ends when its caller has had enough."""
AT_ONCE = {"ollama": 1, "mvoice": 2, "whisper": 1}
NOW_OR_NEVER = {"X-GPU-Wait": "0"}


@pytest.fixture(params=["can_coexist_with", "by_size"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningBroker]:
    with Stage(tmp_path, speed=20) as stage:
        stage.ollama.tokens, stage.ollama.token_seconds = ENDLESS, 0.01
        config = stage.config()
        for name in SMALL:
            consumer: dict[str, Any] = config["consumers"][name]
            consumer["max_concurrency"] = AT_ONCE[name]
            if request.param == "by_size":
                del consumer["can_coexist_with"]
                consumer["coexist"] = "by_size"
        with RunningBroker(tmp_path, config) as running:
            yield running


def chat(broker: RunningBroker) -> requests.Response:
    words = {"model": MODEL, "messages": [{"role": "user", "content": "tell me everything"}], "stream": True}
    return requests.post(f"{broker.url}/v1/llm", json=words, stream=True, headers=NOW_OR_NEVER, timeout=30)


def speak(broker: RunningBroker) -> requests.Response:
    return requests.post(f"{broker.url}/v1/tts", json={"input": "hello"}, headers=NOW_OR_NEVER, timeout=30)


def listen(broker: RunningBroker) -> requests.Response:
    said = {"file": ("said.wav", b"RIFF")}
    return requests.post(f"{broker.url}/v1/stt", files=said, headers=NOW_OR_NEVER, timeout=30)


def in_use(broker: RunningBroker) -> dict[str, str]:
    return {each["name"]: each["in_use"] for each in broker.status()["consumers"] if each["in_use"] is not None}


def test_speech_is_answered_while_a_chat_streams(broker: RunningBroker) -> None:
    with chat(broker) as stream:
        tokens = stream.iter_lines()
        assert b'"done":false' in next(tokens).replace(b" ", b"")
        for _ in range(2):  # the first one loads, the second one finds it loaded
            assert speak(broker).headers["Content-Type"] == "audio/wav"
            assert "transcription" in listen(broker).json()["text"]
        assert b'"done":false' in next(tokens).replace(b" ", b"")

        voices = [broker.acquire(kind="tts", wait_seconds=0) for _ in range(AT_ONCE["mvoice"])]
        assert [voice.status_code for voice in voices] == [200, 200]
        ear = broker.acquire(kind="stt", wait_seconds=0).json()
        assert in_use(broker) == {"ollama": "proxy", "mvoice": "lease", "whisper": "lease"}

        # each of them up to its own max_concurrency, for leases and calls alike
        for refused in (broker.acquire(kind="tts", wait_seconds=0), speak(broker), listen(broker), chat(broker)):
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "scheduler_timeout")
        broker.release(voices[0].json()["token"])
        assert speak(broker).status_code == 200
        assert broker.acquire(kind="tts", wait_seconds=0).status_code == 200
        broker.release(ear["token"])
        assert listen(broker).status_code == 200
        assert b'"done":false' in next(tokens).replace(b" ", b"")
    assert [event["type"] for event in broker.status()["events"] if "evict" in event["type"]] == []
