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

from collections.abc import Iterable, Mapping, Sequence

from gpumgr.core.catalog import Catalog, GpuRef


def crowded(consumer: str, ahead: Iterable[str], catalog: Catalog) -> bool:
    """1, 2: whether a request has to wait for those who hold, or came before it, as they may fill the card."""
    mates = catalog.mates[consumer]
    if not mates:
        return False
    there = set(ahead) - {consumer}
    return not mates.isdisjoint(there) and any(
        _fill(consumer, gpu, there, catalog) for gpu in catalog.consumers[consumer].gpus
    )


def _fill(consumer: str, gpu: GpuRef, there: set[str], catalog: Catalog) -> bool:
    sizes, lends = catalog.sizes_mib[gpu], catalog.lends_mib.get(gpu)
    beside = there & sizes.keys()
    if catalog.mates[consumer].isdisjoint(beside):
        return False
    if lends is None:
        return True
    left = lends - sizes[consumer]
    return left >= 0 and fullest([sizes[name] for name in beside], lends) > left


def holds_up(holder: str, consumer: str, holders: Iterable[str], catalog: Catalog) -> bool:
    """Whether this holder is one of those who leave no room for a request: beside some of the others there would be,
    were it not for this one."""
    if holder not in catalog.mates[consumer]:
        return False
    others = set(holders) - {holder, consumer}
    for gpu in catalog.consumers[consumer].gpus:
        sizes = catalog.sizes_mib[gpu]
        left = catalog.lends_mib.get(gpu, 0) - sizes[consumer]
        together = fullest([sizes[name] for name in others & sizes.keys()], left)
        if holder in sizes and left >= 0 and together + sizes[holder] > left:
            return True
    return False


def leaving_for(consumer: str, resident: Sequence[str], catalog: Catalog) -> list[str]:
    """3: who of these on the card has to go for it by size; ``resident``: in the order in which they would go."""
    mates = catalog.mates[consumer]
    if mates.isdisjoint(resident):
        return []
    missing = {gpu: _missing_mib(consumer, gpu, resident, catalog) for gpu in catalog.consumers[consumer].gpus}
    leaving = []
    for name in resident:
        sizes = {gpu: catalog.sizes_mib[gpu].get(name, 0) for gpu in missing} if name in mates else {}
        if any(mib > 0 and sizes.get(gpu) for gpu, mib in missing.items()):
            leaving.append(name)
            missing = {gpu: mib - sizes[gpu] for gpu, mib in missing.items()}
    return leaving


def _missing_mib(consumer: str, gpu: GpuRef, resident: Sequence[str], catalog: Catalog) -> int:
    """What it lacks beside all of them; nothing where it is too large for the card alone."""
    sizes, lends = catalog.sizes_mib[gpu], catalog.lends_mib.get(gpu, 0)
    if lends and sizes[consumer] > lends:
        return 0
    return sizes[consumer] + sum(sizes.get(name, 0) for name in resident if name != consumer) - lends


def intrudes(
    stray: str, beside: str, holders: Iterable[str], held_mib: Mapping[tuple[str, GpuRef], int], catalog: Catalog
) -> bool:
    """4: whether a consumer that came by itself is too much beside a holder whose mate it is. ``held_mib``: what all
    those without a holder have on each GPU."""
    if stray not in catalog.mates[beside]:
        return False
    held = set(holders)
    for gpu in set(catalog.consumers[beside].gpus) & set(catalog.consumers[stray].gpus):
        granted = sum(mib for name, mib in catalog.sizes_mib[gpu].items() if name in held)
        there = sum(mib for (_, ref), mib in held_mib.items() if ref == gpu)
        if granted + there > catalog.lends_mib.get(gpu, 0):
            return True
    return False


def fullest(sizes_mib: Sequence[int], lends_mib: int) -> int:
    """The most that some of these take together of what the card lends. The sums are the bits of one number, which is
    quick also where there are many."""
    if lends_mib <= 0:
        return 0
    together = sum(sizes_mib)
    if together <= lends_mib:
        return together
    sums, all_bits = 1, (1 << (lends_mib + 1)) - 1
    for size in sizes_mib:
        sums |= (sums << size) & all_bits
    return sums.bit_length() - 1
