"""What the page says in words: spans of time, instants, reasons, events.

Owns: the words. Must not: choose what is shown, or fail on a fact it does not know: that one is told as ``key=value``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

Facts = Mapping[str, Any]

IN_USE = {
    "lease": ("leased", "a holder has a lease of it, or one is being prepared"),
    "proxy": ("proxied call", "a call through gpumgr runs in it, or the work that one has begun"),
    "tail": ("tail", "work of a holder goes on in it after its lease or call has ended"),
    "direct": ("direct use", "somebody uses it without gpumgr"),
    "evicting": ("evicting", "it is being unloaded; requests for it wait"),
    "quarantine": ("quarantine", "it is out of service for now"),
}
WAITING_FOR = {
    "holder": (
        "holder",
        "somebody it may not run beside holds the GPU: it waits for a release, an expiry or the end of a call",
    ),
    "ahead": ("ahead", "somebody who came earlier, and whom it would hold up, goes first"),
    "vram": ("vram", "it has its turn, and memory is missing that others use or were promised"),
    "preparing": (
        "preparing",
        "the GPU is being prepared, for it or for another one: health, unloading, proof, loading",
    ),
    "quantum": (
        "quantum",
        "whoever is on the GPU keeps its turn for a while, or usually comes back at once: that saves swaps",
    ),
    "draining": ("draining", "it has its turn, and work that still runs must end before its memory is taken"),
}
HOLD = {
    "draining": "Nobody is granted it. It is still used, and its holders are asked to yield:",
    "unloading": "Nobody is granted it. Still on the card:",
    "free": "Nobody is granted it, and nobody is on it.",
}
HOLD_FOR = (("1 hour", "3600"), ("4 hours", "14400"), ("12 hours", "43200"))
GAME = "Who is idle is unloaded, holders are asked to yield, and only what fits beside it is granted."
INTRUDER = "Somebody uses it without gpumgr; it is unloaded as soon as that breaks nothing."
MODES = {
    "locked": "Turns and leases as always, and nothing is unloaded: who is on the card stays while there is room, and "
    "what does not fit is refused. What would have been unloaded is told by would_evict events.",
    "passthrough": "Nothing waits and nothing is unloaded: every request is granted at once. What would have happened "
    "is told by would_wait, would_evict and would_refuse events.",
}
KEPT = {
    "kept": "it kept its memory",
    "busy": "it began to compute",
    "hung": "it did not answer",
    "unreachable": "it could not be reached",
}
UNREADABLE = {
    False: "Leases are refused until the driver answers (gpu.when_unreadable: refuse); proxied calls go on. The sizes "
    "below are declared or remembered, not read.",
    True: "Leases and proxied calls go on, decided on declared sizes (gpu.when_unreadable: declared). The sizes below "
    "are declared or remembered, not read.",
}
"""By whether declared sizes are believed then."""
NOT_KNOWN = "not known"
SECRET = frozenset({"token"})
FOR_AUDITS = frozenset({"arrival", "granted_boot", "expires_boot"})
"""Facts that tell people nothing."""
INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
"""Control characters, what turns the direction of text around, and halves of characters that no UTF-8 can hold."""


def visible(text: str) -> str:
    """Labels and process names are anybody's: what could not be seen is written out."""
    return INVISIBLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def number(value: object) -> float | None:
    """A finite number that may be printed and reckoned with, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def mib(value: object) -> str:
    found = number(value)
    return NOT_KNOWN if found is None else f"{found:.0f} MiB"


def span(value: object, units: int = 2) -> str:
    """Seconds as somebody would say them, in so many units."""
    found = number(value)
    if found is None:
        return NOT_KNOWN
    if found < 10:
        return f"{max(found, 0.0):.1f}".removesuffix(".0") + " s"
    minutes, seconds = divmod(int(found), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    told = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((place for place, (count, _) in enumerate(told) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in told[first : first + units] if count)


def instant(value: object) -> datetime | None:
    """An instant of the API. None where it is none."""
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def between(earlier: object, later: object) -> float | None:
    """Seconds from one instant to the other; None where either is not known."""
    began, ended = instant(earlier), instant(later)
    return None if began is None or ended is None else (ended - began).total_seconds()


def clock(value: object, now: object) -> str:
    """The time of day, UTC; with its date where that is not today's."""
    at, today = instant(value), instant(now)
    if at is None:
        return NOT_KNOWN
    return at.strftime("%H:%M:%S" if today is not None and at.date() == today.date() else "%Y-%m-%d %H:%M:%S")


