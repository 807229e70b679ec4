"""The holders' library against the real broker, and through a relay that cuts its connections."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import pytest

from gpumgr import cli
from gpumgr.client import DEFAULT_URL, BrokerUnreachable, Gpu, HeldLease, LeaseLost
from gpumgr.errors import (
    ConsumerUnknown,
    InsufficientVram,
    InvalidRequest,
    KindUnknown,
    LeaseUnknown,
    RequestEnded,
    RequestMismatch,
    SchedulerTimeout,
)
from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker, free_port
from tests.waiting import until

Cut = Literal["before", "after", "within"]
"""A connection is cut before the broker gets the request, after it answered, or in the middle of its answer."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage"), speed=20) as running:
        yield running


def configured(stage: Stage) -> dict[str, Any]:
    return {**stage.config(), "lease": {"min_ttl_seconds": 1}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, stage: Stage) -> Iterator[RunningBroker]:
    with RunningBroker(tmp_path_factory.mktemp("broker"), configured(stage)) as found:
        yield found


@pytest.fixture
def broker(running: RunningBroker) -> Iterator[RunningBroker]:
    """The one broker of this file, which every test leaves without a lease."""
    yield running
    left = running.status()["leases"]
    for lease in left:
        running.release(lease["token"])
    assert left == []


@pytest.fixture
def gpu(broker: RunningBroker) -> Iterator[Gpu]:
    with Gpu(broker.url) as found:
        yield found


def leases(broker: RunningBroker) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = broker.status()["leases"]
    return found


def last_event(broker: RunningBroker) -> tuple[str, str]:
    event = broker.status()["events"][-1]
    return event["type"], event["consumer"]


def is_lost(lease: HeldLease) -> bool:
    try:
        lease.check()
    except LeaseLost:
        return True
    return False


# -- a lease's life -----------------------------------------------------------------------------------------


def test_the_with_block_acquires_renews_and_releases(gpu: Gpu, broker: RunningBroker, stage: Stage) -> None:
    with gpu.lease("image", holder="imagen", ttl_seconds=1) as lease:
        assert lease.url == stage.comfyui.url
        assert lease.ttl_seconds == 1
        (shown,) = leases(broker)
        assert (shown["token"], shown["fence"], shown["holder"]) == (lease.token, lease.fence, "imagen")
        # Past the end that it would have without the renewing, by another TTL.
        late = datetime.fromisoformat(lease.grant["granted_at"]) + timedelta(seconds=3)
        until(lambda: datetime.fromisoformat(leases(broker)[0]["expires_at"]) > late)
        lease.check()
    assert leases(broker) == []
    assert last_event(broker) == ("release", "comfyui")


def test_an_exception_in_the_block_releases_and_goes_on(gpu: Gpu, broker: RunningBroker) -> None:
    with pytest.raises(ZeroDivisionError), gpu.lease("llm"):
        raise ZeroDivisionError
    assert leases(broker) == []
    assert last_event(broker) == ("release", "ollama")


def test_acquire_leaves_the_renewing_to_the_caller(gpu: Gpu, broker: RunningBroker) -> None:
    lease = gpu.acquire(consumer="ollama", ttl_seconds=30)
    assert lease.renew(60)["ttl_seconds"] == 60
    answer = lease.renew()
    assert (answer["ttl_seconds"], answer["waiting"], answer["consumer_healthy"]) == (60, 0, True)
    assert (lease.ttl_seconds, lease.grant["expires_at"]) == (60, answer["expires_at"])
    assert not any(thread.name.startswith("gpumgr-renew") for thread in threading.enumerate())
    assert lease.release() is True
    assert lease.release() is False
    assert leases(broker) == []


def test_a_holder_is_told_who_wants_the_card(gpu: Gpu) -> None:
    lease = gpu.acquire(consumer="ollama")
    held = gpu.hold("bg3", 600)
    assert held is not None
    assert (held["state"], held["in_use"]) == ("draining", ["ollama"])
    lease.renew()
    assert lease.yield_reason is not None
    assert "keeps the GPU free (bg3)" in lease.yield_reason
    assert gpu.resume() is True
    assert gpu.held() is None
    assert lease.renew()["yield_requested"] is False
    lease.release()


