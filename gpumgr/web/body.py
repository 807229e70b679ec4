"""A request's words: read with a limit, parsed strictly, or one InvalidRequest that names the field.

Owns: what a lease body may look like. Must not: know limits of time (the broker clamps) or who exists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from flask import Request

from gpumgr.core.lease import RequestKey
from gpumgr.core.queue import Priority
from gpumgr.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from gpumgr.runtime.ticket import Ask
from gpumgr.web.access import bearer_of
from gpumgr.web.upload import read_within

LARGEST_BODY_BYTES = 64 * 1024
LONGEST_LABEL = 128
LARGEST_DROPPED_BYTES = 2**20
BODY_SECONDS = 5.0
"""A whole body takes no longer: one that stands still or trickles would hold a thread, and renew has only the reserved
ones."""
ACQUIRE_FIELDS = (
    "kind",
    "consumer",
    "ttl_seconds",
    "wait_seconds",
    "holder",
    "request_id",
    "holder_pid",
    "priority",
    "resume_of",
)
LARGEST_PID = 2**22
"""Linux gives none above (proc_sys_kernel(5), pid_max)."""
RENEW_FIELDS = ("ttl_seconds",)
HOLD_FIELDS = ("reason", "ttl_seconds")
FORM_FIELDS = ("action", *HOLD_FIELDS)


def acquire_ask(request: Request) -> Ask:
    """Raises: InvalidRequest, PayloadTooLarge, UnsupportedMediaType."""
    fields = _object(request, ACQUIRE_FIELDS)
    kind, consumer = _label(fields, "kind"), _label(fields, "consumer")
    if (kind is None) == (consumer is None):
        raise InvalidRequest("give exactly one of kind and consumer")
    holder = _label(fields, "holder")
    request_id = _label(fields, "request_id")
    if request_id == "":
        raise InvalidRequest("request_id must not be empty: use a random UUID", field="request_id")
    resume_of = _label(fields, "resume_of")
    if resume_of == "":
        raise InvalidRequest("resume_of must be the lease_id of a lease that was released", field="resume_of")
    bearer = bearer_of(request.environ).name
    return Ask(
        kind=kind,
        consumer=consumer,
        ttl_seconds=_seconds(fields, "ttl_seconds", least_exclusive=True),
        wait_seconds=_seconds(fields, "wait_seconds", least_exclusive=False),
        holder=holder,
        holder_pid=_pid(fields, "holder_pid"),
        resume_of=resume_of,
        priority=None if "priority" not in fields else priority(fields["priority"], "priority"),
        request=RequestKey(bearer, holder, request_id) if request_id is not None else None,
        bearer=bearer,
    )


def hold_words(request: Request) -> tuple[str | None, float | None]:
    """``reason`` and ``ttl_seconds`` of a hold, whose body may be empty. Raises: as ``acquire_ask``."""
    raw = _raw(request)
    if not raw.strip():
        return None, None
    fields = _parsed(request, raw, HOLD_FIELDS)
    return _label(fields, "reason"), _seconds(fields, "ttl_seconds", least_exclusive=True)


def pressed(request: Request) -> tuple[str | None, str | None, float | None]:
    """``action``, ``reason`` and ``ttl_seconds`` of the page's form. Raises: InvalidRequest, PayloadTooLarge."""
    try:
        pairs = parse_qsl(_raw(request).decode("ascii"), keep_blank_values=True, max_num_fields=len(FORM_FIELDS))
    except ValueError:
        raise InvalidRequest("the form cannot be read") from None
    fields: dict[str, Any] = {name: value for name, value in pairs if value}
    for name in fields:
        if name not in FORM_FIELDS:
            raise InvalidRequest(f"unknown field {name[:64]!r}; allowed are {', '.join(FORM_FIELDS)}", field=name[:64])
    try:
        if "ttl_seconds" in fields:
            fields["ttl_seconds"] = float(fields["ttl_seconds"])
    except ValueError:
        raise InvalidRequest("ttl_seconds must be a number of seconds", field="ttl_seconds") from None
    seconds = _seconds(fields, "ttl_seconds", least_exclusive=True)
    return _label(fields, "action"), _label(fields, "reason"), seconds


