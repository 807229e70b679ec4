"""The kernel's two ways of telling who listens agree, and the second one serves where there is no first."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gpumgr.adapters import listeners
from gpumgr.adapters.listeners import listening


@pytest.fixture
def servers() -> Iterator[dict[int, int]]:
    """Port by inode. Enough of them that the kernel needs more than one message, beside a connection, which is none."""
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(300)]
        if socket.has_ipv6:
            opened.append(stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6)))
        stack.enter_context(socket.create_connection(opened[0].getsockname()))
        yield {inode_of(server): server.getsockname()[1] for server in opened}


def inode_of(server: socket.socket) -> int:
    return os.fstat(server.fileno()).st_ino


def test_everyone_who_listens_is_told_once(servers: dict[int, int]) -> None:
    told = list(listening())
    assert servers.items() <= set(told)
    assert len(told) == len(set(told))
    ours = {port for inode, port in told if inode in servers}
    assert ours == set(servers.values()), "the connection's end of the same port is no listener"


def test_a_kernel_without_sock_diag_is_read_from_proc(servers: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "_SOCK_DIAG", 31)  # no protocol of netlink has this number
    assert servers.items() <= set(listening())
