"""What a call pays for going through the broker, and how soon it lets go.

How: one consumer that may have 16 calls at a time, in a process of its own (bench/upstream.py), called directly and
through the broker in turn.

``small``: a small call on a kept-alive connection, 1000 of each. ``lag``: 16 streams at a time with a token each 20 ms;
from the instant the consumer sends a token, which stands in it, until the caller has it. ``abort``: a caller closes its
connection in the middle of a stream, or while the consumer says nothing; from there until a lease is granted that waits
for this call's end. ``upload``: 1 GB sent through, and what the worker's memory rises by meanwhile.

Bars: the small call at most 4 ms more at p50; the lag at most 5 ms more than directly at p99; abort to grant at most
1 s, each time; memory at most 50 MB more.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.figure import Bar, Figure, spread
from bench.rig import Caller
from bench.upstream import TOKEN_LINE_BYTES, TOKENS
from tests.brokers import ROOT, RunningBroker
from tests.waiting import until

STREAMS = 16
WARM_UP = 20
UPLOAD_BYTES = 10**9
PIECE_BYTES = 1_000_000
SMALL_MORE_MS = 4.0
LAG_MORE_MS = 5.0
ABORT_MS = 1000.0
MEMORY_MB = 50.0


def run(rounds: int = 1000, aborts: int = 50, stream_rounds: int = 2) -> Figure:
    with _world() as (direct, broker):
        small = [_pair(direct, broker.port) for _ in range(rounds + WARM_UP)][WARM_UP:]
        lags: tuple[list[float], list[float]] = ([], [])
        for _ in range(stream_rounds):
            lags[0].extend(_lags(direct, "/tokens"))
            lags[1].extend(_lags(broker.port, "/v1/many/tokens"))
        streaming = [_abort(broker, "/v1/one/endless", 5) for _ in range(aborts)]
        silent = [_abort(broker, "/v1/one/silent", 0) for _ in range(aborts)]
        upload = _upload(broker)
    measured: dict[str, float] = {"rounds": rounds, "tokens": len(lags[1]), "aborts": aborts}
    measured |= spread("small_direct", [pair[0] for pair in small]) | spread("small", [pair[1] for pair in small])
    measured |= spread("lag_direct", lags[0]) | spread("lag", lags[1])
    measured |= spread("abort_streaming", streaming) | spread("abort_silent", silent)
    measured |= {"small_ratio_p50": round(measured["small_p50"] / measured["small_direct_p50"], 2)} | upload
    return Figure("proxy", "ms", measured, _bars(measured, max(streaming + silent)))


def _bars(measured: dict[str, float], slowest_abort: float) -> list[Bar]:
    small = measured["small_p50"] - measured["small_direct_p50"]
    lag = measured["lag_p99"] - measured["lag_direct_p99"]
    return [
        Bar("a small call, proxied - direct, p50", round(small, 2), SMALL_MORE_MS, "ms"),
        Bar(f"token lag of {STREAMS} streams, proxied - direct, p99", round(lag, 2), LAG_MORE_MS, "ms"),
        Bar("from the caller's end to the next grant, slowest", round(slowest_abort * 1000, 1), ABORT_MS, "ms"),
        Bar("the worker's memory during 1 GB upload", measured["upload_more_mb"], MEMORY_MB, "MB more"),
    ]


@contextmanager
def _world() -> Iterator[tuple[int, RunningBroker]]:
    """The consumer's port, and a broker as an operator has it. ``many`` and ``one`` are two such consumers."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpumgr-bench-")))
        many, one = stack.enter_context(_upstream()), stack.enter_context(_upstream())
        config = {
            "gpu": {"probe": "simulated"},
            "routing": {"many": "many", "one": "one"},
            "consumers": {"many": _consumer(many, STREAMS), "one": _consumer(one, 1)},
        }
        yield many, stack.enter_context(RunningBroker(directory, config))


def _consumer(port: int, max_concurrency: int) -> dict[str, object]:
    return {
        "dialect": "http",
        "url": f"http://127.0.0.1:{port}",
        "vram_resident_mib": 100,
        "max_concurrency": max_concurrency,
    }


