"""The ledger at work: what readings and unloads tell of each consumer, and what the store has not written yet.

Owns: the accounts, the uses and loads under way, and what is owed to the store. Must not: read a card, write, or know
the queue: it is told who holds what. Everything is called with the broker's lock held. The rules are core/ledger.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gpumgr.core.catalog import Consumer
from gpumgr.core.ledger import (
    SOON_SECONDS,
    Account,
    Entry,
    Load,
    Observation,
    Sight,
    Use,
    followed,
    observed_figures,
    swap_seconds,
    unloaded,
    warnings_of,
)
from gpumgr.core.placement import Victim

log = logging.getLogger(__name__)

OWED_MOST = 1000
"""Entries that wait for a store that fails; the oldest are dropped."""


@dataclass
class Ledger:
    accounts: dict[str, Account] = field(default_factory=dict)
    changes: int = 0
    """How often an account has changed."""
    _costs: dict[tuple[str, str], float | None] = field(default_factory=dict)
    """What was asked of ``pair_seconds`` since the accounts last changed."""
    _costs_of: int = 0
    _uses: dict[str, Use] = field(default_factory=dict)
    _loads: dict[str, Load] = field(default_factory=dict)
    _owed: list[tuple[str, Entry]] = field(default_factory=list)
    _warned: dict[str, frozenset[str]] = field(default_factory=dict)
    """Kinds of warnings that the log has already, by consumer."""
    _unjudged: dict[str, Consumer] = field(default_factory=dict)
    """Whose account has changed since warnings were looked for."""

    def account(self, consumer: str) -> Account:
        return self.accounts.get(consumer, Account())

    # -- the store ------------------------------------------------------------------------------------------

    def restore(self, kept: Mapping[str, Account], consumers: Iterable[Consumer]) -> None:
        """Before what this life has learned already. What was warned of in an earlier life is not news."""
        self.changes += 1
        for name, account in kept.items():
            self.accounts[name] = self.account(name).after(account)
        for consumer in consumers:
            self._warned[consumer.name] = frozenset(warnings_of(consumer, self.account(consumer.name)))

    def take(self) -> list[tuple[str, Entry]]:
        """What is to be written, the oldest first."""
        taken, self._owed = self._owed, []
        return taken

    def give_back(self, entries: Sequence[tuple[str, Entry]]) -> None:
        """They could not be written."""
        self._owed = [*entries, *self._owed][-OWED_MOST:]

    def _enter(self, consumer: Consumer, entry: Entry) -> None:
        name = consumer.name
        self.accounts[name] = self.account(name).with_entry(entry)
        self._owed.append((name, entry))
        self.changes += 1
        self._unjudged[name] = consumer

    def warn(self) -> None:
        """Tell the log of what an operator should look at and it has not yet. Not as each entry comes: a grant would
        have to wait for it."""
        unjudged, self._unjudged = self._unjudged, {}
        for name, consumer in unjudged.items():
            found = warnings_of(consumer, self.accounts[name])
            for kind in found.keys() - self._warned.get(name, frozenset()):
                log.warning("%s consumer=%s: %s", kind, name, found[kind])
            self._warned[name] = frozenset(found)

    def follows(self, consumer: str) -> bool:
        """Whether a reading is awaited that tells of it, also where nobody holds it any more."""
        return consumer in self._uses or consumer in self._loads

    # -- what happens ---------------------------------------------------------------------------------------

    def unloaded(self, consumer: Consumer, victim: Victim, at: str) -> None:
        """An unload was judged. One that nobody was asked for is none. Where it took the memory away, the use before it
        is over, and what that learned of its load stays: on a card that is waited for no reading comes in between."""
        if victim.reason is None:
            use = self._uses.pop(consumer.name, None)
            if use is not None:
                self._end_use(consumer, use, at)
            self._loads.pop(consumer.name, None)
        if victim.asked:
            self._enter(consumer, unloaded(victim, at))

    def begin_load(self, consumer: Consumer, held_mib: int, now: float) -> None:
        """It is granted and not on the card, or its load is called: from now on it comes."""
        observed = observed_figures(consumer, self.account(consumer.name))
        size = sum(observed.resident_mib) if observed is not None else 0
        size = size if size or consumer.unsized else sum(consumer.vram_resident_mib)
        self._loads[consumer.name] = Load(now, size, held_mib)

    def begin_use(self, consumer: Consumer, seq: int, holds: frozenset[int], now: float, at: str) -> None:
        """It is granted. A use may begin and end between two readings: the next one tells of it all the same."""
        use = self._uses.get(consumer.name)
        if use is None or use.holds.isdisjoint(holds):
            if use is not None:
                self._end_use(consumer, use, at)
            self._uses[consumer.name] = Use(frozenset({seq}), now, now)

    def observe(self, consumer: Consumer, sight: Sight, at: str) -> bool:
        """A reading shows it. Whether a use of it is over, and was learned from."""
        name = consumer.name
        if name in self._loads:
            self._follow_load(name, sight)
        use, over = followed(self._uses.get(name), sight)
        if use is not None:
            self._uses[name] = use
        else:
            self._uses.pop(name, None)
        return over is not None and self._end_use(consumer, over, at)

    def _end_use(self, consumer: Consumer, use: Use, at: str) -> bool:
        load = self._loads.pop(consumer.name, None)
        if not use.peak_mib:
            return False  # nobody saw it on the card
        seconds = None if load is None else load.ended().seconds
        self._enter(consumer, Observation(at, use.peak_mib, use.last_mib, seconds))
        return True

    def _follow_load(self, name: str, sight: Sight) -> None:
        load = self._loads[name]
        if sight.held_mib is not None and sight.at >= load.began_at:
            load = load.seen(sum(sight.held_mib.values()), sight.at)
        if load.seconds is None and not load.rises(sight.at):
            del self._loads[name]
        else:
            self._loads[name] = load

    def swap_seconds(self, from_names: Iterable[str], to_name: str) -> float | None:
        """What a swap costs, as far as it was ever seen (core/ledger.py)."""
        return swap_seconds(self.accounts, from_names, to_name)

    def pair_seconds(self, from_name: str, to_name: str) -> float | None:
        """The same of one that goes for one that comes: kept until something is learned, as each decision of the order
        asks for it."""
        if self._costs_of != self.changes:
            self._costs, self._costs_of = {}, self.changes
        pair = from_name, to_name
        if pair not in self._costs:
            self._costs[pair] = swap_seconds(self.accounts, [from_name], to_name)
        return self._costs[pair]

    def look_again_seconds(self, usual: float, now: float) -> float:
        """When the card should be read next: soon while something is being loaded."""
        return SOON_SECONDS if any(load.rises(now) for load in self._loads.values()) else usual
