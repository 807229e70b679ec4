"""A process that nobody told the broker of: a game, a notebook, another user's training.

Owns: its memory. Must not: listen anywhere; no port leads to a consumer.
"""

from __future__ import annotations

from gpumgr.sim.card import SimulatedCard


class UntrackedProcess:
    """Raises OutOfMemory where it does not fit; the process is then gone again."""

    def __init__(self, card: SimulatedCard, name: str, mib: int, gpu: int = 0) -> None:
        self.name = name
        self._card = card
        self.pid = card.start_process(name, gpu=gpu)
        try:
            card.set_used(self.pid, mib)
        except Exception:
            card.end_process(self.pid)
            raise

    @property
    def used_mib(self) -> int:
        return self._card.used_mib(self.pid)

    def set_used(self, mib: int) -> None:
        """Games breathe: levels load and go. Raises: OutOfMemory."""
        self._card.set_used(self.pid, mib)

    def end(self) -> None:
        self._card.end_process(self.pid)


def game(card: SimulatedCard, name: str = "game", mib: int = 6000) -> UntrackedProcess:
    """Raises: OutOfMemory."""
    return UntrackedProcess(card, name, mib)
