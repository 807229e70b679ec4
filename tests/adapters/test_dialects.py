"""The dialects on real sockets: what they send, what they make of the answers, and that every call ends in time.

``Wire`` is a server of raw bytes, for what a well-behaved one never does; the simulated services are the others.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest
import requests

from gpumgr.adapters.dialects import dialect_of
from gpumgr.adapters.dialects.http import Http
from gpumgr.adapters.dialects.ollama import FLICKERS
from gpumgr.config import Call, ConsumerSettings, Report
from gpumgr.core.following import Work
from gpumgr.core.placement import Report as LoadedReport
from gpumgr.runtime.ports import BackendError
from gpumgr.sim.card import SimulatedCard
from gpumgr.sim.comfyui import ComfyUI
from gpumgr.sim.ollama import Ollama
from gpumgr.sim.speech import Speech
from tests.waiting import until

T = TypeVar("T")
LIMIT_SECONDS = 0.4
SLACK_SECONDS = 0.6
"""How much later than its limit a call may end on a loaded machine."""
PATIENCE_SECONDS = 2.5
"""After this long a call counts as one that never ends. Far above limit and slack: a failure is no matter of load."""
MIB = 2**20
OK_HEAD = b"HTTP/1.1 200 OK\r\n"

Script = Callable[[socket.socket, threading.Event], object]


@dataclass(frozen=True)
class Asked:
    """One request as it came over the wire; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None

    @property
    def call(self) -> tuple[str, str, Any]:
        return self.method, self.path, self.json


@dataclass
class Wire:
    """Reads one whole request per connection, writes it down, and lets the script do what it likes with the socket.

    Scripts are taken in order; the last one stays for all that follow.
    """

    scripts: list[Script]
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def calls(self) -> list[tuple[str, str, Any]]:
        return [asked.call for asked in self.asked]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                asked = _read(connection)
                with self._lock:
                    script = self.scripts[min(len(self.asked), len(self.scripts) - 1)]
                    self.asked.append(asked)
                script(connection, self._over)
            except OSError:
                return  # the caller hung up, as it may


def _read(connection: socket.socket) -> Asked:
    with connection.makefile("rb") as stream:
        method, path, _ = stream.readline().decode().split(" ", 2)
        headers = {}
        while line := stream.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return Asked(method, path, headers, stream.read(int(headers.get("content-length", "0"))))


def raw(said: bytes) -> Script:
    """These bytes, and the connection is closed."""
    return lambda connection, _: connection.sendall(said)


def says(content: object = None, status: int = 200, **headers: str) -> Script:
    """A whole answer with a JSON body; none where ``content`` is None."""
    body = b"" if content is None else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return raw("\r\n".join([*lines, "", ""]).encode() + body)


