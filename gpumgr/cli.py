"""The ``gpumgr`` command. Owns: arguments and exit codes. Must not: do the work."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gpumgr import __version__, run
from gpumgr.client import DEFAULT_URL, URL_VARIABLE, BrokerUnreachable, Gpu
from gpumgr.errors import GpumgrError
from gpumgr.simulate import command as simulator

POLL_SECONDS = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done. 1: it went wrong. 2: the words or the configuration are wrong. ``run``: the program's own, or 1."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "check-config":
            return check_config(chosen.file)
        if chosen.command == "hold":
            return hold(chosen.url, chosen.reason, chosen.ttl_seconds, chosen.wait)
        if chosen.command == "resume":
            return resume(chosen.url)
        if chosen.command == "explain":
            return explain(chosen.url, chosen.kind, chosen.consumer)
        if chosen.command == "run":
            return under_lease(chosen, parser)
        if chosen.command == "simulate":
            return simulate(chosen)
        return demo(stay=not chosen.exit)
    except ImportError as error:
        extra = "dev" if chosen.command == "simulate" else "server"
        print(
            f"gpumgr {chosen.command} needs more than the client ({error}): install gpumgr with its extra `{extra}`",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpumgr", description="A lease broker for the GPU services of one machine.")
    parser.add_argument("--version", action="version", version=f"gpumgr {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check-config", help="say what is wrong with a configuration file")
    check.add_argument("file", type=Path, help="such as config/consumers.yaml")
    job = commands.add_parser("run", help="run a program while holding a lease; its exit code is this one's")
    which = job.add_mutually_exclusive_group(required=True)
    which.add_argument("--consumer", help="such as batch, a consumer of dialect none")
    which.add_argument("--kind", help="such as image")
    job.add_argument("--holder", help="a label for status (default: the program's name)")
    job.add_argument("--wait", type=float, metavar="SECONDS", help="how long to wait for the GPU")
    job.add_argument(
        "--priority", choices=("interactive", "normal", "batch"), help="how urgent it is (default: its kind's)"
    )
    job.add_argument("--ttl", type=float, metavar="SECONDS", help="of the lease, which is renewed while it runs")
    job.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ...", help="what to run")
    story = commands.add_parser("demo", help="play the main job on a simulated card, then stay up until Ctrl-C")
    story.add_argument("--exit", action="store_true", help="end by itself after the story")
    orders = commands.add_parser(
        "simulate", help="compare orders of the queue on virtual time; needs no GPU and no broker"
    )
    orders.add_argument("--load", type=_share, nargs="+", default=[0.3, 0.5, 0.7], help="shares of the card's time")
    orders.add_argument("--requests", type=_count, default=3000, help="for each load and seed (default: 3000)")
    orders.add_argument("--seeds", type=_count, default=3, help="draws of each workload (default: 3)")
    orders.add_argument("--trace", type=Path, help="arrivals for the LLM: TIMESTAMP,ContextTokens,GeneratedTokens")
    orders.add_argument("--every", type=_count, default=20, help="use each n-th row of the trace (default: 20)")
    orders.add_argument("--open-only", action="store_true", help="without the agents that ask again")
    orders.add_argument("--out", type=Path, metavar="DIRECTORY", help="for simulate.json and the pictures")
    orders.add_argument("--no-pictures", action="store_true", help="which need matplotlib (the extra `dev`)")
    url = os.environ.get(URL_VARIABLE) or DEFAULT_URL
    keep = commands.add_parser("hold", help="keep the card free: for a game, before a suspend")
    keep.add_argument("--reason", help="told to whoever is refused meanwhile")
    keep.add_argument(
        "--ttl-seconds", type=_seconds, metavar="SECONDS", help="it ends by itself then (default: 4 hours)"
    )
    keep.add_argument(
        "--wait",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="return when the card is free, or fail after so long",
    )
    go_on = commands.add_parser("resume", help="let the card be used again")
    told = commands.add_parser("explain", help="what would happen if somebody asked for the GPU now")
    asked = told.add_mutually_exclusive_group(required=True)
    asked.add_argument("kind", nargs="?", help="such as image")
    asked.add_argument("--consumer", help="such as comfyui")
    for command in (keep, go_on, told, job):
        command.add_argument("--url", default=url, help=f"the broker (GPUMGR_URL, default {DEFAULT_URL})")
    return parser


def _seconds(written: str) -> float:
    with suppress(ValueError):
        if 0 < (seconds := float(written)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError("must be a number of seconds above 0")


def _share(written: str) -> float:
    with suppress(ValueError):
        if 0 < (share := float(written)) < float("inf"):
            return share
    raise argparse.ArgumentTypeError("must be a number above 0, such as 0.5 for half of the card's time")


def _count(written: str) -> int:
    with suppress(ValueError):
        if (count := int(written)) >= 1:
            return count
    raise argparse.ArgumentTypeError("must be a whole number of 1 or more")


def hold(url: str, reason: str | None, ttl_seconds: float | None, wait_seconds: float) -> int:
    """0 when the card is kept free, and with ``wait_seconds`` is free."""
    until = time.monotonic() + wait_seconds
    try:
        with Gpu(url) as gpu:
            held = gpu.hold(reason, ttl_seconds)
            while held is not None and held["state"] != "free" and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
                held = gpu.held()
    except (GpumgrError, BrokerUnreachable) as error:
        print(f"gpumgr hold: {error}", file=sys.stderr)
        return 1
    if held is None:
        print("gpumgr hold: somebody ended it meanwhile", file=sys.stderr)
        return 1
    whose = ", ".join(held["in_use"] or held["resident"])
    print(f"{held['state']}{f' ({whose})' if whose else ''}, until {held['until_at']}; gpumgr resume ends it")
    if held["state"] == "free" or not wait_seconds:
        return 0
    print(f"gpumgr hold: the card is not free after {wait_seconds:g} s; the hold stays", file=sys.stderr)
    return 1


def resume(url: str) -> int:
    try:
        with Gpu(url) as gpu:
            print("the card is lent again" if gpu.resume() else "nobody kept it free")
    except (GpumgrError, BrokerUnreachable) as error:
        print(f"gpumgr resume: {error}", file=sys.stderr)
        return 1
    return 0


def explain(url: str, kind: str | None, consumer: str | None) -> int:
    """0 where it would be granted without a wait, also where others are unloaded for it."""
    try:
        with Gpu(url) as gpu:
            told = gpu.explain(kind, consumer=consumer)
    except (GpumgrError, BrokerUnreachable) as error:
        print(f"gpumgr explain: {error}", file=sys.stderr)
        return 1
    print(told["message"])
    return 0 if told["outcome"] in ("granted", "unload") else 1


def check_config(file: Path) -> int:
    from gpumgr import config  # the base install has no YAML

    try:
        settings = config.load_file(file, os.environ)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for warning in settings.warnings:
        print(f"{file}: warning: {warning}")
    kinds = ", ".join(f"{kind} → {consumer}" for kind, consumer in settings.catalog.routing.items()) or "none"
    print(f"{file}: ok. {len(settings.consumers)} consumers; kinds: {kinds}")
    return 0


def under_lease(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    program = chosen.program[1:] if chosen.program[:1] == ["--"] else chosen.program
    if not program:
        parser.error("name the program to run after --, such as: gpumgr run --consumer batch -- python train.py")
    wanted = {"consumer": chosen.consumer, "kind": chosen.kind, "ttl_seconds": chosen.ttl, "wait_seconds": chosen.wait}
    wanted["priority"] = chosen.priority
    return run.under_lease(program, chosen.url, holder=chosen.holder or Path(program[0]).name, **wanted)


def simulate(chosen: argparse.Namespace) -> int:
    wanted = simulator.Wanted(
        loads=chosen.load,
        requests=chosen.requests,
        seeds=chosen.seeds,
        trace=chosen.trace,
        every=chosen.every,
        closed=not chosen.open_only,
        directory=chosen.out,
        pictures=not chosen.no_pictures,
    )
    try:
        return simulator.simulate(wanted)
    except (OSError, ValueError) as error:
        print(f"gpumgr simulate: {error}", file=sys.stderr)
        return 1


def demo(*, stay: bool) -> int:
    from gpumgr.sim import demo as story  # the base install has no server

    return story.play(stay=stay)


if __name__ == "__main__":
    sys.exit(main())
