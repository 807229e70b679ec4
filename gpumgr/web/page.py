"""The operator's page: a snapshot as values that a template prints without thinking.

Owns: what the page shows, and in which order. Must not: look at the broker (the snapshot is all there is), choose words
(words.py), or show a token: whoever reads the page may not end a lease. Nothing here is HTML; the template escapes, as
labels and process names are anybody's.

Any fact of a snapshot may be null; the page then says that it is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gpumgr.web import words
from gpumgr.web.bar import NAME_LENGTH, UNTRACKED, Look, Part, looks_of, parts_of, processes_of, whole
from gpumgr.web.words import Facts, mib, number, plain, short, span

REFRESH_SECONDS = 4
ROWS_SHOWN = 50
"""Of each table; the rest is counted."""
LABEL_LENGTH = 40
"""Of a holder in the title."""
STALE_SECONDS = 10.0
"""An older reading is told with a warning; no tick of an observer is this late."""
EVICTING = "evicting"
BAD = frozenset({"refuse", "evict_failed", "gpu_unreadable", "intruder", "proxy_over_budget", "revoke", "expire"})

Row = TypeVar("Row")


@dataclass(frozen=True)
class Rows(Generic[Row]):
    """The first of them; ``more`` are left out."""

    shown: Sequence[Row]
    more: int

    @property
    def count(self) -> int:
        return len(self.shown) + self.more


@dataclass(frozen=True)
class Process:
    look: Look
    pid: str
    name: str
    used: str
    owner: str


@dataclass(frozen=True)
class Card:
    """``error`` and ``consequence`` where it cannot be read; ``shortage`` where more is promised than is free."""

    title: str
    about: str
    error: str
    consequence: str
    parts: Sequence[Part]
    numbers: str
    shortage: str
    read: str
    stale: bool
    processes: Rows[Process]


@dataclass(frozen=True)
class Consumer:
    """``share``: percent of its size that it holds, None where either is not known. ``seen``: what it was observed to
    hold; ``returned``: what its unloads gave back; both empty where nothing was observed yet."""

    look: Look
    name: str
    about: str
    url: str
    memory: str
    share: float | None
    seen: str
    warnings: Sequence[str]
    returned: str
    resident: str
    in_use: str
    in_use_means: str
    work: str
    health: str
    health_error: str
    sick: bool
    beside: str
    grants: str
    evictions: str
    last_used: str
    last_used_at: str


@dataclass(frozen=True)
class Lease:
    look: Look
    consumer: str
    holder: str
    lease_id: str
    fence: str
    left: str
    share: float | None
    ends: str
    held: str


@dataclass(frozen=True)
class Waiting:
    look: Look
    position: str
    consumer: str
    holder: str
    priority: str
    waiting_for: str
    means: str
    waits: str
    until: str
    ends: str
    step: str
    starts: str
    """When it may expect its turn."""


@dataclass(frozen=True)
class Event:
    """``look`` is None where no consumer is concerned."""

    look: Look | None
    consumer: str
    at: str
    clock: str
    ago: str
    type: str
    tone: str
    words: str
    facts: str


@dataclass(frozen=True)
class Banner:
    """Something about the whole card that an operator should know first. ``tone``: ``note`` or ``bad``."""

    said: str
    more: str
    tone: str = "note"


@dataclass(frozen=True)
class Button:
    """A form of one click: its action, and the label and seconds of each of its buttons."""

    action: str
    labels: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    title: str
    banners: Sequence[Banner]
    button: Button | None
    mode: str
    mode_means: str
    store_error: str
    cards: Sequence[Card]
    leases: Rows[Lease]
    queue: Rows[Waiting]
    reasons: Sequence[tuple[str, str]]
    consumers: Sequence[Consumer]
    uses: Sequence[tuple[str, str]]
    events: Rows[Event]
    version: str
    started: str
    up: str
    now: str
    refresh_seconds: int


def page(snapshot: Facts, headroom_mib: int, *, refreshes: bool = True, may_hold: bool = False) -> Page:
    """The whole page of one instant. ``refreshes``: the browser is asked to load it again and again. ``may_hold``: its
    reader may keep the card free."""
    return _Showing(_visible(snapshot), headroom_mib, may_hold).page(REFRESH_SECONDS if refreshes else 0)


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return words.visible(value)
    if isinstance(value, Mapping):
        return {words.visible(str(key)): _visible(each) for key, each in value.items()}
    return [_visible(each) for each in value] if isinstance(value, list | tuple) else value


class _Showing:
    """What everything on one page needs to know: the instant, and how each consumer is marked."""

    def __init__(self, snapshot: Facts, headroom_mib: int, may_hold: bool = False) -> None:
        self.snapshot = snapshot
        self.may_hold = may_hold
        self.headroom_mib = headroom_mib
        self.now = snapshot.get("now")
        self.gpus, self.consumers, self.leases, self.queue, self.events = (
            [each for each in snapshot.get(key) or [] if isinstance(each, Mapping)]
            for key in ("gpus", "consumers", "leases", "queue", "events")
        )
        self.looks = looks_of(self.consumers)

    def page(self, refresh_seconds: int) -> Page:
        mode = plain(self.snapshot.get("mode") or EVICTING)
        started = self.snapshot.get("started_at")
        return Page(
            title=_title(self),
            banners=[*self.hold_banner(), *self.game_banners(), *self.intruder_banners()],
            button=self.button(),
            mode=mode,
            store_error=_store_error(self.snapshot.get("store")),
            mode_means="" if mode == EVICTING else words.MODES.get(mode, "This page does not know what that means."),
            cards=[self.card(gpu) for gpu in self.gpus],
            leases=_rows(self.leases, self.lease),
            queue=_rows(self.queue, self.waiting),
            reasons=_explained((each.get("waiting_for") for each in self.queue[:ROWS_SHOWN]), words.WAITING_FOR),
            consumers=[self.consumer(each) for each in self.consumers],
            uses=_explained((each.get("in_use") for each in self.consumers), words.IN_USE),
            events=_rows(self.events[::-1], self.event),
            version=words.known(self.snapshot.get("version")),
            started=words.clock(started, self.now),
            up=span(words.between(started, self.now)),
            now=words.clock(self.now, self.now),
            refresh_seconds=refresh_seconds,
        )

    def look(self, consumer: object) -> Look:
        return self.looks.get(plain(consumer), UNTRACKED)

    def ago(self, instant: object) -> str:
        since = words.between(instant, self.now)
        return words.NOT_KNOWN if since is None else f"{span(since, 1)} ago"

    # -- what comes first -----------------------------------------------------------------------------------

    def hold_banner(self) -> list[Banner]:
        hold = self.snapshot.get("hold")
        if not isinstance(hold, Mapping):
            return []
        why = f" for {plain(hold['reason'])}" if hold.get("reason") else ""
        by = f" by {plain(hold['by'])}" if hold.get("by") else ""
        until = words.clock(hold.get("until_at"), self.now)
        means = words.HOLD.get(plain(hold.get("state")), "")
        whose = plain(hold.get("in_use") or hold.get("resident") or "")
        return [Banner(f"The card is kept free{why}{by} until {until} UTC.", f"{means} {whose}".strip())]

    def game_banners(self) -> list[Banner]:
        games = [game for game in self.snapshot.get("games") or [] if isinstance(game, Mapping)]
        return [
            Banner(
                f"{words.known(game.get('name'))} (pid {words.known(game.get('pid'))}) runs since "
                f"{words.clock(game.get('since_at'), self.now)} UTC.",
                words.GAME,
            )
            for game in games[:1]
        ]

    def intruder_banners(self) -> list[Banner]:
        return [
            Banner(
                f"{plain(lease['intruders'])} came onto the card beside {_held_by(lease)}.", words.INTRUDER, tone="bad"
            )
            for lease in self.leases
            if lease.get("intruders")
        ]

    def button(self) -> Button | None:
        if not self.may_hold:
            return None
        if isinstance(self.snapshot.get("hold"), Mapping):
            return Button("resume", [("Let the card be used again", "")])
        return Button("hold", words.HOLD_FOR)

    # -- the card -------------------------------------------------------------------------------------------

    def card(self, gpu: Facts) -> Card:
        readable = bool(gpu.get("readable"))
        age = words.between(gpu.get("read_at"), self.now)
        return Card(
            title=_gpu_name(gpu),
            about=", ".join(plain(fact) for fact in (gpu.get("name"), gpu.get("uuid")) if fact),
            error="" if readable else plain(gpu.get("error") or "the driver gives no reason"),
            consequence="" if readable else words.UNREADABLE[self.snapshot.get("when_unreadable") == "declared"],
            parts=parts_of(gpu, self.consumers, self.looks, self.headroom_mib),
            numbers=_numbers(gpu),
            shortage=_shortage(gpu),
            read=_read("read" if readable else "last tried", age),
            stale=age is None or age > STALE_SECONDS,
            processes=_rows(sorted(processes_of(gpu), key=_by_size), self.process),
        )

    def process(self, process: Facts) -> Process:
        owner = process.get("consumer")
        return Process(
            look=self.look(owner),
            pid=words.known(process.get("pid")),
            name=short(plain(process.get("name") or "without a name"), NAME_LENGTH),
            used=mib(process.get("used_mib")),
            owner="untracked" if owner is None else plain(owner),
        )

    # -- who holds and who waits ----------------------------------------------------------------------------

    def lease(self, lease: Facts) -> Lease:
        left = words.between(self.now, lease.get("expires_at"))
        ttl = number(lease.get("ttl_seconds"))
        return Lease(
            look=self.look(lease.get("consumer")),
            consumer=words.known(lease.get("consumer")),
            holder=_label(lease.get("holder")),
            lease_id=words.known(lease.get("lease_id")),
            fence=words.known(lease.get("fence")),
            left=words.NOT_KNOWN if left is None else f"{span(left)} left",
            share=None if left is None or not ttl else _percent(left, ttl),
            ends=words.clock(lease.get("expires_at"), self.now),
            held=span(lease.get("held_seconds")),
        )

    def waiting(self, waiting: Facts) -> Waiting:
        reason = words.known(waiting.get("waiting_for"))
        left = words.between(self.now, waiting.get("deadline_at"))
        return Waiting(
            look=self.look(waiting.get("consumer")),
            position=words.known(waiting.get("position")),
            consumer=words.known(waiting.get("consumer")),
            holder=_label(waiting.get("holder")),
            priority=plain(waiting.get("priority") or "normal"),
            waiting_for=reason,
            means=words.WAITING_FOR.get(reason, ("", ""))[1],
            waits=span(waiting.get("waiting_seconds")),
            until=words.NOT_KNOWN if left is None else f"{span(left)} more" if left > 0 else "its preparation ends",
            ends=words.clock(waiting.get("deadline_at"), self.now),
            step=plain(waiting.get("reason") or waiting.get("step") or ""),
            starts=_starts(waiting.get("estimated_wait_seconds")),
        )

    # -- consumers and events -------------------------------------------------------------------------------

    def consumer(self, consumer: Facts) -> Consumer:
        in_use = consumer.get("in_use")
        word, means = words.IN_USE.get(plain(in_use), (plain(in_use), ""))
        healthy = consumer.get("healthy")
        last = consumer.get("last_used_at")
        return Consumer(
            look=self.look(consumer.get("name")),
            name=words.known(consumer.get("name")),
            about=self.about(consumer),
            url=plain(consumer.get("url") or ""),
            memory=_memory(consumer),
            share=_share(consumer),
            seen=words.seen(consumer),
            warnings=words.warnings(consumer),
            returned=words.returned(consumer.get("unloads")),
            resident=_truth(consumer.get("resident"), "resident", "not resident", "not known whether resident")
            + (", pinned" if consumer.get("pinned") is True else ""),
            in_use="idle" if in_use is None else word,
            in_use_means="nobody holds it" if in_use is None else means,
            work=_works(consumer),
            health=_truth(healthy, "healthy", "unhealthy", words.NOT_KNOWN),
            health_error=plain(consumer.get("health_error") or ""),
            sick=healthy is False,
            beside=_beside(consumer),
            grants=words.known(consumer.get("total_requests")),
            evictions=words.known(consumer.get("evictions")),
            last_used="never" if last is None else self.ago(last),
            last_used_at="" if last is None else words.clock(last, self.now),
        )

    def about(self, consumer: Facts) -> str:
        gpus = consumer.get("gpus")
        told = [consumer.get("kinds"), consumer.get("dialect"), gpus and f"GPU {plain(gpus)}"]
        return " · ".join(plain(fact) for fact in told[: 3 if len(self.gpus) > 1 else 2] if fact)

    def event(self, event: Facts) -> Event:
        said, facts = words.event(event)
        consumer = event.get("consumer")
        kind = words.known(event.get("type"))
        return Event(
            look=None if consumer is None else self.look(consumer),
            consumer=plain(consumer or ""),
            at=plain(event.get("at") or ""),
            clock=words.clock(event.get("at"), self.now),
            ago=self.ago(event.get("at")),
            type=kind,
            tone="bad" if kind in BAD else "would" if kind.startswith("would_") else "usual",
            words=said,
            facts=facts,
        )


def _beside(consumer: Facts) -> str:
    by_size = ["whoever fits by size"] if consumer.get("coexist") == "by_size" else []
    named = consumer.get("can_coexist_with")
    return plain([*(named if isinstance(named, list) else []), *by_size]) or "nobody"


def _store_error(store: object) -> str:
    """Empty where grants can be written down, or nothing is said of it."""
    ok = not isinstance(store, Mapping) or store.get("ok") is not False
    return "" if ok or not isinstance(store, Mapping) else plain(store.get("error") or "the store gives no reason")


def _rows(facts: Sequence[Facts], shown: Any) -> Rows[Any]:
    return Rows([shown(each) for each in facts[:ROWS_SHOWN]], max(0, len(facts) - ROWS_SHOWN))


def _explained(facts: Iterable[object], meanings: Mapping[str, tuple[str, str]]) -> list[tuple[str, str]]:
    """What the words on this page mean, each once."""
    return [meanings[fact] for fact in dict.fromkeys(map(plain, facts)) if fact in meanings]


# -- the state in a line ------------------------------------------------------------------------------------


def _title(showing: _Showing) -> str:
    """Also what a browser's tab shows."""
    said = [f"{_gpu_name(gpu)} cannot be read" for gpu in showing.gpus if not gpu.get("readable")][:1]
    said.append(_held(showing))
    if showing.queue:
        said.append(f"{len(showing.queue)} waiting")
    return ", ".join(said)


