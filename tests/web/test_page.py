"""The operator's page: who gets it, that nothing in a snapshot breaks it, and that nothing foreign runs in it."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jinja2 import StrictUndefined

from gpumgr.core.queue import WaitingFor
from gpumgr.runtime.snapshot import snapshot
from gpumgr.sim.stage import Stage
from gpumgr.web import status, words
from gpumgr.web.app import create_app
from gpumgr.web.page import ROWS_SHOWN, page
from tests.brokers import RunningBroker
from tests.web import snapshots
from tests.web.snapshots import TOKEN, everything, gpu, lease, process, unreadable, waiting
from tests.worlds import World, catalog, consumer

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
HEADROOM_MIB = 512
VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)></title></style><!--{{ 7 * 7 }}"
Facts = dict[str, Any]


class Walk(HTMLParser):
    """Every element, attribute and text; an end tag that does not fit, and whatever could run, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.title = ""
        self.feed(text)
        self.close()
        assert self.open == []

    @property
    def state(self) -> str:
        """The title without whose it is."""
        assert self.title.startswith("gpumgr \N{EN DASH} ")
        return self.title.removeprefix("gpumgr \N{EN DASH} ")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), attrs
        assert not [name for name in names if name.startswith("on") or name == "style"], attrs
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "xlink:href")]
        self.texts += [value or "" for name, value in attrs if name in ("title", "aria-label", "data-label")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        if self.open == ["html", "head", "title"]:
            self.title += data
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


@pytest.fixture(scope="module")
def app() -> Iterator[Flask]:
    """Where the template names what there is not, it fails here; in production it prints nothing there."""
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000)))
    made = create_app(world.broker)
    made.jinja_env.undefined = StrictUndefined
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.broker, "fresh_card", lambda _: None)  # the world's clock stands still
        yield made


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def shown(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> Callable[[Facts], Walk]:
    """The page of this snapshot, walked."""

    def show(facts: Facts) -> Walk:
        monkeypatch.setattr(status, "snapshot", lambda _broker: facts)
        answer = client.get("/v1/status", headers={"Accept": BROWSER})
        assert answer.status_code == 200
        walk = Walk(answer.get_data(as_text=True))
        assert {"script", "img", "iframe", "object", "base"}.isdisjoint(walk.tags)
        assert all(re.match(r"\?|\.\./|data:image/svg\+xml,", link) for link in walk.links), walk.links
        assert TOKEN not in answer.get_data(as_text=True)
        return walk

    return show


# -- who gets it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("TEXT/HTML", True),
        ("text/*", True),
        ("text/html, application/json;q=0.9", True),
        ("application/json;q=0.5, text/html;q=0.6", True),
        ("*/*;q=0.1, text/html;q=0.2", True),
        ("application/json;q=0, */*", True),
        (None, False),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/*", False),
        ("text/html, application/json", False),
        ("application/json, text/html;q=0.9", False),
        ("text/html;q=0.5, */*;q=0.9", False),
        ("text/html;q=0, */*;q=0.1", False),
        ("text/html;q=nonsense", False),
        ("text/plain", False),
        ("image/png", False),
        (";;;,,,q=1", False),
    ],
)
def test_a_browser_gets_the_page_and_everybody_else_json(client: FlaskClient, accept: str | None, html: bool) -> None:
    answer = client.get("/v1/status", headers={} if accept is None else {"Accept": accept})
    assert answer.status_code == 200
    assert answer.mimetype == ("text/html" if html else "application/json")
    assert answer.headers["Vary"] == "Accept"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_link_leads_a_browser_to_the_json(client: FlaskClient) -> None:
    answer = client.get("/v1/status?format=json", headers={"Accept": BROWSER})
    assert answer.get_json()["mode"] == "evicting"


def test_head_is_answered_as_get_without_the_body(client: FlaskClient) -> None:
    for accept, kind in ((BROWSER, "text/html"), ("*/*", "application/json")):
        answer = client.head("/v1/status", headers={"Accept": accept})
        assert (answer.status_code, answer.mimetype, answer.data) == (200, kind, b"")
        assert int(answer.headers["Content-Length"]) > 500


