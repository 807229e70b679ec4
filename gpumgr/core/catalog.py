"""Who may use which GPU, and who may stand beside whom.

Owns: consumers, the routing of kinds, and the two relations everything else is decided by: sharing a GPU and
coexisting. Must not: parse YAML (config.py) or know how a consumer is spoken to (adapters/dialects).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from gpumgr.core.card import Reading
from gpumgr.errors import ConsumerUnknown, KindUnknown

NO_BACKEND = "none"
"""The dialect of a consumer that is nothing but its holders' own programs."""

GpuRef = int | str
"""An NVML index, or a UUID that no reading has resolved to an index yet."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A configured service that uses the GPU. ``vram_resident_mib`` holds one number for each of ``gpus``: the size in
    force, which of an ``auto`` consumer core/ledger.py derives from what was observed."""

    name: str
    url: str | None
    public_url: str | None
    """None: it has no address. Its leases are for a program of the holder's own."""
    dialect: str
    gpus: tuple[GpuRef, ...] = (0,)
    vram_resident_mib: tuple[int, ...] = (0,)
    residual_mib: int = 768
    can_coexist_with: frozenset[str] = frozenset()
    by_size: bool = False
    """It coexists with everybody else of whom that is so, as far as their sizes fit together (core/sharing.py)."""
    max_concurrency: int = 1
    pinned: bool = False
    """It is unloaded last, and for a lease alone."""
    unload_timeout_seconds: float = 30.0
    retired: bool = False
    """It has left the configuration, and a lease of it has not ended yet: nobody else is granted it."""
    auto: bool = False
    declared_mib: tuple[int, ...] = ()
    """Of an ``auto`` consumer: its size until enough was observed; empty where the file says none."""
    unsized: bool = False
    """Nobody knows yet what it needs: it coexists with nobody."""

    def needs_mib(self, gpu: GpuRef) -> int:
        """MiB of its size on this GPU; 0 where it does not use it."""
        for ref, mib in zip(self.gpus, self.vram_resident_mib, strict=True):
            if ref == gpu:
                return mib
        return 0

    @property
    def has_backend(self) -> bool:
        """Whether anybody else than its holders computes for it: else what is on the card is a holder's own."""
        return self.dialect != NO_BACKEND


