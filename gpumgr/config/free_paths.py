"""Paths of a consumer that a caller may have without the GPU: how they are written, and which calls they are.

Owns: the syntax ``METHOD /path``, and the comparison. Must not: know a consumer, or pass anything on.

What is compared is the very path that is sent to the consumer. Servers differ in what they make of ``..``, ``//``,
``%2f``, ``%2e``, ``;`` and a backslash, so that a path with any of these is never free: it waits for the GPU like any
other, and the server may make of it what it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

WRITTEN = re.compile(r"([A-Z]+) +(/\S*)")
SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()+,=:@|-]|%[0-9A-Fa-f]{2})+")
NOT_ESCAPED = frozenset(b'/\\.%;?#*"<>') | set(range(0x20)) | set(range(0x7F, 0x100))
"""Bytes that some server may take for more than a character of a name; letters of other scripts among them, as they can
be written in ways that lenient servers decode to a slash."""


@dataclass(frozen=True, slots=True)
class FreePath:
    """``below``: whatever follows ``path``, which then ends with a slash. GET is HEAD as well."""

    method: str
    path: str
    below: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.path}{'*' if self.below else ''}"


def free_path(written: str) -> FreePath:
    """Raises: ValueError, the end of a sentence."""
    found = WRITTEN.fullmatch(written)
    if found is None:
        raise ValueError("must be a method and a path such as GET /history/*")
    method, path = found.groups()
    below = path.endswith("/*")
    plain = path[:-2] if below else path
    if method == "HEAD":
        raise ValueError("must be written with GET, which is HEAD as well")
    if "*" in plain or (not is_plain(plain or "/") and plain):
        raise ValueError(
            "must be a method and a plain path: no query, no '..', no '//', no slash at the end, and * only as "
            "the whole last segment"
        )
    return FreePath(method, path.removesuffix("*"), below)


def is_free(paths: Iterable[FreePath], method: str, path: str) -> bool:
    """Whether this call needs no turn. ``path`` is what is sent, without the url's own and without query."""
    if not is_plain(path):
        return False
    method = "GET" if method == "HEAD" else method
    return any(
        free.method == method and (path.startswith(free.path) if free.below else path == free.path) for free in paths
    )


def is_plain(path: str) -> bool:
    """Whether every server reads it alike: whole segments without ``.`` and ``..``, nothing hidden in an escape."""
    if path == "/":
        return True
    empty, *segments = path.split("/")
    return not empty and bool(segments) and all(map(_is_plain_segment, segments))


def _is_plain_segment(segment: str) -> bool:
    if not SEGMENT.fullmatch(segment):
        return False
    escaped = b"".join(unquote_to_bytes(each) for each in re.findall(r"%[0-9A-Fa-f]{2}", segment))
    return NOT_ESCAPED.isdisjoint(escaped) and bool(unquote_to_bytes(segment).strip(b" ."))
