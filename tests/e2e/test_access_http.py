"""Who is let in, with the real broker: tokens, scopes, names, other sites' pages, and consumers' own keys."""

from __future__ import annotations

import base64
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from gpumgr.client import Gpu
from gpumgr.errors import Forbidden, Unauthorized
from gpumgr.sim.stage import Stage
from tests.brokers import RunningBroker, free_port
from tests.callers import Answer, Caller
from tests.upstreams import Upstream, answers, whole
from tests.waiting import until

USE, OPERATE, THIRD = "correct-horse-battery", "staple-and-some-more-of-it", "from-the-file-of-tokens"
KEY = "sk-of-the-consumer-itself"
SECRETS = (USE, OPERATE, THIRD, KEY)
BROWSER = "text/html,application/xhtml+xml,*/*;q=0.8"


class Guarded:
    """A broker that asks for tokens, and the two consumers behind it, of which one wants a key of its own."""

    def __init__(self, directory: Path, stack: ExitStack, **server: Any) -> None:
        self.keyed = stack.enter_context(Upstream())
        self.plain = stack.enter_context(Upstream())
        self.broker = RunningBroker(directory, self._config(server), {"MY_KEY": KEY, **self._tokens(directory, server)})
        stack.callback(self.broker.__exit__, None, None, None)
        self.broker.start("--access-logfile", "-", "--log-level", "debug")
        self.url = self.broker.url
        self.port = self.broker.port

    def _tokens(self, directory: Path, server: dict[str, Any]) -> dict[str, str]:
        if server.get("auth") != "bearer":
            return {}
        file = directory / "tokens"
        file.write_text(f"# who may what\nthird:use:{THIRD}\n", encoding="utf-8")
        file.chmod(0o600)
        return {"GPUMGR_TOKENS": f"imagen:use:{USE}, me:operate:{OPERATE}"}

    def _config(self, server: dict[str, Any]) -> dict[str, Any]:
        load = {"path": "/load"}
        headers = {"Authorization": "Bearer ${MY_KEY}", "X-Project": "gpu"}
        keyed = {"dialect": "http", "url": self.keyed.url, "vram_resident_mib": 100, "headers": headers, "load": load}
        plain = {"dialect": "http", "url": self.plain.url, "vram_resident_mib": 100}
        beside = {"health": {"path": "/health"}, "max_concurrency": 4}
        return {
            "server": {"threads": 8, "reserved_threads": 4, **server},
            "gpu": {"probe": "simulated"},
            "lease": {"min_hold_seconds": 0},
            "routing": {"keyed": "keyed", "plain": "plain"},
            "consumers": {
                "keyed": {**keyed, **beside, "can_coexist_with": ["plain"]},
                "plain": {**plain, **beside, "can_coexist_with": ["keyed"]},
            },
        }

    def reset(self) -> None:
        for upstream in (self.keyed, self.plain):
            upstream.script = answers(whole(b"ok"))
            upstream.visits.clear()

    def ask(self, method: str, path: str, secret: str | None = None, **more: Any) -> requests.Response:
        headers = {**more.pop("headers", {}), **({} if secret is None else {"Authorization": f"Bearer {secret}"})}
        with requests.Session() as session:
            session.trust_env = False
            return session.request(method, self.url + path, headers=headers, timeout=20, **more)

    def said(self, request: bytes) -> Answer:
        """An answer to exactly these bytes."""
        with Caller(self.port) as caller:
            caller.say(request)
            return caller.answer()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guarded, Guarded]]:
    allowed = {"allowed_hosts": ["gpu.home.example"], "allowed_origins": ["https://page.example"]}
    with ExitStack() as stack:
        asks = Guarded(tmp_path_factory.mktemp("bearer"), stack, auth="bearer", tokens_file="tokens", **allowed)
        yield asks, Guarded(tmp_path_factory.mktemp("off"), stack, auth=False, **allowed)


@pytest.fixture
def guarded(both: tuple[Guarded, Guarded]) -> Iterator[Guarded]:
    yield from watched(both[0])


@pytest.fixture
def open_one(both: tuple[Guarded, Guarded]) -> Iterator[Guarded]:
    """Without tokens, on loopback."""
    yield from watched(both[1])


