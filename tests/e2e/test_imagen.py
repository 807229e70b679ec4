"""ComfyUI through the proxy route, for programs that know nothing of gpumgr: a prompt holds the GPU until it is done,
and the rest of the cycle waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from bench import imagen
from gpumgr.config import load_file
from gpumgr.sim.stage import Stage
from gpumgr.wiring import build
from tests.brokers import RunningBroker
from tests.imagen import Imagen, RenderFailed
from tests.waiting import until

GRAPH = {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}
FOR_EVER_SECONDS = 600.0
FREE = (
    *("history", "history/6b1f", "queue", "system_stats", "object_info", "prompt", "api/history", "api/queue"),
    *("api/system_stats", "view?filename=in.png&type=input", "api/view?filename=in.png"),
)


class Studio:
    """A broker and its stage; ``prompt`` is a program's own call, whose connection is then closed."""

    patch: pytest.MonkeyPatch

    def __init__(self, broker: RunningBroker, stage: Stage) -> None:
        self.broker = broker
        self.stage = stage

    def render_for_ever(self) -> None:
        """Until an interrupt, which is heard between two steps."""
        self.patch.setattr("gpumgr.sim.comfyui.STEPS", 20_000)
        self.stage.comfyui.render_seconds = FOR_EVER_SECONDS

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> requests.Response:
        return requests.request(method, f"{self.broker.url}/v1/{path}", json=body, headers=headers, timeout=30)

    def prompt(self, path: str = "image/prompt", **headers: str) -> str:
        answer = self.ask("POST", path, GRAPH, **headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["prompt_id"])

    def comfyui(self) -> dict[str, Any]:
        found: dict[str, Any] = next(c for c in self.broker.status()["consumers"] if c["name"] == "comfyui")
        return found

    def until_free(self) -> None:
        until(lambda: self.comfyui()["in_use"] is None, 10)

    def lost(self) -> list[dict[str, Any]]:
        return [event for event in self.broker.status()["events"] if event["type"] == "work_lost"]

    def turn(self, kind: str) -> dict[str, Any]:
        """Now or never: what a lease is refused with."""
        answer = self.broker.acquire(kind=kind, wait_seconds=0)
        if answer.status_code == 200:
            self.broker.release(answer.json()["token"])
        found: dict[str, Any] = answer.json().get("error", {})
        return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    directory: Path = tmp_path_factory.mktemp("studio")
    with Stage(directory, speed=20) as stage, RunningBroker(directory, stage.config()) as broker:
        yield Studio(broker, stage)


