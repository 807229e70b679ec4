from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from gpumgr.web.answer import Answer


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Each ``send`` is a packet of its own for the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(5.0)
    with ours, theirs:
        yield ours, theirs


def answer(sock: socket.socket, *headers: tuple[str, str]) -> Answer:
    request = SimpleNamespace(version=(1, 1), method="GET", should_close=lambda: False)
    made = Answer(request, sock, None)
    made.start_response("200 OK", list(headers))
    return made


def test_the_head_and_the_first_piece_are_one_packet(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    made = answer(ours, ("Content-Length", "8"))
    made.write(b"body")
    head, _, body = theirs.recv(4096).partition(b"\r\n\r\n")
    assert (head[:15], body) == (b"HTTP/1.1 200 OK", b"body")
    made.write(b"more")
    assert theirs.recv(4096) == b"more"


def test_a_piece_of_a_stream_does_not_wait_for_the_next(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    made = answer(ours)
    made.write(b"first")
    assert theirs.recv(4096).endswith(b"\r\n\r\n5\r\nfirst\r\n")
    made.close()
    assert theirs.recv(4096) == b"0\r\n\r\n"


def test_an_answer_without_a_body_has_its_head(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    answer(ours, ("Content-Length", "0")).close()
    assert theirs.recv(4096).endswith(b"\r\n\r\n")