def watched(found: Guarded) -> Iterator[Guarded]:
    found.reset()
    yield found
    assert "Traceback" not in found.broker.log()
    assert not [secret for secret in SECRETS if secret in found.broker.log()]


def code(answer: requests.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "type", "retryable", "details"}
    return answer.status_code, error["code"]


ROUTES = [
    ("POST", "/v1/lease"),
    ("POST", "/v1/explain"),
    ("GET", "/v1/lease/whatever"),
    ("POST", "/v1/lease/whatever/renew"),
    ("DELETE", "/v1/lease/whatever"),
    ("DELETE", "/v1/leases/whatever"),
    ("GET", "/v1/status"),
    ("POST", "/v1/plain/x"),
    ("GET", "/v1/keyed"),
    ("OPTIONS", "/v1/plain/x"),
    ("PUT", "/v1/lease"),
    ("GET", "/nowhere"),
    ("POST", "/healthz"),
]


# -- bearer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_asks_who_calls(guarded: Guarded, method: str, path: str) -> None:
    for secret in (None, USE + "x", KEY):
        answer = guarded.ask(method, path, secret, json={"kind": "plain"})
        assert code(answer) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="gpumgr"')
        assert answer.headers["x-should-retry"] == "false"
    assert guarded.plain.visits == guarded.keyed.visits == []
    assert guarded.ask("GET", "/v1/status", USE).json()["leases"] == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_asks_nobody(guarded: Guarded, path: str) -> None:
    assert guarded.ask("GET", path).status_code == 200
    assert guarded.ask("HEAD", path, "wrong").status_code == 200


def test_a_large_body_without_a_token_gets_its_answer(guarded: Guarded) -> None:
    for size in (0, 1, 60_000, 900_000):
        assert code(guarded.ask("POST", "/v1/lease", data=b"x" * size)) == (401, "unauthorized")
        assert code(guarded.ask("POST", "/v1/plain/x", data=b"x" * size)) == (401, "unauthorized")


def test_keeping_the_card_free_is_the_operators(guarded: Guarded) -> None:
    for method in ("POST", "DELETE"):
        assert code(guarded.ask(method, "/v1/hold")) == (401, "unauthorized")
        assert code(guarded.ask(method, "/v1/hold", USE)) == (403, "forbidden")
    assert guarded.ask("POST", "/v1/hold", OPERATE).json()["hold"]["by"] == "me"
    assert guarded.ask("GET", "/v1/hold", USE).json()["hold"]["by"] == "me"
    form = {"Origin": guarded.url}
    page = {"Accept": BROWSER}
    for secret, status in ((USE, 403), (OPERATE, 303)):
        headers = {**form, **basic(secret)}
        answer = guarded.ask("POST", "/v1/status", headers=headers, data={"action": "resume"}, allow_redirects=False)
        assert answer.status_code == status
        shown = guarded.ask("GET", "/v1/status", headers={**page, **basic(secret)}).text
        assert ("<form" in shown) is (secret == OPERATE)
    assert guarded.ask("GET", "/v1/hold", USE).json() == {"hold": None}


@pytest.mark.parametrize("secret", [USE, THIRD, OPERATE])
def test_a_life_of_a_lease_with_a_token(guarded: Guarded, secret: str) -> None:
    grant = guarded.ask("POST", "/v1/lease", secret, json={"kind": "plain"}).json()
    path = f"/v1/lease/{grant['token']}"
    assert guarded.ask("POST", f"{path}/renew", secret).status_code == 200
    assert guarded.ask("GET", path, secret).json()["lease_id"] == grant["lease_id"]
    assert guarded.ask("DELETE", path, secret).json() == {"released": True}


def test_only_an_operator_sees_tokens(guarded: Guarded) -> None:
    grant = guarded.ask("POST", "/v1/lease", USE, json={"kind": "plain"}).json()
    try:
        seen = [guarded.ask("GET", "/v1/status", secret).json()["leases"] for secret in (USE, THIRD, OPERATE)]
        assert [lease["token"] for [lease] in seen] == [None, None, grant["token"]]
        assert [lease["lease_id"] for [lease] in seen] == [grant["lease_id"]] * 3
        for secret in (USE, OPERATE):
            page = guarded.ask("GET", "/v1/status", secret, headers={"Accept": BROWSER})
            assert page.headers["Content-Type"].startswith("text/html")
            assert grant["token"] not in page.text
    finally:
        guarded.ask("DELETE", f"/v1/lease/{grant['token']}", USE)