@pytest.fixture
def studio(running: Studio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    running.patch = monkeypatch
    running.stage.comfyui.render_seconds = 0.1
    running.stage.comfyui.start()
    yield running
    running.ask("POST", "image/interrupt")
    running.until_free()
    assert running.stage.card.over_commits == 0
    assert running.stage.comfyui.unloads_while_busy == 0
    assert "Traceback" not in running.broker.log()


def test_fifty_calls_of_another_service_cost_no_render() -> None:
    """The bar. Without a broker the same program over-commits the card."""
    outcome = imagen.through_the_broker(renders=2, calls=50, speed=40)
    assert (outcome.over_commits, outcome.failed_renders, outcome.failed_calls) == (0, 0, 0), outcome.failures
    alone = imagen.without_it(renders=2, calls=10, speed=40)
    assert alone.over_commits > 0
    assert alone.failed_renders + alone.failed_calls > 0


@pytest.mark.parametrize("path", ["image", "image/prompt", "image/api/prompt", "image/x/..//api/%70rompt"])
def test_a_prompt_holds_until_it_is_done(studio: Studio, path: str) -> None:
    if "%" in path:  # the simulation knows its routes by their plain names alone
        studio.stage.comfyui._table["POST", "/x/..//api/prompt"] = studio.stage.comfyui._table["POST", "/prompt"]
    studio.render_for_ever()
    prompt_id = studio.prompt(path)
    held = studio.comfyui()
    assert (held["in_use"], [call["work"] for call in held["calls"]]) == ("proxy", [f"prompt {prompt_id}"])
    refused = studio.turn("llm")
    assert refused["code"] == "scheduler_timeout"
    assert "a proxied call has held comfyui for " in refused["message"]
    assert f"s, prompt {prompt_id}." in refused["message"]
    studio.ask("POST", "image/interrupt")
    studio.until_free()
    assert studio.turn("llm") == {}
    assert studio.lost() == []


def test_the_whole_cycle_with_only_the_base_url_changed(studio: Studio) -> None:
    before = studio.comfyui()["total_requests"]
    program = Imagen(f"{studio.broker.url}/v1/image")
    assert program.render().startswith(b"\x89PNG")
    assert program.render() == Imagen(studio.stage.comfyui.url).render()
    assert studio.comfyui()["total_requests"] == before + 2  # the prompts; nothing else waited for a turn


def test_the_rest_of_the_cycle_waits_for_nobody(studio: Studio) -> None:
    """Somebody else has the card, and its consumer is idle or in the middle of its unload."""
    Imagen(studio.stage.comfyui.url).render()
    gate = studio.stage.comfyui.faults.unload_gate = threading.Event()
    other: list[requests.Response] = []
    leasing = threading.Thread(target=lambda: other.append(studio.broker.acquire(kind="llm", wait_seconds=30)))
    leasing.start()
    until(lambda: studio.comfyui()["in_use"] == "evicting")
    assert studio.ask("GET", "image/history").status_code == 200
    gate.set()
    leasing.join()
    lease = other[0].json()
    calls = studio.stage.comfyui.ledger.work_calls
    for path in FREE:
        assert studio.ask("GET", f"image/{path}", **{"X-GPU-Wait": "0"}).status_code == 200, path
        assert studio.ask("HEAD", f"image/{path}", **{"X-GPU-Wait": "0"}).status_code != 503, path
    for path in ("interrupt", "api/queue"):
        assert studio.ask("POST", f"image/{path}", {"delete": []}, **{"X-GPU-Wait": "0"}).status_code == 200, path
    for path in ("prompt", "api/prompt", "history/../prompt", "history/%2e%2e/prompt", "/history", "free"):
        refused = studio.ask("POST", f"image/{path}", GRAPH, **{"X-GPU-Wait": "0"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "scheduler_timeout"), path
    assert studio.stage.comfyui.ledger.work_calls == calls
    assert studio.comfyui()["in_use"] is None
    studio.broker.release(lease["token"])


def test_whoever_is_told_the_end_has_the_gpu_freed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's own look at the history is what ends the hold: here nothing else would for ten minutes."""
    monkeypatch.setattr("gpumgr.core.following.LOOK_EACH_SECONDS", FOR_EVER_SECONDS)
    with Stage(tmp_path, speed=20) as stage:
        file = tmp_path / "consumers.yaml"
        file.write_text(yaml.safe_dump(stage.config()), encoding="utf-8")
        (tmp_path / "state").mkdir()
        app = build(load_file(file))
        broker, client = app.extensions["gpumgr"], app.test_client()
        broker.start()
        try:
            prompt_id = client.post("/v1/image", json=GRAPH, buffered=True).get_json()["prompt_id"]
            until(lambda: requests.get(f"{stage.comfyui.url}/history/{prompt_id}", timeout=5).json())
            assert broker.state.followed
            assert prompt_id in client.get(f"/v1/image/history/{prompt_id}", buffered=True).get_json()
            until(lambda: not broker.state.queue.holds)
        finally:
            broker.close()


def test_a_refused_prompt_holds_nothing(studio: Studio) -> None:
    answer = studio.ask("POST", "image/prompt", {"prompt": None})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "no_prompt")
    assert studio.comfyui()["calls"] == []
    assert studio.turn("llm") == {}


def test_a_prompt_that_is_deleted_holds_no_longer(studio: Studio) -> None:
    studio.render_for_ever()
    requests.post(f"{studio.stage.comfyui.url}/prompt", json=GRAPH, timeout=10)  # somebody's own, ahead of it
    prompt_id = studio.prompt()
    assert studio.ask("POST", "image/queue", {"delete": [prompt_id]}).status_code == 200
    until(lambda: not studio.comfyui()["calls"], 10)
    assert [(event["work"], event["how"]) for event in studio.lost()[-1:]] == [(f"prompt {prompt_id}", "left")]


def test_a_prompt_goes_with_comfyui(studio: Studio) -> None:
    studio.render_for_ever()
    prompt_id = studio.prompt()
    studio.stage.comfyui.die()
    studio.until_free()
    assert [(event["work"], event["how"]) for event in studio.lost()[-1:]] == [(f"prompt {prompt_id}", "died")]


def test_under_a_lease_the_lease_holds(studio: Studio) -> None:
    lease = studio.broker.acquire(kind="image").json()
    studio.render_for_ever()
    studio.prompt(**{"X-GPU-Lease": lease["token"]})
    assert (studio.comfyui()["in_use"], studio.comfyui()["calls"]) == ("lease", [])
    studio.broker.release(lease["token"])
    until(lambda: studio.comfyui()["in_use"] == "tail", 10)
    studio.ask("POST", "image/interrupt")
    studio.until_free()


def test_a_render_beside_what_does_not_fit_fails_as_the_real_one_would(studio: Studio, tmp_path: Path) -> None:
    """Else the bar would prove nothing."""
    del studio
    with Stage(tmp_path, speed=20, total_mib=16000) as stage:
        stage.warm("mvoice")
        with pytest.raises(RenderFailed, match="OutOfMemoryError"):
            Imagen(stage.comfyui.url).render()
        assert stage.card.over_commits == 1
