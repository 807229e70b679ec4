"""Callers that leave, on real sockets: told once, at once, and never for a socket that only has the same number."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from gpumgr.web.hangup import HangUp, Watch
from tests.waiting import until

PATIENCE_SECONDS = 10.0
SOCKETS = 1000


@pytest.fixture
def hang_up() -> HangUp:
    return HangUp()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connected(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """What the server has, and what its caller has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = stack.enter_context(socket.create_connection(listener.getsockname()))
        ours, _ = listener.accept()
        return stack.enter_context(ours), theirs


def close(sock: socket.socket) -> None:
    sock.close()


def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("leave", [close, half_close, reset])
@pytest.mark.parametrize("unread", [b"", b"half a request"])
def test_every_way_to_leave_is_told_once(
    hang_up: HangUp, stack: ExitStack, leave: Callable[[socket.socket], None], unread: bytes
) -> None:
    ours, theirs = connected(stack)
    told: list[str] = []
    gone = threading.Event()

    def on_gone() -> None:
        told.append(threading.current_thread().name)
        gone.set()

    watch = hang_up.watch(ours, on_gone, 60)
    theirs.sendall(unread)
    assert not gone.wait(0.05)  # what it says is no end
    leave(theirs)
    assert gone.wait(PATIENCE_SECONDS)
    watch.close()
    assert told == ["hang-up"]


def test_who_left_before_is_told_too(hang_up: HangUp, stack: ExitStack) -> None:
    ours, theirs = connected(stack)
    theirs.close()
    gone = threading.Event()
    hang_up.watch(ours, gone.set, 60)
    assert gone.wait(PATIENCE_SECONDS)


def test_a_closed_watch_is_silent_and_its_socket_can_be_watched_again(hang_up: HangUp, stack: ExitStack) -> None:
    ours, theirs = connected(stack)
    told: list[int] = []
    first = hang_up.watch(ours, lambda: told.append(1), 60)
    first.close()
    first.close()
    second = threading.Event()
    hang_up.watch(ours, second.set, 60)
    first.close()  # does not end the other one
    theirs.close()
    assert second.wait(PATIENCE_SECONDS)
    assert told == []


def test_one_that_fails_hides_no_other(hang_up: HangUp, stack: ExitStack) -> None:
    def fails() -> None:
        raise RuntimeError("a defect")

    ours, theirs = connected(stack)
    hang_up.watch(ours, fails, 60)
    theirs.close()
    other, leaving = connected(stack)
    gone = threading.Event()
    hang_up.watch(other, gone.set, 60)
    leaving.close()
    assert gone.wait(PATIENCE_SECONDS)


def test_closing_waits_for_the_callback_that_runs(hang_up: HangUp, stack: ExitStack) -> None:
    # The socket is closed right after its watch: what the callback does to it must be done by then.
    ours, theirs = connected(stack)
    inside, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def on_gone() -> None:
        inside.set()
        go_on.wait(PATIENCE_SECONDS)
        done.set()

    watch = hang_up.watch(ours, on_gone, 60)
    theirs.close()
    assert inside.wait(PATIENCE_SECONDS)
    seen: list[bool] = []
    closing = threading.Thread(target=lambda: (watch.close(), seen.append(done.is_set())))  # type: ignore[func-returns-value]
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    closing.join(PATIENCE_SECONDS)
    assert seen == [True]


def test_a_callback_may_close_its_own_watch(hang_up: HangUp, stack: ExitStack) -> None:
    ours, theirs = connected(stack)
    watches: list[Watch] = []
    closed = threading.Event()

    def on_gone() -> None:
        until(lambda: watches)
        watches[0].close()
        closed.set()

    watches.append(hang_up.watch(ours, on_gone, 60))
    theirs.close()
    assert closed.wait(PATIENCE_SECONDS)


def test_an_event_of_a_socket_that_is_gone_is_not_believed_of_its_heir(hang_up: HangUp, stack: ExitStack) -> None:
    """An event may be under way while its socket is closed and the number given away: provoked by holding the thread in
    another callback, so that it looks at what it was told only later."""
    blocker, blocking = connected(stack)
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        go_on.wait(PATIENCE_SECONDS)

    told: list[str] = []
    ours, theirs = connected(stack)
    heir, _theirs = connected(stack)
    hang_up.watch(blocker, hold, 60)
    watch = hang_up.watch(ours, lambda: told.append("ours"), 60)
    blocking.close()
    assert inside.wait(PATIENCE_SECONDS)
    theirs.close()
    number = ours.fileno()
    watch.close()
    os.dup2(heir.fileno(), number)  # closes ours, and its number is the heir's
    with socket.socket(fileno=os.dup(number)):
        again = hang_up.watch(ours, lambda: told.append("heir"), 60)
        watch.look()  # as the thread does with an event of that number
        again.look()
        go_on.set()
        last, leaving = connected(stack)
        gone = threading.Event()
        hang_up.watch(last, gone.set, 60)
        leaving.close()
        assert gone.wait(PATIENCE_SECONDS)
        again.close()
    assert told == []


def test_a_thousand_callers_cost_nothing_and_each_is_told(hang_up: HangUp, stack: ExitStack) -> None:
    told: list[int] = []
    pairs = [connected(stack) for _ in range(SOCKETS)]
    for number, (ours, _) in enumerate(pairs):
        hang_up.watch(ours, lambda number=number: told.append(number), 60)  # type: ignore[misc]
    before = time.thread_time_ns(), time.process_time_ns()
    time.sleep(0.1)
    assert time.process_time_ns() - before[1] < 50_000_000  # it sleeps
    for _, theirs in pairs[::2]:
        theirs.close()
    until(lambda: len(told) == SOCKETS // 2)
    assert sorted(told) == list(range(0, SOCKETS, 2))


def test_watches_come_and_go_while_callers_leave(hang_up: HangUp) -> None:
    """Numbers are used again all the time; a watch that is told must be one whose caller left."""
    wrong: list[int] = []

    def serve(seed: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for turn in range(300):
                theirs = socket.create_connection(listener.getsockname())
                ours, _ = listener.accept()
                left = threading.Event()
                gone = threading.Event()

                def on_gone(left: threading.Event = left, gone: threading.Event = gone) -> None:
                    if not left.is_set():
                        wrong.append(seed)
                    gone.set()

                watch = hang_up.watch(ours, on_gone, 60)
                if (turn + seed) % 3 == 0:
                    left.set()
                    theirs.close()
                    if turn % 2:
                        assert gone.wait(PATIENCE_SECONDS)
                watch.close()
                ours.close()
                theirs.close()

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_unix_socket_is_watched_too(hang_up: HangUp, stack: ExitStack) -> None:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    gone = threading.Event()
    hang_up.watch(ours, gone.set, 60)
    theirs.close()
    assert gone.wait(PATIENCE_SECONDS)
