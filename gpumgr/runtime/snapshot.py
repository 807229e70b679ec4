"""What status shows: everything at one instant, as JSON-ready values.

Owns: the shape of ``GET /v1/status``. Must not: decide or wait; it takes the lock once and copies.
"""

from __future__ import annotations

from typing import Any

from gpumgr import __version__
from gpumgr.core.card import GpuReading
from gpumgr.core.catalog import Consumer, GpuRef
from gpumgr.core.lease import Lease
from gpumgr.core.ledger import Account, observed_figures, unload_figures, warnings_of
from gpumgr.core.outside import Stranger
from gpumgr.core.placement import Holding
from gpumgr.core.queue import Hold, Phase
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.outlook import Outlook
from gpumgr.runtime.state import State, rfc3339


def snapshot(broker: Broker) -> dict[str, Any]:
    state = broker.state
    with state.lock:
        now = broker.clock.monotonic()
        holdings = state.views.holdings(state.reading, {})
        promised = state.views.promised(state.in_use(), holdings, state.reading)
        waiting = Outlook(state, now)
        shown = {
            "version": __version__,
            "started_at": rfc3339(broker.started_at) if broker.started_at else None,
            "now": state.shown(now),
            "mode": broker.settings.scheduling.mode,
            "when_unreadable": broker.settings.gpu.when_unreadable,
            "store": {"ok": state.store_error is None, "error": state.store_error},
            "hold": _hold(state, now),
            "games": [{"pid": g.pid, "name": g.name, "since_at": g.since_at} for g in state.outside.games],
            "gpus": [_gpu(state, ref, promised.get(ref, 0)) for ref in _refs(state)],
            "consumers": [_consumer(broker, c, holdings) for c in state.catalog.consumers.values() if not c.retired],
            "leases": [_lease(state, lease, now) for lease in state.leases if lease.alive(now)],
            "queue": [],
            "events": list(state.events),
        }
    return shown | {"queue": waiting.rows()}


def hold_facts(broker: Broker) -> dict[str, Any]:
    """The operator's hold alone."""
    with broker.state.lock:
        return {"hold": _hold(broker.state, broker.clock.monotonic())}


def _hold(state: State, now: float) -> dict[str, Any] | None:
    """``state``: ``draining`` while somebody uses a GPU, ``unloading`` while somebody idle is on one, then ``free``."""
    pause = state.outside.paused(now)
    if pause is None:
        return None
    in_use = sorted(state.in_use())
    resident = sorted(name for name, remembered in state.memory.items() if remembered.resident_since is not None)
    return {
        "by": pause.by,
        "reason": pause.reason,
        "since_at": pause.since_at,
        "until_at": pause.until_at,
        "left_seconds": round(pause.until - now, 3),
        "state": "draining" if in_use else "unloading" if resident else "free",
        "in_use": in_use,
        "resident": resident,
    }


def _stranger(state: State, known: Stranger) -> dict[str, Any]:
    return {"pid": known.pid, "peak_mib": known.peak_mib, "since_at": state.shown(known.since)}


def _refs(state: State) -> list[GpuRef]:
    """The GPUs the driver shows, and those that consumers name and it does not."""
    shown: list[GpuRef] = [gpu.index for gpu in state.reading.gpus]
    return shown + [ref for ref in state.catalog.gpus if state.reading.gpu(ref) is None]


def _gpu(state: State, ref: GpuRef, promised_mib: int) -> dict[str, Any]:
    gpu = state.reading.gpu(ref) or GpuReading(
        index=ref if isinstance(ref, int) else -1, uuid=None, name="", total_mib=0, used_mib=0, free_mib=0, error=""
    )
    readable = gpu.readable
    facts: dict[str, Any] = {
        "index": ref if isinstance(ref, int) else None,
        "uuid": ref if isinstance(ref, str) else gpu.uuid,
        "name": gpu.name or None,
        "total_mib": gpu.total_mib if readable else None,
        "used_mib": gpu.used_mib if readable else None,
        "free_mib": gpu.free_mib if readable else None,
        "promised_mib": promised_mib,
        "readable": readable,
        "read_at": state.shown(state.reading.read_at) if state.reading.read_at > float("-inf") else None,
        "kept_mib": state.outside.kept_mib(gpu) if readable else None,
        "processes": [
            {"pid": p.pid, "name": p.name, "used_mib": p.used_mib, "consumer": p.consumer} for p in gpu.processes
        ],
        "untracked": [_stranger(state, s) for (i, _), s in state.outside.strangers.items() if i == gpu.index],
    }
    if not readable:
        facts["error"] = "; ".join(state.reading.problems([ref]))
    return facts


