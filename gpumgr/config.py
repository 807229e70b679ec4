"""The configuration: YAML to frozen settings, or one sentence that names file, key and remedy.

Owns: every key, its type, its default and its limits. Must not: start, open or probe anything.
``config/consumers.yaml`` is the reference of every key; a test holds the two together.

Nothing in the file is silently clamped or ignored.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

from gpumgr.core.catalog import Catalog, Consumer, GpuRef

T = TypeVar("T")

DIALECTS = ("comfyui", "ollama", "http")
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
RESERVED_KINDS = frozenset(
    {"lease", "leases", "status", "explain", "hold", "events", "models", "chat", "completions", "responses"}
    | {"embeddings", "rerank", "messages", "audio", "images", "metrics", "health", "docs"}
)
PREDECESSOR_KEYS = {
    # keys of the Go predecessor's consumers.yaml and of its neighbours in the field → ours
    "base_url": "url",
    "backend_url": "url",
    "endpoint": "url",
    "type": "dialect",
    "backend": "dialect",
    "kind": "dialect",
    "adapter": "dialect",
    "evict": "unload",
    "evict_url": "unload: {path: …}",
    "evict_path": "unload: {path: …}",
    "evict_method": "unload: {method: …}",
    "evict_body": "unload: {json: …}",
    "evict_endpoint": "unload: {path: …}",
    "eviction": "unload",
    "evict_timeout": "unload: {timeout_seconds: …}",
    "evict_timeout_seconds": "unload: {timeout_seconds: …}",
    "unload_url": "unload: {path: …}",
    "unload_path": "unload: {path: …}",
    "health_url": "health: {path: …}",
    "health_path": "health: {path: …}",
    "health_check": "health: {path: …}",
    "healthcheck": "health: {path: …}",
    "health_timeout": "health: {timeout_seconds: …}",
    "busy_path": "busy: {path: …}",
    "proxy_url": "proxy_path",
    "max_concurrent": "max_concurrency",
    "concurrency": "max_concurrency",
    "gpu_index": "gpus: [0]",
    "gpu_ids": "gpus: [0]",
    "device": "gpus: [0]",
    "vram_mib": "vram_resident_mib",
    "vram_mb": "vram_resident_mib",
    "coexist_with": "can_coexist_with",
    "process_name": "processes",
    "process_names": "processes",
    "process_patterns": "processes",
    "listen": "server: {bind: …}",
    "listen_addr": "server: {bind: …}",
    "address": "server: {bind: …}",
    "port": "server: {bind: host:port}",
    "host": "server: {bind: host:port}",
    "headroom_mib": "gpu: {headroom_mib: …}",
    "vram_headroom_mib": "gpu: {headroom_mib: …}",
    "safety_margin_mib": "gpu: {headroom_mib: …}",
    "lease_ttl_seconds": "lease: {default_ttl_seconds: …}",
    "lock_timeout_seconds": "lease: {default_wait_seconds: …}",
    "queue_timeout_seconds": "lease: {default_wait_seconds: …}",
    "routes": "routing",
}


PREDECESSOR_WORDS = (
    # what an unlisted key of such a file most likely meant: the word in it → our key, where that one exists
    ("evict", "unload"),
    ("unload", "unload"),
    ("health", "health"),
    ("busy", "busy"),
    ("load", "load"),
    ("vram", "vram_resident_mib"),
    ("coexist", "can_coexist_with"),
    ("process", "processes"),
    ("gpu", "gpus"),
    ("concurren", "max_concurrency"),
    ("url", "url"),
    ("ttl", "default_ttl_seconds"),
    ("wait", "default_wait_seconds"),
    ("headroom", "headroom_mib"),
    ("timeout", "timeout_seconds"),
    ("lease", "lease"),
    ("gpu", "gpu"),
)


class ConfigError(Exception):
    """The start stops with this sentence: it names file, key and remedy."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    bind: str = "127.0.0.1:8770"
    threads: int = 128
    reserved_threads: int = 16
    state_dir: Path = Path("~/.local/state/gpumgr")


@dataclass(frozen=True, slots=True)
class GpuSettings:
    probe: str = "nvml"
    headroom_mib: int = 512
    when_unreadable: str = "refuse"
    simulated_card: Path | None = None


