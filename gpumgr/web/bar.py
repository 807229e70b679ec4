"""A card as a bar: who holds how much of it, and how wide that is.

Owns: the stretches of the bar and how each is marked. Must not: decide who holds what; it adds up what status tells.

    the driver's word         consumers' processes, untracked processes
    what no process explains  a consumer's remembered memory as far as it goes, else "not listed" (the driver's own)
    what is free              promised and not taken yet, headroom, free
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpumgr.web.words import Facts, number, plain, short

COLOURS = 8
LETTERS = 26
HOLDING = frozenset({"lease", "proxy", "tail"})
"""Words of ``in_use`` behind which somebody may have been promised memory."""
NAME_LENGTH = 80
"""Of a process; a name may be a whole path."""
CHARACTER_PX = 7.5
KEY_PX, MARGIN_PX = 13, 28
NARROW_PX, WIDE_PX = 300, 760
"""The least widths of a bar on a phone and on a desktop, as in status.css."""


@dataclass(frozen=True)
class Look:
    """How one thing is marked everywhere: a letter, and a colour or pattern."""

    key: str
    css: str


UNTRACKED = Look("?", "untracked")
UNLISTED = Look("·", "unlisted")
PROMISED = Look("+", "promised")
HEADROOM = Look("", "headroom")
FREE = Look("", "free")


@dataclass(frozen=True)
class Part:
    """A stretch of the bar, in percent of its width. ``over_mib`` of its MiB are not drawn, as they are not there: more
    is promised than is free. ``key_fits`` and ``label_fits``: on "any" page, only on a "wide" one, or "never"."""

    look: Look
    label: str
    mib: int
    over_mib: int = 0
    x: float = 0.0
    width: float = 0.0
    key_fits: str = "never"
    label_fits: str = "never"

    @property
    def drawn_mib(self) -> int:
        return self.mib - self.over_mib

    @property
    def text(self) -> str:
        return f"{self.label} {self.mib} MiB"


def looks_of(consumers: Sequence[Facts]) -> dict[str, Look]:
    """By place in the file, so that a consumer keeps its mark from one page to the next."""
    names = [plain(each.get("name")) for each in consumers]
    return {name: Look(_letter(place), f"c{place % COLOURS}") for place, name in enumerate(names)}


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < LETTERS else str(place + 1)


def parts_of(gpu: Facts, consumers: Sequence[Facts], looks: Mapping[str, Look], headroom_mib: int) -> list[Part]:
    """Placed side by side; what holds nothing is left out. Empty where the card's size is not known."""
    if not gpu.get("readable") or whole(gpu.get("total_mib")) == 0:
        return []
    held = _held(gpu, consumers, looks)
    free = whole(gpu.get("free_mib"))
    promised = whole(gpu.get("promised_mib"))
    left = max(0, free - promised)
    headroom = min(headroom_mib, left)
    rest = [
        Part(PROMISED, _promised_to(gpu, consumers), promised, max(0, promised - free)),
        Part(HEADROOM, "headroom", headroom),
        Part(FREE, "free", left - headroom),
    ]
    return _placed([part for part in [*held, *rest] if part.mib > 0], whole(gpu.get("total_mib")))


def _held(gpu: Facts, consumers: Sequence[Facts], looks: Mapping[str, Look]) -> list[Part]:
    processes = processes_of(gpu)
    listed = {name: _sum(p.get("used_mib") for p in processes if p.get("consumer") == name) for name in looks}
    strangers = [process for process in processes if process.get("consumer") not in looks]
    untracked = Part(UNTRACKED, _strangers(strangers), _sum(process.get("used_mib") for process in strangers))
    unexplained = whole(gpu.get("used_mib")) - sum(listed.values()) - untracked.mib
    for consumer in consumers:
        name = plain(consumer.get("name"))
        if not listed[name] and consumer.get("gpus") == [gpu.get("index")]:
            listed[name] = max(0, min(whole(consumer.get("held_mib")), unexplained))
            unexplained -= listed[name]
    ours = [Part(looks[name], name, held) for name, held in listed.items()]
    return [*ours, untracked, Part(UNLISTED, "not listed", unexplained)]


def _strangers(processes: Sequence[Facts]) -> str:
    if len(processes) == 1 and processes[0].get("name"):
        return f"untracked: {short(plain(processes[0]['name']), NAME_LENGTH)}"
    return f"untracked: {len(processes)} processes"


def _promised_to(gpu: Facts, consumers: Sequence[Facts]) -> str:
    """Status tells only the sum; whoever is in use and has not taken everything is whom it is for."""
    names = [
        plain(each.get("name")) for each in consumers if gpu.get("index") in (each.get("gpus") or ()) and _takes(each)
    ]
    return f"promised to {', '.join(names)}" if names else "promised"


def _takes(consumer: Facts) -> bool:
    declared = consumer.get("vram_resident_mib")
    size = _sum(declared) if isinstance(declared, list) else whole(declared)
    return consumer.get("in_use") in HOLDING and whole(consumer.get("held_mib")) < size


def _placed(parts: Sequence[Part], total_mib: int) -> list[Part]:
    """Never wider than the bar, also where the numbers add up to more than the card has."""
    scale = max(total_mib, sum(part.drawn_mib for part in parts))
    placed, x = [], 0.0
    for part in parts:
        width = 100 * part.drawn_mib / scale
        label_px = MARGIN_PX + CHARACTER_PX * len(part.text)
        drawn = replace(part, x=round(x, 3), width=round(width, 3))
        placed.append(replace(drawn, key_fits=_fits(width, KEY_PX), label_fits=_fits(width, label_px)))
        x += width
    return placed


def _fits(width: float, needs_px: float) -> str:
    if width * NARROW_PX >= 100 * needs_px:
        return "any"
    return "wide" if width * WIDE_PX >= 100 * needs_px else "never"


def processes_of(gpu: Facts) -> list[Facts]:
    return [process for process in gpu.get("processes") or [] if isinstance(process, Mapping)]


def whole(value: object) -> int:
    """A number that can be drawn; 0 where there is none."""
    found = number(value)
    return 0 if found is None else max(0, int(found))


def _sum(values: Iterable[object]) -> int:
    return sum(whole(value) for value in values)
