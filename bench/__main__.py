"""``python -m bench``: all figures; ``python -m bench handover renew``: some. Writes ``bench/results/``.

A bar that is missed is told in the table and is no failure: this machine may be busy with something else.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from bench import (
    flood,
    free_to_grant,
    gamemode,
    ghosts,
    handover,
    handover_eviction,
    idle,
    imagen,
    mixed,
    order,
    order_http,
    probing,
    proxy,
    renew,
    restart,
    waiters,
    window,
)
from bench.figure import Figure, keep, table

FIGURES: dict[str, Callable[[], Figure]] = {
    "handover": handover.run,
    "handover_eviction": handover_eviction.run,
    "free_to_grant": free_to_grant.run,
    "renew": renew.run,
    "flood": flood.run,
    "waiters": waiters.run,
    "idle": idle.run,
    "probing": probing.run,
    "window": window.run,
    "mixed": mixed.run,
    "imagen": imagen.run,
    "proxy": proxy.run,
    "gamemode": gamemode.run,
    "ghosts": ghosts.run,
    "restart": restart.run,
    "order": order.run,
    "order_http": order_http.run,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure gpumgr against its bars.")
    parser.add_argument("figure", nargs="*", help=f"of {', '.join(FIGURES)}; default: all")
    chosen = parser.parse_args().figure or list(FIGURES)
    for unknown in set(chosen) - set(FIGURES):
        parser.error(f"there is no figure {unknown}; there are {', '.join(FIGURES)}")
    figures = []
    for name in chosen:
        print(f"{name} ...", end=" ", flush=True)
        start = time.monotonic()
        figures.append(FIGURES[name]())
        keep(figures[-1])
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    print(f"\n{table(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