@contextmanager
def _upstream() -> Iterator[int]:
    command = [sys.executable, "-m", "bench.upstream"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            if running.stdout is None:
                raise RuntimeError("the consumer has no stdout")
            yield int(running.stdout.readline())
        finally:
            running.terminate()
            running.wait(10)


# -- a small call -------------------------------------------------------------------------------------------

_kept: dict[int, Caller] = {}


def _pair(direct: int, proxied: int) -> tuple[float, float]:
    return _small(direct, "/small"), _small(proxied, "/v1/many/small")


def _small(port: int, path: str) -> float:
    caller = _kept.get(port) or _kept.setdefault(port, Caller(port))
    start = time.perf_counter()
    caller.call("POST", path, {"prompt": "say something"}).require()
    return time.perf_counter() - start


# -- tokens -------------------------------------------------------------------------------------------------


def _lags(port: int, path: str) -> list[float]:
    """Seconds from each token's instant to its arrival, over all streams."""
    lags: list[float] = []
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        for _ in range(STREAMS):
            caller = stack.enter_context(Caller(port))
            caller.send("GET", path)
            selector.register(caller.socket, selectors.EVENT_READ, bytearray())
        while selector.get_map():
            for key, _ in selector.select(60):
                came, now = key.fileobj.recv(65536), time.monotonic_ns()  # type: ignore[union-attr]
                key.data.extend(came)
                is_over = not came or key.data.endswith(b"\r\n0\r\n\r\n") or key.data == b"0\r\n\r\n"
                lags += [(now - sent) / 1e9 for sent in _tokens(key.data)]
                if is_over:
                    selector.unregister(key.fileobj)
    if len(lags) != STREAMS * TOKENS:
        raise RuntimeError(f"{len(lags)} of {STREAMS * TOKENS} tokens arrived")
    return lags


def _tokens(received: bytearray) -> Iterator[int]:
    """The instants of the lines that are whole, taken out of what was received."""
    while (end := received.find(b"\n\r\n")) >= 0:
        if end >= TOKEN_LINE_BYTES - 1 and received[end - TOKEN_LINE_BYTES + 1 : end].isdigit():
            yield int(received[end - TOKEN_LINE_BYTES + 1 : end])
        del received[: end + 3]


# -- letting go ---------------------------------------------------------------------------------------------


def _abort(broker: RunningBroker, path: str, pieces: int) -> float:
    """Seconds from the caller's close until whoever waited for the end of its call has a lease."""
    with Caller(broker.port) as leaving, Caller(broker.port) as waiting:
        leaving.send("GET", path)
        for _ in range(pieces):
            leaving.socket.recv(65536)
        until(lambda: _in_use(broker) == "proxy")
        waiting.ask("one")
        until(lambda: broker.status()["queue"])
        start = time.perf_counter()
        leaving.socket.shutdown(socket.SHUT_RDWR)
        token = str(waiting.receive().require()["token"])
        seconds = time.perf_counter() - start
        waiting.release(token)
    return seconds


def _in_use(broker: RunningBroker) -> object:
    return next(consumer["in_use"] for consumer in broker.status()["consumers"] if consumer["name"] == "one")


def _upload(broker: RunningBroker) -> dict[str, float]:
    status = Path(f"/proc/{broker.worker_pid()}/status")
    Path(f"/proc/{broker.worker_pid()}/clear_refs").write_text("5", encoding="ascii")  # forgets the peak (proc(5))
    before, start = _mb(status, "VmRSS"), time.perf_counter()
    with Caller(broker.port) as caller:
        head = f"POST /v1/many/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {UPLOAD_BYTES}\r\n\r\n"
        caller.socket.sendall(head.encode())
        for _ in range(UPLOAD_BYTES // PIECE_BYTES):
            caller.socket.sendall(b"x" * PIECE_BYTES)
        caller.receive()
    seconds = time.perf_counter() - start
    return {
        "upload_before_mb": before,
        "upload_more_mb": round(_mb(status, "VmHWM") - before, 1),
        "upload_mb_per_second": round(UPLOAD_BYTES / 1e6 / seconds),
    }


def _mb(status: Path, field: str) -> float:
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(field))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)