@dataclass(frozen=True, slots=True)
class LeaseSettings:
    min_ttl_seconds: float = 10
    max_ttl_seconds: float = 600
    default_ttl_seconds: float = 120
    default_wait_seconds: float = 120
    max_wait_seconds: float = 600
    max_prepare_seconds: float = 120

    def clamp_ttl(self, seconds: float) -> float:
        return min(max(seconds, self.min_ttl_seconds), self.max_ttl_seconds)


@dataclass(frozen=True, slots=True)
class SchedulingSettings:
    policy: str = "fifo"
    mode: str = "evicting"


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call to a consumer. None: the dialect's own."""

    method: str | None = None
    path: str | None = None
    json: Any = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A GET whose JSON answer holds a number or a truth at the dotted path ``json``; true above ``above``."""

    path: str
    json: str
    above: float = 0
    timeout_seconds: float = 2


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """How a consumer is spoken to and recognised; what the rules need of it is in the catalog."""

    name: str
    dialect: str
    url: str
    health: Call = Call()
    unload: Call = Call()
    load: Call | None = None
    busy: Report | None = None
    loaded: Report | None = None
    proxy_path: str | None = None
    processes: tuple[str, ...] = ()


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


# -- reading ------------------------------------------------------------------------------------------------


class _Strict(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; here the second one is an error."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(
                f"line {key_node.start_mark.line + 1}: the key {key!r} must be a text: write it in quotes"
            )
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice: remove one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class _Section:
    """One mapping of the file. Every key must be taken, or ``done`` names the one that nobody knows."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise ConfigError(f"{where or 'the file'} must be a mapping of keys, not {_shown(value)}")
        self.where = where
        self._left: dict[str, Any] = dict(value)
        self._known: list[str] = []

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def has(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, check: Callable[[str, Any], T], default: T) -> T:
        self._known.append(key)
        return check(self.path(key), self._left.pop(key)) if key in self._left else default

    def need(self, key: str, check: Callable[[str, Any], T], remedy: str) -> T:
        self._known.append(key)
        if key not in self._left:
            raise ConfigError(f"{self.path(key)} is missing: {remedy}")
        return check(self.path(key), self._left.pop(key))

    def section(self, key: str) -> _Section:
        self._known.append(key)
        value = self._left.pop(key, None)
        return _Section(self.path(key), {} if value is None else value)

    def done(self) -> None:
        for key in self._left:
            raise ConfigError(f"{self.path(key)} is not a known key: {self._remedy(key)}")

    def _remedy(self, key: str) -> str:
        if key in PREDECESSOR_KEYS:
            return f"it is now written {PREDECESSOR_KEYS[key]}"
        close = difflib.get_close_matches(key, self._known, 1)
        if close:
            return f"did you mean {close[0]}?"
        for word, ours in PREDECESSOR_WORDS:
            if word in key.lower() and ours in self._known:
                return f"it is now part of {ours}"
        return f"here are allowed: {', '.join(sorted(self._known))}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} must be a text, not {_shown(value)}")
    return value


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number such as 30, without a unit, not {_shown(value)}")
    return value


def _seconds(where: str, value: Any) -> float:
    number = _number(where, value)
    if number <= 0:
        raise ConfigError(f"{where} must be more than 0 seconds, not {_shown(value)}")
    return number


def _seconds_or_zero(where: str, value: Any) -> float:
    return 0 if value == 0 and not isinstance(value, bool) else _seconds(where, value)


