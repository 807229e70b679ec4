"""Status and health. Owns: showing, as JSON, or to a browser as a page. Must not: take a place; it answers while
everything else waits."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path

from flask import Blueprint, Request, Response, jsonify, render_template, request
from markupsafe import Markup

from gpumgr import __version__
from gpumgr.errors import GpumgrError, GpuUnreadable, ShuttingDown, StoreUnavailable
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.snapshot import snapshot
from gpumgr.runtime.state import State
from gpumgr.web.access import bearer_of
from gpumgr.web.page import Page, page
from gpumgr.web.problems import respond

FRESH_CARD_SECONDS = 0.08
"""How long status waits for the card to be read anew; a driver that hangs makes it show the last reading."""
STYLE_FILE = Path(__file__).parent / "templates" / "status.css"


def routes(broker: Broker) -> Blueprint:
    blueprint = Blueprint("status", __name__)
    printed = printer(STYLE_FILE.read_text(encoding="utf-8"))

    @blueprint.get("/v1/status")
    def status() -> Response:
        broker.glance()
        broker.fresh_card(FRESH_CARD_SECONDS)
        found = snapshot(broker)
        if not bearer_of(request.environ).sees_tokens:
            found["leases"] = [lease | {"token": None} for lease in found["leases"]]
        if prefers_page(request):
            refreshes = request.args.get("refresh") != "off"
            may_hold = bearer_of(request.environ).operates
            response = printed(page(found, broker.settings.gpu.headroom_mib, refreshes=refreshes, may_hold=may_hold))
        else:
            response = jsonify(found)
        response.vary.add("Accept")
        response.cache_control.no_store = True
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @blueprint.get("/healthz")
    def healthz() -> Response:
        return jsonify({"status": "ok", "version": __version__})

    @blueprint.get("/readyz")
    def readyz() -> Response:
        missing = broker.missing()
        if not missing:
            return jsonify({"ready": True, "missing": []})
        said = f"not ready: {'; '.join(missing)}"
        error = _why_not_ready(broker.state)(said, missing=missing)
        response = respond(error)
        body = jsonify({"ready": False, "missing": missing, **error.to_wire()})
        response.set_data(body.get_data())
        return response

    return blueprint


def _why_not_ready(state: State) -> type[GpumgrError]:
    if state.stopping:
        return ShuttingDown
    return GpuUnreadable if state.store_error is None else StoreUnavailable


def prefers_page(request: Request) -> bool:
    """A browser names text/html; whoever takes anything, as curl does, gets JSON."""
    if request.args.get("format") == "json":
        return False
    accepted = request.accept_mimetypes
    return accepted.quality("text/html") > accepted.quality("application/json")


def printer(style: str) -> Callable[[Page], Response]:
    """The page as an answer whose policy lets nothing run and nothing load: its one style is named by its hash."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )

    def printed(page: Page) -> Response:
        response = Response(render_template("status.html", page=page, style=Markup(style)), mimetype="text/html")  # noqa: S704 - our own file
        response.headers["Content-Security-Policy"] = policy
        # With no-referrer a browser says "Origin: null" of the page's own form (Fetch, "append a request Origin").
        response.headers["Referrer-Policy"] = "same-origin"
        response.headers["X-Frame-Options"] = "DENY"  # for browsers that do not know frame-ancestors
        return response

    return printed
