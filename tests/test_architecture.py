"""Imports point one way, the core stays pure, and the base install stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import ROOT

PACKAGE = ROOT / "gpumgr"
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "config": {"core"},
    "runtime": {"core", "errors", "config"},
    "adapters": {"runtime", "core", "config"},
    "web": {"runtime", "core", "errors", "config", "adapters"},
    "client": {"errors"},
    "run": {"client", "errors"},
    "sim": {"client", "errors"},
    "simulate": {"core"},
    "wiring": {"web", "adapters", "runtime", "core", "errors", "config"},
    "cli": {"config", "sim", "simulate", "run", "client", "errors"},
}
IMPURE = {"threading", "time", "datetime", "logging", "socket", "subprocess", "requests", "flask", "os", "random"}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "gpumgr":
                yield from (f"gpumgr.{alias.name}" for alias in node.names)
            else:
                yield node.module


def room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else file.stem


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_point_down(file: Path) -> None:
    here = room(file)
    if here == "__init__":
        return
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "gpumgr" and len(parts) > 1 and parts[1] not in (here, "__version__"):
            assert parts[1] in MAY_IMPORT[here], f"{here} must not import {name}"
        if here == "core":
            assert parts[0] not in IMPURE, f"the core must not import {name}"


def test_the_client_needs_requests_alone() -> None:
    code = "import sys, gpumgr.client; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert loaded.isdisjoint({"flask", "yaml", "pynvml", "psutil", "gunicorn"})


def test_nothing_starts_at_import() -> None:
    code = "import threading, gpumgr.wiring, gpumgr.web.server; print(threading.active_count())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_the_doors_are_thin() -> None:
    for door in ("wsgi.py", "app.py"):
        assert len((ROOT / door).read_text(encoding="utf-8").splitlines()) <= 8