def withdrawn_request(request: Request) -> RequestKey:
    """``DELETE /v1/lease?request_id=…&holder=…``. Raises: InvalidRequest."""
    unknown = set(request.args) - {"request_id", "holder"}
    if unknown or any(len(values) > 1 for _, values in request.args.lists()):
        raise InvalidRequest("give request_id, and holder where the request had one, each once and nothing else")
    request_id, holder = _label(request.args, "request_id"), _label(request.args, "holder")
    if not request_id:
        raise InvalidRequest("request_id is missing: DELETE /v1/lease?request_id=…, or /v1/lease/{token}")
    return RequestKey(bearer_of(request.environ).name, holder, request_id)


def renew_ttl(request: Request) -> float | None:
    """``ttl_seconds`` of a renew, whose body may be empty. Raises: as ``acquire_ask``."""
    raw = _raw(request)
    if not raw.strip():
        return None
    return _seconds(_parsed(request, raw, RENEW_FIELDS), "ttl_seconds", least_exclusive=True)


def reason(request: Request) -> str | None:
    """Why a lease is revoked, as the query has it. Raises: InvalidRequest."""
    for name in request.args:
        if name != "reason":
            raise InvalidRequest(f"unknown query parameter {name[:64]!r}; allowed is reason", field=name[:64])
    return _label(request.args, "reason")


def _object(request: Request, allowed: tuple[str, ...]) -> Mapping[str, Any]:
    return _parsed(request, _raw(request), allowed)


def _raw(request: Request) -> bytes:
    """The body, refused as soon as it is known to be too large, whatever its headers claim."""
    announced = request.content_length or 0
    if announced > LARGEST_DROPPED_BYTES:
        raise _too_large()
    # One that is a little too large is read to its end, else the caller may see a reset instead of the answer.
    raw = read_within(request, BODY_SECONDS, max(announced, LARGEST_BODY_BYTES + 1))
    if len(raw) > LARGEST_BODY_BYTES:
        raise _too_large()
    return raw


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"a lease body is at most {LARGEST_BODY_BYTES} bytes", limit_bytes=LARGEST_BODY_BYTES)


def _parsed(request: Request, raw: bytes, allowed: tuple[str, ...]) -> Mapping[str, Any]:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(
            f"the body must be sent as Content-Type: application/json, not {request.mimetype or 'without a type'}"
        )
    try:
        body = json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, _FieldError):
            raise InvalidRequest(str(error)) from None
        if not raw.strip():
            raise InvalidRequest("the body is empty: send a JSON object") from None
        where = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"the body is not valid JSON{where}") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    for key in body:
        if key not in allowed:
            raise InvalidRequest(f"unknown field {key[:64]!r}; allowed are {', '.join(allowed)}", field=key[:64])
    return body


class _FieldError(ValueError):
    pass


def _no_constant(name: str) -> float:
    raise _FieldError(f"{name} is no number JSON knows")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _FieldError("the body names a field twice")
    return fields


def _label(fields: Mapping[str, Any], name: str) -> str | None:
    if name not in fields:
        return None
    value = fields[name]
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a text", field=name)
    if len(value) > LONGEST_LABEL:
        raise InvalidRequest(f"{name} must have at most {LONGEST_LABEL} characters", field=name)
    if any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise InvalidRequest(f"{name} holds half a character (a lone surrogate)", field=name)
    return value


def _pid(fields: Mapping[str, Any], name: str) -> int | None:
    if name not in fields:
        return None
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST_PID:
        raise InvalidRequest(
            f"{name} must be the pid of the holder's own process: a whole number above 0. Leave it out in a container",
            field=name,
        )
    return value


def priority(value: object, name: str) -> Priority:
    """Raises: InvalidRequest."""
    try:
        return Priority(str(value))
    except ValueError:
        raise InvalidRequest(f"{name} must be one of {', '.join(Priority)}", field=name) from None


def _seconds(fields: Mapping[str, Any], name: str, *, least_exclusive: bool) -> float | None:
    """A finite number of seconds: above 0, or from 0 on."""
    if name not in fields:
        return None
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise InvalidRequest(f"{name} must be a number of seconds: finite, and without quotes", field=name)
    if value < 0 or (least_exclusive and value == 0):
        raise InvalidRequest(f"{name} must be {'more than 0' if least_exclusive else '0 or more'} seconds", field=name)
    return float(min(value, 1e9))


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return True  # an integer beyond any float; it is clamped like every other large one