def basic(secret: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"whoever:{secret}".encode()).decode()}


def test_a_browser_opens_status_with_a_password(guarded: Guarded) -> None:
    asked = guarded.ask("GET", "/v1/status", headers={"Accept": BROWSER})
    assert asked.status_code == 401
    assert asked.headers["WWW-Authenticate"] == 'Bearer realm="gpumgr", Basic realm="gpumgr"'
    grant = guarded.ask("POST", "/v1/lease", USE, json={"kind": "plain"}).json()
    try:
        page = guarded.ask("GET", "/v1/status", headers={"Accept": BROWSER, **basic(OPERATE)})
        assert (page.status_code, page.headers["X-Frame-Options"]) == (200, "DENY")
        assert page.headers["Referrer-Policy"] == "same-origin"
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
        assert "script" not in page.text
        [lease] = guarded.ask("GET", "/v1/status", headers=basic(OPERATE)).json()["leases"]
        assert lease["token"] is None
    finally:
        guarded.ask("DELETE", f"/v1/lease/{grant['token']}", USE)


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route != ("GET", "/v1/status")])
def test_a_password_opens_nothing_but_status(guarded: Guarded, method: str, path: str) -> None:
    answer = guarded.ask(method, path, headers=basic(OPERATE))
    assert code(answer) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == 'Bearer realm="gpumgr"'


# -- revoke -------------------------------------------------------------------------------------------------


def test_an_operator_takes_a_lease_back(guarded: Guarded) -> None:
    wanted = {"kind": "plain", "request_id": "r-revoked", "holder": "imagen"}
    grant = guarded.ask("POST", "/v1/lease", USE, json=wanted).json()
    path = f"/v1/leases/{grant['lease_id']}"
    assert code(guarded.ask("DELETE", path, USE)) == (403, "forbidden")
    assert guarded.ask("POST", f"/v1/lease/{grant['token']}/renew", USE).status_code == 200

    answer = guarded.ask("DELETE", path, OPERATE, params={"reason": "stuck since 9"})
    assert (answer.status_code, answer.json()) == (200, {"revoked": True})
    assert code(guarded.ask("POST", f"/v1/lease/{grant['token']}/renew", USE)) == (404, "lease_unknown")
    assert code(guarded.ask("DELETE", path, OPERATE)) == (404, "lease_unknown")
    again = guarded.ask("POST", "/v1/lease", USE, json=wanted)
    assert code(again) == (409, "request_ended")
    assert again.json()["error"]["details"]["reason"] == "revoked"

    event = guarded.ask("GET", "/v1/status", USE).json()["events"][-1]
    told = {key: event[key] for key in ("type", "consumer", "lease_id", "holder", "by", "reason")}
    assert told == {
        "type": "revoke",
        "consumer": "plain",
        "lease_id": grant["lease_id"],
        "holder": "imagen",
        "by": "me",
        "reason": "stuck since 9",
    }
    until(lambda: f"revoke consumer=plain lease_id={grant['lease_id']}" in guarded.broker.log())


def test_with_auth_off_everyone_may_revoke(open_one: Guarded) -> None:
    grant = open_one.ask("POST", "/v1/lease", json={"kind": "plain"}).json()
    assert open_one.ask("DELETE", f"/v1/leases/{grant['lease_id']}").json() == {"revoked": True}
    event = open_one.ask("GET", "/v1/status").json()["events"][-1]
    assert (event["type"], event["by"], event["reason"]) == ("revoke", None, None)


@pytest.mark.parametrize("query", ["reason=" + "x" * 129, "why=x", "reason=x&colour=red"])
def test_a_revoke_in_other_words_revokes_nothing(open_one: Guarded, query: str) -> None:
    assert code(open_one.ask("DELETE", f"/v1/leases/whatever?{query}")) == (400, "invalid_request")


