"""One value of the file at a time: is it what its key wants, and what to write instead.

Owns: types and limits of single values, YAML's traps, and the sentence about an unknown key. Must not: know which keys
there are (load.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

from gpumgr.config.free_paths import FreePath, free_path
from gpumgr.config.predecessor import KEYS, WORDS
from gpumgr.config.settings import ConfigError
from gpumgr.core.catalog import GpuRef

T = TypeVar("T")

ALIKE = 0.75
"""How alike two keys must be for one to be a slip of the other."""

LARGEST_NUMBER = 1e12
"""Larger seconds or limits are a slip, and infinity and NaN are none."""


DAY_SECONDS = 86_400


class StrictLoader(yaml.SafeLoader):
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


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class Section:
    """One mapping of the file. Every key must be taken, or ``done`` names the one that nobody knows."""

    def __init__(self, where: str, value: object) -> None:
        if value is None and not where:
            raise ConfigError("the file is empty: config/consumers.yaml shows what belongs into it")
        if not isinstance(value, dict):
            raise ConfigError(f"{where or 'the file'} must be a mapping of keys (key: value), not {shown(value)}")
        self.where = where
        self._left: dict[str, Any] = dict(value)
        self._known: list[str] = []

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def has(self, key: str) -> bool:
        return key in self._left

    def names(self) -> list[str]:
        """The keys that nobody has taken yet."""
        return list(self._left)

    def take(self, key: str, check: Callable[[str, Any], T], default: T) -> T:
        self._known.append(key)
        return check(self.path(key), self._left.pop(key)) if key in self._left else default

    def need(self, key: str, check: Callable[[str, Any], T], remedy: str) -> T:
        self._known.append(key)
        if key not in self._left:
            for meant in self._left:
                if KEYS.get(meant, "").split(":")[0] == key or difflib.get_close_matches(meant, [key], 1, ALIKE):
                    raise ConfigError(f"{self.path(meant)} is not a known key: {self._remedy(meant)}")
            raise ConfigError(f"{self.path(key)} is missing: {remedy}")
        return check(self.path(key), self._left.pop(key))

    def section(self, key: str, completed: Callable[[str, object], object] = lambda _where, value: value) -> Section:
        """``completed``: what stands for its value instead."""
        self._known.append(key)
        value = completed(self.path(key), self._left.pop(key, None))
        return Section(self.path(key), {} if value is None else value)

    def done(self) -> None:
        for key in self._left:
            raise ConfigError(f"{self.path(key)} is not a known key: {self._remedy(key)}")

    def _remedy(self, key: str) -> str:
        if key in KEYS:
            return KEYS[key] if " " in KEYS[key].split(":")[0] else f"it is now written {KEYS[key]}"
        close = difflib.get_close_matches(key, self._known, 1, ALIKE)
        if close:
            return f"did you mean {close[0]}?"
        for word, ours in WORDS:
            if word in key.lower() and ours in self._known:
                return f"it is now part of {ours}"
        return f"here are allowed: {', '.join(sorted(self._known))}"


def shown(value: object) -> str:
    written = repr(value)
    return written if len(written) <= 60 else written[:57] + "..."


def text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} must be a text, not {shown(value)}")
    return value


def number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_NUMBER:
        raise ConfigError(f"{where} must be a finite number such as 30, without a unit, not {shown(value)}")
    return value


def seconds(where: str, value: Any) -> float:
    wanted = number(where, value)
    if wanted <= 0:
        raise ConfigError(f"{where} must be more than 0 seconds, not {shown(value)}")
    return wanted


def seconds_of_a_day(where: str, value: Any) -> float:
    """What the kernel takes as a limit of a socket, and what still ends before the calendar does."""
    wanted = seconds(where, value)
    if wanted > DAY_SECONDS:
        raise ConfigError(f"{where} must be at most {DAY_SECONDS} seconds, a day, not {shown(value)}")
    return wanted


def seconds_or_zero(where: str, value: Any) -> float:
    wanted = number(where, value)
    if wanted < 0:
        raise ConfigError(f"{where} must be 0 seconds or more, not {shown(value)}")
    return wanted


def seconds_or_auto(where: str, value: Any) -> float | None:
    """None: ``auto``. A day at most."""
    if isinstance(value, str) and value != "auto":
        raise ConfigError(f"{where} must be a number of seconds, or auto, not {shown(value)}")
    return None if value == "auto" else seconds_of_a_day(where, value)


def whole(minimum: int) -> Callable[[str, Any], int]:
    def check(where: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{where} must be a whole number of at least {minimum}, not {shown(value)}")
        return value

    return check


def one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(where: str, value: Any) -> str:
        if value not in allowed or not isinstance(value, str):
            raise ConfigError(f"{where} must be one of {', '.join(allowed)}, not {shown(value)}")
        return value

    return check


def texts(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list of texts such as [one, two], not {shown(value)}")
    return tuple(text(f"{where}[{i}]", item) for i, item in enumerate(value))


def plain(where: str, value: Any) -> str | float | bool | None:
    """What a JSON answer's value can be compared with."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return number(where, value)
    raise ConfigError(f"{where} must be a text, a number, true or false, not {shown(value)}")


