"""ComfyUI's truths, over real sockets."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from gpumgr.sim.card import SimulatedCard
from gpumgr.sim.comfyui import ComfyUI
from gpumgr.sim.untracked import game
from tests.waiting import until

BOTH = {"unload_models": True, "free_memory": True}
GRAPH = {"1": {"class_type": "SaveImage", "inputs": {}}}
CONTEXT_MIB = 400


@pytest.fixture
def comfyui(card: SimulatedCard) -> Iterator[ComfyUI]:
    with ComfyUI("comfyui", card, load_seconds=0.06, unload_seconds=0.04, render_seconds=0.05) as service:
        yield service


def post(service: ComfyUI, path: str, body: object = None, status: int = 200) -> requests.Response:
    response = requests.post(service.url + path, json=body, timeout=5)
    assert response.status_code == status, response.text
    return response


def get(service: ComfyUI, path: str) -> Any:
    return requests.get(service.url + path, timeout=5).json()


def queue(service: ComfyUI) -> str:
    return str(post(service, "/prompt", {"prompt": GRAPH, "client_id": "test"}).json()["prompt_id"])


def ended(service: ComfyUI, prompt_id: str) -> Any:
    return until(lambda: get(service, f"/api/history/{prompt_id}").get(prompt_id))


def render(service: ComfyUI) -> Any:
    return ended(service, queue(service))


def test_the_first_prompt_loads_the_model_and_its_image_can_be_fetched(card: SimulatedCard, comfyui: ComfyUI) -> None:
    assert card.free_mib() == 24000
    entry = render(comfyui)
    assert entry["status"]["status_str"] == "success"
    assert entry["status"]["completed"] is True
    (image,) = entry["outputs"]["9"]["images"]
    assert requests.get(f"{comfyui.url}/view", params=image, timeout=5).content.startswith(b"\x89PNG")
    assert (card.used_mib(comfyui.pid), comfyui.loads) == (14000, 1)
    render(comfyui)
    assert (comfyui.loads, comfyui.work_calls) == (1, 2)


def test_the_load_can_be_watched(card: SimulatedCard, comfyui: ComfyUI) -> None:
    comfyui.load_seconds = 0.1
    render(comfyui)
    seen = [change.used_mib for change in card.history]
    assert seen == sorted(seen)
    assert len(seen) >= 5


def test_reports_in_both_spellings(comfyui: ComfyUI) -> None:
    render(comfyui)
    (device,) = get(comfyui, "/api/system_stats")["devices"]
    assert device == get(comfyui, "/system_stats")["devices"][0]
    assert device["vram_total"] - device["vram_free"] == 14000 * 1024**2
    assert get(comfyui, "/api/queue") == {"queue_running": [], "queue_pending": []}
    assert get(comfyui, "/prompt") == {"exec_info": {"queue_remaining": 0}}
    assert "KSampler" in get(comfyui, "/object_info")
    assert get(comfyui, "/history/unknown") == {}


def test_free_answers_an_empty_200_and_frees_to_the_context_afterwards(card: SimulatedCard, comfyui: ComfyUI) -> None:
    render(comfyui)
    comfyui.faults.unload_gate = threading.Event()
    assert post(comfyui, "/api/free", BOTH).content == b""
    assert card.used_mib(comfyui.pid) == 14000
    comfyui.faults.unload_gate.set()
    until(lambda: card.used_mib(comfyui.pid) == CONTEXT_MIB)
    assert (comfyui.unload_calls, comfyui.unloads_while_busy) == (1, 0)


def test_free_with_nothing_asked_does_nothing_and_bad_json_is_500(comfyui: ComfyUI) -> None:
    post(comfyui, "/free", {})
    post(comfyui, "/free", {"unload_models": False})
    post(comfyui, "/free", status=500)
    assert requests.post(f"{comfyui.url}/free", data="{", timeout=5).status_code == 500
    assert comfyui.unload_calls == 0


def test_unload_models_alone_keeps_what_cached_outputs_hold(card: SimulatedCard, comfyui: ComfyUI) -> None:
    render(comfyui)
    post(comfyui, "/free", {"unload_models": True})
    render(comfyui)  # the worker has read the flags once this is done
    assert (card.used_mib(comfyui.pid), comfyui.loads) == (14000, 1)
    post(comfyui, "/free", {"free_memory": True})
    until(lambda: card.used_mib(comfyui.pid) == CONTEXT_MIB)


def test_nothing_is_freed_during_a_prompt_and_a_pending_one_loads_again(card: SimulatedCard, comfyui: ComfyUI) -> None:
    comfyui.render_seconds = 0.1
    first, second = queue(comfyui), queue(comfyui)
    until(lambda: card.used_mib(comfyui.pid) == 14000)
    assert get(comfyui, "/prompt")["exec_info"]["queue_remaining"] == 2
    post(comfyui, "/free", BOTH)
    assert comfyui.unloads_while_busy == 1
    ended(comfyui, first)
    ended(comfyui, second)
    assert (card.used_mib(comfyui.pid), comfyui.loads) == (14000, 2)


def test_a_lost_wake_up_is_cured_by_asking_again(card: SimulatedCard, comfyui: ComfyUI) -> None:
    render(comfyui)
    comfyui.faults.lose_first_unload = True
    post(comfyui, "/free", BOTH)
    with pytest.raises(TimeoutError):
        until(lambda: card.used_mib(comfyui.pid) < 14000, seconds=0.1)
    post(comfyui, "/free", BOTH)
    until(lambda: card.used_mib(comfyui.pid) == CONTEXT_MIB)


def test_a_model_that_is_kept_and_one_that_half_goes(card: SimulatedCard, comfyui: ComfyUI) -> None:
    render(comfyui)
    comfyui.faults.keeps_memory = True
    post(comfyui, "/free", BOTH)
    render(comfyui)
    assert (card.used_mib(comfyui.pid), comfyui.loads) == (14000, 1)
    comfyui.faults.keeps_memory = False
    comfyui.faults.frees_share = 0.5
    post(comfyui, "/free", BOTH)
    until(lambda: card.used_mib(comfyui.pid) == (14000 + CONTEXT_MIB) // 2)


def test_what_does_not_fit_ends_in_history_as_an_error(card: SimulatedCard, comfyui: ComfyUI) -> None:
    game(card, "game", 12000)
    entry = render(comfyui)
    assert entry["status"]["status_str"] == "error"
    kind, facts = entry["status"]["messages"][-1]
    assert kind == "execution_error"
    assert "CUDA out of memory" in facts["exception_message"]
    assert (card.over_commits, card.used_mib(comfyui.pid), comfyui.loads) == (1, CONTEXT_MIB, 0)


def test_an_interrupt_ends_the_running_prompt_and_frees_nothing(card: SimulatedCard, comfyui: ComfyUI) -> None:
    comfyui.render_seconds = 2
    prompt_id = queue(comfyui)
    until(lambda: card.used_mib(comfyui.pid) == 14000)
    post(comfyui, "/interrupt", {"prompt_id": str(uuid.uuid4())})
    assert get(comfyui, "/queue")["queue_running"][0][1] == prompt_id
    comfyui.render_seconds = 0.05

    def interrupted() -> Any:
        post(comfyui, "/api/interrupt", {"prompt_id": prompt_id})
        return get(comfyui, f"/history/{prompt_id}").get(prompt_id)

    entry = until(interrupted)
    assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("error", False)
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    assert card.used_mib(comfyui.pid) == 14000


def test_pending_prompts_can_be_deleted(comfyui: ComfyUI) -> None:
    comfyui.render_seconds = 2
    queue(comfyui)
    until(lambda: get(comfyui, "/queue")["queue_running"])
    second, _ = queue(comfyui), queue(comfyui)
    post(comfyui, "/queue", {"delete": [second]})
    assert len(get(comfyui, "/queue")["queue_pending"]) == 1
    post(comfyui, "/queue", {"clear": True})
    assert get(comfyui, "/prompt")["exec_info"]["queue_remaining"] == 1


def test_prompts_that_are_refused(comfyui: ComfyUI) -> None:
    assert post(comfyui, "/prompt", {}, status=400).json()["error"]["type"] == "no_prompt"
    post(comfyui, "/prompt", {"prompt": GRAPH, "prompt_id": "mine"}, status=400)
    mine = str(uuid.uuid4())
    assert post(comfyui, "/api/prompt", {"prompt": GRAPH, "prompt_id": mine}).json()["prompt_id"] == mine


def test_a_foreign_origin_is_refused(comfyui: ComfyUI) -> None:
    def status(**headers: str) -> int:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return requests.get(f"{comfyui.url}/queue", headers=named, timeout=5).status_code

    assert status(Origin="http://evil.example") == 403
    assert status(Sec_Fetch_Site="cross-site") == 403
    assert status(Origin=comfyui.url) == 200


def test_an_upload_can_be_viewed(comfyui: ComfyUI) -> None:
    answer = requests.post(
        f"{comfyui.url}/api/upload/image",
        files={"image": ("cat.png", b"\x89PNG\r\n\x00\xff bytes\r\n", "image/png")},
        data={"type": "input", "overwrite": "true"},
        timeout=5,
    )
    assert answer.json() == {"name": "cat.png", "subfolder": "", "type": "input"}
    assert requests.get(f"{comfyui.url}/view?filename=cat.png", timeout=5).content == b"\x89PNG\r\n\x00\xff bytes\r\n"