def _held(showing: _Showing) -> str:
    found = [_held_by(lease) for lease in showing.leases]
    found = found or [_used(consumer) for consumer in showing.consumers if consumer.get("in_use")]
    if not found:
        return "nobody holds a lease"
    return found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more"


def _held_by(lease: Facts) -> str:
    holder = _label(lease.get("holder"))
    return f"{words.known(lease.get('consumer'))} held" + (f" by {short(holder, LABEL_LENGTH)}" if holder else "")


def _used(consumer: Facts) -> str:
    in_use = plain(consumer.get("in_use"))
    return f"{words.known(consumer.get('name'))}: {words.IN_USE.get(in_use, (in_use, ''))[0]}"


def _works(consumer: Facts) -> str:
    """What it goes on with for calls that were answered."""
    calls = [call for call in consumer.get("calls") or () if call.get("work")]
    return "; ".join(f"{plain(call['work'])}, {span(call.get('held_seconds'))}" for call in calls)


# -- facts as text ------------------------------------------------------------------------------------------


def _label(holder: object) -> str:
    """Empty where it has none."""
    return "" if holder is None else plain(holder)


def _gpu_name(gpu: Facts) -> str:
    index = gpu.get("index")
    return f"GPU {plain(gpu.get('uuid') or 'without a number')}" if index is None else f"GPU {plain(index)}"


