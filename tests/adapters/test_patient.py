"""A driver that hangs costs nobody more than the stated time, and is read again when it answers."""

from __future__ import annotations

import threading
import time

import pytest

from gpumgr.adapters.patient import PatientProbe
from gpumgr.core.card import GpuReading, Reading
from tests.waiting import until


class GatedProbe:
    """A ledger: each reading has its number in ``used_mib``, and waits for the gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reads = 0
        self.at_once = 0
        self.most_at_once = 0
        self.closed = 0

    def read(self) -> Reading:
        self.reads += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        number, read_at = self.reads, time.monotonic()
        self.gate.wait()
        self.at_once -= 1
        return Reading(read_at, (GpuReading(0, "GPU-0", "card", 24000, number, 24000 - number),))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def driver() -> GatedProbe:
    return GatedProbe()


def test_a_reading_begins_after_it_was_asked_for(driver: GatedProbe) -> None:
    probe = PatientProbe(driver)
    for _ in range(20):
        asked = time.monotonic()
        assert probe.read().read_at >= asked
    assert driver.reads == 20
    probe.close()
    assert driver.closed == 1


def test_those_who_ask_during_a_reading_share_the_next_one(driver: GatedProbe) -> None:
    probe = PatientProbe(driver)
    driver.gate.clear()
    found: list[Reading] = []
    threads = [threading.Thread(target=lambda: found.append(probe.read())) for _ in range(6)]
    threads[0].start()
    until(lambda: driver.reads == 1)
    for thread in threads[1:]:
        thread.start()
    until(lambda: probe._asked == 6)
    driver.gate.set()
    for thread in threads:
        thread.join(5)
    assert (len(found), driver.reads) == (6, 2)
    assert driver.most_at_once == 1
    probe.close()


def test_a_driver_that_hangs_is_an_unreadable_card_until_it_answers(driver: GatedProbe) -> None:
    probe = PatientProbe(driver, limit_seconds=0.2)
    driver.gate.clear()
    first = probe.read()
    assert first.error is not None
    assert "does not answer" in first.error
    assert probe.read().error is not None
    driver.gate.set()
    assert until(lambda: probe.read().gpus)[0].readable
    assert driver.most_at_once == 1
    probe.close()


def test_who_has_less_patience_is_told_sooner(driver: GatedProbe) -> None:
    probe = PatientProbe(driver, limit_seconds=60)
    driver.gate.clear()
    assert probe.read(0.05).error is not None
    driver.gate.set()
    assert probe.read(60).gpus[0].readable
    probe.close()


def test_closing_does_not_wait_for_a_driver_that_hangs(driver: GatedProbe) -> None:
    probe = PatientProbe(driver, limit_seconds=0.05)
    driver.gate.clear()
    probe.read()
    probe.close()
    assert driver.closed == 0
    driver.gate.set()
    probe.read()  # a later one begins anew
    probe.close()
