"""config/gunicorn.conf.py with one defect: for `gunicorn -c`, which reads it in the master, before any worker builds
the application. On a SIGHUP it is read again, and what is installed already stays so."""

import os
from pathlib import Path

from tests.torture import mutants

_conf = Path("config/gunicorn.conf.py")
exec(compile(_conf.read_text(encoding="utf-8"), str(_conf), "exec"))  # noqa: S102 - it is this repository's own

if mutants.ENV in os.environ:
    mutants.MUTANTS[os.environ.pop(mutants.ENV)].install()
