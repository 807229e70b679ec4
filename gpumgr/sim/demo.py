"""``gpumgr demo``: the main job, played in the terminal with the real broker on a simulated card.

Owns: the story and its telling. Must not: simulate (stage.py) or broker (it starts gunicorn as an operator would).
Everything the actors do is real HTTP; the numbers on screen are read from the card while it happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml

from gpumgr.client import Gpu, HeldLease
from gpumgr.errors import GpumgrError

CHECKOUT = Path(__file__).parents[2]
SPEED = 1.2
TTL_SECONDS = 3
GAME = {"name": "bg3_dx11.exe", "used_mib": 10600}
BAR_CELLS = 48
MARKS = {"comfyui": "C", "ollama": "O", "mvoice": "V", "whisper": "W"}
CRASHING_HOLDER = """
import sys, time
from gpumgr.client import Gpu
lease = Gpu(sys.argv[1]).lease("image", holder="imagen-2", ttl_seconds=float(sys.argv[2]))
print(lease.grant["lease_id"], flush=True)
time.sleep(600)
"""


class DemoFailed(Exception):
    """The story did not go as it must. The message is one sentence."""


def play(*, stay: bool) -> int:
    """The exit code: 0 when every scene went as told. ``stay``: the broker stays up until Ctrl-C."""
    if not (CHECKOUT / "config" / "gunicorn.conf.py").exists():
        print(
            "gpumgr demo needs a checkout of gpumgr: it starts the broker on config/gunicorn.conf.py", file=sys.stderr
        )
        return 2
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="gpumgr-demo-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        try:
            world = _open(stack, directory)
            Story(world).tell()
        except (DemoFailed, GpumgrError, requests.RequestException) as error:
            print(f"\nThe demo failed: {error}", file=sys.stderr)
            _print_tail(directory / "broker.log")
            return 1
        if stay:
            _stay(world)
    return 0


def _print_tail(log: Path) -> None:
    if log.exists():
        print(log.read_text(errors="replace")[-2000:], file=sys.stderr)


def _stay(world: World) -> None:
    print(f"\nThe broker stays up: {world.url}   (curl {world.url}/v1/status)   Ctrl-C ends it.", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    print()


# -- the world ----------------------------------------------------------------------------------------------


class World:
    def __init__(self, url: str, addresses: Mapping[str, Any]) -> None:
        self.url = url
        self.gpu = Gpu(url)
        self.services: Mapping[str, str] = addresses["services"]
        self.control: str = addresses["control"]
        self._card = Path(addresses["card"])

    def card(self) -> dict[str, Any]:
        """The first GPU as it is now."""
        gpu: dict[str, Any] = json.loads(self._card.read_text(encoding="utf-8"))["gpus"][0]
        return gpu


def _open(stack: ExitStack, directory: Path) -> World:
    port = _port()
    stage = _spawn(
        stack,
        [sys.executable, "-m", "gpumgr.sim", "--dir", str(directory), "--speed", str(SPEED)],
        stdout=subprocess.PIPE,
        stderr=(directory / "stage.log").open("wb"),
    )
    line = stage.stdout.readline() if stage.stdout is not None else b""
    if not line:
        raise DemoFailed(f"the simulated services did not start: {(directory / 'stage.log').read_text()[-500:]}")
    addresses = json.loads(line)
    config = yaml.safe_load(Path(addresses["config"]).read_text(encoding="utf-8"))
    config["lease"] = {"min_ttl_seconds": TTL_SECONDS}
    Path(addresses["config"]).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    env = os.environ | {
        "GPUMGR_CONFIG": addresses["config"],
        "GPUMGR_BIND": f"127.0.0.1:{port}",
        "GPUMGR_STATE_DIR": str(directory / "state"),
    }
    command = [sys.executable, "-m", "gunicorn", "-c", "config/gunicorn.conf.py", "wsgi:app"]
    with (directory / "broker.log").open("wb") as log:
        broker = _spawn(stack, command, cwd=CHECKOUT, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    _wait(lambda: broker.poll() is None and _ready(url), 15, "the broker did not start")
    return World(url, addresses)


def _port() -> int:
    """8770, or any free one where that is taken: the demo must not meet a broker that is at work."""
    for port in (8770, 0):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return int(sock.getsockname()[1])
    raise DemoFailed("no port is free on 127.0.0.1")


def _spawn(stack: ExitStack, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal is for the demo, which then ends its children in order.
    process = subprocess.Popen(command, start_new_session=True, **options)  # noqa: S603 - our own commands
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=2).ok
    except requests.ConnectionError:
        return False


def _wait(state: Callable[[], bool], seconds: float, otherwise: str) -> None:
    until = time.monotonic() + seconds
    while not state():
        if time.monotonic() > until:
            raise DemoFailed(otherwise)
        time.sleep(0.05)


# -- the story ----------------------------------------------------------------------------------------------


class Story:
    def __init__(self, world: World) -> None:
        self._world = world
        self._gpu = world.gpu
        self._began = time.monotonic()

    def tell(self) -> None:
        self._say(f"One card of {self._world.card()['total_mib']} MiB, four services, one broker at {self._world.url}")
        if not self._world.url.endswith(":8770"):
            self._say("(port 8770 is taken, so this broker listens on another one)")
        self._say("The bar: C comfyui, O ollama, V mvoice, b the game, · free. Ctrl-C ends the demo at any time.")
        self.chat_and_voice()
        lease = self.imagen_acquires()
        voice = self.imagen_renders_while_voice_waits(lease)
        self.release_and_next(lease, voice)
        self.game_takes_memory()
        self.holder_crashes()
        over = requests.get(f"{self._world.control}/ledger", timeout=5).json()["over_commits"]
        self._scene("The end")
        self._say(f"requests for memory that the card had to refuse (over-commits): {over}")
        if over:
            raise DemoFailed(f"the card was over-committed {over} times")

    def chat_and_voice(self) -> None:
        self._scene("Chat and voice are at home on the card")
        with self._gpu.lease("llm", holder="chat") as lease, self._watching():
            body = {"model": "llama3.1:8b", "prompt": "hello", "stream": False}
            requests.post(f"{lease.url}/api/generate", json=body, timeout=60).raise_for_status()
        with self._gpu.lease("tts", holder="voice") as lease, self._watching():
            requests.post(f"{lease.url}/v1/audio/speech", json={"input": "hi"}, timeout=60).raise_for_status()

    def imagen_acquires(self) -> HeldLease:
        self._scene("ImaGen acquires `image`: both must go, and the card must prove it")
        with self._watching(each_seconds=0.04):
            lease = self._gpu.lease("image", holder="imagen", ttl_seconds=30)
        for event in self._events("evict"):
            self._say(
                f"evicted {event['consumer']}: {event['held_mib']} → {event['still_held_mib']} MiB "
                f"in {event['seconds']:.2f} s, read from the card"
            )
        self._say("(given back: at most residual_mib, 768, is held; a CUDA context never leaves)")
        self._say(f"granted: lease {lease.grant['lease_id']}; ImaGen goes to {lease.url} itself")
        return lease

    def imagen_renders_while_voice_waits(self, lease: HeldLease) -> _Waiter:
        self._scene("It renders in its own steps (upload, prompt, history, view), renewing; voice waits")
        voice = _Waiter(self._gpu, "tts", "voice")
        _wait(lambda: lease.renew()["waiting"] == 1, 5, "the voice service did not queue")
        self._say(f"renew tells ImaGen: waiting {lease.renew()['waiting']}; queue: {self._queue()}")
        with self._watching():
            image = self._render(lease)
        self._say(f"rendered and fetched: {len(image)} bytes of PNG; the lease was renewed and is still ours")
        lease.check()
        return voice

    def _render(self, lease: HeldLease) -> bytes:
        url = lease.url
        files = {"image": ("photo.png", b"\x89PNG demo", "image/png")}
        requests.post(f"{url}/upload/image", files=files, timeout=10).raise_for_status()
        graph = {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}
        prompt_id = requests.post(f"{url}/prompt", json=graph, timeout=10).json()["prompt_id"]
        self._say("POST /prompt answered at once; the work goes on for seconds, under the lease")
        entry: dict[str, Any] = {}
        until = time.monotonic() + 30
        while not entry:
            lease.renew()
            entry = requests.get(f"{url}/history/{prompt_id}", timeout=10).json().get(prompt_id, {})
            if time.monotonic() > until:
                raise DemoFailed("the render did not end")
            time.sleep(0.2)
        if entry["status"]["status_str"] != "success":
            raise DemoFailed(f"the render ended as {entry['status']}")
        output = next(iter(entry["outputs"].values()))["images"][0]
        view = requests.get(f"{url}/view", params={"filename": output["filename"]}, timeout=10)
        view.raise_for_status()
        return view.content

    def release_and_next(self, lease: HeldLease, voice: _Waiter) -> None:
        self._scene("It releases; whoever waits goes at once")
        released = time.monotonic()
        with self._watching():
            lease.release()
            granted = voice.lease()
        self._say(
            f"voice has the GPU {1000 * (voice.granted - released):.0f} ms after the release, "
            "most of it ComfyUI's own unload"
        )
        requests.post(f"{granted.url}/v1/audio/speech", json={"input": "hi"}, timeout=60).raise_for_status()
        granted.release()

    def game_takes_memory(self) -> None:
        self._scene("A game takes 10600 of 24000 MiB; the next `image` needs 14000 + 512 headroom")
        game = requests.post(f"{self._world.control}/processes", json=GAME, timeout=5).json()
        try:
            with self._watching():
                self._gpu.acquire("image", holder="imagen").release()
        except GpumgrError as error:
            self._say(f"refused, {error.code}: {error.message}")
            told = {name: error.details.get(name) for name in ("needed_mib", "free_mib", "headroom_mib", "untracked")}
            self._say(f"in its details: {json.dumps(told)}")
        else:
            raise DemoFailed("image was granted beside a game that leaves no room for it")
        requests.delete(f"{self._world.control}/processes/{game['pid']}", timeout=5)
        self._say("the game ends")

    def holder_crashes(self) -> None:
        self._scene(f"A holder crashes (kill -9) with a TTL of {TTL_SECONDS} s; its lease ends by itself")
        command = [sys.executable, "-c", CRASHING_HOLDER, self._world.url, str(TTL_SECONDS)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:  # noqa: S603 - our own code
            line = holder.stdout.readline() if holder.stdout is not None else b""
            if not line:
                raise DemoFailed("the second holder got no lease")
            self._say(f"imagen-2 (pid {holder.pid}) holds lease {line.decode().strip()}")
            chat = _Waiter(self._gpu, "llm", "chat")
            _wait(lambda: self._queue() != "empty", 5, "chat did not queue")
            holder.kill()
        killed = time.monotonic()
        granted = chat.lease()
        self._say(
            f"killed; chat has the GPU {chat.granted - killed:.1f} s later ({TTL_SECONDS} s after the last renew)"
        )
        granted.release()
        if chat.granted - killed > TTL_SECONDS + 1.5:
            raise DemoFailed("the crashed holder's lease ended too late")

    # -- telling --------------------------------------------------------------------------------------------

    def _events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self._gpu.status()["events"] if event["type"] == kind]

    def _queue(self) -> str:
        queue = self._gpu.status()["queue"]
        return ", ".join(f"{q['holder']} waits for the {q['waiting_for']}" for q in queue) or "empty"

    def _scene(self, title: str) -> None:
        print(f"\n── {title}", flush=True)

    def _say(self, words: str) -> None:
        print(f"   {time.monotonic() - self._began:5.1f} s  {words}", flush=True)

    @contextmanager
    def _watching(self, each_seconds: float = 0.25) -> Iterator[None]:
        """Draw the card whenever it changes, for as long as the block runs."""
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done, each_seconds), name="demo-card")
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _watch(self, done: threading.Event, each_seconds: float) -> None:
        shown = ""
        last = False
        while not last:
            last = done.wait(each_seconds)
            drawn = draw(self._world.card())
            if drawn != shown:
                self._say(drawn)
                shown = drawn


class _Waiter:
    """Someone who acquires from a thread of its own."""

    def __init__(self, gpu: Gpu, kind: str, holder: str) -> None:
        self.granted = 0.0
        self._outcome: HeldLease | GpumgrError | None = None
        self._thread = threading.Thread(target=self._wait, args=(gpu, kind, holder), name=f"demo-{holder}", daemon=True)
        self._thread.start()

    def _wait(self, gpu: Gpu, kind: str, holder: str) -> None:
        try:
            lease = gpu.acquire(kind, holder=holder, ttl_seconds=30)
        except GpumgrError as error:
            self._outcome = error
            return
        self.granted = time.monotonic()
        self._outcome = lease

    def lease(self) -> HeldLease:
        """Raises: DemoFailed."""
        self._thread.join(30)
        if not isinstance(self._outcome, HeldLease):
            raise DemoFailed(f"a waiter was not granted: {self._outcome}")
        return self._outcome


def draw(gpu: Mapping[str, Any]) -> str:
    """The card as a bar of cells, each the first letter of who holds it, and the numbers beside it."""
    total = gpu["total_mib"]
    cells, numbers = "", []
    for process in gpu["processes"]:
        used = process["used_mib"] or 0
        cells += MARKS.get(process["name"], process["name"][:1].lower()) * round(BAR_CELLS * used / total)
        numbers.append(f"{process['name']} {used}")
    free = total - sum(process["used_mib"] or 0 for process in gpu["processes"])
    return f"[{cells[:BAR_CELLS]:·<{BAR_CELLS}}] {', '.join([*numbers, f'free {free}'])} MiB"