@pytest.mark.parametrize("lease_id", ["nobody", "%00", "x" * 2000, "a b", "%F0%9F%98%80"])
def test_revoking_nothing_is_told(open_one: Guarded, lease_id: str) -> None:
    assert code(open_one.ask("DELETE", f"/v1/leases/{lease_id}")) == (404, "lease_unknown")


def test_one_bearers_request_is_not_anothers(guarded: Guarded) -> None:
    wanted = {"kind": "plain", "request_id": "r-shared", "ttl_seconds": 10}
    grants = [guarded.ask("POST", "/v1/lease", secret, json=wanted).json() for secret in (USE, THIRD, USE)]
    try:
        assert grants[0] == grants[2]
        assert grants[0]["token"] != grants[1]["token"]
    finally:
        for grant in grants[:2]:
            guarded.ask("DELETE", f"/v1/lease/{grant['token']}", USE)


def test_the_place_of_who_made_way_is_not_anothers(guarded: Guarded) -> None:
    def granted(secret: str, **words: Any) -> str:
        answer = guarded.ask("POST", "/v1/lease", secret, json={"kind": "plain", "wait_seconds": 20, **words})
        return str(answer.json()["token"])

    def waiting() -> int:
        return len(guarded.ask("GET", "/v1/status", OPERATE).json()["queue"])

    tokens = [granted(USE, priority="batch") for _ in range(4)]
    (lease_id,) = {guarded.ask("GET", f"/v1/lease/{token}", USE).json()["lease_id"] for token in tokens[:1]}
    with ThreadPoolExecutor() as callers:
        try:
            urgent = callers.submit(granted, USE, priority="interactive")
            until(lambda: waiting() == 1)
            guarded.ask("DELETE", f"/v1/lease/{tokens.pop(0)}", USE)
            tokens.append(urgent.result())
            since_then = callers.submit(granted, USE)
            until(lambda: waiting() == 1)
            back = {"kind": "plain", "resume_of": lease_id}
            ahead = [guarded.ask("POST", "/v1/explain", who, json=back).json()["ahead"] for who in (THIRD, USE)]
            assert ahead == [1, 0]
        finally:
            for token in tokens:
                guarded.ask("DELETE", f"/v1/lease/{token}", USE)
        guarded.ask("DELETE", f"/v1/lease/{since_then.result()}", USE)


# -- what consumers see -------------------------------------------------------------------------------------


def test_our_bearer_is_never_sent_upstream(guarded: Guarded) -> None:
    assert guarded.ask("POST", "/v1/plain/x", USE, json={}).content == b"ok"
    assert guarded.plain.visit.header("authorization") is None
    assert USE not in str(guarded.plain.visit.head)


def test_with_auth_off_a_callers_own_authorization_passes(open_one: Guarded) -> None:
    assert open_one.ask("POST", "/v1/plain/x", "the-callers-own", json={}).content == b"ok"
    assert open_one.plain.visit.header("authorization") == "Bearer the-callers-own"


@pytest.mark.parametrize("secret", [None, USE])
def test_a_consumers_key_goes_with_a_proxied_call(guarded: Guarded, open_one: Guarded, secret: str | None) -> None:
    of = open_one if secret is None else guarded
    headers = {"X-Project": "mine", "x-other": "1", "Connection": "x-project, authorization"}
    assert of.ask("POST", "/v1/keyed/x", secret or "the-callers-own", json={}, headers=headers).content == b"ok"
    said = of.keyed.visit.headers
    assert [value for name, value in said if name == "authorization"] == [f"Bearer {KEY}"]
    assert [value for name, value in said if name == "x-project"] == ["gpu"]
    assert ("x-other", "1") in said


def test_a_consumers_key_is_not_told_by_a_trace(guarded: Guarded) -> None:
    guarded.keyed.script = lambda visit: visit.say(whole(visit.head))
    said = guarded.ask("TRACE", "/v1/keyed/x", USE)
    assert said.text.startswith("TRACE /x HTTP/1.1")
    assert not [secret for secret in SECRETS if secret in said.text]


