"""Every error a caller can meet, on both sides of the wire.

Owns: codes, HTTP statuses, whether a retry can help, and the facts each error carries.
Must not: know Flask, threads or where an error is raised.

    GpumgrError
    ├── InvalidRequest            400  the caller's words are wrong
    ├── Unauthorized              401  no token of server.auth, or a wrong one
    ├── Forbidden                 403  the token's scope is not enough; or another site's page asks
    ├── NotThere                  404
    │   ├── KindUnknown
    │   ├── ConsumerUnknown
    │   ├── LeaseUnknown               never existed, or has ended: a lease is never revived
    │   └── NotFound                   no such route
    ├── MethodNotAllowed          405
    ├── Conflict                  409
    │   ├── RequestMismatch            this request_id asked for something else
    │   ├── RequestEnded               this request_id had its lease, and the lease is over
    │   └── LeaseMismatch              a lease of another consumer was shown on a proxy route
    ├── PayloadTooLarge           413
    ├── HostNotAllowed            421  a name in Host that is not this broker's
    ├── UnsupportedMediaType      415
    ├── InternalError             500  a defect of gpumgr
    ├── UpstreamFailed                 a proxied call's consumer did not answer
    │   ├── UpstreamUnreachable   502
    │   └── UpstreamTimeout       504
    └── Refused                   503  the GPU cannot be had now
        ├── QueueFull
        ├── SchedulerTimeout
        ├── PrepareTimeout
        ├── InsufficientVram           not retryable: it would not fit with every consumer gone
        ├── EvictionFailed
        ├── ConsumerUnhealthy
        ├── GpuUnreadable
        ├── StoreUnavailable           a grant cannot be written down
        ├── GpuYielded                 an operator or a game has the card
        └── ShuttingDown

``code`` is the wire's name of the class; ``from_wire`` turns an answer back into the same class, so that a
holder can write ``except InsufficientVram``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar


class GpumgrError(Exception):
    """The root. ``details`` is JSON-ready; its keys carry their units."""

    code: str = "gpumgr_error"
    status: int = 500
    retryable: bool = False
    retry_after_seconds: ClassVar[int] = 1

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details

    def to_wire(self) -> dict[str, Any]:
        """The one error body of the API; OpenAI's SDKs read the same shape."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "type": "gpumgr_error",
                "retryable": self.retryable,
                "details": self.details,
            }
        }


class InvalidRequest(GpumgrError):
    code = "invalid_request"
    status = 400


class Unauthorized(GpumgrError):
    code = "unauthorized"
    status = 401


class Forbidden(GpumgrError):
    code = "forbidden"
    status = 403


class NotThere(GpumgrError):
    status = 404


class KindUnknown(NotThere):
    code = "kind_unknown"


class ConsumerUnknown(NotThere):
    code = "consumer_unknown"


class LeaseUnknown(NotThere):
    code = "lease_unknown"


class NotFound(NotThere):
    code = "not_found"


class MethodNotAllowed(GpumgrError):
    code = "method_not_allowed"
    status = 405


class Conflict(GpumgrError):
    status = 409


class RequestMismatch(Conflict):
    code = "request_mismatch"


class RequestEnded(Conflict):
    code = "request_ended"


class LeaseMismatch(Conflict):
    code = "lease_mismatch"


class PayloadTooLarge(GpumgrError):
    code = "payload_too_large"
    status = 413


class HostNotAllowed(GpumgrError):
    code = "host_not_allowed"
    status = 421


class UnsupportedMediaType(GpumgrError):
    code = "unsupported_media_type"
    status = 415


class InternalError(GpumgrError):
    code = "internal_error"
    status = 500


class UpstreamFailed(GpumgrError):
    """A proxied call got no answer of its consumer; what did come is passed on as it is."""

    retryable = True


class UpstreamUnreachable(UpstreamFailed):
    code = "upstream_unreachable"
    status = 502


class UpstreamTimeout(UpstreamFailed):
    code = "upstream_timeout"
    status = 504


class Refused(GpumgrError):
    """The GPU cannot be had now; ``retryable`` says whether asking again can help."""

    status = 503
    retryable = True


class QueueFull(Refused):
    code = "queue_full"


class SchedulerTimeout(Refused):
    code = "scheduler_timeout"


class PrepareTimeout(Refused):
    code = "prepare_timeout"
    retry_after_seconds = 5


class InsufficientVram(Refused):
    code = "insufficient_vram"
    retryable = False


class EvictionFailed(Refused):
    code = "eviction_failed"
    retry_after_seconds = 5


class ConsumerUnhealthy(Refused):
    code = "consumer_unhealthy"
    retry_after_seconds = 5


class GpuUnreadable(Refused):
    code = "gpu_unreadable"
    retry_after_seconds = 5


class StoreUnavailable(Refused):
    code = "store_unavailable"
    retry_after_seconds = 5


class GpuYielded(Refused):
    code = "gpu_yielded"
    retry_after_seconds = 5


class ShuttingDown(Refused):
    code = "shutting_down"
    retry_after_seconds = 2


def _tree(root: type[GpumgrError]) -> Iterator[type[GpumgrError]]:
    for child in root.__subclasses__():
        yield child
        yield from _tree(child)


def by_code() -> dict[str, type[GpumgrError]]:
    """Wire code → class, for every class that has a code of its own."""
    return {cls.code: cls for cls in _tree(GpumgrError) if "code" in vars(cls)}


def from_wire(body: object) -> GpumgrError | None:
    """The error that an answer's JSON body tells of, or None where the body is not gpumgr's own."""
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping) or error.get("type") != "gpumgr_error":
        return None
    code = str(error.get("code"))
    details = error.get("details")
    found = by_code().get(code, GpumgrError)(str(error.get("message", "")))
    found.details = dict(details) if isinstance(details, Mapping) else {}
    if type(found) is GpumgrError:  # a newer broker's
        found.code, found.retryable = code, error.get("retryable") is True
    return found
