"""One ticket's way from its turn to its grant. Runs on a preparation thread; the caller's thread only waits, or goes
through steps 2, 3 and 5 itself where nothing else is needed (``at_once``).

Owns: the order of the steps and putting the lock down for each. Must not: choose (core/placement.py does).

    1. health    the target serves: a success at most 5 s old counts, so that this is asked again after a long step or
                 wait (not before the load where loading starts the service, nor where the card cannot be read: then
                 that is the answer)
    2. look      read the card; ask those whose memory the driver does not tell, and those who may be computing without
                 a holder, whether they are
    3. decide    under the lock, from what was just read
         gone    nobody waits any more: looked at just before the decision, so that no grant is for nobody
         unload  whoever was not asked just now whether it is busy: back to 2, to ask
                 victims leave service under the lock, lock down, unload with proof, back to 2
         wait    for a holder's end, for a tail's, or for the card to change, with the turn kept, back to 2
         refuse  the error is the answer
         fits    4. load, where the dialect has a call for it and it is not loaded; health again; back to 2
                 5. grant: ``granting`` under the lock, written to the store with the lock down, then live

A ticket that has its answer already (deadline, shutdown) ends the preparation after the running step.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from gpumgr.core.card import GpuProcess, Reading
from gpumgr.core.catalog import Consumer
from gpumgr.core.lease import Call, Lease
from gpumgr.core.placement import (
    Decision,
    Grant,
    Refuse,
    Report,
    Unload,
    Victim,
    View,
    Wait,
    decide,
    decide_call,
    decide_restore,
)
from gpumgr.core.queue import Phase, WaitingFor
from gpumgr.errors import ConsumerUnhealthy, GpumgrError, InsufficientVram, InternalError, StoreUnavailable
from gpumgr.runtime.evictor import Evictor
from gpumgr.runtime.ports import BackendError, Clock, Dialect, HolderProcesses, KeptLease, Probe, Store, StoreError
from gpumgr.runtime.refusals import scheduler_timeout
from gpumgr.runtime.state import State
from gpumgr.runtime.ticket import Ticket

log = logging.getLogger(__name__)

HEALTH_COUNTS_SECONDS = 5.0
AT_ONCE_SECONDS = 0.2
"""How long a caller's own thread waits for the card: it does not see meanwhile that its caller hangs up."""
WRITING = "writing the grant down"
LOOK_AGAIN_SECONDS = 0.5
"""How often a card is read for a ticket that waits for memory nobody announces, and busy consumers are asked."""


class Step(Enum):
    """What a preparation does next: look again at once, look again later, or nothing."""

    AGAIN = "again"
    WAIT = "wait"
    DONE = "done"


class _Gone(Exception):
    """The ticket has its answer: there is nobody to prepare for."""


@dataclasses.dataclass(frozen=True)
class World:
    """What a preparation may touch outside the lock."""

    probe: Probe
    dialects: Mapping[str, Dialect]
    evictor: Evictor
    store: Store
    clock: Clock
    holder_processes: HolderProcesses