def test_the_renewing_ends_with_the_lease(gpu: Gpu) -> None:
    with gpu.lease("llm") as lease:
        name = f"gpumgr-renew-{lease.grant['lease_id']}"
        assert name in [thread.name for thread in threading.enumerate()]
    assert name not in [thread.name for thread in threading.enumerate()]


def test_a_holder_is_told_who_waits_for_it(gpu: Gpu, broker: RunningBroker) -> None:
    with ThreadPoolExecutor(1) as pool, gpu.lease("image") as lease:
        waiting = pool.submit(gpu.acquire, "llm")
        until(lambda: lease.renew()["waiting"] == 1)
        lease.release()
        assert waiting.result(10).release() is True
    assert leases(broker) == []


def test_one_object_serves_many_threads(gpu: Gpu) -> None:
    with gpu.lease("image") as lease, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: lease.renew(), range(64)))
    assert {answer["token"] for answer in answers} == {lease.token}


# -- loss ---------------------------------------------------------------------------------------------------


def test_a_lease_that_the_broker_forgot_is_lost(gpu: Gpu, broker: RunningBroker) -> None:
    with gpu.lease("image", ttl_seconds=1) as lease:
        lease.check()
        broker.release(lease.token)
        until(lambda: is_lost(lease))  # by the renewing thread, without a call of ours
        with pytest.raises(LeaseLost, match="comfyui"):
            lease.check()
        with pytest.raises(LeaseLost, match="does not know it"):
            lease.renew()
        assert lease.release() is False


def test_a_lease_that_expired_is_lost(gpu: Gpu, broker: RunningBroker) -> None:
    lease = gpu.acquire("image", ttl_seconds=1)
    until(lambda: leases(broker) == [])
    assert last_event(broker) == ("expire", "comfyui")
    with pytest.raises(LeaseLost):
        lease.renew()
    with pytest.raises(LeaseLost):
        lease.check()


def test_check_needs_no_broker(gpu: Gpu) -> None:
    """The TTL alone tells it: a holder that was stopped for longer wakes up without its lease."""
    lease = gpu.acquire("image", ttl_seconds=1)
    lease.check()
    until(lambda: is_lost(lease))
    assert lease.release() in (False, True)  # whether the watchdog was there first


# -- errors -------------------------------------------------------------------------------------------------


def test_unknown_names_arrive_as_their_classes(gpu: Gpu) -> None:
    with pytest.raises(KindUnknown, match="image") as kind:
        gpu.acquire("video")
    assert kind.value.details == {"kind": "video"}
    with pytest.raises(ConsumerUnknown):
        gpu.acquire(consumer="nobody")
    with pytest.raises(LeaseUnknown):
        gpu.call("GET", "/v1/lease/nobody")
    with pytest.raises(InvalidRequest):
        gpu.acquire("image", consumer="comfyui")
    with pytest.raises(InvalidRequest):
        gpu.acquire("image", holder="x" * 129)


def test_a_timeout_says_who_holds_what(gpu: Gpu) -> None:
    with gpu.lease("image", holder="imagen") as lease:
        with pytest.raises(SchedulerTimeout) as timeout:
            gpu.acquire("llm", wait_seconds=0)
        (holder,) = timeout.value.details["holders"]
        assert (holder["lease_id"], holder["holder"]) == (lease.grant["lease_id"], "imagen")
        assert (timeout.value.retryable, timeout.value.status) == (True, 503)


def test_a_refusal_has_its_numbers(gpu: Gpu, stage: Stage) -> None:
    game = stage.take_game("bg3_dx11.exe", 12000)
    free_mib = stage.card.free_mib()
    try:
        with pytest.raises(InsufficientVram) as refusal:
            gpu.acquire("image")
    finally:
        game.end()
    details = refusal.value.details
    assert (details["needed_mib"], details["free_mib"], details["headroom_mib"]) == (14000, free_mib, 512)
    assert details["untracked"] == [{"pid": game.pid, "name": "bg3_dx11.exe", "used_mib": 12000}]
    assert not refusal.value.retryable


