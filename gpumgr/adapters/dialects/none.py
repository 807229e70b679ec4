"""No backend: a lease for a program of the holder's own, such as a batch script.

Nobody is asked and nothing is unloaded. What such programs hold on the card is a holder's own, known by ``holder_pid``
or by what the file says of its processes, and it is in use until they end (runtime/state.py).
"""

from __future__ import annotations

from gpumgr.adapters.dialects.http import Http
from gpumgr.core.placement import Report as LoadedReport


class NoBackend(Http):
    @property
    def can_unload(self) -> bool:
        return False

    def health(self) -> None:
        """There is nothing that could fail."""

    def busy(self) -> bool | None:
        return None

    def loaded(self) -> LoadedReport | None:
        return None