def plain(value: object) -> str:
    """Any fact as text."""
    if isinstance(value, list):
        return ", ".join(plain(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def known(value: object) -> str:
    """Any fact as text, null included."""
    return NOT_KNOWN if value is None else plain(value)


def seen(consumer: Facts) -> str:
    """What it was observed to hold, and where its size comes from, in some words."""
    found = consumer.get("observed")
    observed: Facts = found if isinstance(found, Mapping) else {}
    peak = plain(observed.get("peak_p95_mib")).replace(", ", " + ") if observed.get("peak_p95_mib") is not None else ""
    words = f"peak {peak} MiB in {_uses(observed.get('count'))}" if peak else ""
    if consumer.get("auto") is not True:
        return words
    if consumer.get("vram_resident_mib") is None:
        return f"size not known yet: runs alone; {words or 'no uses seen'}"
    return f"auto size; {words or 'no uses seen'}"


def _uses(count: object) -> str:
    return "1 use" if count == 1 else f"{known(count)} uses"


def returned(unloads: object) -> str:
    """What unloads gave back, and how fast."""
    if not isinstance(unloads, Mapping):
        return ""
    share, seconds = number(unloads.get("returned_share")), number(unloads.get("seconds_p50"))
    back = "" if share is None else f"{math.floor(100 * share)} % back"
    return ", ".join(part for part in (back, "" if seconds is None else span(seconds)) if part)


def warnings(consumer: Facts) -> list[str]:
    """Each with whom it is about, once."""
    found = consumer.get("warnings")
    name = known(consumer.get("name"))
    said = [plain(each) for each in found] if isinstance(found, list) else []
    return [each if each.startswith(f"{name} ") else f"{name}: {each}" for each in said]


def event(told: Facts) -> tuple[str, str]:
    """What happened in words, and the facts that the words leave out."""
    facts = {key: value for key, value in told.items() if key not in SECRET | FOR_AUDITS | {"at", "type", "consumer"}}
    tell = EVENTS.get(str(told.get("type")))
    words = "" if tell is None else tell(facts)
    return words, " ".join(f"{key}={plain(value)}" for key, value in facts.items())


# Each takes the facts that it tells out of the mapping; whatever it leaves there is shown beside its words.
_Left = dict[str, Any]


def _who(facts: _Left) -> str:
    holder = facts.pop("holder", None)
    return "a holder without a label" if holder is None else plain(holder)


def _urgent(facts: _Left) -> str:
    """Of a request that is not like most."""
    priority = facts.pop("priority", None)
    return f" ({plain(priority)})" if priority in ("interactive", "batch") else ""


def _after(facts: _Left, key: str) -> str:
    return f" after {span(facts.pop(key))}" if number(facts.get(key)) is not None else ""


def _in(facts: _Left) -> str:
    return f" in {span(facts.pop('seconds'))}" if number(facts.get("seconds")) is not None else ""


def _with(before: str, facts: _Left, key: str) -> str:
    value = facts.pop(key, None)
    return "" if value is None else f"{before}{plain(value)}"


def _start(facts: _Left) -> str:
    return f"gpumgr{_with(' ', facts, 'version')} started"


WHY = {"hold": "to keep the card free", "game": "for a game", "intruder": "as an intruder", "idle": "as it was idle"}
"""Of an unload that no request asked for."""


def _why(facts: _Left) -> str:
    why = facts.pop("why", None)
    return "" if why is None else f" {WHY.get(plain(why), plain(why))}"


def _evict(facts: _Left) -> str:
    unloaded = f"unloaded{_with(' for ', facts, 'for')}{_why(facts)}{_in(facts)}"
    numbers = f"{mib(facts.pop('held_mib', None))} before, {mib(facts.pop('still_held_mib', None))} after"
    return f"{unloaded}: {numbers}{_with('; proof: ', facts, 'proof')}"


def _evict_failed(facts: _Left) -> str:
    reason = facts.pop("reason", None)
    still = f"{mib(facts.pop('still_held_mib', None))} of {mib(facts.pop('held_mib', None))}"
    why = "" if reason is None else f", {KEPT.get(str(reason), plain(reason))}"
    return f"not unloaded{_with(' for ', facts, 'for')}{_why(facts)}{_in(facts)}{why}: it still has {still}"


def _intruder(facts: _Left) -> str:
    return f"it came onto the card without having asked{_with(' beside ', facts, 'beside')}, leased to {_who(facts)}"


def _revoke(facts: _Left) -> str:
    by, after = _with(" by ", facts, "by"), _after(facts, "held_seconds")
    return f"the lease of {_who(facts)} was taken back{by}{after}{_with(': ', facts, 'reason')}"


def _would_wait(facts: _Left) -> str:
    return (
        f"{_who(facts)} would have waited{_with(' for: ', facts, 'waiting_for')}{_with('; behind ', facts, 'behind')}"
    )


def _would_evict(facts: _Left) -> str:
    return f"{plain(facts.pop('victims', None) or 'somebody')} would have been unloaded for {_who(facts)}"


def _work(facts: _Left) -> str:
    return f"{known(facts.pop('work', None))} of a proxied call"


def _work_lost(facts: _Left) -> str:
    after = _after(facts, "held_seconds")
    return f"{_work(facts)} holds no longer{after} and was not seen to end{_with(': ', facts, 'reason')}"


def _refused(would: str, facts: _Left) -> str:
    who, after = f"{_who(facts)}{_urgent(facts)}", _after(facts, "waited_seconds")
    return f"{who} {would} refused{after}{_with(': ', facts, 'code')}{_with('; ', facts, 'reason')}"


EVENTS: dict[str, Callable[[_Left], str]] = {
    "start": _start,
    "stop": lambda _: "gpumgr stopped",
    "grant": lambda facts: (
        f"granted to {_who(facts)}{_urgent(facts)}{_after(facts, 'waited_seconds')}"
        f"{_with(', who had made way with lease ', facts, 'resumes')}"
    ),
    "release": lambda facts: f"released by {_who(facts)}{_after(facts, 'held_seconds')}",
    "expire": lambda facts: f"the lease of {_who(facts)} expired{_after(facts, 'held_seconds')}",
    "revoke": _revoke,
    "refuse": lambda facts: _refused("was", facts),
    "withdraw": lambda facts: f"{_who(facts)}{_urgent(facts)} no longer waits{_after(facts, 'waited_seconds')}",
    "evict": _evict,
    "evict_failed": _evict_failed,
    "proxy_over_budget": lambda facts: (
        f"a proxied call went ahead although a lease would have been refused{_with(': ', facts, 'reason')}"
    ),
    "gpu_unreadable": lambda facts: f"the card cannot be read{_with(': ', facts, 'problems')}",
    "intruder": _intruder,
    "hold": lambda facts: (
        f"the card is kept free{_with(' for ', facts, 'reason')}{_with(' by ', facts, 'by')}"
        f"{_with(' until ', facts, 'until_at')}"
    ),
    "resume": lambda facts: f"the card is lent again{_with(' by ', facts, 'by')}{_with(': ', facts, 'reason')}",
    "game": lambda facts: f"a game began{_with(': ', facts, 'name')}",
    "game_over": lambda facts: f"the last game ended{_with(': ', facts, 'name')}",
    "restore": lambda facts: "loaded, as wanted from the start" if facts.pop("preload", None) else "brought back",
    "work_long": lambda facts: f"{_work(facts)} still runs{_after(facts, 'held_seconds')}; it is waited for",
    "work_lost": _work_lost,
    "would_wait": _would_wait,
    "would_evict": _would_evict,
    "would_refuse": lambda facts: _refused("would have been", facts),
}
