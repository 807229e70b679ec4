"""The ledger itself: what does not fit is refused and counted, and the file is whole at any moment."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from gpumgr.sim.card import FIRST_PID, NoSuchProcess, OutOfMemory, SimulatedCard, SimulatedGpu
from gpumgr.sim.untracked import game


def test_memory_is_whoever_takes_it_until_the_process_ends(card: SimulatedCard) -> None:
    pid = card.start_process("comfyui", port=8188)
    assert pid == FIRST_PID
    card.allocate(pid, 14000)
    card.free(pid, 4000)
    assert (card.used_mib(pid), card.free_mib()) == (10000, 14000)
    card.end_process(pid)
    card.end_process(pid)
    assert (card.used_mib(pid), card.free_mib()) == (0, 24000)
    with pytest.raises(NoSuchProcess):
        card.allocate(pid, 1)


def test_what_does_not_fit_is_refused_whole_and_counted(card: SimulatedCard) -> None:
    pid = card.start_process("comfyui")
    card.allocate(pid, 20000)
    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        card.allocate(pid, 4001)
    assert (card.used_mib(pid), card.over_commits) == (20000, 1)
    card.allocate(pid, 4000)
    with pytest.raises(OutOfMemory):
        game(card, mib=1)
    assert card.over_commits == 2


def test_a_game_breathes(card: SimulatedCard) -> None:
    played = game(card, "game", 6000)
    played.set_used(8000)
    assert card.free_mib() == 16000
    assert [change.used_mib for change in card.history] == [6000, 8000]
    played.end()
    assert card.history[-1].free_mib == 24000


def test_gpus_are_separate() -> None:
    card = SimulatedCard([SimulatedGpu(0, 8000, "GPU-a"), SimulatedGpu(1, 4000, "GPU-b")])
    pid = card.start_process("both", gpu=1)
    card.allocate(pid, 3000)
    card.allocate(pid, 7000, gpu=0)
    assert (card.free_mib(0), card.free_mib(1)) == (1000, 1000)


def test_the_file_is_the_state(tmp_path: Path) -> None:
    card = SimulatedCard(path=tmp_path / "card.json")
    pid = card.start_process("ollama", port=11434)
    card.allocate(pid, 9000)
    card.unreadable = "the driver was updated under us"
    written = json.loads((tmp_path / "card.json").read_text())
    assert written == card.state()
    assert written["unreadable"] == "the driver was updated under us"
    assert written["gpus"][0]["processes"] == [{"pid": pid, "name": "ollama", "used_mib": 9000, "port": 11434}]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    card = SimulatedCard(path=path)
    pids = [card.start_process("writer" * 50) for _ in range(4)]

    def write(pid: int) -> None:
        for mib in range(100):
            card.set_used(pid, mib)

    writers = [threading.Thread(target=write, args=(pid,)) for pid in pids]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert json.loads(path.read_text())["gpus"][0]["total_mib"] == 24000
        reads += 1
    for writer in writers:
        writer.join()
    assert reads > 0
    assert [file.name for file in tmp_path.iterdir()] == ["card.json"]
