"""Who may call, and what consumers are told of us: tokens, names, origins and headers, one value at a time.

Owns: how a token is written, and where it may lie. Must not: keep a secret of ours, or show one in a sentence.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpumgr.config.settings import ConfigError, ServerSettings, Token
from gpumgr.config.values import Section, shown, texts

TOKENS_VARIABLE = "GPUMGR_TOKENS"
SCOPES = ("use", "operate")
SHORTEST_SECRET = 16
LARGEST_FILE_BYTES = 2**20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
SECRET = re.compile(r"[\x21-\x2b\x2d-\x7e]+")
"""Visible, and no comma: it ends a token in the environment, and joins two headers into one."""
HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[\x21-\x7e]([\t\x20-\x7e]*[\x21-\x7e])?")
NOT_A_CONSUMERS = frozenset(
    {"host", "content-length", "connection", "keep-alive", "proxy-authenticate", "proxy-authorization"}
    | {
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
        "x-gpu-lease",
        "x-gpu-wait",
        "x-gpu-priority",
    }
)
"""Headers of the connection itself, and those meant for gpumgr."""
DEFAULT_PORTS = {"http": 80, "https": 443}


# -- who may listen -----------------------------------------------------------------------------------------


def require_private(server: ServerSettings, bind: str, where: str) -> None:
    """Without tokens whoever reaches the address may use and end everything. Raises: ConfigError."""
    if server.auth == "off" and not server.trusted_network and not is_loopback(bind):
        raise ConfigError(
            f"{where} {bind} can be reached from other machines, and server.auth is off: write server.auth: bearer, "
            "bind to 127.0.0.1, or write server.trusted_network: true where whoever reaches it may use and end every "
            "lease"
        )


def is_loopback(bind: str) -> bool:
    host = bind.rpartition(":")[0].strip("[]").lower()
    if bind.startswith("unix:") or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


# -- tokens -------------------------------------------------------------------------------------------------


def tokens_in(where: str, written: Iterable[str]) -> tuple[Token, ...]:
    """Each ``name:scope:secret``. Raises: ConfigError, which tells a token by its place or its name."""
    return tuple(_token(f"{where}: token {place}", each) for place, each in enumerate(written, 1))


def environment_tokens(environ: Mapping[str, str]) -> tuple[Token, ...]:
    """Those of GPUMGR_TOKENS, separated by commas or white space. Raises: ConfigError."""
    return tokens_in(TOKENS_VARIABLE, environ.get(TOKENS_VARIABLE, "").replace(",", " ").split())


def file_tokens(file: Path) -> tuple[Token, ...]:
    """One a line; what begins with # is a comment. Raises: ConfigError."""
    where = f"server.tokens_file {file}"
    lines = (line.strip() for line in _private_text(where, file).splitlines())
    return tokens_in(where, [line for line in lines if line and not line.startswith("#")])


