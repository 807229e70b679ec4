"""The ``gpumgr`` command. Owns: arguments and exit codes. Must not: do the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gpumgr import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done. 1: it went wrong. 2: the words or the configuration are wrong."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "check-config":
            return check_config(chosen.file)
        return demo(stay=not chosen.exit)
    except ImportError as error:
        print(
            f"gpumgr {chosen.command} needs more than the client ({error}): install gpumgr with its extra `server`",
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
    story = commands.add_parser("demo", help="play the main job on a simulated card, then stay up until Ctrl-C")
    story.add_argument("--exit", action="store_true", help="end by itself after the story")
    return parser


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


def demo(*, stay: bool) -> int:
    from gpumgr.sim import demo as story  # the base install has no server

    return story.play(stay=stay)


if __name__ == "__main__":
    sys.exit(main())
