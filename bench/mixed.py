"""Proxied and leased calls of all kinds side by side, with callers that give up at any moment.

How: 500 calls from 16 threads on a simulated card where not all consumers fit: speech both ways, streamed and whole
answers of ollama, ComfyUI prompts, and leases whose holders work directly, renew and release. A quarter of them breaks
off: closes its connection after a random time, in the middle of a stream or before the first byte, or crashes as a
holder. The draw is seeded. What counts as a failure: an answer that is not 200, or a whole answer that is not whole,
of a caller that did not break off. Then everyone has gone, and nobody must hold or wait for anything.

Bars: no failure, nothing held, no over-commit, no unload of work in progress. ollama has no report of its work: a
caller that leaves in the middle of an answer may leave it computing, and an unload that comes then takes effect after
that answer; how often is told beside the bars.
"""

from __future__ import annotations

import json
import random
import socket
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from bench.figure import Bar, Figure
from gpumgr.sim.stage import MODEL, Stage
from tests.brokers import RunningBroker
from tests.waiting import until

CALLS = 500
CALLERS = 16
BREAKS_OFF = 0.25
SEED = 20261124
WAIT_SECONDS = 300
CRASHED_TTL_SECONDS = 1.0
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
GRAPH = {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}
SPEECH = {"input": "one two three"}
DIRECT: dict[str, tuple[str, object]] = {
    "tts": ("/v1/audio/speech", SPEECH),
    "llm": ("/api/chat", CHAT | {"stream": False}),
    "image": ("/prompt", GRAPH),
}
UNDER_A_LEASE = {"tts": "health", "llm": "api/version", "image": "system_stats"}
KINDS = ("tts", "stt", "llm", "llm stream", "image", "lease tts", "lease llm", "lease image")
WEIGHTS = (6, 3, 3, 4, 1, 3, 1, 1)


def run(calls: int = CALLS) -> Figure:
    draw = random.Random(SEED)  # noqa: S311 - a workload, not a secret
    plan = [
        (kind, draw.random() * 0.3 if draw.random() < BREAKS_OFF else None)
        for kind in draw.choices(KINDS, WEIGHTS, k=calls)
    ]
    with tempfile.TemporaryDirectory(prefix="gpumgr-bench-") as directory, Stage(Path(directory), speed=20) as stage:
        config = stage.config()
        config["lease"] = {"min_ttl_seconds": 1}
        with RunningBroker(Path(directory), config) as broker, ThreadPoolExecutor(CALLERS) as pool:
            start = time.monotonic()
            outcomes = Counter(pool.map(lambda step: _one(broker.url, *step), plan))
            seconds = time.monotonic() - start
            left = _left(broker)
        unloads_while_busy = {s.name: s.unloads_while_busy for s in stage.services.values()}
        over_commits = stage.card.over_commits
    failures = {what: count for what, count in outcomes.items() if what not in ("done", "broke off")}
    for what, count in failures.items():
        print(f"{count} x {what}")
    return Figure(
        name="mixed",
        unit="calls",
        measured={
            "done": outcomes["done"],
            "broke_off": outcomes["broke off"],
            "seconds": round(seconds, 1),
            "ollama_asked_gracefully": unloads_while_busy.pop("ollama"),
        },
        bars=[
            Bar(f"failures of {calls} mixed calls", sum(failures.values()), 0, "calls"),
            Bar("holders, waiters and busy consumers afterwards", left, 0, "of them"),
            Bar("over-commits", over_commits, 0, "times"),
            Bar("unloads of work in progress", sum(unloads_while_busy.values()), 0, "times"),
        ],
    )


def _one(url: str, kind: str, leaves_after: float | None) -> str:
    try:
        if kind.startswith("lease "):
            return _leased(url, kind.removeprefix("lease "), crashes=leaves_after is not None)
        if leaves_after is not None:
            return _broken_off(url, kind, leaves_after)
        return _proxied(url, kind)
    except Exception as error:  # whatever it is, it is a failure of this call
        return f"{kind}: {type(error).__name__} {error}"


def _asked(kind: str) -> tuple[str, dict[str, Any]]:
    """The path and what requests needs to send it."""
    if kind == "stt":
        return "/v1/stt", {"files": {"file": ("a.wav", b"RIFF" * 500)}}
    if kind == "tts":
        return "/v1/tts", {"json": SPEECH}
    if kind == "image":
        return "/v1/image/prompt", {"json": GRAPH}
    if kind == "llm":
        return "/v1/llm", {"json": CHAT | {"stream": False}}
    return "/v1/llm/v1/chat/completions", {"json": CHAT | {"stream": True}}


def _proxied(url: str, kind: str) -> str:
    path, body = _asked(kind)
    answer = requests.post(url + path, headers={"X-GPU-Wait": str(WAIT_SECONDS)}, timeout=WAIT_SECONDS + 60, **body)
    if answer.status_code != 200:
        return f"{kind}: {answer.status_code} {answer.text[:300]}"
    if kind == "llm stream" and not answer.content.rstrip().endswith(b"data: [DONE]"):
        return f"{kind}: an answer without its end"
    return "done"


def _broken_off(url: str, kind: str, leaves_after: float) -> str:
    """Sent from a socket of our own, which is closed whatever has come by then; every other time with a reset."""
    path, body = _asked(kind)
    prepared = requests.Request("POST", url + path, **body).prepare()
    content = prepared.body if isinstance(prepared.body, bytes) else str(prepared.body).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nX-GPU-Wait: 20\r\nContent-Length: {len(content)}\r\n"
    head += f"Content-Type: {prepared.headers['Content-Type']}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(head.encode() + content)
        sock.settimeout(leaves_after)
        with suppress(TimeoutError):
            while sock.recv(4096):
                pass
        if leaves_after > 0.15:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    return "broke off"


def _leased(url: str, kind: str, *, crashes: bool) -> str:
    wanted = {"kind": kind, "wait_seconds": WAIT_SECONDS}
    wanted |= {"ttl_seconds": CRASHED_TTL_SECONDS} if crashes else {}
    granted = requests.post(f"{url}/v1/lease", json=wanted, timeout=WAIT_SECONDS + 130)
    if granted.status_code != 200:
        return f"lease {kind}: {granted.status_code} {granted.text[:300]}"
    if crashes:
        return "broke off"
    lease = granted.json()
    _work(lease["url"], kind)
    requests.post(f"{url}/v1/lease/{lease['token']}/renew", timeout=30).raise_for_status()
    path = f"/v1/{kind}/{UNDER_A_LEASE[kind]}"
    passed = requests.get(url + path, headers={"X-GPU-Lease": lease["token"]}, timeout=30)
    if passed.status_code != 200:
        return f"lease {kind}: under it {passed.status_code} {passed.text[:300]}"
    released = requests.delete(f"{url}/v1/lease/{lease['token']}", timeout=30).json()
    return "done" if released == {"released": True} else f"lease {kind}: {json.dumps(released)}"


def _work(url: str, kind: str) -> None:
    """The holder's own, directly at its backend; of an image it leaves the tail to itself."""
    path, body = DIRECT[kind]
    requests.post(url + path, json=body, timeout=60).raise_for_status()


def _left(broker: RunningBroker) -> int:
    """How many leases, waiting requests and consumers in use there still are, after everyone had time to end."""

    def left() -> int:
        status = broker.status()
        busy = [c for c in status["consumers"] if c["in_use"] is not None]
        return len(status["leases"]) + len(status["queue"]) + len(busy)

    with suppress(TimeoutError):
        until(lambda: left() == 0, 30, every_seconds=0.2)
    return left()
