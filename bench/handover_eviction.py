"""Hand-over with eviction, against the time the backend itself takes to give its memory back.

How: ComfyUI renders under a lease, so that it is resident; a caller for mvoice waits, which may not stand beside it.
The holder releases: the broker unloads ComfyUI, sees on the card that the memory is back, and grants. In turn with
it the same unload without a broker: POST /free, and the card's file read each millisecond until ComfyUI holds no
more than its ``residual_mib``.

Bar: p50 with the broker at most 100 ms above p50 without. What is added: the calls, a look at the card before and
after, and the wait for the next poll (each 25 ms).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests

from bench.figure import Bar, Figure, quantile, spread
from bench.rig import Line, Rig, rig
from tests.waiting import until

AT_MOST_MS = 100.0
SPEED = 10.0
RESIDUAL_MIB = 768
GRAPH = {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}
WARM_UP = 2


def run(rounds: int = 25) -> Figure:
    with rig(SPEED) as stage:
        broker = stage.broker()
        measured = [_round(stage, broker.port) for _ in range(rounds + WARM_UP)][WARM_UP:]
    with_broker, alone = [pair[0] for pair in measured], [pair[1] for pair in measured]
    added_ms = (quantile(with_broker, 0.5) - quantile(alone, 0.5)) * 1000
    return Figure(
        name="handover_eviction",
        unit="ms",
        measured=spread("handover", with_broker) | spread("unload_alone", alone) | {"rounds": rounds},
        bars=[Bar("added to the backend's own unload, p50", round(added_ms, 1), AT_MOST_MS, "ms")],
    )


def _round(stage: Rig, port: int) -> tuple[float, float]:
    with Line(port, "comfyui") as line:
        _render(stage)
        line.join("mvoice")
        line.settle()
        seconds = line.hand_over()
        line.holder.release(line.token)
    _render(stage)
    return seconds, _unload_alone(stage)


def _render(stage: Rig) -> None:
    """Until done: ComfyUI is resident and idle."""
    url = stage.services["comfyui"]
    with requests.Session() as http:
        prompt = http.post(f"{url}/prompt", json=GRAPH, timeout=10).json()["prompt_id"]
        until(lambda: http.get(f"{url}/history/{prompt}", timeout=10).json(), 60)


def _unload_alone(stage: Rig) -> float:
    url = stage.services["comfyui"]
    port = urlsplit(url).port
    with requests.Session() as http:
        http.get(f"{url}/queue", timeout=10)  # the connection is there before the clock runs
        start = time.perf_counter()
        http.post(f"{url}/free", json={"unload_models": True, "free_memory": True}, timeout=10).raise_for_status()
        until(lambda: _held_mib(stage.card_file, port) <= RESIDUAL_MIB, 30, every_seconds=0.001)
        return time.perf_counter() - start


def _held_mib(card_file: Path, port: int | None) -> int:
    gpus = json.loads(card_file.read_text(encoding="utf-8"))["gpus"]
    return sum(held["used_mib"] for gpu in gpus for held in gpu["processes"] if held["port"] == port)