@dataclass(frozen=True)
class Catalog:
    """All consumers and kinds; immutable. ``routing`` maps a kind to a consumer's name."""

    consumers: Mapping[str, Consumer]
    routing: Mapping[str, str] = field(default_factory=dict)
    lends_mib: Mapping[GpuRef, int] = field(default_factory=dict)
    """What each card has for its consumers, as far as it was read: for those that coexist by size."""

    def resolve(self, *, kind: str | None, consumer: str | None) -> Consumer:
        """The consumer that a request means. Exactly one of the two is given.

        Raises: KindUnknown, ConsumerUnknown, naming what there is.
        """
        if kind is not None:
            if kind not in self.routing:
                hint = f'; {kind} is a consumer: ask for {{"consumer": "{kind}"}}' if kind in self.consumers else ""
                raise KindUnknown(f"no kind {kind!r} in routing; there are: {_names(self.routing)}{hint}", kind=kind)
            return self.consumers[self.routing[kind]]
        if consumer is None or consumer not in self.consumers or self.consumers[consumer].retired:
            hint = f'; {consumer} is a kind: ask for {{"kind": "{consumer}"}}' if consumer in self.routing else ""
            raise ConsumerUnknown(
                f"no consumer {consumer!r} is configured; there are: {_names(self.consumers)}{hint}", consumer=consumer
            )
        return self.consumers[consumer]

    def kinds_of(self, consumer: str) -> list[str]:
        return [kind for kind, name in self.routing.items() if name == consumer]

    def share_gpu(self, a: str, b: str) -> bool:
        return overlap(self.consumers[a].gpus, self.consumers[b].gpus)

    def may_coexist(self, a: str, b: str) -> bool:
        """Whether both may have memory on one GPU at a time. A consumer coexists with itself."""
        one, other = self.consumers[a], self.consumers[b]
        mutual = b in one.can_coexist_with and a in other.can_coexist_with
        return a == b or (mutual and not one.unsized and not other.unsized) or b in self.mates[a]

    def exclude(self, a: str, b: str) -> bool:
        """Two different consumers that may not be on the card together: they share a GPU and do not coexist."""
        return b in self.excluded[a]

    @cached_property
    def excluded(self) -> Mapping[str, frozenset[str]]:
        """Whom each consumer excludes. Kept, as every decision of the order asks for it."""
        return {a: frozenset(b for b in self.consumers if self._exclude(a, b)) for a in self.consumers}

    @cached_property
    def mates(self) -> Mapping[str, frozenset[str]]:
        """With whom each consumer coexists by size alone. Kept for the same reason."""
        return {a: frozenset(b for b in self.consumers if self._mate(a, b)) for a in self.consumers}

    @cached_property
    def sizes_mib(self) -> Mapping[GpuRef, Mapping[str, int]]:
        """Who needs how much of each GPU."""
        return {gpu: {c.name: c.needs_mib(gpu) for c in self.on_gpu(gpu)} for gpu in self.gpus}

    def _mate(self, a: str, b: str) -> bool:
        """Not where a card has no index yet: what it lends is not known."""
        one, other = self.consumers[a], self.consumers[b]
        sized = one.by_size and other.by_size and not one.unsized and not other.unsized
        paired = b in one.can_coexist_with and a in other.can_coexist_with
        known = all(isinstance(ref, int) for ref in (*one.gpus, *other.gpus))
        return a != b and sized and not paired and known and self.share_gpu(a, b)

    def _exclude(self, a: str, b: str) -> bool:
        return self.share_gpu(a, b) and not self.may_coexist(a, b)

    def keeping(self, name: str, gpus: tuple[GpuRef, ...], sizes_mib: tuple[int, ...]) -> Catalog:
        """With a consumer also on GPUs that a lease of it was granted, whatever the configuration says by now."""
        known = self.consumers.get(name)
        if known is None:
            known = Consumer(
                name=name, url=None, public_url=None, dialect="", gpus=(), vram_resident_mib=(), retired=True
            )
        more = [(gpu, mib) for gpu, mib in zip(gpus, sizes_mib, strict=True) if gpu not in known.gpus]
        kept = replace(
            known,
            gpus=(*known.gpus, *(gpu for gpu, _ in more)),
            vram_resident_mib=(*known.vram_resident_mib, *(mib for _, mib in more)),
        )
        return replace(self, consumers={**self.consumers, name: kept})

    @cached_property
    def gpus(self) -> tuple[GpuRef, ...]:
        """Every GPU that some consumer uses, each once."""
        return tuple(dict.fromkeys(ref for c in self.consumers.values() for ref in c.gpus))

    def on_gpu(self, gpu: GpuRef) -> list[Consumer]:
        return [c for c in self.consumers.values() if gpu in c.gpus]

    @property
    def unresolved(self) -> list[str]:
        """UUIDs that no reading has matched to an index yet."""
        return [ref for ref in self.gpus if isinstance(ref, str)]

    def resolved(self, reading: Reading) -> Catalog:
        """The same catalog with every UUID the reading knows turned into its index, so that two names of one
        card are one card. What the reading does not know stays as it is."""
        indexes = {gpu.uuid: gpu.index for gpu in reading.gpus if gpu.uuid is not None}
        consumers = {
            name: replace(c, gpus=tuple(indexes.get(ref, ref) if isinstance(ref, str) else ref for ref in c.gpus))
            for name, c in self.consumers.items()
        }
        return replace(self, consumers=consumers)


def overlap(some: Iterable[GpuRef], others: Iterable[GpuRef]) -> bool:
    """Whether a GPU is among both, or may be: a UUID that is not resolved may be the card of any index."""
    ours, theirs = set(some), set(others)
    return not ours.isdisjoint(theirs) or _mixed(ours, theirs) or _mixed(theirs, ours)


def _mixed(some: set[GpuRef], others: set[GpuRef]) -> bool:
    return any(isinstance(ref, str) for ref in some) and any(isinstance(ref, int) for ref in others)


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
