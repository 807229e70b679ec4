"""The configuration: YAML to frozen settings, or one sentence that names file, key and remedy.

Nothing in the file is silently clamped or ignored. settings.py: the values; values.py: one value at a time; access.py:
tokens, names and keys; load.py: the file; dialects.py: which keys belong to which dialect; presets.py and presets.yaml:
what is written for well-known services; predecessor.py: what keys of older files are called here.
"""

from gpumgr.config.load import load, load_file
from gpumgr.config.settings import (
    Call,
    ConfigError,
    ConsumerSettings,
    Each,
    GpuSettings,
    LeaseSettings,
    ProxySettings,
    Report,
    Rest,
    SchedulingSettings,
    ServerSettings,
    Settings,
    Token,
    origin_of,
)

__all__ = [
    "Call",
    "ConfigError",
    "ConsumerSettings",
    "Each",
    "GpuSettings",
    "LeaseSettings",
    "ProxySettings",
    "Report",
    "Rest",
    "SchedulingSettings",
    "ServerSettings",
    "Settings",
    "Token",
    "load",
    "load_file",
    "origin_of",
]