def test_a_consumers_key_goes_with_our_own_calls_and_is_shown_nowhere(guarded: Guarded) -> None:
    guarded.keyed.script = answers(whole(f"no such key: {KEY}".encode(), status="403 Forbidden"))
    answer = guarded.ask("POST", "/v1/lease", USE, json={"kind": "keyed"})
    assert code(answer) == (503, "consumer_unhealthy")
    assert "no such key: [hidden]" in answer.json()["error"]["message"]
    assert guarded.keyed.visit.request_line == "POST /load HTTP/1.1"
    assert guarded.keyed.visit.header("authorization") == f"Bearer {KEY}"
    for shown in (answer, guarded.ask("GET", "/v1/status", OPERATE)):
        assert not [secret for secret in SECRETS if secret in shown.text]


# -- Host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/status", "/healthz", "/v1/plain/x", "/nowhere"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8770", "127.0.0.1.evil.example", "a,b", "[::1"])
def test_a_foreign_name_is_told_so(open_one: Guarded, guarded: Guarded, path: str, host: str) -> None:
    for of in (open_one, guarded):
        answer = of.ask("GET", path, USE, headers={"Host": host})
        assert code(answer) == (421, "host_not_allowed")
        assert "server.allowed_hosts" in answer.json()["error"]["message"]
    assert open_one.plain.visits == guarded.plain.visits == []


@pytest.mark.parametrize(
    "host", ["localhost", "[::1]:8770", "192.168.1.9", "mrock:8770", "gpu.home.example", "gpumgr."]
)
def test_names_of_ours_are_served(open_one: Guarded, host: str) -> None:
    assert open_one.ask("GET", "/v1/status", headers={"Host": host}).status_code == 200
    assert open_one.ask("GET", "/v1/plain/x", headers={"Host": host}).content == b"ok"


def test_a_request_without_host_is_served(open_one: Guarded) -> None:
    assert open_one.said(b"GET /healthz HTTP/1.0\r\n\r\n").status == 200
    assert open_one.said(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").status == 200


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost/healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\nHost: evil.example\r\n\r\n",
    ],
)
def test_two_names_do_not_help(open_one: Guarded, request_head: bytes) -> None:
    answer = open_one.said(request_head)
    assert (answer.status, answer.error["code"]) == (421, "host_not_allowed")


def test_a_unix_socket_asks_the_same(tmp_path: Path, stage: Stage) -> None:
    address = str(tmp_path / "socket")
    broker = RunningBroker(tmp_path, stage.config(), {"GPUMGR_BIND": f"unix:{address}"})
    broker.start(wait=False)
    try:
        until(lambda: "start version" in broker.log(), 20)
        for host, status in ((b"localhost", b"200"), (b"evil.example", b"421")):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(10)
                sock.connect(address)
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
                assert sock.makefile("rb").readline().startswith(b"HTTP/1.1 " + status)
    finally:
        broker.stop()
        broker.http.close()


# -- other sites' pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_another_sites_page_ends_and_takes_nothing(open_one: Guarded, headers: dict[str, str]) -> None:
    grant = open_one.ask("POST", "/v1/lease", json={"kind": "plain"}).json()
    try:
        for method, path in (
            ("POST", "/v1/lease"),
            ("POST", f"/v1/lease/{grant['token']}/renew"),
            ("DELETE", f"/v1/lease/{grant['token']}"),
            ("DELETE", f"/v1/leases/{grant['lease_id']}"),
        ):
            assert code(open_one.ask(method, path, headers=headers, json={})) == (403, "forbidden")
        [lease] = open_one.ask("GET", "/v1/status", headers=headers).json()["leases"]
        assert lease["lease_id"] == grant["lease_id"]
    finally:
        assert open_one.ask("DELETE", f"/v1/lease/{grant['token']}").json() == {"released": True}


@pytest.mark.parametrize("own", ["http://{host}", "https://page.example"])
def test_ones_own_page_and_known_ones_may(open_one: Guarded, own: str) -> None:
    headers = {"Origin": own.format(host=f"127.0.0.1:{open_one.port}"), "Sec-Fetch-Site": "cross-site"}
    grant = open_one.ask("POST", "/v1/lease", headers=headers, json={"kind": "plain"}).json()
    assert open_one.ask("DELETE", f"/v1/lease/{grant['token']}", headers=headers).json() == {"released": True}
    assert open_one.ask("POST", "/v1/plain/x", headers=headers, data=b"a=b").content == b"ok"


