"""ollama as it behaves: its scheduler, its streams, and the 200 that comes before the memory does.

Owns: ollama's routes and its loaded models. Must not: be kinder than the real server.

Run against ollama 0.33 on a CPU, 2026-11:

- ``keep_alive: 0`` without a prompt is answered 200 ``done_reason: unload`` at once; a running answer ends first.
- ``GET /api/ps`` waits while a model loads or leaves, so it is a barrier, and hangs for as long as a load takes.
- An unload during a load is answered 200 ``unload`` too; ``/api/ps`` then shows nothing, and the model stays loaded.

The real server keeps each model in a runner process of its own, whose context ends with it. Here all belongs to the
one process, which keeps its context: the harder case. ``context_mib=0`` plays the kinder one.
"""

from __future__ import annotations

import json
import math
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from gpumgr.sim.card import OutOfMemory, SimulatedCard
from gpumgr.sim.memory import Gone
from gpumgr.sim.server import Reply, Request, json_reply
from gpumgr.sim.service import Answer, SimulatedService

Kind = Literal["generate", "chat"]
MIB = 1024 * 1024
DEFAULT_MODELS = {"llama3.1:8b": 9000}
KEEP_ALIVE_SECONDS = 300.0
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)")
UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
WORDS = ("The", "card", "is", "free", "when", "the", "driver", "says", "so.", "Not", "before.")


@dataclass(slots=True)
class _Runner:
    """One loaded model. ``users`` are the answers under way."""

    state: Literal["loading", "loaded", "leaving"]
    keep_alive_seconds: float
    users: int = 0
    idle_since: float = 0.0
    """While it is used: since its last answer began, which /api/ps counts from."""
    unlisted: bool = False
    """/api/ps neither waits for it nor shows it."""

    def expires_at(self) -> float:
        return self.idle_since + self.keep_alive_seconds

    def is_settled(self) -> bool:
        """Neither coming nor going, and not about to go: the scheduler may not have seen yet what is due."""
        return self.state == "loaded" and not self.is_due(time.monotonic())

    def is_due(self, now: float) -> bool:
        return self.state == "loaded" and self.users == 0 and now >= self.expires_at()


