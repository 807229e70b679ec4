"""What a run is made of. Owns: these values. Must not: run anything."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.torture.clients import Manners
from tests.torture.nemesis import Moods

QUANTUM_SECONDS = 0.4
"""Some ten leases: they are held for a moment."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``quantum_seconds``: with this quantum; None: first come, first served."""

    seconds: float
    seed: int = 1
    quantum_seconds: float | None = None
    clients: int = 16
    manners: Manners = field(default_factory=Manners)
    moods: Moods = field(default_factory=Moods)
    drain_seconds: float = 15.0
