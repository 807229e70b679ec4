"""The Flask application: routes on a broker that is handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask

from gpumgr.runtime.broker import Broker
from gpumgr.web import access, holds, leases, problems, proxy, status, upload
from gpumgr.web.hangup import HangUp
from gpumgr.web.places import Places


class _App(Flask):
    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Nothing here is a coroutine: Flask would ask so of three functions for each request, a tenth of its time."""
        return func


def create_app(broker: Broker) -> Flask:
    """Builds routes only; starting the broker is the server's business (its hooks, or ``app.py``)."""
    app = _App("gpumgr.web", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the documented order reads better
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False  # a path with two slashes is not found; a redirect would repeat a token in it
    server = broker.settings.server
    places = Places(server.threads - server.reserved_threads)
    hang_up = HangUp()
    access.register(app, server)
    upload.register(app)
    app.register_blueprint(leases.routes(broker, places, hang_up))
    app.register_blueprint(holds.routes(broker))
    app.register_blueprint(status.routes(broker))
    proxy.register(app, broker, places, hang_up)
    problems.register(app)
    app.extensions["gpumgr"] = broker
    return app
