"""An HTTP proxy in this process that knows CONNECT only."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HOST = "127.0.0.1"
CREDENTIALS_WANTED = b'HTTP/1.1 407 Who?\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n'


class ConnectProxy:
    """Every target is on this machine, whatever its name.

    wants: the Proxy-Authorization that it lets in; None: anybody.  answer: what everybody gets
    before it hangs up; None: a tunnel.  asked: targets and the authorizations that came with them.
    """

    def __init__(self, *, wants: str | None = None, answer: bytes | None = None) -> None:
        self.wants, self.answer, self.port = wants, answer, 0
        self.asked: list[tuple[str, str | None]] = []
        self._sockets: list[socket.socket] = []

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[ConnectProxy]:
        """Listens at self.port."""
        with socket.create_server((HOST, port)) as listener:
            self.port = listener.getsockname()[1]
            thread = threading.Thread(target=self._accept, args=[listener], daemon=True)
            thread.start()
            try:
                yield self
            finally:
                for each in [listener, *self._sockets]:
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
                thread.join(10)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was shut down
            while True:
                client, _ = listener.accept()
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            first, *lines = head.decode("ascii").split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines if line)
            method, target, version = first.split()
            assert (method, version, headers["Host"]) == ("CONNECT", "HTTP/1.1", target)
            self.asked.append((target, headers.get("Proxy-Authorization")))
            answer = self.answer
            if self.wants not in (None, headers.get("Proxy-Authorization")):
                answer = CREDENTIALS_WANTED
            if answer is not None:
                client.sendall(answer)
                return
            with socket.create_connection((HOST, int(target.rpartition(":")[2]))) as server:
                self._sockets.append(server)
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: here\r\n\r\n")
                back = threading.Thread(target=_copy, args=[server, client], daemon=True)
                back.start()
                _copy(client, server)
                back.join(10)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