def test_the_policy_lets_nothing_run_and_names_the_one_style(client: FlaskClient) -> None:
    answer = client.get("/v1/status", headers={"Accept": BROWSER})
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    found = re.search(r"<style>(.*?)</style>", answer.get_data(as_text=True), re.DOTALL)
    assert found
    digest = base64.b64encode(hashlib.sha256(found.group(1).encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["Referrer-Policy"] == "same-origin"


def test_it_loads_itself_again_until_it_is_asked_to_hold_still(client: FlaskClient) -> None:
    assert '<meta http-equiv="refresh" content="4">' in client.get("/v1/status", headers={"Accept": BROWSER}).text
    still = client.get("/v1/status?refresh=off", headers={"Accept": BROWSER}).text
    assert "http-equiv" not in still


# -- what it shows ------------------------------------------------------------------------------------------


def test_everything_is_shown(shown: Callable[[Facts], Walk]) -> None:
    walk = shown(everything())
    assert walk.state == "paint held by imagen, 6 waiting"
    for words_of_it in (
        "18000 MiB of 24000 MiB used, 6000 MiB free",
        "untracked: 2 processes 4600 MiB",
        "not listed 1000 MiB",
        "headroom 512 MiB",
        "free 3488 MiB",
        "game.exe 4600 MiB untracked pid 41877",
        "Xorg not known untracked",
        "1 min 12 s left",
        "8 min 20 s",
        "05cd8b3450",
        "45 s more",
        "12000 of 14000 MiB",
        "6 min ago",
        "something new",
        "auto size; peak 12700 MiB in 23 uses",
        "71 % back, 0.3 s",
        "paint returned 71 % on average over 8 unloads",
    ):
        assert words_of_it in walk.text


def test_a_size_that_nobody_knows_yet_is_told(shown: Callable[[Facts], Walk]) -> None:
    new = snapshots.consumer("paint", 14000, 400) | {"auto": True, "vram_resident_mib": None, "declared_mib": None}
    walk = shown(everything() | {"consumers": [new]})
    assert "400 MiB" in walk.text
    assert "size not known yet: runs alone; no uses seen" in walk.text
    assert "not known MiB" not in walk.text
    warned = new | {"warnings": ["declared 9000, seen 11400 MiB"]}
    assert "paint: declared 9000, seen 11400 MiB" in shown(everything() | {"consumers": [warned]}).text


@pytest.mark.parametrize("reason", [*WaitingFor, *snapshots.WAITING_FOR])
def test_every_reason_to_wait_is_told_with_its_meaning(shown: Callable[[Facts], Walk], reason: str) -> None:
    walk = shown(everything() | {"queue": [waiting(waiting_for=reason)]})
    assert reason in walk.text
    if reason in list(WaitingFor):
        assert walk.text.count(words.WAITING_FOR[reason][1]) == 2  # on the word, and for those who cannot point at it


@pytest.mark.parametrize("use", [use for use in snapshots.IN_USE if use is not None])
def test_every_use_is_told(shown: Callable[[Facts], Walk], use: str) -> None:
    facts = everything() | {"leases": [], "queue": [], "consumers": [snapshots.consumer("paint", 14000, 0, use)]}
    word, means = words.IN_USE.get(use, (use, use))
    walk = shown(facts)
    assert means in walk.text
    assert walk.state == f"paint: {word}"


def test_work_that_a_call_has_begun_is_told_with_its_name(shown: Callable[[Facts], Walk]) -> None:
    calls = [{"held_seconds": 12.4, "lease_id": None, "work": "prompt 6b1f"}, {"held_seconds": 1, "work": None}]
    paint = snapshots.consumer("paint", 14000, 0, "proxy") | {"calls": calls}
    assert "prompt 6b1f, 12 s" in shown(everything() | {"consumers": [paint]}).text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("start", "gpumgr 0.1.0 started"),
        ("stop", "gpumgr stopped"),
        ("grant", "granted to chat after 0.1 s lease_id=aa11 fence=1"),
        ("release", "released by chat after 42 s"),
        ("expire", "the lease of a holder without a label expired after 2 min 22 s"),
        ("revoke", "the lease of chat was taken back by operator: stuck lease_id=aa13"),
        ("refuse", "chat was refused after 0 s: insufficient_vram"),
        ("withdraw", "chat no longer waits after 3 s"),
        ("evict", "unloaded for paint in 0.3 s: 9000 MiB before, 412 MiB after"),
        ("evict_failed", "not unloaded for paint in 30 s, it kept its memory: it still has 9 MiB of 9 MiB"),
        ("proxy_over_budget", "although a lease would have been refused: it needs more code=insufficient_vram"),
        ("gpu_unreadable", "the card cannot be read: GPU 0: gone"),
        ("intruder", "it came onto the card without having asked beside paint, leased to imagen lease_id=aa14"),
        ("hold", "the card is kept free for a game by ada until 2026-11-24T20:00:00.000Z"),
        ("resume", "the card is lent again by ada"),
        ("game", "a game began: bg3.exe pid=4"),
        ("game_over", "the last game ended: bg3.exe pid=4"),
        ("restore", "brought back"),
        ("work_long", "prompt 6b1f of a proxied call still runs after 10 min; it is waited for"),
        ("work_lost", "prompt 6b1f of a proxied call holds no longer after 1 min 15 s and was not seen to end: nobody"),
        ("would_wait", "chat would have waited for: holder; behind paint"),
        ("would_evict", "chat would have been unloaded for imagen"),
        ("would_refuse", "imagen would have been refused: insufficient_vram; it needs 14000 MiB"),
        ("something new", 'a=1, 2 b={"c": null}'),
    ],
)
def test_every_event_has_its_words_and_loses_no_fact(shown: Callable[[Facts], Walk], kind: str, said: str) -> None:
    facts = everything()
    facts["events"] = [event for event in facts["events"] if event["type"] == kind]
    assert len(facts["events"]) == 1
    assert f"{kind} " in shown(facts).text
    assert said in shown(facts).text


