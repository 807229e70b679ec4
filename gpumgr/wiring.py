"""The composition root: the one file that knows every concrete class. Builds, starts nothing."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections import Counter
from pathlib import Path

from flask import Flask

from gpumgr.adapters.clock import SystemClock
from gpumgr.adapters.dialects import REGISTERED, dialect_of
from gpumgr.adapters.games import Games
from gpumgr.adapters.holders import HolderProbe, HolderProcesses
from gpumgr.adapters.nvml import NvmlProbe
from gpumgr.adapters.ownership import Claim, Ownership
from gpumgr.adapters.patient import PatientProbe
from gpumgr.adapters.simulated import SimulatedProbe, read_card_file
from gpumgr.adapters.store import SqliteStore
from gpumgr.config import Settings, origin_of
from gpumgr.runtime.broker import Broker
from gpumgr.runtime.ports import Probe
from gpumgr.web.app import create_app


def build(settings: Settings) -> Flask:
    """The application; its broker is ``app.extensions["gpumgr"]``, not started yet."""
    return create_app(build_broker(settings))


def build_broker(settings: Settings) -> Broker:
    dialects = {name: dialect_of(consumer) for name, consumer in settings.consumers.items()}
    clock, holders = SystemClock(), HolderProcesses()
    probe = HolderProbe(build_probe(settings), holders)
    store = SqliteStore(settings.server.state_dir, clock)
    games = None if settings.gpu.yield_to is None else Games(settings.gpu.yield_to)
    return Broker(settings, probe, dialects, clock, store, games=games, holder_processes=holders)


def build_probe(settings: Settings) -> Probe:
    if settings.gpu.probe == "simulated":
        owners = {port: name for name, port in _local_ports(settings).items()}
        indexes = sorted({ref for ref in settings.catalog.gpus if isinstance(ref, int)} | {0})
        return SimulatedProbe(read_card_file(_card_file(settings), indexes=indexes), owners)
    return PatientProbe(NvmlProbe(Ownership(claims_of(settings), time.monotonic).owner))


def claims_of(settings: Settings) -> list[Claim]:
    """A dialect's usual patterns cannot tell two consumers of it apart: they count where there is one."""
    ports = _local_ports(settings)
    dialects = Counter(consumer.dialect for consumer in settings.consumers.values())
    return [
        Claim(
            consumer=name,
            patterns=c.processes,
            port=ports.get(name),
            unit=c.unit,
            container=c.container,
            usual=REGISTERED[c.dialect].usual_processes if dialects[c.dialect] == 1 else (),
        )
        for name, c in settings.consumers.items()
    ]


def _card_file(settings: Settings) -> Path:
    return settings.gpu.simulated_card or settings.server.state_dir / "card.json"


def _local_ports(settings: Settings) -> dict[str, int]:
    """The listening port of each consumer on this machine: a process that listens there is that consumer's."""
    origins = {name: origin_of(c.url) for name, c in settings.consumers.items() if c.url is not None}
    return {name: port for name, (_, host, port) in origins.items() if port is not None and _is_here(host)}


def _is_here(host: str) -> bool:
    """Whether it is an address or a name of this machine. Names are not looked up: that can take long, at a start."""
    name = socket.gethostname().lower()
    if host in (name, f"{name.partition('.')[0]}.local"):
        return True
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family) as sock:
            sock.bind((host, 0))  # fails where the address is another machine's
    except (ValueError, OSError):
        return False
    return True
