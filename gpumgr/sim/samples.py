"""Small real files, and the reading of uploads.

Owns: a PNG, a WAV and multipart/form-data. Must not: know who asks.
"""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP

from gpumgr.sim.server import Request

WAV_RATE = 16000


@dataclass(frozen=True, slots=True)
class Part:
    """One field of a form. ``filename`` is None for a plain field."""

    name: str
    filename: str | None
    content: bytes


def form_parts(request: Request) -> dict[str, Part]:
    """The fields of a multipart form by name; empty where the body is none."""
    content_type = request.headers.get("content-type", "")
    if not content_type.startswith("multipart/form-data"):
        return {}
    head = b"Content-Type: " + content_type.encode("latin-1") + b"\r\n\r\n"
    found = {}
    for part in BytesParser(policy=HTTP).parsebytes(head + request.body).iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            found[name] = Part(name, part.get_filename(), content)
    return found


def png(width: int = 8, height: int = 8, colour: tuple[int, int, int] = (64, 128, 192)) -> bytes:
    """One plain rectangle."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + bytes(colour) * width
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")
    )


def wav(seconds: float = 0.2, hertz: float = 440.0) -> bytes:
    """A tone, 16 bit mono."""
    frames = (math.sin(2 * math.pi * hertz * n / WAV_RATE) for n in range(int(WAV_RATE * seconds)))
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(WAV_RATE)
        out.writeframes(b"".join(struct.pack("<h", int(8000 * frame)) for frame in frames))
    return file.getvalue()
