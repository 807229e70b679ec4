"""llama_server, vllm, systemd, docker and command on real sockets and processes, and what presets send."""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumgr import config
from gpumgr.adapters.dialects import REGISTERED, dialect_of
from gpumgr.adapters.dialects.http import Http
from gpumgr.adapters.dialects.programs import run
from gpumgr.adapters.dialects.systemd import Systemd
from gpumgr.config.dialects import DIALECTS
from gpumgr.config.presets import presets
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError
from gpumgr.sim.card import SimulatedCard
from gpumgr.sim.llama_server import LlamaServer
from gpumgr.sim.speech import Speech
from tests.adapters.test_dialects import Wire, raw, refusal, says
from tests.keepers import Engine, Executable, Keeper
from tests.waiting import until


def written(tmp_path: Path, **keys: Any) -> Http:
    """The dialect of one consumer as the file has it."""
    file = tmp_path / "consumers.yaml"
    file.write_text(yaml.safe_dump({"consumers": {"it": {"vram_resident_mib": 1000} | keys}}), encoding="utf-8")
    return dialect_of(config.load_file(file).consumers["it"])


def test_the_file_knows_every_dialect_there_is() -> None:
    assert set(DIALECTS) == set(REGISTERED)


# -- llama_server -------------------------------------------------------------------------------------------


@pytest.fixture
def llama() -> Iterator[LlamaServer]:
    with LlamaServer("llama", SimulatedCard(), models={"a/b:Q4": 2000, "c": 3000}, load_seconds=0.0) as server:
        yield server


def bring(server: LlamaServer, *models: str) -> None:
    for model in models:
        server._bring(model)


def test_llama_server_unloads_what_is_loaded_by_name(llama: LlamaServer, tmp_path: Path) -> None:
    bring(llama, "a/b:Q4")
    dialect = written(tmp_path, dialect="llama_server", url=llama.url)
    dialect.health()
    assert dialect.loaded() == LoadedReport(loaded=True)
    dialect.unload(2)
    until(lambda: llama.used_mib == llama.context_mib)
    assert (llama.unload_calls, dialect.loaded()) == (1, LoadedReport(loaded=False))


@pytest.mark.parametrize("has_metrics", [True, False])
def test_llama_server_is_asked_whether_it_computes_and_nobody_is_woken(
    llama: LlamaServer, tmp_path: Path, has_metrics: bool
) -> None:
    llama.has_metrics = has_metrics
    bring(llama, "a/b:Q4", "c")
    llama.sleep("c")
    dialect = written(tmp_path, dialect="llama_server", url=llama.url)
    assert dialect.busy() is False
    with llama._working_on("a/b:Q4"):
        assert dialect.busy() is True
    assert llama.woken == 0
    assert ("GET", "/slots") not in [call[1:] for call in llama.calls] or not has_metrics


def test_llama_server_that_loads_is_busy(tmp_path: Path) -> None:
    with Wire([says({"data": [{"id": "m", "status": {"value": "loading"}}]})]) as wire:
        assert written(tmp_path, dialect="llama_server", url=wire.url).busy() is True


def test_llama_server_with_one_model_says_that_it_cannot_unload(llama: LlamaServer, tmp_path: Path) -> None:
    llama.single = True
    dialect = written(tmp_path, dialect="llama_server", url=llama.url)
    assert "start it as a router" in str(refusal(lambda: dialect.unload(2)))
    assert (dialect.busy(), dialect.loaded()) == (False, LoadedReport(loaded=True))


@pytest.mark.parametrize("answer", [{}, [], {"data": [{"id": "m", "status": 7}]}, {"data": 1}])
def test_llama_server_whose_list_is_none_is_a_failure(tmp_path: Path, answer: object) -> None:
    with Wire([says(answer)]) as wire:
        assert refusal(written(tmp_path, dialect="llama_server", url=wire.url).busy).reason == "failed"


# -- vllm ---------------------------------------------------------------------------------------------------