def command(where: str, value: Any) -> tuple[str, ...]:
    """A list of arguments: no shell reads it."""
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise ConfigError(
            f"{where} must be a list of the program and its arguments, each a text, such as [systemctl, stop, voice]: "
            f"no shell reads it; not {shown(value)}"
        )
    if not value[0] or ("/" in value[0] and not value[0].startswith("/")):
        raise ConfigError(f"{where} must begin with a program on PATH or an absolute path, not {shown(value[0])}")
    if any("\0" in word for word in value):
        raise ConfigError(f"{where} holds a zero byte: remove it")
    return tuple(value)


def absolute_path(where: str, value: Any) -> str:
    written = text(where, value).removeprefix("unix://")
    if not written.startswith("/"):
        raise ConfigError(f"{where} must be an absolute path such as /run/podman/podman.sock, not {shown(value)}")
    return written


def gpu_refs(where: str, value: Any) -> tuple[GpuRef, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} must be a list of NVML indexes or UUIDs such as [0], not {shown(value)}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | str) or (isinstance(item, int) and item < 0):
            raise ConfigError(f"{where} holds {shown(item)}: write an NVML index (0, 1, …) or a UUID ('GPU-…')")
    if len(set(value)) != len(value):
        raise ConfigError(f"{where} names a GPU twice: remove one")
    return tuple(value)


def url_path(where: str, value: Any) -> str:
    written = text(where, value)
    if not written.startswith("/") or any(c.isspace() for c in written):
        raise ConfigError(f"{where} must be a path that begins with /, not {shown(value)}")
    return written


def free_paths(where: str, value: Any) -> tuple[FreePath, ...] | None:
    found = []
    for i, written in enumerate(texts(where, value)):
        try:
            found.append(free_path(written))
        except ValueError as error:
            raise ConfigError(f"{where}[{i}] {error}, not {shown(written)}") from None
    return tuple(found)


def url(where: str, value: Any) -> str:
    written = text(where, value)
    try:
        parts = urlsplit(written)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError as error:
        raise ConfigError(f"{where} is not a URL ({error}): write it as http://127.0.0.1:8188") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or any(c.isspace() for c in written):
        raise ConfigError(f"{where} must be a URL such as http://127.0.0.1:8188, not {shown(value)}")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(f"{where} must be scheme, host, port and path alone, without user, query or fragment")
    return written.rstrip("/")


def unit(where: str, value: Any) -> str:
    """``ollama`` is ollama.service, as systemctl has it."""
    written = text(where, value)
    if not re.fullmatch(r"[A-Za-z0-9:_.\\@-]+", written):
        raise ConfigError(f"{where} must be the name of a systemd unit such as ollama.service, not {shown(value)}")
    return written if written.endswith((".service", ".scope", ".slice")) else f"{written}.service"


def container(where: str, value: Any) -> str:
    written = text(where, value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", written):
        raise ConfigError(
            f"{where} must be the name or the id of a container, as docker ps shows it, not {shown(value)}"
        )
    return written


def bind(where: str, value: Any) -> str:
    written = text(where, value)
    host, _, port = written.rpartition(":")
    if written.startswith("unix:/"):
        return written
    if (
        not host
        or not (port.isascii() and port.isdigit())
        or not 0 <= int(port) <= 65535
        or (":" in host and not host.startswith("["))
    ):
        raise ConfigError(f"{where} must be host:port such as 127.0.0.1:8770, not {shown(value)}")
    return written
