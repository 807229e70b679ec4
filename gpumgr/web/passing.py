"""What of a request and of an answer is passed on, and as what.

Owns: targets, headers, and the headers that are meant for gpumgr. Must not: send anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from gpumgr.adapters.upstream import Head, Header, Upstream
from gpumgr.config.free_paths import is_free
from gpumgr.core.queue import Priority
from gpumgr.errors import InvalidRequest, NotFound
from gpumgr.web import body

LEASE, WAIT, PRIORITY = "X-GPU-Lease", "X-GPU-Wait", "X-GPU-Priority"
HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"}
    | {"te", "trailer", "transfer-encoding", "upgrade"}
)
"""RFC 9110 section 7.6.1, and what older clients send."""
OURS = frozenset({"host", "content-length", "expect", LEASE.lower(), WAIT.lower(), PRIORITY.lower()})
"""Written anew, or answered by gunicorn (100-continue), or for gpumgr."""
GUNICORNS = frozenset({"content-length", "date", "server"})
"""gunicorn 23 writes its own Date and Server, and drops others' (http/wsgi.py and util.py)."""

OVERRIDES = ("HTTP_X_HTTP_METHOD_OVERRIDE", "HTTP_X_HTTP_METHOD", "HTTP_X_METHOD_OVERRIDE")
"""Some servers take these for the method."""
SECONDS = re.compile(r"(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
ABSOLUTE = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
NOT_IN_A_TARGET = re.compile(r"[\x00-\x20\x7f]")
Environ = Mapping[str, Any]


def wait_seconds(environ: Environ) -> float | None:
    """Raises: InvalidRequest."""
    said = environ.get("HTTP_X_GPU_WAIT")
    if said is None:
        return None
    wanted = float(said) if SECONDS.fullmatch(said) else math.inf
    if not math.isfinite(wanted):
        raise InvalidRequest(f"{WAIT} must be a finite number of seconds, 0 or more", field=WAIT)
    return wanted


def priority(environ: Environ) -> Priority | None:
    """Raises: InvalidRequest."""
    said = environ.get("HTTP_X_GPU_PRIORITY")
    return None if said is None else body.priority(said, PRIORITY)


def target(environ: Environ, kind: str, upstream: Upstream) -> str:
    """The path and query to ask the consumer for, byte by byte as the caller wrote them.

    Raises: InvalidRequest; NotFound where the kind alone is called and its consumer has no path for that.
    """
    path, mark, query = _raw(environ).partition("#")[0].partition("?")
    prefix, slash, rest = _behind_kind(path, kind)
    if not prefix:
        raise NotFound("the path must begin with /v1/KIND, its slashes written as slashes")
    if upstream.prefix and _leaves(rest):
        raise InvalidRequest(f"the path leaves {upstream.prefix} of {upstream.consumer}'s url with its '..' segments")
    if slash:
        return f"{upstream.prefix}/{rest}{mark}{query}"
    if upstream.proxy_path is None:
        raise NotFound(
            f"/v1/{kind} alone leads nowhere: call /v1/{kind}/PATH with a path of {upstream.consumer}'s own, or "
            f"configure consumers.{upstream.consumer}.proxy_path"
        )
    joint = "&" if mark and "?" in upstream.proxy_path else mark
    return f"{upstream.prefix}{upstream.proxy_path}{joint}{query}"


def path_of(target: str, upstream: Upstream) -> str:
    """Of what is sent, without the url's own path and without query."""
    return target.partition("?")[0].removeprefix(upstream.prefix)


def needs_no_turn(environ: Environ, target: str, upstream: Upstream) -> bool:
    """Whether this call is one that its consumer answers without the GPU."""
    if any(name in environ for name in OVERRIDES):
        return False
    return is_free(upstream.free_paths, environ["REQUEST_METHOD"], path_of(target, upstream))


def _leaves(rest: str) -> bool:
    """Whether some server would read it as a path above where it starts: the url's own path says what callers may have
    of a server that serves more."""
    depth = 0
    for segment in re.split(rb"[/\\]", unquote_to_bytes(rest)):
        depth += -1 if segment.partition(b";")[0] == b".." else segment not in (b"", b".")
        if depth < 0:
            return True
    return False


def _raw(environ: Environ) -> str:
    """The request's target without scheme, host and mount point; Latin-1 for its bytes."""
    raw = environ.get("RAW_URI")
    if raw is None:
        query = environ.get("QUERY_STRING", "")
        return quote(environ["PATH_INFO"].encode("latin-1"), safe="/:@!$&'()*+,;=~") + (f"?{query}" if query else "")
    if NOT_IN_A_TARGET.search(raw):
        raise InvalidRequest("the path holds a control character or a space")
    return str(ABSOLUTE.sub("", raw).removeprefix(environ.get("SCRIPT_NAME", "")))


def _behind_kind(path: str, kind: str) -> tuple[str, str, str]:
    """``/v1/KIND``, a slash, and what follows it. The first is empty where an escaped slash hides where it ends."""
    empty, *segments = path.split("/", 3)
    if empty or [unquote_to_bytes(segment) for segment in segments[:2]] != [b"v1", kind.encode()]:
        return "", "", ""
    return "/v1/" + kind, "/" if len(segments) == 3 else "", "".join(segments[2:])


def request_headers(
    environ: Environ, upstream: Upstream, length: str | None, *, plain_answer: bool = False
) -> list[Header]:
    """``plain_answer``: one that is read here, and so must not be compressed.

    gunicorn has joined headers of the same name, and forgotten how their names were written.

    Those of the configuration replace the caller's: whoever may call need not know the consumer's key. An answer to
    TRACE would tell it (RFC 9110 section 9.3.8).
    """
    own = () if environ["REQUEST_METHOD"] == "TRACE" else upstream.headers
    replaced = {name.lower() for name, _ in own}
    unwanted = HOP_BY_HOP | OURS | upstream.strips | replaced | _listed(environ.get("HTTP_CONNECTION", ""))
    named = ((key[5:].replace("_", "-").title(), value) for key, value in environ.items() if key.startswith("HTTP_"))
    unwanted |= {"accept-encoding"} if plain_answer else set()
    headers = [(name, value) for name, value in named if name.lower() not in unwanted]
    headers += own
    if environ.get("CONTENT_TYPE") and "content-type" not in replaced:
        headers.append(("Content-Type", environ["CONTENT_TYPE"]))
    if length is not None:
        headers.append(("Content-Length", length))
    return headers


def answer_headers(head: Head) -> list[Header]:
    """Each as often as it came, in its order."""
    connection = (value for name, value in head.headers if name.lower() == "connection")
    unwanted = HOP_BY_HOP | GUNICORNS | _listed(",".join(connection))
    headers = [(name, value) for name, value in head.headers if name.lower() not in unwanted]
    return headers if head.length is None else [*headers, ("Content-Length", str(head.length))]


def _listed(connection: str) -> frozenset[str]:
    """The headers that a Connection header declares to be for this hop alone."""
    return frozenset(name.strip().lower() for name in connection.split(","))