def test_a_form_of_another_site_does_not_reach_a_consumer(open_one: Guarded) -> None:
    evil = {"Origin": "http://evil.example"}
    for said in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        headers = evil if said is None else evil | {"Content-Type": said}
        assert code(open_one.ask("POST", "/v1/plain/x", headers=headers, data=b"a=b")) == (403, "forbidden")
    assert open_one.plain.visits == []
    assert open_one.ask("POST", "/v1/plain/x", headers=evil, json={}).content == b"ok"
    assert open_one.ask("GET", "/v1/plain/x", headers=evil).content == b"ok"


# -- start --------------------------------------------------------------------------------------------------


def refused(broker: RunningBroker, *arguments: str) -> list[str]:
    broker.start(*arguments, wait=False)
    broker.http.close()
    if broker.process is None:
        raise AssertionError
    assert broker.process.wait(20) == 2
    return broker.log().strip().splitlines()


@pytest.mark.parametrize("bind", ["0.0.0.0", "[::]", "mrock"])  # noqa: S104 - it is refused
def test_an_open_door_without_tokens_does_not_start(tmp_path: Path, stage: Stage, bind: str) -> None:
    env = {"GPUMGR_BIND": f"{bind}:{free_port()}"}
    [sentence] = refused(RunningBroker(tmp_path, stage.config(), env))
    assert "GPUMGR_BIND" in sentence
    assert "server.trusted_network: true" in sentence


def test_the_command_line_opens_no_door(tmp_path: Path, stage: Stage) -> None:
    lines = refused(RunningBroker(tmp_path, stage.config()), "--bind", f"0.0.0.0:{free_port()}")
    assert any("can be reached from other machines" in line for line in lines)


def test_a_trusted_network_and_tokens_open_it(tmp_path: Path, stage: Stage) -> None:
    config = stage.config()
    config["server"] = {**config["server"], "trusted_network": True}
    broker = RunningBroker(tmp_path, config)
    broker.start("--bind", f"0.0.0.0:{broker.port}")
    broker.stop()
    broker.http.close()


def test_bearer_without_tokens_does_not_start(tmp_path: Path, stage: Stage) -> None:
    config = stage.config()
    config["server"] = {**config["server"], "auth": "bearer"}
    [sentence] = refused(RunningBroker(tmp_path, config))
    assert "there is no token" in sentence


def test_a_hand_over_keeps_the_tokens_of_the_environment(tmp_path: Path, stage: Stage) -> None:
    config = stage.config()
    config["server"] = {**config["server"], "auth": "bearer"}
    with RunningBroker(tmp_path, config, {"GPUMGR_TOKENS": f"me:operate:{OPERATE}"}) as broker:
        old = broker.worker_pid()
        if broker.process is None:
            raise AssertionError
        os.kill(broker.process.pid, signal.SIGHUP)
        until(lambda: not psutil.pid_exists(old) and broker.serving_again(), 10)
        with Gpu(broker.url, OPERATE) as gpu:
            assert gpu.status()["leases"] == []
        assert "stay in force" not in broker.log()
        assert OPERATE not in broker.log()


# -- the client ---------------------------------------------------------------------------------------------


def test_the_client_shows_its_token(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gpu(guarded.url, OPERATE) as gpu, gpu.lease("plain") as lease:
        assert [each["token"] for each in gpu.status()["leases"]] == [lease.token]
    monkeypatch.setenv("GPUMGR_TOKEN", USE)
    with Gpu(guarded.url) as gpu, gpu.lease("plain") as lease:
        assert [each["token"] for each in gpu.status()["leases"]] == [None]
        with pytest.raises(Forbidden):
            gpu.call("DELETE", f"/v1/leases/{lease.grant['lease_id']}")
    monkeypatch.delenv("GPUMGR_TOKEN")
    with Gpu(guarded.url) as gpu, pytest.raises(Unauthorized):
        gpu.status()
