"""The lease over HTTP, against gunicorn and the simulated services."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.callers import Caller
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


def test_a_victim_that_keeps_its_memory_is_named(broker: RunningBroker, stage: Stage) -> None:
    stage.warm("ollama")
    stage.ollama.faults.keeps_memory = True
    answer = broker.acquire(kind="image")
    error = answer.json()["error"]
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert (error["code"], error["retryable"]) == ("eviction_failed", True)
    assert error["details"]["victims"] == [
        {"consumer": "ollama", "held_mib": 9000, "still_held_mib": 9000, "reason": "kept"}
    ]
    assert stage.comfyui.work_calls == 0
    # It is in service again, and the next request tries again.
    stage.ollama.faults.keeps_memory = False
    assert broker.acquire(kind="image").status_code == 200


def test_an_unhealthy_target_evicts_nobody(tmp_path: Path, stage: Stage) -> None:
    stage.warm("ollama")
    stage.comfyui.faults.unhealthy = True
    with RunningBroker(tmp_path, stage.config()) as broker:
        answer = broker.acquire(kind="image")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "consumer_unhealthy")
    assert stage.ollama.unload_calls == 0
    assert stage.card.used_mib(stage.ollama.pid) == 9000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """For requests that change nothing."""
    directory = tmp_path_factory.mktemp("shared")
    with Stage(directory, speed=20) as stage, RunningBroker(directory, stage.config()) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_request"),
        ({"kind": "image", "consumer": "comfyui"}, 400, "invalid_request"),
        ({"kind": "image", "colour": "red"}, 400, "invalid_request"),
        ({"kind": "image", "ttl_seconds": True}, 400, "invalid_request"),
        ({"kind": "image", "priority": "high"}, 400, "invalid_request"),
        ({"kind": "image", "priority": None}, 400, "invalid_request"),
        ({"kind": "image", "resume_of": ""}, 400, "invalid_request"),
        ({"kind": "image", "resume_of": 7}, 400, "invalid_request"),
        ({"kind": "image", "priority": ["batch"]}, 400, "invalid_request"),
        ({"kind": "image", "ttl_seconds": 0}, 400, "invalid_request"),
        ({"kind": "image", "ttl_seconds": "60"}, 400, "invalid_request"),
        ({"kind": "image", "wait_seconds": -1}, 400, "invalid_request"),
        ({"kind": "image", "holder": "x" * 129}, 400, "invalid_request"),
        ({"kind": 7}, 400, "invalid_request"),
        ({"kind": "video"}, 404, "kind_unknown"),
        ({"consumer": "nobody"}, 404, "consumer_unknown"),
    ],
)
def test_bad_words(shared: RunningBroker, body: dict[str, Any], status: int, code: str) -> None:
    answer = shared.acquire(**body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["type"] == "gpumgr_error"


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("POST", "/v1/lease", JSON, b"{", 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b"[]", 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'"image"', 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b"\xff\xfe", 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b"[" * 20000, 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'{"kind":"image","kind":"llm"}', 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'{"kind":"image","ttl_seconds":NaN}', 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'{"kind":"image","ttl_seconds":Infinity}', 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'{"kind":"image","ttl_seconds":1e999}', 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'{"kind":"image","ttl_seconds":null}', 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'{"kind":"image","holder":"\\ud800"}', 400, "invalid_request"),
        ("POST", "/v1/lease", JSON, b'{"kind":"\\u0000"}', 404, "kind_unknown"),
        ("POST", "/v1/lease", JSON, b" " * 65537, 413, "payload_too_large"),
        ("POST", "/v1/lease", {"Content-Type": "text/plain"}, b'{"kind":"image"}', 415, "unsupported_media_type"),
        ("POST", "/v1/lease", {}, b'{"kind":"image"}', 415, "unsupported_media_type"),
        ("POST", "/v1/lease", {}, b"", 415, "unsupported_media_type"),
        ("POST", "/v1/lease/nobody/renew", {}, b"", 404, "lease_unknown"),
        ("POST", "/v1/lease/nobody/renew", JSON, b'{"ttl_seconds":-1}', 400, "invalid_request"),
        ("POST", "/v1/lease/nobody/renew", JSON, b'{"colour":1}', 400, "invalid_request"),
        ("GET", "/v1/lease/nobody", {}, b"", 404, "lease_unknown"),
        ("GET", "/v1/lease", {}, b"", 405, "method_not_allowed"),
        ("PUT", "/v1/lease/nobody", {}, b"", 405, "method_not_allowed"),
        ("GET", "/nowhere", {}, b"", 404, "not_found"),
        ("GET", "/v1/lease/", {}, b"", 404, "not_found"),
        ("GET", "/v1/lease/a/b/c", {}, b"", 404, "not_found"),
    ],
)
def test_garbage_gets_the_one_error_shape(
    shared: RunningBroker, method: str, path: str, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    with requests.Session() as plain:
        answer = plain.request(method, shared.url + path, headers=headers, data=body, timeout=10)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "gpumgr_error")
    assert set(error) == {"code", "message", "type", "retryable", "details"}
    assert answer.headers["x-should-retry"] == "false"
    if status == 405:
        assert answer.headers["Allow"]


@pytest.mark.parametrize(
    "said",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nno header\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
        b"POST /v1/lease HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n",
    ],
)
def test_what_gunicorn_cannot_read_gets_the_one_error_shape(shared: RunningBroker, said: bytes) -> None:
    with Caller(shared.port) as caller:
        caller.say(said)
        answer = caller.answer()
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert set(answer.error) == {"code", "message", "type", "retryable", "details"}
    assert answer.header("x-should-retry") == ["false"]


@pytest.mark.parametrize("target", ["/v1/lease/nobody", "/v1/leases/nobody", "/nowhere", "/v1/status"])
@pytest.mark.parametrize("body", [b"{}", b"x" * 200_000])
def test_a_body_that_nobody_wants_does_not_cost_the_connection(shared: RunningBroker, target: str, body: bytes) -> None:
    with Caller(shared.port) as caller:
        for _ in range(3):
            assert caller.ask("DELETE", target, body=body).answer().header("Connection") == ["keep-alive"]
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        assert caller.ask("DELETE", target, "Transfer-Encoding: chunked", body=chunks).answer().status != 400
        assert caller.ask("GET", "/healthz").answer().status == 200


@pytest.mark.parametrize("framing", ["Content-Length: 9", "Content-Length: 9000000", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_ends_the_connection_and_says_so(shared: RunningBroker, framing: str) -> None:
    with Caller(shared.port) as caller:
        answer = caller.ask("DELETE", "/v1/lease/nobody", framing, body=b"2\r\n{}").answer()
        assert (answer.status, answer.header("Connection")) == (200, ["close"])
        assert caller.rest() == b""


def test_chunks_that_cannot_be_read_end_the_connection(shared: RunningBroker) -> None:
    """Where they end is not known: what follows must not be taken for a request."""
    follows = b"zz\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n"
    for target, status in (("/v1/lease", 400), ("/v1/lease/nobody/renew", 400), ("/v1/models", 404)):
        with Caller(shared.port) as caller:
            answer = caller.ask("POST", target, "Transfer-Encoding: chunked", body=follows).answer()
            assert (answer.status, answer.header("Connection")) == (status, ["close"])


def test_a_chunked_body_is_limited_too(shared: RunningBroker) -> None:
    pieces = (b" " * 1024 for _ in range(80))
    answer = requests.post(f"{shared.url}/v1/lease", data=pieces, headers=JSON, timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")


def test_releasing_nothing_is_no_error(shared: RunningBroker) -> None:
    assert shared.release("nobody").json() == {"released": False, "reason": "unknown_or_expired"}


def test_request_id_has_one_lease(broker: RunningBroker) -> None:
    first = broker.acquire(kind="image", holder="imagen", request_id="r1").json()
    assert broker.acquire(consumer="comfyui", holder="imagen", request_id="r1").json() == first
    mismatch = broker.acquire(kind="llm", holder="imagen", request_id="r1")
    assert (mismatch.status_code, mismatch.json()["error"]["code"]) == (409, "request_mismatch")
    other = broker.acquire(kind="image", holder="somebody else", request_id="r1", wait_seconds=0)
    assert other.json()["error"]["code"] == "scheduler_timeout"
    assert "imagen has held comfyui" in other.json()["error"]["message"]
    broker.release(first["token"])
    ended = broker.acquire(kind="image", holder="imagen", request_id="r1")
    assert (ended.status_code, ended.json()["error"]["code"]) == (409, "request_ended")
    assert ended.json()["error"]["details"]["reason"] == "released"


def test_status_has_what_the_api_names(broker: RunningBroker, stage: Stage) -> None:
    stage.warm("mvoice")
    lease = broker.acquire(kind="llm", holder="chat").json()
    found = broker.status()
    assert list(found) == [
        "version",
        "started_at",
        "now",
        "mode",
        "when_unreadable",
        "store",
        "hold",
        "games",
        "gpus",
        "consumers",
        "leases",
        "queue",
        "events",
    ]
    gpu = found["gpus"][0]
    assert (gpu["total_mib"], gpu["used_mib"], gpu["free_mib"], gpu["promised_mib"]) == (24000, 3000, 21000, 9000)
    assert [p["consumer"] for p in gpu["processes"]] == ["mvoice"]
    by_name = {c["name"]: c for c in found["consumers"]}
    assert by_name["ollama"]["in_use"] == "lease"
    assert by_name["ollama"]["total_requests"] == 1
    assert (by_name["mvoice"]["resident"], by_name["mvoice"]["held_mib"]) == (True, 3000)
    assert by_name["comfyui"]["resident"] is False
    assert found["leases"][0]["token"] == lease["token"]
    assert found["now"].endswith("Z")
