"""Who may call what: a request's Host, its Origin and its bearer, decided before anything else looks at it.

Owns: the four questions below, in this order. Must not: read a body, look anything up (DNS), or keep a secret.

    1. Host     a name that may be this broker's, else 421: a page whose name was rebound to our address has another one
    2. origin   on our own routes no unsafe method for another site's page; on proxy routes none of the POSTs that a
                browser sends without asking first, else 403
    3. bearer   one of the tokens, else 401
    4. scope    enough for the route, else 403
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flask import Flask, Response, request

from gpumgr.config import ServerSettings, Token
from gpumgr.config.access import DEFAULT_PORTS, HOST, origin
from gpumgr.errors import Forbidden, GpumgrError, HostNotAllowed, Unauthorized
from gpumgr.web.problems import respond

BEARER = "gpumgr.bearer"
"""Where a request's environment holds its Bearer."""
FREE = frozenset({"status.healthz", "status.readyz"})
PAGE = "status.status"
BUTTON = "holds.press"
PROXY = "proxy"
OPERATES = frozenset({"leases.revoke", "holds.hold", "holds.resume", BUTTON})
SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""RFC 9110 section 9.2.1."""
SIMPLE_TYPES = frozenset({"", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"})
"""What a browser sends to another origin without asking it first (Fetch, "CORS-safelisted request-header")."""
AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:]+))(?::(?P<port>[0-9]{0,5}))?")
ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)")
LONGEST_SHOWN = 64
CHALLENGES = ('Bearer realm="gpumgr"', 'Basic realm="gpumgr"')

Environ = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bearer:
    """Who calls. ``name`` is None where everyone may; ``sees_tokens``: those of leases, in status."""

    name: str | None = None
    operates: bool = True
    sees_tokens: bool = True


def bearer_of(environ: Environ) -> Bearer:
    """Of a request that was let in."""
    found = environ[BEARER]
    if not isinstance(found, Bearer):
        raise TypeError("nobody asked who calls")
    return found


def register(app: Flask, server: ServerSettings) -> None:
    """Asked before every route, and before a 404 and a 405 as well."""
    access = Access(server, own_names(socket.gethostname()))

    @app.before_request
    def let_in() -> Response | None:
        try:
            request.environ[BEARER] = access.admitted(request.environ, request.endpoint)
        except GpumgrError as error:
            return _refusal(error)
        finally:
            if access.asks:  # it is ours: not the consumer's, nor any log's
                request.environ.pop("HTTP_AUTHORIZATION", None)
        return None


def _refusal(error: GpumgrError) -> Response:
    response = respond(error)
    if isinstance(error, Unauthorized):
        for challenge in CHALLENGES[: 2 if _may_be_basic(request.environ, request.endpoint) else 1]:
            response.headers.add("WWW-Authenticate", challenge)
    return response


def own_names(hostname: str) -> frozenset[str]:
    """As it is, and as multicast DNS has it."""
    name = hostname.lower()
    return frozenset({name, name.partition(".")[0] + ".local"})


class Access:
    def __init__(self, server: ServerSettings, names: frozenset[str]) -> None:
        self.asks = server.auth == "bearer"
        self._tokens = server.tokens
        self._hosts = server.allowed_hosts | names
        self._origins = server.allowed_origins

    def admitted(self, environ: Environ, endpoint: str | None) -> Bearer:
        """Raises: HostNotAllowed, Forbidden, Unauthorized."""
        for authority in _authorities(environ):  # 1
            self._require_host(authority)
        self._require_no_foreign_page(environ, endpoint)  # 2
        if not self.asks or endpoint in FREE:
            return Bearer()
        bearer = self._bearer(environ, endpoint)  # 3
        if endpoint in OPERATES and not bearer.operates:  # 4
            raise Forbidden("this needs a token of the scope operate, and yours has use", scope="operate")
        return bearer

    # -- 1: Host --------------------------------------------------------------------------------------------

    def _require_host(self, authority: str) -> None:
        parts = AUTHORITY.fullmatch(authority)
        if parts is None or not self._is_ours(parts["v6"], parts["name"]):
            shown = authority[:LONGEST_SHOWN]
            raise HostNotAllowed(
                f"the name {shown!r} in Host is not this broker's: where it is, add it to server.allowed_hosts",
                host=shown,
            )

    def _is_ours(self, v6: str | None, name: str | None) -> bool:
        """A name without a dot is no site's; an address cannot be rebound."""
        if name is None:
            return _is_address(v6 or "")
        name = name.lower().removesuffix(".")
        if _is_address(name):
            return True
        return bool(HOST.fullmatch(name)) and ("." not in name or name in self._hosts or name.endswith(".localhost"))

    # -- 2: origin ------------------------------------------------------------------------------------------

    def _require_no_foreign_page(self, environ: Environ, endpoint: str | None) -> None:
        said = environ.get("HTTP_ORIGIN")
        method = environ["REQUEST_METHOD"]
        if self._is_known(said, environ.get("HTTP_HOST", "")):
            return
        if endpoint == PROXY:
            refused = said is not None and method == "POST" and _type(environ) in SIMPLE_TYPES
        else:
            from_elsewhere = said is not None or environ.get("HTTP_SEC_FETCH_SITE", "").strip().lower() == "cross-site"
            refused = method not in SAFE and from_elsewhere
        if refused:
            shown = None if said is None else said[:LONGEST_SHOWN]
            raise Forbidden(
                "a page of another site may not do this with its reader's rights: where it may, add its origin to "
                "server.allowed_origins",
                origin=shown,
            )

    def _is_known(self, said: str | None, host: str) -> bool:
        found = None if said is None else origin(said)
        return found is not None and (found in self._origins or _is_same(found, host))

    # -- 3: bearer ------------------------------------------------------------------------------------------

    def _bearer(self, environ: Environ, endpoint: str | None) -> Bearer:
        scheme, _, credentials = environ.get("HTTP_AUTHORIZATION", "").strip().partition(" ")
        basic = scheme.lower() == "basic" and _may_be_basic(environ, endpoint)
        if scheme.lower() != "bearer" and not basic:
            raise Unauthorized("say who you are: Authorization: Bearer SECRET, one of the tokens of this broker")
        secret = _password(credentials) if basic else credentials.strip()
        token = match(self._tokens, secret)
        if token is None:
            raise Unauthorized("no token of this broker has this secret: look for a slip, or ask its operator")
        operates = token.scope == "operate"
        # A browser sends a password by itself, also for a page that a consumer serves behind a proxy route.
        return Bearer(token.name, operates, sees_tokens=operates and not basic)