class Ollama(SimulatedService):
    """``models`` maps names to MiB. An answer is ``tokens`` words, one each ``token_seconds``."""

    def __init__(
        self,
        name: str,
        card: SimulatedCard,
        *,
        models: Mapping[str, int] | None = None,
        context_mib: int = 400,
        load_seconds: float = 0.2,
        unload_seconds: float = 0.06,
        tokens: int = 8,
        token_seconds: float = 0.01,
        gpu: int = 0,
        port: int = 0,
    ) -> None:
        self.models = dict(DEFAULT_MODELS if models is None else models)
        super().__init__(
            name,
            card,
            resident_mib=max(self.models.values(), default=0),
            context_mib=context_mib,
            load_seconds=load_seconds,
            unload_seconds=unload_seconds,
            gpu=gpu,
            port=port,
        )
        self.tokens = tokens
        self.token_seconds = token_seconds

    def _forget(self) -> None:
        super()._forget()
        self._runners: dict[str, _Runner] = {}

    def _routes(self) -> dict[tuple[str, str], Answer]:
        return {
            ("GET", "/"): self._health,
            ("HEAD", "/"): self._health,
            ("GET", "/api/version"): self._version,
            ("GET", "/api/tags"): lambda _: json_reply({"models": [self._described(name) for name in self.models]}),
            ("GET", "/api/ps"): self._ps,
            ("POST", "/api/show"): self._show,
            ("POST", "/api/generate"): lambda request: self._native(request, "generate"),
            ("POST", "/api/chat"): lambda request: self._native(request, "chat"),
            ("POST", "/v1/chat/completions"): self._openai,
            ("GET", "/v1/models"): self._openai_models,
        }

    def _background(self) -> list[Callable[[], None]]:
        return [self._unload_what_is_due]

    # Reports

    def _health(self, _: Request) -> Reply:
        if self.faults.unhealthy:
            return Reply(503)
        return Reply(200, b"Ollama is running", "text/plain; charset=utf-8")

    def _version(self, _: Request) -> Reply:
        return Reply(503) if self.faults.unhealthy else json_reply({"version": "0.33.0"})

    def _described(self, name: str) -> dict[str, object]:
        return {
            "name": name,
            "model": name,
            "size": self.models[name] * MIB,
            "digest": f"{zlib.crc32(name.encode()):064x}",
            "details": {"format": "gguf", "family": "llama", "parameter_size": "8B", "quantization_level": "Q4_K_M"},
        }

    def _ps(self, _: Request) -> Reply:
        with self._changed:
            self._until(lambda: all(r.unlisted or r.is_settled() for r in self._runners.values()))
            loaded = {name: r.expires_at() for name, r in self._runners.items() if not r.unlisted}
            if loaded and self.faults.unlisted_polls:
                self.faults.unlisted_polls -= 1
                loaded = {}
        return json_reply({"models": [self._running(name, expires_at) for name, expires_at in loaded.items()]})

    def _running(self, name: str, expires_at: float) -> dict[str, object]:
        left = min(expires_at - time.monotonic(), 1e9)
        return self._described(name) | {
            "size_vram": self.models[name] * MIB,
            "context_length": 4096,
            "expires_at": (datetime.now(UTC) + timedelta(seconds=left)).isoformat(),
        }

    def _show(self, request: Request) -> Reply:
        name = self._known(_body(request))
        if name is None:
            return _unknown(_body(request))
        return json_reply(
            {"details": self._described(name)["details"], "model_info": {"general.architecture": "llama"}}
        )

    def _openai_models(self, _: Request) -> Reply:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "library"} for name in self.models]
        return json_reply({"object": "list", "data": listed})

    def _known(self, body: Mapping[str, Any]) -> str | None:
        name = str(body.get("model") or body.get("name") or "")
        return next((known for known in (name, f"{name}:latest") if known in self.models), None)

    # Answers

    def _native(self, request: Request, kind: Kind) -> Reply:
        try:
            body = _body(request)
            keep_alive = _keep_alive_seconds(body.get("keep_alive"))
        except ValueError as error:
            return json_reply({"error": str(error)}, 400)
        name = self._known(body)
        if name is None:
            return _unknown(body)
        is_empty = not body.get("prompt" if kind == "generate" else "messages")
        if is_empty and keep_alive == 0:
            self._unload_call(name)
            return json_reply(_line(name, kind, "", "unload"))
        return self._answered(name, keep_alive, _NativeWords(name, kind, body, is_empty))

    def _openai(self, request: Request) -> Reply:
        try:
            body = _body(request)
        except ValueError as error:
            return json_reply({"error": {"message": str(error)}}, 400)
        name = self._known(body)
        if name is None:
            return json_reply(
                {"error": {"message": f"model {body.get('model')!r} not found", "type": "api_error"}}, 404
            )
        return self._answered(name, KEEP_ALIVE_SECONDS, _OpenAiWords(name, body))

    def _answered(self, name: str, keep_alive: float, words: _Words) -> Reply:
        """The load comes before the first byte, so that its failure can still be a 500."""
        with ExitStack() as until_answered:
            until_answered.enter_context(self._working())
            try:
                self._acquire(name, keep_alive)
            except OutOfMemory as error:
                return json_reply({"error": f"llama runner process has terminated: cudaMalloc failed: {error}"}, 500)
            until_answered.callback(self._release, name)
            if words.is_streamed:
                return Reply(200, self._stream(words, until_answered.pop_all()), words.content_type)
            spoken = list(self._speak(words))
        return json_reply(words.whole("".join(spoken)))

    def _speak(self, words: _Words) -> Iterator[str]:
        for index in range(0 if words.is_load_only else self.tokens):
            self._sleep(self.token_seconds)
            yield WORDS[index % len(WORDS)] + " "

    def _stream(self, words: _Words, until_answered: ExitStack) -> Iterator[bytes]:
        return _Stream((words.chunk(word) for word in self._speak(words)), words.end(), until_answered)

    # The scheduler

    def _acquire(self, name: str, keep_alive: float) -> None:
        """Wait until the model is loaded, by oneself or by another request. Raises: OutOfMemory, Gone."""
        with self._changed:
            self._until(lambda: name not in self._runners or self._runners[name].state == "loaded")
            runner = self._runners.get(name)
            if runner is not None:
                runner.users += 1
                runner.keep_alive_seconds = keep_alive
                runner.idle_since = time.monotonic()
                return
            runner = self._runners[name] = _Runner("loading", keep_alive, users=1, idle_since=time.monotonic())
        try:
            self._load(name, self.models[name])
        except (OutOfMemory, Gone):
            with self._changed:
                del self._runners[name]
                self._changed.notify_all()
            raise
        with self._changed:
            runner.state, runner.unlisted = "loaded", False
            self._changed.notify_all()

    def _release(self, name: str) -> None:
        with self._changed:
            runner = self._runners.get(name)
            if runner is not None:
                runner.users -= 1
                runner.idle_since = time.monotonic()
            self._changed.notify_all()

    def _unload_call(self, name: str) -> None:
        if not self._unload_wanted():
            return
        with self._changed:
            runner = self._runners.get(name)
            if runner is None:
                return
            if runner.state == "loading":
                runner.unlisted = True
            elif runner.state == "loaded":
                runner.keep_alive_seconds = 0
            self._changed.notify_all()

    def _unload_what_is_due(self) -> None:
        while True:
            with self._changed:
                name = self._next_due()
                leaving = self._runners[name]
                leaving.state = "leaving"
                # The real list is empty before a slow driver has the memory back.
                leaving.unlisted = bool(self.faults.slow_unload_seconds or self.faults.unload_gate)
                self._changed.notify_all()
            self._unload(name)
            with self._changed:
                del self._runners[name]
                self._changed.notify_all()

    def _next_due(self) -> str:
        """Wait for it; the lock is held."""
        while True:
            self._until(lambda: True)  # raises once the service has ended
            now = time.monotonic()
            for name, runner in self._runners.items():
                if runner.is_due(now):
                    return name
            idle = [r.expires_at() - now for r in self._runners.values() if r.state == "loaded" and r.users == 0]
            left = min(idle, default=math.inf)
            self._changed.wait(min(left, 3600.0))


