"""A program that renders with ComfyUI and has only its base URL changed, beside callers of a TTS service.

How: on a simulated card of 16000 MiB, where ComfyUI (14000) and the TTS service (3000) do not fit together, one program
renders 10 pictures through ``/v1/image`` (upload, prompt, poll the history each 50 ms, fetch the picture) while 50 TTS
calls come through ``/v1/tts`` from 10 threads. Nobody takes a lease. A render fails where ComfyUI's history says so, as
where it cannot be loaded beside what is on the card, and where any call of the cycle is not answered 200. Then the same
at the services' own addresses, to show that the measure can tell.

Bars: over-commits by the card's own count, failed renders and failed TTS calls, all zero.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import requests

from bench.figure import Bar, Figure, quantile
from gpumgr.sim.stage import PROXY_PATHS, Stage
from tests.brokers import RunningBroker
from tests.imagen import Imagen

RENDERS = 10
CALLS = 50
CALLERS = 10
TOTAL_MIB = 16000
SPEED = 20.0
WAIT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Outcome:
    """``failures`` by what was said. ``render_seconds``: from the upload to the picture."""

    over_commits: int
    failed_renders: int
    failed_calls: int
    failures: Counter[str]
    render_seconds: list[float]
    seconds: float


def run(renders: int = RENDERS, calls: int = CALLS) -> Figure:
    proxied, alone = through_the_broker(renders, calls), without_it(renders, calls)
    for what, count in proxied.failures.items():
        print(f"{count} x {what}")
    return Figure(
        name="imagen",
        unit="s",
        measured={
            "renders": renders,
            "tts_calls": calls,
            "seconds": round(proxied.seconds, 1),
            "render_p50": round(quantile(proxied.render_seconds, 0.5), 2),
            "render_most": round(max(proxied.render_seconds, default=0.0), 2),
            "over_commits_without_gpumgr": alone.over_commits,
            "failures_without_gpumgr": alone.failed_renders + alone.failed_calls,
        },
        bars=[
            Bar("over-commits", proxied.over_commits, 0, "times"),
            Bar(f"failed of {renders} renders", proxied.failed_renders, 0, "renders"),
            Bar(f"failed of {calls} TTS calls", proxied.failed_calls, 0, "calls"),
        ],
    )


def through_the_broker(renders: int, calls: int, speed: float = SPEED) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="gpumgr-bench-") as directory, _stage(directory, speed) as stage:
        config = stage.config() | {"lease": {"default_wait_seconds": WAIT_SECONDS}}
        with RunningBroker(Path(directory), config) as broker:
            return compete(stage, f"{broker.url}/v1/image", f"{broker.url}/v1/tts", renders, calls)


def without_it(renders: int, calls: int, speed: float = SPEED) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="gpumgr-bench-") as directory, _stage(directory, speed) as stage:
        tts = stage.services["mvoice"].url + PROXY_PATHS["mvoice"]
        return compete(stage, stage.comfyui.url, tts, renders, calls)


def _stage(directory: str, speed: float) -> Stage:
    return Stage(Path(directory), speed=speed, total_mib=TOTAL_MIB)


def compete(stage: Stage, image_url: str, tts_url: str, renders: int, calls: int) -> Outcome:
    failures: Counter[str] = Counter()
    seconds: list[float] = []
    imagen = Imagen(image_url)

    def render() -> bool:
        start = time.monotonic()
        done = _done(imagen.render, failures)
        seconds.append(time.monotonic() - start)
        return done

    def speak() -> bool:
        return _done(lambda: _spoken(tts_url), failures)

    start = time.monotonic()
    with ThreadPoolExecutor(CALLERS + 1) as pool:
        rendered = pool.submit(lambda: [render() for _ in range(renders)])
        spoken = [pool.submit(speak) for _ in range(calls)]
        failed_renders = rendered.result().count(False)
        failed_calls = [call.result() for call in spoken].count(False)
    took = time.monotonic() - start
    return Outcome(stage.card.over_commits, failed_renders, failed_calls, failures, seconds, took)


def _spoken(url: str) -> bytes:
    answer = requests.post(url, json={"input": "one two three"}, timeout=WAIT_SECONDS + 60)
    answer.raise_for_status()
    if not answer.content.startswith(b"RIFF"):
        raise ValueError("no sound")
    return answer.content


def _done(step: Callable[[], bytes], failures: Counter[str]) -> bool:
    try:
        return bool(step())
    except Exception as error:  # whatever it is, it is a failure of this step
        failures[f"{type(error).__name__} {error}"[:200]] += 1
        return False
