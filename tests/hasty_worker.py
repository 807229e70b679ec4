"""gpumgr's own worker with less patience for heads: ``RunningBroker.start("--worker-class", HASTY_WORKER)``."""

from __future__ import annotations

from gpumgr.web.worker import LeaseWorker

HASTY_WORKER = "tests.hasty_worker.HastyWorker"
HASTY_HEAD_SECONDS = 1.0


class HastyWorker(LeaseWorker):
    head_seconds = HASTY_HEAD_SECONDS