def _private_text(where: str, file: Path) -> str:
    """The opened file itself is looked at, so that none can take its place; a pipe must not be waited for."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _require_private_file(where, os.fstat(fd))
            with open(fd, encoding="utf-8", closefd=False) as opened:
                return opened.read(LARGEST_FILE_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}): is its path right, and is it ours?") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8 text: write one name:scope:secret a line") from None


def _require_private_file(where: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{where} must be a regular file: name one")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{where} belongs to another user: chown it to the user that runs gpumgr, or to root")
    if stat.S_IMODE(found.st_mode) & ~0o600:
        raise ConfigError(f"{where} may be read by others: chmod 600 it, and change the secrets where others had it")


def _token(where: str, written: str) -> Token:
    name, _, rest = written.partition(":")
    scope, _, secret = rest.partition(":")
    if not NAME.fullmatch(name) or not rest:
        raise ConfigError(f"{where} must be name:scope:secret, its name of letters, digits, _, . or -")
    if scope not in SCOPES:
        raise ConfigError(f"{where} ({name}) must have one of the scopes {', '.join(SCOPES)}: name:scope:secret")
    if len(secret) < SHORTEST_SECRET:
        raise ConfigError(
            f"{where} ({name}) has a secret of less than {SHORTEST_SECRET} characters: make one with "
            "python3 -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    if not SECRET.fullmatch(secret):
        raise ConfigError(f"{where} ({name}) has a secret with a space, a comma or what is not ASCII: make another")
    return Token(name, scope, hashlib.sha256(secret.encode()).digest())


def require_tokens(auth: str, tokens: tuple[Token, ...]) -> None:
    """Raises: ConfigError where there are none for bearer, or some that nobody would ask for."""
    if auth == "off" and tokens:
        raise ConfigError(
            f"server.auth is off, but there are tokens ({TOKENS_VARIABLE} or server.tokens_file): write server.auth: "
            "bearer, or remove them"
        )
    if auth == "bearer" and not tokens:
        raise ConfigError(
            f"server.auth is bearer, but there is no token: put name:scope:secret into {TOKENS_VARIABLE} or a file "
            "named by server.tokens_file"
        )
    for token in tokens:
        if sum(other.name == token.name for other in tokens) > 1:
            raise ConfigError(f"two tokens are named {token.name}: rename one, as events tell who revoked a lease")
        if sum(other.digest == token.digest for other in tokens) > 1:
            raise ConfigError(f"the token {token.name} has the secret of another one: make one for each")


# -- single values ------------------------------------------------------------------------------------------


def auth(where: str, value: Any) -> str:
    """YAML 1.1 reads a bare off as False."""
    written = "off" if value is False else value
    if written not in ("off", "bearer") or not isinstance(written, str):
        raise ConfigError(f"{where} must be one of off, bearer, not {shown(value)}")
    return written


def truth(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, not {shown(value)}")
    return value


def hosts(where: str, value: Any) -> frozenset[str]:
    names = [name.lower().rstrip(".") for name in texts(where, value)]
    for name in names:
        if not HOST.fullmatch(name):
            raise ConfigError(
                f"{where} holds {shown(name)}: write whole names such as gpu.home.example, without port or *"
            )
    return frozenset(names)


def origins(where: str, value: Any) -> frozenset[tuple[str, str, int]]:
    return frozenset(_known_origin(where, written) for written in texts(where, value))


def _known_origin(where: str, written: str) -> tuple[str, str, int]:
    found = origin(written)
    if found is None:
        raise ConfigError(f"{where} holds {shown(written)}: write scheme, host and port, as https://page.example:8443")
    return found


def origin(written: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an Origin as browsers write it; None where it is none, as ``null``."""
    try:
        parts = urlsplit(written)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc:
        return None
    if parts.path or parts.query or parts.fragment or any(c.isspace() or c in "?#\\,*" for c in written):
        return None
    return parts.scheme, parts.hostname, DEFAULT_PORTS[parts.scheme] if port is None else port


# -- what a consumer is told --------------------------------------------------------------------------------


class Headers:
    """A check: name to value, with ``${NAME}`` from the environment."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def __call__(self, where: str, value: Any) -> tuple[tuple[str, str], ...]:
        section = Section(where, value)
        headers = [(name, section.need(name, self._value, "")) for name in section.names()]
        for name, _ in headers:
            if not HEADER_NAME.fullmatch(name) or name.lower() in NOT_A_CONSUMERS:
                raise ConfigError(f"{where} names {shown(name)}, which is no header that can be set here: remove it")
            if sum(other.lower() == name.lower() for other, _ in headers) > 1:
                raise ConfigError(f"{where}.{name} stands twice, as names are the same in small letters: remove one")
        return tuple(headers)

    def _value(self, where: str, value: Any) -> str:
        if not isinstance(value, str):
            raise ConfigError(f"{where} must be a text: write it in quotes")
        for name in VARIABLE.findall(value):
            if name not in self._environ:
                raise ConfigError(f"{where} needs the environment variable {name}, which is not set: set it")
        said = VARIABLE.sub(lambda found: self._environ[found.group(1)], value)
        if not HEADER_VALUE.fullmatch(said):
            raise ConfigError(
                f"{where} must be visible ASCII in one line, without spaces around it; look at its variables too"
            )
        return said