def text(body: str) -> Any:
    return raw(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


@pytest.mark.parametrize(
    ("metrics", "busy"),
    [
        ('vllm:num_requests_running{engine="0"} 0.0\nvllm:num_requests_waiting{engine="0"} 0.0\n', False),
        ('vllm:num_requests_running{engine="0"} 0.0\nvllm:num_requests_waiting{engine="0"} 1.0 1700000\n', True),
        ('vllm:num_requests_running{a="}"} 0\nvllm:num_requests_running{e="1"} 2e0\nvllm:num_requests_waiting 0', True),
    ],
)
def test_vllm_is_busy_with_what_runs_and_what_waits(tmp_path: Path, metrics: str, busy: bool) -> None:
    with Wire([text(metrics)]) as wire:
        assert written(tmp_path, dialect="vllm", url=wire.url).busy() is busy


@pytest.mark.parametrize(
    "metrics", ["", "vllm:num_requests_running 0\n", "vllm:num_requests_running nan\nvllm:num_requests_waiting 0\n"]
)
def test_vllm_that_does_not_tell_is_a_failure_not_idle(tmp_path: Path, metrics: str) -> None:
    with Wire([text(metrics)]) as wire:
        assert refusal(written(tmp_path, dialect="vllm", url=wire.url).busy).reason == "failed"


def test_vllm_sleeps_and_is_woken(tmp_path: Path) -> None:
    with Wire([says(), says({"is_sleeping": True}), says({"is_sleeping": True}), says()]) as wire:
        dialect = written(tmp_path, dialect="vllm", url=wire.url)
        dialect.unload(2)
        assert dialect.loaded() == LoadedReport(loaded=False)
        dialect.load()
    assert [call[:2] for call in wire.calls] == [
        ("POST", "/sleep?level=1"), ("GET", "/is_sleeping"), ("GET", "/is_sleeping"), ("POST", "/wake_up"),
    ]  # fmt: skip


def test_vllm_of_level_2_is_given_its_weights_again(tmp_path: Path) -> None:
    with Wire([says({"is_sleeping": True}), says()]) as wire:
        written(tmp_path, dialect="vllm", url=wire.url, unload={"path": "/sleep?level=2"}).load()
    assert wire.calls[1:] == [
        ("POST", "/wake_up", None), ("POST", "/collective_rpc", {"method": "reload_weights"}),
    ]  # fmt: skip


def test_vllm_without_its_developer_mode_says_how_to_start_it(tmp_path: Path) -> None:
    with Wire([says({"detail": "Not Found"}, 404)]) as wire:
        dialect = written(tmp_path, dialect="vllm", url=wire.url)
        said = str(refusal(lambda: dialect.unload(2)))
        assert "VLLM_SERVER_DEV_MODE=1" in said
        assert "--enable-sleep-mode" in said
        assert dialect.loaded() == LoadedReport(loaded=True)
        dialect.load()  # it never sleeps: there is nothing to wake
    assert ("POST", "/wake_up", None) not in wire.calls


# -- programs -----------------------------------------------------------------------------------------------

PYTHON = sys.executable
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print(child.pid, flush=True)
"""


def test_a_program_is_killed_with_its_group_when_its_time_is_over() -> None:
    script = (PARENT + "time.sleep(60)").replace("import", "print('begins', flush=True); import", 1)
    began = time.monotonic()
    error = refusal(lambda: run((PYTHON, "-c", script), 1.5))
    assert time.monotonic() - began < 10
    assert error.reason == "hung"
    assert "did not end within 1.5 s begins" in str(error)
    child = int(str(error).split()[-1])
    until(lambda: _gone(child))


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_a_program_leaves_running_is_not_waited_for() -> None:
    ended = run((PYTHON, "-c", PARENT), 20)
    pid = int(ended.said)
    assert not _gone(pid)
    os.kill(pid, 9)


def test_a_program_fails_with_the_end_of_what_it_said_and_no_input() -> None:
    script = "import sys; print('x' * 100000); print('no', 'card', sys.stdin.read() == '', file=sys.stderr); exit(3)"
    error = refusal(lambda: run((PYTHON, "-c", script), 20).require())
    assert "exits with 3" in str(error)
    assert str(error).endswith("no card True")
    assert len(str(error)) < 400


def test_no_shell_reads_arguments(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    assert run((PYTHON, "-c", "import sys; print(sys.argv[1:])", f"$(touch {marker})", ";"), 20).said.endswith("';']")
    assert not marker.exists()


def test_a_program_that_is_not_there_is_a_failure() -> None:
    assert "cannot be run" in str(refusal(lambda: run(("/nowhere/ctl",), 1)))


# -- what stops and starts a service ------------------------------------------------------------------------


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    service = Speech("it", SimulatedCard())
    service.start()
    service.stop()
    yield Keeper(service)
    service.stop()


def kept(kind: str, tmp_path: Path, keeper: Keeper, stack: ExitStack, *, url: bool = True) -> Http:
    keys: dict[str, Any] = {"dialect": kind, "load": {"timeout_seconds": 5}}
    if url:
        keys |= {"url": keeper.service.url, "health": {"path": "/health"}}
    if kind == "systemd":
        dialect = written(tmp_path, **keys, unit="it")
        assert isinstance(dialect, Systemd)
        dialect.systemctl = str(stack.enter_context(Executable(tmp_path, "systemctl", keeper)).program)
        return dialect
    if kind == "docker":
        return written(
            tmp_path, **keys, container="it", socket=stack.enter_context(Engine(tmp_path, "it", keeper)).path
        )
    program = str(stack.enter_context(Executable(tmp_path, "ctl", keeper)).program)
    keys["load"] |= {"command": [program, "start"], "starts_service": True}
    return written(tmp_path, **keys, unload={"command": [program, "stop"]}, loaded={"command": [program, "loaded"]})


@pytest.mark.parametrize("kind", ["systemd", "docker", "command"])
def test_a_service_that_is_stopped_on_purpose_is_not_unhealthy(kind: str, tmp_path: Path, keeper: Keeper) -> None:
    with ExitStack() as stack:
        dialect = kept(kind, tmp_path, keeper, stack)
        assert (dialect.can_unload, dialect.can_load, dialect.load_starts_service) == (True, True, True)
        assert refusal(dialect.health).stopped
        dialect.load()
        dialect.health()
        if kind != "command":
            assert dialect.loaded() == LoadedReport(loaded=True)
        keeper.service.faults.unhealthy = True
        assert not refusal(dialect.health).stopped
        dialect.unload(5)
        assert (keeper.runs, refusal(dialect.health).stopped) == (False, True)


@pytest.mark.parametrize("kind", ["systemd", "docker", "command"])
def test_a_service_that_starts_and_does_not_serve_is_a_failed_load(kind: str, tmp_path: Path, keeper: Keeper) -> None:
    keeper.service.faults.unhealthy = True
    with ExitStack() as stack:
        dialect = kept(kind, tmp_path, keeper, stack)
        settings = dialect._settings
        assert settings.load is not None
        object.__setattr__(settings.load, "timeout_seconds", 0.5 if kind == "docker" else 2.0)  # a program must begin
        error = refusal(dialect.load)
    assert error.reason == "hung"
    assert "answers 503" in str(error)


def test_systemd_is_asked_without_a_password_and_for_its_own_scope(tmp_path: Path, keeper: Keeper) -> None:
    with Executable(tmp_path, "systemctl", keeper) as systemctl:
        dialect = written(tmp_path, dialect="systemd", unit="it", scope="user")
        assert isinstance(dialect, Systemd)
        dialect.systemctl = str(systemctl.program)
        dialect.load()
        dialect.unload(5)
    assert systemctl.asked[0] == ["systemctl", "--no-ask-password", "--user", "start", "--", "it.service"]
    assert systemctl.asked[-1] == ["systemctl", "--no-ask-password", "--user", "stop", "--", "it.service"]


@pytest.mark.parametrize(
    ("shown", "stopped", "word"),
    [
        ("LoadState=loaded\nActiveState=inactive\nSubState=dead\nResult=success", True, "inactive"),
        ("LoadState=loaded\nActiveState=failed\nSubState=failed\nResult=oom-kill", False, "oom-kill"),
        ("LoadState=not-found\nActiveState=inactive", False, "see scope and unit"),
        ("LoadState=loaded\nActiveState=activating\nSubState=auto-restart", False, "activating"),
        ("nonsense", False, "tells no state"),
    ],
)
def test_what_systemd_says_of_a_unit(tmp_path: Path, shown: str, stopped: bool, word: str) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\ncat <<X\n{shown}\nX\n", encoding="utf-8")
    program.chmod(0o755)
    dialect = written(tmp_path, dialect="systemd", unit="it")
    assert isinstance(dialect, Systemd)
    dialect.systemctl = str(program)
    error = refusal(dialect.health)
    assert (error.stopped, word in str(error)) == (stopped, True)


@pytest.mark.parametrize(
    ("state", "stopped", "word"),
    [
        ({"Status": "exited", "ExitCode": 0}, True, "exited"),
        ({"Status": "exited", "ExitCode": 137, "OOMKilled": True}, False, "out of memory"),
        ({"Status": "running", "Health": {"Status": "unhealthy"}}, False, "unhealthy"),
        ({"Status": "running", "Health": {"Status": "starting"}}, False, "starting"),
        ({"Status": "paused"}, False, "paused"),
        ({}, False, "no state"),
    ],
)
def test_what_an_engine_says_of_a_container(tmp_path: Path, state: dict[str, Any], stopped: bool, word: str) -> None:
    answers = socketserver.UnixStreamServer(str(tmp_path / "e.sock"), engine_that_says({"State": state}))
    threading.Thread(target=answers.handle_request, daemon=True).start()
    with answers:
        dialect = written(tmp_path, dialect="docker", container="it", socket=str(tmp_path / "e.sock"))
        error = refusal(dialect.health)
    assert (error.stopped, word in str(error)) == (stopped, True)


def engine_that_says(content: object) -> type[socketserver.StreamRequestHandler]:
    class Call(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            assert self.rfile.readline() == b"GET /containers/it/json HTTP/1.1\r\n"
            body = json.dumps(content).encode()
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    return Call


def test_an_engine_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    dialect = written(tmp_path, dialect="docker", container="it", socket=str(tmp_path / "none.sock"))
    error = refusal(lambda: dialect.unload(1))
    assert (error.reason, "group docker" in str(error)) == ("unreachable", True)


@pytest.mark.parametrize(("code", "busy"), [(0, True), (1, False)])
def test_a_busy_program_answers_with_its_exit_code(tmp_path: Path, code: int, busy: bool) -> None:
    asks = [PYTHON, "-ISEc", f"raise SystemExit({code})"]
    dialect = written(
        tmp_path, dialect="command", unload={"command": ["true"]}, busy={"command": asks, "timeout_seconds": 20}
    )
    assert dialect.busy() is busy


def test_a_busy_program_that_fails_tells_nothing(tmp_path: Path) -> None:
    asks = [PYTHON, "-ISEc", "print('no driver'); raise SystemExit(2)"]
    busy = {"command": asks, "timeout_seconds": 20}
    dialect = written(tmp_path, dialect="command", unload={"command": ["true"]}, busy=busy)
    assert "exits with 2 no driver" in str(refusal(dialect.busy))


# -- presets ------------------------------------------------------------------------------------------------

NOTHING = says({})
PROGRESS = says({"progress": 0, "state": {"job_count": 1}})
INSTANCES = says({"models": [{"loaded_instances": [{"id": "a"}, {"id": "b/c"}]}, {"loaded_instances": []}]})
CALLS: dict[str, tuple[list[Any], list[tuple[str, str, Any]]]] = {
    "a1111": ([NOTHING], [("POST", "/sdapi/v1/unload-checkpoint", {})]),
    "koboldcpp": ([NOTHING], [("POST", "/api/admin/reload_config", {"filename": "unload_model"})]),
    "tabbyapi": ([NOTHING], [("POST", "/v1/model/unload", None)]),
    "text_generation_webui": ([NOTHING], [("POST", "/v1/internal/model/unload", None)]),
    "localai": (
        [says({"backends": [], "loaded_models": [{"id": "x"}]}), NOTHING],
        [("GET", "/system", None), ("POST", "/backend/shutdown", {"model": "x"})],
    ),
    "lm_studio": (
        [INSTANCES, NOTHING],
        [
            ("GET", "/api/v1/models", None),
            ("POST", "/api/v1/models/unload", {"instance_id": "a"}),
            ("POST", "/api/v1/models/unload", {"instance_id": "b/c"}),
        ],
    ),
    "speaches": (
        [says({"models": ["Systran/whisper small"]}), NOTHING],
        [("GET", "/api/ps", None), ("DELETE", "/api/ps/Systran/whisper%20small", None)],
    ),
    "sglang": ([NOTHING], [("POST", "/release_memory_occupation", {})]),
    "llama_swap": ([NOTHING], [("GET", "/unload", None)]),
}


@pytest.mark.parametrize("preset", sorted(presets()))
def test_what_a_preset_sends_to_unload(preset: str, tmp_path: Path) -> None:
    scripts, calls = CALLS[preset]
    with Wire(scripts) as wire:
        dialect = written(tmp_path, preset=preset, url=wire.url, headers={"Authorization": "Bearer secretive"})
        dialect.unload(5)
    assert wire.calls == calls
    assert wire.asked[0].headers["authorization"] == "Bearer secretive"


@pytest.mark.parametrize(
    ("preset", "answer", "busy"),
    [
        ("a1111", PROGRESS, True),
        ("a1111", says({"state": {"job_count": 0}}), False),
        ("koboldcpp", says({"queue": 0, "idle": 1}), False),
        ("koboldcpp", says({"queue": 2, "idle": 0}), True),
        ("sglang", text("sglang:num_running_reqs 0\nsglang:num_queue_reqs 3\n"), True),
        ("sglang", text("sglang:num_running_reqs 0\nsglang:num_queue_reqs 0\n"), False),
    ],
)
def test_what_a_preset_takes_for_busy(preset: str, answer: Any, busy: bool, tmp_path: Path) -> None:
    with Wire([answer]) as wire:
        assert written(tmp_path, preset=preset, url=wire.url).busy() is busy


@pytest.mark.parametrize(
    ("preset", "answer", "loaded"),
    [
        ("koboldcpp", {"result": "inactive"}, False),
        ("koboldcpp", {"result": "koboldcpp/qwen"}, True),
        ("text_generation_webui", {"model_name": "None", "lora_names": []}, False),
        ("text_generation_webui", {"model_name": "qwen"}, True),
        ("localai", {"loaded_models": []}, False),
        ("lm_studio", {"models": [{"loaded_instances": [{"id": "a"}]}]}, True),
        ("lm_studio", {"models": [{"loaded_instances": []}]}, False),
        ("speaches", {"models": []}, False),
        ("llama_swap", {"running": [{"model": "m", "state": "ready"}]}, True),
    ],
)
def test_what_a_preset_takes_for_loaded(preset: str, answer: Any, loaded: bool, tmp_path: Path) -> None:
    with Wire([says(answer)]) as wire:
        assert written(tmp_path, preset=preset, url=wire.url).loaded() == LoadedReport(loaded=loaded)


# One of many that fails must not keep the others on the card.
def test_each_item_is_unloaded_also_where_one_fails(tmp_path: Path) -> None:
    with Wire([INSTANCES, says({"error": "no"}, 500), NOTHING]) as wire:
        error = refusal(lambda: written(tmp_path, preset="lm_studio", url=wire.url).unload(5))
    assert "answers 500" in str(error)
    assert wire.calls[-1] == ("POST", "/api/v1/models/unload", {"instance_id": "b/c"})


@pytest.mark.parametrize("answer", [{}, {"models": 3}, {"models": [{"id": 1}]}, []])
def test_a_list_that_is_none_is_a_failure(tmp_path: Path, answer: object) -> None:
    with Wire([says(answer)]) as wire:
        assert refusal(lambda: written(tmp_path, preset="speaches", url=wire.url).unload(5)).reason == "failed"


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        ({"above": 1}, 2, True),
        ({"above": 1}, [1], False),
        ({"below": 1}, 0, True),
        ({"below": 1}, None, True),
        ({"equals": "idle"}, "idle", True),
        ({"equals": 1}, True, False),
        ({"equals": True}, True, True),
        ({"not_equals": "idle"}, None, True),
    ],
)
def test_conditions(tmp_path: Path, condition: dict[str, Any], value: Any, holds: bool) -> None:
    with Wire([says({"at": value})]) as wire:
        busy = {"path": "/busy", "json": "at"} | condition
        dialect = written(tmp_path, dialect="http", url=wire.url, unload={"path": "/u"}, busy=busy)
        assert dialect.busy() is holds


def test_a_key_of_the_file_stands_before_the_presets(tmp_path: Path) -> None:
    own = {"unload": {"timeout_seconds": 7}, "busy": None, "loaded": {"path": "/x", "json": "y"}}
    dialect = written(tmp_path, preset="koboldcpp", url="http://127.0.0.1:1", **own)
    unload = dialect._settings.unload
    assert (unload.path, unload.timeout_seconds, unload.cuts_work) == ("/api/admin/reload_config", 7, True)
    assert dialect._settings.busy is None
    assert dialect._settings.loaded == config.Report("/x", "y")
    assert isinstance(refusal(dialect.health), BackendError)
