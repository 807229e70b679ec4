"""Every error as the one error body of the API.

Owns: error → response. Must not: decide whether something is an error.
"""

from __future__ import annotations

import logging

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WerkzeugMethodNotAllowed
from werkzeug.routing.exceptions import WebsocketMismatch

from gpumgr.errors import (
    GpumgrError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
)

log = logging.getLogger(__name__)

ROUTES = (
    "POST /v1/lease",
    "DELETE /v1/lease",
    "POST /v1/lease/{token}/renew",
    "GET /v1/lease/{token}",
    "DELETE /v1/lease/{token}",
    "DELETE /v1/leases/{lease_id}",
    "POST /v1/explain",
    "ANY /v1/{kind}",
    "ANY /v1/{kind}/{path}",
    "POST, GET or DELETE /v1/hold",
    "GET /v1/status",
    "GET /healthz",
    "GET /readyz",
)


NO_WEBSOCKETS = (
    "WebSockets are not proxied: ask again and again instead (ComfyUI: GET /v1/KIND/history/PROMPT_ID, which waits for "
    "nobody), or take a lease and connect to its url"
)


def respond(error: GpumgrError) -> Response:
    """Retryable errors say when; the others keep OpenAI's SDKs from retrying every status of 500 and above."""
    response = jsonify(error.to_wire())
    response.status_code = error.status
    if error.retryable:
        response.headers["Retry-After"] = str(error.retry_after_seconds)
    else:
        response.headers["x-should-retry"] = "false"
    return response


def register(app: Flask) -> None:
    """An error handler for everything, so that no exception reaches gunicorn: it would log the URI, which may hold
    a token."""

    @app.errorhandler(GpumgrError)
    def ours(error: GpumgrError) -> Response:
        return respond(error)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        response = respond(_translated(error))
        if isinstance(error, WerkzeugMethodNotAllowed) and error.valid_methods:
            response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        log.exception("a request failed endpoint=%s", request.endpoint, exc_info=error)
        return respond(InternalError("gpumgr failed; its log has the traceback"))


def _translated(error: HTTPException) -> GpumgrError:
    if error.code == 404:
        return NotFound(f"there is no such route; there are: {', '.join(ROUTES)}", routes=list(ROUTES))
    if error.code == 405:
        return MethodNotAllowed(f"this route does not take {request.method}; Allow lists what it takes")
    if isinstance(error, WebsocketMismatch):
        return InvalidRequest(NO_WEBSOCKETS)
    if error.code == 413:
        return PayloadTooLarge("the body is too large")
    if error.code is not None and error.code < 500:
        return InvalidRequest(error.description or "the request cannot be read")
    return InternalError("gpumgr failed; its log has the traceback")