def test_request_id_has_one_lease(gpu: Gpu, broker: RunningBroker) -> None:
    with gpu.lease("image", holder="imagen", request_id="client-1") as lease:
        with Gpu(broker.url) as other:
            again = other.acquire("image", holder="imagen", request_id="client-1")
            assert (again.token, again.fence) == (lease.token, lease.fence)
            with pytest.raises(RequestMismatch):
                other.acquire("llm", holder="imagen", request_id="client-1")
        assert len(leases(broker)) == 1
    with pytest.raises(RequestEnded) as ended:
        gpu.acquire("image", holder="imagen", request_id="client-1")
    assert ended.value.details["reason"] == "released"


def test_every_acquire_is_a_request_of_its_own(gpu: Gpu) -> None:
    first = gpu.acquire("image")
    with pytest.raises(SchedulerTimeout):
        gpu.acquire("image", wait_seconds=0)
    first.release()


# -- a broker that is not there -----------------------------------------------------------------------------


def test_the_address_is_that_of_the_environment_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMGR_URL", "http://127.0.0.1:9/")
    with Gpu() as from_environment, Gpu("http://127.0.0.1:10") as given:
        assert (from_environment.url, given.url) == ("http://127.0.0.1:9", "http://127.0.0.1:10")
    monkeypatch.delenv("GPUMGR_URL")
    with Gpu() as usual:
        assert usual.url == DEFAULT_URL


def test_nobody_there() -> None:
    with Gpu(f"http://127.0.0.1:{free_port()}") as gpu:
        with pytest.raises(BrokerUnreachable, match="cannot be reached"):
            gpu.acquire("image")
        with pytest.raises(BrokerUnreachable):
            gpu.status()


def test_somebody_else_there(stage: Stage) -> None:
    with Gpu(stage.whisper.url) as gpu:
        with pytest.raises(BrokerUnreachable, match="not as gpumgr does"):
            gpu.status()
        with pytest.raises(BrokerUnreachable, match="not as gpumgr does"):
            gpu.acquire("image")


def test_a_broker_that_ends_under_a_lease(tmp_path: Path, stage: Stage) -> None:
    with RunningBroker(tmp_path, configured(stage)) as own, Gpu(own.url) as gpu:
        kept = gpu.lease("llm", ttl_seconds=1)
        held, hurt = gpu.acquire("tts", ttl_seconds=60), gpu.acquire("stt", ttl_seconds=60)
        own.stop(signal.SIGKILL)
        with pytest.raises(BrokerUnreachable):
            held.renew()
        held.check()  # its TTL is not over: the work may go on
        until(lambda: is_lost(kept))
        with pytest.raises(LeaseLost, match="could not be renewed"):
            kept.check()
        with pytest.raises(BrokerUnreachable):
            kept.release()
        with pytest.raises(BrokerUnreachable), held:
            pass
        with pytest.raises(ZeroDivisionError), hurt:  # the block's own error is what matters
            raise ZeroDivisionError


def test_the_environments_proxy_is_not_used(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Gpu(broker.url) as gpu, gpu.lease("llm") as lease:
        lease.renew()


# -- connections that break ---------------------------------------------------------------------------------


class Relay:
    """Between client and broker: whole messages, kept connections, and a cut where ``cuts`` has one left."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.cuts: list[Cut] = []
        self.connections = 0
        self.requests: list[str] = []
        """The first line of each, cut or not."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            _shut(connection)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while request := _message(stream):
                self.requests.append(request.split(b"\r\n")[0].decode())
                cut = self.cuts.pop(0) if self.cuts else None
                if cut == "before":
                    return
                answer = self._forward(request)
                if cut == "after":
                    return
                connection.sendall(answer[:-10] if cut == "within" else answer)
                if cut == "within":
                    return

    def _forward(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._port)) as upstream, upstream.makefile("rb") as stream:
            upstream.sendall(request)
            return _message(stream)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already


def _message(stream: BinaryIO) -> bytes:
    """One HTTP message of known length; empty at the end of the connection."""
    head, length = b"", 0
    while line := stream.readline():
        head += line
        if line == b"\r\n":
            return head + stream.read(length)
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return b""


