"""What watching the card costs on a busy machine at rest, through the driver.

How: a broker reads the stand-in driver, which tells eight processes with memory: one of each of four consumers, told by
a pattern, by what is usual for its dialect, by its port and by a unit's name that is not there, and strangers. 500 more
processes do nothing beside them. After a pause the CPU time (user and system) of master and worker is counted over
30 s. The stand-in driver answers at once: a real one adds its own time to each call, which this cannot tell.

Bar: at most 0.5 % of one core.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.figure import Bar, Figure
from bench.idle import AT_MOST_PERCENT, SETTLE_SECONDS, cpu_percent
from gpumgr.adapters.games import YOUNG_SECONDS
from tests.brokers import RunningBroker, free_port
from tests.services import Sleeper
from tests.stand_in import Process, StandInDriver, build_or_skip

PROCESSES = 500
STRANGERS = 4
LISTENS = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listens", flush=True)
sys.stdin.read()
"""


def run(seconds: float = 30.0) -> Figure:
    with _world() as broker:
        if broker.process is None:
            raise RuntimeError("the broker is not running")
        master = psutil.Process(broker.process.pid)
        time.sleep(SETTLE_SECONDS + YOUNG_SECONDS)  # processes that have just begun are looked at more often
        percent = cpu_percent([master, *master.children()], seconds)
        shown = broker.status()["gpus"][0]["processes"]
    measured = {
        "cpu_percent": round(percent, 3),
        "processes": PROCESSES,
        "on_the_card": len(shown),
        "attributed": sum(process["consumer"] is not None for process in shown),
        "seconds": seconds,
    }
    return Figure(
        name="probing",
        unit="%",
        measured=measured,
        bars=[Bar(f"CPU at rest, {PROCESSES} processes, of one core", round(percent, 3), AT_MOST_PERCENT, "%")],
    )


@contextmanager
def _world() -> Iterator[RunningBroker]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpumgr-bench-")))
        stack.callback(_end, [subprocess.Popen(["sleep", "600"]) for _ in range(PROCESSES)])
        ports = [free_port() for _ in range(4)]
        words = (["/srv/ComfyUI/main.py"], ["/opt/bin/ollama", "runner"], ["/srv/tts"], ["/srv/stt"])
        ours = [stack.enter_context(Sleeper(*each)) for each in words[:3]]
        listener = subprocess.Popen(
            [sys.executable, "-c", LISTENS, str(ports[3])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        stack.callback(_end, [listener])
        if listener.stdout is not None:
            listener.stdout.readline()
        strangers = [stack.enter_context(Sleeper("game")) for _ in range(STRANGERS)]
        driver = StandInDriver(build_or_skip(directory / "library"), directory / "driver")
        pids = [child.pid for child in [*ours, *strangers]] + [listener.pid]
        driver.processes = [Process(pid, 1000) for pid in pids]
        driver.write()
        yield stack.enter_context(RunningBroker(directory, _config(ports), driver.env()))


def _config(ports: list[int]) -> dict[str, Any]:
    told: list[dict[str, Any]] = [
        {"dialect": "comfyui"},
        {"dialect": "ollama"},
        {"dialect": "http", "processes": ["/srv/tts"]},
        {"dialect": "http", "unit": "nobody"},
    ]
    names = ("comfyui", "ollama", "mvoice", "whisper")
    common = [{"url": f"http://127.0.0.1:{port}", "vram_resident_mib": 1000} for port in ports]
    consumers = {name: a | b for name, a, b in zip(names, told, common, strict=True)}
    return {"gpu": {"yield_to": ["*nobody_plays_this*"]}, "consumers": consumers}


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