class Preparation:
    def __init__(self, state: State, world: World, ticket: Ticket) -> None:
        self._waited = 0.0
        self._state = state
        self._world = world
        self._ticket = ticket
        self._target = ticket.consumer
        self._dialect = world.dialects[ticket.consumer.name]
        self._seen = -1
        self._settled = False
        self._loaded = False
        self._load_called = False
        self._serves = False
        """Its service runs although nobody loaded it for this ticket: its health is asked after all."""
        self._says_unloaded = False
        """Its own word at the last look: a server that sleeps keeps memory, and must be woken."""
        self._asks: set[str] = set()
        """Victims that must say whether they are busy, each time until this preparation unloads somebody."""
        self._said: dict[str, bool] = {}
        self._told_would = False
        self._wakes = False
        """On a thread of its own, so that somebody else is woken by the grant."""

    def run(self) -> None:
        """To the grant, to a refusal, or to nothing where nobody waits any more. Never raises."""
        self._wakes = True
        while (outcome := self.step()) is not Step.DONE:
            if outcome is Step.WAIT:
                with self._state.lock:
                    if self._ticket.outcome is None and self._seen == self._state.changes:
                        self._ticket.stirred.wait(LOOK_AGAIN_SECONDS)

    def step(self) -> Step:
        """One look at the world and what follows from it; blocks for as long as that takes. Never raises."""
        error: GpumgrError | None = None
        try:
            outcome = self._step()
        except _Gone:
            outcome = Step.DONE
        except GpumgrError as refusal:
            outcome, error = Step.DONE, refusal
        except Exception:
            log.exception("preparation failed consumer=%s", self._target.name)
            outcome, error = Step.DONE, InternalError("gpumgr failed while preparing; its log has the traceback")
        if outcome is Step.DONE:
            self._end(error)
        return outcome

    def at_once(self) -> bool:
        """On the thread that asks: the grant, where one look at the card is enough for it. False: nothing was done yet,
        and a preparation thread has to do it, as something must be asked, unloaded, loaded, waited for or refused.
        Never raises."""
        error: GpumgrError | None = None
        try:
            if not self._may_grant():
                return False
            self._grant()
        except _Gone:
            pass
        except GpumgrError as refusal:
            error = refusal
        except Exception:
            log.exception("grant failed consumer=%s", self._target.name)
            error = InternalError("gpumgr failed while granting; its log has the traceback")
        self._end(error)
        return True

    def _may_grant(self) -> bool:
        """Whether it is granted by what the card shows now; then it is decided."""
        state = self._state
        with state.lock:
            if not self._is_known():
                return False
            ends = state.ends
            self._ticket.step = "reading the card"
        reading = self._world.probe.read(AT_ONCE_SECONDS)
        self._require_caller()
        with state.lock:
            self._require_wanted()
            if ends != state.ends or reading.problems(self._target.gpus) or state.views.untold(self._target, reading):
                return False
            state.note_reading(reading)
            view = state.views.of(self._ticket, reading, {})
            decision = decision_for(self._ticket)(self._target, view)
            if not isinstance(decision, Grant):
                return False
            self._begin(decision, view, reading)
            return self._ticket.granting

    def _is_known(self) -> bool:
        """With the lock held: whether nobody has to be asked, and nothing else is told than a grant."""
        state = self._state
        return (
            state.store_error is None
            and state.restored
            and state.may_unload
            and self._is_healthy()
            and not self._dialect.can_load  # it must be asked whether it is loaded
            and not state.reading.problems(self._target.gpus)
            and not state.views.suspects(self._target)
        )

    def _end(self, error: GpumgrError | None) -> None:
        """Granted, or refused, or nobody waits any more. What is not granted frees its turn: in the same breath as the
        refusal, as whoever asks again must not meet its own old preparation; but after a load call only when the
        memory it may have brought is gone again, unless it is loaded and whoever goes next has asked for it."""
        if not isinstance(self._ticket.outcome, Lease):  # with a lease it went in the same write
            self._world.store.forget_intent(self._ticket.seq)
        with self._state.lock:
            if error is not None:
                self._state.refuse(self._ticket, error)
            if not self._load_called or (self._loaded and self._state.goes_next(self._target.name)):
                self._state.abandon(self._ticket)
                return
            granted = isinstance(self._ticket.outcome, Lease | Call)
        if not granted:
            uses, busy = self._undo_load()
            with self._state.lock:
                self._state.abandon(self._ticket)
                if busy:  # what it still takes stays promised
                    self._state.note_busy(self._target.name, uses, busy, None)

    def _step(self) -> Step:
        with self._state.lock:
            if not self._ticket.proxied or not self._state.restored:  # an earlier life's leases may not be known yet
                require_store(self._state)
            unreadable = bool(self._state.reading.problems(self._target.gpus))
        believing = self._ticket.proxied or self._state.believes
        runs = self._load_called or self._serves or not self._dialect.load_starts_service
        if (believing or not unreadable) and runs:
            self._require_health()
        ends, reading, reports = self._look()
        if unreadable and not reading.problems(self._target.gpus):
            return Step.AGAIN  # the driver is back: now its health comes first
        self._require_caller()
        with self._state.lock:
            self._require_wanted()
            if ends != self._state.ends:
                return Step.AGAIN  # whoever ended may have taken its memory after the card was read
            decision = self._decide(reading, reports)
        if isinstance(decision, Refuse):
            raise decision.error
        if isinstance(decision, Wait):
            return Step.WAIT
        if decision is None:
            return Step.AGAIN
        if isinstance(decision, Unload):
            self._unload(decision.consumers, reading, reports)
        elif self._must_load():
            self._load()
        else:
            self._grant()
            return Step.DONE
        return Step.AGAIN

    def _decide(self, reading: Reading, reports: Mapping[str, Report]) -> Decision | None:
        """3, with the lock held: what follows from the decision begins before the lock is put down. None: somebody must
        be asked first whether it is busy."""
        state = self._state
        self._target = self._ticket.consumer = state.catalog.consumers[self._target.name]
        if self._ticket.waiting_for is not None and self._world.clock.monotonic() >= self._ticket.deadline:
            raise scheduler_timeout(state, self._ticket)
        state.note_reading(reading)
        self._seen = state.changes
        view = state.views.of(self._ticket, reading, reports, (name for name, busy in self._said.items() if busy))
        decision = decision_for(self._ticket)(self._target, view)
        if isinstance(decision, Unload) and not self._asked(decision.consumers):
            return None
        if isinstance(decision, Grant) and self._must_ask_health(view):
            return None
        if self._may_still_fall(decision):
            return Wait("vram")
        if not view.may_unload and not isinstance(decision, Wait) and not self._told_would:
            self._told_would = True
            would = decision_for(self._ticket)(self._target, dataclasses.replace(view, may_unload=True))
            state.note_would_evict(self._ticket, would)
        if isinstance(decision, Wait):
            self._wait_inside(decision)
        else:
            self._begin(decision, view, reading)
        return decision

    def _begin(self, decision: Grant | Unload | Refuse, view: View, reading: Reading) -> None:
        """What must be so before the lock is put down."""
        state = self._state
        if self._ticket.waiting_for is not None:
            state.prepare_anew(self._ticket)
        if isinstance(decision, Unload):
            self._asks.clear()
            for name in decision.consumers:
                state.queue.take_out(name)
            self._ticket.step = f"unloading {', '.join(decision.consumers)}"
        elif isinstance(decision, Grant):
            held = [view.held(self._target.name, gpu) for gpu in self._target.gpus]
            self._loaded = self._loaded or self._is_loaded(view)
            if not self._must_load():
                comes = not self._load_called and all(each.exact and each.resident is False for each in held)
                state.note_granting(self._ticket, holds_mib=sum(each.held_mib for each in held) if comes else None)
                self._ticket.granting = True
                self._ticket.step = WRITING
                state.queue.holds[self._ticket.seq].phase = Phase.GRANTING
                self._warn(decision, reading)

    def _is_loaded(self, view: View) -> bool:
        on_card = all(view.held(self._target.name, gpu).resident for gpu in self._target.gpus)
        return on_card and not self._says_unloaded

    def _must_ask_health(self, view: View) -> bool:
        """Where loading starts the service, nobody has asked yet whether one that runs already serves."""
        if self._load_called or self._serves or not self._dialect.load_starts_service:
            return False
        self._serves = self._is_loaded(view)
        return self._serves

    def _may_still_fall(self, decision: Decision) -> bool:
        """What was unloaded is proved at its residual and may still be falling: look once more before it counts."""
        error = decision.error if isinstance(decision, Refuse) else None
        error = decision.despite if isinstance(decision, Grant) else error
        if not isinstance(error, InsufficientVram) or not self._ticket.tried or self._settled:
            return False
        self._settled = True
        return True

    def _asked(self, victims: Sequence[str]) -> bool:
        """Whether each of them has said just now that it is idle, or has no way to say so. Those that have not are
        asked with the next look."""
        memory = self._state.memory
        missing = {
            name
            for name in victims
            if name not in self._said and memory[name].reports_busy and not memory[name].outlasted
        }
        self._asks |= missing
        return not missing

    def _warn(self, grant: Grant, reading: Reading) -> None:
        """Of a grant that nothing has proved."""
        name = self._target.name
        if grant.despite is not None:
            facts = {"code": grant.despite.code, "reason": grant.despite.message}
            self._state.note("proxy_over_budget", name, **facts)
            log.warning("proxy_over_budget consumer=%s code=%s: %s", name, grant.despite.code, grant.despite)
        if self._state.views.believing(self._ticket, reading):
            said = "; ".join(reading.problems(self._target.gpus))
            log.warning("grant on declared sizes consumer=%s: %s", name, said)

    def _wait_inside(self, decision: Wait) -> None:
        if decision.reason == "vram":
            names = [name for name in decision.consumers if name != self._target.name]
            who = (
                ", ".join(names + _programs(self._state.views.lingerers(self._target.name, self._ticket))) or "holders"
            )
            self._ticket.step = f"waiting for {decision.short_mib} MiB that {who} use or were promised"
            self._state.wait_inside(self._ticket, WaitingFor.VRAM)
        elif decision.reason == "draining":
            self._ticket.step = f"waiting until {', '.join(self._drain_words(decision.consumers))}"
            self._state.wait_inside(self._ticket, WaitingFor.DRAINING)
        else:
            self._ticket.step = "waiting for an unload that another preparation began"

    def _drain_words(self, consumers: Sequence[str]) -> list[str]:
        state = self._state
        return [
            _drain(
                name, state.computing(name), state.memory[name].busy_error, state.views.lingerers(name, self._ticket)
            )
            for name in consumers
        ]

    def _require_caller(self) -> None:
        """Its callers may have hung up without anybody having seen it yet."""
        with self._state.lock:
            callers = list(self._ticket.callers)
        if not callers or any(not caller.gone and caller.here() for caller in callers):
            return  # without any, whoever asks has not begun to wait yet
        with self._state.lock:
            if self._ticket.callers == callers:
                self._state.withdraw(self._ticket)

    def _require_wanted(self) -> None:
        if self._ticket.outcome is not None:
            raise _Gone

    def _set_step(self, step: str) -> None:
        with self._state.lock:
            self._require_wanted()
            self._ticket.step = step

    # -- 1 --------------------------------------------------------------------------------------------------

    def _require_health(self) -> None:
        name = self._target.name
        with self._state.lock:
            self._require_wanted()
            if self._is_healthy():
                return
            self._ticket.step = f"asking {name} for its health"
        error = self._ask_health()
        if error is not None:
            raise unhealthy(name, error)

    def _is_healthy(self) -> bool:
        """With the lock held: whether it has said so just now."""
        known = self._state.memory[self._target.name]
        age = self._world.clock.monotonic() - (known.checked if known.checked is not None else float("-inf"))
        return bool(known.healthy) and age <= HEALTH_COUNTS_SECONDS

    def _ask_health(self) -> str | None:
        error = None
        try:
            self._dialect.health()
        except BackendError as failure:
            error = str(failure)
        with self._state.lock:
            self._state.note_health(self._target.name, error)
        return error

    # -- 2 --------------------------------------------------------------------------------------------------

    def _look(self) -> tuple[int, Reading, dict[str, Report]]:
        """How many holds had ended before the card was read, the reading, and the reports it needs."""
        with self._state.lock:
            self._require_wanted()
            ends = self._state.ends
            if self._ticket.waiting_for is None:
                self._ticket.step = "reading the card"
        reading = self._world.probe.read()
        with self._state.lock:
            self._require_wanted()
            self._state.note_reading(reading)
            names = self._state.views.untold(self._target, reading)
            asks = self._asks.union(self._state.views.suspects(self._target))
        reports = ask_reports(names, self._world.dialects)
        if self._dialect.can_load and not self._load_called:
            own = ask_reports([self._target.name], self._world.dialects).get(self._target.name)
            self._says_unloaded = own is not None and not own.loaded
        self._said = {}
        for name in sorted(asks):
            busy = ask_busy(self._state, name, self._world.dialects[name])
            if busy is not None:
                self._said[name] = busy
        return ends, reading, reports

    # -- 3 --------------------------------------------------------------------------------------------------

    def _unload(
        self, victims: Sequence[str], reading: Reading, reports: Mapping[str, Report], *, growing: bool = False
    ) -> None:
        """They were taken out of service under the lock that decided it; the evictor puts each one back."""
        state = self._state
        with state.lock:
            holdings = state.views.holdings(reading, reports)
            consumers = [state.catalog.consumers[name] for name in victims]
            believe = self._state.believes or self._ticket.proxied
        if not self._ticket.proxied:
            self._intend(victims)
        outcome = self._world.evictor.unload(
            consumers,
            holdings,
            reading,
            self._back_in_service,
            needed=self._target.gpus,
            growing=growing,
            believe=believe,
        )
        after = self._world.probe.read()
        with state.lock:
            for victim in outcome:
                own = victim.consumer == self._target.name  # undone, as somebody came who goes first
                state.note_victim(victim, after, wanted_back=own or not self._ticket.restoring)
            self._ticket.tried.extend(outcome)
        for victim in outcome:
            self._tell(victim)

    def _intend(self, victims: Sequence[str]) -> None:
        """Raises: StoreUnavailable; then nobody is unloaded for a lease that could not be granted."""
        try:
            self._world.store.intend(self._ticket.seq, self._target.name, victims)
        except StoreError as error:
            for name in victims:
                self._back_in_service(name)
            raise store_failed(self._state, error) from None

    def _back_in_service(self, name: str) -> None:
        with self._state.lock:
            self._state.queue.put_back(name)
            self._state.advance()

    def _tell(self, victim: Victim) -> None:
        if not victim.asked and victim.reason is None:
            return  # nobody knew that it held anything, and it does not
        facts = dataclasses.asdict(victim)
        consumer, reason, _ = facts.pop("consumer"), facts.pop("reason"), facts.pop("asked")
        if not facts["cause"]:
            del facts["cause"]
        del facts["returned_share"]
        if facts.pop("proved") is False and reason is None:
            facts["proof"] = "its own word: the card could not be read"
        facts["for"] = self._target.name
        if reason is not None:
            facts["reason"] = reason
        kind = "evict" if reason is None else "evict_failed"
        self._state.note(kind, consumer, **facts)
        log.info("%s consumer=%s %s", kind, consumer, " ".join(f"{k}={v}" for k, v in facts.items()))

    # -- 4 --------------------------------------------------------------------------------------------------

    def _must_load(self) -> bool:
        return (self._dialect.can_load or self._ticket.restoring) and not self._loaded

    def _load(self) -> None:
        name = self._target.name
        with self._state.lock:
            self._require_wanted()
            self._ticket.step = f"loading {name}"
            self._state.note_loading(name)
            self._state.note_load_called(name)
        self._load_called = True
        try:
            if self._ticket.restoring:
                self._dialect.restore()
            else:
                self._dialect.load()
        except BackendError as failure:
            raise ConsumerUnhealthy(
                f"{name} did not load ({failure}): look at its log", consumer=name, cause=str(failure)
            ) from failure
        self._loaded = True
        self._set_step(f"asking {name} for its health")
        error = self._ask_health()
        if error is not None:
            raise ConsumerUnhealthy(
                f"{name} was loaded and does not pass its health check ({error}): look at its log",
                consumer=name,
                cause=error,
            )

    def _undo_load(self) -> tuple[int, bool]:
        """Its load was asked for and nobody gets it: the server may still be loading. The promise stands until the
        card shows it gone; where that cannot be had, or somebody else uses it, the next preparation meets it as a
        resident. Answers after how many uses it was asked, and whether it computes for somebody."""
        with self._state.lock:
            remembered = self._state.memory[self._target.name]
            uses, asks = remembered.uses, remembered.reports_busy and not remembered.outlasted
        if asks and ask_busy(self._state, self._target.name, self._dialect):
            return uses, True
        reading = self._world.probe.read()
        with self._state.lock:
            if not self._state.may_undo_load(self._ticket):
                return uses, False
            self._ticket.step = f"unloading {self._target.name} again"
            self._state.queue.take_out(self._target.name)
        self._unload([self._target.name], reading, {}, growing=True)
        return uses, False

    # -- 5 --------------------------------------------------------------------------------------------------

    def grant(self) -> None:
        """Without a look: what is granted holds already. Never raises."""
        error: GpumgrError | None = None
        try:
            self._grant()
        except GpumgrError as refusal:
            error = refusal
        except Exception:
            log.exception("grant failed consumer=%s", self._target.name)
            error = InternalError("gpumgr failed while granting; its log has the traceback")
        self._end(error)

    def _grant(self) -> None:
        if self._ticket.proxied or self._ticket.restoring:
            self._let_go_ahead()
        else:
            self._write_down()

    def _let_go_ahead(self) -> None:
        """A call's end is its caller's or its consumer's doing: there is nothing to remember of it."""
        state, ticket = self._state, self._ticket
        with state.lock:
            now = self._world.clock.monotonic()
            waited = state.waited(ticket)
            call = Call(ticket.seq, self._target.name, now, waited_seconds=waited, restoring=ticket.restoring)
            state.calls[call.seq] = call
            state.queue.holds[call.seq].phase = Phase.LIVE
            if not ticket.restoring:
                state.count_request(call.consumer)
            state.settle(ticket, call)
            state.advance()

    def _write_down(self) -> None:
        """The grant is decided and excludes others already; it is told when the store has it.

        Raises: StoreUnavailable.
        """
        state, ticket, world = self._state, self._ticket, self._world
        with state.lock:
            self._waited = state.waited(ticket)
            lease = self._lease(state.leases.next_fence())
            kept = KeptLease(lease, self._target.vram_resident_mib, priority=ticket.entry.priority)
            event = state.event("grant", lease.consumer, **self._grant_facts(lease), **self._stamps(lease))
            state.count_request(lease.consumer)
            totals = state.take_totals()
        try:
            world.store.granted(kept, event, totals)
        except StoreError as error:
            with state.lock:
                state.dirty.update(totals)
                state.count_request(lease.consumer, -1)
            raise store_failed(state, error) from None
        state.events.append(event)
        if lease.process is not None:
            world.holder_processes.follow(lease.process, lease.consumer)
        with state.lock:
            live = state.publish(lease)
            state.queue.holds[ticket.seq].phase = Phase.LIVE
            state.settle(ticket, live)
            state.watch_from(live.expires_at)
            state.advance()
        if self._wakes:
            time.sleep(0)  # whoever was woken goes first: the interpreter changes threads by itself each 5 ms only
        log.info(
            "grant consumer=%s %s", lease.consumer, " ".join(f"{k}={v}" for k, v in self._grant_facts(lease).items())
        )

    def _lease(self, fence: int) -> Lease:
        state, ticket, now = self._state, self._ticket, self._world.clock.monotonic()
        gpus = [state.reading.gpu(ref) or state.readable.get(ref) for ref in self._target.gpus]
        return Lease(
            lease_id=secrets.token_hex(5),
            token=secrets.token_urlsafe(24),
            consumer=self._target.name,
            holder=ticket.holder,
            gpus=tuple(gpu.index if gpu is not None else ref for gpu, ref in zip(gpus, self._target.gpus, strict=True)),
            gpu_uuids=tuple(gpu.uuid if gpu is not None else None for gpu in gpus),
            seq=ticket.seq,
            fence=fence,
            granted_at=now,
            ttl_seconds=ticket.ttl_seconds,
            expires_at=now + ticket.ttl_seconds,
            request=ticket.request,
            process=ticket.process,
        )

    def _grant_facts(self, lease: Lease) -> dict[str, Any]:
        """``arrival`` is its number in the queue of this life: it tells who came first."""
        resumes = self._ticket.resumes
        return {
            "lease_id": lease.lease_id,
            "holder": lease.holder,
            **({} if resumes is None else {"resumes": resumes}),
            "fence": lease.fence,
            "priority": self._ticket.entry.priority.value,
            "waited_seconds": self._waited,
            "arrival": lease.seq,
        }

    def _stamps(self, lease: Lease) -> dict[str, Any]:
        """For whoever compares the rows with what callers saw: which request it was, and from when until when the lease
        was written down, in seconds of CLOCK_BOOTTIME, which every process of the machine reads alike."""
        boot = lease.granted_at + self._world.clock.slept()
        return {
            "request_id": None if lease.request is None else lease.request.request_id,
            "granted_boot": round(boot, 6),
            "expires_boot": round(boot + lease.ttl_seconds, 6),
        }


