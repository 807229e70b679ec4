"""Work that goes on in a consumer after the call that began it was answered, and until when it holds the GPU.

Owns: the value of such work, and what follows from each look at it. Must not: look, wait, or know a clock.

What a look at it says, and what follows:

    going on   held, however long it takes: its consumer says that it runs or waits there. Told each ``LONG_SECONDS``
    done       over
    nowhere    over when a second look says the same: it may have been on its way from the queue to the history
    refused    over: nobody listens there, so its process has died, and the work with it
    silent     held until ``SILENT_SECONDS`` after the last look that was answered with sense. Then over: from there on
               it is its consumer's tail, which is waited for as well while its busy report hangs or fails
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from gpumgr.core.lease import Call

LOOK_EACH_SECONDS = 0.5
HINTED_SECONDS = 0.1
"""The same where somebody has just been told something that may be its end."""
LONG_SECONDS = 600.0
SILENT_SECONDS = 60.0
"""ComfyUI answers nobody for many seconds while it loads a large model."""


@dataclass(frozen=True, slots=True)
class Work:
    """``noun`` is its consumer's word for it: a ``prompt``."""

    noun: str
    id: str

    def __str__(self) -> str:
        return f"{self.noun} {self.id}"


class Look(StrEnum):
    GOING_ON = "going on"
    DONE = "done"
    NOWHERE = "nowhere"
    REFUSED = "refused"
    SILENT = "silent"


class Over(StrEnum):
    """Why it holds no longer: it is done, it left its consumer undone, its consumer died, or nobody could say."""

    DONE = "done"
    LEFT = "left"
    DIED = "died"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Followed:
    """A call that holds its consumer's GPUs for the sake of ``work``. Instants are monotonic."""

    call: Call
    work: Work
    looked_at: float
    heard_at: float
    told_at: float
    nowhere: bool = False
    """Where the last look that was answered saw it."""
    hinted: bool = False

    def due_at(self) -> float:
        """When to look next. A hint does not hurry the second look at what was nowhere."""
        return self.looked_at + (HINTED_SECONDS if self.hinted and not self.nowhere else LOOK_EACH_SECONDS)

    def after(self, look: Look, now: float) -> Followed | Over:
        if look is Look.DONE:
            return Over.DONE
        if look is Look.REFUSED:
            return Over.DIED
        if look is Look.SILENT:
            return Over.LOST if now - self.heard_at >= SILENT_SECONDS else replace(self, looked_at=now, hinted=False)
        if look is Look.NOWHERE and self.nowhere:
            return Over.LEFT
        return replace(self, looked_at=now, heard_at=now, nowhere=look is Look.NOWHERE, hinted=False)

    def is_long(self, now: float) -> bool:
        """Whether it is time to tell (again) how long it takes."""
        return now - self.told_at >= LONG_SECONDS


def begun(call: Call, work: Work, now: float) -> Followed:
    return Followed(call, work, looked_at=now, heard_at=now, told_at=now)