@pytest.fixture
def relay(broker: RunningBroker) -> Iterator[Relay]:
    with Relay(broker.port) as found:
        yield found


@pytest.fixture
def through(relay: Relay) -> Iterator[Gpu]:
    with Gpu(relay.url) as found:
        yield found


def test_a_kept_connection_that_is_closed_just_as_we_write_is_no_error(through: Gpu, relay: Relay) -> None:
    through.status()
    through.status()
    assert relay.connections == 1  # it is kept
    relay.cuts = ["before"]
    through.status()
    assert relay.connections == 2
    assert len(relay.requests) == 4


# "within" FAILS: a body that ends too soon is a ChunkedEncodingError, which is no ConnectionError, so Gpu.call gives up
# at once with BrokerUnreachable. The broker has granted: the GPU is nobody's until the TTL is over.
@pytest.mark.parametrize("cut", ["before", "after", "within"])
def test_no_grant_is_lost_with_its_connection(through: Gpu, relay: Relay, broker: RunningBroker, cut: Cut) -> None:
    grants = sum(event["type"] == "grant" for event in broker.status()["events"])
    relay.cuts = [cut]
    try:
        with through.lease("image", holder="imagen") as lease:
            (shown,) = leases(broker)
            assert shown["token"] == lease.token
        assert sum(event["type"] == "grant" for event in broker.status()["events"]) == grants + 1
    finally:
        for left in leases(broker):  # so that the other tests do not suffer from this one's failure
            broker.release(left["token"])


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_release_may_be_sent_twice(through: Gpu, relay: Relay, broker: RunningBroker, cut: Cut) -> None:
    lease = through.acquire("llm")
    relay.cuts = [cut]
    lease.release()
    assert leases(broker) == []


def test_a_connection_that_breaks_twice_is_unreachable(through: Gpu, relay: Relay) -> None:
    relay.cuts = ["before", "before"]
    with pytest.raises(BrokerUnreachable):
        through.status()
    through.status()


def test_a_renew_that_fails_is_tried_again_within_the_ttl(through: Gpu, relay: Relay, broker: RunningBroker) -> None:
    with through.lease("llm", ttl_seconds=3) as lease:
        until(lambda: any("/renew" in line for line in relay.requests))  # the first one, made at once
        relay.cuts = ["before", "before"]
        until(lambda: not relay.cuts)
        late = datetime.fromisoformat(lease.grant["granted_at"]) + timedelta(seconds=4)
        until(lambda: datetime.fromisoformat(leases(broker)[0]["expires_at"]) > late)
        lease.check()


def test_explain_tells_and_does_nothing(broker: RunningBroker, capsys: pytest.CaptureFixture[str]) -> None:
    with Gpu(broker.url) as gpu:
        lease = gpu.acquire("image", holder="imagen")
        before = {each["name"]: each["total_requests"] for each in broker.status()["consumers"]}
        told = gpu.explain("llm")
        assert (told["outcome"], told["waiting_for"]) == ("wait", "holder")
        assert [holder["holder"] for holder in told["holders"]] == ["imagen"]
        assert gpu.explain("llm", wait_seconds=0)["refusal"]["code"] == "scheduler_timeout"
        assert cli.main(["explain", "llm", "--url", broker.url]) == 1
        assert "ollama would wait for holder: imagen has held comfyui" in capsys.readouterr().out
        status = broker.status()
        assert (status["queue"], {each["name"]: each["total_requests"] for each in status["consumers"]}) == ([], before)
        lease.release()
        assert cli.main(["explain", "--consumer", "comfyui", "--url", broker.url]) == 0
        assert capsys.readouterr().out == "comfyui would be granted at once\n"
        with pytest.raises(KindUnknown):
            gpu.explain("video")
        assert cli.main(["explain", "video", "--url", broker.url]) == 1
        with pytest.raises(InvalidRequest):
            gpu.explain("llm", consumer="ollama")
    answer = broker.http.post(f"{broker.url}/v1/explain", data=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