def decision_for(ticket: Ticket) -> Callable[[Consumer, View], Decision]:
    """The rules that hold for what it asks for."""
    return decide_restore if ticket.restoring else decide_call if ticket.proxied else decide


def unhealthy(name: str, error: str) -> ConsumerUnhealthy:
    """It does not serve, and nothing was done for it."""
    return ConsumerUnhealthy(
        f"{name} does not pass its health check ({error}): nobody was unloaded for it. Start or repair it",
        consumer=name,
        cause=error,
    )


def require_store(state: State) -> None:
    """With the lock held. Raises: StoreUnavailable."""
    if state.store_error is not None:
        raise store_unavailable(state.store_error)


def store_failed(state: State, error: StoreError) -> StoreUnavailable:
    """It is remembered until something can be written again."""
    with state.lock:
        state.store_error = str(error)
    log.error("store_unavailable %s", error)
    return store_unavailable(str(error))


def store_unavailable(why: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"no lease can be granted: {why}. Live leases go on; make room on that disk or repair it, and grants come back "
        "by themselves",
        cause=why,
    )


def ask_busy(state: State, name: str, dialect: Dialect) -> bool | None:
    """Whether this consumer computes now; None: it has no such report. A report that hangs, or that cannot be
    understood, counts as busy; a machine that says nobody listens there cannot compute."""
    with state.lock:
        uses = state.memory[name].uses
    busy: bool | None
    error = None
    try:
        busy = dialect.busy()
    except BackendError as failure:
        busy = not failure.refused
        error = None if failure.refused else str(failure)
    with state.lock:
        state.note_busy(name, uses, busy, error)
    return busy


def _drain(name: str, work: str | None, error: str | None, left: Sequence[GpuProcess]) -> str:
    if error is not None:
        return f"{name} says whether it is busy ({error})"
    if left:
        return f"{', '.join(_programs(left))} of {name} has ended: nobody may unload it"
    words = {"tail": "has ended what its last holder began", "direct": "has ended what somebody gave it without gpumgr"}
    return f"{name} {words.get(work or '', 'is idle')}"


def _programs(processes: Sequence[GpuProcess]) -> list[str]:
    return [f"{process.name} (pid {process.pid})" for process in processes]


def ask_reports(names: list[str], dialects: Mapping[str, Dialect]) -> dict[str, Report]:
    """Their own word on what they hold. One that does not run holds nothing; of one that fails nothing is known."""
    reports = {}
    for name in names:
        try:
            report = dialects[name].loaded()
        except BackendError as error:
            report = Report(loaded=False, used_mib=0) if error.refused else None
        if report is not None:
            reports[name] = report
    return reports
