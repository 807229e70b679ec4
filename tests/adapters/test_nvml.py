"""The probe against the stand-in driver, through the real binding."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from gpumgr.adapters.nvml import REOPEN_FOR_GPU_SECONDS, REOPEN_SECONDS, NvmlProbe
from gpumgr.core.card import GpuReading
from tests.stand_in import Gpu, Process, StandInDriver, Step, build_or_skip

GONE = 5_000_001  # Linux gives no pid above 4 194 304, so nothing on this machine is meant
GAME = 5_000_002
WORKER = 5_000_003
UUIDS = ("GPU-11111111-2222-3333-4444-555555555555", "GPU-99999999-8888-7777-6666-555555555555")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_or_skip(tmp_path_factory.getbasetemp() / "stand-in")


@pytest.fixture
def driver(library: Path, tmp_path: Path) -> Iterator[StandInDriver]:
    driver = StandInDriver(library, tmp_path / "card")
    with driver.in_process():
        yield driver


class Hands:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Hands:
    return Hands()


def nobody(_pid: int, _name: str) -> None:
    return None


@pytest.fixture
def probe(driver: StandInDriver, clock: Hands) -> Iterator[NvmlProbe]:
    probe = NvmlProbe(nobody, clock)
    yield probe
    driver.delay_ms = 0
    driver.write()
    probe.close()


def only_gpu(probe: NvmlProbe) -> GpuReading:
    reading = probe.read()
    assert reading.error is None
    assert len(reading.gpus) == 1
    return reading.gpus[0]


def held(gpu: GpuReading) -> dict[int, int | None]:
    return {process.pid: process.used_mib for process in gpu.processes}


# -- memory --


def test_free_rounds_down_and_used_rounds_up(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.gpus[0] = Gpu(total_mib=24_564.9, free_mib=20_000.7, used_mib=4_100.2, reserved_mib=464)
    driver.write()
    gpu = only_gpu(probe)
    assert (gpu.total_mib, gpu.free_mib, gpu.used_mib) == (24_564, 20_000, 4_101)


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NOT_SUPPORTED]
)
def test_without_the_second_version_the_first_is_asked(driver: StandInDriver, probe: NvmlProbe, code: int) -> None:
    driver.gpus[0] = Gpu(free_mib=20_000, used_mib=4_000, reserved_mib=500, memory_v2=code)
    driver.write()
    gpu = only_gpu(probe)
    assert gpu.error is None
    assert (gpu.free_mib, gpu.used_mib) == (20_000, 4_500)


def test_memory_that_no_version_tells_is_an_error_and_not_zero(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.gpus[0].memory_error = pynvml.NVML_ERROR_NOT_SUPPORTED
    driver.processes = [Process(GAME, 100)]
    driver.write()
    gpu = only_gpu(probe)
    assert gpu.error is not None
    assert "does not tell this GPU's memory" in gpu.error
    assert gpu.uuid == driver.gpus[0].uuid
    assert gpu.held_mib("comfyui") is None


def test_a_code_without_a_sentence_of_its_own_is_named(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.gpus[0].memory_error = 888
    driver.write()
    assert only_gpu(probe).error == "the NVIDIA driver answers: stand-in code 888 (NVML code 888)"


# -- processes --


def test_compute_graphics_and_mps_are_one_list_in_which_a_pid_counts_once(
    driver: StandInDriver, probe: NvmlProbe
) -> None:
    driver.processes = [
        Process(GAME, 3_000, "graphics"),
        Process(GAME, 2_900, "compute"),
        Process(WORKER, 500.9, "compute"),
        Process(GONE, 70, "mps"),
    ]
    driver.write()
    gpu = only_gpu(probe)
    assert held(gpu) == {GAME: 3_000, WORKER: 500, GONE: 70}
    assert gpu.processes_readable


def test_no_process_at_all_is_a_readable_answer(probe: NvmlProbe) -> None:
    gpu = only_gpu(probe)
    assert gpu.processes == ()
    assert gpu.processes_readable
    assert gpu.held_mib("comfyui") == 0


@pytest.mark.parametrize("kinds", [("compute",), ("compute", "graphics")])
def test_memory_of_a_process_that_the_driver_withholds_is_none(
    driver: StandInDriver, probe: NvmlProbe, kinds: tuple[str, ...]
) -> None:
    driver.processes = [Process(WORKER, None, "compute")]
    if "graphics" in kinds:
        driver.processes.append(Process(WORKER, 300, "graphics"))
    driver.write()
    gpu = only_gpu(probe)
    assert held(gpu) == {WORKER: None}
    assert gpu.processes_readable


def test_a_list_the_gpu_does_not_have_is_left_out_while_the_other_is_told(
    driver: StandInDriver, probe: NvmlProbe
) -> None:
    unsupported = pynvml.NVML_ERROR_NOT_SUPPORTED
    driver.gpus[0].list_errors = {"graphics": unsupported, "mps": unsupported}
    driver.processes = [Process(WORKER, 500)]
    driver.write()
    gpu = only_gpu(probe)
    assert held(gpu) == {WORKER: 500}
    assert gpu.processes_readable


def test_neither_list_supported_is_not_an_empty_list(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.gpus[0].list_errors = dict.fromkeys(("compute", "graphics"), pynvml.NVML_ERROR_NOT_SUPPORTED)
    driver.gpus[0].free_mib = 9_000
    driver.write()
    gpu = only_gpu(probe)
    assert (gpu.readable, gpu.free_mib, gpu.processes_readable) == (True, 9_000, False)
    assert gpu.held_mib("comfyui") is None


def test_a_list_that_is_denied_makes_the_processes_unreadable(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.gpus[0].list_errors = {"compute": pynvml.NVML_ERROR_NO_PERMISSION}
    driver.processes = [Process(GAME, 800, "graphics")]
    driver.write()
    gpu = only_gpu(probe)
    assert held(gpu) == {GAME: 800}
    assert not gpu.processes_readable


@pytest.mark.skipif(
    not hasattr(pynvml, "nvmlDeviceGetComputeRunningProcesses_v2"), reason="the binding of 12.535 lacks it"
)
def test_older_drivers_list_through_the_second_version(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.missing = ["nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"]
    driver.processes = [Process(WORKER, 500), Process(GAME, 800, "graphics")]
    driver.write()
    assert held(only_gpu(probe)) == {WORKER: 500, GAME: 800}


def test_a_driver_without_any_of_the_lists_is_unreadable_and_not_empty(driver: StandInDriver, probe: NvmlProbe) -> None:
    names = [f"nvmlDeviceGet{kind}RunningProcesses" for kind in ("Compute", "Graphics", "MPSCompute")]
    driver.missing = [f"{name}_{version}" for name in names for version in ("v2", "v3")]
    driver.processes = [Process(WORKER, 500)]
    driver.write()
    gpu = only_gpu(probe)
    assert (gpu.readable, gpu.processes, gpu.processes_readable) == (True, (), False)


def test_processes_that_start_between_size_and_list_are_listed(driver: StandInDriver, probe: NvmlProbe) -> None:
    """The first two answers say one process; there are thirty, more than the room the binding adds."""
    driver.processes = [Process(GONE + number, 10) for number in range(30)]
    driver.understate = 2
    driver.write()
    gpu = only_gpu(probe)
    assert len(gpu.processes) == 30
    assert gpu.processes_readable


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("/opt/ComfyUI/venv/bin/python3", "python3"),
        (r"C:\Games\Wild Hunt\witcher3.exe", "witcher3.exe"),
        (r"Z:\home\me/games\a b.exe", "a b.exe"),
        ("/opt/chrome/chrome --type=gpu-process --crash=/a/b", "chrome"),
        ("/", "/"),
        ("", f"pid {GAME}"),
    ],
)
def test_the_shown_name_is_the_last_component(driver: StandInDriver, probe: NvmlProbe, told: str, shown: str) -> None:
    driver.processes = [Process(GAME, 1, name=told)]
    driver.write()
    assert [p.name for p in only_gpu(probe).processes] == [shown]


def test_a_process_the_driver_cannot_name_is_named_by_the_system(driver: StandInDriver, probe: NvmlProbe) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            driver.processes = [Process(child.pid, 1)]
            driver.write()
            assert [p.name for p in only_gpu(probe).processes] == ["sleep"]
        finally:
            child.kill()


def test_a_name_that_is_no_text_does_not_spoil_the_reading(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.processes = [Process(GAME, 1, name="LATIN")]
    driver.write()
    driver.state_file.write_bytes(driver.state_file.read_bytes().replace(b"LATIN", b"caf\xe9"))
    assert [p.name for p in only_gpu(probe).processes] == [f"pid {GAME}"]


def test_the_owner_is_asked_once_a_pid_with_the_whole_name(driver: StandInDriver, clock: Hands) -> None:
    asked: list[tuple[int, str]] = []

    def owner(pid: int, name: str) -> str:
        asked.append((pid, name))
        return "comfyui"

    driver.gpus.append(Gpu(uuid=UUIDS[1]))
    driver.processes = [Process(WORKER, 100, name="/opt/ComfyUI/python"), Process(WORKER, 200, gpu=1)]
    driver.write()
    probe = NvmlProbe(owner, clock)
    gpus = probe.read().gpus
    probe.close()
    assert asked == [(WORKER, "/opt/ComfyUI/python")]
    assert [gpu.held_mib("comfyui") for gpu in gpus] == [100, 200]


def test_an_owner_that_raises_is_told_and_not_raised(driver: StandInDriver, clock: Hands) -> None:
    def owner(_pid: int, _name: str) -> None:
        raise ValueError("no idea")

    driver.processes = [Process(WORKER, 100)]
    driver.write()
    probe = NvmlProbe(owner, clock)
    error = probe.read().error
    probe.close()
    assert error is not None
    assert "no idea" in error


# -- memory and processes that belong together --


def test_a_process_that_grew_meanwhile_is_read_again(driver: StandInDriver, probe: NvmlProbe) -> None:
    """Lists say 0, 4000, 4000; the free memory that goes with 4000 is the second."""
    driver.processes = []
    driver.then = [Step([Process(WORKER, 4_000)])]
    driver.gpus[0].total_mib = 10_000
    driver.write()
    gpu = only_gpu(probe)
    assert held(gpu) == {WORKER: 4_000}
    assert gpu.free_mib == 6_000


def test_a_card_that_does_not_settle_is_told_with_the_lower_numbers(driver: StandInDriver, probe: NvmlProbe) -> None:
    """Lists: four different ones. Memory: 5000, 2000, 3000. The last two lists and the least memory count."""
    driver.processes = [Process(WORKER, 100), Process(GONE, 5)]
    driver.then = [
        Step([Process(WORKER, 200)], {0: 2_000}),
        Step([Process(WORKER, 700), Process(GAME, 60)], {0: 3_000}),
        Step([Process(WORKER, 300), Process(GAME, 90), Process(GONE, 8)], {0: 9_999}),
    ]
    driver.gpus[0].free_mib = 5_000
    driver.write()
    gpu = only_gpu(probe)
    assert held(gpu) == {WORKER: 300, GAME: 60, GONE: 0}
    assert gpu.free_mib == 2_000
    assert gpu.processes_readable


def test_withheld_stays_withheld_on_a_card_that_does_not_settle(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.processes = [Process(WORKER, None), Process(GAME, 1)]
    driver.then = [Step([Process(WORKER, None), Process(GAME, number)]) for number in (2, 3, 4)]
    driver.write()
    assert held(only_gpu(probe)) == {WORKER: None, GAME: 3}


# -- several GPUs, lost GPUs --


def test_each_gpu_has_its_own_numbers_and_is_found_by_uuid(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.gpus = [Gpu(UUIDS[0], "RTX 3090", 24_576), Gpu(UUIDS[1], "RTX 4060", 8_188, free_mib=8_000)]
    driver.processes = [Process(WORKER, 6_000), Process(WORKER, 100, gpu=1)]
    driver.write()
    reading = probe.read()
    first, second = reading.gpu(UUIDS[0]), reading.gpu(UUIDS[1])
    assert first is not None
    assert second is not None
    assert (first.index, first.name, first.free_mib, held(first)) == (0, "RTX 3090", 18_576, {WORKER: 6_000})
    assert (second.index, second.name, second.free_mib, held(second)) == (1, "RTX 4060", 8_000, {WORKER: 100})


@pytest.mark.parametrize("place", ["handle", "memory", "compute", "mps"])
def test_a_lost_gpu_is_told_beside_the_others_and_comes_back(
    driver: StandInDriver, probe: NvmlProbe, clock: Hands, place: str
) -> None:
    driver.gpus = [Gpu(UUIDS[0]), Gpu(UUIDS[1], free_mib=7_000)]
    driver.write()
    assert probe.read().problems([0, 1]) == []

    lost, code = driver.gpus[1], pynvml.NVML_ERROR_GPU_IS_LOST
    if place == "handle":
        lost.handle_error = code
    elif place == "memory":
        lost.memory_error = code
    else:
        lost.list_errors = {"compute": code} if place == "compute" else {"mps": code}
    driver.write()
    reading = probe.read()
    (problem,) = reading.problems([0, UUIDS[1]])
    assert problem.startswith(f"GPU {UUIDS[1]}: the GPU is lost")
    assert reading.gpus[0].readable

    driver.gpus[1] = Gpu(UUIDS[1], free_mib=7_000)
    driver.write()
    clock.now += REOPEN_SECONDS
    assert probe.read().problems([0, 1]) == []
    assert driver.log == ["init 0"]


def test_a_gpu_that_stays_lost_gets_a_new_session_now_and_then(
    driver: StandInDriver, probe: NvmlProbe, clock: Hands
) -> None:
    driver.gpus[0].memory_error = pynvml.NVML_ERROR_RESET_REQUIRED
    driver.write()
    for _ in range(5):
        assert not only_gpu(probe).readable
        clock.now += REOPEN_FOR_GPU_SECONDS / 4
    assert driver.log == ["init 0", "shutdown 0", "init 0"]


def test_a_gpu_that_is_lost_from_the_start_of_a_session_keeps_its_uuid(
    driver: StandInDriver, probe: NvmlProbe, clock: Hands
) -> None:
    assert only_gpu(probe).uuid == driver.gpus[0].uuid
    driver.gpus[0].handle_error = pynvml.NVML_ERROR_GPU_IS_LOST
    driver.session += 1
    driver.write()
    clock.now += REOPEN_SECONDS
    assert probe.read().error is not None
    assert only_gpu(probe).uuid == driver.gpus[0].uuid


def test_indexes_mean_other_gpus_once_one_was_taken_out(driver: StandInDriver, probe: NvmlProbe, clock: Hands) -> None:
    driver.gpus = [Gpu(UUIDS[0]), Gpu(UUIDS[1])]
    driver.write()
    probe.read()
    driver.gpus = [Gpu(UUIDS[1], handle_error=pynvml.NVML_ERROR_GPU_IS_LOST)]
    driver.session += 1
    driver.write()
    clock.now += REOPEN_SECONDS
    assert probe.read().error is not None
    assert only_gpu(probe).uuid is None


# -- the driver as a whole --


def test_nothing_is_opened_before_the_first_reading(driver: StandInDriver, clock: Hands) -> None:
    probe = NvmlProbe(nobody, clock)
    assert driver.log == []
    probe.close()
    assert driver.log == []
    probe.read()
    probe.close()
    assert driver.log == ["init 0", "shutdown 0"]


def test_a_driver_that_fails_to_open_is_asked_once_a_second_until_it_does(
    driver: StandInDriver, probe: NvmlProbe, clock: Hands
) -> None:
    driver.init = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    driver.write()
    for _ in range(8):
        assert probe.read().error == "the NVIDIA kernel driver is not loaded: run nvidia-smi to see why"
        clock.now += REOPEN_SECONDS / 4
    assert driver.log == ["init 9", "init 9"]

    driver.init = 0
    driver.write()
    assert only_gpu(probe).readable


def test_a_session_that_the_driver_ended_is_opened_again_at_once(
    driver: StandInDriver, probe: NvmlProbe, clock: Hands
) -> None:
    assert only_gpu(probe).readable
    clock.now += REOPEN_SECONDS
    driver.session += 1
    driver.write()
    reading = probe.read()
    assert reading.gpus == ()
    assert reading.error == "the NVIDIA driver has ended our session; it is opened again within a second"
    assert only_gpu(probe).readable
    assert driver.log == ["init 0", "shutdown 0", "init 0"]


def test_sessions_that_end_at_once_are_opened_once_a_second(
    driver: StandInDriver, probe: NvmlProbe, clock: Hands
) -> None:
    driver.missing = ["nvmlDeviceGetCount_v2"]
    driver.write()
    for _ in range(40):
        assert probe.read().error == "the NVIDIA driver answers: Function Not Found (NVML code 13)"
        clock.now += 0.025
    assert driver.log == ["init 0", "shutdown 0"]


def test_a_driver_unloaded_while_it_is_read_is_the_driver_s_failure(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.gpus[0].memory_error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    driver.write()
    reading = probe.read()
    assert reading.gpus == ()
    assert reading.error is not None
    assert "reboot" in reading.error


@pytest.mark.parametrize(
    "failure",
    [
        getattr(pynvml, "NVMLLibraryMismatchError", Exception)("versions differ"),
        OSError("broken"),
        AttributeError("no such call"),
    ],
)
def test_what_is_no_nvml_error_is_told_too(
    probe: NvmlProbe,
    clock: Hands,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
) -> None:
    def fails() -> int:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(pynvml, "nvmlDeviceGetCount", fails)
        error = probe.read().error
    assert error is not None
    assert str(failure) in error
    clock.now += REOPEN_SECONDS
    assert only_gpu(probe).readable


def test_read_at_is_from_before_the_first_question(driver: StandInDriver, clock: Hands) -> None:
    def owner(_pid: int, _name: str) -> None:
        clock.now += 5

    driver.processes = [Process(WORKER, 1)]
    driver.write()
    probe = NvmlProbe(owner, clock)
    assert probe.read().read_at == 100.0
    probe.close()


def test_no_library_at_all_is_told(tmp_path: Path) -> None:
    """In a process of its own: here a driver is loaded already. LD_LIBRARY_PATH first finds what is no library."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library", encoding="ascii")
    error = reading_in_a_subprocess({"LD_LIBRARY_PATH": str(tmp_path)})
    assert error == "libnvidia-ml.so.1 was not found: install the NVIDIA driver, or give the container its GPU"


