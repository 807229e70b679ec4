"""ollama's truths, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from gpumgr.sim.card import SimulatedCard
from gpumgr.sim.ollama import Ollama
from gpumgr.sim.untracked import game
from tests.sim.conftest import Aside
from tests.waiting import until

MODEL = "llama3.1:8b"
CONTEXT_MIB = 400


@pytest.fixture
def ollama(card: SimulatedCard, aside: Aside) -> Iterator[Ollama]:
    del aside  # asked for first, so that it ends last: its requests are cut by this service's end
    models = {MODEL: 9000, "small:latest": 2000}
    with Ollama("ollama", card, models=models, load_seconds=0.06, unload_seconds=0.04, token_seconds=0.005) as service:
        yield service


def post(service: Ollama, path: str, **body: Any) -> requests.Response:
    return requests.post(service.url + path, json={"model": MODEL} | body, timeout=5)


def ps(service: Ollama, seconds: float = 5) -> list[str]:
    answer = requests.get(f"{service.url}/api/ps", timeout=seconds).json()
    return [model["name"] for model in answer["models"]]


def unload(service: Ollama, path: str = "/api/generate") -> None:
    answer = post(service, path, keep_alive=0)
    assert (answer.status_code, answer.json()["done"], answer.json()["done_reason"]) == (200, True, "unload")


def test_reports(ollama: Ollama) -> None:
    assert requests.get(ollama.url, timeout=5).text == "Ollama is running"
    assert requests.get(f"{ollama.url}/api/version", timeout=5).json() == {"version": "0.33.0"}
    assert [m["name"] for m in requests.get(f"{ollama.url}/api/tags", timeout=5).json()["models"]] == list(
        ollama.models
    )
    assert [m["id"] for m in requests.get(f"{ollama.url}/v1/models", timeout=5).json()["data"]] == list(ollama.models)
    assert post(ollama, "/api/show").json()["details"]["format"] == "gguf"
    assert post(ollama, "/api/show", model="none").status_code == 404
    assert ps(ollama) == []


def test_generate_loads_streams_and_stays(card: SimulatedCard, ollama: Ollama) -> None:
    answer = post(ollama, "/api/generate", prompt="why")
    lines = [json.loads(line) for line in answer.iter_lines()]
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    assert len(lines) == ollama.tokens + 1
    assert [line["done"] for line in lines] == [False] * ollama.tokens + [True]
    assert lines[-1]["done_reason"] == "stop"
    (loaded,) = requests.get(f"{ollama.url}/api/ps", timeout=5).json()["models"]
    assert loaded["size_vram"] == 9000 * 1024**2
    assert "T" in loaded["expires_at"]
    assert (card.used_mib(ollama.pid), ollama.loads, ollama.busy) == (9000, 1, 0)


def test_answers_in_one_piece(ollama: Ollama) -> None:
    messages = [{"role": "user", "content": "why"}]
    whole = post(ollama, "/api/chat", messages=messages, stream=False).json()
    assert len(whole["message"]["content"].split()) == ollama.tokens
    openai = post(ollama, "/v1/chat/completions", messages=messages).json()
    assert openai["choices"][0]["message"]["content"] == whole["message"]["content"]
    assert post(ollama, "/api/generate").json()["done_reason"] == "load"


def test_server_sent_events_end_with_done(ollama: Ollama) -> None:
    answer = post(ollama, "/v1/chat/completions", messages=[{"role": "user", "content": "why"}], stream=True)
    events = [line for line in answer.iter_lines() if line]
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"
    assert json.loads(events[0].removeprefix(b"data: "))["choices"][0]["delta"]["content"]
    assert json.loads(events[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "stop"


def test_a_stream_comes_word_by_word_and_ends_with_its_reader(ollama: Ollama) -> None:
    ollama.token_seconds = 0.05
    with requests.post(
        f"{ollama.url}/api/generate", json={"model": MODEL, "prompt": "why"}, stream=True, timeout=5
    ) as answer:
        next(answer.iter_lines(chunk_size=1))
        assert ollama.busy == 1
    until(lambda: ollama.busy == 0)
    assert ps(ollama) == [MODEL]


def test_an_unload_is_answered_at_once_and_ps_is_its_barrier(card: SimulatedCard, ollama: Ollama) -> None:
    for path in ("/api/generate", "/api/chat"):
        post(ollama, path, stream=False)
        assert card.used_mib(ollama.pid) == 9000
        unload(ollama, path)
        assert ps(ollama) == []
        until(lambda: card.used_mib(ollama.pid) == CONTEXT_MIB)
    assert (ollama.loads, ollama.unload_calls, ollama.unloads_while_busy) == (2, 2, 0)


def test_a_running_answer_is_not_cut_by_an_unload(card: SimulatedCard, ollama: Ollama) -> None:
    ollama.token_seconds = 0.02
    with requests.post(
        f"{ollama.url}/api/generate", json={"model": MODEL, "prompt": "why"}, stream=True, timeout=5
    ) as answer:
        lines = answer.iter_lines(chunk_size=1)
        next(lines)
        unload(ollama)
        assert json.loads(list(lines)[-1])["done_reason"] == "stop"
    assert ollama.unloads_while_busy == 1
    until(lambda: card.used_mib(ollama.pid) == CONTEXT_MIB)


def test_ps_hangs_while_a_model_loads(ollama: Ollama, aside: Aside) -> None:
    ollama.load_seconds = 0.3
    loading = aside(lambda: post(ollama, "/api/generate"))
    until(lambda: ollama.used_mib > 0)
    with pytest.raises(requests.ReadTimeout):
        ps(ollama, seconds=0.05)
    assert ps(ollama) == [MODEL]
    assert loading.result().status_code == 200


def test_an_unload_during_a_load_is_answered_and_the_model_stays(ollama: Ollama, aside: Aside) -> None:
    ollama.load_seconds = 0.3
    loading = aside(lambda: post(ollama, "/api/generate"))
    until(lambda: ollama.used_mib > 0)
    unload(ollama)
    assert ps(ollama, seconds=0.2) == []
    assert loading.result().json()["done_reason"] == "load"
    assert ps(ollama) == [MODEL]
    assert ollama.used_mib == 9000


def test_keep_alive_is_how_long_it_idles(ollama: Ollama) -> None:
    post(ollama, "/api/generate", prompt="why", keep_alive=0, stream=False)
    until(lambda: ollama.used_mib == CONTEXT_MIB)
    post(ollama, "/api/generate", keep_alive="50ms")
    assert ollama.used_mib == 9000
    until(lambda: ollama.used_mib == CONTEXT_MIB)
    post(ollama, "/api/generate", keep_alive=-1)
    assert ps(ollama) == [MODEL]
    assert post(ollama, "/api/generate", keep_alive="soon").status_code == 400


def test_two_models_add_up(ollama: Ollama) -> None:
    post(ollama, "/api/generate")
    post(ollama, "/api/generate", model="small")
    assert sorted(ps(ollama)) == [MODEL, "small:latest"]
    assert ollama.used_mib == 11000
    unload(ollama)
    until(lambda: ollama.used_mib == 2000)
    assert ps(ollama) == ["small:latest"]


def test_unknown_models_and_bodies(ollama: Ollama) -> None:
    assert post(ollama, "/api/generate", model="none", prompt="why").status_code == 404
    assert post(ollama, "/api/generate", model="none", keep_alive=0).status_code == 404
    assert post(ollama, "/v1/chat/completions", model="none").status_code == 404
    assert requests.post(f"{ollama.url}/api/chat", data="{", timeout=5).status_code == 400


def test_what_does_not_fit_is_a_500(card: SimulatedCard, ollama: Ollama) -> None:
    game(card, "game", 20000)
    answer = post(ollama, "/api/generate", prompt="why")
    assert answer.status_code == 500
    assert "CUDA out of memory" in answer.json()["error"]
    assert (card.over_commits, ollama.busy, ps(ollama)) == (1, 0, [])


def test_a_list_that_is_empty_before_the_memory_is_back(ollama: Ollama) -> None:
    post(ollama, "/api/generate")
    ollama.faults.frees_share = 0.0
    unload(ollama)
    assert ps(ollama) == []
    assert ollama.used_mib == 9000
