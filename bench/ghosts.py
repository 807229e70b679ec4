"""Grants to callers who hung up while they waited.

How: 200 waits, 50 behind one holder on each of four brokers, abandoned by turns in each of the ways in which a caller
can leave: it closes, it resets, it closes its half. A second later the holder releases. Nobody is there then: who is
granted anything, or still waits for it, is a ghost. Then somebody asks, who must get the GPU at once.

Bar: no grant.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Sequence

from bench.figure import Bar, Figure, spread
from bench.rig import Caller, rig
from tests.brokers import RunningBroker
from tests.waiting import until

BATCH = 50
NOTICED_SECONDS = 1.0
SETTLE_SECONDS = 10
NEXT_SECONDS = 2.0
NO_LINGER = struct.pack("ii", 1, 0)


def run(waits: int = 200) -> Figure:
    with rig() as stage:
        stage.load_speech()
        batches = [_batch(stage.broker()) for _ in range(waits // BATCH)]
    ghosts, noticed, next_grant = zip(*batches, strict=True)
    return Figure(
        name="ghosts",
        unit="ms",
        measured={"abandoned": waits} | spread("all_noticed_after", noticed) | spread("next_grant", next_grant),
        bars=[Bar(f"grants of {waits} abandoned waits", sum(ghosts), 0, "grants")],
    )


def _batch(broker: RunningBroker) -> tuple[int, float, float]:
    """How many ghosts were granted; seconds until none waited any more, and from the release to the next grant."""
    with Caller(broker.port) as holder, Caller(broker.port) as heir:
        token = holder.acquire("mvoice")
        before = _grants(broker)
        waiting = [Caller(broker.port) for _ in range(BATCH)]
        for caller in waiting:
            caller.ask("mvoice")
        until(lambda: holder.renew(token)["waiting"] == BATCH, SETTLE_SECONDS)
        start = time.perf_counter()
        for number, caller in enumerate(waiting):
            LEAVES[number % len(LEAVES)](caller.socket)
        noticed = _noticed(holder, token, start)
        start = time.perf_counter()
        holder.release(token)
        heir.ask("mvoice", wait_seconds=NEXT_SECONDS)
        granted = heir.receive().status == 200
        next_grant = time.perf_counter() - start
        ghosts = _grants(broker) - before - granted + len(broker.status()["queue"])
        for caller in waiting:
            caller.close()
    return ghosts, noticed, next_grant


def _noticed(holder: Caller, token: str, start: float) -> float:
    """The release comes no sooner than a second after the last one left, and then whoever waits."""
    found = 0.0
    while (passed := time.perf_counter() - start) < NOTICED_SECONDS:
        if not found and not holder.renew(token)["waiting"]:
            found = passed
        time.sleep(0.005)
    return found or passed


def _grants(broker: RunningBroker) -> int:
    consumers = broker.status()["consumers"]
    return int(next(each["total_requests"] for each in consumers if each["name"] == "mvoice"))


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    sock.close()


def _close_half(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


LEAVES: Sequence[Callable[[socket.socket], None]] = (socket.socket.close, _reset, _close_half)
