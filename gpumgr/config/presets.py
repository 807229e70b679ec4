"""Presets: what the file need not say of a well-known service, because it is written in presets.yaml.

Owns: finding a preset, and laying the file's own keys over it. Must not: know what the keys mean (load.py).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gpumgr.config.settings import ConfigError
from gpumgr.config.values import StrictLoader, shown


@cache
def presets() -> dict[str, dict[str, Any]]:
    """By name; what is in them must not be changed."""
    text = files("gpumgr.config").joinpath("presets.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.load(text, StrictLoader)  # noqa: S506 - it is a SafeLoader
    return found


def over_preset(where: str, written: object) -> object:
    """The consumer as if its preset's keys stood in the file, where it does not write them itself.

    Within ``health``, ``busy``, ``unload``, ``load`` and ``loaded`` key by key, so that a limit of time may be changed
    alone; a call that names its own path is wholly its own. An empty key (``busy:``) takes the preset's away.

    Raises: ConfigError.
    """
    if not isinstance(written, dict) or "preset" not in written:
        return written
    name = written["preset"]
    if not isinstance(name, str) or name not in presets():
        raise ConfigError(f"{where}.preset must be one of {', '.join(sorted(presets()))}, not {shown(name)}")
    if written.get("dialect", "http") != "http":
        raise ConfigError(f"{where}.preset stands on dialect: http: remove dialect, or the preset")
    return {"dialect": "http"} | _merged(presets()[name], written)


def _merged(preset: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = preset | own
    for key, value in own.items():
        known = preset.get(key)
        if known is None:
            continue
        if value is None:
            del merged[key]
        elif isinstance(known, dict) and isinstance(value, dict) and "path" not in value:
            merged[key] = known | value
    return merged
