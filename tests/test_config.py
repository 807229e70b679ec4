"""Every wrong configuration is one sentence that names file, key and remedy."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpumgr import cli, config
from gpumgr.core.queue import Priority
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


def test_free_paths_replace_the_dialects_own(tmp_path: Path) -> None:
    file = written(tmp_path, {"consumers.comfyui.proxy_free_paths": ["GET /history/*", "POST /x"]})
    free = config.load_file(file).consumers["comfyui"].proxy_free_paths
    assert free is not None
    assert [str(path) for path in free] == ["GET /history/*", "POST /x"]
    assert config.load_file(written(tmp_path, {})).consumers["comfyui"].proxy_free_paths is None


def test_defaults(tmp_path: Path) -> None:
    settings = config.load_file(written(tmp_path, {}))
    comfyui = settings.catalog.consumers["comfyui"]
    assert (comfyui.gpus, comfyui.vram_resident_mib, comfyui.residual_mib) == ((0,), (14000,), 768)
    assert (comfyui.max_concurrency, comfyui.public_url, comfyui.can_coexist_with) == (1, comfyui.url, frozenset())
    assert comfyui.unload_timeout_seconds == 30
    assert settings.server.bind == "127.0.0.1:8770"
    assert (settings.gpu.probe, settings.gpu.headroom_mib) == ("nvml", 512)


def test_a_kind_may_say_how_urgent_it_is(tmp_path: Path) -> None:
    stt = {"consumer": "whisper", "priority": "interactive"}
    settings = config.load_file(written(tmp_path, {"routing.stt": stt}))
    assert settings.catalog.routing["stt"] == "whisper"
    assert settings.priorities == {"image": Priority.NORMAL, "stt": Priority.INTERACTIVE}


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
        ({"consumers.comfyui.proxy_free_paths": "GET /a"}, ["comfyui.proxy_free_paths must be a list"]),
        ({"consumers.comfyui.proxy_free_paths": ["/a"]}, ["proxy_free_paths[0]", "GET /history/*", "'/a'"]),
        ({"consumers.comfyui.proxy_free_paths": ["GET /a", "GET /a/../b"]}, ["proxy_free_paths[1]", "no '..'"]),
        ({"server.bnid": "x"}, ["server.bnid", "did you mean bind?"]),
        ({"server.bind": "8770"}, ["server.bind", "127.0.0.1:8770"]),
        ({"server.bind": "127.0.0.1:99999"}, ["server.bind"]),
        ({"server.threads": 10, "server.reserved_threads": 10}, ["server.reserved_threads", "less than"]),
        ({"server.bind": "0.0.0.0:8770"}, ["server.bind 0.0.0.0:8770", "auth: bearer", "trusted_network: true"]),
        ({"server.bind": "[::]:8770"}, ["server.bind [::]:8770", "auth: bearer", "127.0.0.1"]),
        ({"server.bind": "mrock:8770", "server.auth": False}, ["server.bind mrock:8770", "auth is off"]),
        ({"server.auth": "on"}, ["server.auth", "off, bearer"]),
        ({"server.auth": True}, ["server.auth", "off, bearer"]),
        ({"server.auth": "bearer"}, ["no token", "GPUMGR_TOKENS", "server.tokens_file"]),
        ({"server.trusted_network": "yes please"}, ["server.trusted_network", "true or false"]),
        ({"server.tokens_file": "nowhere", "server.auth": "bearer"}, ["server.tokens_file", "cannot be read"]),
        ({"server.allowed_hosts": "gpu.example"}, ["server.allowed_hosts", "list"]),
        ({"server.allowed_hosts": ["*.example"]}, ["server.allowed_hosts", "without port or *"]),
        ({"server.allowed_hosts": ["gpu.example:80"]}, ["server.allowed_hosts", "without port"]),
        ({"server.allowed_origins": ["*"]}, ["server.allowed_origins", "https://page.example:8443"]),
        ({"server.allowed_origins": ["page.example"]}, ["server.allowed_origins", "scheme"]),
        ({"server.allowed_origins": ["https://page.example/x"]}, ["server.allowed_origins", "scheme"]),
        ({"consumers.whisper.headers": ["X-Key: 1"]}, ["consumers.whisper.headers", "mapping"]),
        ({"consumers.whisper.headers": {"X-Key": 1}}, ["consumers.whisper.headers.X-Key", "in quotes"]),
        ({"consumers.whisper.headers": {"X Key": "1"}}, ["consumers.whisper.headers", "'X Key'", "remove it"]),
        ({"consumers.whisper.headers": {"X-Key\r\nHost": "1"}}, ["consumers.whisper.headers", "remove it"]),
        ({"consumers.whisper.headers": {"Host": "x"}}, ["consumers.whisper.headers", "'Host'"]),
        ({"consumers.whisper.headers": {"content-length": "1"}}, ["consumers.whisper.headers", "remove it"]),
        ({"consumers.whisper.headers": {"Connection": "X"}}, ["consumers.whisper.headers", "remove it"]),
        ({"consumers.whisper.headers": {"X-GPU-Lease": "x"}}, ["consumers.whisper.headers", "remove it"]),
        ({"consumers.whisper.headers": {"X-Key": "1", "x-key": "2"}}, ["consumers.whisper.headers", "twice"]),
        ({"consumers.whisper.headers": {"X-Key": "a\r\nHost: b"}}, ["headers.X-Key", "one line"]),
        ({"consumers.whisper.headers": {"X-Key": "schl\u00fcssel"}}, ["headers.X-Key", "ASCII"]),
        ({"consumers.whisper.headers": {"X-Key": ""}}, ["headers.X-Key", "visible"]),
        ({"consumers.whisper.headers": {"X-Key": "${KEY_OF_NOBODY}"}}, ["headers.X-Key", "KEY_OF_NOBODY", "set it"]),
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
        ({"scheduling.policy": "lifo"}, ["scheduling.policy", "quantum, fifo"]),
        ({"scheduling.quantum_seconds": "long"}, ["scheduling.quantum_seconds", "or auto"]),
        ({"scheduling.quantum_seconds": 0}, ["scheduling.quantum_seconds", "more than 0"]),
        ({"scheduling.quantum_seconds": 900_000_000_000}, ["scheduling.quantum_seconds", "at most 86400"]),
        ({"routing.stt": []}, ["routing.stt", "a consumer's name, or {consumer: NAME", "[]"]),
        ({"routing.stt": " "}, ["routing.stt", "a consumer's name, or"]),
        ({"lease.min_hold_seconds": -1}, ["lease.min_hold_seconds", "0 seconds or more", "-1"]),
        ({"lease.quarantine_seconds": True}, ["lease.quarantine_seconds", "finite number"]),
        (
            {"scheduling.policy": "fifo", "scheduling.quantum_seconds": 30},
            ["scheduling.quantum_seconds needs scheduling.policy: quantum"],
        ),
        ({"scheduling.mode": "observe"}, ["scheduling.mode", "evicting, locked, passthrough"]),
        ({"gpu.when_unreadable": "believe"}, ["gpu.when_unreadable", "refuse, declared"]),
        ({"proxy.idle_timeout_seconds": 0}, ["proxy.idle_timeout_seconds", "more than 0"]),
        ({"proxy.stall_timeout_seconds": 200_000}, ["proxy.stall_timeout_seconds", "at most 86400"]),
        ({"proxy.timeout": 5}, ["proxy.timeout", "not a known key"]),
        ({"routing.video": "nobody"}, ["routing.video", "'nobody'", "comfyui, whisper"]),
        ({"routing.stt": {"priority": "batch"}}, ["routing.stt.consumer is missing", "write the consumer"]),
        (
            {"routing.stt": {"consumer": "whisper", "priority": "high"}},
            ["routing.stt.priority", "interactive, normal, batch"],
        ),
        ({"routing.stt": {"consumer": "whisper", "urgent": 1}}, ["routing.stt.urgent is not a known key"]),
        ({"routing.stt": {"consumer": "nobody"}}, ["routing.stt leads to 'nobody'"]),
        ({"consumers.whisper.headers": {"X-GPU-Priority": "batch"}}, ["consumers.whisper.headers", "remove it"]),
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
        ({"consumers.comfyui.vram_declared_mib": 9000}, ["vram_declared_mib is only read with", "auto"]),
        (
            {"consumers.comfyui.vram_resident_mib": "auto", "consumers.comfyui.vram_declared_mib": [1, 2]},
            ["vram_declared_mib lists 2 sizes for 1 GPUs"],
        ),
        ({"consumers.comfyui.gpus": []}, ["consumers.comfyui.gpus"]),
        ({"consumers.comfyui.gpus": [0, 0]}, ["consumers.comfyui.gpus", "twice"]),
        ({"consumers.comfyui.gpus": [-1]}, ["consumers.comfyui.gpus"]),
        ({"consumers.comfyui.max_concurrency": 0}, ["consumers.comfyui.max_concurrency"]),
        ({"consumers.comfyui.can_coexist_with": ["whisper"]}, ["can_coexist_with", "add comfyui to"]),
        ({"consumers.comfyui.can_coexist_with": ["nobody"]}, ["can_coexist_with", "'nobody'"]),
        ({"consumers.comfyui.can_coexist_with": ["comfyui"]}, ["can_coexist_with", "itself"]),
        (
            {"consumers.whisper.pinned": True, "consumers.whisper.idle_unload_seconds": 60},
            ["consumers.whisper.idle_unload_seconds", "pinned", "keep one"],
        ),
        ({"consumers.whisper.coexist": "size"}, ["consumers.whisper.coexist", "pairs, by_size"]),
        (
            {"consumers.whisper.coexist": "by_size", "consumers.whisper.vram_resident_mib": 0},
            ["consumers.whisper.coexist", "needs a size"],
        ),
        ({"consumers.whisper.pinned": "yes"}, ["consumers.whisper.pinned", "true or false"]),
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
        ({"consumers.comfyui.dialect": "koboldcpp"}, ["consumers.comfyui.dialect", "write preset: koboldcpp"]),
        ({"consumers.whisper.preset": "kobold"}, ["consumers.whisper.preset", "koboldcpp"]),
        ({"consumers.comfyui.preset": "a1111"}, ["consumers.comfyui.preset", "dialect: http"]),
        ({"consumers.whisper.unload.colour": 1}, ["consumers.whisper.unload.colour"]),
        ({"consumers.whisper.unload": {"for_each": {"path": "/l", "json": "m"}}}, ["unload", "without a path"]),
        ({"consumers.whisper.unload.for_each": {"path": "/l"}}, ["unload.for_each.json is missing"]),
        ({"consumers.whisper.load": {"path": "/l", "cuts_work": True}}, ["load.cuts_work belongs to unload"]),
        ({"consumers.whisper.load": {"path": "/l", "starts_service": True}}, ["starts_service", "dialect command"]),
        ({"consumers.whisper.unload.command": ["x"]}, ["consumers.whisper.unload.command", "dialect command"]),
        ({"consumers.whisper.busy": {"command": ["x"]}}, ["consumers.whisper.busy.command", "dialect command"]),
        ({"consumers.whisper.busy": {"json": "x"}}, ["consumers.whisper.busy.path is missing"]),
        ({"consumers.whisper.busy": {"path": "/b", "json": "x", "metrics": ["y"]}}, ["json and metrics"]),
        ({"consumers.whisper.busy": {"path": "/b", "json": "x", "above": 1, "below": 2}}, ["keep one"]),
        ({"consumers.whisper.busy": {"path": "/b", "metrics": ["y"], "equals": 1}}, ["above or below"]),
        ({"consumers.whisper.busy": {"path": "/b", "json": "x", "equals": [1]}}, ["busy.equals must be"]),
        ({"consumers.whisper.scope": "user"}, ["consumers.whisper.scope belongs to dialect systemd"]),
        ({"consumers.whisper.socket": "/x"}, ["consumers.whisper.socket belongs to dialect docker"]),
        ({"consumers.whisper.socket": "x"}, ["consumers.whisper.socket", "absolute path"]),
        ({"consumers.b": {"dialect": "systemd", "vram_resident_mib": 1}}, ["consumers.b.unit is missing"]),
        ({"consumers.b": {"dialect": "systemd", "vram_resident_mib": 1, "unit": "g.slice"}}, ["unit is missing"]),
        ({"consumers.b": {"dialect": "docker", "vram_resident_mib": 1}}, ["consumers.b.container is missing"]),
        (
            {"consumers.b": {"dialect": "docker", "vram_resident_mib": 1, "container": "c", "load": {"path": "/x"}}},
            ["consumers.b.load.path needs", "consumers.b.url"],
        ),
        (
            {"consumers.b": {"dialect": "command", "vram_resident_mib": 1, "unload": {"command": "ctl stop"}}},
            ["consumers.b.unload.command", "list", "no shell"],
        ),
        (
            {"consumers.b": {"dialect": "command", "vram_resident_mib": 1, "unload": {"command": ["./ctl"]}}},
            ["consumers.b.unload.command", "absolute path"],
        ),
        (
            {"consumers.b": {"dialect": "command", "vram_resident_mib": 1, "load": {"timeout_seconds": 1}}},
            ["consumers.b.load.command is missing"],
        ),
        (
            {"consumers.b": {"dialect": "command", "vram_resident_mib": 1, "busy": {"command": ["x"], "above": 1}}},
            ["consumers.b.busy", "exit code"],
        ),
        ({"consumers.b": {"dialect": "none", "vram_resident_mib": 1, "url": "http://a"}}, ["dialect none", "remove"]),
        ({"consumers.b": {"dialect": "none", "vram_resident_mib": 1, "max_concurrency": 2}}, ["must be 1"]),
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


@pytest.mark.parametrize(
    ("declared", "sizes"), [(None, (0, 0)), (9000, (9000, 9000)), ([9000, 500], (9000, 500)), (0, (0, 0))]
)
def test_a_size_that_is_learned(tmp_path: Path, declared: Any, sizes: tuple[int, ...]) -> None:
    keys = {"vram_resident_mib": "auto", "vram_declared_mib": declared, "gpus": [0, 1]}
    changes = {f"consumers.comfyui.{key}": value for key, value in keys.items() if value is not None}
    found = config.load_file(written(tmp_path, changes)).catalog.consumers["comfyui"]
    assert (found.auto, found.vram_resident_mib) == (True, sizes)
    assert (found.unsized, found.declared_mib) == ((True, ()) if declared is None else (False, sizes))


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


# -- access -------------------------------------------------------------------------------------------------

SECRET = "correct-horse-battery"  # noqa: S105 - it stands for one
OTHER = "staple-and-some-more-of-it"


def server_of(tmp_path: Path, changes: dict[str, Any], environ: dict[str, str] | None = None) -> config.ServerSettings:
    return config.load_file(written(tmp_path, changes), environ).server


@pytest.mark.parametrize(
    "bind", ["127.0.0.1:1", "127.8.9.1:1", "localhost:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "unix:/run/gpumgr/socket"]
)
def test_loopback_needs_no_tokens(tmp_path: Path, bind: str) -> None:
    assert server_of(tmp_path, {"server.bind": bind}).bind == bind


def test_a_trusted_network_is_declared(tmp_path: Path) -> None:
    assert server_of(tmp_path, {"server.bind": "0.0.0.0:1", "server.trusted_network": True}).trusted_network


def test_the_environment_does_not_open_the_door(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"GPUMGR_BIND 0\.0\.0\.0:1 can be reached"):
        server_of(tmp_path, {}, {"GPUMGR_BIND": "0.0.0.0:1"})


def test_off_is_off_as_yaml_reads_it(tmp_path: Path) -> None:
    file = written(tmp_path, {})
    file.write_text(file.read_text(encoding="utf-8") + "server: {auth: off}\n", encoding="utf-8")
    assert config.load_file(file).server.auth == "off"


def tokens_file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "tokens"
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def test_tokens_of_the_environment_and_of_the_file(tmp_path: Path) -> None:
    tokens_file(tmp_path, f"# who\n\n  me:operate:{OTHER}  \n", 0o400)
    changes = {"server.auth": "bearer", "server.bind": "0.0.0.0:1", "server.tokens_file": "tokens"}
    server = server_of(tmp_path, changes, {"GPUMGR_TOKENS": f"imagen:use:{SECRET},\n chat:use:{SECRET}:2,"})
    assert [(t.name, t.scope) for t in server.tokens] == [("imagen", "use"), ("chat", "use"), ("me", "operate")]
    assert server.tokens[1].digest == hashlib.sha256(f"{SECRET}:2".encode()).digest()
    assert SECRET not in repr(server)
    assert str(server.tokens[0].digest) not in repr(server)


@pytest.mark.parametrize(
    ("tokens", "word"),
    [
        ("", "no token"),
        (" ,\n", "no token"),
        (SECRET, "token 1 must be name:scope:secret"),
        (f":use:{SECRET}", "token 1 must be"),
        (f"a/b:use:{SECRET}", "token 1 must be"),
        (f"ok:use:{OTHER} me:{SECRET}", "token 2 (me) must have one of the scopes use, operate"),
        (f"me:admin:{SECRET}", "(me) must have one of the scopes use, operate"),
        (f"me:use:{SECRET[:15]}", "(me) has a secret of less than 16 characters"),
        ("me:use:", "(me) has a secret of less than 16 characters"),
        (f"me:use:{SECRET}\u00e9", "(me) has a secret with a space, a comma or what is not ASCII"),
        (f"me:use:{SECRET} me:operate:{OTHER}", "two tokens are named me"),
        (f"me:use:{SECRET} you:operate:{SECRET}", "has the secret of another one"),
    ],
)
def test_tokens_that_are_none(tmp_path: Path, tokens: str, word: str) -> None:
    with pytest.raises(config.ConfigError) as caught:
        server_of(tmp_path, {"server.auth": "bearer"}, {"GPUMGR_TOKENS": tokens})
    assert word in str(caught.value)
    assert SECRET[:15] not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("environ", [{"GPUMGR_TOKENS": f"me:use:{SECRET}"}, {}])
def test_tokens_that_nobody_would_ask_for(tmp_path: Path, environ: dict[str, str]) -> None:
    tokens_file(tmp_path, f"me:use:{SECRET}")
    changes: dict[str, Any] = {} if environ else {"server.tokens_file": "tokens"}
    with pytest.raises(config.ConfigError, match=r"server\.auth is off, but there are tokens"):
        server_of(tmp_path, changes, environ)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o700, 0o4600])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    tokens_file(tmp_path, f"me:use:{SECRET}", mode)
    changes = {"server.auth": "bearer", "server.tokens_file": "tokens"}
    assert "chmod 600" in refusal(written(tmp_path, changes))


@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "binary"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "tokens"
    if kind == "directory":
        file.mkdir(mode=0o600)
    elif kind == "pipe":
        os.mkfifo(file, 0o600)
    elif kind == "binary":
        tokens_file(tmp_path, "")
        file.write_bytes(b"me:use:\xff")
    else:
        file = Path("/dev/null")
    sentence = refusal(written(tmp_path, {"server.auth": "bearer", "server.tokens_file": str(file)}))
    assert "server.tokens_file" in sentence


def test_somebody_elses_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_file(tmp_path, f"me:use:{SECRET}")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        os.chown(tmp_path / "tokens", 12345, 12345)
    changes = {"server.auth": "bearer", "server.tokens_file": "tokens"}
    assert "belongs to another user" in refusal(written(tmp_path, changes))


def test_a_consumers_key_comes_from_the_environment(tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer ${KEY}", "X-Plain": "a $5 {b}"}
    file = written(tmp_path, {"consumers.whisper.headers": headers})
    whisper = config.load_file(file, {"KEY": SECRET}).consumers["whisper"]
    assert whisper.headers == (("Authorization", f"Bearer {SECRET}"), ("X-Plain", "a $5 {b}"))
    assert SECRET not in repr(whisper)


def test_a_key_that_is_more_than_one_line_is_refused_and_not_shown(tmp_path: Path) -> None:
    file = written(tmp_path, {"consumers.whisper.headers": {"X-Key": "${KEY}"}})
    with pytest.raises(config.ConfigError, match=r"headers\.X-Key must be visible ASCII") as caught:
        config.load_file(file, {"KEY": f"{SECRET}\n"})
    assert SECRET not in str(caught.value)


def test_names_and_origins_are_compared_as_browsers_write_them(tmp_path: Path) -> None:
    changes = {
        "server.allowed_hosts": ["GPU.Home.Example."],
        "server.allowed_origins": ["https://Page.Example", "http://[::1]:3000"],
    }
    server = server_of(tmp_path, changes)
    assert server.allowed_hosts == {"gpu.home.example"}
    assert server.allowed_origins == {("https", "page.example", 443), ("http", "::1", 3000)}


def test_a_service_whose_work_an_unload_would_cut_unseen_is_warned_of(tmp_path: Path) -> None:
    tabby = {"preset": "tabbyapi", "url": "http://127.0.0.1:5000", "vram_resident_mib": 9000}
    settings = config.load_file(written(tmp_path, {"consumers.tabby": tabby, "routing.llm": "tabby"}))
    assert settings.consumers["tabby"].dialect == "http"
    (warning,) = [w for w in settings.warnings if "tabby" in w]
    assert "no busy report, and its unload cuts what runs" in warning


@pytest.mark.parametrize("mode", ["evicting", "locked", "passthrough"])
def test_a_quantum_where_nobody_is_unloaded_is_warned_of(tmp_path: Path, mode: str) -> None:
    changes = {"scheduling.mode": mode, "scheduling.quantum_seconds": 60}
    found = config.load_file(written(tmp_path, changes)).warnings
    assert ["quantum_seconds changes nothing" in warning for warning in found] == [True] * (mode != "evicting")


def test_what_stays_of_vllm_is_more_than_of_others(tmp_path: Path) -> None:
    vllm = {"dialect": "vllm", "url": "http://127.0.0.1:8000", "vram_resident_mib": 9000}
    assert config.load_file(written(tmp_path, {"consumers.v": vllm})).catalog.consumers["v"].residual_mib == 1536


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", str(ROOT / "config" / "consumers.yaml")]) == 0
    assert "ok. 4 consumers" in capsys.readouterr().out
    assert cli.main(["check-config", str(written(tmp_path, {"consumers.whisper.unload": None}))]) == 0
    assert "warning: consumers.whisper has no unload call" in capsys.readouterr().out
    assert cli.main(["check-config", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
