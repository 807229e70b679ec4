"""Status and health. Owns: showing. Must not: take a place; it answers while everything else waits."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from gpumgr import __version__
from gpumgr.errors import GpuUnreadable, ShuttingDown
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.snapshot import snapshot
from gpumgr.web.problems import respond

FRESH_CARD_SECONDS = 0.08
"""How long status waits for the card to be read anew; a driver that hangs makes it show the last reading."""


def routes(broker: Broker) -> Blueprint:
    blueprint = Blueprint("status", __name__)

    @blueprint.get("/v1/status")
    def status() -> Response:
        broker.glance()
        broker.fresh_card(FRESH_CARD_SECONDS)
        return jsonify(snapshot(broker))

    @blueprint.get("/healthz")
    def healthz() -> Response:
        return jsonify({"status": "ok", "version": __version__})

    @blueprint.get("/readyz")
    def readyz() -> Response:
        missing = broker.missing()
        if not missing:
            return jsonify({"ready": True, "missing": []})
        said = f"not ready: {'; '.join(missing)}"
        error = ShuttingDown(said, missing=missing) if broker.state.stopping else GpuUnreadable(said, missing=missing)
        response = respond(error)
        body = jsonify({"ready": False, "missing": missing, **error.to_wire()})
        response.set_data(body.get_data())
        return response

    return blueprint
