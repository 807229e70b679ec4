"""Which calls need no GPU: the syntax, the presets, and that no way of writing a path makes another one free."""

from __future__ import annotations

import pytest

from gpumgr.adapters.upstream import upstream_of
from gpumgr.config import ConsumerSettings
from gpumgr.config.free_paths import FreePath, free_path, is_free
from gpumgr.web import passing

COMFYUI = upstream_of(ConsumerSettings("comfyui", "comfyui", "http://127.0.0.1:8188"))
OLLAMA = upstream_of(ConsumerSettings("ollama", "ollama", "http://127.0.0.1:11434/base"))
GPU = upstream_of(ConsumerSettings("mvoice", "http", "http://127.0.0.1:8001"))
CYCLE = (
    *("GET /history", "GET /history/6b1f-4", "HEAD /history/6b1f-4", "GET /view", "POST /upload/image"),
    *("POST /upload/mask", "GET /queue", "POST /queue", "GET /system_stats", "GET /object_info", "GET /prompt"),
    *("GET /object_info/KSampler", "GET /object_info/KSampler%20(Efficient)", "POST /interrupt", "GET /models"),
    *("GET /models/loras", "GET /embeddings"),
)


@pytest.mark.parametrize("call", CYCLE)
@pytest.mark.parametrize("before", ["", "/api"])
def test_the_cycle_of_comfyui_is_free(call: str, before: str) -> None:
    method, path = call.split(" ")
    assert is_free(COMFYUI.free_paths, method, before + path)


@pytest.mark.parametrize(
    "call", ["GET /api/tags", "GET /api/ps", "HEAD /api/version", "POST /api/show", "GET /v1/models"]
)
def test_questions_to_ollama_are_free(call: str) -> None:
    assert is_free(OLLAMA.free_paths, *call.split(" "))


def test_a_plain_service_has_none_unless_the_file_says_so() -> None:
    assert GPU.free_paths == ()
    written = (FreePath("GET", "/voices"),)
    of_file = ConsumerSettings("x", "comfyui", "http://127.0.0.1:1", proxy_free_paths=written)
    assert upstream_of(of_file).free_paths == written
    none = ConsumerSettings("x", "comfyui", "http://127.0.0.1:1", proxy_free_paths=())
    assert upstream_of(none).free_paths == ()


@pytest.mark.parametrize(
    "call",
    [
        *("POST /prompt", "POST /api/prompt", "PUT /queue", "DELETE /history", "POST /history", "POST /free"),
        *("GET /", "GET /upload/image", "POST /view", "get /view", "GET /VIEW", "GET /View", "GET /userdata/x"),
        # other ways to the same or another route
        *("GET /view/../prompt", "GET /history/../prompt", "GET /history/x/../../prompt", "GET /history/..", "GET /."),
        *(
            "GET /history/%2e%2e/prompt",
            "GET /history/%2E%2E%2Fprompt",
            "GET /history/.%2e/prompt",
            "GET /history/..;/x",
        ),
        *(
            "GET /history/%252e%252e/prompt",
            "GET /history/a%2fb",
            "GET /history/a%5c..%5cprompt",
            "GET /history/\\..\\x",
        ),
        *("GET //history/x", "GET /history//x", "GET /history/", "GET /view/", "GET //view", "GET /./view"),
        *("GET /history/x;/../y", "GET /history/x%3b", "GET /history/x%00", "GET /history/x%0a", "GET /history/%ff"),
        *("GET /history/%c0%af..%c0%afprompt", "GET /history/\xc0\xaf", "GET /history/x%3fy", "GET /history/x%23y"),
        *("GET /history/..%20/prompt", "GET /history/.%20", "GET /history/%", "GET /history/%2", "GET /%76iew"),
        *(
            "GET /viewx",
            "GET /historyx/1",
            "GET view",
            "GET ",
            "GET /history/a b",
            "GET /api/api/view",
            "GET /Api/view",
        ),
    ],
)
def test_what_needs_the_gpu_or_can_be_read_in_two_ways_is_not(call: str) -> None:
    method, _, path = call.partition(" ")
    assert not is_free(COMFYUI.free_paths, method, path)


@pytest.mark.parametrize(
    ("target", "header", "free"),
    [
        ("/base/api/tags", "", True),
        ("/base/api/tags?x=/../chat", "", True),
        ("/base/api/tags", "HTTP_X_HTTP_METHOD_OVERRIDE", False),
        ("/base/api/tags", "HTTP_X_METHOD_OVERRIDE", False),
        ("/base/base/api/tags", "", False),
    ],
)
def test_what_is_compared_is_what_is_sent(target: str, header: str, free: bool) -> None:
    environ = {"REQUEST_METHOD": "GET"} | ({header: "POST"} if header else {})
    assert passing.needs_no_turn(environ, target, OLLAMA) is free


@pytest.mark.parametrize("written", ["GET /a", "GET /a/*", "POST /a/b-c", "GET /", "GET /*", "M-SEARCH /a"])
def test_the_syntax(written: str) -> None:
    if written.startswith("M-"):
        with pytest.raises(ValueError, match="such as GET"):
            free_path(written)
    else:
        assert str(free_path(written)) == written


@pytest.mark.parametrize(
    "written",
    ["/a", "GET", "GET a", "get /a", "HEAD /a", "GET /a?b", "GET /a/*/b", "GET /a*", "GET /a/", "GET //a", "GET /../a"],
)
def test_what_cannot_be_written(written: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        free_path(written)
