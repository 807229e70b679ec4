"""OpenAI's SDK through gpumgr, as it comes: a base URL is all that a program changes.

The consumers are the simulated ones, with ollama's and a speech server's OpenAI routes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from gpumgr.sim.stage import MODEL, Stage
from tests.brokers import RunningBroker
from tests.waiting import until

HELLO: list[Any] = [{"role": "user", "content": "When is the card free?"}]
ANSWER = "The card is free when the driver says so. Not before."


class World:
    """A broker and its consumers. Every test gives back what it took."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.stage = stack.enter_context(Stage(directory, speed=20))
        self.broker = stack.enter_context(RunningBroker(directory, self.stage.config()))
        self.ollama = self.stage.ollama

    def in_use(self, name: str) -> object:
        return next(c["in_use"] for c in self.broker.status()["consumers"] if c["name"] == name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("sdk"), stack)


@pytest.fixture
def llm(world: World) -> Iterator[openai.OpenAI]:
    with client_of(world.broker, "llm") as client:
        yield client


def client_of(broker: RunningBroker, kind: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{broker.url}/v1/{kind}/v1", api_key="sk-simulated", **options)


def refusals(broker: RunningBroker) -> list[str]:
    return [event["code"] for event in broker.status()["events"] if event["type"] == "refuse"]


def test_a_whole_answer(llm: openai.OpenAI, world: World) -> None:
    answer = llm.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content.startswith(ANSWER)
    assert answer.usage.completion_tokens == world.ollama.tokens
    assert world.in_use("ollama") is None


def test_a_streamed_answer_comes_word_by_word_and_holds_the_gpu_to_its_end(
    llm: openai.OpenAI, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.ollama, "token_seconds", 0.5)
    with llm.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream:
        pieces = [next(stream).choices[0].delta.content]
        assert world.in_use("ollama") == "proxy"
        world.ollama.token_seconds = 0.001
        pieces += [chunk.choices[0].delta.content for chunk in stream]
    assert len(pieces) == world.ollama.tokens + 1
    assert "".join(piece or "" for piece in pieces).startswith(ANSWER)
    until(lambda: world.in_use("ollama") is None)  # the SDK stops at [DONE], a moment before the answer's end


def test_a_stream_that_its_caller_leaves_gives_the_gpu_back(
    llm: openai.OpenAI, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.ollama, "tokens", 1_000_000)
    with llm.chat.completions.create(model=MODEL, messages=HELLO, stream=True) as stream:
        next(stream)
    until(lambda: world.in_use("ollama") is None)
    until(lambda: world.ollama.busy == 0)


def test_the_models(llm: openai.OpenAI) -> None:
    assert [model.id for model in llm.models.list()] == [MODEL]


def test_speech_in_both_directions(world: World) -> None:
    with client_of(world.broker, "tts") as tts, client_of(world.broker, "stt") as stt:
        speech = tts.audio.speech.create(model="tts-1", voice="alloy", input="Good evening.").read()
        assert speech.startswith(b"RIFF")
        text = stt.audio.transcriptions.create(model="whisper-1", file=("said.wav", speech)).text
    assert text == f"A simulated transcription of {len(speech)} bytes."


def test_an_error_of_gpumgr_is_the_sdks_own(world: World) -> None:
    with client_of(world.broker, "video") as client, pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert (caught.value.code, caught.value.type) == ("kind_unknown", "gpumgr_error")
    assert "image, llm, stt, tts" in caught.value.message


def test_an_error_of_the_consumer_is_its_own(llm: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        llm.chat.completions.create(model="nobody", messages=HELLO)
    assert caught.value.type == "api_error"
    assert "nobody" in caught.value.message


def test_what_can_never_fit_is_not_tried_again(tmp_path: Path, stage: Stage) -> None:
    config = stage.config()
    config["consumers"]["ollama"]["vram_resident_mib"] = 30000
    with RunningBroker(tmp_path, config) as broker, client_of(broker, "llm", max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert refusals(broker) == ["insufficient_vram"]
    assert (caught.value.status_code, caught.value.code) == (503, "insufficient_vram")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.body["details"]["needed_mib"] == 30000


def test_a_turn_that_did_not_come_is_asked_for_again(world: World) -> None:
    """After as long as Retry-After says; the caller notices nothing."""
    before = len(refusals(world.broker))
    lease = world.broker.acquire(kind="image").json()

    def release_once_refused() -> None:
        until(lambda: len(refusals(world.broker)) > before)
        world.broker.release(lease["token"])

    releasing = threading.Thread(target=release_once_refused)
    releasing.start()
    with client_of(world.broker, "llm", max_retries=1, default_headers={"X-GPU-Wait": "0"}) as client:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    releasing.join()
    assert answer.choices[0].message.content.startswith(ANSWER)
    assert refusals(world.broker)[before:] == ["scheduler_timeout"]


def test_a_lease_lets_the_sdk_pass(world: World) -> None:
    token = world.broker.acquire(kind="llm").json()["token"]
    with client_of(world.broker, "llm", default_headers={"X-GPU-Lease": token}) as client:
        assert client.models.list().data[0].id == MODEL
        world.broker.release(token)
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.list()
    assert caught.value.code == "lease_unknown"