def test_what_is_for_audits_alone_is_not_on_the_page(shown: Callable[[Facts], Walk]) -> None:
    text = shown(everything()).text
    assert "fence=1" in text
    assert "arrival" not in text
    assert "_boot" not in text


def test_every_event_of_the_sample_is_known_but_one() -> None:
    assert {event["type"] for event in everything()["events"]} - set(words.EVENTS) == {"something new"}


@pytest.mark.parametrize("kind", sorted(words.EVENTS))
def test_an_event_without_its_facts_is_told_all_the_same(shown: Callable[[Facts], Walk], kind: str) -> None:
    assert kind in shown(everything() | {"events": [{"type": kind}]}).text


@pytest.mark.parametrize(
    ("declared", "said"), [("refuse", "Leases are refused"), ("declared", "decided on declared sizes")]
)
def test_a_card_that_cannot_be_read_is_loud(shown: Callable[[Facts], Walk], declared: str, said: str) -> None:
    walk = shown(everything() | {"gpus": [unreadable()], "when_unreadable": declared})
    assert "Cannot be read: the driver is away" in walk.text
    assert said in walk.text
    assert walk.state.startswith("GPU 0 cannot be read, paint held")
    assert "never read" in walk.text


def test_a_hold_a_game_and_an_intruder_are_told_first(shown: Callable[[Facts], Walk]) -> None:
    facts = everything()
    hold = {
        "by": "ada",
        "reason": "bg3",
        "until_at": "2026-11-24T20:00:00.000Z",
        "state": "draining",
        "in_use": ["paint"],
    }
    games = [{"pid": 4, "name": "bg3.exe", "since_at": "2026-11-24T15:00:00.000Z"}]
    leases = [lease | {"intruders": ["chat"]} for lease in facts["leases"][:1]]
    text = shown(facts | {"hold": hold, "games": games, "leases": leases}).text
    assert "The card is kept free for bg3 by ada until 20:00:00 UTC." in text
    assert "its holders are asked to yield: paint" in text
    assert "bg3.exe (pid 4) runs since 15:00:00 UTC." in text
    assert "chat came onto the card beside paint held by imagen." in text


@pytest.mark.parametrize(
    ("mode", "said"), [("locked", "nothing is unloaded"), ("passthrough", "Nothing waits"), ("new", "does not know")]
)
def test_a_mode_that_holds_back_is_told(shown: Callable[[Facts], Walk], mode: str, said: str) -> None:
    walk = shown(everything() | {"mode": mode})
    assert f"Mode: {mode}." in walk.text
    assert said in walk.text


