"""What every service does: life, death, and the lies of health and unload. Shown on the plain speech server."""

from __future__ import annotations

import http.client
import io
import threading
import wave
from collections.abc import Iterator

import pytest
import requests

from gpumgr.sim.card import SimulatedCard
from gpumgr.sim.ollama import Ollama
from gpumgr.sim.speech import Speech
from gpumgr.sim.untracked import game
from tests.sim.conftest import Aside
from tests.waiting import until

CONTEXT_MIB = 400


@pytest.fixture
def speech(card: SimulatedCard, aside: Aside) -> Iterator[Speech]:
    del aside  # asked for first, so that it ends last: its requests are cut by this service's end
    with Speech("mvoice", card, load_seconds=0.04, unload_seconds=0.04, work_seconds=0.02) as service:
        yield service


def speak(service: Speech) -> requests.Response:
    return requests.post(f"{service.url}/v1/audio/speech", json={"input": "good day"}, timeout=5)


def unload(service: Speech, seconds: float = 5) -> int:
    return requests.post(f"{service.url}/unload", json={}, timeout=seconds).status_code


def get(service: Speech, path: str) -> requests.Response:
    return requests.get(service.url + path, timeout=5)


def test_speech_is_a_real_wav_and_loads_on_first_use(card: SimulatedCard, speech: Speech) -> None:
    assert card.used_mib(speech.pid) == 0
    with wave.open(io.BytesIO(speak(speech).content)) as file:
        assert file.getnframes() > 0
    assert (card.used_mib(speech.pid), speech.loads, speech.work_calls) == (3000, 1, 1)


def test_a_transcription_reads_the_upload(speech: Speech) -> None:
    def transcribe(**form: object) -> requests.Response:
        return requests.post(f"{speech.url}/v1/audio/transcriptions", timeout=5, **form)  # type: ignore[arg-type]

    assert "5 bytes" in transcribe(files={"file": ("a.wav", b"12345")}, data={"model": "whisper-1"}).json()["text"]
    assert transcribe(data={"model": "whisper-1"}).status_code == 400


def test_busy_counts_and_an_unload_waits_for_the_work(speech: Speech, aside: Aside) -> None:
    speech.work_seconds = 0.12
    work = [aside(lambda: speak(speech)) for _ in range(2)]
    until(lambda: get(speech, "/busy").json() == {"running": 2} and speech.used_mib == 3000)
    assert unload(speech) == 200
    assert speech.unloads_while_busy == 1
    assert [answer.result().status_code for answer in work] == [200, 200]
    until(lambda: speech.used_mib == CONTEXT_MIB)
    assert speak(speech).status_code == 200
    assert speech.loads == 2


def test_what_does_not_fit_is_a_500(card: SimulatedCard, speech: Speech) -> None:
    game(card, "game", 22000)
    answer = speak(speech)
    assert answer.status_code == 500
    assert "CUDA out of memory" in answer.json()["error"]
    assert (card.over_commits, speech.loads, speech.used_mib) == (1, 0, CONTEXT_MIB)


def test_one_connection_serves_many_requests(speech: Speech) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", speech.port, timeout=5)
    connection.connect()
    first = connection.sock
    for _ in range(3):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status": "ok"}'
        assert connection.sock is first
    connection.close()


def test_a_chunked_request_is_read(speech: Speech) -> None:
    body = iter([b'{"input": ', b'"good day"}'])
    assert requests.post(f"{speech.url}/v1/audio/speech", data=body, timeout=5).status_code == 200


def test_unhealthy_is_only_told_by_health(speech: Speech) -> None:
    speech.faults.unhealthy = True
    assert get(speech, "/health").status_code == 503
    assert speak(speech).status_code == 200


def test_the_memory_falls_only_when_the_gate_opens(speech: Speech) -> None:
    speak(speech)
    gate = speech.faults.unload_gate = threading.Event()
    assert unload(speech) == 200
    with pytest.raises(TimeoutError):
        until(lambda: speech.used_mib < 3000, seconds=0.1)
    gate.set()
    until(lambda: speech.used_mib == CONTEXT_MIB)


def test_a_slow_unload(speech: Speech) -> None:
    speak(speech)
    speech.faults.slow_unload_seconds = 0.15
    assert unload(speech) == 200
    with pytest.raises(TimeoutError):
        until(lambda: speech.used_mib < 3000, seconds=0.05)
    until(lambda: speech.used_mib == CONTEXT_MIB)


def test_a_hanging_service_still_ends(speech: Speech) -> None:
    speech.faults.hang_unload = True
    with pytest.raises(requests.ReadTimeout):
        unload(speech, seconds=0.05)
    assert get(speech, "/health").status_code == 200
    speech.faults.hang = True
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"{speech.url}/health", timeout=0.05)


def test_death_at_the_unload_call(card: SimulatedCard, speech: Speech) -> None:
    speak(speech)
    speech.faults.dies_on_unload = True
    with pytest.raises(requests.ConnectionError):
        unload(speech)
    assert (card.free_mib(), speech.running) == (24000, False)
    with pytest.raises(requests.ConnectionError):
        get(speech, "/health")


def test_another_life_is_another_pid_on_the_same_port(card: SimulatedCard, speech: Speech) -> None:
    speak(speech)
    before = speech.pid, speech.port
    speech.die()
    speech.start()
    assert (speech.pid != before[0], speech.port) == (True, before[1])
    assert card.used_mib(speech.pid) == 0
    assert speak(speech).status_code == 200


def test_death_cuts_a_stream_so_that_it_can_be_seen(card: SimulatedCard) -> None:
    with Ollama("ollama", card, load_seconds=0.02, token_seconds=0.05, tokens=100) as ollama:
        with requests.post(
            f"{ollama.url}/api/generate",
            json={"model": "llama3.1:8b", "prompt": "why"},
            stream=True,
            timeout=5,
        ) as answer:
            lines = answer.iter_lines(chunk_size=1)
            next(lines)
            ollama.die()
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                list(lines)
        assert card.free_mib() == 24000
