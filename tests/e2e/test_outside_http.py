"""Those who claim the card without a turn, over HTTP: an operator's hold, a game, somebody behind the broker's back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from gpumgr.sim.stage import MODEL, Stage
from tests.brokers import RunningBroker
from tests.waiting import until


def gpumgr(broker: RunningBroker, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "GPUMGR_URL": broker.url}
    command = [sys.executable, "-m", "gpumgr.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def error_of(answer: requests.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    return found


def resident(broker: RunningBroker) -> set[str]:
    return {consumer["name"] for consumer in broker.status()["consumers"] if consumer["resident"]}


def test_the_card_is_kept_free_over_a_crash_until_it_is_resumed(tmp_path: Path, stage: Stage) -> None:
    stage.warm("ollama")
    stage.warm("mvoice")
    with RunningBroker(tmp_path, stage.config()) as broker:
        held = gpumgr(broker, "hold", "--reason", "bg3", "--ttl-seconds", "3600", "--wait", "20")
        assert (held.returncode, held.stderr) == (0, "")
        assert held.stdout.startswith("free, until 20")
        assert resident(broker) == set()
        refused = broker.acquire(kind="image", wait_seconds=30)
        assert (refused.status_code, error_of(refused)["code"], error_of(refused)["retryable"]) == (
            503,
            "gpu_yielded",
            True,
        )
        assert error_of(refused)["details"]["reason"] == "bg3"
        assert int(refused.headers["Retry-After"]) >= 1
        call = broker.http.post(f"{broker.url}/v1/tts", json={"input": "hello"}, timeout=20)
        assert error_of(call)["code"] == "gpu_yielded"

        os.kill(broker.worker_pid(), signal.SIGKILL)
        until(broker.serving_again, 20)
        assert error_of(broker.acquire(kind="image"))["details"]["cause"] == "hold"
        until(lambda: broker.status()["hold"]["state"] == "free", 20)  # what is left of them is asked for once more

        assert gpumgr(broker, "resume").stdout == "the card is lent again\n"
        assert gpumgr(broker, "resume").stdout == "nobody kept it free\n"
        assert broker.acquire(kind="image").status_code == 200


def test_a_hold_that_does_not_come_free_in_time_says_who_is_there(broker: RunningBroker, stage: Stage) -> None:
    stage.warm("ollama")
    lease = broker.acquire(kind="llm").json()
    held = gpumgr(broker, "hold", "--wait", "0.5")
    assert held.returncode == 1
    assert held.stdout.startswith("draining (ollama), until")
    renewed = broker.renew(lease["token"]).json()
    assert renewed["yield_requested"] is True
    assert "keeps the GPU free" in renewed["yield_reason"]
    broker.release(lease["token"])
    until(lambda: broker.http.get(f"{broker.url}/v1/hold").json()["hold"]["state"] == "free", 20)
    assert stage.card.used_mib(stage.ollama.pid) <= 768


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"ttl_seconds": 0}, "invalid_request"),
        ({"ttl_seconds": "1"}, "invalid_request"),
        ({"reason": "x" * 129}, "invalid_request"),
        ({"until": 5}, "invalid_request"),
        ([], "invalid_request"),
    ],
)
def test_a_hold_is_asked_for_in_words_that_can_be_understood(broker: RunningBroker, body: Any, code: str) -> None:
    answer = broker.http.post(f"{broker.url}/v1/hold", json=body, timeout=10)
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert broker.status()["hold"] is None


def test_the_page_has_the_button_and_nobody_elses_page_has(broker: RunningBroker) -> None:
    def press(origin: str | None, **fields: str) -> requests.Response:
        headers = {} if origin is None else {"Origin": origin}
        return broker.http.post(
            f"{broker.url}/v1/status", data=fields, headers=headers, timeout=10, allow_redirects=False
        )

    page = broker.http.get(f"{broker.url}/v1/status", headers={"Accept": "text/html"}, timeout=10).text
    assert 'method="post"' in page
    assert press("https://evil.example", action="hold").status_code == 403
    assert press("null", action="hold").status_code == 403
    assert press(None, action="hold").status_code == 403
    assert press(broker.url, action="sell").status_code == 400
    assert broker.status()["hold"] is None
    pressed = press(broker.url, action="hold", ttl_seconds="3600")
    assert (pressed.status_code, pressed.headers["Location"]) == (303, "status")
    assert broker.status()["hold"]["left_seconds"] == pytest.approx(3600, abs=60)
    page = broker.http.get(f"{broker.url}/v1/status", headers={"Accept": "text/html"}, timeout=10).text
    assert "The card is kept free" in page
    assert press(broker.url, action="resume").status_code == 303
    assert broker.status()["hold"] is None


@contextmanager
def game(name: str) -> Iterator[int]:
    """A process of that name, as the system sees it."""
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [name, "-c", code], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_a_game_gets_the_card_and_gives_it_back(tmp_path: Path, stage: Stage) -> None:
    config = stage.config()
    config["gpu"] |= {"yield_to": ["*bg3_dx11*"], "yield_reserve_mib": 10000}
    stage.warm("ollama")
    stage.warm("mvoice")
    with RunningBroker(tmp_path, config) as broker:
        lease = broker.acquire(kind="stt").json()
        with game(r"C:\Games\bg3_dx11.exe") as pid:
            until(lambda: stage.card.used_mib(stage.ollama.pid) <= 768 >= stage.card.used_mib(stage.mvoice.pid), 20)
            told = broker.renew(lease["token"]).json()
            assert told["yield_requested"] is True
            assert f"bg3_dx11.exe (pid {pid})" in told["yield_reason"]
            broker.release(lease["token"])
            refused = error_of(broker.acquire(kind="image"))
            assert (refused["code"], refused["details"]["cause"], refused["details"]["pid"]) == (
                "gpu_yielded",
                "game",
                pid,
            )
            small = broker.acquire(kind="stt").json()  # it fits beside the game and its reserve
            broker.release(small["token"])
            assert [found["pid"] for found in broker.status()["games"]] == [pid]
        until(lambda: broker.acquire(kind="image").status_code == 200, 20)


def test_an_intruder_is_told_and_unloaded_while_the_render_goes_on(broker: RunningBroker, stage: Stage) -> None:
    lease = broker.acquire(kind="image").json()
    stage.warm("comfyui")
    answer = requests.post(f"{stage.ollama.url}/api/generate", json={"model": MODEL}, timeout=20)  # behind our back
    assert answer.status_code == 200
    until(lambda: "intruder" in {event["type"] for event in broker.status()["events"]}, 20)
    until(lambda: stage.card.used_mib(stage.ollama.pid) <= 768, 20)
    renewed = broker.renew(lease["token"])
    assert renewed.status_code == 200
    until(lambda: broker.renew(lease["token"]).json()["intruders"] == [], 20)
    [event] = [event for event in broker.status()["events"] if event["type"] == "intruder"]
    assert (event["consumer"], event["beside"], event["lease_id"]) == ("ollama", "comfyui", lease["lease_id"])
    assert stage.card.used_mib(stage.comfyui.pid) == 14000
