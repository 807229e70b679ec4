from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from gpumgr.web.pool import NEWCOMERS_EACH, Pool
from tests.waiting import until

PATIENCE_SECONDS = 5.0
NEW, KNOWN = SimpleNamespace(timeout=None), SimpleNamespace(timeout=1.0)


class Busy:
    """A pool whose one thread is held until ``go``; ``order`` is what it did then."""

    def __init__(self) -> None:
        self.pool = Pool(1)
        self.order: list[str] = []
        self._gate = threading.Event()
        held = threading.Event()

        def hold(_: object) -> None:
            held.set()
            self._gate.wait(PATIENCE_SECONDS)

        self.pool.submit(hold, NEW)
        assert held.wait(PATIENCE_SECONDS)

    def submit(self, name: str, conn: object) -> Future[Any]:
        return self.pool.submit(lambda _: self.order.append(name), conn)

    def go(self) -> None:
        last = self.submit("end", NEW)
        self._gate.set()
        last.result(PATIENCE_SECONDS)


def test_whoever_was_answered_before_goes_first() -> None:
    busy = Busy()
    for name, conn in (("a", NEW), ("b", NEW), ("A", KNOWN), ("B", KNOWN)):
        busy.submit(name, conn)
    busy.go()
    assert busy.order == ["A", "B", "a", "b", "end"]


def test_newcomers_are_not_left_out() -> None:
    busy = Busy()
    for _ in range(5 * NEWCOMERS_EACH):
        busy.submit("known", KNOWN)
    for _ in range(4):
        busy.submit("new", NEW)
    busy.go()
    assert busy.order.index("new") < NEWCOMERS_EACH
    assert busy.order[-1] == "known"


@pytest.mark.parametrize("threads", [1, 4])
def test_what_was_taken_is_done_and_then_the_threads_end(threads: int) -> None:
    before = set(threading.enumerate())
    pool = Pool(threads)
    ours = set(threading.enumerate()) - before
    done = [pool.submit(_twice, SimpleNamespace(timeout=None, number=number)) for number in range(100)]
    pool.shutdown()
    assert [future.result(PATIENCE_SECONDS) for future in done] == [2 * number for number in range(100)]
    for thread in ours:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def _twice(conn: Any) -> int:
    return 2 * int(conn.number)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_ends_no_thread(error: Callable[[], BaseException]) -> None:
    def fail(_: Any) -> None:
        raise error()

    pool = Pool(1)
    failed = pool.submit(fail, NEW)
    assert isinstance(failed.exception(PATIENCE_SECONDS), BaseException)
    assert pool.submit(lambda _: "on", NEW).result(PATIENCE_SECONDS) == "on"


def test_what_was_cancelled_is_not_done() -> None:
    busy = Busy()
    cancelled = busy.submit("cancelled", NEW)
    assert cancelled.cancel()
    busy.go()
    assert busy.order == ["end"]


def test_it_is_at_leisure_while_half_of_its_threads_have_nothing_to_do() -> None:
    pool, gate = Pool(4), threading.Event()
    until(pool.is_at_leisure)
    held = []
    for _ in range(3):
        assert pool.is_at_leisure()
        held.append(pool.submit(lambda _: gate.wait(PATIENCE_SECONDS), NEW))
    assert not pool.is_at_leisure()
    gate.set()
    assert all(future.result(PATIENCE_SECONDS) for future in held)
    until(pool.is_at_leisure)


def test_nobody_is_at_leisure_while_somebody_waits() -> None:
    busy = Busy()
    busy.submit("waits", NEW)
    assert not busy.pool.is_at_leisure()
    busy.go()
