"""config/gunicorn.conf.py for a world in which everything takes a ``GPUMGR_BENCH_SPEED``-th of its time.

What the order holds to be so many seconds is scaled with it, and how often a load is looked at. From outside, before
any worker builds the application: nothing in gpumgr can be switched like that.
"""

import functools
import os
from pathlib import Path

from gpumgr.core import quantum
from gpumgr.runtime import broker, ledger

_conf = Path("config/gunicorn.conf.py")
exec(compile(_conf.read_text(encoding="utf-8"), str(_conf), "exec"))  # noqa: S102 - it is this repository's own

_speed = float(os.environ["GPUMGR_BENCH_SPEED"])
for _module, _name in ((quantum, "GRACE_SECONDS"), (quantum, "UNKNOWN_SWAP_SECONDS"), (ledger, "SOON_SECONDS")):
    vars(_module)[_name] /= _speed
vars(broker)["Quantum"] = functools.partial(quantum.Quantum, floor_seconds=quantum.FLOOR_SECONDS / _speed)