class _Words:
    """How one API puts words into bytes."""

    content_type: str

    def __init__(self, name: str, is_streamed: bool, is_load_only: bool = False) -> None:
        self.name = name
        self.is_streamed = is_streamed
        self.is_load_only = is_load_only

    def chunk(self, word: str) -> bytes:
        raise NotImplementedError

    def end(self) -> bytes:
        raise NotImplementedError

    def whole(self, text: str) -> dict[str, object]:
        raise NotImplementedError


class _NativeWords(_Words):
    """NDJSON, streamed unless ``stream`` is false."""

    content_type = "application/x-ndjson"

    def __init__(self, name: str, kind: Kind, body: Mapping[str, Any], is_load_only: bool) -> None:
        super().__init__(name, body.get("stream") is not False and not is_load_only, is_load_only)
        self._kind = kind

    def chunk(self, word: str) -> bytes:
        return json.dumps(_line(self.name, self._kind, word, None)).encode() + b"\n"

    def end(self) -> bytes:
        return json.dumps(self.whole("")).encode() + b"\n"

    def whole(self, text: str) -> dict[str, object]:
        return _line(self.name, self._kind, text, "load" if self.is_load_only else "stop")


class _OpenAiWords(_Words):
    """Server-sent events when ``stream`` is true."""

    content_type = "text/event-stream"

    def __init__(self, name: str, body: Mapping[str, Any]) -> None:
        super().__init__(name, body.get("stream") is True)

    def _choice(self, kind: str, **choice: object) -> dict[str, object]:
        return {
            "id": "chatcmpl-1",
            "object": kind,
            "created": 0,
            "model": self.name,
            "choices": [{"index": 0} | choice],
        }

    def chunk(self, word: str) -> bytes:
        delta = {"role": "assistant", "content": word}
        return _event(self._choice("chat.completion.chunk", delta=delta, finish_reason=None))

    def end(self) -> bytes:
        return _event(self._choice("chat.completion.chunk", delta={}, finish_reason="stop")) + b"data: [DONE]\n\n"

    def whole(self, text: str) -> dict[str, object]:
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 1, "completion_tokens": len(text.split()), "total_tokens": 1 + len(text.split())}
        return self._choice("chat.completion", message=message, finish_reason="stop") | {"usage": usage}


class _Stream:
    """Chunks, then the end. Closing gives the model back even if nothing was ever read; a generator would not."""

    def __init__(self, chunks: Iterator[bytes], end: bytes, until_answered: ExitStack) -> None:
        self._chunks = chunks
        self._end: bytes | None = end
        self._until_answered = until_answered

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        end, self._end = self._end, None
        if end is None:
            raise StopIteration
        # Before the last chunk is sent: whoever has read the end may rely on the answer being over.
        self.close()
        return end

    def close(self) -> None:
        self._until_answered.close()


def _body(request: Request) -> Mapping[str, Any]:
    """Raises: ValueError."""
    body = request.json()
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body


def _unknown(body: Mapping[str, Any]) -> Reply:
    return json_reply({"error": f"model '{body.get('model')}' not found"}, 404)


def _event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _line(name: str, kind: Kind, text: str, done_reason: str | None) -> dict[str, object]:
    line: dict[str, object] = {"model": name, "created_at": datetime.now(UTC).isoformat()}
    line |= {"response": text} if kind == "generate" else {"message": {"role": "assistant", "content": text}}
    line["done"] = done_reason is not None
    if done_reason is not None:
        line["done_reason"] = done_reason
    if done_reason == "stop":
        line |= {"total_duration": 1, "load_duration": 1, "prompt_eval_count": 1, "eval_count": 1, "eval_duration": 1}
    return line


def _keep_alive_seconds(value: object) -> float:
    """Seconds as a number, or a Go duration such as "5m"; below zero is for ever. Raises: ValueError."""
    if value is None:
        return KEEP_ALIVE_SECONDS
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        text = str(value)
        found = DURATION.findall(text)
        if text.strip("-0") and "".join(number + unit for number, unit in found) != text.removeprefix("-"):
            raise ValueError(f'time: invalid duration "{text}"')
        seconds = sum(float(number) * UNIT_SECONDS[unit] for number, unit in found)
        seconds = -seconds if text.startswith("-") else seconds
    return math.inf if seconds < 0 else seconds
