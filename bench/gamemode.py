"""How long a game waits for the card, and how long everybody else waits for it afterwards.

How: ten times ollama and the voice service hold their memory, idle; then a process begins whose name `gpu.yield_to`
names. The time counts from the start of that process until the card, read from its own file each 5 ms, shows neither of
them with more than a context. Then the process is killed, and a caller asks for a lease each 0.2 s, as a program would
that was refused with a `Retry-After`; the time counts from the kill until its grant arrives.

Bars: at most 3 s for the card, at most 2 s for the first lease, for the slowest of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from bench.figure import Bar, Figure, spread
from bench.rig import Caller, Rig, rig
from tests.waiting import until

GAME = "bg3_dx11.exe"
CONTEXT_MIB = 768
CLEARED_AT_MOST_MS, LEASE_AT_MOST_MS = 3000.0, 2000.0
ASK_EACH_SECONDS = 0.2
LONGEST_SECONDS = 30


def run(rounds: int = 10) -> Figure:
    with rig(speed=1.0) as stage:
        broker = stage.broker(gpu={"yield_to": [f"*{GAME}*"]})
        with Caller(broker.port) as caller:
            pairs = [_round(stage, caller) for _ in range(rounds)]
    cleared, leased = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return Figure(
        name="gamemode",
        unit="ms",
        measured=spread("card_free", cleared) | spread("first_lease", leased) | {"rounds": rounds},
        bars=[
            Bar(
                "game begins: card free of idle residents, slowest", round(max(cleared) * 1e3), CLEARED_AT_MOST_MS, "ms"
            ),
            Bar("game ends: first lease, slowest", round(max(leased) * 1e3), LEASE_AT_MOST_MS, "ms"),
        ],
    )


def _round(stage: Rig, caller: Caller) -> tuple[float, float]:
    stage.load("ollama")
    stage.load("mvoice")
    start = time.perf_counter()
    with subprocess.Popen([GAME, "-c", "import sys; sys.stdin.read()"], executable=sys.executable, stdin=-1) as game:
        try:
            until(lambda: _most_held(stage) <= CONTEXT_MIB, LONGEST_SECONDS, every_seconds=0.005)
            cleared = time.perf_counter() - start
        finally:
            game.kill()
    start = time.perf_counter()
    while time.perf_counter() - start < LONGEST_SECONDS:
        answer = caller.call("POST", "/v1/lease", {"consumer": "comfyui", "wait_seconds": 5})
        if answer.status == 200:
            leased = time.perf_counter() - start
            caller.release(str(answer.body["token"]))
            return cleared, leased
        time.sleep(ASK_EACH_SECONDS)
    raise RuntimeError(f"no lease within {LONGEST_SECONDS} s of the game's end")


def _most_held(stage: Rig) -> int:
    [gpu] = json.loads(stage.card_file.read_text(encoding="utf-8"))["gpus"]
    return max((int(process["used_mib"]) for process in gpu["processes"]), default=0)