def _numbers(gpu: Facts) -> str:
    if not gpu.get("readable"):
        return f"{mib(gpu.get('promised_mib'))} promised"
    used, total, free = (mib(gpu.get(key)) for key in ("used_mib", "total_mib", "free_mib"))
    return f"{used} of {total} used, {free} free"


def _read(said: str, age: float | None) -> str:
    return "never read" if age is None else f"{said} {'just now' if age < 1 else f'{span(age)} ago'}"


def _shortage(gpu: Facts) -> str:
    """Only where the card is read: else nobody knows what is free."""
    over = whole(gpu.get("promised_mib")) - whole(gpu.get("free_mib"))
    if not gpu.get("readable") or over <= 0:
        return ""
    return f"{mib(gpu.get('promised_mib'))} are promised, {over} MiB more than are free."


def _by_size(process: Facts) -> tuple[bool, int]:
    return number(process.get("used_mib")) is None, -whole(process.get("used_mib"))


def _memory(consumer: Facts) -> str:
    declared = consumer.get("vram_resident_mib")
    held = number(consumer.get("held_mib"))
    shown = "?" if held is None else f"{held:.0f}"
    if declared is None and consumer.get("auto") is True:
        return f"{shown} MiB"  # nobody knows yet of how much
    sizes = " + ".join(plain(each) for each in declared) if isinstance(declared, list) else words.known(declared)
    return f"{shown} of {sizes} MiB"


def _share(consumer: Facts) -> float | None:
    declared = consumer.get("vram_resident_mib")
    size = sum(whole(each) for each in declared) if isinstance(declared, list) else whole(declared)
    return None if number(consumer.get("held_mib")) is None or not size else _percent(whole(consumer["held_mib"]), size)


def _truth(value: object, yes: str, no: str, unknown: str) -> str:
    return yes if value is True else no if value is False else unknown


def _starts(seconds: object) -> str:
    found = number(seconds)
    return words.NOT_KNOWN if found is None else "now" if found < 1 else f"about {span(found, 1)}"


def _percent(part: float, of: float) -> float:
    return round(min(max(100 * part / of, 0.0), 100.0), 3)
