from gpumgr.web.server import worker_settings
from gpumgr.wiring import build

app = build(worker_settings())
