"""Everything the one lock guards, and the moves on it.

Owns: the lock, the queue, the leases, the tickets, and what is remembered of each consumer. Must not: do I/O,
wait, or decide what the core decides. Every method that changes something is called with ``lock`` held; ``note``,
``shown``, ``waited`` and ``held`` need it not.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from gpumgr.config import LeaseSettings
from gpumgr.core.card import GpuReading, Reading
from gpumgr.core.catalog import Catalog, Consumer, GpuRef, overlap
from gpumgr.core.following import Followed
from gpumgr.core.lease import Call, Claim, EndReason, Lease, LeaseBook, RequestKey
from gpumgr.core.ledger import Sight, keeping_promises, sized
from gpumgr.core.outlook import why
from gpumgr.core.outside import Game, Outside, Pause
from gpumgr.core.placement import (
    Decision,
    Holding,
    Refuse,
    Unload,
    Victim,
    Wait,
    beside_strangers_mib,
    decide,
    decide_call,
    keeps_out,
)
from gpumgr.core.queue import Entry, Phase, Policy, Priority, Queue, WaitingFor, heads
from gpumgr.core.resuming import Resuming
from gpumgr.core.sharing import intrudes
from gpumgr.core.yielding import YieldReason, yield_request
from gpumgr.errors import GpumgrError, RequestEnded
from gpumgr.runtime.ledger import Ledger
from gpumgr.runtime.ports import Clock, Kept, KeptLease, Total
from gpumgr.runtime.refusals import scheduler_timeout
from gpumgr.runtime.ticket import Ask, Ticket, Wish
from gpumgr.runtime.views import Views

log = logging.getLogger(__name__)

EVENTS_KEPT = 200
HOLDS_KEPT = 20
"""How long they took tells when those who wait may expect their turn."""
SLEPT_SECONDS = 1.0
"""Less than this is the two clocks' own difference."""


SAME_CLOCK = timedelta(seconds=0.05)
"""Two looks at both clocks differ by less, unless one was set or a thread stood still between them."""


@dataclass
class Memory:
    """What the broker remembers of one consumer."""

    total_requests: int = 0
    evictions: int = 0
    last_used: float | None = None
    last_used_at: datetime | None = None
    used_since_unload: bool | None = None
    leftover_mib: dict[GpuRef, int] = field(default_factory=dict)
    recognised: bool = False
    """One of its processes was seen on a card: from then on an empty list means that it holds nothing."""
    uses: int = 0
    """How often somebody began or ended to use it: an answer to "busy?" from before the last time says nothing."""
    tail: bool = False
    """A grant of it has ended, and it did not say since that it is idle."""
    busy: bool = False
    """Its last word, of a time without a holder."""
    busy_error: str | None = None
    busy_asked: float | None = None
    reports_busy: bool = True
    """False once it has said that it has no such report."""
    asked: bool = False
    """Whether it computes, since the start: what an earlier life of the broker began in it may go on."""
    resident_since: float | None = None
    """Since when the driver shows it on the card; None: it does not."""
    wanted_back: bool = False
    """It was on the card, and was unloaded for somebody else."""
    busy_seen: float | None = None
    """When it last said that it computes, without a holder."""
    unload_not_before: float = float("-inf")
    load_not_before: float = float("-inf")
    """When housekeeping tries each of them again after it failed: who could not be brought back may come by itself, and
    be in a game's way."""
    outlasted: bool = False
    """It still computed at the end of its quarantine: what it does for a holder of the past is not waited for again."""
    healthy: bool | None = None
    hold_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=HOLDS_KEPT))
    """How long its last leases and calls took."""
    health_error: str | None = None
    checked: float | None = None
    checked_at: datetime | None = None


@dataclass(eq=False, slots=True)
class Quarantine:
    """A lease that is over while its consumer may still compute for it, and excludes others ``until`` then at most.
    ``seq`` is its hold in the queue."""

    lease_id: str
    consumer: str
    seq: int
    until: float


