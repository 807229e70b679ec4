"""A setting, error, call or command that is not documented fails here."""

from __future__ import annotations

import re

import pytest

from gpumgr import config, errors
from gpumgr.adapters.dialects import REGISTERED
from gpumgr.config.presets import presets
from gpumgr.core.queue import WaitingFor
from gpumgr.web.problems import ROUTES
from gpumgr.wiring import build
from tests.brokers import ROOT

API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "config" / "consumers.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", sorted(errors.by_code()))
def test_every_error_has_its_row(code: str) -> None:
    row = next(line for line in API.splitlines() if line.startswith("|") and f"`{code}`" in line.split("|")[1])
    cls = errors.by_code()[code]
    codes = re.findall(r"`(\w+)`", row.split("|")[1])
    statuses = re.findall(r"\d+", row.split("|")[2])
    assert int(statuses[-1] if len(statuses) == 1 else statuses[codes.index(code)]) == cls.status
    assert row.split("|")[3].strip() == ("yes" if cls.retryable else "no")


@pytest.mark.parametrize(
    "key",
    [
        *("bind", "threads", "reserved_threads", "state_dir", "probe", "simulated_card", "headroom_mib"),
        *("when_unreadable", "min_ttl_seconds", "max_ttl_seconds", "default_ttl_seconds", "default_wait_seconds"),
        *(
            "max_wait_seconds",
            "max_prepare_seconds",
            "policy",
            "quantum_seconds",
            "consumer",
            "priority",
            "mode",
            "connect_timeout_seconds",
            "idle_timeout_seconds",
            "stall_timeout_seconds",
            "dialect",
            "url",
            "public_url",
            "gpus",
        ),
        *("vram_resident_mib", "residual_mib", "can_coexist_with", "max_concurrency", "processes", "health", "busy"),
        *(
            "unit",
            "container",
            "on_expiry",
            "max_hold_seconds",
            "min_hold_seconds",
            "confirm_seconds",
            "quarantine_seconds",
        ),
        *("auth", "trusted_network", "tokens_file", "allowed_hosts", "allowed_origins", "headers"),
        *("unload", "load", "loaded", "proxy_path", "untracked_peak_seconds", "yield_to", "yield_reserve_mib"),
        *("yield_gpus", "idle_unload_seconds", "restore", "restore_after_seconds", "preload", "vram_declared_mib"),
        *("pinned", "coexist", "proxy_free_paths", "preset", "scope", "socket", "command", "metrics"),
        *("above", "below", "equals", "not_equals", "for_each", "cuts_work", "starts_service"),
    ],
)
def test_every_key_is_in_the_reference(key: str) -> None:
    assert re.search(rf"(^|[\s{{#]){key}:", REFERENCE, re.MULTILINE)


def test_the_list_above_is_every_key_there_is() -> None:
    source = (ROOT / "gpumgr" / "config" / "load.py").read_text(encoding="utf-8")
    taken = set(re.findall(r'(?:take|need|has|_call|_report)\((?:section, )?"(\w+)"', source))
    of_calls = {"method", "path", "json", "timeout_seconds"}
    listed = set(test_every_key_is_in_the_reference.pytestmark[0].args[1])  # type: ignore[attr-defined]
    assert taken - of_calls - {"consumers"} == listed


def test_every_route_is_documented() -> None:
    app = build(config.load_file(ROOT / "config" / "consumers.yaml"))
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        assert path in API, f"{path} is not in docs/api.md"
        assert any(route.endswith(f" {path}") for route in ROUTES), f"{path} is not among what a 404 lists"


@pytest.mark.parametrize("reason", list(WaitingFor))
def test_every_reason_to_wait_is_documented(reason: WaitingFor) -> None:
    assert f"`{reason.value}`" in API


def test_tests_that_the_pages_name_exist() -> None:
    named = re.findall(
        r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    )
    assert len(named) > 20
    for file, test in named:
        assert f"def {test or 'test_'}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|    )make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_dialect_and_preset_has_its_row() -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    rows = [re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) for part in page.split("## Presets")]
    assert [sorted(part) for part in rows] == [sorted(["dialect", *REGISTERED]), sorted(["preset", *presets()])]
