"""The journal that keeps nothing: leases live in memory and end with the process.

The port is where a durable store goes in; the broker already puts its lock down for it.
"""

from __future__ import annotations

from typing import Any

from gpumgr.core.lease import Lease


class NoJournal:
    def granted(self, lease: Lease, event: dict[str, Any]) -> None:
        pass

    def ended(self, lease: Lease, event: dict[str, Any]) -> None:
        pass