def _consumer(broker: Broker, consumer: Consumer, holdings: dict[tuple[str, GpuRef], Holding]) -> dict[str, Any]:
    state = broker.state
    memory = state.memory[consumer.name]
    held = [holdings[consumer.name, ref] for ref in consumer.gpus]
    return {
        "name": consumer.name,
        "kinds": state.catalog.kinds_of(consumer.name),
        "dialect": consumer.dialect,
        "url": consumer.url,
        "gpus": list(consumer.gpus),
        "vram_resident_mib": None if consumer.unsized else _mib(consumer.vram_resident_mib),
        "declared_mib": _mib(consumer.declared_mib if consumer.auto else consumer.vram_resident_mib),
        "auto": consumer.auto,
        "held_mib": sum(h.held_mib for h in held) if all(h.resident is not None for h in held) else None,
        "can_coexist_with": sorted(consumer.can_coexist_with),
        "coexist": "by_size" if consumer.by_size else "pairs",
        "pinned": consumer.pinned,
        "healthy": memory.healthy,
        "health_error": memory.health_error,
        "checked_at": rfc3339(memory.checked_at) if memory.checked_at else None,
        "resident": _any([h.resident for h in held]),
        "in_use": _in_use(state, consumer.name),
        "calls": _calls(state, consumer.name),
        "total_requests": memory.total_requests,
        "evictions": memory.evictions,
        "last_used_at": rfc3339(memory.last_used_at) if memory.last_used_at else None,
        **_learned(consumer, state.ledger.account(consumer.name)),
    }


def _mib(sizes: tuple[int, ...]) -> int | list[int] | None:
    """One number where all its GPUs have the same, None where there is none."""
    return None if not sizes else sizes[0] if len(set(sizes)) == 1 else list(sizes)


def _learned(consumer: Consumer, account: Account) -> dict[str, Any]:
    observed, unloads = observed_figures(consumer, account), unload_figures(account)
    return {
        "observed": None
        if observed is None
        else {
            "count": observed.count,
            "resident_mib": _mib(observed.resident_mib),
            "resident_p95_mib": _mib(observed.resident_p95_mib),
            "peak_mib": _mib(observed.peak_mib),
            "peak_p95_mib": _mib(observed.peak_p95_mib),
            "reload_seconds": _rounded(observed.reload_seconds),
        },
        "unloads": None
        if unloads is None
        else {
            "count": unloads.count,
            "failed": unloads.failed,
            "claimed_mib": account.tally.claimed_mib,
            "returned_mib": account.tally.returned_mib,
            "measured": unloads.measured,
            "returned_share": _rounded(unloads.returned_share),
            "residual_mib": unloads.residual_mib,
            "seconds_mean": _rounded(unloads.seconds_mean),
            "seconds_p50": _rounded(unloads.seconds_p50),
            "seconds_p95": _rounded(unloads.seconds_p95),
            "seconds_max": _rounded(unloads.seconds_max),
        },
        "warnings": list(warnings_of(consumer, account).values()),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _any(truths: list[bool | None]) -> bool | None:
    if True in truths:
        return True
    return None if None in truths else False


def _in_use(state: State, consumer: str) -> str | None:
    if state.queue.is_unloading(consumer):
        return "evicting"
    holds = state.queue.holds_of(consumer)
    if any(hold.phase is Phase.QUARANTINE for hold in holds):
        return "quarantine"
    if holds:
        return "proxy" if all(_proxied(state, hold) for hold in holds) else "lease"
    return state.computing(consumer)


def _calls(state: State, consumer: str) -> list[dict[str, Any]]:
    """Calls that run in it, and those whose work goes on in it after their answer: ``work`` names that."""
    calls = [call for call in state.calls.values() if call.consumer == consumer]
    works = {seq: str(followed.work) for seq, followed in state.followed.items()}
    return [
        {
            "held_seconds": round(state.now() - call.began_at, 3),
            "lease_id": call.lease_id,
            "work": works.get(call.seq),
        }
        for call in calls
    ]


def _proxied(state: State, hold: Hold) -> bool:
    ticket = state.tickets.get(hold.seq)
    return hold.seq in state.calls if ticket is None else ticket.proxied


def _lease(state: State, lease: Lease, now: float) -> dict[str, Any]:
    to = state.asked_to_yield(lease)
    return {
        "lease_id": lease.lease_id,
        "token": lease.token,
        "consumer": lease.consumer,
        "holder": lease.holder,
        "fence": lease.fence,
        "granted_at": state.shown(lease.granted_at),
        "expires_at": state.shown(lease.expires_at),
        "ttl_seconds": lease.ttl_seconds,
        "held_seconds": round(now - lease.granted_at, 3),
        "priority": state.queue.holds[lease.seq].priority.value,
        "yield_requested": to is not None,
        "yield_reason": None if to is None else to.words,
        "intruders": sorted(state.intruders_of(lease)),
        "holder_pid": lease.process and lease.process.pid,
    }
