"""What systemd is told: by the real broker, and what each failure of a part makes of it; and the unit itself."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import requests

from gpumgr.sim.server import Reply, Server
from gpumgr.sim.stage import Stage
from gpumgr.web.systemd import Manager, Pulse, manager_of, silence
from tests.brokers import ROOT, RunningBroker
from tests.waiting import until
from tests.worlds import StartedWorld, World, catalog, consumer, started

UNIT = ROOT / "contrib" / "gpumgr.service"
SHORT_SECONDS = 0.1


class Systemd:
    """The end of the notify socket that is systemd's: each message with the pid the kernel says it is from."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(address.replace("@", "\0", 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def heard(self, seconds: float = 10.0) -> tuple[int, list[str]]:
        """The next message. Raises: TimeoutError."""
        self._socket.settimeout(seconds)
        message, [(_, _, sender)], _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
        return struct.unpack("3i", sender)[0], message.decode().split("\n")

    def heard_until(self, line: str) -> tuple[int, list[str], list[str]]:
        """The message with that line, and every line before it."""
        before: list[str] = []
        while line not in (heard := self.heard())[1]:
            before += heard[1]
        return *heard, before

    def drain(self) -> None:
        try:
            while True:
                self.heard(0.001)
        except TimeoutError:
            pass


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    with Systemd(str(tmp_path / "notify")) as listening:
        yield listening


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]


def test_the_life_of_the_unit(tmp_path: Path, stage: Stage, systemd: Systemd) -> None:
    told = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "600000"}
    broker = RunningBroker(tmp_path, stage.config(), told).start(wait=False)
    assert broker.process is not None
    with broker.http:
        try:
            first = systemd.heard(20)
            assert requests.get(f"{broker.url}/healthz", timeout=2).ok
            worker = broker.worker_pid()
            assert first == (worker, ["READY=1", "WATCHDOG=1", "STATUS=granting"])
            assert systemd.heard() == (worker, ["WATCHDOG=1", "STATUS=granting"])

            os.kill(worker, signal.SIGSTOP)
            until(lambda: state_of(worker) == "T")
            systemd.drain()
            with pytest.raises(TimeoutError):
                systemd.heard(0.6)  # three times the pause between two
            os.kill(worker, signal.SIGCONT)
            assert systemd.heard()[0] == worker

            broker.process.send_signal(signal.SIGHUP)
            assert systemd.heard_until("RELOADING=1")[0] == broker.process.pid
            sender, _, before = systemd.heard_until("READY=1")
            assert sender == broker.worker_pid() != worker
            assert "STOPPING=1" not in before  # it would be the end of the unit
        finally:
            assert broker.stop() == 0
        sender, _, before = systemd.heard_until("STOPPING=1")
        assert sender == broker.process.pid
        assert "READY=1" not in before


# -- the manager --------------------------------------------------------------------------------------------


def test_the_variables_are_taken_away() -> None:
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    assert manager_of(environ) == Manager("/run/x", 60.0)
    assert environ == {"HOME": "/"}


def test_a_watchdog_of_another_process_is_not_ours() -> None:
    assert manager_of({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}) == Manager(
        "/run/x"
    )


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1"}])
def test_without_systemd_nothing_is_sent(environ: dict[str, str]) -> None:
    manager = manager_of({**environ, "WATCHDOG_USEC": "60000000"})
    assert manager == Manager()
    assert not manager.tell("READY=1")


def test_an_abstract_socket_is_reached() -> None:
    with Systemd(f"@gpumgr-test-{os.getpid()}") as listening:
        assert manager_of({"NOTIFY_SOCKET": listening.address}).tell("READY=1")
        assert listening.heard() == (os.getpid(), ["READY=1"])


def test_a_manager_that_is_gone_is_no_error() -> None:
    assert not Manager("/nowhere").tell("READY=1")


# -- what is alive ------------------------------------------------------------------------------------------


@contextmanager
def serving() -> Iterator[tuple[str, int]]:
    server = Server(lambda _request: Reply())
    server.start()
    try:
        yield "127.0.0.1", server.port
    finally:
        server.stop()
        server.join()


@pytest.fixture
def world() -> Iterator[StartedWorld]:
    with started(consumer("a")) as running:
        yield running


@pytest.fixture
def pulse(world: StartedWorld, systemd: Systemd) -> Iterator[Pulse]:
    with serving() as address:
        yield Pulse(world.broker, address, Manager(systemd.address, 0.3), SHORT_SECONDS)


def test_every_thread_of_the_broker_is_watched(systemd: Systemd) -> None:
    before = set(threading.enumerate())
    with started(consumer("a")) as world:
        ours = set(threading.enumerate()) - before
        assert set(Pulse(world.broker, None, Manager(systemd.address)).threads) >= ours
        assert len(ours) >= 4


