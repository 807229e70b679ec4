"""The lease routes. Owns: HTTP to broker calls and back. Must not: hold a rule."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, jsonify, request

from gpumgr.core.lease import Lease
from gpumgr.errors import QueueFull
from gpumgr.runtime.broker import Broker
from gpumgr.web.access import bearer_of
from gpumgr.web.body import acquire_ask, reason, renew_ttl, withdrawn_request
from gpumgr.web.hangup import HangUp
from gpumgr.web.places import Places


def routes(broker: Broker, places: Places, hang_up: HangUp) -> Blueprint:
    blueprint = Blueprint("leases", __name__)

    @blueprint.post("/v1/lease")
    def acquire() -> Response:
        place = places.take()  # before the body is read: a slow body holds a thread as well
        try:
            ask = acquire_ask(request)
            with hang_up.while_waiting(request.environ.get("gunicorn.socket"), broker) as caller:
                lease = broker.acquire(ask, caller)
            return jsonify(grant(broker, lease))
        finally:
            place.give_back()

    @blueprint.post("/v1/explain")
    def explain() -> Response:
        ask = acquire_ask(request)
        try:
            places.take().give_back()  # it needs none itself, but says what an acquire would be told
        except QueueFull as full:
            return jsonify(broker.explainer.refused(ask, full))
        broker.glance()  # for the next one: who computes and who serves is what was heard last
        return jsonify(broker.explainer.explain(ask))

    @blueprint.delete("/v1/lease")
    def withdraw() -> Response:
        ended = broker.withdraw(withdrawn_request(request))
        return jsonify({"withdrawn": False} if ended is None else {ended: True})

    @blueprint.post("/v1/lease/<token>/renew")
    def renew(token: str) -> Response:
        renewed = broker.renew(token, renew_ttl(request))
        lease, to = renewed.lease, renewed.yield_to
        return jsonify(
            {
                "token": lease.token,
                "expires_at": broker.state.shown(lease.expires_at),
                "ttl_seconds": number(lease.ttl_seconds),
                "waiting": renewed.waiting,
                "consumer_healthy": renewed.healthy,
                "yield_requested": to is not None,
                "yield_reason": None if to is None else to.words,
                "yield_cause": None if to is None else to.cause,
                "yield_since_at": None if to is None else to.since_at,
                "intruders": list(renewed.intruders),
            }
        )

    @blueprint.get("/v1/lease/<token>")
    def read(token: str) -> Response:
        return jsonify(grant(broker, broker.lease(token)))

    @blueprint.delete("/v1/lease/<token>")
    def release(token: str) -> Response:
        if broker.release(token, bearer_of(request.environ).name):
            return jsonify({"released": True})
        return jsonify({"released": False, "reason": "unknown_or_expired"})

    @blueprint.delete("/v1/leases/<lease_id>")
    def revoke(lease_id: str) -> Response:
        broker.revoke(lease_id, bearer_of(request.environ).name, reason(request))
        return jsonify({"revoked": True})

    return blueprint


def grant(broker: Broker, lease: Lease) -> dict[str, Any]:
    """What a holder is told of its lease."""
    consumer = broker.state.catalog.consumers[lease.consumer]
    return {
        "lease_id": lease.lease_id,
        "token": lease.token,
        "consumer": lease.consumer,
        "url": consumer.public_url,
        "gpus": list(lease.gpus),
        "gpu_uuids": list(lease.gpu_uuids),
        "holder": lease.holder,
        "fence": lease.fence,
        "granted_at": broker.state.shown(lease.granted_at),
        "expires_at": broker.state.shown(lease.expires_at),
        "ttl_seconds": number(lease.ttl_seconds),
    }


def number(value: float) -> float:
    """120, not 120.0."""
    return int(value) if value == int(value) else value
