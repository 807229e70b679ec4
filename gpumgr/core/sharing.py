"""Who may be on the card together by their sizes (``coexist: by_size``), beside the pairs of ``can_coexist_with``.

Owns: whether sizes add up. Must not: know what a driver says. That everything fits indeed is proved before each grant
(core/placement.py), which stays the last word.

Two consumers that both say ``by_size``, and whose sizes are known, are **mates** where they share a GPU. On each GPU:

1. A request waits while its size and those of all who hold there exceed what the card lends: as in a conflict, in the
   line, and not in a preparation, which would keep everybody else from the card meanwhile.
2. Nobody goes ahead of somebody whom they would hold up: whatever part of those who hold and of those who came before
   goes together, there must be room for this one beside it.
3. A request whose mates on the card leave no room for it needs a swap: as many of them have to go as makes room, those
   who are idle for the longest time first.
4. Who is there without a turn, and fits beside what the holders were granted, is no intruder.

Sizes of all who share the GPU count, also of those that coexist as a pair. Where nobody mates with a request none of
this applies to it, nor where it is too large for the card alone: no wait would mend that. A card that was never read
lends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gpumgr.core.catalog import Catalog, GpuRef


def crowded(consumer: str, ahead: Iterable[str], catalog: Catalog) -> bool:
    """1, 2: whether a request has to wait for those who hold, or came before it, as they may fill the card."""
    return _lacks_room(consumer, ahead, catalog, fullest)


def holds_up(holder: str, consumer: str, holders: Iterable[str], catalog: Catalog) -> bool:
    """Whether this holder is one of those who leave no room for a request: beside some of the others there would be,
    were it not for this one."""
    if holder not in catalog.mates[consumer]:
        return False
    others = [catalog.consumers[name] for name in set(holders) - {holder, consumer}]
    own = catalog.consumers[consumer]
    for gpu, size in zip(own.gpus, own.vram_resident_mib, strict=True):
        left = catalog.lends_mib.get(gpu, 0) - size
        held = catalog.consumers[holder].needs_mib(gpu)
        if held and left >= 0 and fullest([other.needs_mib(gpu) for other in others], left) + held > left:
            return True
    return False


def leaving_for(consumer: str, resident: Sequence[str], catalog: Catalog) -> list[str]:
    """3: who of these on the card has to go for it by size; ``resident``: in the order in which they would go."""
    staying = [name for name in resident if name != consumer]
    leaving = []
    for name in list(staying):
        if not _lacks_room(consumer, staying, catalog, lambda sizes, _lends: sum(sizes)):
            break
        if name in catalog.mates[consumer]:
            staying.remove(name)
            leaving.append(name)
    return leaving


def intrudes(
    stray: str, beside: str, holders: Iterable[str], held_mib: Mapping[tuple[str, GpuRef], int], catalog: Catalog
) -> bool:
    """4: whether a consumer that came by itself is too much beside a holder whose mate it is. ``held_mib``: what all
    those without a holder have on each GPU."""
    if stray not in catalog.mates[beside]:
        return False
    held = set(holders)
    for gpu in set(catalog.consumers[beside].gpus) & set(catalog.consumers[stray].gpus):
        granted = sum(catalog.consumers[name].needs_mib(gpu) for name in held)
        there = sum(mib for (_, ref), mib in held_mib.items() if ref == gpu)
        if granted + there > catalog.lends_mib.get(gpu, 0):
            return True
    return False


def fullest(sizes_mib: Iterable[int], lends_mib: int) -> int:
    """The most that some of these take together of what the card lends."""
    sums = {0}
    for size in sizes_mib:
        sums |= {together + size for together in sums if together + size <= lends_mib}
    return max(sums)


def _lacks_room(consumer: str, others: Iterable[str], catalog: Catalog, taken: Callable[[list[int], int], int]) -> bool:
    mates = catalog.mates[consumer]
    if not mates:
        return False
    there = set(others) - {consumer}
    if mates.isdisjoint(there):
        return False
    own = catalog.consumers[consumer]
    for gpu, size in zip(own.gpus, own.vram_resident_mib, strict=True):
        beside = [catalog.consumers[name] for name in there if gpu in catalog.consumers[name].gpus]
        if not any(other.name in mates for other in beside):
            continue
        lends = catalog.lends_mib.get(gpu, 0)
        if (size <= lends or not lends) and taken([other.needs_mib(gpu) for other in beside], lends) + size > lends:
            return True
    return False
