"""The broker: acquire, renew, release, and the threads that keep its promises.

Owns: waiting for an answer, and starting and stopping the threads. Must not: know HTTP, or hold the lock across
I/O. All state is in state.py, all rules in core.

Threads: ``watchdog`` (ends leases), one ``prepare-N`` per GPU, ``observe-card`` and ``observe-servers`` (so that
neither a hung driver nor a hung server can delay the watchdog), and the evictor's ``unload-NAME`` for one call each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from gpumgr import __version__
from gpumgr.config import Settings
from gpumgr.core.catalog import Consumer
from gpumgr.core.lease import Call, EndReason, Lease, require_same
from gpumgr.core.placement import View, impossible, insufficient
from gpumgr.core.queue import Fifo, Phase
from gpumgr.errors import GpumgrError, InternalError, LeaseMismatch, LeaseUnknown, ShuttingDown
from gpumgr.runtime.evictor import Evictor
from gpumgr.runtime.ports import BackendError, Clock, Dialect, Journal, Probe
from gpumgr.runtime.preparation import Preparation, World, ask_busy
from gpumgr.runtime.refusals import prepare_timeout, scheduler_timeout
from gpumgr.runtime.state import State
from gpumgr.runtime.ticket import Ask, Ticket
from gpumgr.runtime.watchdog import Rounds

log = logging.getLogger(__name__)

CARD_EACH_SECONDS = 2.0
HEALTH_EACH_SECONDS = 30.0
HEALTH_IN_USE_EACH_SECONDS = 5.0
BUSY_EACH_SECONDS = 10.0
"""Direct use, for status alone: a decision asks by itself."""
BUSY_SHOWN_SECONDS = 1.0
TAIL_EACH_SECONDS = 0.5
LONGEST_SLEEP_SECONDS = 1.0
FIRST_READING_SECONDS = 5.0
STALE_READING_SECONDS = 10.0


class Broker:
    """Nothing starts in the constructor; ``start`` begins the threads, ``stop`` ends every wait."""

    def __init__(
        self,
        settings: Settings,
        probe: Probe,
        dialects: Mapping[str, Dialect],
        clock: Clock,
        journal: Journal,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.journal = journal
        mode = settings.scheduling.mode
        self._lets_pass = mode == "passthrough"
        self.state = State(
            settings.catalog,
            Fifo(),
            settings.lease,
            settings.gpu.headroom_mib,
            clock,
            may_unload=mode == "evicting",
            believes=settings.gpu.when_unreadable == "declared",
        )
        self._glance = False
        self.started_at: datetime | None = None
        self._probe = probe
        self._dialects = dialects
        evictor = Evictor(probe, dialects, clock, pause)
        self._world = World(probe, dialects, evictor, journal, clock)
        self._workers: list[threading.Thread] = []
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._card = Rounds("observe-card", self.observe_card)
        self._servers = Rounds("observe-servers", self._observe_servers)
        self._card_read = threading.Condition(self.state.lock)

    # -- start and stop -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads; returns after the first reading of the card, which resolves UUIDs and warns of
        consumers that can never fit, or without it where the driver hangs."""
        self.started_at = self.clock.utc()
        self._card.start()
        self.fresh_card(FIRST_READING_SECONDS)
        self._warn_of_misfits()
        for number, _ in enumerate(self.state.catalog.gpus):
            worker = threading.Thread(target=self._prepare_for_ever, name=f"prepare-{number}", daemon=True)
            self._workers.append(worker)
            worker.start()
        self._watchdog.start()
        self._servers.start()
        self.state.note("start", None, version=__version__)
        log.info("start version=%s bind=%s", __version__, self.settings.server.bind)

    def stop(self) -> None:
        """Answer everyone who waits ``shutting_down``, end the threads. Live leases are not touched."""
        with self.state.lock:
            if self.state.stopping:
                return
            self.state.stopping = True
            for ticket in list(self.state.tickets.values()):
                if not ticket.granting:
                    self.state.settle(ticket, _shutting_down())
            self.state.work.notify_all()
            self.state.expiry.notify_all()
            self._card_read.notify_all()
        self._card.stop()
        self._servers.stop()
        self.state.note("stop", None)
        log.info("stop")

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Stop, wait for the threads as long as given, and put the probe down."""
        self.stop()
        for thread in [*self._workers, self._watchdog]:
            if thread.is_alive():
                thread.join(timeout_seconds)
        for rounds in (self._card, self._servers):
            rounds.join(timeout_seconds)
        self._probe.close()

    def missing(self) -> list[str]:
        """What keeps the broker from granting now; empty: it is ready."""
        with self.state.lock:
            if self.state.stopping:
                return ["the broker is shutting down"]
            if self.started_at is None:
                return ["the broker has not started yet"]
            if self.state.believes:
                return []
            reading = self.state.reading
            age = self.clock.monotonic() - reading.read_at
            if reading.error is None and age > STALE_READING_SECONDS:
                return [f"the driver does not answer: the card was last read {age:.0f} s ago"]
            dead = [worker.name for worker in self._workers if not worker.is_alive()]
            return [f"the thread {name} is dead: restart gpumgr" for name in dead] + reading.problems(
                self.state.catalog.gpus
            )

    def _warn_of_misfits(self) -> None:
        with self.state.lock:
            for consumer in self.state.catalog.consumers.values():
                view = self._bare_view()
                if not view.reading.problems(consumer.gpus) and impossible(consumer, view):
                    log.warning("%s", insufficient(consumer, view).message)

    def _bare_view(self) -> View:
        """The card without anyone on it, as far as `impossible` looks."""
        return View(self.state.catalog, self.state.reading, self.settings.gpu.headroom_mib, {}, {})

    # -- acquire --------------------------------------------------------------------------------------------

    def acquire(self, ask: Ask) -> Lease:
        """Blocks until granted or refused: at most ``wait_seconds`` + ``lease.max_prepare_seconds``.

        Raises: KindUnknown, ConsumerUnknown, RequestMismatch, RequestEnded, and every kind of Refused.
        """
        granted = self._granted(ask, proxied=False)
        if not isinstance(granted, Lease):
            raise InternalError("gpumgr granted a call to somebody who asked for a lease")
        return granted

    def _granted(self, ask: Ask, *, proxied: bool) -> Lease | Call:
        self.tick()
        with self.state.lock:
            now = self.clock.monotonic()
            consumer = self.state.catalog.resolve(kind=ask.kind, consumer=ask.consumer)
            if ask.request is not None:
                live = self.state.leases.of_request(ask.request, consumer.name, now)
                if live is not None:
                    return live
            deadline = now + self._wait_seconds(ask)
            ticket = self._ticket(ask, consumer, now, deadline, proxied=proxied)
            if not (self._lets_pass and self.state.queue.is_waiting(ticket.entry)):
                return self._await(ticket, deadline)
            self.state.let_pass(ticket)
        Preparation(self.state, self._world, ticket).grant()
        with self.state.lock:
            return self._await(ticket, deadline)

    def _wait_seconds(self, ask: Ask) -> float:
        limits = self.settings.lease
        wait = limits.default_wait_seconds if ask.wait_seconds is None else ask.wait_seconds
        return min(wait, limits.max_wait_seconds)

    def _ticket(self, ask: Ask, consumer: Consumer, now: float, deadline: float, *, proxied: bool = False) -> Ticket:
        """The waiting request this one joins, or a new one at the end of the line."""
        if self.state.stopping:
            raise _shutting_down()
        ticket = self.state.by_request.get(ask.request) if ask.request is not None else None
        if ticket is not None and ask.request is not None:
            require_same(ask.request, ticket.consumer.name, consumer.name)
            ticket.deadline = max(ticket.deadline, deadline)
            return ticket
        view = self._bare_view()
        if not self._lets_pass and not view.reading.problems(consumer.gpus) and impossible(consumer, view):
            refusal = insufficient(consumer, view)
            self.state.note("refuse", consumer.name, holder=ask.holder, code=refusal.code, waited_seconds=0.0)
            log.info("refuse consumer=%s holder=%s code=%s: %s", consumer.name, ask.holder, refusal.code, refusal)
            raise refusal
        ticket = self.state.enter(ask, consumer, now, deadline, proxied=proxied)
        if not self._lets_pass:
            self.state.advance(now)
        return ticket

    def _await(self, ticket: Ticket, deadline: float) -> Lease | Call:
        """With the lock held, as in every condition's wait."""
        ticket.callers += 1
        try:
            while ticket.outcome is None:
                limit = ticket.limit(deadline)
                left = None if limit is None else limit - self.clock.monotonic()
                if left is not None and left <= 0:
                    raise self._give_up(ticket)
                ticket.woken.wait(left)
        finally:
            ticket.callers -= 1
        if isinstance(ticket.outcome, GpumgrError):
            raise ticket.outcome
        return ticket.outcome

    def _give_up(self, ticket: Ticket) -> GpumgrError:
        """This caller's time is over. The request goes with its last caller."""
        make = prepare_timeout if ticket.preparing else scheduler_timeout
        error = make(self.state, ticket)
        if ticket.callers == 1:
            self.state.refuse(ticket, error)
            self.state.advance()
        return error

    # -- proxied calls --------------------------------------------------------------------------------------

    def call(self, ask: Ask) -> Call:
        """Blocks until the call may go to its consumer, or is refused: as ``acquire``, and ends with ``end_call``.

        Raises: KindUnknown, ConsumerUnknown, and every kind of Refused but InsufficientVram for what an eviction or
        another's end could mend: such a call goes ahead, unless a live lease shares the card.
        """
        granted = self._granted(ask, proxied=True)
        if not isinstance(granted, Call):
            raise InternalError("gpumgr granted a lease to a proxied call")
        return granted

    def call_under_lease(self, token: str, kind: str) -> Call:
        """Passes at once; ends with ``end_call``. Raises: KindUnknown, LeaseUnknown, LeaseMismatch."""
        with self.state.lock:
            now = self.clock.monotonic()
            consumer = self.state.catalog.resolve(kind=kind, consumer=None)
            lease = self.state.leases.get(token, now)
            if lease.consumer != consumer.name:
                raise LeaseMismatch(
                    f"this lease is for {lease.consumer}, and /v1/{kind} leads to {consumer.name}: call a kind of "
                    f"{lease.consumer}, or leave X-GPU-Lease out to wait for a turn",
                    consumer=lease.consumer,
                    asked=consumer.name,
                )
            call = Call(self.state.queue.number(), consumer.name, now, lease_id=lease.lease_id)
            self.state.calls[call.seq] = call
        return call

    def end_call(self, call: Call) -> None:
        """The call is over, however it ended. Nothing happens the second time."""
        with self.state.lock:
            if self.state.calls.pop(call.seq, None) is None:
                return
            self.state.queue.leave(call.seq)
            self.state.note_used(call.consumer)
            self.state.advance()
            look = self.state.memory[call.consumer].tail
            held = round(self.clock.monotonic() - call.began_at, 3)
        if look:
            self._servers.nudge()
        under = "" if call.lease_id is None else f" lease_id={call.lease_id}"
        log.info(
            "call consumer=%s waited_seconds=%s held_seconds=%s%s", call.consumer, call.waited_seconds, held, under
        )

    def note_call(self, consumer: str, error: str | None) -> None:
        """What came of a call: an answer counts as health; where there was none, health is asked before the next."""
        with self.state.lock:
            if error is None:
                self.state.note_health(consumer, None)
            else:
                self.state.memory[consumer].checked = None
        if error is not None:
            log.warning("a call got no answer consumer=%s: %s", consumer, error)

    # -- a lease's life -------------------------------------------------------------------------------------

    def lease(self, token: str) -> Lease:
        """Raises: LeaseUnknown."""
        with self.state.lock:
            return self.state.leases.get(token, self.clock.monotonic())

    def renew(self, token: str, ttl_seconds: float | None) -> tuple[Lease, int, bool | None]:
        """The lease with a full TTL from now on, how many requests it holds up, and its consumer's health.

        Raises: LeaseUnknown.
        """
        ttl = None if ttl_seconds is None else self.settings.lease.clamp_ttl(ttl_seconds)
        with self.state.lock:
            lease = self.state.leases.renew(token, self.clock.monotonic(), ttl)
            if ttl is not None:
                self.state.expiry.notify()  # it may end sooner than the watchdog sleeps
            return lease, self.state.held_up_by(lease), self.state.memory[lease.consumer].healthy

    def release(self, token: str) -> bool:
        """Whether this call ended a live lease. The next one in line goes at once."""
        with self.state.lock:
            try:
                lease = self.state.leases.get(token, self.clock.monotonic())
            except LeaseUnknown:
                return False
            self._begin_end(lease, EndReason.RELEASED)
        self._finish_end(lease, "release")
        return True

    def revoke(self, lease_id: str, by: str | None, reason: str | None) -> None:
        """End somebody's lease by its public name; the event tells who did, and why. Raises: LeaseUnknown."""
        with self.state.lock:
            lease = self.state.leases.named(lease_id, self.clock.monotonic())
            self._begin_end(lease, EndReason.REVOKED)
        self._finish_end(lease, "revoke", by=by, reason=reason)

    def tick(self) -> int:
        """End every lease whose time is over; how many there were. Called by the watchdog, and by whoever asks
        for a turn, so that a late watchdog delays nobody."""
        with self.state.lock:
            over = self.state.leases.expired(self.clock.monotonic())
            for lease in over:
                self._begin_end(lease, EndReason.EXPIRED)
        for lease in over:
            try:
                self._finish_end(lease, "expire")
            except Exception:  # one that cannot be ended must not keep the others
                log.exception("a lease could not be ended lease_id=%s", lease.lease_id)
        return len(over)

    def _begin_end(self, lease: Lease, reason: EndReason) -> None:
        """With the lock held: over for its holder, still excluding others until it is written down."""
        self.state.leases.end(lease, reason, self.clock.monotonic())
        self.state.queue.holds[lease.seq].phase = Phase.ENDING

    def _finish_end(self, lease: Lease, event: str, **more: str | None) -> None:
        facts = {
            "lease_id": lease.lease_id,
            "holder": lease.holder,
            "fence": lease.fence,
            "held_seconds": self.state.held(lease),
            **more,
        }
        try:
            self.journal.ended(lease, self.state.note(event, lease.consumer, **facts))
        except Exception:
            log.exception("the end of a lease could not be written down lease_id=%s", lease.lease_id)
        with self.state.lock:
            self.state.queue.leave(lease.seq)
            self.state.note_used(lease.consumer)
            self.state.advance()
            look = self.state.memory[lease.consumer].tail
        if look:
            self._servers.nudge()
        log.info("%s consumer=%s %s", event, lease.consumer, " ".join(f"{k}={v}" for k, v in facts.items()))

    # -- threads --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while True:
            try:
                self.tick()
            except Exception:
                log.exception("watchdog failed; it goes on")
            with self.state.lock:
                if self.state.stopping:
                    return
                soonest = self.state.leases.next_expiry()
                left = LONGEST_SLEEP_SECONDS if soonest is None else soonest - self.clock.monotonic()
                self.state.expiry.wait(min(max(left, 0.0), LONGEST_SLEEP_SECONDS))

    def _prepare_for_ever(self) -> None:
        while True:
            with self.state.lock:
                while not self.state.begun:
                    if self.state.stopping:
                        return
                    self.state.work.wait()
                ticket = self.state.begun.popleft()
            try:
                Preparation(self.state, self._world, ticket).run()
            except Exception:
                log.exception("a preparation broke; its thread goes on")
                with self.state.lock:
                    self.state.settle(ticket, InternalError("gpumgr failed while preparing; its log has the traceback"))
                    self.state.abandon(ticket)

    def observe_card(self) -> float:
        """Read the card for status; the seconds until the next look."""
        reading = self._probe.read()
        with self.state.lock:
            self.state.note_reading(reading)
            self._card_read.notify_all()
        return CARD_EACH_SECONDS

    def fresh_card(self, at_most_seconds: float) -> None:
        """Have the card read now; return when it was, or after ``at_most_seconds`` where the driver hangs."""
        asked = self.clock.monotonic()
        until = asked + at_most_seconds
        self._card.nudge()
        with self.state.lock:
            while self.state.reading.read_at < asked and not self.state.stopping:
                left = until - self.clock.monotonic()
                if left <= 0:
                    return
                self._card_read.wait(left)

    def glance(self) -> None:
        """Somebody looks at status: what is older than a second is asked anew, for the next look."""
        self._glance = True
        self._servers.nudge()

    def _observe_servers(self) -> float:
        """Ask everyone whose health is old (leased ones sooner, as renew tells it to the holder), and everyone who may
        be computing without a holder whether that is so."""
        at_most = BUSY_SHOWN_SECONDS if self._glance else BUSY_EACH_SECONDS
        self._glance = False
        for name, dialect in self._dialects.items():
            with self.state.lock:
                if self.state.stopping:
                    return HEALTH_EACH_SECONDS
                due = self._health_due(name)
            if due:
                self._look_at_health(name, dialect)
            with self.state.lock:
                due = self._busy_due(name, at_most)
            if due:
                self._look_at_work(name, dialect)
        with self.state.lock:
            working = any(m.reports_busy and (m.tail or m.busy) for m in self.state.memory.values())
        return TAIL_EACH_SECONDS / 2 if working else HEALTH_IN_USE_EACH_SECONDS / 2

    def _look_at_health(self, name: str, dialect: Dialect) -> None:
        error = None
        try:
            dialect.health()
        except BackendError as failure:
            error = str(failure)
        except Exception:  # a defect of one dialect must not hide the health of the others
            log.exception("health failed consumer=%s", name)
            error = "gpumgr failed to ask; its log has the traceback"
        with self.state.lock:
            self.state.note_health(name, error)

    def _look_at_work(self, name: str, dialect: Dialect) -> None:
        try:
            ask_busy(self.state, name, dialect)
        except Exception:
            log.exception("busy failed consumer=%s", name)
            with self.state.lock:
                self.state.memory[name].busy_asked = self.clock.monotonic()

    def _health_due(self, name: str) -> bool:
        checked = self.state.memory[name].checked
        each = HEALTH_IN_USE_EACH_SECONDS if self.state.queue.holds_of(name) else HEALTH_EACH_SECONDS
        return checked is None or self.clock.monotonic() - checked >= each

    def _busy_due(self, name: str, at_most_seconds: float) -> bool:
        """A tail is looked at a moment after the holder's end: callers that come one after the other have none."""
        remembered = self.state.memory[name]
        if not self.state.may_ask_busy(name):
            return False
        each = TAIL_EACH_SECONDS if remembered.tail or remembered.busy else at_most_seconds
        instants = [at for at in (remembered.busy_asked, remembered.last_used) if at is not None]
        return not instants or self.clock.monotonic() - max(instants) >= each


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the broker is shutting down; ask again in a moment")
