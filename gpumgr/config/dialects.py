"""Which keys of a consumer belong to which dialect, and what each of them must have.

Owns: the names of the dialects, and every rule between a dialect and the keys beside it. Must not: know how a dialect
speaks (adapters/dialects).
"""

from __future__ import annotations

from gpumgr.config.settings import Call, ConfigError, ConsumerSettings, Report
from gpumgr.core.catalog import NO_BACKEND, Consumer

DIALECTS = ("comfyui", "ollama", "http", "llama_server", "vllm", "systemd", "docker", "command", NO_BACKEND)
WITHOUT_URL = frozenset({"systemd", "docker", "command", NO_BACKEND})
"""They may do without: what starts and stops them is not their own server."""
OWN_UNLOAD = frozenset({"comfyui", "ollama", "llama_server", "vllm", "systemd", "docker"})
"""They know how to unload; the file may say how long it may take, and not more."""
STARTERS = frozenset({"systemd", "docker"})
"""Loading starts the service, and the dialect knows how."""
RESIDUAL_MIB = {"vllm": 1536}
"""Where it is not the usual one: some 1 GB stays in each process that sleeps (docs/features/sleep_mode.md)."""


def require_fitting(settings: ConsumerSettings, consumer: Consumer) -> None:
    """Raises: ConfigError for a key that its dialect would ignore, and for one that it cannot do without."""
    _require_no_url(settings, consumer)
    _require_own_keys(settings)
    _require_whole_calls(settings)
    _require_whole_reports(settings)
    if settings.dialect == NO_BACKEND and consumer.max_concurrency > 1:
        raise ConfigError(
            f"consumers.{settings.name}.max_concurrency must be 1 with dialect none: each of its holders brings memory "
            "of its own; name a consumer for each job that may run beside another"
        )


def _require_no_url(settings: ConsumerSettings, consumer: Consumer) -> None:
    where = f"consumers.{settings.name}"
    if settings.dialect == NO_BACKEND:
        calls = (settings.health.path or settings.unload.path, settings.load, settings.busy, settings.loaded)
        timeouts = (settings.health.timeout_seconds, settings.unload.timeout_seconds)
        if settings.url or consumer.public_url or settings.proxy_path or settings.headers or any((*calls, *timeouts)):
            raise ConfigError(
                f"{where} has dialect none, which asks and unloads nobody: remove url, public_url, proxy_path, headers "
                "and its calls, or choose another dialect"
            )
    elif settings.url is None:
        named = {
            "public_url": consumer.public_url,
            "proxy_path": settings.proxy_path,
            "headers": settings.headers,
            "health.path": settings.health.path,
            "unload.path": settings.unload.path,
            "load.path": settings.load and settings.load.path,
            "busy.path": settings.busy and settings.busy.path,
            "loaded.path": settings.loaded and settings.loaded.path,
        }
        for key, value in named.items():
            if value:
                raise ConfigError(f"{where}.{key} needs the address it belongs to: write {where}.url")


def _require_own_keys(settings: ConsumerSettings) -> None:
    where, dialect = f"consumers.{settings.name}", settings.dialect
    if settings.scope != "system" and dialect != "systemd":
        raise ConfigError(f"{where}.scope belongs to dialect systemd: remove it")
    if settings.socket is not None and dialect != "docker":
        raise ConfigError(f"{where}.socket belongs to dialect docker: remove it")
    if dialect == "systemd" and (settings.unit is None or not settings.unit.endswith(".service")):
        raise ConfigError(f"{where}.unit is missing: write the service to stop and start, such as ollama.service")
    if dialect == "docker" and settings.container is None:
        raise ConfigError(f"{where}.container is missing: write the container to stop and start, as docker ps shows it")
    calls = {"health": settings.health, "unload": settings.unload, "load": settings.load}
    reports = {"busy": settings.busy, "loaded": settings.loaded}
    for key, call in calls.items():
        _require_own_call(f"{where}.{key}", key, call, dialect)
    for key, report in reports.items():
        if report is not None and report.command and dialect != "command":
            raise ConfigError(f"{where}.{key}.command belongs to dialect command: remove it, or choose that dialect")


def _require_own_call(where: str, key: str, call: Call | None, dialect: str) -> None:
    if call is None:
        return
    if call.command and dialect != "command":
        raise ConfigError(f"{where}.command belongs to dialect command: remove it, or choose that dialect")
    if call.starts_service and (key != "load" or dialect != "command"):
        raise ConfigError(f"{where}.starts_service belongs to the load of dialect command: remove it")
    if (call.for_each is not None or call.cuts_work) and key != "unload":
        raise ConfigError(f"{where}.{'cuts_work' if call.cuts_work else 'for_each'} belongs to unload: remove it")
    if dialect in STARTERS and key != "health" and call.path is not None:
        raise ConfigError(f"{where}.path: dialect {dialect} stops and starts by itself: remove all but timeout_seconds")


def _require_whole_calls(settings: ConsumerSettings) -> None:
    """A call without a path would be ignored: only a dialect that has its own path may do without."""
    where = f"consumers.{settings.name}"
    dialect = settings.dialect
    for key, call in (("health", settings.health), ("unload", settings.unload), ("load", settings.load)):
        if call is None:
            continue
        if call.command:
            if call.path is not None or call.method is not None or call.json is not None or call.for_each is not None:
                raise ConfigError(f"{where}.{key} has a command and an HTTP call: remove one of them")
            continue
        if call.path is not None:
            continue
        what = "command" if dialect == "command" else "path"
        if call.method is not None or call.json is not None or call.for_each is not None:
            raise ConfigError(f"{where}.{key} has a method, json or for_each without a path: write its path")
        if (key == "load" and dialect not in STARTERS) or (
            key == "unload" and dialect not in OWN_UNLOAD and call.timeout_seconds is not None
        ):
            raise ConfigError(f"{where}.{key}.{what} is missing: write the {what} to call")
    if settings.health.method not in (None, "GET") or settings.health.json is not None:
        raise ConfigError(f"{where}.health is asked with GET and no body: remove method and json")


def _require_whole_reports(settings: ConsumerSettings) -> None:
    for key, report in (("busy", settings.busy), ("loaded", settings.loaded)):
        if report is not None:
            _require_whole_report(f"consumers.{settings.name}.{key}", report)


def _require_whole_report(where: str, report: Report) -> None:
    conditions = [report.below, report.equals, report.not_equals]
    if report.command:
        conditioned = report.above != 0 or any(given is not None for given in conditions)
        if report.path or report.json or report.metrics or conditioned:
            raise ConfigError(f"{where} has a command, whose exit code is the answer: remove the other keys")
        return
    if report.path is None:
        raise ConfigError(f"{where}.path is missing: write the path to ask")
    if report.json is None and not report.metrics:
        raise ConfigError(f"{where}.json is missing: write which field of the answer tells it, such as running")
    if report.json is not None and report.metrics:
        raise ConfigError(f"{where} has json and metrics: remove one of them")
    if report.metrics and (report.equals is not None or report.not_equals is not None):
        raise ConfigError(f"{where} compares metrics, which are numbers: write above or below")