def stalls(said: bytes = b"") -> Script:
    """These bytes and then nothing, the connection held open."""

    def script(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(said)
        over.wait(30)

    return script


def trickles(said: bytes, drop: bytes) -> Script:
    """These bytes and then a drop at a time, for ever: no single read ever takes long."""

    def script(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(said)
        while not over.wait(0.02):
            connection.sendall(drop)

    return script


def floods(said: bytes, lump: bytes) -> Script:
    def script(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(said)
        while not over.is_set():
            connection.sendall(lump)

    return script


def speak(dialect: str, url: str, **settings: Any) -> Http:
    return dialect_of(ConsumerSettings("it", dialect, url, **settings))


def refusal(call: Callable[[], object]) -> BackendError:
    with pytest.raises(BackendError) as caught:
        call()
    return caught.value


@dataclass
class Timed:
    """What came of a call. ``error`` is anything but what was asked for: a wrong class must be seen as well."""

    seconds: float
    error: BaseException | None = None


def timed(call: Callable[[], object]) -> Timed:
    """On a thread of its own, so that a call that never ends fails its test instead of the whole run."""
    began = time.monotonic()
    outcome: list[Timed] = []

    def run() -> None:
        error = None
        try:
            call()
        except BaseException as raised:
            error = raised
        outcome.append(Timed(time.monotonic() - began, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if not outcome:
        pytest.fail(f"no end within {PATIENCE_SECONDS} s, although the limit is {LIMIT_SECONDS} s", pytrace=False)
    return outcome[0]


def require(outcome: Timed, reason: str) -> BackendError:
    assert isinstance(outcome.error, BackendError), repr(outcome.error)
    assert outcome.error.reason == reason, outcome.error
    assert outcome.seconds < LIMIT_SECONDS + SLACK_SECONDS
    return outcome.error


# -- the calls that go out ----------------------------------------------------------------------------------


FREE = {"unload_models": True, "free_memory": True}


def test_comfyui_unloads_with_both_flags() -> None:
    with Wire([says()]) as wire:
        speak("comfyui", wire.url).unload(5)
    assert wire.calls == [("POST", "/api/free", FREE)]
    assert wire.asked[0].headers["content-type"] == "application/json"
    assert "origin" not in wire.asked[0].headers  # 0.33.0 answers 403 to a foreign one


def test_comfyui_is_asked_with_its_own_paths() -> None:
    stats = {"devices": [{"torch_vram_total": 5000 * MIB}]}
    queue: dict[str, list[Any]] = {"queue_running": [], "queue_pending": []}
    with Wire([says(stats), says(queue), says(stats)]) as wire:
        comfyui = speak("comfyui", wire.url)
        comfyui.health()
        assert comfyui.busy() is False
        assert comfyui.loaded() == LoadedReport(loaded=True, used_mib=5000)
    assert wire.calls == [("GET", "/system_stats", None), ("GET", "/queue", None), ("GET", "/system_stats", None)]


@pytest.mark.parametrize(
    ("queue", "busy"),
    [
        ({"queue_running": [], "queue_pending": []}, False),
        ({"queue_running": [[0, "id", {}, {}, []]], "queue_pending": []}, True),
        ({"queue_running": [], "queue_pending": [[0, "id", {}, {}, []]]}, True),
    ],
)
def test_comfyui_is_busy_with_what_runs_and_what_waits(queue: dict[str, Any], busy: bool) -> None:
    with Wire([says(queue)]) as wire:
        assert speak("comfyui", wire.url).busy() is busy


@pytest.mark.parametrize("queue", [{}, {"queue_running": []}, [], "busy", 7, None, {"error": "no"}])
def test_comfyui_whose_queue_says_nothing_is_a_failure_not_idle(queue: object) -> None:
    with Wire([says(queue) if queue is not None else raw(OK_HEAD + b"Content-Length: 4\r\n\r\nnull")]) as wire:
        assert refusal(speak("comfyui", wire.url).busy).reason == "failed"


PROMPT = Work("prompt", "6b1f")
QUEUED = {"queue_running": [], "queue_pending": [[0, "6b1f", {}, {}, []]]}
RUNNING = {"queue_running": [[0, "6b1f", {}, {}, []]], "queue_pending": [[1, "other", {}, {}, []]]}
OTHERS = {"queue_running": [[0, "other", {}, {}, []]], "queue_pending": []}


@pytest.mark.parametrize(
    ("method", "path", "begins"),
    [
        *((("POST"), path, True) for path in ("/prompt", "/api/prompt", "//prompt", "/%70rompt", "/x/../api/./prompt")),
        *(("POST", path, True) for path in ("/api//prompt", "/prompt/", "/x%2f..%2fprompt", "/x\\..\\prompt")),
        *((method, "/prompt", False) for method in ("GET", "PUT", "post")),
        *(("POST", path, False) for path in ("/", "/promptx", "/api", "/x/prompt", "/queue", "/Prompt")),
    ],
)
def test_which_calls_may_begin_a_prompt(method: str, path: str, begins: bool) -> None:
    assert speak("comfyui", "http://x").begins_work(method, path) is begins
    assert not speak("ollama", "http://x").begins_work(method, path)


@pytest.mark.parametrize(
    ("status", "body", "work"),
    [
        (200, b'{"prompt_id": "6b1f", "number": 3, "node_errors": {}}', PROMPT),
        (400, b'{"prompt_id": "6b1f"}', None),
        (400, b'{"error": {"type": "no_prompt"}, "node_errors": {}}', None),
        (200, b'{"prompt_id": 7}', None),
        (200, b'{"prompt_id": ""}', None),
        (200, b'{"prompt_id": "a\\nb"}', None),
        (200, b'{"prompt_id": "' + b"x" * 129 + b'"}', None),
        *((200, body, None) for body in (b"", b"null", b"[]", b'"prompt_id"', b"{", b"\xff", b"[" * 100_000)),
    ],
)
def test_what_an_answer_names(status: int, body: bytes, work: Work | None) -> None:
    assert speak("comfyui", "http://x").work_begun(status, body) == work


@pytest.mark.parametrize(
    ("queue", "history", "done"),
    [
        (QUEUED, None, False),
        (RUNNING, None, False),  # an id that was used before is in the history as well: nobody looks
        (OTHERS, says({"6b1f": {"status": {"status_str": "error"}}}), True),
        (OTHERS, says({}), None),
        (OTHERS, says([]), None),
        (OTHERS, says(status=404), None),
        (OTHERS, raw(OK_HEAD + b"Content-Length: 5000000\r\n\r\n" + b" " * 5_000_000), None),
    ],
)
def test_a_prompt_is_done_when_the_history_has_it(queue: dict[str, Any], history: Script | None, done: object) -> None:
    with Wire([says(queue), *([] if history is None else [history])]) as wire:
        assert speak("comfyui", wire.url).is_done(PROMPT) is done
    assert [path for _, path, _ in wire.calls] == ["/queue", *([] if history is None else ["/history/6b1f"])]


def test_a_prompt_is_asked_for_by_its_escaped_name() -> None:
    with Wire([says(OTHERS), says({"a/../b?": {}})]) as wire:
        assert speak("comfyui", wire.url).is_done(Work("prompt", "a/../b?")) is True
    assert wire.calls[1][1] == "/history/a%2F..%2Fb%3F"


def test_a_history_that_hangs_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumgr.adapters.dialects.comfyui.REPORT_SECONDS", LIMIT_SECONDS)
    with Wire([says(OTHERS), stalls()]) as wire:
        require(timed(lambda: speak("comfyui", wire.url).is_done(PROMPT)), "hung")
    with Wire([says([])]) as wire:
        assert refusal(lambda: speak("comfyui", wire.url).is_done(PROMPT)).reason == "failed"


@pytest.mark.parametrize(
    ("stats", "report"),
    [
        ({"devices": [{"torch_vram_total": 9000 * MIB}]}, LoadedReport(loaded=True, used_mib=9000)),
        ({"devices": [{"torch_vram_total": 700 * MIB}]}, LoadedReport(loaded=False, used_mib=700)),
        ({"devices": []}, None),
        ({"devices": [{}]}, None),
        ({"devices": [{"torch_vram_total": "much"}]}, None),
        ({}, None),
        ([], None),
    ],
)
def test_comfyui_that_does_not_tell_its_memory_has_no_report(stats: object, report: LoadedReport | None) -> None:
    with Wire([says(stats)]) as wire:
        assert speak("comfyui", wire.url).loaded() == report


def models(*names: str) -> Script:
    return says({"models": [{"name": name, "model": name, "size_vram": 3000 * MIB} for name in names]})


def test_ollama_unloads_every_model_by_name() -> None:
    with Wire([models("llama3.1:8b", "nomic-embed-text:latest"), says({"done_reason": "unload"})]) as wire:
        speak("ollama", wire.url).unload(5)
    assert wire.calls == [
        ("GET", "/api/ps", None),
        ("POST", "/api/generate", {"model": "llama3.1:8b", "keep_alive": 0}),
        ("POST", "/api/generate", {"model": "nomic-embed-text:latest", "keep_alive": 0}),
    ]


# A name that was removed while it is loaded is a 404; asking again begins with the same one.
def test_ollama_unloads_the_other_models_where_one_fails() -> None:
    gone = says({"error": "model 'gone' not found"}, 404)
    with Wire([models("gone", "llama3.1:8b"), gone, says({"done_reason": "unload"})]) as wire:
        error = refusal(lambda: speak("ollama", wire.url).unload(5))
    assert error.reason == "failed"
    assert ("POST", "/api/generate", {"model": "llama3.1:8b", "keep_alive": 0}) in wire.calls


# Asked again while one of its models still went, it remembered that one alone; and who only embeds says no to a load.
def test_ollama_brings_back_what_the_whole_unload_took() -> None:
    unloaded, no = says({"done_reason": "unload"}), says({"error": '"embed" does not support generate'}, 400)
    script = [models("embed", "chat"), unloaded, unloaded, models("chat"), unloaded, no, says({"done_reason": "load"})]
    with Wire(script) as wire:
        ollama = speak("ollama", wire.url)
        ollama.unload(5)
        ollama.unload(5)
        ollama.restore()
    loads = [("POST", "/api/generate", {"model": name}) for name in ("embed", "chat")]
    assert wire.calls[-2:] == loads


def test_ollama_that_can_bring_nothing_back_says_so() -> None:
    gone = says({"error": "model 'chat' not found"}, 404)
    with Wire([models("chat"), says({"done_reason": "unload"}), gone]) as wire:
        ollama = speak("ollama", wire.url)
        ollama.unload(5)
        assert "404" in str(refusal(ollama.restore))


@pytest.mark.parametrize("nothing", [{"models": []}, {"models": None}, {}])
def test_ollama_without_models_has_nothing_to_unload(nothing: object) -> None:
    with Wire([says(nothing)]) as wire:
        ollama = speak("ollama", wire.url)
        ollama.unload(5)
        assert ollama.loaded() == LoadedReport(loaded=False, used_mib=0)
    assert wire.calls == [("GET", "/api/ps", None)] * (1 + 1 + FLICKERS)


def test_ollama_s_list_may_leave_out_a_model_for_a_poll_or_two() -> None:
    with Wire([says({"models": []}), says({"models": []}), models("a:1")]) as wire:
        assert speak("ollama", wire.url).loaded() == LoadedReport(loaded=True, used_mib=3000)


def test_ollama_is_asked_with_its_own_paths_and_adds_up() -> None:
    with Wire([says({"version": "0.33.0"}), models("a:1", "b:1")]) as wire:
        ollama = speak("ollama", wire.url)
        ollama.health()
        assert ollama.loaded() == LoadedReport(loaded=True, used_mib=6000)
        assert ollama.busy() is None  # it has no such report
    assert wire.calls == [("GET", "/api/version", None), ("GET", "/api/ps", None)]


def test_ollama_that_computes_on_the_cpu_holds_nothing() -> None:
    with Wire([says({"models": [{"name": "a:1", "size_vram": 0}, {"name": "b:1"}]})]) as wire:
        assert speak("ollama", wire.url).loaded() == LoadedReport(loaded=False, used_mib=0)


def test_http_does_what_the_file_says_and_nothing_else() -> None:
    calls = {
        "health": Call(path="/health", timeout_seconds=1),
        "unload": Call(method="DELETE", path="/model", json={"why": "gpumgr"}),
        "load": Call(path="/model", json=[1]),
        "busy": Report("/stats", "queue.running"),
        "loaded": Report("/stats", "model"),
    }
    stats = {"queue": {"running": 0}, "model": "base.en"}
    with Wire([says(), says(), says(), says(stats)]) as wire:
        http = speak("http", wire.url, **calls)
        assert (http.can_unload, http.can_load) == (True, True)
        http.health()
        http.unload(5)
        http.load()
        assert http.busy() is False
        assert http.loaded() == LoadedReport(loaded=True, used_mib=None)
    assert wire.calls == [
        ("GET", "/health", None),
        ("DELETE", "/model", {"why": "gpumgr"}),
        ("POST", "/model", [1]),
        ("GET", "/stats", None),
        ("GET", "/stats", None),
    ]


def test_http_without_calls_is_silent() -> None:
    with Wire([says()]) as wire:
        http = speak("http", wire.url)
        assert (http.can_unload, http.can_load) == (False, False)
        assert (http.busy(), http.loaded()) == (None, None)
        http.load()
    assert wire.calls == []


def test_the_path_of_the_url_stays_in_front() -> None:
    with Wire([says()]) as wire:
        speak("comfyui", f"{wire.url}/comfy").unload(5)
    assert [asked.path for asked in wire.asked] == ["/comfy/api/free"]


@pytest.mark.parametrize(
    ("answer", "path", "truth"),
    [
        ({"running": 1}, "running", True),
        ({"running": 0}, "running", False),
        ({"running": True}, "running", True),
        ({"running": False}, "running", False),
        ({"running": None}, "running", False),
        ({"running": [1, 2]}, "running", True),
        ({"running": []}, "running", False),
        ({"running": {}}, "running", False),
        ({"running": "yes"}, "running", True),
        ({"a": [{"b": 0.5}]}, "a.0.b", True),
        ([3], "0", True),
    ],
)
def test_a_report_is_a_number_a_truth_or_a_length(answer: object, path: str, truth: bool) -> None:
    with Wire([says(answer)]) as wire:
        assert speak("http", wire.url, busy=Report("/busy", path)).busy() is truth


@pytest.mark.parametrize("above", [2, 2.5])
def test_a_report_has_a_limit(above: float) -> None:
    with Wire([says({"n": 2}), says({"n": 3})]) as wire:
        http = speak("http", wire.url, busy=Report("/busy", "n", above=above))
        assert (http.busy(), http.busy()) == (False, True)


@pytest.mark.parametrize(
    ("answer", "path"),
    [({}, "n"), ({"n": 1}, "n.m"), ([], "0"), ([1], "x"), ({"n": {}}, "n.m"), (7, "n"), ("n", "n")],
)
def test_a_report_that_lacks_the_field_is_a_failure_that_names_it(answer: object, path: str) -> None:
    with Wire([says(answer)]) as wire:
        error = refusal(speak("http", wire.url, busy=Report("/busy", path)).busy)
    assert error.reason == "failed"
    assert "GET /busy" in str(error)
    assert repr(path) in str(error)


@pytest.mark.parametrize(
    ("dialect", "path", "status", "healthy"),
    [
        ("http", None, 200, True),
        ("http", None, 404, True),  # a server without a page at / still serves
        ("http", None, 500, False),
        ("http", "/health", 204, True),
        ("http", "/health", 404, False),
        ("http", "/health", 503, False),
        ("comfyui", None, 404, False),
        ("comfyui", None, 503, False),
        ("ollama", None, 404, False),
        ("ollama", "/", 200, True),
    ],
)
def test_health_is_a_matter_of_the_status(dialect: str, path: str | None, status: int, healthy: bool) -> None:
    with Wire([says(status=status)]) as wire:
        it = speak(dialect, wire.url, health=Call(path=path))
        if healthy:
            it.health()
        else:
            error = refusal(it.health)
            assert error.reason == "failed"
            assert str(status) in str(error)
    assert len(wire.asked) == 1


# -- overrides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["comfyui", "ollama"])
def test_what_the_file_says_wins(dialect: str) -> None:
    own = {
        "health": Call(path="/alive"),
        "unload": Call(method="PUT", path="/drop", json={"all": True}),
        "load": Call(path="/take"),
        "busy": Report("/work", "n", above=1),
        "loaded": Report("/memory", "n"),
    }
    with Wire([says(), says(), says(), says({"n": 1})]) as wire:
        it = speak(dialect, wire.url, **own)
        it.health()
        it.unload(5)
        it.load()
        assert it.busy() is False
        assert it.loaded() == LoadedReport(loaded=True)
    assert [(asked.method, asked.path) for asked in wire.asked] == [
        ("GET", "/alive"),
        ("PUT", "/drop"),
        ("POST", "/take"),
        ("GET", "/work"),
        ("GET", "/memory"),
    ]
    assert wire.asked[1].json == {"all": True}


def test_only_a_time_limit_in_the_file_keeps_the_dialects_own_call() -> None:
    with Wire([says()]) as wire:
        speak("comfyui", wire.url, unload=Call(timeout_seconds=7)).unload(7)
    assert wire.calls == [("POST", "/api/free", FREE)]


def test_the_time_limits_of_the_file_win() -> None:
    quick = {
        "health": Call(path="/h", timeout_seconds=LIMIT_SECONDS),
        "load": Call(path="/l", timeout_seconds=LIMIT_SECONDS),
        "busy": Report("/b", "n", timeout_seconds=LIMIT_SECONDS),
        "loaded": Report("/m", "n", timeout_seconds=LIMIT_SECONDS),
    }
    with Wire([stalls()]) as wire, ThreadPoolExecutor(4) as pool:
        for dialect in ("http", "comfyui", "ollama"):
            it = speak(dialect, wire.url, **quick)
            for outcome in pool.map(timed, [it.health, it.load, it.busy, it.loaded]):
                require(outcome, "hung")


# -- on the simulated services ------------------------------------------------------------------------------


@pytest.fixture
def card() -> SimulatedCard:
    return SimulatedCard()


@pytest.fixture
def comfyui(card: SimulatedCard) -> Iterator[ComfyUI]:
    with ComfyUI("comfyui", card, load_seconds=0.04, unload_seconds=0.04, render_seconds=0.1) as service:
        yield service


@pytest.fixture
def ollama(card: SimulatedCard) -> Iterator[Ollama]:
    two = {"llama3.1:8b": 9000, "qwen3:4b": 4000}
    with Ollama("ollama", card, models=two, load_seconds=0.04, unload_seconds=0.04) as service:
        yield service


@pytest.fixture
def speech(card: SimulatedCard) -> Iterator[Speech]:
    with Speech("mvoice", card, load_seconds=0.04, unload_seconds=0.04, work_seconds=0.1) as service:
        yield service


def prompt(service: ComfyUI) -> None:
    requests.post(f"{service.url}/prompt", json={"prompt": {"1": {}}}, timeout=5).raise_for_status()


def generate(service: Ollama, model: str, text: str = "") -> requests.Response:
    body = {"model": model, "prompt": text, "stream": False}
    return requests.post(f"{service.url}/api/generate", json=body, timeout=5)


def test_comfyui_from_work_to_unload(comfyui: ComfyUI) -> None:
    it = speak("comfyui", comfyui.url)
    it.health()
    assert it.busy() is False
    assert it.loaded() == LoadedReport(loaded=False, used_mib=0)
    prompt(comfyui)
    assert it.busy() is True
    until(lambda: it.busy() is False)
    assert it.loaded() == LoadedReport(loaded=True, used_mib=comfyui.resident_mib - comfyui.context_mib)
    it.unload(5)
    until(lambda: comfyui.used_mib == comfyui.context_mib)
    until(lambda: it.loaded() == LoadedReport(loaded=False, used_mib=0))
    assert (comfyui.unload_calls, comfyui.unloads_while_busy) == (1, 0)


def test_comfyui_tells_what_became_of_a_prompt(comfyui: ComfyUI) -> None:
    dialect = speak("comfyui", comfyui.url)
    answer = requests.post(f"{comfyui.url}/prompt", json={"prompt": {}}, timeout=5)
    work = dialect.work_begun(answer.status_code, answer.content)
    assert work is not None
    assert dialect.is_done(work) is False
    until(lambda: dialect.is_done(work))
    comfyui.stop()
    assert refusal(lambda: dialect.is_done(work)).refused
    comfyui.start()
    assert dialect.is_done(work) is None  # another process knows nothing of it


def test_comfyui_that_is_unhealthy_says_so_and_can_still_be_unloaded(comfyui: ComfyUI) -> None:
    prompt(comfyui)
    it = speak("comfyui", comfyui.url)
    until(lambda: it.busy() is False)
    comfyui.faults.unhealthy = True
    assert refusal(it.health).reason == "failed"
    assert refusal(it.loaded).reason == "failed"
    it.unload(5)
    until(lambda: comfyui.used_mib == comfyui.context_mib)


def test_ollama_with_two_models(ollama: Ollama) -> None:
    it = speak("ollama", ollama.url)
    it.health()
    assert it.loaded() == LoadedReport(loaded=False, used_mib=0)
    for model in ollama.models:
        generate(ollama, model)
    assert it.loaded() == LoadedReport(loaded=True, used_mib=13000)
    it.unload(5)
    until(lambda: ollama.used_mib == ollama.context_mib)
    assert ollama.unload_calls == 2
    assert it.loaded() == LoadedReport(loaded=False, used_mib=0)
    ollama.faults.unhealthy = True
    assert refusal(it.health).reason == "failed"


def test_ollama_whose_report_hangs_is_loading(ollama: Ollama) -> None:
    ollama.load_seconds = 3.0
    it = speak("ollama", ollama.url)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(generate, ollama, "llama3.1:8b")
        until(lambda: ollama.used_mib > 0)
        loaded, unload = pool.submit(it.loaded), timed(lambda: it.unload(5))
        assert loaded.result() == LoadedReport(loaded=True, used_mib=None)
        # Not an unload: asked again by whoever watches the card.
        assert isinstance(unload.error, BackendError)
        assert unload.error.reason == "hung"
        ollama.die()
    assert ollama.unload_calls == 0


def test_ollama_that_cannot_be_reached_is_no_load(ollama: Ollama) -> None:
    it = speak("ollama", ollama.url)
    ollama.die()
    assert refusal(it.loaded).reason == "unreachable"
    assert refusal(it.health).reason == "unreachable"
    assert refusal(lambda: it.unload(1)).reason == "unreachable"


def test_http_from_work_to_unload(speech: Speech) -> None:
    it = speak(
        "http", speech.url, health=Call(path="/health"), unload=Call(path="/unload"), busy=Report("/busy", "running")
    )
    it.health()
    assert it.busy() is False
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(requests.post, f"{speech.url}/v1/audio/speech", json={"input": "good day"}, timeout=5)
        until(lambda: it.busy() is True)
        assert work.result().status_code == 200
    until(lambda: it.busy() is False)
    assert speech.used_mib == speech.resident_mib
    it.unload(5)
    until(lambda: speech.used_mib == speech.context_mib)
    assert [path for _, method, path in speech.calls if method == "POST"] == ["/v1/audio/speech", "/unload"]
    speech.faults.unhealthy = True
    assert refusal(it.health).reason == "failed"


def test_a_service_that_dies_during_the_call(speech: Speech) -> None:
    speech.faults.dies_on_unload = True
    it = speak("http", speech.url, unload=Call(path="/unload"))
    assert refusal(lambda: it.unload(5)).reason == "failed"
    assert not speech.running
    assert refusal(lambda: it.unload(5)).reason == "unreachable"


def test_a_service_that_hangs_at_the_unload(speech: Speech) -> None:
    speech.faults.hang_unload = True
    it = speak("http", speech.url, unload=Call(path="/unload"), health=Call(path="/health"))
    require(timed(lambda: it.unload(LIMIT_SECONDS)), "hung")
    it.health()


# -- neither the environment nor a redirect leads anywhere else ---------------------------------------------


def test_the_environments_proxies_and_passwords_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    netrc.chmod(0o600)
    with Wire([says(status=502)]) as proxy, Wire([says()]) as wire:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("NETRC", str(netrc))
        assert requests.get(wire.url, timeout=5).status_code == 502  # else this test proves nothing
        it = speak("comfyui", wire.url)
        it.health()
        it.unload(5)
    assert len(proxy.asked) == 1
    assert [asked.path for asked in wire.asked] == ["/system_stats", "/api/free"]
    assert all("authorization" not in asked.headers for asked in wire.asked)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with Wire([says({"n": 1})]) as elsewhere, Wire([says(status=status, Location=elsewhere.url)]) as wire:
        it = speak("http", wire.url, unload=Call(path="/unload"), busy=Report("/busy", "n"), health=Call(path="/h"))
        for call in (lambda: it.unload(5), it.health, it.busy):
            assert refusal(call).reason == "failed"
    assert elsewhere.asked == []
    assert len(wire.asked) == 3


def test_no_connection_is_used_twice() -> None:
    """A kept one may be closed by the server just as we write: that unload would cost a second."""
    with Wire([says({"queue_running": [], "queue_pending": []})]) as wire:
        it = speak("comfyui", wire.url)
        for _ in range(3):
            it.busy()
    assert len(wire.asked) == 3  # Wire serves one request on each connection


# -- servers that fail --------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Http], object]] = {
    "health": lambda it: it.health(),
    "unload": lambda it: it.unload(LIMIT_SECONDS),
    "load": lambda it: it.load(),
    "busy": lambda it: it.busy(),
    "loaded": lambda it: it.loaded(),
}
ENDS_IN_TIME = [
    pytest.param(stalls(), id="never-answers"),
    pytest.param(stalls(OK_HEAD), id="stops-in-the-head"),
    pytest.param(trickles(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"), id="trickles-chunks"),
]
# A time limit for each read of the socket would let these last for ever: and with them the preparation, its GPU's turn,
# and the thread that observes everybody's health.
NEVER_ENDS = [
    pytest.param(trickles(OK_HEAD + b"X-Slow: ", b"x"), id="trickles-a-header"),
    pytest.param(trickles(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="continues-for-ever"),
    pytest.param(trickles(OK_HEAD + b"Content-Length: 100000\r\n\r\n", b"x"), id="trickles-a-body-of-known-length"),
    pytest.param(trickles(OK_HEAD + b"\r\n", b"x"), id="trickles-a-body-until-closed"),
    pytest.param(trickles(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0"), id="trickles-a-chunks-size"),
]
# "unreachable" would be more than a wrong word here: of an unreachable consumer the broker believes that it holds
# nothing (runtime/preparation.py, ask_reports).
WRONG_REASON = [
    pytest.param(stalls(OK_HEAD + b"Content-Length: 10\r\n\r\n{}"), id="stops-in-a-body-of-known-length"),
    pytest.param(stalls(OK_HEAD + b"\r\n{}"), id="stops-in-a-body-until-closed"),
    pytest.param(stalls(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"), id="stops-between-chunks"),
]


@pytest.mark.parametrize("script", [*ENDS_IN_TIME, *NEVER_ENDS, *WRONG_REASON])
def test_a_server_that_does_not_come_to_an_end_hangs(script: Script) -> None:
    with Wire([script]) as wire:
        it = speak("http", wire.url, busy=Report("/busy", "n", timeout_seconds=LIMIT_SECONDS))
        error = require(timed(it.busy), "hung")
    assert "GET /busy" in str(error)
    assert f"{LIMIT_SECONDS:g} s" in str(error)


def limited(url: str) -> Http:
    return speak(
        "http",
        url,
        health=Call(path="/health", timeout_seconds=LIMIT_SECONDS),
        unload=Call(path="/unload"),
        load=Call(path="/load", timeout_seconds=LIMIT_SECONDS),
        busy=Report("/busy", "n", timeout_seconds=LIMIT_SECONDS),
        loaded=Report("/loaded", "n", timeout_seconds=LIMIT_SECONDS),
    )


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_has_its_time_limit(call: Callable[[Http], object]) -> None:
    with Wire([stalls()]) as wire:
        require(timed(lambda: call(limited(wire.url))), "hung")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_closed_port_is_unreachable(call: Callable[[Http], object]) -> None:
    with Wire([says()]) as wire:
        url = wire.url
    error = require(timed(lambda: call(limited(url))), "unreachable")
    assert url in str(error)


def test_a_listener_that_takes_nobody_ends_in_time() -> None:
    """Its backlog is full, so the kernel answers no more: the first packet is sent again and again."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        outcome = timed(limited(f"http://127.0.0.1:{listener.getsockname()[1]}").busy)
    assert isinstance(outcome.error, BackendError)
    assert outcome.error.reason in ("hung", "unreachable")
    assert outcome.seconds < LIMIT_SECONDS + SLACK_SECONDS


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_500_fails(call: Callable[[Http], object]) -> None:
    with Wire([says({"error": "CUDA error: out of memory"}, 500)]) as wire:
        error = require(timed(lambda: call(limited(wire.url))), "failed")
    assert "500" in str(error)


def test_a_500_is_quoted_in_one_short_line() -> None:
    long = says("the worker\n\n  died " + "x" * 5000, 500)
    with Wire([long]) as wire:
        said = str(refusal(lambda: limited(wire.url).unload(5)))
    assert said.startswith('POST /unload answers 500 "the worker')
    assert "died" in said
    assert "\n" not in said
    assert len(said) < 300


FAILS = [
    pytest.param(raw(OK_HEAD + b"Content-Length: 5\r\n\r\nhello"), id="no-json"),
    pytest.param(raw(OK_HEAD + b"Content-Length: 0\r\n\r\n"), id="empty"),
    pytest.param(raw(OK_HEAD + b"Content-Length: 2\r\n\r\n\xff\xfe"), id="no-text"),
    pytest.param(raw(OK_HEAD + b"Content-Length: 10\r\n\r\n{}"), id="cut-in-a-body-of-known-length"),
    pytest.param(raw(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n8\r\n{}"), id="cut-in-a-chunk"),
    pytest.param(raw(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"), id="chunks-of-no-size"),
    pytest.param(raw(OK_HEAD + b"Content-Enc"), id="cut-in-the-head"),
    pytest.param(raw(OK_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"), id="no-gzip"),
    pytest.param(floods(OK_HEAD + b"\r\n", b" " * 65536), id="an-endless-body"),
    pytest.param(floods(OK_HEAD + b"Content-Length: 99999999999\r\n\r\n", b" " * 65536), id="an-endless-known-length"),
    pytest.param(
        floods(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"8000\r\n" + b" " * 0x8000 + b"\r\n"),
        id="endless-chunks",
    ),
]
# RecursionError and OverflowError are no ValueErrors. "Raises BackendError alone" is what ports.Dialect promises: else
# it is a traceback in an unload thread and a victim without a reason, and in a preparation an internal_error.
NO_BACKEND_ERROR = [
    pytest.param(raw(OK_HEAD + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000), id="brackets-without-end"),
    pytest.param(raw(OK_HEAD + b"Content-Length: 406\r\n\r\n" + b'{"n":1' + b"0" * 399 + b"}"), id="a-huge-number"),
]


@pytest.mark.parametrize("script", [*FAILS, *NO_BACKEND_ERROR])
def test_an_answer_that_cannot_be_read_fails(script: Script) -> None:
    with Wire([script]) as wire:
        outcome = timed(speak("http", wire.url, busy=Report("/busy", "n", timeout_seconds=1.5)).busy)
    assert isinstance(outcome.error, BackendError), repr(outcome.error)
    assert outcome.error.reason == "failed", outcome.error


@pytest.mark.parametrize(
    "models",
    [
        [{"name": "a", "size_vram": "much"}],
        [{"name": "a", "size_vram": [1]}],
        [{"name": "a", "size_vram": 1e999}],
        7,
        [{"size_vram": 1}],
        ["a"],
    ],
    ids=["a-word", "a-list", "infinite", "no-list", "no-name", "no-object"],
)
def test_ollama_whose_report_is_nonsense_fails(models: object) -> None:
    with Wire([says({"models": models})]) as wire:
        outcome = timed(speak("ollama", wire.url).loaded)
    assert isinstance(outcome.error, BackendError), repr(outcome.error)
    assert outcome.error.reason == "failed"


def test_comfyui_whose_report_is_infinite_has_none() -> None:
    with Wire([says({"devices": [{"torch_vram_total": float("inf")}]})]) as wire:
        assert timed(speak("comfyui", wire.url).loaded).error is None


@pytest.mark.parametrize(
    ("script", "reasons"),
    [
        (raw(b""), {"unreachable", "failed"}),
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), {"unreachable", "failed"}),
        (raw(b"HTTP/1.1 many\r\n\r\n"), {"unreachable", "failed"}),
        (lambda connection, _: _reset(connection), {"unreachable", "failed"}),
    ],
    ids=["nothing", "another-protocol", "no-status", "reset"],
)
def test_a_connection_without_an_answer_is_a_backend_error(script: Script, reasons: set[str]) -> None:
    with Wire([script]) as wire:
        outcome = timed(limited(wire.url).busy)
    assert isinstance(outcome.error, BackendError), repr(outcome.error)
    assert outcome.error.reason in reasons


def _reset(connection: socket.socket) -> None:
    linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def test_a_slow_answer_within_the_limit_is_an_answer() -> None:
    body = b'{"n": 1}'
    pieces = itertools.chain([OK_HEAD, b"Content-Length: 8\r\n\r\n"], (body[i : i + 1] for i in range(len(body))))

    def slowly(connection: socket.socket, over: threading.Event) -> None:
        for piece in pieces:
            connection.sendall(piece)
            over.wait(0.01)

    with Wire([slowly]) as wire:
        assert speak("http", wire.url, busy=Report("/busy", "n", timeout_seconds=2)).busy() is True
