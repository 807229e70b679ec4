"""The broker: acquire, renew, release, and the threads that keep its promises.

Owns: waiting for an answer, and starting and stopping the threads. Must not: know HTTP, or hold the lock across
I/O. All state is in state.py, all rules in core.

Threads: ``watchdog`` (ends leases, and lets go whose turn comes with time alone), one ``prepare-N`` per GPU,
``observe-card`` and ``observe-servers`` (so that neither a hung driver nor a hung server can delay the watchdog),
``keep-store`` (so that no disk can), one ``quarantine-NAME`` per lease in quarantine, and the evictor's ``unload-NAME``
for one call each.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from gpumgr import __version__
from gpumgr.config import SchedulingSettings, Settings
from gpumgr.core.catalog import Consumer
from gpumgr.core.lease import Call, EndReason, HolderProcess, Lease, Renewed, RequestKey, require_same
from gpumgr.core.outside import Outside
from gpumgr.core.placement import impossible, insufficient, keeps_out
from gpumgr.core.quantum import Quantum
from gpumgr.core.queue import Fifo, Phase, Policy, Priority
from gpumgr.errors import (
    GpumgrError,
    InternalError,
    InvalidRequest,
    LeaseMismatch,
    LeaseUnknown,
    Refused,
    RequestEnded,
    ShuttingDown,
)
from gpumgr.runtime.evictor import Evictor
from gpumgr.runtime.explain import Explainer
from gpumgr.runtime.following import Follower
from gpumgr.runtime.housekeeping import Housekeeping
from gpumgr.runtime.outsiders import Outsiders
from gpumgr.runtime.ports import (
    BackendError,
    Clock,
    Dialect,
    GameWatch,
    HolderProcesses,
    Kept,
    Probe,
    Store,
    StoreError,
)
from gpumgr.runtime.preparation import Preparation, World, ask_busy, store_failed, store_unavailable
from gpumgr.runtime.quarantine import Watchman
from gpumgr.runtime.refusals import prepare_timeout, scheduler_timeout
from gpumgr.runtime.state import Quarantine, State
from gpumgr.runtime.ticket import Ask, Caller, Ticket
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
STORE_AGAIN_SECONDS = 1.0
RESTORES = "gpumgr, to bring it back"
END_SECONDS = 5.0
"""How long somebody who asks for a lease waits for its end to be written down."""
KEEP_TOGETHER_SECONDS = 0.05
"""Events and totals of this long are written in one go."""


EVENT_OF = {EndReason.RELEASED: "release", EndReason.EXPIRED: "expire", EndReason.REVOKED: "revoke"}


class Broker:
    """Nothing starts in the constructor; ``start`` begins the threads, ``stop`` ends every wait."""

    def __init__(
        self,
        settings: Settings,
        probe: Probe,
        dialects: Mapping[str, Dialect],
        clock: Clock,
        store: Store,
        pause: Callable[[float], None] = time.sleep,
        *,
        games: GameWatch | None = None,
        holder_processes: HolderProcesses | None = None,
    ) -> None:
        """``holder_processes`` None: no holder may name its process."""
        self.settings = settings
        self.clock = clock
        self.store = store
        mode = settings.scheduling.mode
        self._lets_pass = mode == "passthrough"
        self.state = State(
            settings.catalog,
            order_of(settings.scheduling),
            settings.lease,
            settings.gpu.headroom_mib,
            clock,
            may_unload=mode == "evicting",
            believes=settings.gpu.when_unreadable == "declared",
            outside=Outside(
                peak_seconds=settings.gpu.untracked_peak_seconds,
                reserve_mib=settings.gpu.yield_reserve_mib,
                yields=settings.gpu.yield_gpus,
            ),
        )
        self._glance = False
        self._looks_at_tails = False
        """The observer looks again soon by itself."""
        self.started_at: datetime | None = None
        self._probe = probe
        self._dialects = dialects
        evictor = Evictor(probe, dialects, clock, pause)
        self._holder_processes = holder_processes or _NoProcesses()
        self._world = World(probe, dialects, evictor, store, clock, self._holder_processes)
        self._pause = pause
        self._watchman = Watchman(self.state, dialects, clock, settings.lease.quarantine_seconds)
        self._keeper = Rounds("keep-store", self.keep_store)
        self._idle: list[str] = []
        """Leases whose quarantine is over, to be written down."""
        self._workers: list[threading.Thread] = []
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._card = Rounds("observe-card", self.observe_card)
        self._servers = Rounds("observe-servers", self._observe_servers)
        self.follower = Follower(self.state, dialects, clock, self.end_call, self._servers.nudge)
        self._card_read = threading.Condition(self.state.lock)
        self.outsiders = Outsiders(self.state, store, clock, games, self._outside_changed)
        self._games = Rounds("watch-games", self.outsiders.look_for_games) if games is not None else None
        self.housekeeping = Housekeeping(
            self.state,
            probe,
            dialects,
            evictor,
            clock,
            {} if self._lets_pass else settings.rest,  # there nobody is prepared, and so nobody loaded
            bring_back=self._bring_back,
        )
        self._housekeeper = Rounds("housekeeping", self.housekeeping.round)
        self.explainer = Explainer(
            self.state,
            probe,
            dialects,
            clock,
            lets_pass=self._lets_pass,
            refusal_at_once=self._refusal_at_once,
            named_process=self._named_process,
            wait_seconds=self._wait_seconds,
            priority=self._priority,
            stopping=_shutting_down,
        )

    # -- start and stop -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring back the leases of an earlier life, and start the threads; returns after the first reading of the card,
        which resolves UUIDs and warns of consumers that can never fit, or without it where the driver hangs."""
        self.started_at = self.clock.utc()
        self.state.on_event = self._note_down
        self.state.on_load, self.state.on_learned = self._card.nudge, self._keeper.nudge
        self._restore()
        self._keeper.start()
        self._card.start()
        self.fresh_card(FIRST_READING_SECONDS)
        self._warn_of_misfits()
        for number, _ in enumerate(self.state.catalog.gpus):
            worker = threading.Thread(target=self._prepare_for_ever, name=f"prepare-{number}", daemon=True)
            self._workers.append(worker)
            worker.start()
        self._watchdog.start()
        self._servers.start()
        self._housekeeper.start()
        if self._games is not None:
            self._games.start()
        for quarantine in list(self.state.quarantines.values()):
            self._begin_quarantine(quarantine)
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
        for rounds in self._rounds():
            rounds.stop()
        self.state.note("stop", None)
        self._keeper.stop()
        self._watchman.stop()
        log.info("stop")

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Stop, wait for the threads as long as given, and put the probe down."""
        self.stop()
        for thread in [*self._workers, self._watchdog]:
            if thread.is_alive():
                thread.join(timeout_seconds)
        for rounds in (*self._rounds(), self._keeper):
            rounds.join(timeout_seconds)
        self.keep_store()
        self.store.close()
        self._probe.close()

    def _rounds(self) -> list[Rounds]:
        """Those that look at the world."""
        games = [] if self._games is None else [self._games]
        return [self._card, self._servers, self._housekeeper, *games]

    def _outside_changed(self) -> None:
        self._housekeeper.nudge()

    def missing(self) -> list[str]:
        """What keeps the broker from granting now; empty: it is ready."""
        with self.state.lock:
            if self.state.stopping:
                return ["the broker is shutting down"]
            if self.started_at is None:
                return ["the broker has not started yet"]
            if self.state.store_error is not None:
                return [self.state.store_error]
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
                view = self.state.views.bare()
                if not view.reading.problems(consumer.gpus) and impossible(consumer, view):
                    log.warning("%s", insufficient(consumer, view).message)

    # -- other lives ----------------------------------------------------------------------------------------

    def _restore(self) -> None:
        try:
            kept = self.store.open()
        except StoreError as error:
            store_failed(self.state, error)
            return
        self._take_up(kept)
        live = len(self.state.leases)
        log.info("restored leases=%s fence=%s rebooted=%s", live, kept.fence, len(kept.rebooted))
        for name in kept.evicting:
            log.warning(
                "it was being unloaded when the last process ended; what came of it the card tells consumer=%s", name
            )

    def _take_up(self, kept: Kept) -> None:
        with self.state.lock:
            self.state.restore(kept)
            if kept.pause is not None and self.state.outside.pause is None:
                self.outsiders.restore(kept.pause)
            known = set(self.state.catalog.consumers)
        for process, consumer in kept.holders:
            if consumer in known:
                self._holder_processes.follow(process, consumer)

    def _note_down(self, event: dict[str, Any]) -> None:
        self.store.note(event)
        self._keeper.nudge()

    def keep_store(self) -> float:
        """Write what waits for it, or find out whether the store works again; the seconds until the next look."""
        if self.state.store_error is not None:
            return self._try_store()
        if not self.state.stopping:
            self._pause(KEEP_TOGETHER_SECONDS)
        with self.state.lock:
            totals, idle, learned = self.state.take_totals(), list(self._idle), self.state.ledger.take()
        try:
            self.store.keep(totals, idle, learned)
        except StoreError as error:
            with self.state.lock:
                self.state.dirty.update(totals)
                self.state.ledger.give_back(learned)
            store_failed(self.state, error)
            return STORE_AGAIN_SECONDS
        with self.state.lock:
            self._idle = [lease_id for lease_id in self._idle if lease_id not in idle]
        return HEALTH_EACH_SECONDS

    def _try_store(self) -> float:
        """A success brings back what could not be read at the start."""
        try:
            if self.state.restored:
                self.store.try_again()
            else:
                self._take_up(self.store.open())
                for quarantine in list(self.state.quarantines.values()):
                    self._begin_quarantine(quarantine)
        except StoreError as error:
            with self.state.lock:
                self.state.store_error = str(error)
            return STORE_AGAIN_SECONDS
        with self.state.lock:
            self.state.store_error = None
            self.state.advance()
        log.info("the store works again")
        return 0.0

    # -- acquire --------------------------------------------------------------------------------------------

    def acquire(self, ask: Ask, caller: Caller | None = None) -> Lease:
        """Blocks until granted or refused: at most ``wait_seconds`` + ``lease.max_prepare_seconds``.

        Raises: KindUnknown, ConsumerUnknown, RequestMismatch, RequestEnded (also where the caller has gone), and every
        kind of Refused.
        """
        granted = self._granted(ask, caller or Caller(), proxied=False)
        if not isinstance(granted, Lease):
            raise InternalError("gpumgr granted a call to somebody who asked for a lease")
        return granted

    def _granted(self, ask: Ask, caller: Caller, *, proxied: bool) -> Lease | Call:
        self.tick()
        process = self._named_process(ask.holder_pid)
        here = ask.request is None or caller.here()
        with self.state.lock:
            now = self.clock.monotonic()
            consumer = self.state.catalog.resolve(kind=ask.kind, consumer=ask.consumer)
            if ask.request is not None:
                self._require_restored()
                live = self.state.leases.of_request(ask.request, consumer.name, now)
                if live is not None:
                    if not here:
                        raise _hung_up()
                    self.state.leases.confirm(live.token)
                    return live
            deadline = now + self._wait_seconds(ask)
            ticket = self._ticket(ask, consumer, now, deadline, proxied=proxied)
            begins = not ticket.callers and ticket.preparing
            ticket.process = ticket.process or process
            ticket.callers.append(caller)  # in the same breath: whoever joins must not be its only one
            caller.ticket = ticket
            passes = self._lets_pass and self.state.queue.is_waiting(ticket.entry)
            if passes:
                self.state.let_pass(ticket)
        if passes:
            Preparation(self.state, self._world, ticket).grant()
        elif begins:
            self._prepare(ticket)
        if ticket.outcome is None:
            caller.begin_wait()
        with self.state.lock:
            granted = self._await(ticket, deadline, caller)
        return self._taken(ticket, granted, caller)

    def _prepare(self, ticket: Ticket) -> None:
        """By the thread that asks, where nothing has to be waited for: two hand-overs between threads less."""
        if not Preparation(self.state, self._world, ticket).at_once():
            with self.state.lock:
                self.state.hand_over(ticket)

    def _named_process(self, pid: int | None) -> HolderProcess | None:
        """Raises: InvalidRequest where there is no such process."""
        if pid is None:
            return None
        started = self._holder_processes.started(pid)
        if started is None:
            raise InvalidRequest(
                f"holder_pid {pid} is no process of this machine that a holder can be. In a container, or on another "
                "machine, leave holder_pid out: what the process takes is then untracked",
                field="holder_pid",
            )
        return HolderProcess(pid, started)

    def _require_restored(self) -> None:
        """Whatever is unknown now may be in the store that cannot be read. Raises: StoreUnavailable."""
        if not self.state.restored and self.state.store_error is not None:
            raise store_unavailable(self.state.store_error)

    def _taken(self, ticket: Ticket, granted: Lease | Call, caller: Caller) -> Lease | Call:
        """The last look at a caller before it is told. Raises: RequestEnded where it has gone."""
        here = caller.here()
        with self.state.lock:
            ticket.callers.remove(caller)
            if here and not caller.gone:
                ticket.answered = True
                if isinstance(granted, Lease):
                    self.state.leases.confirm(granted.token)
                return granted
            nobody = not ticket.answered and all(other.gone for other in ticket.callers)
        if nobody and isinstance(granted, Call):
            self.end_call(granted)
        elif nobody and isinstance(granted, Lease):
            self._doubt(granted)
        raise _hung_up()

    def _doubt(self, lease: Lease) -> None:
        """Granted, and nobody was there to be told. Who can ask again for it has a moment to do so."""
        seconds = self.settings.lease.confirm_seconds
        with self.state.lock:
            if self.state.leases.is_told(lease.token):
                return
            if lease.request is not None and seconds:
                until = self.clock.monotonic() + seconds
                self.state.leases.doubt(lease.token, until)
                self.state.watch_from(until)
                return
            self._begin_end(lease)
        self._finish_end(lease, EndReason.RELEASED, reason="unclaimed")

    def hang_up(self, caller: Caller) -> None:
        """Its connection has ended. Quick: it may be called by a thread that all callers share."""
        with self.state.lock:
            caller.gone = True
            if caller.ticket is not None:
                caller.ticket.woken.notify_all()

    def withdraw(self, request: RequestKey) -> str | None:
        """Give up a waiting request (``withdrawn``), or release the lease it has (``released``); None: neither."""
        with self.state.lock:
            self._require_restored()
            ticket = self.state.by_request.get(request)
            if ticket is not None and not ticket.granting:
                self.state.withdraw(ticket)
                return "withdrawn"
            lease = self.state.leases.holder_of(request, self.clock.monotonic())
        if lease is None and ticket is not None:
            lease = self._granting(ticket)
        return "released" if lease is not None and self.release(lease.token, request.bearer) else None

    def _granting(self, ticket: Ticket) -> Lease | None:
        """What comes of a grant that is being written down. Raises: StoreUnavailable where that takes too long."""
        until = self.clock.monotonic() + END_SECONDS
        with self.state.lock:
            while ticket.outcome is None:
                left = until - self.clock.monotonic()
                if left <= 0:
                    raise store_unavailable("the grant of this request is not written down yet")
                ticket.woken.wait(left)
        return ticket.outcome if isinstance(ticket.outcome, Lease) else None

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
        refusal = self._refusal_at_once(consumer)
        if refusal is not None and ask.restoring:
            raise refusal
        if refusal is not None:
            self.state.note("refuse", consumer.name, holder=ask.holder, code=refusal.code, waited_seconds=0.0)
            log.info("refuse consumer=%s holder=%s code=%s: %s", consumer.name, ask.holder, refusal.code, refusal)
            raise refusal
        if not ask.restoring:
            self.state.make_way(consumer)
        ticket = self.state.enter(ask, consumer, now, deadline, proxied=proxied, priority=self._priority(ask))
        if not self._lets_pass:
            self.state.advance(now, own=ticket)
        return ticket

    def _priority(self, ask: Ask) -> Priority:
        return ask.priority or self.settings.priorities.get(ask.kind or "", Priority.NORMAL)

    def _refusal_at_once(self, consumer: Consumer) -> Refused | None:
        """What no waiting would mend. An operator's hold counts in every mode."""
        view = self.state.views.bare()
        kept_out = keeps_out(consumer, view)
        if self._lets_pass:
            return kept_out if view.outside.paused(view.now) else None
        if kept_out is not None or view.reading.problems(consumer.gpus) or not impossible(consumer, view):
            return kept_out
        return insufficient(consumer, view)

    def _await(self, ticket: Ticket, deadline: float, caller: Caller) -> Lease | Call:
        """With the lock held, as in every condition's wait. The request goes with its last caller, who counts until it
        has taken what it was granted."""
        granted = False
        try:
            while ticket.outcome is None:
                if caller.gone and not ticket.granting:
                    if all(other.gone for other in ticket.callers):
                        self.state.withdraw(ticket)
                    raise _hung_up()
                limit = ticket.limit(deadline)
                left = None if limit is None else limit - self.clock.monotonic()
                if left is not None and left <= 0:
                    raise self._give_up(ticket)
                ticket.woken.wait(left)
            granted = not isinstance(ticket.outcome, GpumgrError)
        finally:
            if not granted:
                ticket.callers.remove(caller)
            caller.ticket = None
        if isinstance(ticket.outcome, GpumgrError):
            raise ticket.outcome
        return ticket.outcome

    def _give_up(self, ticket: Ticket) -> GpumgrError:
        """This caller's time is over. The request goes with its last caller."""
        make = prepare_timeout if ticket.preparing else scheduler_timeout
        error = make(self.state, ticket)
        if len(ticket.callers) == 1:
            self.state.refuse(ticket, error)
            self.state.advance()
        return error

    # -- proxied calls --------------------------------------------------------------------------------------

    def call(self, ask: Ask, caller: Caller | None = None) -> Call:
        """Blocks until the call may go to its consumer, or is refused: as ``acquire``, and ends with ``end_call``.

        Raises: KindUnknown, ConsumerUnknown, and every kind of Refused but InsufficientVram for what an eviction or
        another's end could mend: such a call goes ahead, unless a live lease shares the card.
        """
        granted = self._granted(ask, caller or Caller(), proxied=True)
        if not isinstance(granted, Call):
            raise InternalError("gpumgr granted a lease to a proxied call")
        return granted

    def call_under_lease(self, token: str, kind: str) -> Call:
        """Passes at once; ends with ``end_call``. Raises: KindUnknown, LeaseUnknown, LeaseMismatch."""
        with self._told_once(token), self.state.lock:
            now = self.clock.monotonic()
            consumer = self.state.catalog.resolve(kind=kind, consumer=None)
            lease = self._live(token)
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
        """The call is over, however it ended; where its work is followed, it ends with that. Nothing happens the second
        time."""
        with self.state.lock:
            if call.seq in self.state.followed or self.state.calls.pop(call.seq, None) is None:
                return
            self.state.note_used(call.consumer, granted=call.lease_id is None and not call.restoring)
            look = self.state.memory[call.consumer].tail
            self.state.leave(call.seq, call.consumer, counts=not call.restoring)
            self.state.advance()
            held = round(self.clock.monotonic() - call.began_at, 3)
        if look and not self._looks_at_tails:
            self._servers.nudge()
        self._keeper.nudge()
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

    def _bring_back(self, name: str) -> GpumgrError | None:
        """Through the line, as a request that is nobody's; why it could not be, or None."""
        ask = Ask(consumer=name, wait_seconds=0.0, holder=RESTORES, restoring=True)
        try:
            call = self._granted(ask, Caller(), proxied=False)
        except GpumgrError as error:
            return error
        if isinstance(call, Call):
            self.end_call(call)
        return None

    # -- a lease's life -------------------------------------------------------------------------------------

    def lease(self, token: str) -> Lease:
        """Raises: LeaseUnknown, StoreUnavailable."""
        with self._told_once(token), self.state.lock:
            return self._live(token)

    def _live(self, token: str) -> Lease:
        """With the lock held."""
        self.state.note_sleep()
        try:
            return self.state.leases.get(token, self.clock.monotonic())
        except LeaseUnknown:
            self._require_restored()
            raise

    @contextmanager
    def _told_once(self, token: str) -> Iterator[None]:
        """Who is told that a lease is over is told so for good: its end is written down first, and no restart brings it
        back."""
        try:
            yield
        except LeaseUnknown:
            self.tick()
            self._await_end(token)
            raise

    def _await_end(self, token: str) -> None:
        """Somebody else may be writing its end down just now. Raises: StoreUnavailable where that takes too long."""
        until = self.clock.monotonic() + END_SECONDS
        with self.state.lock:
            while token in self.state.ending:
                left = until - self.clock.monotonic()
                if left <= 0:
                    raise store_unavailable("the end of this lease is not written down yet")
                self.state.ended.wait(left)

    def renew(self, token: str, ttl_seconds: float | None) -> Renewed:
        """The lease with a full TTL from now on, and what its holder should know.

        Raises: LeaseUnknown, StoreUnavailable.
        """
        ttl = None if ttl_seconds is None else self.settings.lease.clamp_ttl(ttl_seconds)
        with self._told_once(token), self.state.lock:
            self._live(token)
            lease = self.state.leases.renew(token, self.clock.monotonic(), ttl)
            self.state.watch_from(lease.expires_at)
            found = Renewed(
                lease,
                self.state.held_up_by(lease),
                self.state.memory[lease.consumer].healthy,
                self.state.asked_to_yield(lease),
                tuple(sorted(self.state.intruders_of(lease))),
            )
        if lease.ttl_seconds > lease.written_ttl_seconds:
            self._write_ttl(lease)
        return found

    def _write_ttl(self, lease: Lease) -> None:
        """Before its holder relies on it: a restart gives what is written. A broken disk ends no lease."""
        try:
            self.store.raised(lease)
        except StoreError as error:
            store_failed(self.state, error)  # it is owed from now on: the next renew need not try again
        with self.state.lock:
            self.state.leases.wrote(lease.token, lease.ttl_seconds)

    def release(self, token: str, bearer: str | None = None) -> bool:
        """Whether this call ended a live lease. The next one in line goes at once. ``bearer``: the name of whoever
        gives it back."""
        try:
            with self._told_once(token), self.state.lock:
                lease = self._live(token)
                self.state.note_yield(lease, bearer)
                self._begin_end(lease)
        except LeaseUnknown:
            return False
        self._finish_end(lease, EndReason.RELEASED)
        return True

    def revoke(self, lease_id: str, by: str | None, reason: str | None) -> None:
        """End somebody's lease by its public name; the event tells who did, and why. Raises: LeaseUnknown."""
        with self.state.lock:
            self._require_restored()
            lease = self.state.leases.named(lease_id, self.clock.monotonic())
            self._begin_end(lease, EndReason.REVOKED)
        self._finish_end(lease, EndReason.REVOKED, by=by, reason=reason)

    def tick(self) -> int:
        """End every lease whose time is over; how many there were. Whose turn comes with time alone goes. Called by the
        watchdog, and by whoever asks for a turn, so that a late watchdog delays nobody."""
        self.outsiders.end_what_is_over()
        with self.state.lock:
            self.state.note_sleep()
            now = self.clock.monotonic()
            over = [(lease, EndReason.EXPIRED) for lease in self.state.leases.expired(now)]
            for lease, reason in over:
                self._begin_end(lease, reason)
            unclaimed = [(lease, EndReason.RELEASED) for lease in self.state.leases.unclaimed(now)]
            for lease, reason in unclaimed:
                self._begin_end(lease, reason)
            self.state.advance_where_due(now)
        for lease, reason in [*over, *unclaimed]:
            try:
                self._finish_end(lease, reason, **({"reason": "unclaimed"} if reason is EndReason.RELEASED else {}))
            except Exception:  # one that cannot be ended must not keep the others
                log.exception("a lease could not be ended lease_id=%s", lease.lease_id)
        return len(over) + len(unclaimed)

    def _begin_end(self, lease: Lease, reason: EndReason = EndReason.RELEASED) -> None:
        """With the lock held: over for its holder, still excluding others until it is written down."""
        self.state.leases.end(lease, reason, self.clock.monotonic())
        self.state.ending.add(lease.token)
        self.state.queue.holds[lease.seq].phase = Phase.ENDING

    def _finish_end(self, lease: Lease, end: EndReason, /, **more: Any) -> None:
        """Written down before the next grant: where the disk fails, the store owes it, and grants nothing before."""
        facts = {
            "lease_id": lease.lease_id,
            "holder": lease.holder,
            "fence": lease.fence,
            "held_seconds": self.state.held(lease),
            **more,
        }
        event = self.state.event(EVENT_OF[end], lease.consumer, **facts)
        with self.state.lock:
            quarantined = end is not EndReason.RELEASED and self._may_still_compute(lease)
        try:
            self.store.ended(lease, end, event, quarantined=quarantined)
        except StoreError as error:
            store_failed(self.state, error)
        except Exception:  # a defect there must not keep the GPU
            log.exception("the end of a lease could not be written down lease_id=%s", lease.lease_id)
        with self.state.lock:
            self.state.ending.discard(lease.token)
            self.state.ended.notify_all()
        self.state.events.append(event)
        self._hand_over_process(lease)
        look = self._quarantined(lease) if quarantined else self._left(lease)
        if look and not self._looks_at_tails:
            self._servers.nudge()
        log.info("%s consumer=%s %s", event["type"], lease.consumer, " ".join(f"{k}={v}" for k, v in facts.items()))

    def _hand_over_process(self, lease: Lease) -> None:
        """One program may hold several leases: what it keeps is that one's which goes on."""
        with self.state.lock:
            going_on = [other.consumer for other in self.state.leases if other.process == lease.process]
        if lease.process is not None and going_on:
            self._holder_processes.follow(lease.process, going_on[-1])

    def _left(self, lease: Lease) -> bool:
        """Whether its consumer may have a tail."""
        with self.state.lock:
            self.state.note_used(lease.consumer)
            tail = self.state.memory[lease.consumer].tail
            self.state.leave(lease.seq, lease.consumer)
            self.state.advance()
        return tail

    # -- quarantine -----------------------------------------------------------------------------------------

    def _may_still_compute(self, lease: Lease) -> bool:
        """With the lock held. Not where somebody else holds its consumer too: whose work it does nobody could tell, and
        nobody will unload it."""
        consumer = self.state.catalog.consumers[lease.consumer]
        alone = len(self.state.queue.holds_of(lease.consumer)) == 1
        asks = self.state.memory[lease.consumer].reports_busy and not consumer.retired
        return alone and asks and not self._lets_pass and self.settings.lease.quarantine_seconds > 0

    def _quarantined(self, lease: Lease) -> bool:
        with self.state.lock:
            self.state.queue.holds[lease.seq].phase = Phase.QUARANTINE
            until = self.clock.monotonic() + self.settings.lease.quarantine_seconds
            quarantine = Quarantine(lease.lease_id, lease.consumer, lease.seq, until)
            self.state.quarantines[lease.seq] = quarantine
        self._begin_quarantine(quarantine)
        return False

    def _begin_quarantine(self, quarantine: Quarantine) -> None:
        try:
            self._watchman.watch(quarantine, self._end_quarantine)
        except RuntimeError:  # no thread to be had: better an eviction with proof than a GPU that nobody gets
            log.exception("a quarantine could not be watched lease_id=%s", quarantine.lease_id)
            self._end_quarantine(quarantine, idle=False)

    def _end_quarantine(self, quarantine: Quarantine, *, idle: bool) -> None:
        """``idle``: its consumer said so. Else its time is over, and the next eviction decides, without asking."""
        name = quarantine.consumer
        with self.state.lock:
            if self.state.quarantines.pop(quarantine.seq, None) is None:
                return
            self.state.note_used(name)
            self.state.memory[name].tail = False
            self.state.memory[name].outlasted = not idle
            self.state.leave(quarantine.seq, name)
            self._idle.append(quarantine.lease_id)
            self.state.advance()
        self._keeper.nudge()
        log.info("quarantine over consumer=%s lease_id=%s idle=%s", name, quarantine.lease_id, idle)

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
                soonest = self.state.next_instant()
                left = LONGEST_SLEEP_SECONDS if soonest is None else soonest - self.clock.monotonic()
                sleep = min(max(left, 0.0), LONGEST_SLEEP_SECONDS)
                self.state.watchdog_looks_at = self.clock.monotonic() + sleep
                self.state.expiry.wait(sleep)

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
        """Read the card for status, and to learn from it; the seconds until the next look."""
        reading = self._probe.read()
        with self.state.lock:
            self.state.note_reading(reading)
            self.state.ledger.warn()
            self._card_read.notify_all()
            return self.state.ledger.look_again_seconds(CARD_EACH_SECONDS, self.clock.monotonic())

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
        """Ask everyone whose health is old (leased ones sooner, as renew tells it to the holder), everyone who may be
        computing without a holder whether that is so, and between any two of them after the work that is followed."""
        at_most = BUSY_SHOWN_SECONDS if self._glance else BUSY_EACH_SECONDS
        self._glance = False
        for name, dialect in self._dialects.items():
            self.follower.look()
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
            self._looks_at_tails = working
        return self.follower.due_in(TAIL_EACH_SECONDS / 2 if working else HEALTH_IN_USE_EACH_SECONDS / 2)

    def _look_at_health(self, name: str, dialect: Dialect) -> None:
        error, stopped = None, False
        try:
            dialect.health()
        except BackendError as failure:
            error, stopped = str(failure), failure.stopped
        except Exception:  # a defect of one dialect must not hide the health of the others
            log.exception("health failed consumer=%s", name)
            error = "gpumgr failed to ask; its log has the traceback"
        with self.state.lock:
            if stopped and not self.state.queue.holds_of(name):
                self.state.note_stopped(name)
            else:
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


def order_of(scheduling: SchedulingSettings) -> Policy:
    """Where nothing is unloaded there are no swaps to save, and nobody waits for their sake."""
    if scheduling.policy == "fifo" or scheduling.mode != "evicting":
        return Fifo()
    return Quantum(scheduling.quantum_seconds)


class _NoProcesses:
    """Where nobody can tell processes."""

    def started(self, pid: int) -> int | None:  # noqa: ARG002
        return None

    def follow(self, process: HolderProcess, consumer: str) -> None:
        pass


def _hung_up() -> RequestEnded:
    """Nobody reads it, unless the connection ended in one direction only."""
    return RequestEnded("the caller hung up while it waited; its request is withdrawn", reason="withdrawn")


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the broker is shutting down; ask again in a moment")
