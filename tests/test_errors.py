"""The errors are the table of docs/api.md, and the same class on both sides of the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask import Flask

from gpumgr import errors
from gpumgr.errors import GpumgrError, InsufficientVram, by_code, from_wire
from gpumgr.web.problems import respond

TABLE = {
    "invalid_request": (400, False),
    "unauthorized": (401, False),
    "forbidden": (403, False),
    "host_not_allowed": (421, False),
    "kind_unknown": (404, False),
    "consumer_unknown": (404, False),
    "lease_unknown": (404, False),
    "not_found": (404, False),
    "method_not_allowed": (405, False),
    "request_mismatch": (409, False),
    "request_ended": (409, False),
    "lease_mismatch": (409, False),
    "upstream_unreachable": (502, True),
    "upstream_timeout": (504, True),
    "payload_too_large": (413, False),
    "unsupported_media_type": (415, False),
    "queue_full": (503, True),
    "scheduler_timeout": (503, True),
    "prepare_timeout": (503, True),
    "insufficient_vram": (503, False),
    "eviction_failed": (503, True),
    "consumer_unhealthy": (503, True),
    "gpu_unreadable": (503, True),
    "store_unavailable": (503, True),
    "gpu_yielded": (503, True),
    "shutting_down": (503, True),
}
"""code → status, retryable."""
NOT_PROMISED = {"internal_error": (500, False)}
"""A defect of gpumgr, in the same shape; the table names what callers may rely on."""
DETAILS: dict[str, Any] = {
    "needed_mib": 14000,
    "untracked": [{"pid": 1, "name": "game.exe", "used_mib": None}],
    "evicted": [],
    "share": 0.5,
}


def test_there_are_the_codes_of_the_table_and_no_others() -> None:
    found = {code: (cls.status, cls.retryable) for code, cls in by_code().items()}
    assert found == TABLE | NOT_PROMISED


def test_every_class_is_a_code_or_a_family() -> None:
    named = set(by_code().values())
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, GpumgrError)}
    families = {cls for cls in classes if cls.__subclasses__()}
    assert classes == named | families
    assert named.isdisjoint(families)  # who catches a family catches codes, and a code is no family


@pytest.mark.parametrize("code", TABLE | NOT_PROMISED)
def test_an_error_survives_the_wire(code: str) -> None:
    cls = by_code()[code]
    sent = cls("what to do next", **DETAILS)
    came = from_wire(json.loads(json.dumps(sent.to_wire())))
    assert type(came) is cls
    assert came is not None
    assert (came.code, came.message, str(came), came.details) == (code, "what to do next", "what to do next", DETAILS)
    assert came.to_wire() == sent.to_wire()


@pytest.mark.parametrize("code", TABLE | NOT_PROMISED)
def test_the_shape_on_the_wire(code: str) -> None:
    status, retryable = (TABLE | NOT_PROMISED)[code]
    error = by_code()[code]("words", needed_mib=1)
    assert error.to_wire() == {
        "error": {
            "code": code,
            "message": "words",
            "type": "gpumgr_error",
            "retryable": retryable,
            "details": {"needed_mib": 1},
        }
    }
    with Flask("it").app_context():
        answer = respond(error)
    assert answer.status_code == status
    assert answer.mimetype == "application/json"
    if retryable:
        assert int(answer.headers["Retry-After"]) >= 1
        assert "x-should-retry" not in answer.headers
    else:
        assert answer.headers["x-should-retry"] == "false"
        assert "Retry-After" not in answer.headers


def test_without_details_there_is_an_empty_object() -> None:
    assert InsufficientVram("words").to_wire()["error"]["details"] == {}


def test_details_are_each_errors_own() -> None:
    first, second = InsufficientVram("a", n=1), InsufficientVram("b")
    assert (first.details, second.details) == ({"n": 1}, {})


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "error",
        {},
        {"error": None},
        {"error": "model not found"},
        {"error": {"code": "insufficient_vram", "message": "another server's"}},
        {"error": {"code": "insufficient_vram", "type": "invalid_request_error"}},
        {"token": "t", "lease_id": "l"},
    ],
)
def test_what_is_not_gpumgrs_own_is_no_error_of_it(body: object) -> None:
    assert from_wire(body) is None


@pytest.mark.parametrize("code", ["quantum_over", None, 7, "gpumgr_error"])
def test_an_unknown_code_is_the_root(code: object) -> None:
    """A newer broker's: caught by ``except GpumgrError``, with its words."""
    came = from_wire({"error": {"type": "gpumgr_error", "code": code, "message": "words", "details": {"n": 1}}})
    assert type(came) is GpumgrError
    assert (came.message, came.details) == ("words", {"n": 1})


@pytest.mark.parametrize("details", [None, [], "x", 7])
def test_details_of_another_type_are_none(details: object) -> None:
    came = from_wire({"error": {"type": "gpumgr_error", "code": "queue_full", "details": details}})
    assert came is not None
    assert (came.message, came.details) == ("", {})


# Details are keyword arguments of the error's class, whose own parameters have names too.
@pytest.mark.parametrize("name", ["message", "self"])
def test_details_may_have_any_name(name: str) -> None:
    came = from_wire({"error": {"type": "gpumgr_error", "code": "queue_full", "message": "m", "details": {name: 1}}})
    assert came is not None
    assert (came.message, came.details) == ("m", {name: 1})
