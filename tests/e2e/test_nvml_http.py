"""The real broker through nvidia-ml-py, on the stand-in driver: what the card says is what callers are told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker
from tests.stand_in import Process, StandInDriver, build_or_skip
from tests.waiting import until


@pytest.fixture
def driver(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> StandInDriver:
    driver = StandInDriver(build_or_skip(tmp_path_factory.getbasetemp() / "stand-in"), tmp_path / "driver")
    driver.gpus[0].total_mib = 24000
    driver.write()
    return driver


@pytest.fixture
def nvml_broker(tmp_path: Path, stage: Stage, driver: StandInDriver) -> Iterator[RunningBroker]:
    config = stage.config()
    config["gpu"] = {"headroom_mib": 512}
    # One process serves all four here, so that only one of them can be told by its port.
    del config["routing"]["llm"], config["routing"]["stt"]
    del config["consumers"]["ollama"], config["consumers"]["whisper"]
    del config["consumers"]["mvoice"]["can_coexist_with"]
    config["consumers"]["mvoice"]["unload"]["timeout_seconds"] = 2
    config["consumers"]["comfyui"]["processes"] = ["*/ComfyUI/*"]
    with RunningBroker(tmp_path, config, driver.env()) as running:
        yield running


def test_strangers_are_named_with_their_memory(nvml_broker: RunningBroker, driver: StandInDriver) -> None:
    driver.processes = [Process(pid=4194000, mib=10600, kind="graphics", name="Z:\\games\\BG3\\bin\\bg3_dx11.exe")]
    driver.write()
    error = nvml_broker.acquire(kind="image").json()["error"]
    assert error["code"] == "insufficient_vram"
    details = error["details"]
    assert (details["needed_mib"], details["free_mib"], details["headroom_mib"]) == (14000, 13400, 512)
    assert details["untracked"] == [{"pid": 4194000, "name": "bg3_dx11.exe", "used_mib": 10600}]
    gpu = nvml_broker.status()["gpus"][0]
    assert (gpu["total_mib"], gpu["used_mib"], gpu["free_mib"]) == (24000, 10600, 13400)


def test_a_process_belongs_to_the_consumer_on_whose_port_it_listens(
    nvml_broker: RunningBroker, driver: StandInDriver
) -> None:
    driver.processes = [Process(pid=os.getpid(), mib=3000, name="python3")]
    driver.write()
    seen = until(lambda: nvml_broker.status()["gpus"][0]["processes"])
    assert seen[0]["consumer"] in ("comfyui", "mvoice")


def test_an_unreadable_driver_grants_nothing_and_comes_back(nvml_broker: RunningBroker, driver: StandInDriver) -> None:
    driver.init = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    driver.session += 1
    driver.write()
    refused = until(lambda: nvml_broker.acquire(kind="image").json().get("error"))
    assert (refused["code"], refused["retryable"]) == ("gpu_unreadable", True)
    assert nvml_broker.http.get(f"{nvml_broker.url}/readyz").status_code == 503
    assert nvml_broker.status()["gpus"][0]["readable"] is False
    driver.init = 0
    driver.write()
    until(lambda: nvml_broker.acquire(kind="image").status_code == 200)
    assert "gpu_unreadable" in [event["type"] for event in nvml_broker.status()["events"]]


def test_a_gpu_named_by_uuid_is_the_card_with_that_index(tmp_path: Path, stage: Stage, driver: StandInDriver) -> None:
    config = stage.config()
    config["gpu"] = {}
    config["consumers"]["comfyui"]["gpus"] = [driver.gpus[0].uuid]
    with RunningBroker(tmp_path, config, driver.env()) as broker:
        lease = broker.acquire(kind="image").json()
        assert (lease["gpus"], lease["gpu_uuids"]) == ([0], [driver.gpus[0].uuid])
        other = broker.acquire(kind="llm", wait_seconds=0).json()["error"]
    assert other["code"] == "scheduler_timeout"


def test_without_a_driver_the_broker_serves_and_says_so(tmp_path: Path, stage: Stage) -> None:
    config = stage.config()
    config["gpu"] = {}
    with RunningBroker(tmp_path, config) as broker:
        error = broker.acquire(kind="image").json()["error"]
        missing = broker.http.get(f"{broker.url}/readyz").json()["missing"]
    assert error["code"] == "gpu_unreadable"
    assert "libnvidia-ml.so.1" in error["message"]
    assert "libnvidia-ml.so.1" in missing[0]


def test_a_driver_that_hangs_delays_neither_start_nor_status_nor_expiry(
    tmp_path: Path, stage: Stage, driver: StandInDriver
) -> None:
    config = stage.config()
    config["gpu"] = {}
    config["lease"] = {"min_ttl_seconds": 1, "max_prepare_seconds": 1}
    with RunningBroker(tmp_path, config, driver.env()) as broker:
        lease = broker.acquire(kind="image", ttl_seconds=1).json()
        driver.delay_ms = 3_600_000
        driver.write()
        refused = broker.acquire(kind="llm", wait_seconds=5).json()["error"]
        assert (refused["code"], refused["details"]["step"]) == ("prepare_timeout", "reading the card")
        found = broker.status()
        assert found["leases"] == []
        assert [e["type"] for e in found["events"]].count("expire") == 1
        assert broker.renew(lease["token"]).status_code == 404
        driver.delay_ms = 0
        driver.write()
        until(lambda: broker.acquire(kind="llm").status_code == 200, 10)
