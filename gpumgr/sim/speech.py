"""A plain speech server, in both directions: the ``http`` dialect's example.

Owns: health, busy, unload, text to speech, speech to text. Must not: leave a request half done at an unload.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from gpumgr.sim.card import OutOfMemory, SimulatedCard
from gpumgr.sim.samples import form_parts, wav
from gpumgr.sim.server import Reply, Request, json_reply
from gpumgr.sim.service import Answer, SimulatedService

MODEL = "model"


class Speech(SimulatedService):
    """Loads at its first work. An unload is answered at once and done when the running work has ended."""

    def __init__(
        self,
        name: str,
        card: SimulatedCard,
        *,
        resident_mib: int = 3000,
        context_mib: int = 400,
        load_seconds: float = 0.1,
        unload_seconds: float = 0.06,
        work_seconds: float = 0.05,
        concurrent: int = 4,
        gpu: int = 0,
        port: int = 0,
    ) -> None:
        super().__init__(
            name,
            card,
            resident_mib=resident_mib,
            context_mib=context_mib,
            load_seconds=load_seconds,
            unload_seconds=unload_seconds,
            gpu=gpu,
            port=port,
        )
        self.work_seconds = work_seconds
        self._places = threading.BoundedSemaphore(concurrent)
        self._loading = threading.Lock()

    def _forget(self) -> None:
        super()._forget()
        self._loaded = False
        self._unload_due = False
        self._leaving = False

    def _routes(self) -> dict[tuple[str, str], Answer]:
        return {
            ("GET", "/health"): self._health,
            ("GET", "/busy"): lambda _: json_reply({"running": self.busy}),
            ("POST", "/unload"): self._unload_call,
            ("POST", "/v1/audio/speech"): self._speak,
            ("POST", "/v1/audio/transcriptions"): self._transcribe,
        }

    def _background(self) -> list[Callable[[], None]]:
        return [self._unload_when_idle]

    def _health(self, _: Request) -> Reply:
        if self.faults.unhealthy:
            return json_reply({"status": "unhealthy"}, 503)
        return json_reply({"status": "ok"})

    def _unload_call(self, _: Request) -> Reply:
        if self._unload_wanted():
            with self._changed:
                self._unload_due = True
                self._changed.notify_all()
        return json_reply({"status": "ok"})

    def _unload_when_idle(self) -> None:
        while True:
            with self._changed:
                self._until(lambda: self._unload_due and self._busy == 0)
                self._unload_due, self._leaving = False, self._loaded
            if self._leaving:
                self._unload(MODEL)
                with self._changed:
                    self._loaded = self._leaving = False
                    self._changed.notify_all()

    def _speak(self, request: Request) -> Reply:
        try:
            text = request.json()["input"]
        except (ValueError, KeyError, TypeError):
            return json_reply({"error": "the JSON body needs 'input'"}, 400)
        refusal = self._work()
        return refusal or Reply(200, wav(min(1.0, 0.1 + 0.01 * len(str(text)))), "audio/wav")

    def _transcribe(self, request: Request) -> Reply:
        upload = form_parts(request).get("file")
        if upload is None:
            return json_reply({"error": "the multipart form needs 'file'"}, 400)
        refusal = self._work()
        return refusal or json_reply({"text": f"A simulated transcription of {len(upload.content)} bytes."})

    def _work(self) -> Reply | None:
        """None when it is done, else the answer that says why not."""
        with self._working(), self._places:
            with self._changed:
                # Counted as busy before this look, so an unload either has begun by now or waits for this work.
                self._until(lambda: not self._leaving)
            try:
                with self._loading:
                    if not self._loaded:
                        self._load(MODEL, self.resident_mib)
                        self._loaded = True
            except OutOfMemory as error:
                return json_reply({"error": str(error)}, 500)
            self._sleep(self.work_seconds)
        return None
