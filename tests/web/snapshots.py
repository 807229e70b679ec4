"""A snapshot with everything in it, as status would tell it: what the page is shown with."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from gpumgr.runtime.state import rfc3339

TOKEN = "tOkEn-that-nobody-may-see"  # noqa: S105 - made up
IN_USE = (None, "lease", "proxy", "tail", "direct", "evicting", "quarantine", "something new")
WAITING_FOR = ("holder", "ahead", "vram", "preparing", "draining", "something new")
_NOW = datetime(2026, 11, 24, 16, tzinfo=UTC)


def at(seconds: float) -> str:
    return rfc3339(_NOW + timedelta(seconds=seconds))


def consumer(name: str, size_mib: int, held_mib: int | None, in_use: str | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "kinds": [f"kind-of-{name}"],
        "dialect": "http",
        "url": f"http://{name}.test:8188",
        "gpus": [0],
        "vram_resident_mib": size_mib,
        "declared_mib": size_mib,
        "auto": False,
        "held_mib": held_mib,
        "can_coexist_with": [],
        "coexist": "pairs",
        "pinned": False,
        "healthy": True,
        "health_error": None,
        "checked_at": at(-3),
        "resident": None if held_mib is None else held_mib > 0,
        "in_use": in_use,
        "total_requests": 4,
        "evictions": 2,
        "last_used_at": at(-400),
        "observed": None,
        "unloads": None,
        "warnings": [],
    }


def learned(name: str = "paint", share: float = 0.719) -> dict[str, Any]:
    """One with everything that is learned, and leaky."""
    observed: dict[str, Any] = {"count": 23, "resident_mib": 11800, "resident_p95_mib": 12100, "peak_mib": 12400}
    unloads: dict[str, Any] = {
        "count": 9,
        "failed": 3,
        "claimed_mib": 90000,
        "returned_mib": 64000,
        "measured": 8,
        "residual_mib": 3400,
    }
    unloads |= {
        "returned_share": share,
        "seconds_mean": 0.4,
        "seconds_p50": 0.31,
        "seconds_p95": 1.2,
        "seconds_max": 2.0,
    }
    return consumer(name, 14000, 12000, "lease") | {
        "auto": True,
        "declared_mib": None,
        "observed": observed | {"peak_p95_mib": 12700, "reload_seconds": 4.2},
        "unloads": unloads,
        "warnings": [f"{name} returned 71 % on average over 8 unloads: something in it keeps its memory"],
    }


def process(pid: int, name: str, used_mib: int | None, of: str | None) -> dict[str, Any]:
    return {"pid": pid, "name": name, "used_mib": used_mib, "consumer": of}


def gpu(*processes: dict[str, Any], total: int = 24000, used: int = 18000, promised: int = 2000) -> dict[str, Any]:
    return {
        "index": 0,
        "uuid": "GPU-0",
        "name": "A Card",
        "total_mib": total,
        "used_mib": used,
        "free_mib": max(0, total - used),
        "promised_mib": promised,
        "readable": True,
        "read_at": at(-0.2),
        "processes": list(processes),
    }


def unreadable(error: str = "the driver is away") -> dict[str, Any]:
    numbers = {"total_mib": None, "used_mib": None, "free_mib": None, "readable": False, "read_at": None}
    return gpu() | numbers | {"error": error}


def lease(holder: str | None = "imagen") -> dict[str, Any]:
    return {
        "lease_id": "05cd8b3450",
        "token": TOKEN,
        "consumer": "paint",
        "holder": holder,
        "fence": 318,
        "granted_at": at(-500),
        "expires_at": at(72.4),
        "ttl_seconds": 120,
        "held_seconds": 500.2,
    }


def waiting(position: int = 1, waiting_for: str = "holder", holder: str | None = "chat") -> dict[str, Any]:
    return {
        "position": position,
        "consumer": "chat",
        "holder": holder,
        "priority": "interactive",
        "waiting_seconds": 75.0,
        "deadline_at": at(45),
        "waiting_for": waiting_for,
        "step": "waiting for its turn",
        "reason": "imagen has held comfyui for 12 s",
        "quantum_ends_at": None,
        "estimated_start_at": at(20),
        "estimated_wait_seconds": 20.0,
    }


_EVENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("start", {"consumer": None, "version": "0.1.0"}),
    (
        "grant",
        {
            "lease_id": "aa11",
            "holder": "chat",
            "fence": 1,
            "waited_seconds": 0.12,
            "arrival": 7,
            "granted_boot": 24763.3,
            "expires_boot": 24883.3,
        },
    ),
    ("release", {"lease_id": "aa11", "holder": "chat", "fence": 1, "held_seconds": 42.1}),
    ("expire", {"lease_id": "aa12", "holder": None, "fence": 2, "held_seconds": 142.1}),
    ("revoke", {"lease_id": "aa13", "holder": "chat", "by": "operator", "reason": "stuck"}),
    ("refuse", {"holder": "chat", "code": "insufficient_vram", "waited_seconds": 0.0}),
    ("withdraw", {"holder": "chat", "waited_seconds": 3.0}),
    ("evict", {"held_mib": 9000, "still_held_mib": 412, "seconds": 0.31, "for": "paint"}),
    ("evict_failed", {"held_mib": 9, "still_held_mib": 9, "seconds": 30.0, "reason": "kept", "for": "paint"}),
    ("proxy_over_budget", {"code": "insufficient_vram", "reason": "it needs more"}),
    ("gpu_unreadable", {"consumer": None, "problems": ["GPU 0: gone"]}),
    ("intruder", {"beside": "paint", "holder": "imagen", "lease_id": "aa14"}),
    ("hold", {"consumer": None, "by": "ada", "reason": "a game", "until_at": "2026-11-24T20:00:00.000Z"}),
    ("resume", {"consumer": None, "by": "ada"}),
    ("game", {"consumer": None, "pid": 4, "name": "bg3.exe"}),
    ("game_over", {"consumer": None, "pid": 4, "name": "bg3.exe"}),
    ("restore", {"preload": False}),
    ("work_long", {"work": "prompt 6b1f", "held_seconds": 600.2}),
    ("work_lost", {"work": "prompt 6b1f", "held_seconds": 75.0, "how": "died", "reason": "nobody listens"}),
    ("would_wait", {"holder": "chat", "waiting_for": "holder", "behind": ["paint"]}),
    ("would_evict", {"holder": "imagen", "victims": ["chat"]}),
    ("would_refuse", {"holder": "imagen", "code": "insufficient_vram", "reason": "it needs 14000 MiB"}),
    ("something new", {"consumer": "nobody known", "a": [1, 2], "b": {"c": None}, "token": TOKEN}),
    ("stop", {"consumer": None}),
)


def everything() -> dict[str, Any]:
    """One of each that the page knows, and of what it does not know."""
    kept = [consumer(f"use-{place}", 1000, 0, word) for place, word in enumerate(IN_USE)]
    return {
        "version": "0.1.0",
        "started_at": at(-93784),
        "now": at(0),
        "mode": "evicting",
        "when_unreadable": "refuse",
        "gpus": [
            gpu(
                process(2101, "python3", 12000, "paint"),
                process(3342, "ollama", 400, "chat"),
                process(41877, "game.exe", 4600, None),
                process(1203, "Xorg", None, None),
            )
        ],
        "consumers": [learned(), consumer("chat", 9000, 400), *kept],
        "leases": [lease()],
        "queue": [waiting(place, reason) for place, reason in enumerate(WAITING_FOR, 1)],
        "events": [
            {"at": at(place - 200), "type": kind, "consumer": "chat"} | f for place, (kind, f) in enumerate(_EVENTS)
        ],
    }
