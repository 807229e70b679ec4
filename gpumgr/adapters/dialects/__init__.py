"""How each kind of server is spoken to; one file each, registered here."""

from __future__ import annotations

from gpumgr.adapters.dialects.comfyui import ComfyUI
from gpumgr.adapters.dialects.command import Command
from gpumgr.adapters.dialects.docker import Docker
from gpumgr.adapters.dialects.http import Http
from gpumgr.adapters.dialects.llama_server import LlamaServer
from gpumgr.adapters.dialects.none import NoBackend
from gpumgr.adapters.dialects.ollama import Ollama
from gpumgr.adapters.dialects.systemd import Systemd
from gpumgr.adapters.dialects.vllm import Vllm
from gpumgr.config import ConsumerSettings

REGISTERED: dict[str, type[Http]] = {
    "comfyui": ComfyUI,
    "ollama": Ollama,
    "http": Http,
    "llama_server": LlamaServer,
    "vllm": Vllm,
    "systemd": Systemd,
    "docker": Docker,
    "command": Command,
    "none": NoBackend,
}


def dialect_of(settings: ConsumerSettings) -> Http:
    return REGISTERED[settings.dialect](settings)