def test_the_usual_mode_needs_no_word(shown: Callable[[Facts], Walk]) -> None:
    facts = everything()
    del facts["mode"]
    assert "Mode:" not in shown(facts).text


@pytest.mark.parametrize(("holder", "title"), [(None, "paint held"), ("", "paint held"), ("x" * 99, "x" * 39 + "…")])
def test_the_title_is_short(shown: Callable[[Facts], Walk], holder: str | None, title: str) -> None:
    assert shown(everything() | {"leases": [lease(holder)], "queue": []}).state.endswith(title)


def test_a_snapshot_of_the_broker_is_shown(shown: Callable[[Facts], Walk]) -> None:
    world = World(catalog(consumer("paint", 14000), consumer("chat", 9000)))
    world.games[0].set_used(3000)
    world.grant("paint", holder="imagen")
    world.ask("chat", holder="talk")
    world.broker.observe_card()
    walk = shown(snapshot(world.broker))
    assert walk.state == "paint held by imagen, 1 waiting"
    assert "untracked: game.exe 3000 MiB" in walk.text
    assert "promised to paint 14000 MiB" in walk.text
    assert "2 min left" in walk.text


# -- what anybody may write ---------------------------------------------------------------------------------


def test_labels_and_names_are_text_and_nothing_else(shown: Callable[[Facts], Walk]) -> None:
    facts = everything()
    facts["gpus"][0]["processes"][2]["name"] = EVIL
    facts["gpus"].append(unreadable(EVIL) | {"index": None, "uuid": EVIL, "name": EVIL})
    facts["leases"], facts["queue"] = [lease(EVIL)], [waiting(holder=EVIL)]
    facts["queue"][0]["step"] = EVIL
    facts["consumers"][0] |= {"url": "javascript:alert(1)", "healthy": False, "health_error": EVIL}
    facts["events"] = [{"at": EVIL, "type": EVIL, "consumer": EVIL, "holder": EVIL, EVIL: EVIL}]
    calm, walk = shown(everything()), shown(facts)
    assert set(walk.tags) == set(calm.tags)
    assert walk.text.count(EVIL) >= 12
    assert "javascript:alert(1)" in walk.text


@pytest.mark.parametrize(
    ("holder", "seen"),
    [
        ("\x1b[31m\x00", "\\x1b[31m\\x00"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\udc80", "\\udc80"),
        ("zwei\nZeilen", "zwei\\nZeilen"),
        ("Грета 🦊", "Грета 🦊"),
    ],
)
def test_what_cannot_be_seen_is_written_out(shown: Callable[[Facts], Walk], holder: str, seen: str) -> None:
    assert f"paint held by {seen}" in shown(everything() | {"leases": [lease(holder)]}).text


# -- numbers that do not add up -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "card",
    [
        gpu(process(1, "game", 9000, None), total=24000, used=3000),
        gpu(process(1, "paint", 99999, "paint"), total=24000, used=99999),
        gpu(promised=99999),
        gpu(total=0, used=0),
        gpu(process(1, "a", None, None), process(2, "b", None, "paint")),
        gpu() | {"total_mib": None},
        gpu() | {"used_mib": None, "free_mib": None},
        gpu() | {"free_mib": 24000},
        gpu() | {"processes": None},
        gpu() | {"promised_mib": None, "index": None},
    ],
)
def test_the_bar_stays_within_its_frame(shown: Callable[[Facts], Walk], card: Facts) -> None:
    facts = everything() | {"gpus": [card]}
    shown(facts)
    parts = page(facts, HEADROOM_MIB).cards[0].parts
    assert all(0 <= part.x <= 100 and 0 <= part.width <= 100 for part in parts)
    assert sum(part.width for part in parts) <= 100.01
    assert bool(parts) == bool(card["total_mib"])


def test_more_promised_than_free_is_told(shown: Callable[[Facts], Walk]) -> None:
    walk = shown(everything() | {"gpus": [gpu(promised=9000)]})
    assert "9000 MiB are promised, 3000 MiB more than are free." in walk.text
    assert "promised to paint" in walk.text


