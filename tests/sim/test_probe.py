"""The simulated driver's words, translated: unreadable is not zero."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from gpumgr.adapters.simulated import SimulatedProbe, read_card_file
from gpumgr.core.card import GpuProcess, GpuReading, Reading
from gpumgr.sim.card import SimulatedCard
from gpumgr.sim.untracked import game


def probe(card: SimulatedCard) -> SimulatedProbe:
    return SimulatedProbe(card.state, {8188: "comfyui"}, clock=lambda: 7.0)


def only_gpu(reading: Reading) -> GpuReading:
    assert reading.error is None
    (gpu,) = reading.gpus
    return gpu


def test_a_port_leads_to_its_consumer_and_none_to_nobody(card: SimulatedCard) -> None:
    pid = card.start_process("python", port=8188)
    card.allocate(pid, 14000)
    played = game(card, "game", 6000)
    reading = probe(card).read()
    gpu = only_gpu(reading)
    assert reading.read_at == 7.0
    assert (gpu.total_mib, gpu.used_mib, gpu.free_mib) == (24000, 20000, 4000)
    assert gpu.held_mib("comfyui") == 14000
    assert gpu.untracked == (GpuProcess(played.pid, "game", 6000, None),)


def test_an_idle_process_without_a_context_is_not_listed(card: SimulatedCard) -> None:
    card.start_process("python", port=8188)
    assert only_gpu(probe(card).read()).processes == ()


def test_a_driver_that_cannot_be_read(card: SimulatedCard) -> None:
    card.unreadable = "Driver/library version mismatch"
    reading = probe(card).read()
    assert (reading.error, reading.gpus) == ("Driver/library version mismatch", ())
    card.unreadable = None
    assert probe(card).read().error is None


def test_one_gpu_that_cannot_be_read(card: SimulatedCard) -> None:
    card.set_gpu_error("GPU is lost")
    gpu = only_gpu(probe(card).read())
    assert not gpu.readable
    assert gpu.held_mib("comfyui") is None


def test_withheld_memory_is_none_while_the_gpu_still_tells_its_own(card: SimulatedCard) -> None:
    pid = card.start_process("python", port=8188)
    card.allocate(pid, 14000)
    card.set_used_readable(pid, False)
    gpu = only_gpu(probe(card).read())
    assert (gpu.held_mib("comfyui"), gpu.free_mib) == (None, 10000)
    card.set_processes_readable(False)
    gpu = only_gpu(probe(card).read())
    assert (gpu.processes_readable, gpu.processes, gpu.free_mib) == (False, (), 10000)


def test_without_a_file_the_card_is_empty(tmp_path: Path) -> None:
    gpu = only_gpu(SimulatedProbe(read_card_file(tmp_path / "none.json"), {}).read())
    assert (gpu.name, gpu.total_mib, gpu.free_mib) == ("Simulated GPU", 24000, 24000)


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    card = SimulatedCard(path=tmp_path / "card.json")
    from_file = SimulatedProbe(read_card_file(tmp_path / "card.json"), {8188: "comfyui"})
    assert only_gpu(from_file.read()).used_mib == 0
    card.allocate(card.start_process("python", port=8188), 14000)
    assert only_gpu(from_file.read()).held_mib("comfyui") == 14000


GPU: dict[str, object] = {"index": 0, "uuid": None, "name": "x", "total_mib": 100, "processes": []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"gpus": {}}',
        '{"gpus": [1]}',
        json.dumps({"gpus": [GPU | {"total_mib": "many"}]}),
        json.dumps({"gpus": [GPU | {"total_mib": True}]}),
        json.dumps({"gpus": [GPU | {"used_mib": 101}]}),
        json.dumps({"gpus": [GPU | {"processes": [{"pid": 1, "name": "x", "used_mib": None, "port": None}]}]}),
        json.dumps({"gpus": [GPU | {"processes": [{"pid": 1, "name": "x", "used_mib": -1, "port": None}]}]}),
    ],
)
def test_garbled_is_an_error_and_never_a_free_card(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)
    reading = SimulatedProbe(read_card_file(tmp_path / "card.json"), {}).read()
    assert reading.error is not None
    assert reading.gpus == ()


def test_a_source_that_raises_is_an_error() -> None:
    def broken() -> Mapping[str, object]:
        raise RuntimeError("no card today")

    assert "no card today" in str(SimulatedProbe(broken, {}).read().error)
