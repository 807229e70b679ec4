"""A crowd of callers in a process of its own, so that their work is not in the way of whoever measures.

Owns: many sockets that do one thing together. Must not: measure.

``python -m bench.crowd PORT COUNT WHAT``: ``acquire`` connects and sends an acquire, ``idle`` connects and says
nothing, ``linger`` says ``Connection: close``, reads the answer and keeps its own end open. It says ``ready``, connects
when there is a line on stdin, says ``begun``, and keeps every socket until stdin ends. Then a JSON line says how many
answers of each status came.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections import Counter

from bench.rig import allow_open_files

ACQUIRE = json.dumps({"consumer": "mvoice", "wait_seconds": 600}).encode()
SAID = {
    "acquire": b"POST /v1/lease HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(ACQUIRE), ACQUIRE),
    "idle": b"",
    "linger": b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
}


class Crowd:
    def __init__(self, port: int, count: int, said: bytes) -> None:
        self._said = said
        self._epoll = select.epoll()
        self._callers: dict[int, socket.socket] = {}
        self.answers: Counter[int] = Counter()
        for _ in range(count):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            self._callers[sock.fileno()] = sock
            self._epoll.register(sock, select.EPOLLOUT)

    def until(self, ending: int) -> None:
        """Speak as soon as connected, read what comes, until there is something to read from ``ending``."""
        self._epoll.register(ending, select.EPOLLIN)
        while True:
            for fd, event in self._epoll.poll():
                if fd == ending:
                    return
                self._serve(fd, event)

    def _serve(self, fd: int, event: int) -> None:
        if event & select.EPOLLOUT:
            self._callers[fd].send(self._said)
            self._epoll.modify(fd, select.EPOLLIN)
        elif piece := self._callers[fd].recv(65536):
            self._note(piece)
        else:
            self._epoll.unregister(fd)  # the other end is closed; this one stays open

    def _note(self, piece: bytes) -> None:
        if piece.startswith(b"HTTP/1.1 "):  # the body may come by itself
            self.answers[int(piece.split(b" ", 2)[1])] += 1


def main() -> None:
    port, count, what = sys.argv[1:]
    allow_open_files()
    print("ready", flush=True)
    sys.stdin.readline()
    crowd = Crowd(int(port), int(count), SAID[what])
    print("begun", flush=True)
    crowd.until(sys.stdin.fileno())
    print(json.dumps(crowd.answers), flush=True)


if __name__ == "__main__":
    main()
