"""Whose descendants are whose, with real processes: by pid and start, and for as long as they live."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

from gpumgr.adapters.holders import HolderProbe, HolderProcesses
from gpumgr.adapters.ownership import started_ticks
from gpumgr.core.card import GpuProcess, GpuReading, Reading
from gpumgr.core.lease import HolderProcess
from tests.adapters.test_ownership import NO_SUCH_PID, WAITS, child

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.readline()
import os; os._exit(0)
"""


def the(pid: int) -> HolderProcess:
    started = started_ticks(pid)
    assert started is not None
    return HolderProcess(pid, started)


class Card:
    """A probe that names these pids."""

    def __init__(self, *pids: int, consumer: str | None = None) -> None:
        processes = tuple(GpuProcess(pid, "p", 500, consumer) for pid in pids)
        self.reading = Reading(1.0, (GpuReading(0, None, "", 1000, 500, 500, processes),))

    def read(self, at_most_seconds: float | None = None) -> Reading:  # noqa: ARG002 it answers at once
        return self.reading

    def close(self) -> None:
        pass


def seen(holders: HolderProcesses, *pids: int, consumer: str | None = None) -> list[tuple[str | None, int | None]]:
    reading = HolderProbe(Card(*pids, consumer=consumer), holders).read()
    return [(process.consumer, process.holder_pid) for process in reading.gpus[0].processes]


def test_a_holders_process_and_its_children_are_its_consumers() -> None:
    holders = HolderProcesses()
    with child(PARENT) as parent, child(WAITS) as stranger:
        below = parent.number()
        holders.follow(the(parent.pid), "batch")
        assert seen(holders, parent.pid, below, stranger.pid) == [("batch", parent.pid)] * 2 + [(None, None)]
        holders.follow(the(stranger.pid), "other")  # whoever was looked at before and was nobody's is looked at again
        assert seen(holders, below, stranger.pid) == [("batch", parent.pid), ("other", stranger.pid)]
        holders.follow(the(parent.pid), "other")
        assert seen(holders, below) == [("other", parent.pid)]


def test_a_child_stays_the_consumers_when_its_parent_has_ended() -> None:
    holders = HolderProcesses()
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        below = int(parent.stdout.readline())
        holders.follow(the(parent.pid), "batch")
        assert seen(holders, below) == [("batch", parent.pid)]
        pidfd = os.pidfd_open(below)
        parent.kill()
        parent.wait(20)
    try:
        if started_ticks(below) is not None:  # its input has ended with its parent: it may be gone already
            holders.follow(the(os.getpid()), "other")  # forgets the dead
            assert seen(holders, below) in ([("batch", parent.pid)], [(None, None)])
    finally:
        os.close(pidfd)


def test_what_is_configured_of_a_process_stands_before_its_holder() -> None:
    holders = HolderProcesses()
    holders.follow(the(os.getpid()), "batch")
    assert seen(holders, os.getpid(), consumer="comfyui") == [("comfyui", None)]


def test_a_pid_that_was_given_again_is_somebody_elses() -> None:
    holders = HolderProcesses()
    with child(WAITS) as process:
        process.line()
        holders.follow(replace(the(process.pid), started=the(process.pid).started - 1), "batch")
        assert seen(holders, process.pid) == [(None, None)]


def test_a_holder_may_not_name_init_or_nobody() -> None:
    holders = HolderProcesses()
    assert holders.started(1) is None
    assert holders.started(NO_SUCH_PID) is None
    assert holders.started(os.getpid()) == started_ticks(os.getpid())


def test_without_holders_a_reading_is_as_it_was() -> None:
    card = Card(os.getpid())
    assert HolderProbe(card, HolderProcesses()).read() is card.reading
