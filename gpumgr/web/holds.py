"""Keeping the card free: the operator's hold. Owns: HTTP to broker calls and back. Must not: hold a rule, or take a
place: it is to work while everything waits."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, redirect, request
from werkzeug.exceptions import MethodNotAllowed

from gpumgr.errors import Forbidden, InvalidRequest
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.snapshot import hold_facts
from gpumgr.web.access import bearer_of
from gpumgr.web.body import hold_words, pressed

FORM = "application/x-www-form-urlencoded"


def routes(broker: Broker) -> Blueprint:
    blueprint = Blueprint("holds", __name__)

    @blueprint.post("/v1/hold")
    def hold() -> Response:
        reason, ttl_seconds = hold_words(request)
        broker.outsiders.hold(reason, ttl_seconds, bearer_of(request.environ).name)
        return jsonify(hold_facts(broker))

    @blueprint.delete("/v1/hold")
    def resume() -> Response:
        return jsonify({"resumed": broker.outsiders.resume(bearer_of(request.environ).name)})

    @blueprint.get("/v1/hold")
    def look() -> Response:
        return jsonify(hold_facts(broker))

    @blueprint.post("/v1/status")
    def press() -> Response:
        """The page's button: it has no script, so it is a form."""
        if request.mimetype != FORM:
            raise MethodNotAllowed(valid_methods=["GET", "HEAD", "OPTIONS"])
        if "HTTP_ORIGIN" not in request.environ and request.environ.get("HTTP_SEC_FETCH_SITE") != "same-origin":
            raise Forbidden("the form is for this broker's own page; programs call POST and DELETE /v1/hold")
        action, reason, ttl_seconds = pressed(request)
        by = bearer_of(request.environ).name
        if action == "hold":
            broker.outsiders.hold(reason, ttl_seconds, by)
        elif action == "resume":
            broker.outsiders.resume(by)
        else:
            raise InvalidRequest("action must be hold or resume", field="action")
        answer = redirect("status", 303)  # relative: a reverse proxy may have put us below a path
        if not isinstance(answer, Response):
            raise TypeError("a redirect is no response of Flask's")
        return answer

    return blueprint