def test_a_consumer_the_driver_does_not_list_is_drawn_with_what_is_remembered() -> None:
    parts = page(everything() | {"gpus": [gpu(used=13000)]}, HEADROOM_MIB).cards[0].parts
    assert [(part.label, part.mib) for part in parts[:3]] == [("paint", 12000), ("chat", 400), ("not listed", 600)]


def test_who_may_stand_beside_and_who_stays() -> None:
    facts = everything()
    facts["consumers"][0] |= {"coexist": "by_size", "can_coexist_with": ["hear"], "pinned": True, "resident": True}
    found = page(facts, HEADROOM_MIB).consumers[0]
    assert (found.beside, found.resident) == ("hear, whoever fits by size", "resident, pinned")


def test_many_are_counted_and_not_all_printed(shown: Callable[[Facts], Walk]) -> None:
    many = ROWS_SHOWN + 250
    facts = everything() | {"queue": [waiting(i) for i in range(many)], "leases": [lease()] * many}
    facts["events"] *= 20
    facts["gpus"] = [gpu(*(process(i, f"p{i}", 1, None) for i in range(many)))]
    walk = shown(facts)
    assert "and 250 more in the queue" in walk.text
    assert "and 250 more leases" in walk.text
    assert "and 250 more processes" in walk.text
    assert f"{many} waiting" in walk.state
    assert walk.tags.count("tr") < 4 * ROWS_SHOWN + 30


def test_nothing_at_all_is_a_page_too(shown: Callable[[Facts], Walk]) -> None:
    assert shown({}).state == "nobody holds a lease"


def ways(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value, lists and objects included."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from ways(each, (*path, key))


ODD: tuple[Any, ...] = (None, -1, 0, 10**12, float("nan"), float("inf"), "", "x", True)


@given(st.lists(st.tuples(st.sampled_from(list(ways(everything()))), st.sampled_from(ODD)), max_size=12))
@hypothesis_settings(max_examples=150, deadline=None)
def test_no_fact_that_is_missing_or_odd_breaks_it(app: Flask, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    facts = everything()
    for path, value in changes:
        change(facts, path, value)
    with app.test_request_context():
        Walk(status.printer("")(page(facts, HEADROOM_MIB)).get_data(as_text=True))


def change(at: Any, path: tuple[Any, ...], value: Any) -> None:
    """A list or an object becomes null; nothing happens below one that is gone."""
    *parents, last = path
    for key in parents:
        at = at[key]
        if at is None:
            return
    at[last] = None if at[last] is None or isinstance(at[last], dict | list) else value


def test_a_long_page_costs_milliseconds(app: Flask) -> None:
    facts = everything() | {"queue": [waiting(i) for i in range(100)]}
    facts["events"] = (facts["events"] * 20)[:200]
    spent = []
    with app.test_request_context():
        printed = status.printer("")
        for _ in range(8):
            began = time.process_time()
            printed(page(facts, HEADROOM_MIB))
            spent.append(time.process_time() - began)
    assert min(spent) < 0.05


# -- for real -----------------------------------------------------------------------------------------------


def test_the_running_broker_shows_it(tmp_path: Path) -> None:
    with Stage(tmp_path, speed=20) as stage, RunningBroker(tmp_path, stage.config()) as broker:
        stage.take_game("<b>game</b>", 3000)
        token = broker.acquire(kind="image", holder="<i>imagen</i>").json()["token"]
        answer = broker.http.get(f"{broker.url}/v1/status", headers={"Accept": BROWSER}, timeout=10)
        head = broker.http.head(f"{broker.url}/v1/status", headers={"Accept": BROWSER}, timeout=10)
        plain = requests.get(f"{broker.url}/v1/status", timeout=10)  # requests says */*, as curl does
    assert answer.status_code == head.status_code == 200
    assert answer.headers["Content-Type"] == head.headers["Content-Type"] == "text/html; charset=utf-8"
    assert head.content == b""
    walk = Walk(answer.text)
    assert walk.state == "comfyui held by <i>imagen</i>"
    assert "<b>game</b>" in walk.text
    assert "i" not in walk.tags
    assert token not in answer.text
    assert plain.json()["leases"][0]["token"] == token
