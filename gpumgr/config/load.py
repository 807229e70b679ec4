"""The file, section by section, to settings; or one sentence that names file, key and remedy.

Owns: which keys there are, where, and what must hold between them. ``config/consumers.yaml`` is the reference of
every key; a test holds the two together. Must not: start, open or probe anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gpumgr.config import access
from gpumgr.config import values as check
from gpumgr.config.dialects import DIALECTS, RESIDUAL_MIB, WITHOUT_URL, require_fitting
from gpumgr.config.presets import over_preset, presets
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
from gpumgr.config.values import Section, StrictLoader
from gpumgr.core.catalog import Catalog, Consumer, GpuRef
from gpumgr.core.queue import Priority

LOADABLE = frozenset({"vllm", "systemd", "docker"})
"""Dialects with a load call of their own."""
RESTORABLE = LOADABLE | {"ollama"}
"""Those that know how to bring back what was unloaded without being told a call."""
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
RESERVED_KINDS = frozenset(
    {"lease", "leases", "status", "explain", "hold", "events", "models", "chat", "completions", "responses"}
    | {"embeddings", "rerank", "messages", "audio", "images", "metrics", "health", "docs"}
)


def load(environ: Mapping[str, str] | None = None, tokens: tuple[Token, ...] = ()) -> Settings:
    """The settings of ``GPUMGR_CONFIG`` (default ``config/consumers.yaml``), with ``GPUMGR_BIND`` and
    ``GPUMGR_STATE_DIR`` over their keys. ``tokens``: those that were taken out of the environment before.

    Raises: ConfigError.
    """
    env = os.environ if environ is None else environ
    return load_file(Path(env.get("GPUMGR_CONFIG") or "config/consumers.yaml"), env, tokens)


def load_file(file: Path, environ: Mapping[str, str] | None = None, tokens: tuple[Token, ...] = ()) -> Settings:
    """Raises: ConfigError, one sentence."""
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), StrictLoader)  # noqa: S506 - it is a SafeLoader
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}): is its path right?") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {_not_yaml(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    try:
        return _settings(file, document, environ or {}, tokens)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _not_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "cannot be read"
    if mark is None:
        return f"is not YAML: {' '.join(str(error).split())}"
    hint = ": YAML indents with spaces, not tabs" if "\\t" in problem else ""
    return f"is not YAML in line {mark.line + 1}, column {mark.column + 1}: {problem}{hint}"


def _settings(file: Path, document: object, environ: Mapping[str, str], tokens: tuple[Token, ...]) -> Settings:
    top = Section("", document)
    server = _server(top.section("server"), file, environ, tokens)
    gpu = _gpu(top.section("gpu"), file)
    lease = _lease(top.section("lease"))
    scheduling = _scheduling(top.section("scheduling"))
    proxy = _proxy(top.section("proxy"))
    routing = top.section("routing")
    consumers = top.need("consumers", Section, "name at least one service that uses the GPU")
    top.done()
    parsed = [_consumer(name, consumers, environ) for name in consumers.names()]
    if not parsed:
        raise ConfigError("consumers is empty: name at least one service that uses the GPU")
    kinds, priorities = _routing(routing, [c.name for c, _ in parsed])
    catalog = Catalog({c.name: c for c, _ in parsed}, kinds)
    _require_known_neighbours(catalog)
    _require_mutual(catalog)
    _require_own_origins(s for _, s in parsed)
    _require_own_cgroups([s for _, s in parsed])
    settings = {s.name: s for _, s in parsed}
    rest = {name: consumer.rest for name, consumer in settings.items()}
    _require_ways_back(settings)
    _require_pinned_stay(catalog, settings)
    warnings = (*_idle_words(scheduling), *_warnings(catalog, settings))
    return Settings(file, server, gpu, lease, scheduling, catalog, settings, warnings, proxy, rest, priorities)


def _server(section: Section, file: Path, environ: Mapping[str, str], tokens: tuple[Token, ...]) -> ServerSettings:
    default = ServerSettings()
    bind = section.take("bind", check.bind, default.bind)
    state_dir = section.take("state_dir", check.text, str(default.state_dir))
    threads = section.take("threads", check.whole(2), default.threads)
    reserved = section.take("reserved_threads", check.whole(1), default.reserved_threads)
    auth = section.take("auth", access.auth, default.auth)
    trusted = section.take("trusted_network", access.truth, default.trusted_network)
    tokens_file = section.take("tokens_file", check.text, "")
    hosts = section.take("allowed_hosts", access.hosts, default.allowed_hosts)
    origins = section.take("allowed_origins", access.origins, default.allowed_origins)
    section.done()
    if reserved >= threads:
        raise ConfigError(
            f"server.reserved_threads ({reserved}) must be less than server.threads ({threads}): "
            "the rest are the places that may wait"
        )
    if environ.get("GPUMGR_BIND"):
        bind = check.bind("GPUMGR_BIND", environ["GPUMGR_BIND"])
    state_dir = environ.get("GPUMGR_STATE_DIR") or state_dir
    tokens += access.environment_tokens(environ)
    tokens += access.file_tokens(file.parent / Path(tokens_file).expanduser()) if tokens_file else ()
    access.require_tokens(auth, tokens)
    state = Path(state_dir).expanduser()
    server = ServerSettings(bind, threads, reserved, state, auth, trusted, tokens, hosts, origins)
    access.require_private(server, bind, "GPUMGR_BIND" if environ.get("GPUMGR_BIND") else "server.bind")
    return server


def _gpu(section: Section, file: Path) -> GpuSettings:
    default = GpuSettings()
    probe = section.take("probe", check.one_of("nvml", "simulated"), default.probe)
    headroom = section.take("headroom_mib", check.whole(0), default.headroom_mib)
    unreadable = section.take("when_unreadable", check.one_of("refuse", "declared"), default.when_unreadable)
    card = section.take("simulated_card", check.text, "")
    peak = section.take("untracked_peak_seconds", check.seconds_or_zero, default.untracked_peak_seconds)
    nobody: tuple[str, ...] = ()
    yield_to = section.take("yield_to", check.texts, nobody) if section.has("yield_to") else None
    reserve = section.take("yield_reserve_mib", check.whole(0), default.yield_reserve_mib)
    anywhere: tuple[GpuRef, ...] = (0,)
    yield_gpus = section.take("yield_gpus", check.gpu_refs, anywhere) if section.has("yield_gpus") else None
    section.done()
    for key, given in (("yield_gpus", yield_gpus), ("yield_reserve_mib", reserve != default.yield_reserve_mib)):
        if given and yield_to is None:
            raise ConfigError(f"gpu.{key} needs gpu.yield_to: write which games to yield to, or [] for Steam's alone")
    if card and probe != "simulated":
        raise ConfigError("gpu.simulated_card needs gpu.probe: simulated: set that, or remove this key")
    simulated = file.parent / Path(card).expanduser() if card else None
    return GpuSettings(probe, headroom, unreadable, simulated, peak, yield_to, reserve, yield_gpus)


def _lease(section: Section) -> LeaseSettings:
    default = LeaseSettings()
    settings = LeaseSettings(
        min_ttl_seconds=section.take("min_ttl_seconds", check.seconds, default.min_ttl_seconds),
        max_ttl_seconds=section.take("max_ttl_seconds", check.seconds, default.max_ttl_seconds),
        default_ttl_seconds=section.take("default_ttl_seconds", check.seconds, default.default_ttl_seconds),
        default_wait_seconds=section.take("default_wait_seconds", check.seconds_or_zero, default.default_wait_seconds),
        max_wait_seconds=section.take("max_wait_seconds", check.seconds, default.max_wait_seconds),
        max_prepare_seconds=section.take("max_prepare_seconds", check.seconds, default.max_prepare_seconds),
        max_hold_seconds=section.take("max_hold_seconds", check.seconds_or_zero, default.max_hold_seconds),
        min_hold_seconds=section.take("min_hold_seconds", check.seconds_or_zero, default.min_hold_seconds),
        confirm_seconds=section.take("confirm_seconds", check.seconds_or_zero, default.confirm_seconds),
        quarantine_seconds=section.take("quarantine_seconds", check.seconds_or_zero, default.quarantine_seconds),
    )
    section.done()
    if settings.min_ttl_seconds > settings.max_ttl_seconds:
        raise ConfigError(
            f"lease.min_ttl_seconds ({settings.min_ttl_seconds}) must not be above lease.max_ttl_seconds "
            f"({settings.max_ttl_seconds}): change one of them"
        )
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


def _scheduling(section: Section) -> SchedulingSettings:
    default = SchedulingSettings()
    policy = section.take("policy", check.one_of("quantum", "fifo"), default.policy)
    mode = section.take("mode", check.one_of("evicting", "locked", "passthrough"), default.mode)
    quantum = section.take("quantum_seconds", check.seconds_or_auto, default.quantum_seconds)
    section.done()
    if policy == "fifo" and quantum is not None:
        raise ConfigError("scheduling.quantum_seconds needs scheduling.policy: quantum: set that, or remove this key")
    return SchedulingSettings(policy, mode, quantum)


def _proxy(section: Section) -> ProxySettings:
    default = ProxySettings()
    a_day = check.seconds_of_a_day
    settings = ProxySettings(
        connect_timeout_seconds=section.take("connect_timeout_seconds", a_day, default.connect_timeout_seconds),
        idle_timeout_seconds=section.take("idle_timeout_seconds", a_day, default.idle_timeout_seconds),
        stall_timeout_seconds=section.take("stall_timeout_seconds", a_day, default.stall_timeout_seconds),
    )
    section.done()
    return settings


def _routing(section: Section, consumers: list[str]) -> tuple[dict[str, str], dict[str, Priority]]:
    """Where each kind leads, and how urgent it is."""
    routing, priorities = {}, {}
    for kind in section.names():
        _require_name("routing", "kind", kind)
        if kind in RESERVED_KINDS:
            raise ConfigError(f"routing.{kind}: this name is reserved for gpumgr's own routes: choose another kind")
        target, priorities[kind] = section.need(kind, _route, "")
        if target not in consumers:
            raise ConfigError(
                f"routing.{kind} leads to {target!r}, which is not in consumers: "
                f"choose one of {', '.join(sorted(consumers))}"
            )
        routing[kind] = target
    return routing, priorities


def _route(where: str, value: Any) -> tuple[str, Priority]:
    if isinstance(value, str) and value.strip():
        return value, Priority.NORMAL
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} must be a consumer's name, or {{consumer: NAME, priority: …}}, not {check.shown(value)}"
        )
    section = Section(where, value)
    target = section.need("consumer", check.text, "write the consumer that this kind leads to")
    priority = section.take("priority", check.one_of(*Priority), Priority.NORMAL.value)
    section.done()
    return target, Priority(priority)


def _require_name(where: str, what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}.{name}: a {what} is a small letter and up to 31 small letters, digits, _ or -: rename it"
        )


def _consumer(name: str, consumers: Section, environ: Mapping[str, str]) -> tuple[Consumer, ConsumerSettings]:
    _require_name("consumers", "consumer's name", name)
    section = consumers.section(name, over_preset)
    preset = section.take("preset", check.text, "") or None
    dialect = section.need("dialect", _dialect, f"write one of {', '.join(DIALECTS)}, or a preset")
    url = _url(section, dialect)
    default_gpus: tuple[GpuRef, ...] = (0,)
    gpus = section.take("gpus", check.gpu_refs, default_gpus)
    no_texts: tuple[str, ...] = ()
    no_headers: tuple[tuple[str, str], ...] = ()
    settings = ConsumerSettings(
        name=name,
        dialect=dialect,
        url=url,
        preset=preset,
        health=_call(section, "health", default_timeout=None) or Call(),
        unload=_call(section, "unload", default_timeout=None) or Call(),
        load=_call(section, "load", default_timeout=None),
        busy=_report(section, "busy"),
        loaded=_report(section, "loaded"),
        proxy_path=section.take("proxy_path", check.url_path, "") or None,
        proxy_free_paths=section.take("proxy_free_paths", check.free_paths, None),
        headers=section.take("headers", access.Headers(environ), no_headers),
        processes=section.take("processes", check.texts, no_texts),
        unit=section.take("unit", check.unit, "") or None,
        container=section.take("container", check.container, "") or None,
        on_expiry=section.take("on_expiry", check.one_of("interrupt", "wait"), "interrupt"),
        rest=_rest(section),
        scope=section.take("scope", check.one_of("system", "user"), "system"),
        socket=section.take("socket", check.absolute_path, "") or None,
    )
    consumer = Consumer(
        name=name,
        url=url,
        public_url=section.take("public_url", check.url, "") or url,
        dialect=dialect,
        gpus=gpus,
        **_sizes(section, gpus),
        residual_mib=section.take("residual_mib", check.whole(0), RESIDUAL_MIB.get(dialect, 768)),
        can_coexist_with=frozenset(section.take("can_coexist_with", check.texts, no_texts)),
        by_size=section.take("coexist", check.one_of("pairs", "by_size"), "pairs") == "by_size",
        max_concurrency=section.take("max_concurrency", check.whole(1), 1),
        pinned=section.take("pinned", access.truth, False),
        unload_timeout_seconds=settings.unload.timeout_seconds or 30,
    )
    section.done()
    if consumer.by_size and not consumer.unsized and 0 in consumer.vram_resident_mib:
        raise ConfigError(
            f"{section.path('coexist')}: by_size needs a size, and 0 MiB is none: write vram_resident_mib, or auto"
        )
    require_fitting(settings, consumer)
    return consumer, settings


def _rest(section: Section) -> Rest:
    default = Rest()
    return Rest(
        idle_unload_seconds=section.take("idle_unload_seconds", check.seconds_or_zero, default.idle_unload_seconds),
        restore=section.take("restore", access.truth, default.restore),
        restore_after_seconds=section.take("restore_after_seconds", check.seconds, default.restore_after_seconds),
        preload=section.take("preload", access.truth, default.preload),
    )


def _require_ways_back(settings: Mapping[str, ConsumerSettings]) -> None:
    """What cannot be loaded by a call cannot be brought back."""
    for name, consumer in settings.items():
        preloads = consumer.rest.preload and consumer.dialect not in LOADABLE
        restores = consumer.rest.restore and consumer.dialect not in RESTORABLE
        for key, wanted in (("preload", preloads), ("restore", restores)):
            if wanted and consumer.load is None:
                raise ConfigError(
                    f"consumers.{name}.{key} needs a load call: write load: {{path: …, json: …}}, the request that "
                    "loads it"
                )


def _require_pinned_stay(catalog: Catalog, settings: Mapping[str, ConsumerSettings]) -> None:
    for name, consumer in settings.items():
        if catalog.consumers[name].pinned and consumer.rest.idle_unload_seconds:
            raise ConfigError(
                f"consumers.{name}.idle_unload_seconds unloads it when it is idle, and pinned keeps it there: keep one"
            )


def _dialect(where: str, value: Any) -> str:
    if isinstance(value, str) and value in presets():
        raise ConfigError(f"{where} must be one of {', '.join(DIALECTS)}; {value} is a preset: write preset: {value}")
    return check.one_of(*DIALECTS)(where, value)


def _url(section: Section, dialect: str) -> str | None:
    if dialect in WITHOUT_URL:
        return section.take("url", check.url, "") or None
    return section.need("url", check.url, "write its address, such as http://127.0.0.1:8188")


def _sizes(section: Section, gpus: tuple[GpuRef, ...]) -> dict[str, Any]:
    """What a consumer needs on each GPU: declared, or learned."""

    def sizes(where: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list):
            return (check.whole(0)(where, value),) * len(gpus)
        if len(value) != len(gpus):
            raise ConfigError(
                f"{where} lists {len(value)} sizes for {len(gpus)} GPUs: write one for each, or one number"
            )
        return tuple(check.whole(0)(f"{where}[{i}]", item) for i, item in enumerate(value))

    def sizes_or_auto(where: str, value: Any) -> tuple[int, ...] | None:
        if isinstance(value, str) and value != "auto":
            raise ConfigError(f"{where} must be a whole number, a list of them, or auto, not {check.shown(value)}")
        return None if value == "auto" else sizes(where, value)

    remedy = "write how many MiB it holds when it is loaded, or auto"
    size = section.need("vram_resident_mib", sizes_or_auto, remedy)
    nothing: tuple[int, ...] = ()
    declared = section.take("vram_declared_mib", sizes, nothing)
    if size is not None:
        if declared:
            raise ConfigError(
                f"{section.path('vram_declared_mib')} is only read with vram_resident_mib: auto: write that, or remove "
                "this key"
            )
        return {"vram_resident_mib": size}
    at_first = declared or (0,) * len(gpus)
    return {"vram_resident_mib": at_first, "auto": True, "declared_mib": declared, "unsized": not declared}


CONDITIONS = ("above", "below", "equals", "not_equals")
NO_COMMAND: tuple[str, ...] = ()


def _maybe_number(where: str, value: Any) -> float | None:
    return check.number(where, value)


def _method(where: str, value: Any) -> str:
    return check.one_of("GET", "POST", "PUT", "DELETE")(where, value)


def _any(_where: str, value: Any) -> Any:
    return value


def _call(parent: Section, key: str, default_timeout: float | None) -> Call | None:
    if not parent.has(key):
        parent.section(key)
        return None
    section = parent.section(key)
    call = Call(
        method=section.take("method", _method, "") or None,
        path=section.take("path", check.url_path, "") or None,
        json=section.take("json", _any, None),
        timeout_seconds=section.take("timeout_seconds", check.seconds, default_timeout or 0) or None,
        command=section.take("command", check.command, NO_COMMAND),
        for_each=_each(section),
        cuts_work=section.take("cuts_work", access.truth, False),
        starts_service=section.take("starts_service", access.truth, False),
    )
    section.done()
    return call


def _each(parent: Section) -> Each | None:
    if not parent.has("for_each"):
        parent.section("for_each")
        return None
    section = parent.section("for_each")
    each = Each(
        path=section.need("path", check.url_path, "write the path that answers with the list"),
        json=section.need("json", check.text, "write where the list is in the answer, such as models.*.id"),
    )
    section.done()
    return each


def _report(parent: Section, key: str) -> Report | None:
    if not parent.has(key):
        parent.section(key)
        return None
    section = parent.section(key)
    if sum(section.has(condition) for condition in CONDITIONS) > 1:
        raise ConfigError(f"{section.where} has more than one of {', '.join(CONDITIONS)}: keep one")
    report = Report(
        path=section.take("path", check.url_path, "") or None,
        json=section.take("json", check.text, "") or None,
        above=section.take("above", check.number, 0.0),
        timeout_seconds=section.take("timeout_seconds", check.seconds, 2.0),
        below=section.take("below", _maybe_number, None),
        equals=section.take("equals", check.plain, None),
        not_equals=section.take("not_equals", check.plain, None),
        metrics=section.take("metrics", check.texts, NO_COMMAND),
        command=section.take("command", check.command, NO_COMMAND),
    )
    section.done()
    return report


def _require_known_neighbours(catalog: Catalog) -> None:
    for consumer in catalog.consumers.values():
        for other in sorted(consumer.can_coexist_with - set(catalog.consumers)):
            where = f"consumers.{consumer.name}.can_coexist_with"
            raise ConfigError(f"{where} names {other!r}, which is not in consumers: remove it or add that consumer")


def _require_mutual(catalog: Catalog) -> None:
    for consumer in catalog.consumers.values():
        for other in sorted(consumer.can_coexist_with):
            where = f"consumers.{consumer.name}.can_coexist_with"
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
        if consumer.url is None:
            continue
        origin = origin_of(consumer.url)
        if origin in owners:
            raise ConfigError(
                f"consumers.{consumer.name}.url has the same origin as consumers.{owners[origin]}.url: one service is "
                "one consumer; route several kinds to it instead"
            )
        owners[origin] = consumer.name


def _require_own_cgroups(settings: Iterable[ConsumerSettings]) -> None:
    owners: dict[tuple[str, str], str] = {}
    for consumer in settings:
        for key, value in (("unit", consumer.unit), ("container", consumer.container)):
            other = owners.setdefault((key, value), consumer.name) if value is not None else consumer.name
            if other != consumer.name:
                raise ConfigError(
                    f"consumers.{consumer.name}.{key} is also consumers.{other}.{key}: whose memory it is would not be "
                    "known; tell them apart with processes"
                )


def _has_mates(catalog: Catalog, name: str) -> bool:
    others = (other for other in catalog.consumers.values() if other.name != name)
    return any(other.by_size and catalog.share_gpu(name, other.name) for other in others)


def _idle_words(scheduling: SchedulingSettings) -> Iterable[str]:
    if scheduling.quantum_seconds is not None and scheduling.mode != "evicting":
        yield (
            f"scheduling.quantum_seconds changes nothing while scheduling.mode is {scheduling.mode}: nobody is "
            "unloaded then, and the order is first come, first served"
        )


def _warnings(catalog: Catalog, settings: Mapping[str, ConsumerSettings]) -> Iterable[str]:
    for name, consumer in settings.items():
        unload = consumer.unload
        if consumer.dialect in ("http", "command") and unload.path is None and not unload.command:
            what = "path" if consumer.dialect == "http" else "command"
            yield (
                f"consumers.{name} has no unload call: once on the card it stays, and whoever may not coexist with it "
                f"is refused. Write unload: {{{what}: …}} if the service has one"
            )
        if unload.cuts_work and consumer.busy is None:
            yield (
                f"consumers.{name} has no busy report, and its unload cuts what runs: let its clients come through "
                "gpumgr only, whose calls and leases are never cut"
            )
        size, residual = min(catalog.consumers[name].vram_resident_mib), catalog.consumers[name].residual_mib
        if 0 < size <= residual:
            yield (
                f"consumers.{name}.residual_mib ({residual}) is not below its vram_resident_mib ({size}): its unload "
                "would count as proved before it gave anything back. Lower residual_mib"
            )
        if catalog.consumers[name].by_size and not _has_mates(catalog, name):
            yield (
                f"consumers.{name}.coexist is by_size, and no other consumer on its GPUs has that: it changes nothing. "
                "Write it at those that may stand beside it too"
            )
        if not catalog.kinds_of(name):
            yield f"consumers.{name} has no kind in routing: it can be leased by consumer only"
