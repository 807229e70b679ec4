"""The lease over HTTP, against gunicorn and the simulated services."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import requests

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.waiting import until

GRANT_FIELDS = {
    *("lease_id", "token", "consumer", "url", "gpus", "gpu_uuids", "holder", "fence"),
    *("granted_at", "expires_at", "ttl_seconds"),
}


def test_grant_evicts_with_proof_and_renews_and_releases(broker: RunningBroker, stage: Stage) -> None:
    stage.warm("ollama")
    stage.warm("mvoice")
    answer = broker.acquire(kind="image", holder="imagen", ttl_seconds=30)
    assert answer.status_code == 200, answer.text
    grant = answer.json()
    assert set(grant) == GRANT_FIELDS
    assert grant["url"] == stage.comfyui.url
    assert grant["ttl_seconds"] == 30
    assert stage.card.used_mib(stage.ollama.pid) <= 768
    assert stage.card.used_mib(stage.mvoice.pid) <= 768

    renewed = broker.renew(grant["token"], ttl_seconds=9999).json()
    assert renewed["ttl_seconds"] == 600
    assert renewed["waiting"] == 0
    assert renewed["consumer_healthy"] is True
    assert broker.http.get(f"{broker.url}/v1/lease/{grant['token']}").json()["fence"] == grant["fence"]

    assert broker.release(grant["token"]).json() == {"released": True}
    assert broker.release(grant["token"]).json() == {"released": False, "reason": "unknown_or_expired"}
    gone = broker.renew(grant["token"])
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "lease_unknown"
    assert [e["type"] for e in broker.status()["events"]][:4] == ["start", "evict", "evict", "grant"]


def test_a_release_lets_the_next_one_in(broker: RunningBroker) -> None:
    first = broker.acquire(kind="image").json()
    answers: list[requests.Response] = []
    waiter = threading.Thread(target=lambda: answers.append(broker.acquire(kind="llm", holder="chat")))
    waiter.start()
    until(lambda: [q["waiting_for"] for q in broker.status()["queue"]] == ["holder"])
    assert broker.renew(first["token"]).json()["waiting"] == 1
    broker.release(first["token"])
    waiter.join(10)
    assert answers[0].status_code == 200
    assert answers[0].json()["fence"] == first["fence"] + 1


def test_game_on_the_card_refuses_with_the_numbers(broker: RunningBroker, stage: Stage) -> None:
    stage.warm("whisper")
    game = stage.take_game("bg3_dx11.exe", 10600)
    answer = broker.acquire(kind="image")
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "false"
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == "insufficient_vram"
    assert not error["retryable"]
    details = error["details"]
    assert (details["needed_mib"], details["headroom_mib"], details["promised_mib"]) == (14000, 512, 0)
    assert details["free_mib"] == 24000 - 10600 - stage.card.used_mib(stage.whisper.pid)
    assert details["untracked"] == [{"pid": game.pid, "name": "bg3_dx11.exe", "used_mib": 10600}]
    assert details["evicted"] == ["whisper"]
    assert "bg3_dx11.exe" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_request"),
        ({"kind": "image", "consumer": "comfyui"}, 400, "invalid_request"),
        ({"kind": "image", "colour": "red"}, 400, "invalid_request"),
        ({"kind": "image", "ttl_seconds": True}, 400, "invalid_request"),
        ({"kind": "image", "ttl_seconds": 0}, 400, "invalid_request"),
        ({"kind": "image", "ttl_seconds": "60"}, 400, "invalid_request"),
        ({"kind": "image", "wait_seconds": -1}, 400, "invalid_request"),
        ({"kind": "image", "holder": "x" * 129}, 400, "invalid_request"),
        ({"kind": 7}, 400, "invalid_request"),
        ({"kind": "video"}, 404, "kind_unknown"),
        ({"consumer": "nobody"}, 404, "consumer_unknown"),
    ],
)
def test_bad_words(broker: RunningBroker, body: dict[str, Any], status: int, code: str) -> None:
    answer = broker.acquire(**body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["type"] == "gpumgr_error"
