"""Those who claim the card without a turn, at work: an operator's hold, and games.

Owns: beginning and ending a hold, and what a look for games means. Must not: unload anybody (housekeeping.py does).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta

from gpumgr.core.outside import Game, Pause
from gpumgr.runtime.ports import Clock, GameWatch, Paused, Store, StoreError
from gpumgr.runtime.preparation import store_failed
from gpumgr.runtime.state import State, rfc3339

log = logging.getLogger(__name__)

DEFAULT_HOLD_SECONDS = 4 * 3600.0
LONGEST_HOLD_SECONDS = 7 * 24 * 3600.0
LOOK_SECONDS = 1.0
"""A look costs a listing of /proc where a process has begun since."""


class Outsiders:
    """``changed`` is called, with the lock down, when a claim begins or ends."""

    def __init__(
        self, state: State, store: Store, clock: Clock, games: GameWatch | None, changed: Callable[[], None]
    ) -> None:
        self._state = state
        self._store = store
        self._clock = clock
        self._games = games
        self._changed = changed
        self._kept: Paused | None = None
        self._writing = threading.Lock()

    def hold(self, reason: str | None, ttl_seconds: float | None, by: str | None) -> Pause:
        """Keep the card free from now on; one that lasts already is replaced. It survives a restart."""
        seconds = min(ttl_seconds or DEFAULT_HOLD_SECONDS, LONGEST_HOLD_SECONDS)
        now = self._clock.utc()
        kept = Paused(now, now + timedelta(seconds=seconds), by, reason)
        pause = self._pause(kept)
        with self._state.lock:
            self._kept = kept
            self._state.pause(pause)
        self._state.note("hold", None, by=by, reason=reason, until_at=pause.until_at)
        log.info("hold by=%s reason=%s until=%s", by, reason, pause.until_at)
        self._write()
        self._changed()
        return pause

    def resume(self, by: str | None) -> bool:
        """Whether there was a hold to end."""
        with self._state.lock:
            lasted = self._state.outside.paused(self._clock.monotonic()) is not None
            self._kept = None
            self._state.pause(None)
        if lasted:
            self._state.note("resume", None, by=by)
            log.info("resume by=%s", by)
        self._write()
        self._changed()
        return lasted

    def restore(self, kept: Paused) -> None:
        """With the lock held: one of an earlier life."""
        pause = self._pause(kept)
        if pause.lasts(self._clock.monotonic()):
            self._kept = kept
            self._state.pause(pause)

    def end_what_is_over(self) -> None:
        """Also where only the wall clock went on, as while the machine slept."""
        with self._state.lock:
            pause, kept = self._state.outside.pause, self._kept
            past = kept is not None and self._clock.utc() >= kept.until
            if pause is None or (pause.lasts(self._clock.monotonic()) and not past):
                return
            self._state.pause(None)
        self._state.note("resume", None, by=None, reason="its time is over")
        log.info("resume: the hold's time is over")
        self._changed()

    def _pause(self, kept: Paused) -> Pause:
        now, today = self._clock.monotonic(), self._clock.utc()
        return Pause(
            since=now - (today - kept.since).total_seconds(),
            until=now + (kept.until - today).total_seconds(),
            since_at=rfc3339(kept.since),
            until_at=rfc3339(kept.until),
            by=kept.by,
            reason=kept.reason,
        )

    def _write(self) -> None:
        """A broken disk stops no hold: it is owed, and lost only if the process ends before the disk works again. Of
        two at a time the one that is in force is written last."""
        try:
            with self._writing:
                self._store.paused(self._kept)
        except StoreError as error:
            store_failed(self._state, error)

    def look_for_games(self) -> float:
        """The seconds until the next look."""
        if self._games is None:
            return LOOK_SECONDS
        found = self._games.running()
        with self._state.lock:
            known = {(game.pid, game.name): game for game in self._state.outside.games}
            now, at = self._clock.monotonic(), rfc3339(self._clock.utc())
            games = tuple(known.get((pid, name)) or Game(pid, name, now, at) for pid, name in found)
            changed = games != self._state.outside.games
            if changed:
                self._state.note_games(games)
        if changed:
            self._changed()
        return LOOK_SECONDS