def _whole(minimum: int) -> Callable[[str, Any], int]:
    def check(where: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{where} must be a whole number of at least {minimum}, not {_shown(value)}")
        return value

    return check


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(where: str, value: Any) -> str:
        if value not in allowed or not isinstance(value, str):
            raise ConfigError(f"{where} must be one of {', '.join(allowed)}, not {_shown(value)}")
        return value

    return check


def _texts(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list of texts, not {_shown(value)}")
    return tuple(_text(f"{where}[{i}]", item) for i, item in enumerate(value))


def _gpus(where: str, value: Any) -> tuple[GpuRef, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a list of NVML indexes or UUIDs such as [0], not {_shown(value)}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | str) or (isinstance(item, int) and item < 0):
            raise ConfigError(f"{where} holds {_shown(item)}: write an NVML index (0, 1, …) or a UUID ('GPU-…')")
    if len(set(value)) != len(value):
        raise ConfigError(f"{where} names a GPU twice: remove one")
    return tuple(value)


def _path(where: str, value: Any) -> str:
    text = _text(where, value)
    if not text.startswith("/") or any(c.isspace() for c in text):
        raise ConfigError(f"{where} must be a path that begins with /, not {_shown(value)}")
    return text


def _url(where: str, value: Any) -> str:
    text = _text(where, value)
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{where} is not a URL ({error}): write it as http://127.0.0.1:8188") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or any(c.isspace() for c in text):
        raise ConfigError(f"{where} must be a URL such as http://127.0.0.1:8188, not {_shown(value)}")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(f"{where} must be scheme, host, port and path alone, without user, query or fragment")
    return text.rstrip("/")


def _bind(where: str, value: Any) -> str:
    text = _text(where, value)
    host, _, port = text.rpartition(":")
    if text.startswith("unix:/"):
        return text
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535 or (":" in host and not host.startswith("[")):
        raise ConfigError(f"{where} must be host:port such as 127.0.0.1:8770, not {_shown(value)}")
    return text


# -- the file -----------------------------------------------------------------------------------------------


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of ``GPUMGR_CONFIG`` (default ``config/consumers.yaml``), with ``GPUMGR_BIND`` and
    ``GPUMGR_STATE_DIR`` over their keys. Raises: ConfigError."""
    env = os.environ if environ is None else environ
    return load_file(Path(env.get("GPUMGR_CONFIG") or "config/consumers.yaml"), env)


def load_file(file: Path, environ: Mapping[str, str] | None = None) -> Settings:
    """Raises: ConfigError, one sentence."""
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), _Strict)  # noqa: S506 - _Strict is a SafeLoader
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}): name another file with GPUMGR_CONFIG") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    try:
        return _settings(file, document, environ or {})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _settings(file: Path, document: object, environ: Mapping[str, str]) -> Settings:
    top = _Section("", document)
    server = _server(top.section("server"), environ)
    gpu = _gpu(top.section("gpu"), file)
    lease = _lease(top.section("lease"))
    scheduling = _scheduling(top.section("scheduling"))
    routing = top.section("routing")
    consumers = top.need("consumers", _Section, "name at least one service that uses the GPU")
    top.done()
    parsed = [_consumer(name, consumers) for name in list(consumers._left)]
    if not parsed:
        raise ConfigError("consumers is empty: name at least one service that uses the GPU")
    catalog = Catalog({c.name: c for c, _ in parsed}, _routing(routing, [c.name for c, _ in parsed]))
    _require_mutual(catalog)
    _require_own_origins(s for _, s in parsed)
    settings = {s.name: s for _, s in parsed}
    return Settings(file, server, gpu, lease, scheduling, catalog, settings, tuple(_warnings(catalog, settings)))


def _server(section: _Section, environ: Mapping[str, str]) -> ServerSettings:
    default = ServerSettings()
    bind = section.take("bind", _bind, default.bind)
    state_dir = section.take("state_dir", _text, str(default.state_dir))
    threads = section.take("threads", _whole(2), default.threads)
    reserved = section.take("reserved_threads", _whole(1), default.reserved_threads)
    section.done()
    if reserved >= threads:
        raise ConfigError(
            f"server.reserved_threads ({reserved}) must be less than server.threads ({threads}): "
            "the rest are the places that may wait"
        )
    if environ.get("GPUMGR_BIND"):
        bind = _bind("GPUMGR_BIND", environ["GPUMGR_BIND"])
    state_dir = environ.get("GPUMGR_STATE_DIR") or state_dir
    return ServerSettings(bind, threads, reserved, Path(state_dir).expanduser())


def _gpu(section: _Section, file: Path) -> GpuSettings:
    default = GpuSettings()
    probe = section.take("probe", _one_of("nvml", "simulated"), default.probe)
    headroom = section.take("headroom_mib", _whole(0), default.headroom_mib)
    unreadable = section.take("when_unreadable", _one_of("refuse"), default.when_unreadable)
    card = section.take("simulated_card", _text, "")
    section.done()
    if card and probe != "simulated":
        raise ConfigError("gpu.simulated_card needs gpu.probe: simulated: set that, or remove this key")
    return GpuSettings(probe, headroom, unreadable, file.parent / Path(card).expanduser() if card else None)


def _lease(section: _Section) -> LeaseSettings:
    default = LeaseSettings()
    settings = LeaseSettings(
        min_ttl_seconds=section.take("min_ttl_seconds", _seconds, default.min_ttl_seconds),
        max_ttl_seconds=section.take("max_ttl_seconds", _seconds, default.max_ttl_seconds),
        default_ttl_seconds=section.take("default_ttl_seconds", _seconds, default.default_ttl_seconds),
        default_wait_seconds=section.take("default_wait_seconds", _seconds_or_zero, default.default_wait_seconds),
        max_wait_seconds=section.take("max_wait_seconds", _seconds, default.max_wait_seconds),
        max_prepare_seconds=section.take("max_prepare_seconds", _seconds, default.max_prepare_seconds),
    )
    section.done()
    if not settings.min_ttl_seconds <= settings.default_ttl_seconds <= settings.max_ttl_seconds:
        raise ConfigError(
            f"lease.default_ttl_seconds ({settings.default_ttl_seconds}) must lie between lease.min_ttl_seconds "
            f"({settings.min_ttl_seconds}) and lease.max_ttl_seconds ({settings.max_ttl_seconds}): change one of them"
        )
    if settings.default_wait_seconds > settings.max_wait_seconds:
        raise ConfigError(
            f"lease.default_wait_seconds ({settings.default_wait_seconds}) must not be above lease.max_wait_seconds "
            f"({settings.max_wait_seconds}): change one of them"
        )
    return settings


def _scheduling(section: _Section) -> SchedulingSettings:
    default = SchedulingSettings()
    policy = section.take("policy", _one_of("fifo"), default.policy)
    mode = section.take("mode", _one_of("evicting"), default.mode)
    section.done()
    return SchedulingSettings(policy, mode)


def _routing(section: _Section, consumers: list[str]) -> dict[str, str]:
    routing = {}
    for kind in list(section._left):
        _require_name("routing", "kind", kind)
        if kind in RESERVED_KINDS:
            raise ConfigError(f"routing.{kind}: this name is reserved for gpumgr's own routes: choose another kind")
        target = section.need(kind, _text, "")
        if target not in consumers:
            raise ConfigError(
                f"routing.{kind} leads to {target!r}, which is not in consumers: "
                f"choose one of {', '.join(sorted(consumers))}"
            )
        routing[kind] = target
    return routing


def _require_name(where: str, what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}.{name}: a {what} is a small letter and up to 31 small letters, digits, _ or -: rename it"
        )


def _consumer(name: str, consumers: _Section) -> tuple[Consumer, ConsumerSettings]:
    _require_name("consumers", "consumer's name", name)
    section = consumers.section(name)
    dialect = section.need("dialect", _one_of(*DIALECTS), f"write one of {', '.join(DIALECTS)}")
    url = section.need("url", _url, "write its address, such as http://127.0.0.1:8188")
    default_gpus: tuple[GpuRef, ...] = (0,)
    gpus = section.take("gpus", _gpus, default_gpus)
    no_texts: tuple[str, ...] = ()
    settings = ConsumerSettings(
        name=name,
        dialect=dialect,
        url=url,
        health=_call(section, "health", default_timeout=None) or Call(),
        unload=_call(section, "unload", default_timeout=None) or Call(),
        load=_call(section, "load", default_timeout=None),
        busy=_report(section, "busy"),
        loaded=_report(section, "loaded"),
        proxy_path=section.take("proxy_path", _path, "") or None,
        processes=section.take("processes", _texts, no_texts),
    )
    consumer = Consumer(
        name=name,
        url=url,
        public_url=section.take("public_url", _url, url),
        dialect=dialect,
        gpus=gpus,
        vram_resident_mib=_sizes(section, gpus),
        residual_mib=section.take("residual_mib", _whole(0), 768),
        can_coexist_with=frozenset(section.take("can_coexist_with", _texts, no_texts)),
        max_concurrency=section.take("max_concurrency", _whole(1), 1),
        unload_timeout_seconds=settings.unload.timeout_seconds or 30,
        load_timeout_seconds=(settings.load.timeout_seconds if settings.load else None) or 60,
    )
    section.done()
    _require_whole_calls(settings)
    return consumer, settings


def _sizes(section: _Section, gpus: tuple[GpuRef, ...]) -> tuple[int, ...]:
    def check(where: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list):
            return (_whole(0)(where, value),) * len(gpus)
        if len(value) != len(gpus):
            raise ConfigError(
                f"{where} lists {len(value)} sizes for {len(gpus)} GPUs: write one for each, or one number"
            )
        return tuple(_whole(0)(f"{where}[{i}]", item) for i, item in enumerate(value))

    return section.need("vram_resident_mib", check, "write how many MiB it holds when it is loaded")


def _method(where: str, value: Any) -> str:
    return _one_of("GET", "POST", "PUT", "DELETE")(where, value)


def _any(_where: str, value: Any) -> Any:
    return value


def _call(parent: _Section, key: str, default_timeout: float | None) -> Call | None:
    if not parent.has(key):
        parent.section(key)
        return None
    section = parent.section(key)
    call = Call(
        method=section.take("method", _method, "") or None,
        path=section.take("path", _path, "") or None,
        json=section.take("json", _any, None),
        timeout_seconds=section.take("timeout_seconds", _seconds, default_timeout or 0) or None,
    )
    section.done()
    return call


def _report(parent: _Section, key: str) -> Report | None:
    if not parent.has(key):
        parent.section(key)
        return None
    section = parent.section(key)
    report = Report(
        path=section.need("path", _path, "write the path to ask"),
        json=section.need("json", _text, "write which field of the answer tells it, such as running"),
        above=section.take("above", _number, 0.0),
        timeout_seconds=section.take("timeout_seconds", _seconds, 2.0),
    )
    section.done()
    return report


def _require_whole_calls(settings: ConsumerSettings) -> None:
    """A call without a path would be ignored: only a dialect that has its own path may do without."""
    where = f"consumers.{settings.name}"
    for key, call in (("health", settings.health), ("unload", settings.unload), ("load", settings.load)):
        if call is None or call.path is not None:
            continue
        if call.method is not None or call.json is not None:
            raise ConfigError(f"{where}.{key} has a method or json without a path: write its path")
        if key == "load" or (key == "unload" and settings.dialect == "http" and call.timeout_seconds is not None):
            raise ConfigError(f"{where}.{key}.path is missing: write the path to call")
    if settings.health.method not in (None, "GET") or settings.health.json is not None:
        raise ConfigError(f"{where}.health is asked with GET and no body: remove method and json")


def _require_mutual(catalog: Catalog) -> None:
    for consumer in catalog.consumers.values():
        for other in sorted(consumer.can_coexist_with):
            where = f"consumers.{consumer.name}.can_coexist_with"
            if other not in catalog.consumers:
                raise ConfigError(f"{where} names {other!r}, which is not in consumers: remove it or add that consumer")
            if other == consumer.name:
                raise ConfigError(f"{where} names itself: remove it; max_concurrency says how many may share it")
            if consumer.name not in catalog.consumers[other].can_coexist_with:
                raise ConfigError(
                    f"{where} names {other}, but not the other way round: add {consumer.name} to "
                    f"consumers.{other}.can_coexist_with, or remove {other} here"
                )


def _require_own_origins(settings: Iterable[ConsumerSettings]) -> None:
    owners: dict[tuple[str, str, int | None], str] = {}
    for consumer in settings:
        origin = origin_of(consumer.url)
        if origin in owners:
            raise ConfigError(
                f"consumers.{consumer.name}.url has the same origin as consumers.{owners[origin]}.url: one service is "
                "one consumer; route several kinds to it instead"
            )
        owners[origin] = consumer.name


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port, with the loopback's names as one."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    host = "127.0.0.1" if host in ("localhost", "::1") or host.startswith("127.") else host
    return parts.scheme, host, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _warnings(catalog: Catalog, settings: Mapping[str, ConsumerSettings]) -> Iterable[str]:
    for name, consumer in settings.items():
        if consumer.dialect == "http" and consumer.unload.path is None:
            yield (
                f"consumers.{name} has no unload call: once on the card it stays, and whoever may not coexist with it "
                "is refused. Write unload: {path: …} if the service has one"
            )
        size, residual = min(catalog.consumers[name].vram_resident_mib), catalog.consumers[name].residual_mib
        if 0 < size <= residual:
            yield (
                f"consumers.{name}.residual_mib ({residual}) is not below its vram_resident_mib ({size}): its unload "
                "would count as proved before it gave anything back. Lower residual_mib"
            )
        if not catalog.kinds_of(name):
            yield f"consumers.{name} has no kind in routing: it can be leased by consumer only"
