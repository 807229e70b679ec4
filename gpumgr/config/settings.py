"""The settings as values: what the rest of gpumgr sees of the configuration.

Owns: every key's name, type and default. Must not: read a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpumgr.config.free_paths import FreePath
from gpumgr.core.catalog import Catalog, GpuRef
from gpumgr.core.queue import Priority


class ConfigError(Exception):
    """The start stops with this sentence: it names file, key and remedy."""


@dataclass(frozen=True, slots=True)
class Token:
    """Who may call, and what: ``scope`` is ``use`` or ``operate``. The secret itself is kept nowhere."""

    name: str
    scope: str
    digest: bytes = field(repr=False)
    """SHA-256 of the secret."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """``allowed_origins``: scheme, host and port of each."""

    bind: str = "127.0.0.1:8770"
    threads: int = 128
    reserved_threads: int = 16
    state_dir: Path = Path("~/.local/state/gpumgr")
    auth: str = "off"
    trusted_network: bool = False
    tokens: tuple[Token, ...] = ()
    allowed_hosts: frozenset[str] = frozenset()
    allowed_origins: frozenset[tuple[str, str, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class GpuSettings:
    probe: str = "nvml"
    headroom_mib: int = 512
    when_unreadable: str = "refuse"
    simulated_card: Path | None = None
    untracked_peak_seconds: float = 300
    yield_to: tuple[str, ...] | None = None
    """Patterns of games; None: nobody looks for any."""
    yield_reserve_mib: int = 6144
    yield_gpus: tuple[GpuRef, ...] | None = None


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    min_ttl_seconds: float = 10
    max_ttl_seconds: float = 600
    default_ttl_seconds: float = 120
    default_wait_seconds: float = 120
    max_wait_seconds: float = 600
    max_prepare_seconds: float = 120
    max_hold_seconds: float = 0
    min_hold_seconds: float = 10
    confirm_seconds: float = 3
    quarantine_seconds: float = 30

    def clamp_ttl(self, seconds: float) -> float:
        return min(max(seconds, self.min_ttl_seconds), self.max_ttl_seconds)


@dataclass(frozen=True, slots=True)
class SchedulingSettings:
    """``quantum_seconds`` None: by what swaps cost."""

    policy: str = "quantum"
    mode: str = "evicting"
    quantum_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ProxySettings:
    connect_timeout_seconds: float = 5
    idle_timeout_seconds: float = 300
    stall_timeout_seconds: float = 60


@dataclass(frozen=True, slots=True)
class Call:
    """One call to a consumer. None: the dialect's own."""

    method: str | None = None
    path: str | None = None
    json: Any = None
    timeout_seconds: float | None = None
    command: tuple[str, ...] = ()
    """Run instead of the HTTP call, by the dialect ``command``."""
    for_each: Each | None = None
    """Called once for each item of a list, which stands for ``{item}`` in ``path`` and ``json``."""
    cuts_work: bool = False
    """It breaks what runs: while the consumer is busy it is not called a second time."""
    starts_service: bool = False
    """A load without which nobody serves: health is asked only after it."""


@dataclass(frozen=True, slots=True)
class Each:
    """A GET whose JSON answer holds a list of texts or numbers at the dotted path ``json``."""

    path: str
    json: str


@dataclass(frozen=True, slots=True)
class Report:
    """A GET whose JSON answer holds a value at the dotted path ``json``, or whose text holds ``metrics`` (Prometheus),
    which are added up. True above ``above``, unless one of the other conditions is given: ``below``, ``equals``,
    ``not_equals``. Or a ``command``, which exits 0 for yes and 1 for no."""

    path: str | None = None
    json: str | None = None
    above: float = 0
    timeout_seconds: float = 2
    below: float | None = None
    equals: str | float | bool | None = None
    not_equals: str | float | bool | None = None
    metrics: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rest:
    """What becomes of one consumer while nobody asks for it. ``idle_unload_seconds`` 0: it stays."""

    idle_unload_seconds: float = 0
    restore: bool = False
    restore_after_seconds: float = 60
    preload: bool = False


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """How a consumer is spoken to and recognised; what the rules need of it is in the catalog."""

    name: str
    dialect: str
    url: str | None
    """None: nobody listens there for gpumgr."""
    health: Call = Call()
    unload: Call = Call()
    load: Call | None = None
    busy: Report | None = None
    loaded: Report | None = None
    proxy_path: str | None = None
    proxy_free_paths: tuple[FreePath, ...] | None = None
    """None: the dialect's own."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Sent with every call to it; their values may be keys."""
    processes: tuple[str, ...] = ()
    unit: str | None = None
    container: str | None = None
    on_expiry: str = "interrupt"
    rest: Rest = Rest()
    preset: str | None = None
    scope: str = "system"
    """Whose systemd the unit belongs to: the machine's, or ``user``: that of gpumgr's own user."""
    socket: str | None = None
    """The container engine's; None: the first there is."""


@dataclass(frozen=True)
class Settings:
    file: Path
    server: ServerSettings
    gpu: GpuSettings
    lease: LeaseSettings
    scheduling: SchedulingSettings
    catalog: Catalog
    consumers: Mapping[str, ConsumerSettings]
    warnings: tuple[str, ...] = field(default=())
    proxy: ProxySettings = ProxySettings()
    rest: Mapping[str, Rest] = field(default_factory=dict)
    """Of each consumer, what happens to it while nobody asks for it."""
    priorities: Mapping[str, Priority] = field(default_factory=dict)
    """Of each kind, how urgent its requests are where they do not say so themselves."""


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port, with the loopback's names as one."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    host = "127.0.0.1" if host in ("localhost", "::1") or host.startswith("127.") else host
    return parts.scheme, host, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