class State:
    def __init__(
        self,
        catalog: Catalog,
        policy: Policy,
        lease: LeaseSettings,
        headroom_mib: int,
        clock: Clock,
        *,
        may_unload: bool = True,
        believes: bool = False,
        outside: Outside | None = None,
    ) -> None:
        """``may_unload``: whether anybody is ever unloaded. ``believes``: declared sizes stand in for a reading."""
        self.outside = outside or Outside()
        self.intruders: dict[int, frozenset[str]] = {}
        """By a lease's hold: who became resident beside it and should not be."""
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)
        """Preparation threads wait here for ``begun``."""
        self.expiry = threading.Condition(self.lock)
        """The watchdog waits here for a sooner expiry."""
        self.watchdog_looks_at = float("-inf")
        """Until then the watchdog waits."""
        self.ended = threading.Condition(self.lock)
        """Whoever was told nothing yet waits here for an end to be written down."""
        self.ending: set[str] = set()
        """Tokens whose end is being written down."""
        self.ledger = Ledger()
        self.queue = Queue(catalog, policy, self.ledger.pair_seconds)
        self.leases = LeaseBook()
        self.resuming = Resuming()
        self.quarantines: dict[int, Quarantine] = {}
        """By hold."""
        self.store_error: str | None = None
        """Why nothing can be written down now; no lease is granted meanwhile."""
        self.restored = False
        """The leases of earlier lives are known."""
        self.dirty: set[str] = set()
        """Consumers whose totals have changed since they were written."""
        self.on_event: Callable[[dict[str, Any]], None] = lambda _event: None
        self.on_load: Callable[[], None] = lambda: None
        """Something begins to be loaded: the card is worth a look. Quick, and called with the lock held."""
        self.on_learned: Callable[[], None] = lambda: None
        """There is something for the store. The same."""
        self._learned_from: Reading | None = None
        self._sized_by: object = None
        """What the sizes in force were derived from."""
        self._promises: dict[int, Consumer] = {}
        """Consumers whose size follows what is observed, as each hold was granted them."""
        self._configured = catalog
        self._kept: dict[str, KeptLease] = {}
        """Consumers that the configuration knows not, or otherwise, by name, with a lease that they still have."""
        self._slept = clock.slept()
        self._zero: datetime | None = None
        """The monotonic clock's zero by the wall clock."""
        self.calls: dict[int, Call] = {}
        """Proxied calls that hold their consumer's GPUs, and those that pass under a lease."""
        self.followed: dict[int, Followed] = {}
        """Those of the calls that hold for work which goes on after their answer."""
        self.granted_at: dict[int, float] = {}
        """Of each hold that was granted, since when it holds."""
        self.tickets: dict[int, Ticket] = {}
        self.by_request: dict[RequestKey, Ticket] = {}
        self.begun: deque[Ticket] = deque()
        self.inside: set[Ticket] = set()
        """Tickets whose preparation waits with the turn kept; at most one per GPU."""
        self.memory: dict[str, Memory] = {name: Memory() for name in catalog.consumers}
        self.believes = believes
        self.readable: dict[GpuRef, GpuReading] = {}
        """The last reading of each GPU that could be read, by index."""
        self.reading = Reading(read_at=float("-inf"), error="the card was not read yet")
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self.changes = 0
        """How often somebody came or went: what was decided before the last one may be decided differently now."""
        self.ends = 0
        """How many grants have ended. A reading taken before one of them says nothing about after it."""
        self.stopping = False
        self._lease = lease
        self._headroom_mib = headroom_mib
        self.views = Views(self, headroom_mib)
        self.may_unload = may_unload
        self._clock = clock

    @property
    def catalog(self) -> Catalog:
        return self.queue.catalog

    # -- other lives ----------------------------------------------------------------------------------------

    def restore(self, kept: Kept) -> None:
        """What an earlier life left: every live lease with its full TTL from now on."""
        now = self._clock.monotonic()
        self.restored = True
        self.leases.start_fence(kept.fence)
        self.ledger.restore(kept.learned, self.catalog.consumers.values())
        self._use_catalog()
        for each in kept.leases:
            self._keep_consumer(each)
        for each in kept.leases:
            self._restore_lease(each, now)
        for key, consumer, reason, at in kept.ended:
            self.leases.remember(key, consumer, reason, at)
        for name, total in kept.totals.items():
            if name in self.memory:
                remembered = self.memory[name]
                remembered.total_requests += total.requests
                remembered.evictions += total.evictions
                remembered.last_used_at = remembered.last_used_at or total.last_used_at
        self._use_catalog()
        for event in kept.events:
            self._recall_hold(event)
        self.events.extendleft(reversed(kept.events[-EVENTS_KEPT + len(self.events) :]))
        for lease in kept.rebooted:
            facts = {"lease_id": lease.lease_id, "holder": lease.holder, "reason": EndReason.HOST_REBOOT.value}
            self.note("expire", lease.consumer, **facts)
        self.changes += 1

    def _recall_hold(self, event: Mapping[str, Any]) -> None:
        """How long a lease of an earlier life took."""
        consumer, held = self.memory.get(event.get("consumer") or ""), event.get("held_seconds")
        if consumer is not None and event.get("type") in ("release", "expire") and isinstance(held, int | float):
            consumer.hold_seconds.append(float(held))

    def _keep_consumer(self, kept: KeptLease) -> None:
        lease = kept.lease
        known = self.catalog.consumers.get(lease.consumer)
        names = set() if known is None else set(known.gpus)
        if known is None or any({ref, uuid}.isdisjoint(names) for ref, uuid in _both(lease)):
            self._kept[lease.consumer] = kept
            self.memory.setdefault(lease.consumer, Memory())
            self._use_catalog()

    def _restore_lease(self, kept: KeptLease, now: float) -> None:
        lease = kept.lease
        phase = Phase.QUARANTINE if kept.quarantined else Phase.LIVE
        hold = self.queue.restore(lease.consumer, phase, kept.priority)
        self.granted_at[hold.seq] = min(lease.granted_at, now)
        self.memory[lease.consumer].uses += 1
        self.memory[lease.consumer].used_since_unload = True
        granted = replace(self.catalog.consumers[lease.consumer], gpus=lease.gpus, vram_resident_mib=kept.sizes_mib)
        self._promise(hold.seq, granted)
        if kept.quarantined:
            until = now + self._lease.quarantine_seconds
            self.quarantines[hold.seq] = Quarantine(lease.lease_id, lease.consumer, hold.seq, until)
            return
        most = self._lease.max_hold_seconds
        until = lease.granted_at + most if most else lease.hold_until
        self.leases.restore(replace(lease, seq=hold.seq, hold_until=until), now)

    def _use_catalog(self) -> None:
        catalog = self._sized(self._configured.resolved(self.reading))
        for kept in self._kept.values():
            pairs = zip(_both(kept.lease), kept.sizes_mib, strict=True)
            known = catalog.consumers.get(kept.lease.consumer)
            names = set() if known is None else set(known.gpus)
            more = [(ref, mib) for (ref, uuid), mib in pairs if {ref, uuid}.isdisjoint(names)]
            catalog = catalog.keeping(kept.lease.consumer, tuple(ref for ref, _ in more), tuple(mib for _, mib in more))
        self.queue.resolve(catalog)

    # -- sizes that are learned -----------------------------------------------------------------------------

    def _sized(self, catalog: Catalog) -> Catalog:
        """With the sizes in force (core/ledger.py)."""
        lends = {ref: max(0, gpu.total_mib - self._headroom_mib) for ref, gpu in self.readable.items()}
        self._promises = {seq: each for seq, each in self._promises.items() if seq in self.queue.holds}
        consumers = {}
        for name, consumer in catalog.consumers.items():
            promised = [each for each in self._promises.values() if each.name == name]
            consumers[name] = keeping_promises(sized(consumer, self.ledger.account(name), lends), promised)
        return replace(catalog, consumers=consumers, lends_mib=self._lends())

    def _lends(self) -> dict[GpuRef, int]:
        """What each card has for consumers that coexist by size, beside its strangers."""
        if not any(consumer.by_size for consumer in self._configured.consumers.values()):
            return {}
        read = self.readable.items()
        return {ref: max(0, beside_strangers_mib(gpu, self._headroom_mib, self.outside)) for ref, gpu in read}

    def _size_anew(self) -> None:
        """A size that has changed is in force from the next decision on."""
        if not any(consumer.auto or consumer.by_size for consumer in self._configured.consumers.values()):
            return
        promised = [seq for seq in self._promises if seq in self.queue.holds]
        totals = [(ref, gpu.total_mib) for ref, gpu in self.readable.items()]
        derived_from = (self.ledger.changes, promised, totals, self._lends())
        if derived_from == self._sized_by:
            return
        self._sized_by = derived_from
        before = self.catalog
        self._use_catalog()
        if self.catalog != before:
            self.advance()

    def _promise(self, seq: int, granted: Consumer) -> None:
        if granted.auto:
            self._promises[seq] = granted

    def note_granting(self, ticket: Ticket, *, holds_mib: int | None = None) -> None:
        """``holds_mib``: what it holds, where it is not on the card yet; None: it is, or nobody knows."""
        consumer = self.catalog.consumers[ticket.consumer.name]
        self._promise(ticket.seq, consumer)
        self.granted_at[ticket.seq] = self._clock.monotonic()
        now, at = self._clock.monotonic(), rfc3339(self._clock.utc())
        self.ledger.begin_use(consumer, ticket.seq, self._grants(consumer.name) - {ticket.seq}, now, at)
        if holds_mib is not None:
            self._begin_load(consumer, holds_mib)

    def note_load_called(self, consumer: str) -> None:
        found = self.catalog.consumers[consumer]
        held = (self.reading.gpu(ref) for ref in found.gpus)
        self._begin_load(found, sum((gpu.held_mib(consumer) or 0) for gpu in held if gpu is not None))

    def _begin_load(self, consumer: Consumer, held_mib: int) -> None:
        self.ledger.begin_load(consumer, held_mib, self._clock.monotonic())
        self.on_load()

    def _learn(self, reading: Reading) -> None:
        """What a reading shows of those that are held, or were until now."""
        if reading is self._learned_from:
            return  # a preparation looks, and decides on the same
        self._learned_from = reading
        used = {hold.consumer for hold in self.queue.holds.values()}
        told = [c for c in self.catalog.consumers.values() if c.name in used or self.ledger.follows(c.name)]
        if told:
            at = rfc3339(self._clock.utc())
            learned = [self.ledger.observe(each, self._sight(each, reading), at) for each in told]
            if any(learned):
                self.on_learned()
        self._size_anew()

    def _sight(self, consumer: Consumer, reading: Reading) -> Sight:
        name = consumer.name
        held = [self.views.holding(consumer, ref, reading, None) for ref in consumer.gpus]
        told = all(holding.exact for holding in held)
        return Sight(
            at=reading.read_at,
            holds=self._grants(name),
            works=self.memory[name].tail or self.computing(name) == "tail",
            leaving=self.queue.is_unloading(name),
            resident=any(holding.resident for holding in held),
            held_mib={ref: each.held_mib for ref, each in zip(consumer.gpus, held, strict=True)} if told else None,
        )

    def _grants(self, consumer: str) -> frozenset[int]:
        return frozenset(hold.seq for hold in self.queue.holds_of(consumer) if hold.phase is not Phase.PREPARING)

    # -- coming and going -----------------------------------------------------------------------------------

    def leave(self, seq: int, consumer: str, *, counts: bool = True) -> None:
        """A hold is over. A consumer that was only kept for it goes with it. ``counts``: how long it took says
        something about the next ones."""
        self.queue.leave(seq)
        since = self.granted_at.pop(seq, None)
        if since is not None and counts:
            self.memory[consumer].hold_seconds.append(round(self._clock.monotonic() - since, 3))
        if consumer in self._kept and not self.queue.holds_of(consumer):
            del self._kept[consumer]
            if self.catalog.consumers[consumer].retired:
                del self.memory[consumer]
            self._use_catalog()

    def note_sleep(self) -> bool:
        """Whether the machine slept since this was last asked: a TTL counts only time in which a renew can be heard."""
        before, self._slept = self._slept, self._clock.slept()
        if self._slept - before < SLEPT_SECONDS:
            return False
        self.leases.rearm(self._clock.monotonic())
        self.ends += 1  # whatever was read of the card before is old
        self.changes += 1
        self.expiry.notify()
        log.warning("the machine slept for %.0f s: every lease has its full TTL again", self._slept - before)
        return True

    def take_totals(self) -> dict[str, Total]:
        """Of those that have changed since they were last taken."""
        names, self.dirty = self.dirty & self.memory.keys(), set()
        return {
            name: Total(self.memory[name].total_requests, self.memory[name].evictions, self.memory[name].last_used_at)
            for name in names
        }

    def publish(self, lease: Lease) -> Lease:
        """It is written down: live from now on."""
        return self.leases.publish(lease, self._clock.monotonic(), self._lease.max_hold_seconds)

    def watch_from(self, at: float) -> None:
        """The watchdog must look by then: a lease may be over, or a turn. It is not woken where it does so anyway: it
        would be in the way of the answer to a grant."""
        if at < self.watchdog_looks_at:
            self.expiry.notify()

    def next_instant(self) -> float | None:
        """When something is over, or begins, that nobody comes to say."""
        instants = (self.leases.next_expiry(), self.queue.look_again_at)
        return min((at for at in instants if at is not None), default=None)

    def advance_where_due(self, now: float) -> None:
        """A quantum is over, or a linger, since somebody last came or went."""
        if self.queue.look_again_at is not None and now >= self.queue.look_again_at:
            self.advance(now)

    def count_request(self, consumer: str, more: int = 1) -> None:
        self.memory[consumer].total_requests += more
        self.dirty.add(consumer)

    # -- tickets --------------------------------------------------------------------------------------------

    def enter(
        self,
        ask: Ask,
        consumer: Consumer,
        now: float,
        deadline: float,
        *,
        proxied: bool = False,
        priority: Priority = Priority.NORMAL,
    ) -> Ticket:
        """A new request, in the line."""
        behind = self.resuming.resume(ask.resume_of, consumer.name, now, ask.bearer)
        entry = self.queue.enter(consumer.name, now, priority=priority, behind=behind)
        ticket = self.new_ticket(entry, ask, consumer, now, deadline, proxied=proxied)
        ticket.resumes = None if behind is None else ask.resume_of
        self.tickets[ticket.seq] = ticket
        if ask.request is not None:
            self.by_request[ask.request] = ticket
        return ticket

    def new_ticket(
        self, entry: Entry, ask: Ask, consumer: Consumer, now: float, deadline: float, *, proxied: bool = False
    ) -> Ticket:
        """One that nobody knows of yet."""
        wanted = self._lease.default_ttl_seconds if ask.ttl_seconds is None else ask.ttl_seconds
        return Ticket(
            entry=entry,
            consumer=consumer,
            holder=ask.holder,
            ttl_seconds=self._lease.clamp_ttl(wanted),
            request=ask.request,
            entered_at=now,
            deadline=deadline,
            prepare_seconds=self._lease.max_prepare_seconds,
            woken=threading.Condition(self.lock),
            stirred=threading.Condition(self.lock),
            proxied=proxied,
            restoring=ask.restoring,
        )

    def end_lingers(self, ticket: Ticket, now: float, queue: Queue | None = None) -> bool:
        """Whether it would be refused on a card that is idle: its time is over before somebody else is believed not to
        come back. A swap that may be needless is less than a refusal that is. Not where others go before it: it would
        be refused all the same."""
        queue = queue or self.queue
        if ticket.restoring or ticket.is_late(now) or not queue.is_waiting(ticket.entry):
            return False
        found = why(queue, ticket.entry, now)
        if not found.lingers or found.until is None or found.until < ticket.deadline:
            return False
        if queue.why(ticket.entry) is WaitingFor.AHEAD:
            return False
        for name in found.whose:
            queue.end_stay(name)
        return True

    def make_way(self, consumer: Consumer) -> None:
        """Somebody asks: what housekeeping brings back on those GPUs can wait."""
        for ticket in self.making_way(consumer):
            self.withdraw(ticket)

    def making_way(self, consumer: Consumer) -> list[Ticket]:
        return [t for t in self.tickets.values() if t.restoring and overlap(t.consumer.gpus, consumer.gpus)]

    def refuse(self, ticket: Ticket, error: GpumgrError) -> None:
        """Settle with an error that status and the log tell of; nothing where the ticket has its answer already."""
        if ticket.outcome is not None:
            return
        self.settle(ticket, error)
        if ticket.restoring:
            return
        facts = {"holder": ticket.holder, "code": error.code, **self._of_request(ticket)}
        self.note("refuse", ticket.consumer.name, **facts)
        log.info("refuse consumer=%s holder=%s code=%s: %s", ticket.consumer.name, ticket.holder, error.code, error)

    def _of_request(self, ticket: Ticket) -> dict[str, Any]:
        return {"priority": ticket.entry.priority.value, "waited_seconds": self.waited(ticket)}

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for it any more; nothing where it has its answer, or is being written down."""
        if ticket.outcome is not None or ticket.granting:
            return
        self.settle(
            ticket, RequestEnded("this request was withdrawn; its request_id may be used again", reason="withdrawn")
        )
        if not ticket.restoring:
            self.note("withdraw", ticket.consumer.name, holder=ticket.holder, **self._of_request(ticket))
            log.info("withdraw consumer=%s holder=%s", ticket.consumer.name, ticket.holder)
        self.advance()

    def abandon(self, ticket: Ticket) -> None:
        """Its preparation is over without a grant: the turn is free for the next one."""
        hold = self.queue.holds.get(ticket.seq)
        if hold is not None and hold.phase in (Phase.PREPARING, Phase.GRANTING):
            self.queue.leave(ticket.seq)
            self.granted_at.pop(ticket.seq, None)
            self._end_stay_of_absent(ticket.consumer.name)
            self.advance()

    def _end_stay_of_absent(self, consumer: str) -> None:
        """Its turn began, and it did not come onto the card, or has left it by itself: nobody waits for its sake."""
        if self.memory[consumer].resident_since is None and not self.queue.holds_of(consumer):
            self.queue.end_stay(consumer)

    def settle(self, ticket: Ticket, outcome: Lease | Call | GpumgrError) -> None:
        """The ticket has its answer: its callers wake. A granted one keeps its hold, any other leaves.

        Where its preparation is in the middle of an unload, the hold stays until that step has ended.
        """
        if ticket.outcome is not None:
            return
        ticket.outcome = outcome
        self._forget(ticket)
        if isinstance(outcome, GpumgrError):
            self.resuming.give_back(ticket.resumes)
            if ticket.prepare_limit is None:
                self.queue.leave(ticket.seq)
            ticket.stirred.notify_all()
        ticket.woken.notify_all()

    def _forget(self, ticket: Ticket) -> None:
        self.tickets.pop(ticket.seq, None)
        self.inside.discard(ticket)
        if ticket.request is not None and self.by_request.get(ticket.request) is ticket:
            del self.by_request[ticket.request]

    def advance(self, now: float | None = None, own: Ticket | None = None) -> None:
        """Somebody came or went: whoever has the turn now begins its preparation, on a thread for that, unless it is
        ``own``: then the caller looks after it.

        A turn that comes after the deadline is nobody's, and ends nobody's, also where the caller's thread did not get
        to say so yet. ``now`` is the caller's where it matters that no time has passed: with ``wait_seconds: 0``.
        """
        now = self._clock.monotonic() if now is None else now
        self._refuse_late(now)
        while (begun := self.queue.begin(now)) or self._end_a_linger(now):
            for ticket in [self.tickets[hold.seq] for hold in begun]:
                self._begin(ticket, now)
                if ticket is not own:
                    self.hand_over(ticket)
            self._refuse_late(now)
            if begun and not self.queue.line:
                break  # else: who goes may end a turn on another GPU, on which somebody waits for that
        if self.queue.look_again_at is not None:
            self.watch_from(self.queue.look_again_at)
        self.changes += 1
        for hold in self.queue.holds.values():
            if hold.phase is Phase.PREPARING and hold.seq in self.tickets:
                self.tickets[hold.seq].stirred.notify_all()

    def _end_a_linger(self, now: float) -> bool:
        """Whether somebody is not waited for any more, for the sake of one who cannot wait for that."""
        if self.queue.look_again_at is None:
            return False
        return any(self.end_lingers(ticket, now) for ticket in self._heads())

    def _heads(self) -> list[Ticket]:
        return [self.tickets[entry.seq] for entry in heads(self.queue.line, self.catalog)]

    def _refuse_late(self, now: float) -> None:
        """Of those who may have the turn next."""
        while late := [ticket for ticket in self._heads() if ticket.is_late(now)]:
            for ticket in late:
                self.refuse(ticket, scheduler_timeout(self, ticket))

    def _begin(self, ticket: Ticket, now: float) -> None:
        self.memory[ticket.consumer.name].uses += 1
        ticket.began_at = now
        ticket.prepare_limit = now + self._lease.max_prepare_seconds
        ticket.step = "waiting for a preparation thread"

    def hand_over(self, ticket: Ticket) -> None:
        """To the preparation threads."""
        self.begun.append(ticket)
        self.work.notify()

    def let_pass(self, ticket: Ticket) -> None:
        """A holder at once, come what may; what would have happened to it is noted."""
        self._note_would(ticket)
        self.memory[ticket.consumer.name].uses += 1
        self.queue.admit(ticket.entry).phase = Phase.GRANTING
        ticket.granting = True
        self.note_granting(ticket)

    def _note_would(self, ticket: Ticket) -> None:
        name = ticket.consumer.name
        blockers = [hold.consumer for hold in self.queue.blockers(ticket.consumer)]
        if blockers:
            self.note("would_wait", name, holder=ticket.holder, waiting_for="holder", behind=blockers)
        if self.memory[name].healthy is False:
            self.note("would_refuse", name, holder=ticket.holder, code="consumer_unhealthy")
        view = replace(self.views.of(ticket, self.reading, {}), may_unload=True)
        decision = (decide_call if ticket.proxied else decide)(ticket.consumer, view)
        if isinstance(decision, Wait) and not blockers:
            self.note("would_wait", name, holder=ticket.holder, waiting_for=decision.reason)
        self.note_would_evict(ticket, decision)
        if isinstance(decision, Refuse):
            error = decision.error
            self.note("would_refuse", name, holder=ticket.holder, code=error.code, reason=error.message)

    def note_would_evict(self, ticket: Ticket, decision: Decision) -> None:
        if isinstance(decision, Unload):
            self.note("would_evict", ticket.consumer.name, holder=ticket.holder, victims=list(decision.consumers))

    def prepare_anew(self, ticket: Ticket) -> None:
        """Its wait inside the preparation is over: the preparation's own limit counts again."""
        ticket.waiting_for = None
        self.inside.discard(ticket)
        ticket.prepare_limit = self._clock.monotonic() + self._lease.max_prepare_seconds

    def wait_inside(self, ticket: Ticket, reason: WaitingFor) -> None:
        """Its preparation has to wait with the turn kept: from now on its callers' deadlines count."""
        if ticket.waiting_for is not reason:
            ticket.waiting_for = reason
            self.inside.add(ticket)
            ticket.woken.notify_all()

    # -- views ----------------------------------------------------------------------------------------------

    def in_use(self) -> frozenset[str]:
        """Held, prepared, or called under a lease: also one that has ended meanwhile."""
        held = {hold.consumer for hold in self.queue.holds.values()}
        return frozenset(held | {call.consumer for call in self.calls.values()})

    def goes_next(self, consumer: str) -> bool:
        """Whether the first of those who wait on its GPUs waits for it: in that breath what it holds is theirs."""
        line = [entry.consumer for entry in self.queue.waiting() if self.catalog.share_gpu(entry.consumer, consumer)]
        return line[:1] == [consumer]

    def may_undo_load(self, ticket: Ticket) -> bool:
        """Whether its target may be unloaded because this ticket did not get it: nobody else uses it."""
        name = ticket.consumer.name
        others = [hold for hold in self.queue.holds_of(name) if hold.seq != ticket.seq]
        return self.may_unload and not others and all(call.consumer != name for call in self.calls.values())

    def may_ask_busy(self, consumer: str) -> bool:
        """While somebody holds it, busy is the holder's."""
        remembered = self.memory[consumer]
        return remembered.reports_busy and not remembered.outlasted and not self.queue.holds_of(consumer)

    # -- memory of consumers --------------------------------------------------------------------------------

    def note_reading(self, reading: Reading) -> None:
        """The newest reading is the one status shows; processes it names are recognised from now on."""
        if reading is self.reading or reading.read_at < self.reading.read_at:
            return
        first = self.reading.read_at == float("-inf")
        before, now = (r.problems(self.catalog.gpus) for r in (self.reading, reading))
        self.reading = reading
        self.readable.update({gpu.index: gpu for gpu in reading.gpus if gpu.readable})
        if now != before and (now or not first):
            self._note_problems(now)
        if self._configured.unresolved and reading.error is None:
            self._configured = self._configured.resolved(reading)
            self._use_catalog()
        for gpu in reading.gpus:
            for process in gpu.processes:
                if process.consumer in self.memory and process.holder_pid is None:
                    self.memory[process.consumer].recognised = True
        self._lower_leftovers(reading)
        self.outside = self.outside.reading(reading)
        self._note_residents(reading)
        self._learn(reading)

    def _note_residents(self, reading: Reading) -> None:
        """Since when each is on the card, and who should not be there."""
        holdings = self.views.holdings(reading, {})
        resident = {name for (name, _), holding in holdings.items() if holding.resident}
        for name, remembered in self.memory.items():
            if name not in resident:
                remembered.resident_since = None
            elif remembered.resident_since is None:
                remembered.resident_since = reading.read_at
                remembered.wanted_back = False
        self._note_intruders(resident, holdings)
        self._end_stays(reading, holdings)

    def _end_stays(self, reading: Reading, holdings: Mapping[tuple[str, GpuRef], Holding]) -> None:
        """Who has left the card by itself, as servers do that unload what is idle, has no turn that others wait for."""
        ended = False
        for name, stay in self.queue.stays.items():
            idle = stay.idle_since is not None and stay.idle_since < reading.read_at
            gone = all(holdings[name, ref].resident is False for ref in self.catalog.consumers[name].gpus)
            if stay.since is not None and idle and gone:
                self.queue.end_stay(name)
                ended = True
        if ended and self.queue.line:
            self.advance()

    def _note_intruders(self, resident: set[str], holdings: Mapping[tuple[str, GpuRef], Holding]) -> None:
        """Only where others are unloaded for a lease: else they may have been there before it."""
        held = {hold.consumer for hold in self.queue.holds.values()}
        strays = resident - held - {name for name in resident if self.queue.is_unloading(name)}
        strays = strays if self.may_unload else set()
        there = {pair: holding.held_mib for pair, holding in holdings.items() if pair[0] in strays}
        granted = {hold.consumer for hold in self.queue.holds.values() if hold.phase is not Phase.PREPARING}
        before, self.intruders = self.intruders, {}
        for lease in self.leases:
            found = frozenset(
                name
                for name in strays
                if self.catalog.exclude(name, lease.consumer)
                or intrudes(name, lease.consumer, granted, there, self.catalog)
            )
            if found:
                self.intruders[lease.seq] = found
            for name in sorted(found - before.get(lease.seq, frozenset())):
                self.note("intruder", name, beside=lease.consumer, lease_id=lease.lease_id, holder=lease.holder)
                log.warning("intruder consumer=%s beside=%s lease_id=%s", name, lease.consumer, lease.lease_id)

    # -- those outside --------------------------------------------------------------------------------------

    def pause(self, pause: Pause | None) -> None:
        """An operator keeps the card free from now on, or not any more."""
        self.outside = replace(self.outside, pause=pause)
        self._outside_changed()

    def note_games(self, games: tuple[Game, ...]) -> None:
        """Those that run now."""
        before, self.outside = self.outside.games, replace(self.outside, games=games)
        if bool(before) != bool(games):
            first = (games or before)[0]
            self.note("game" if games else "game_over", None, pid=first.pid, name=first.name)
            log.info("%s pid=%s name=%s", "game" if games else "game over", first.pid, first.name)
        if before != games:
            self._outside_changed()

    def _outside_changed(self) -> None:
        """Whoever waits and cannot be granted any more is told at once, not at its turn."""
        view = self.views.bare()
        for ticket in list(self.tickets.values()):
            error = None if ticket.granting else keeps_out(ticket.consumer, view)
            if error is not None:
                self.refuse(ticket, error)
        self.advance()

    def intruders_of(self, lease: Lease) -> frozenset[str]:
        """As the last reading shows them."""
        return self.intruders.get(lease.seq, frozenset())

    def asked_to_yield(self, lease: Lease) -> Claim | None:
        """To whom its holder is asked to leave the card."""
        return self.outside.closed(lease.gpus, self._clock.monotonic()) or self.wish(lease)

    def wish(self, lease: Lease) -> Wish | None:
        """The request that its holder is asked to yield to (core/yielding.py)."""
        hold, now = self.queue.holds.get(lease.seq), self._clock.monotonic()
        if hold is None or hold.phase is not Phase.LIVE or not self.queue.line:
            return None
        held_since = {each.seq: self.granted_at[each.seq] for each in self.leases if each.seq in self.granted_at}
        found = yield_request(hold, self.queue, held_since, self._lease.min_hold_seconds, now)
        if found is None:
            return None
        to = self.tickets[found.to.seq]
        who = (
            f"{to.holder or 'a request without a label'} waits for {to.consumer.name} since {self.shown(to.entered_at)}"
        )
        why = {
            YieldReason.PRIORITY: f"and is more urgent ({to.entry.priority} before {hold.priority})",
            YieldReason.QUANTUM: f"and the turn of {lease.consumer} is over",
        }
        return Wish(found.reason.value, f"{who}, {why[found.reason]}", self.shown(found.since), to.seq)

    def note_yield(self, lease: Lease, bearer: str | None) -> None:
        """This bearer gives it back. Where somebody is waited for, it may come back behind that one."""
        wish = self.wish(lease)
        if wish is not None:
            self.resuming.yielded(lease.lease_id, lease.consumer, wish.seq, self._clock.monotonic(), bearer)

    def _lower_leftovers(self, reading: Reading) -> None:
        """An unload is proved while memory is still falling: what stays is the least that is seen afterwards."""
        for name, remembered in self.memory.items():
            if remembered.used_since_unload is False and not self.queue.holds_of(name):
                for ref, mib in remembered.leftover_mib.items():
                    gpu = reading.gpu(ref)
                    held = None if gpu is None else gpu.held_mib(name)
                    if held is not None:
                        remembered.leftover_mib[ref] = min(mib, held)

    def _note_problems(self, problems: list[str]) -> None:
        if problems:
            self.note("gpu_unreadable", None, problems=problems)
            log.warning("gpu_unreadable %s", "; ".join(problems))
        else:
            log.info("gpu_readable")

    def note_victim(self, victim: Victim, reading: Reading, *, wanted_back: bool) -> None:
        """``wanted_back``: it goes for somebody else's sake."""
        remembered = self.memory[victim.consumer]
        self.ledger.unloaded(self.catalog.consumers[victim.consumer], victim, rfc3339(self._clock.utc()))
        if victim.reason is None:
            remembered.wanted_back = wanted_back
            if not remembered.recognised:
                self.outside = self.outside.reading(reading).unloaded(self.catalog.consumers[victim.consumer].gpus)
            remembered.evictions += victim.asked
            self.dirty.add(victim.consumer)
            remembered.used_since_unload = False
            for ref in self.catalog.consumers[victim.consumer].gpus:
                gpu = reading.gpu(ref)
                held = None if gpu is None else gpu.held_mib(victim.consumer)
                remembered.leftover_mib[ref] = held or 0
            remembered.resident_since = None

    def note_health(self, consumer: str, error: str | None) -> None:
        remembered = self.memory[consumer]
        remembered.healthy = error is None
        remembered.health_error = error
        remembered.checked = self._clock.monotonic()
        remembered.checked_at = self._clock.utc()

    def note_stopped(self, consumer: str) -> None:
        """Its service does not run, as an unload leaves it: neither healthy nor not."""
        self.note_health(consumer, None)
        self.memory[consumer].healthy = None

    def note_busy(self, consumer: str, uses: int, busy: bool | None, error: str | None) -> None:
        """Its answer to a question that was asked after ``uses`` uses. None: it has no such report."""
        remembered = self.memory[consumer]
        remembered.busy_asked = self._clock.monotonic()
        remembered.reports_busy = busy is not None
        if remembered.uses != uses or self.queue.holds_of(consumer):
            return
        remembered.asked = True
        remembered.busy = bool(busy)
        if busy:
            remembered.busy_seen = remembered.busy_asked
        remembered.busy_error = error
        remembered.tail = remembered.tail and remembered.busy

    def computing(self, consumer: str) -> str | None:
        """What computes on it without a holder, as far as it is known: a ``tail``, ``direct`` use, or None."""
        remembered = self.memory[consumer]
        if any(call.consumer == consumer for call in self.calls.values()):
            return "tail"
        if left := self.views.lingerers(consumer):
            return "tail" if any(process.holder_pid is not None for process in left) else "direct"
        if not remembered.busy:
            return None
        return "tail" if remembered.tail else "direct"

    def note_loading(self, consumer: str) -> None:
        """Whatever becomes of its load call, from now on it may hold memory, and readings before it are old."""
        self.ends += 1
        self.memory[consumer].used_since_unload = True

    def note_used(self, consumer: str, *, granted: bool = True) -> None:
        """A use of it has ended: it may have left memory behind. ``granted``: and not one under somebody's lease."""
        self.note_loading(consumer)
        remembered = self.memory[consumer]
        remembered.uses += 1
        remembered.tail = remembered.reports_busy
        remembered.busy = remembered.outlasted = False
        if not granted:
            return
        self.dirty.add(consumer)
        remembered.last_used = self._clock.monotonic()
        remembered.last_used_at = self._clock.utc()

    # -- showing --------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._clock.monotonic()

    def shown(self, instant: float) -> str:
        """A monotonic instant as RFC 3339 UTC with milliseconds. The same one is shown alike each time, although the
        two clocks are never read at once: only a clock that was set, or has drifted, shows it otherwise."""
        zero = self._clock.utc() - timedelta(seconds=self._clock.monotonic())
        if self._zero is None or abs(zero - self._zero) > SAME_CLOCK:
            self._zero = zero
        return rfc3339(self._zero + timedelta(seconds=instant))

    def waited(self, ticket: Ticket) -> float:
        """Seconds since it came, to the millisecond."""
        return round(self._clock.monotonic() - ticket.entered_at, 3)

    def held(self, lease: Lease) -> float:
        """Seconds since its grant, to the millisecond."""
        return round(self._clock.monotonic() - lease.granted_at, 3)

    def note(self, event: str, consumer: str | None, **facts: Any) -> dict[str, Any]:
        """Remember an event for status, and for the store; appending to a deque is atomic."""
        noted = self.event(event, consumer, **facts)
        self.events.append(noted)
        self.on_event(noted)
        return noted

    def event(self, event: str, consumer: str | None, **facts: Any) -> dict[str, Any]:
        """One that is written down with what it tells, and shown after that."""
        return {"at": rfc3339(self._clock.utc()), "type": event, "consumer": consumer, **facts}

    def held_up_by(self, lease: Lease) -> int:
        """How many requests wait for this lease: in the line, or prepared and waiting for its memory."""
        hold = self.queue.holds.get(lease.seq)
        if hold is None or hold.phase is not Phase.LIVE:
            return 0
        inside = [self.queue.holds[t.seq] for t in self.inside if overlap(t.consumer.gpus, hold.gpus)]
        return self.queue.held_up_by(hold) + sum(1 + self.queue.behind(waiting) for waiting in inside)


def _both(lease: Lease) -> list[tuple[GpuRef, str | None]]:
    """The two names of each of its GPUs."""
    return list(zip(lease.gpus, lease.gpu_uuids, strict=True))


def rfc3339(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"
