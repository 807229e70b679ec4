from gpumgr import config, wiring


def create_app():  # type: ignore[no-untyped-def]  # `flask --app app run`: one process, for a look; no locks
    app = wiring.build(config.load())
    app.extensions["gpumgr"].start()
    return app
