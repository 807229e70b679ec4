"""Who is let in: Host, origin, bearer and scope, as values."""

from __future__ import annotations

import base64
import hashlib
import os
from typing import Any

import pytest

from gpumgr.config import ServerSettings, Token
from gpumgr.errors import Forbidden, HostNotAllowed, Unauthorized
from gpumgr.web import server
from gpumgr.web.access import Access, Bearer, match, own_names

SECRET = "correct-horse-battery"  # noqa: S105 - it stands for one
ROOT_SECRET = "staple-and-some-more-of-it"  # noqa: S105 - as above
TOKENS = tuple(
    Token(name, scope, hashlib.sha256(secret.encode()).digest())
    for name, scope, secret in (("imagen", "use", SECRET), ("me", "operate", ROOT_SECRET))
)
LEASE, STATUS, REVOKE, PROXY = "leases.acquire", "status.status", "leases.revoke", "proxy"


def access(**server: Any) -> Access:
    return Access(ServerSettings(**server), own_names("Mrock.lan"))


def environ(method: str = "GET", host: str | None = "127.0.0.1:8770", **headers: str) -> dict[str, str]:
    found = {
        "REQUEST_METHOD": method,
        **{key if key.isupper() else f"HTTP_{key.upper()}": v for key, v in headers.items()},
    }
    return found if host is None else {**found, "HTTP_HOST": host}


# -- Host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *(None, "", "localhost", "LOCALHOST:8770", "localhost.", "box.localhost:1", "127.0.0.1", "127.0.0.1:8770"),
        *("192.168.1.7:8770", "[::1]", "[::1]:8770", "[fe80::1]", "gpumgr", "mrock", "mrock:8770", "mrock.lan"),
        *("Mrock.LAN.:80", "mrock.local", "gpu.home.example", "GPU.home.example:443", "under_score"),
    ],
)
def test_names_that_may_be_ours(host: str | None) -> None:
    access(allowed_hosts=frozenset({"gpu.home.example"})).admitted(environ(host=host), LEASE)


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:8770",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "mrock.lan.evil.example",
        ),
        *("xmrock.lan", "other.local", "x.gpu.home.example", "gpu.home.example.evil", "localhost@evil.example"),
        *("evil.example,localhost", "localhost, evil.example", "localhost evil.example", "localhost:8770:1", "::1"),
        *(
            "[::1",
            "[evil]",
            "[::1]x",
            "localhost:http",
            "localhost/evil",
            ".",
            "..",
            "a..b",
            "-.evil",
            "1.2.3",
            "0x7f.1",
        ),
        *("caf\u00e9.example", "localhost\u3002evil.example", "localhost:999999", "*", "\x00"),
    ],
)
def test_names_that_are_not(host: str) -> None:
    with pytest.raises(HostNotAllowed) as caught:
        access(allowed_hosts=frozenset({"gpu.home.example"})).admitted(environ(host=host), "status.healthz")
    assert "server.allowed_hosts" in caught.value.message
    assert caught.value.details == {"host": host}


@pytest.mark.parametrize("target", ["http://evil.example/v1/lease", "HTTP://evil.example", "ftp://evil.example?x"])
def test_the_name_in_an_absolute_target_counts_too(target: str) -> None:
    with pytest.raises(HostNotAllowed):
        access().admitted(environ(RAW_URI=target), LEASE)
    with pytest.raises(HostNotAllowed):
        access().admitted(environ(RAW_URI="http://localhost/v1/lease", host="evil.example"), LEASE)
    access().admitted(environ(RAW_URI="http://localhost/v1/lease"), LEASE)
    access().admitted(environ(RAW_URI="/x?y=http://evil.example/"), LEASE)


# -- origin -------------------------------------------------------------------------------------------------

KNOWN = frozenset({("https", "page.example", 443)})


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8770", "http://127.0.0.1:8770"),
        ("localhost", "http://localhost"),
        ("localhost:80", "http://localhost"),
        ("LOCALHOST", "http://localhost:80"),
        ("mrock", "https://mrock"),
        ("mrock:443", "https://mrock"),
        ("[::1]:8770", "http://[::1]:8770"),
        ("mrock", "https://page.example"),
        ("mrock", "https://page.example:443"),
    ],
)
@pytest.mark.parametrize("endpoint", [LEASE, PROXY, None])
def test_ones_own_page_and_known_ones_may(host: str, origin: str, endpoint: str | None) -> None:
    of = environ("POST", host, origin=origin, sec_fetch_site="cross-site")
    access(allowed_origins=KNOWN).admitted(of, endpoint)


FOREIGN = [
    *("http://evil.example", "null", "", "http://localhost:8771", "http://localhost", "https://localhost:80"),
    *("http://page.example", "https://page.example:8443", "https://page.example.evil", "https://page.example/"),
    *("http://localhost:8770@evil.example", "http://localhost:8770, http://evil.example", "file://", "localhost:8770"),
    *("http://localhost:8770/", "http://[::1", "http://localhost:x", "app://localhost:8770"),
]


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "PATCH", "PROPFIND"])
def test_another_sites_page_changes_nothing_of_ours(origin: str, method: str) -> None:
    of = access(allowed_origins=KNOWN)
    with pytest.raises(Forbidden) as caught:
        of.admitted(environ(method, "localhost:8770", origin=origin), LEASE)
    assert "server.allowed_origins" in caught.value.message


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_another_sites_page_may_ask_for_what_it_cannot_read(method: str) -> None:
    access().admitted(environ(method, origin="http://evil.example", sec_fetch_site="cross-site"), STATUS)