def test_a_lock_that_is_never_free_keeps_the_ping_back(
    pulse: Pulse, world: StartedWorld, systemd: Systemd, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpumgr.web.systemd")
    with world.broker.state.lock:
        assert [pulse.beat(), pulse.beat()] == pytest.approx([0.1, 0.1])
    pulse.beat()
    sentence = "the broker's lock was not free within 0.1 s"
    assert [systemd.heard()[1] for _ in range(3)] == [
        *([f"STATUS={sentence}"], [f"STATUS={sentence}"], ["READY=1", "WATCHDOG=1", "STATUS=granting"])
    ]
    assert caplog.messages == [f"{sentence}: systemd is not pinged", "everything lives again: systemd is pinged"]


def test_a_dead_thread_is_named(pulse: Pulse, world: StartedWorld) -> None:
    assert pulse.failure() is None
    world.broker.close()
    assert pulse.failure() in [f"the thread {thread.name} is dead" for thread in pulse.threads]


def test_an_end_is_not_a_failure(pulse: Pulse, world: StartedWorld, systemd: Systemd) -> None:
    world.broker.stop()
    pulse.beat()
    with pytest.raises(TimeoutError):
        systemd.heard(0.001)


def test_a_driver_that_answers_with_an_error_is_alive(pulse: Pulse, world: StartedWorld, systemd: Systemd) -> None:
    world.card.unreadable = "the GPU is lost,\nSTOPPING=1"
    world.broker.fresh_card(5)
    pulse.beat()
    assert systemd.heard()[1] == ["READY=1", "WATCHDOG=1", "STATUS=the GPU is lost, STOPPING=1"]


def test_a_probe_that_does_not_come_back_is_not_alive(world: StartedWorld) -> None:
    with serving() as address, world.card._lock:
        pulse = Pulse(world.broker, address, Manager(), look_seconds=SHORT_SECONDS)
        assert until(pulse.failure) == "the card was not looked at for 0.1 s"


def test_a_card_that_was_never_read_is_not_restarted_for() -> None:
    with serving() as address:
        assert Pulse(World(catalog(consumer("a")), read_first=False).broker, address, Manager()).failure() is None


# -- the pool -----------------------------------------------------------------------------------------------

BINDS = {"every IPv4": (socket.AF_INET, ("0.0.0.0", 0)), "every IPv6": (socket.AF_INET6, ("::", 0))}  # noqa: S104


@contextmanager
def listening_on(bind: str, tmp_path: Path) -> Iterator[socket.socket]:
    """Connections are taken by the kernel, and nobody answers them."""
    family, address = BINDS.get(bind, (socket.AF_UNIX, str(tmp_path / "socket")))
    with socket.socket(family) as sock:
        sock.bind(address)
        sock.listen()
        yield sock


def answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        assert connection.recv(4096).startswith(b"GET /healthz HTTP/1.1\r\n")
        connection.sendall(answer)


@pytest.mark.parametrize("bind", [*BINDS, "a path"])
def test_the_pool_is_asked_where_it_listens(bind: str, tmp_path: Path) -> None:
    with listening_on(bind, tmp_path) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(answer_once, listener, b"HTTP/1.1 200 OK\r\n\r\n")
        assert silence(listener.getsockname(), 5) is None
        served.result()


def test_a_pool_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with listening_on("every IPv4", tmp_path) as listener:
        said = silence(listener.getsockname(), SHORT_SECONDS)
        assert said == "the pool did not answer GET /healthz within 0.1 s (timed out)"
        address = listener.getsockname()
    assert "refused" in str(silence(address, 5))


def test_a_pool_that_closes_is_told(tmp_path: Path) -> None:
    with listening_on("every IPv4", tmp_path) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(answer_once, listener, b"")
        assert silence(listener.getsockname(), 5) == "the pool closed GET /healthz without an answer"


def test_an_address_that_has_left_the_machine_is_no_failure() -> None:
    """A restart could not listen on it, and exit code 2 would be the end."""
    assert silence(("192.0.2.1", 8770), SHORT_SECONDS) is None


# -- the unit -----------------------------------------------------------------------------------------------


def settings_of_unit() -> list[str]:
    lines = [line.strip() for line in UNIT.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "=" in line and not line.startswith("#")]


@pytest.mark.parametrize(
    "setting",
    [
        *("Type=notify", "NotifyAccess=all", "WatchdogSec=60", "KillMode=mixed", "Restart=always"),
        *("RestartPreventExitStatus=2", "DevicePolicy=closed", "DeviceAllow=char-195 rw", "NoNewPrivileges=yes"),
        *("ProtectSystem=strict", "CapabilityBoundingSet=", "SystemCallErrorNumber=EPERM"),
    ],
)
def test_the_unit_says(setting: str) -> None:
    assert setting in settings_of_unit()


@pytest.mark.parametrize(
    "name",
    [
        *("PrivateDevices", "ProtectProc", "ProcSubset", "PrivateUsers", "PrivatePIDs", "PrivateNetwork"),
        *("IPAddressDeny", "ExecReload"),
    ],
)
def test_the_unit_does_not_blind_the_broker(name: str) -> None:
    assert name not in [setting.partition("=")[0] for setting in settings_of_unit()]


def test_systemd_can_read_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        if os.environ.get("CI") == "true":
            raise AssertionError("CI promises systemd-analyze")
        pytest.skip("systemd is not installed here")
    here = tmp_path / UNIT.name
    gunicorn = Path(sys.executable).with_name("gunicorn")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/gpumgr/.venv/bin/gunicorn", str(gunicorn))
    here.write_text(text.replace("/opt/gpumgr", str(ROOT)), encoding="utf-8")
    run = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, timeout=20, check=False)
    assert (run.returncode, run.stderr) == (0, "")  # an unknown setting is a warning
