"""What the file says reaches the parts that need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gpumgr import config
from gpumgr.adapters.ownership import Claim
from gpumgr.wiring import claims_of


def claims(directory: Path, **consumers: dict[str, Any]) -> dict[str, Claim]:
    file = directory / "consumers.yaml"
    for number, consumer in enumerate(consumers.values()):
        consumer |= {"vram_resident_mib": 1000, "url": f"http://127.0.0.1:{9000 + number}"}
    file.write_text(yaml.safe_dump({"consumers": consumers}), encoding="utf-8")
    return {claim.consumer: claim for claim in claims_of(config.load_file(file))}


def test_everything_that_tells_whose_memory_it_is(tmp_path: Path) -> None:
    found = claims(tmp_path, a={"dialect": "http", "processes": ["*/a"], "unit": "a", "container": "b"})
    assert found["a"] == Claim("a", ("*/a",), 9000, unit="a.service", container="b")


def test_a_dialect_knows_its_processes_where_it_has_one_consumer(tmp_path: Path) -> None:
    found = claims(tmp_path, paint={"dialect": "comfyui"}, one={"dialect": "ollama"}, two={"dialect": "ollama"})
    assert "*/ComfyUI/main.py" in found["paint"].usual
    assert (found["one"].usual, found["two"].usual) == ((), ())