def test_a_subprocess_finds_the_driver_by_its_environment(driver: StandInDriver) -> None:
    assert reading_in_a_subprocess(driver.env()) == f"None {driver.gpus[0].uuid}"


def reading_in_a_subprocess(env: dict[str, str]) -> str:
    script = (
        "from gpumgr.adapters.nvml import NvmlProbe\n"
        "probe = NvmlProbe(lambda pid, name: None)\n"
        "reading = probe.read()\n"
        "print(reading.error, *(gpu.uuid for gpu in reading.gpus))\n"
        "probe.close()\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


# -- threads and cost --


def test_many_threads_may_read_at_a_time(driver: StandInDriver, probe: NvmlProbe) -> None:
    driver.processes = [Process(WORKER, 500, name="python")]
    driver.write()
    wrong: list[object] = []

    def read() -> None:
        for _ in range(20):
            gpu = probe.read().gpu(0)
            if gpu is None or held(gpu) != {WORKER: 500}:
                wrong.append(gpu)

    run_all([threading.Thread(target=read) for _ in range(8)])
    assert wrong == []
    assert driver.log == ["init 0"]


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_close_does_not_wait_for_a_driver_that_hangs(
    driver: StandInDriver, probe: NvmlProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpumgr.adapters.nvml.CLOSE_SECONDS", 0.05)
    driver.delay_ms = 3_600_000
    driver.write()
    reader = threading.Thread(target=probe.read)
    reader.start()
    wait_until(probe._lock.locked)
    probe.close()
    assert reader.is_alive()
    driver.delay_ms = 0
    driver.write()
    reader.join(timeout=20)
    assert not reader.is_alive()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_reading_at_rest_asks_for_names_only_once(
    driver: StandInDriver, probe: NvmlProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = pynvml.nvmlSystemGetProcessName

    def name_of(pid: int) -> str:
        asked.append(pid)
        return str(real(pid))

    monkeypatch.setattr(pynvml, "nvmlSystemGetProcessName", name_of)
    driver.processes = [Process(os.getpid(), 500, name="/usr/bin/pytest")]
    driver.write()
    for _ in range(3):
        assert [p.name for p in only_gpu(probe).processes] == ["pytest"]
    assert asked == [os.getpid()]