def test_a_browser_that_says_cross_site_is_believed() -> None:
    with pytest.raises(Forbidden):
        access().admitted(environ("POST", sec_fetch_site="cross-site"), LEASE)
    for site in ("same-origin", "same-site", "none", ""):
        access().admitted(environ("POST", sec_fetch_site=site), LEASE)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "text/plain",
        "TEXT/plain;charset=utf-8",
        " multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
    ],
)
@pytest.mark.parametrize("origin", FOREIGN)
def test_a_proxied_post_that_no_browser_asks_for_first_is_refused(said: str, origin: str) -> None:
    of = access(allowed_origins=KNOWN)
    with pytest.raises(Forbidden):
        of.admitted(environ("POST", "localhost:8770", origin=origin, CONTENT_TYPE=said), PROXY)
    of.admitted(environ("GET", "localhost:8770", origin=origin, CONTENT_TYPE=said), PROXY)
    of.admitted(environ("PUT", "localhost:8770", origin=origin, CONTENT_TYPE=said), PROXY)
    of.admitted(environ("POST", "localhost:8770", CONTENT_TYPE=said), PROXY)


@pytest.mark.parametrize("said", ["application/json", "application/json; charset=utf-8", "application/x-strange"])
def test_a_proxied_post_that_a_browser_asks_for_is_the_consumers_business(said: str) -> None:
    of = environ("POST", origin="http://evil.example", CONTENT_TYPE=said, sec_fetch_site="cross-site")
    access().admitted(of, PROXY)


# -- bearer and scope ---------------------------------------------------------------------------------------


def asking() -> Access:
    return access(auth="bearer", tokens=TOKENS)


def basic(password: str, user: str = "anyone") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_with_auth_off_everyone_may_and_nobody_has_a_name() -> None:
    assert access().admitted(environ("DELETE"), REVOKE) == Bearer(None, operates=True, sees_tokens=True)


@pytest.mark.parametrize("said", [f"Bearer {SECRET}", f"bearer  {SECRET} ", f"BEARER {SECRET}"])
def test_a_token_is_known_by_its_secret(said: str) -> None:
    bearer = asking().admitted(environ("POST", authorization=said), LEASE)
    assert bearer == Bearer("imagen", operates=False, sees_tokens=False)


def test_an_operator_may_everything() -> None:
    for endpoint in (LEASE, STATUS, REVOKE, PROXY, None):
        bearer = asking().admitted(environ("DELETE", authorization=f"Bearer {ROOT_SECRET}"), endpoint)
        assert bearer == Bearer("me", operates=True, sees_tokens=True)


def test_use_may_not_operate() -> None:
    with pytest.raises(Forbidden) as caught:
        asking().admitted(environ("DELETE", authorization=f"Bearer {SECRET}"), REVOKE)
    assert caught.value.details == {"scope": "operate"}


@pytest.mark.parametrize(
    "said",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {SECRET}x",
        f"Bearer {SECRET[:-1]}",
        f"Bearer {SECRET.upper()}",
        f"Bearer {SECRET},Bearer {SECRET}",
        f"Bearer imagen:use:{SECRET}",
        f"Token {SECRET}",
        SECRET,
        f"Bearer {hashlib.sha256(SECRET.encode()).hexdigest()}",
        "Bearer \u00e9\u00ff",
        "Bearer \U0001f600",
        basic(SECRET),
    ],
)
@pytest.mark.parametrize("endpoint", [LEASE, REVOKE, PROXY, None])
def test_anything_else_is_nobody(said: str | None, endpoint: str | None) -> None:
    of = environ("POST") if said is None else environ("POST", authorization=said)
    with pytest.raises(Unauthorized):
        asking().admitted(of, endpoint)


@pytest.mark.parametrize("endpoint", ["status.healthz", "status.readyz"])
def test_health_needs_no_token(endpoint: str) -> None:
    assert asking().admitted(environ(), endpoint) == Bearer()


def test_a_browser_opens_status_with_a_password_and_sees_no_tokens() -> None:
    for method in ("GET", "HEAD"):
        bearer = asking().admitted(environ(method, authorization=basic(ROOT_SECRET)), STATUS)
        assert bearer == Bearer("me", operates=True, sees_tokens=False)


@pytest.mark.parametrize(
    "said", [basic("x"), basic("", SECRET), "Basic", "Basic ???", "Basic " + SECRET, "Basic =", basic("\u00e9")]
)
def test_a_wrong_password_is_nobody(said: str) -> None:
    with pytest.raises(Unauthorized):
        asking().admitted(environ(authorization=said), STATUS)


def test_a_password_opens_nothing_else() -> None:
    for method, endpoint in (("POST", STATUS), ("GET", PROXY), ("POST", LEASE), ("GET", None)):
        with pytest.raises(Unauthorized):
            asking().admitted(environ(method, authorization=basic(ROOT_SECRET)), endpoint)


def test_the_environments_tokens_are_taken_out_of_it_and_kept_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_master", {})
    monkeypatch.setenv("GPUMGR_TOKENS", f"imagen:use:{SECRET}")
    for _ in ("the start", "a SIGHUP"):
        assert server.environment_tokens_taken() == TOKENS[:1]
        assert "GPUMGR_TOKENS" not in os.environ


def test_every_digest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time it takes would tell how far down the list a guess is."""
    compared: list[bytes] = []

    def compare(ours: bytes, _theirs: bytes) -> bool:
        compared.append(ours)
        return ours == TOKENS[0].digest

    monkeypatch.setattr("gpumgr.web.access.hmac.compare_digest", compare)
    assert match(TOKENS, "whatever") is TOKENS[0]
    assert compared == [token.digest for token in TOKENS]
