"""Every wrong configuration is one sentence that names file, key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumgr import cli, config
from tests.brokers import ROOT

BASE: dict[str, Any] = {
    "routing": {"image": "comfyui", "stt": "whisper"},
    "consumers": {
        "comfyui": {"dialect": "comfyui", "url": "http://127.0.0.1:8188", "vram_resident_mib": 14000},
        "whisper": {
            "dialect": "http",
            "url": "http://127.0.0.1:9000",
            "vram_resident_mib": 2000,
            "unload": {"path": "/unload"},
        },
    },
}


def written(tmp_path: Path, changes: dict[str, Any]) -> Path:
    """BASE with dotted keys set to these values; None removes."""
    document = yaml.safe_load(yaml.safe_dump(BASE))
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        at = document
        for parent in parents:
            at = at.setdefault(parent, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    file = tmp_path / "consumers.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return file


def refusal(file: Path) -> str:
    with pytest.raises(config.ConfigError) as caught:
        config.load_file(file)
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}: ")
    assert "\n" not in sentence
    return sentence.removeprefix(f"{file}: ")


def test_defaults(tmp_path: Path) -> None:
    settings = config.load_file(written(tmp_path, {}))
    comfyui = settings.catalog.consumers["comfyui"]
    assert (comfyui.gpus, comfyui.vram_resident_mib, comfyui.residual_mib) == ((0,), (14000,), 768)
    assert (comfyui.max_concurrency, comfyui.public_url, comfyui.can_coexist_with) == (1, comfyui.url, frozenset())
    assert comfyui.unload_timeout_seconds == 30
    assert settings.server.bind == "127.0.0.1:8770"
    assert (settings.gpu.probe, settings.gpu.headroom_mib) == ("nvml", 512)


def test_the_shipped_file_is_right_and_shows_the_defaults() -> None:
    settings = config.load_file(ROOT / "config" / "consumers.yaml")
    assert settings.warnings == ()
    bare = config.LeaseSettings()
    assert settings.lease == bare
    assert settings.scheduling == config.SchedulingSettings()
    assert settings.proxy == config.ProxySettings()
    assert (settings.server.threads, settings.server.reserved_threads) == (128, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, ["colour is not a known key"]),
        ({"server.bnid": "x"}, ["server.bnid", "did you mean bind?"]),
        ({"server.bind": "8770"}, ["server.bind", "127.0.0.1:8770"]),
        ({"server.bind": "127.0.0.1:99999"}, ["server.bind"]),
        ({"server.threads": 10, "server.reserved_threads": 10}, ["server.reserved_threads", "less than"]),
        ({"server.threads": True}, ["server.threads", "whole number"]),
        ({"gpu.probe": "amd"}, ["gpu.probe", "nvml, simulated"]),
        ({"gpu.headroom_mib": -1}, ["gpu.headroom_mib"]),
        ({"gpu.simulated_card": "card.json"}, ["gpu.simulated_card", "probe: simulated"]),
        ({"lease.default_ttl_seconds": 5}, ["lease.default_ttl_seconds", "between"]),
        ({"lease.max_wait_seconds": 60}, ["lease.default_wait_seconds", "change one"]),
        ({"lease.max_ttl_seconds": float("inf")}, ["lease.max_ttl_seconds", "finite"]),
        ({"lease.max_ttl_seconds": 10**400}, ["lease.max_ttl_seconds", "finite"]),
        ({"lease.max_ttl_seconds": "600s"}, ["lease.max_ttl_seconds", "without a unit"]),
        ({"server.bind": "127.0.0.1:²"}, ["server.bind"]),
        ({"scheduling.policy": "lifo"}, ["scheduling.policy", "fifo"]),
        ({"scheduling.mode": "observe"}, ["scheduling.mode", "evicting, locked, passthrough"]),
        ({"gpu.when_unreadable": "believe"}, ["gpu.when_unreadable", "refuse, declared"]),
        ({"proxy.idle_timeout_seconds": 0}, ["proxy.idle_timeout_seconds", "more than 0"]),
        ({"proxy.stall_timeout_seconds": 200_000}, ["proxy.stall_timeout_seconds", "at most 86400"]),
        ({"proxy.timeout": 5}, ["proxy.timeout", "not a known key"]),
        ({"routing.video": "nobody"}, ["routing.video", "'nobody'", "comfyui, whisper"]),
        ({"routing.models": "comfyui"}, ["routing.models", "reserved"]),
        ({"routing.Image": "comfyui"}, ["routing.Image", "rename"]),
        ({"consumers.comfyui.url": None}, ["consumers.comfyui.url is missing"]),
        ({"consumers.comfyui.url": "127.0.0.1:8188"}, ["consumers.comfyui.url", "http://"]),
        ({"consumers.comfyui.url": "http://u:p@127.0.0.1:8188"}, ["consumers.comfyui.url", "without user"]),
        ({"consumers.comfyui.url": "http://localhost:9000"}, ["consumers.whisper.url", "same origin"]),
        ({"consumers.comfyui.dialect": "a1111"}, ["consumers.comfyui.dialect", "comfyui, ollama, http"]),
        ({"consumers.comfyui.vram_resident_mib": None}, ["consumers.comfyui.vram_resident_mib is missing"]),
        ({"consumers.comfyui.vram_resident_mib": "14 GB"}, ["consumers.comfyui.vram_resident_mib", "whole number"]),
        ({"consumers.comfyui.vram_resident_mib": [1, 2]}, ["vram_resident_mib lists 2 sizes for 1 GPUs"]),
        ({"consumers.comfyui.gpus": []}, ["consumers.comfyui.gpus"]),
        ({"consumers.comfyui.gpus": [0, 0]}, ["consumers.comfyui.gpus", "twice"]),
        ({"consumers.comfyui.gpus": [-1]}, ["consumers.comfyui.gpus"]),
        ({"consumers.comfyui.max_concurrency": 0}, ["consumers.comfyui.max_concurrency"]),
        ({"consumers.comfyui.can_coexist_with": ["whisper"]}, ["can_coexist_with", "add comfyui to"]),
        ({"consumers.comfyui.can_coexist_with": ["nobody"]}, ["can_coexist_with", "'nobody'"]),
        ({"consumers.comfyui.can_coexist_with": ["comfyui"]}, ["can_coexist_with", "itself"]),
        ({"consumers.whisper.unload": {"timeout_seconds": 5}}, ["consumers.whisper.unload.path is missing"]),
        ({"consumers.whisper.unload.json": {}, "consumers.whisper.unload.path": None}, ["unload", "without a path"]),
        ({"consumers.whisper.health": {"path": "/h", "method": "POST"}}, ["consumers.whisper.health", "GET"]),
        ({"consumers.whisper.busy": {"path": "/busy"}}, ["consumers.whisper.busy.json is missing"]),
        ({"consumers.whisper.unit": "tts service"}, ["consumers.whisper.unit", "ollama.service"]),
        ({"consumers.whisper.container": "/whisper"}, ["consumers.whisper.container", "docker ps"]),
        ({"consumers.whisper.unit": "a", "consumers.comfyui.unit": "a.service"}, ["consumers.whisper.unit is also"]),
        ({"consumers.whisper.container": "a", "consumers.comfyui.container": "a"}, ["consumers.comfyui.container"]),
        ({"consumers.9lives": {}}, ["consumers.9lives", "rename"]),
        ({"consumers": {}, "routing": {}}, ["consumers is empty"]),
        ({"consumers": ["comfyui"]}, ["consumers must be a mapping"]),
        ({"consumers.comfyui.base_url": "x"}, ["base_url", "now written url"]),
        ({"consumers.whisper.vram_resident": 1, "consumers.whisper.vram_resident_mib": None}, ["now written vram_res"]),
        ({"consumers.whisper.base_url": "x", "consumers.whisper.url": None}, ["base_url", "now written url"]),
        ({"consumers.whisper.kind": "stt"}, ["consumers.whisper.kind", "routing: {KIND: CONSUMER}"]),
        ({"consumers.whisper.evict_url": "x"}, ["evict_url", "now written unload: {path: …}"]),
        ({"listen": ":8770"}, ["listen", "server: {bind: …}"]),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    sentence = refusal(written(tmp_path, changes))
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: [", "is not YAML in line"),
        ("server: {}\nserver: {}\n", "line 2: the key 'server' stands twice"),
        ("1: 2\n", "must be a text"),
        ("", "the file is empty"),
        ("server:\n\tbind: x\n", "in line 2, column 1"),
        ("- a\n", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "consumers.yaml"
    file.write_text(text, encoding="utf-8")
    assert word in refusal(file)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(tmp_path / "binary.yaml")


def test_a_unit_is_named_as_systemctl_takes_it(tmp_path: Path) -> None:
    units = {"consumers.whisper.unit": "whisper@1", "consumers.comfyui.unit": "gpu.slice"}
    consumers = config.load_file(written(tmp_path, units)).consumers
    assert [consumers[name].unit for name in ("whisper", "comfyui")] == ["whisper@1.service", "gpu.slice"]


def test_the_environment_wins(tmp_path: Path) -> None:
    env = {"GPUMGR_BIND": "127.0.0.1:1", "GPUMGR_STATE_DIR": "/x", "GPUMGR_CONFIG": str(written(tmp_path, {}))}
    server = config.load(env).server
    assert (server.bind, str(server.state_dir)) == ("127.0.0.1:1", "/x")
    with pytest.raises(config.ConfigError, match="GPUMGR_BIND"):
        config.load(env | {"GPUMGR_BIND": "nonsense"})


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", str(ROOT / "config" / "consumers.yaml")]) == 0
    assert "ok. 4 consumers" in capsys.readouterr().out
    assert cli.main(["check-config", str(written(tmp_path, {"consumers.whisper.unload": None}))]) == 0
    assert "warning: consumers.whisper has no unload call" in capsys.readouterr().out
    assert cli.main(["check-config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
