"""What the broker asks of the world: the seams that adapters fill and tests fake.

Owns: the protocols and their promises. Must not: do anything.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Protocol

from gpumgr.core.card import Reading
from gpumgr.core.lease import Lease
from gpumgr.core.placement import Report


class Clock(Protocol):
    """One source of time with two faces."""

    def monotonic(self) -> float:
        """Seconds to compute with; never jumps with the wall clock."""

    def utc(self) -> datetime:
        """The wall clock, aware, only ever shown."""


class Probe(Protocol):
    """The driver. ``read`` never raises: what cannot be read is told in the reading."""

    def read(self) -> Reading: ...

    def close(self) -> None: ...


BackendReason = Literal["unreachable", "hung", "failed"]


class BackendError(Exception):
    """A consumer's server did not do what was asked.

    ``reason``: ``unreachable`` (no connection), ``hung`` (no answer in time), ``failed`` (an answer that says no).
    ``refused``: the machine itself says that nobody listens there, so that nobody can hold anything.
    """

    def __init__(self, reason: BackendReason, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.refused = refused


class Dialect(Protocol):
    """How one consumer is spoken to. Every call blocks, is bounded in time, and raises BackendError alone."""

    @property
    def ask_again_seconds(self) -> float | None:
        """Unload again after this long without the memory falling; None: once is enough."""

    @property
    def can_unload(self) -> bool: ...

    @property
    def can_load(self) -> bool: ...

    @property
    def load_starts_service(self) -> bool:
        """Health is only asked after the load."""

    def health(self) -> None:
        """Return if it serves."""

    def unload(self, within_seconds: float) -> None:
        """One round of the unload calls. Returning proves nothing: the caller watches the card."""

    def load(self) -> None:
        """Bring the consumer's memory onto the card, where the dialect has such a call."""

    def loaded(self) -> Report | None:
        """Its own report of what is loaded; None: it has no such report."""

    def busy(self) -> bool | None:
        """Is it computing now? None: it has no such report."""


class Journal(Protocol):
    """Where grants and their ends are written. Called with the lock down, before the caller is answered."""

    def granted(self, lease: Lease, event: dict[str, Any]) -> None: ...

    def ended(self, lease: Lease, event: dict[str, Any]) -> None: ...
