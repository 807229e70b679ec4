"""``python -m gpumgr.sim --dir DIR``: the stage as a process of its own, for the demo and the benchmarks.

Owns: the two files in DIR and the one line on stdout. Must not: hold anything the stage could hold.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path

import yaml

from gpumgr.sim.stage import Stage


def main() -> int:
    """Runs until SIGTERM or SIGINT. The line on stdout is printed when all ports answer and the files are there."""
    parser = argparse.ArgumentParser(prog="python -m gpumgr.sim", description="A simulated card and four services.")
    parser.add_argument("--dir", type=Path, required=True, help="gets consumers.yaml and card.json")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times faster than real services")
    parser.add_argument("--bind", default="127.0.0.1:8770", help="the broker's address in consumers.yaml")
    chosen = parser.parse_args()
    chosen.dir.mkdir(parents=True, exist_ok=True)

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Stage(chosen.dir, speed=chosen.speed) as stage:
        config = stage.directory / "consumers.yaml"
        config.write_text(yaml.safe_dump(stage.config(chosen.bind), sort_keys=False), encoding="utf-8")
        sys.stdout.write(json.dumps(stage.addresses() | {"config": str(config)}) + "\n")
        sys.stdout.flush()
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