def match(tokens: Iterable[Token], secret: str) -> Token | None:
    """In the same time whichever it is, or none: digests are compared, and all of them."""
    digest = hashlib.sha256(secret.encode("latin-1", "replace")).digest()
    found = None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token
    return found


def _password(credentials: str) -> str:
    """RFC 7617: base64 of ``name:password``; the name is whatever the browser was told."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("latin-1").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _may_be_basic(environ: Environ, endpoint: str | None) -> bool:
    """The page, and its button: whose origin was looked at before."""
    return endpoint == BUTTON or (endpoint == PAGE and environ["REQUEST_METHOD"] in ("GET", "HEAD"))


def _authorities(environ: Environ) -> list[str]:
    """What the request says its server is: Host, unless it has none or an empty one (HTTP/1.0), and the target's."""
    absolute = ABSOLUTE.match(environ.get("RAW_URI", ""))
    said = [environ.get("HTTP_HOST", ""), absolute[2] if absolute else ""]
    return [authority for authority in said if authority]


@lru_cache(maxsize=64)  # the same few names in each request
def _is_address(written: str) -> bool:
    try:
        ipaddress.ip_address(written)
    except ValueError:
        return False
    return True


def _is_same(found: tuple[str, str, int], host: str) -> bool:
    """Without the scheme: TLS may end before us, and Host then has no port, or the other scheme's."""
    scheme, name, port = found
    parts = AUTHORITY.fullmatch(host)
    if parts is None:
        return False
    here = (parts["v6"] or parts["name"]).lower()
    return (name, port) == (here, int(parts["port"] or DEFAULT_PORTS[scheme]))


def _type(environ: Environ) -> str:
    return str(environ.get("CONTENT_TYPE", "")).partition(";")[0].strip().lower()
