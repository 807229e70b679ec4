"""What the paths of cgroups mean, and an engine that is asked for names."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumgr.adapters.cgroups import (
    ASK_AGAIN_SECONDS,
    Containers,
    container_ids_of,
    lxc_names_of,
    paths_of,
    units_of,
)

ID = "3949fff2e8dd8d0df1a7419b3f1f99cb0530558df91f627bf8d50e18e9cb5e6c"
OTHER = ID[::-1]


@pytest.mark.parametrize(
    ("path", "units", "ids", "names"),
    [
        ("/system.slice/ollama.service", {"system.slice", "ollama.service"}, set(), set()),
        (
            r"/user.slice/user-1000.slice/user@1000.service/app.slice/app-comfy\x2dui@1.service",
            {"user.slice", "user-1000.slice", "user@1000.service", "app.slice", r"app-comfy\x2dui@1.service"},
            set(),
            set(),
        ),
        (f"/system.slice/docker-{ID}.scope", {"system.slice", f"docker-{ID}.scope"}, {ID}, set()),
        (f"/docker/{ID}", set(), {ID}, set()),
        (f"/docker/{ID}/docker/{OTHER}", set(), {ID, OTHER}, set()),
        (
            f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
            {"user.slice", "user-1000.slice", "user@1000.service", f"libpod-{ID}.scope"},
            {ID},
            set(),
        ),
        (f"/machine.slice/libpod-conmon-{ID}.scope", {"machine.slice", f"libpod-conmon-{ID}.scope"}, {ID}, set()),
        (
            f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope",
            {"kubepods.slice", "kubepods-pod1.slice", f"cri-containerd-{ID}.scope"},
            {ID},
            set(),
        ),
        ("/lxc/101/ns/system.slice/tts.service", {"system.slice", "tts.service"}, set(), {"101"}),
        ("/lxc.payload.voice/system.slice", {"system.slice"}, set(), {"voice"}),
        (f"/system.slice/{ID}0", {"system.slice"}, set(), set()),
    ],
)
def test_what_a_path_means(path: str, units: set[str], ids: set[str], names: set[str]) -> None:
    assert (units_of([path]), container_ids_of([path]), lxc_names_of([path])) == (units, ids, names)


def test_the_kernel_tells_the_paths_of_a_process() -> None:
    told = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    expected = [path for line in told if (path := line.split(":", 2)[2]) != "/"]
    assert paths_of(os.getpid()) == expected
    assert paths_of(5_000_001) == []


# -- an engine ----------------------------------------------------------------------------------------------


class Engine:
    """Answers as Docker's API does. ``answers``: id → status and body; ``asked`` is the ledger."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {ID: (200, b'{"Id": "%s", "Name": "/comfyui"}' % ID.encode())}
        self.asked: list[str] = []
        self.path = str(path)
        engine = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                wanted = self.rfile.readline().split()[1].decode()
                while self.rfile.readline().strip():
                    pass
                engine.asked.append(wanted)
                found = wanted.removeprefix("/containers/").removesuffix("/json")
                status, body = engine.answers.get(found, (404, b'{"message": "no such container"}'))
                self.wfile.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

        self._server = socketserver.ThreadingUnixStreamServer(self.path, Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = Engine(tmp_path / "docker.sock")
    yield found
    found.close()


def test_a_name_is_asked_for_once(engine: Engine) -> None:
    containers = Containers([engine.path])
    assert [containers.name(ID), containers.name(ID)] == ["comfyui", "comfyui"]
    assert engine.asked == [f"/containers/{ID}/json"]


def test_the_next_engine_is_asked_where_the_first_does_not_know_it(engine: Engine, tmp_path: Path) -> None:
    containers = Containers([str(tmp_path / "nobody.sock"), engine.path])
    assert containers.name(ID) == "comfyui"


@pytest.mark.parametrize(
    "answer", [(404, b"{}"), (500, b"oops"), (200, b"not JSON"), (200, b"[]"), (200, b'{"Name": "/"}'), (200, b"{}")]
)
def test_an_engine_that_does_not_know_is_left_alone_for_a_while(engine: Engine, answer: tuple[int, bytes]) -> None:
    now = [100.0]
    known = engine.answers[ID]
    engine.answers[ID] = answer
    containers = Containers([engine.path], lambda: now[0])
    assert containers.name(ID) is None
    engine.answers[ID] = known
    now[0] += ASK_AGAIN_SECONDS * 0.9
    assert containers.name(ID) is None
    now[0] += ASK_AGAIN_SECONDS * 0.1
    assert containers.name(ID) == "comfyui"
    assert len(engine.asked) == 2


def test_an_engine_that_hangs_is_asked_once_for_all_containers(tmp_path: Path) -> None:
    path = str(tmp_path / "hangs.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        containers = Containers([path])
        assert [containers.name(f"{number:064x}") for number in range(3)] == [None] * 3
        listener.settimeout(5)
        listener.accept()[0].close()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_without_any_engine_a_name_is_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Containers([str(tmp_path / "nobody.sock")]).name(ID) is None
    assert "write the container's id" in caplog.text


def test_the_engine_of_the_environment_is_asked_first(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{engine.path}")
    assert Containers().name(ID) == "comfyui"


def test_containers_that_came_and_went_are_forgotten(engine: Engine) -> None:
    containers = Containers([engine.path])
    for number in range(300):
        containers.name(f"{number:064x}")
    assert len(containers._ask_again_at) <= 256
