"""How each kind of server is spoken to; one file each, registered here."""

from __future__ import annotations

from gpumgr.adapters.dialects.comfyui import ComfyUI
from gpumgr.adapters.dialects.http import Http
from gpumgr.adapters.dialects.ollama import Ollama
from gpumgr.config import ConsumerSettings

REGISTERED: dict[str, type[Http]] = {"comfyui": ComfyUI, "ollama": Ollama, "http": Http}


def dialect_of(settings: ConsumerSettings) -> Http:
    return REGISTERED[settings.dialect](settings)
