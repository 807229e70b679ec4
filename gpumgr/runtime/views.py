"""What the decisions look at: values made of what the lock guards, and of a reading.

Owns: which memory is whose, which is promised, what is left of earlier holders. Must not: change anything, or decide.
Called with the lock held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gpumgr.core.card import GpuProcess, Reading
from gpumgr.core.catalog import Consumer, GpuRef, overlap
from gpumgr.core.placement import Holding, Report, View, assess, promised_mib
from gpumgr.core.queue import Phase

if TYPE_CHECKING:
    from gpumgr.runtime.state import State
    from gpumgr.runtime.ticket import Ticket

TAKING = (Phase.PREPARING, Phase.GRANTING, Phase.LIVE)
"""Holds that may still take what they were granted; those on their way out have what they have."""


class Views:
    def __init__(self, state: State, headroom_mib: int) -> None:
        self._state = state
        self._headroom_mib = headroom_mib

    def of(self, ticket: Ticket, reading: Reading, reports: Mapping[str, Report], busy: Iterable[str] = ()) -> View:
        """What a decision about this ticket looks at. ``busy`` have just said so. Those without a holder are in use all
        the same, and what they have not taken yet is promised to them as to a holder: a model that a tail or somebody's
        direct use is loading is not on the card yet."""
        state, target = self._state, ticket.consumer.name
        beside = [hold for hold in state.queue.holds_of(target) if hold.seq != ticket.seq]
        working = frozenset(name for name in busy if not (beside if name == target else state.queue.holds_of(name)))
        using = (state.in_use() | working) - {target}
        left = self._lingering(reading, ticket)
        others = using | {name for name in self._hold_much(left) if name != target}
        holdings = self.holdings(reading, reports)
        if self.believing(ticket, reading):
            reading = self._believed(ticket.consumer, reading, holdings)
        return View(
            catalog=state.catalog,
            reading=reading,
            headroom_mib=self._headroom_mib,
            holdings=holdings,
            promised_mib=self.promised(using, holdings, reading, ticket),
            in_use=others,
            busy=working,
            leaving=frozenset(name for name in state.catalog.consumers if state.queue.is_unloading(name)),
            target_in_use=bool(beside),
            leased=self._leased(ticket.consumer),
            may_unload=state.may_unload,
            tried=tuple(ticket.tried),
            last_used={name: m.last_used for name, m in state.memory.items() if m.last_used is not None},
            outside=state.outside,
            now=state.now(),
            lingering_mib={} if beside else {ref: mib for (name, ref), mib in left.items() if name == target},
        )

    def bare(self) -> View:
        """The card without anyone on it, as far as `impossible` and `keeps_out` look."""
        state = self._state
        return View(state.catalog, state.reading, self._headroom_mib, {}, {}, outside=state.outside, now=state.now())

    def _lingering(
        self, reading: Reading, ticket: Ticket | None = None, *, named: bool = False
    ) -> dict[tuple[str, GpuRef], int]:
        """Per consumer and GPU, what programs hold that no live lease is for: those that a holder named whose lease is
        over, and whatever is known of a consumer without a backend. Nobody may unload them, and nobody is given what
        they hold. Not the ticket's own process: what it kept from its last lease is its own to use. ``named``: only
        programs that a holder named."""
        found: dict[tuple[str, GpuRef], int] = {}
        for gpu in reading.gpus:
            for process in gpu.processes:
                consumer = self._state.catalog.consumers.get(process.consumer or "")
                if named and process.holder_pid is None:
                    continue
                if consumer is not None and self._lingers(process, consumer, ticket):
                    mib = consumer.needs_mib(gpu.index) if process.used_mib is None else process.used_mib
                    found[consumer.name, gpu.index] = found.get((consumer.name, gpu.index), 0) + mib
        return found

    def _lingers(self, process: GpuProcess, consumer: Consumer, ticket: Ticket | None) -> bool:
        if process.holder_pid is None:
            return not consumer.has_backend and (ticket is None or ticket.consumer.name != consumer.name)
        tickets = [t for t in self._state.tickets.values() if t.granting] + ([] if ticket is None else [ticket])
        live = [lease.process for lease in self._state.leases] + [t.process for t in tickets]
        return all(each is None or each.pid != process.holder_pid for each in live)

    def _hold_much(self, left: Mapping[tuple[str, GpuRef], int]) -> set[str]:
        """Those of which more than a context is left."""
        return {name for (name, _), mib in left.items() if mib > self._state.catalog.consumers[name].residual_mib}

    def lingerers(self, consumer: str, ticket: Ticket | None = None) -> list[GpuProcess]:
        """The programs that keep it in use without a lease, as they were last seen; for a ticket, not its own."""
        known = self._state.catalog.consumers.get(consumer)
        holds = [hold for hold in self._state.queue.holds_of(consumer) if ticket is None or hold.seq != ticket.seq]
        if known is None or holds or consumer not in self._hold_much(self._lingering(self._state.reading, ticket)):
            return []
        own = {p.pid: p for gpu in self._state.reading.gpus for p in gpu.processes if p.consumer == consumer}
        return [process for process in own.values() if self._lingers(process, known, ticket)]

    def _leased(self, consumer: Consumer) -> bool:
        """Whether a lease shares a GPU with it, also one that is being written down."""
        granting = [t for t in self._state.tickets.values() if t.granting and not t.proxied]
        leased = [lease.gpus for lease in self._state.leases] + [ticket.consumer.gpus for ticket in granting]
        return any(overlap(gpus, consumer.gpus) for gpus in leased)

    def _may_believe(self, ticket: Ticket) -> bool:
        """A proxied call goes on where the card cannot be read; a lease only where the file says so."""
        return self._state.believes or ticket.proxied

    def believing(self, ticket: Ticket, reading: Reading) -> bool:
        """Whether what is decided about this ticket rests on declared sizes instead of this reading."""
        return self._may_believe(ticket) and bool(reading.problems(ticket.consumer.gpus))

    def _believed(self, target: Consumer, reading: Reading, holdings: Mapping[tuple[str, GpuRef], Holding]) -> Reading:
        held: dict[GpuRef, int] = {}
        for (_, gpu), holding in holdings.items():
            held[gpu] = held.get(gpu, 0) + holding.held_mib
        return reading.believing(target.gpus, self._state.readable, held)

    def holdings(self, reading: Reading, reports: Mapping[str, Report]) -> dict[tuple[str, GpuRef], Holding]:
        return {
            (consumer.name, ref): self.holding(consumer, ref, reading, reports.get(consumer.name))
            for consumer in self._state.catalog.consumers.values()
            for ref in consumer.gpus
        }

    def holding(self, consumer: Consumer, ref: GpuRef, reading: Reading, report: Report | None) -> Holding:
        remembered = self._state.memory[consumer.name]
        gpu = reading.gpu(ref)
        return assess(
            consumer,
            ref,
            driver_mib=None if gpu is None else gpu.held_mib(consumer.name),
            attributable=remembered.recognised or (gpu is not None and not gpu.hides_processes),
            report=report,
            used_since_unload=remembered.used_since_unload,
            leftover_mib=self._leftover_mib(consumer, ref),
        )

    def _leftover_mib(self, consumer: Consumer, ref: GpuRef) -> int:
        """What stayed after its last unload; where that was in an earlier life, on each of its GPUs alike."""
        remembered = self._state.memory[consumer.name]
        if remembered.used_since_unload is None:
            left_mib = self._state.ledger.account(consumer.name).left_mib // len(consumer.gpus)
            return min(left_mib, consumer.residual_mib)
        return remembered.leftover_mib.get(ref, 0)

    def promised(
        self,
        holders: Iterable[str],
        holdings: Mapping[tuple[str, GpuRef], Holding],
        reading: Reading,
        ticket: Ticket | None = None,
    ) -> dict[GpuRef, int]:
        """Per GPU, what these consumers were granted and have not taken yet. Two leases of one consumer share
        its memory, so it counts once; what an earlier holder's program has kept is no part of what a holder takes."""
        promised: dict[GpuRef, int] = {}
        left = self._lingering(reading, ticket, named=True)
        taking = {hold.consumer for hold in self._state.queue.holds.values() if hold.phase in TAKING}
        for name in holders:
            consumer = self._state.catalog.consumers[name]
            for ref in consumer.gpus:
                held = holdings[name, ref]
                if name in taking and (name, ref) in left:
                    held = replace(held, held_mib=max(0, held.held_mib - left[name, ref]))
                promised[ref] = promised.get(ref, 0) + promised_mib(consumer, ref, held)
        return promised

    def untold(self, target: Consumer, reading: Reading) -> list[str]:
        """The consumers on the target's GPUs whose memory the driver does not tell: they must be asked."""
        names = []
        for consumer in self._state.catalog.consumers.values():
            for ref in () if consumer.retired else set(consumer.gpus) & set(target.gpus):
                gpu = reading.gpu(ref)
                held = None if gpu is None else gpu.held_mib(consumer.name)
                hidden = gpu is not None and gpu.hides_processes
                if held is None or (held == 0 and hidden and not self._state.memory[consumer.name].recognised):
                    names.append(consumer.name)
                    break
        return names

    def suspects(self, target: Consumer) -> list[str]:
        """The consumers beside the target that have no holder and may be computing all the same."""
        return [
            name
            for name, remembered in self._state.memory.items()
            if name != target.name
            and not self._state.catalog.consumers[name].retired
            and (remembered.tail or remembered.busy or not remembered.asked)
            and self._state.may_ask_busy(name)
            and self._state.catalog.share_gpu(name, target.name)
        ]
