"""The stage as a whole, in this process and as one of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import requests
import yaml

from gpumgr.adapters.simulated import SimulatedProbe, read_card_file
from gpumgr.sim.stage import Stage
from tests.waiting import until


def test_all_four_warm_up_by_their_own_requests(tmp_path: Path) -> None:
    with Stage(tmp_path, speed=50) as stage:
        for name in ("ollama", "mvoice", "whisper"):
            stage.warm(name)
        assert stage.card.free_mib() == 10000
        stage.services["ollama"].die()
        stage.warm("comfyui")
        ports = {service.port: name for name, service in stage.services.items()}
        (gpu,) = SimulatedProbe(read_card_file(stage.card_path), ports).read().gpus
        held = {name: gpu.held_mib(name) for name in stage.services}
        assert held == {"comfyui": 14000, "ollama": 0, "mvoice": 3000, "whisper": 2000}
        assert stage.card.over_commits == 0


def test_another_process_can_drive_it(tmp_path: Path) -> None:
    with Stage(tmp_path, speed=50) as stage:
        url = stage.control.url
        started = requests.post(f"{url}/processes", json={"name": "game", "used_mib": 6000}, timeout=5).json()
        assert stage.card.free_mib() == 18000
        too_much = requests.post(f"{url}/processes", json={"name": "game", "used_mib": 60000}, timeout=5)
        assert too_much.status_code == 409
        assert requests.delete(f"{url}/processes/{started['pid']}", timeout=5).status_code == 200
        assert requests.delete(f"{url}/processes/{started['pid']}", timeout=5).status_code == 404
        assert requests.get(f"{url}/card", timeout=5).json() == stage.card.state()

        stage.warm("mvoice")
        ledger = requests.get(f"{url}/ledger", timeout=5).json()
        assert ledger["over_commits"] == 1
        assert ledger["services"]["mvoice"]["work_calls"] == 1
        assert ledger["services"]["mvoice"]["used_mib"] == 3000
        assert requests.post(f"{url}/die/mvoice", timeout=5).status_code == 200
        assert stage.card.free_mib() == 24000
        assert requests.post(f"{url}/start/mvoice", timeout=5).status_code == 200
        stage.warm("mvoice")


def test_lies_can_be_ordered_from_outside(tmp_path: Path) -> None:
    with Stage(tmp_path, speed=50) as stage:
        faults = f"{stage.control.url}/faults/mvoice"
        shown = requests.post(faults, json={"unhealthy": True, "frees_share": 0.5, "unload_gate": True}, timeout=5)
        assert shown.json()["unload_gate"] is True
        assert (stage.mvoice.faults.unhealthy, stage.mvoice.faults.frees_share) == (True, 0.5)
        gate = stage.mvoice.faults.unload_gate
        assert gate is not None
        requests.post(faults, json={"unload_gate": False}, timeout=5)
        assert gate.is_set()
        assert stage.mvoice.faults.unload_gate is None
        assert requests.post(faults, json={"unhealty": True}, timeout=5).status_code == 400
        assert requests.post(faults, json={"unhealthy": "false"}, timeout=5).status_code == 400
        assert requests.post(f"{stage.control.url}/faults/nobody", json={}, timeout=5).status_code == 404
        requests.post(f"{stage.control.url}/card", json={"unreadable": "no driver"}, timeout=5)
        assert SimulatedProbe(read_card_file(stage.card_path), {}).read().error == "no driver"


def test_the_configuration_fits_the_services(tmp_path: Path) -> None:
    with Stage(tmp_path, speed=50) as stage:
        config = stage.config("127.0.0.1:8770")
        assert config["server"]["bind"] == "127.0.0.1:8770"
        for name, consumer in config["consumers"].items():
            assert consumer["url"] == stage.services[name].url
            for other in consumer.get("can_coexist_with", []):
                assert name in config["consumers"][other]["can_coexist_with"]


def test_as_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpumgr.sim", "--dir", str(tmp_path / "stage"), "--speed", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            addresses = json.loads(process.stdout.readline())
            config = yaml.safe_load(Path(addresses["config"]).read_text())
            assert config["consumers"]["ollama"]["url"] == addresses["services"]["ollama"]
            told = requests.get(addresses["control"], timeout=5).json()
            assert "keeps_memory" in told["faults"]
            assert "POST /faults/SERVICE with a JSON object of faults" in told["routes"]
            requests.post(f"{addresses['control']}/processes", json={"name": "game", "used_mib": 6000}, timeout=5)
            read = SimulatedProbe(read_card_file(Path(addresses["card"])), {}).read
            until(lambda: read().gpus[0].free_mib == 18000)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
