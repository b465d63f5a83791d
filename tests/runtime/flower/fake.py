"""A SuperLink in this process that answers as it is told to."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedlean.runtime.flower.objects import Packed, in_order, pack
from fedlean.runtime.flower.protobufs import protobufs

NODE_ID, RUN_ID = 77, 5
# Takes an answer's bytes; returns other bytes, an HTTP status (with a JSON body), or None: hang up.
Tamper = Callable[[bytes], Any]


class FakeSuperLink:
    """`inbox`: contents of messages to come.  `replies`: (Message, object bytes by name)."""

    def __init__(self) -> None:
        self.protos = protobufs()
        self.inbox: list[Packed] = []
        self.objects: dict[str, bytes] = {}
        self.replies: list[tuple[Any, dict[str, bytes]]] = []
        self.asked: list[str] = []
        self.tamper: dict[str, Tamper] = {}
        self.port = 0
        self.clock_seconds = 0.0  # its clock minus this machine's

    def send(self, content: Packed) -> None:
        self.inbox.append(content)

    def answer(self, endpoint: str, body: bytes) -> bytes:
        """As a SuperLink would."""
        fleet, message = self.protos.fleet, self.protos.message
        if endpoint == "register-node":
            return fleet.RegisterNodeFleetResponse(node_id=NODE_ID).SerializeToString()
        if endpoint == "activate-node":
            return fleet.ActivateNodeResponse(node_id=NODE_ID).SerializeToString()
        if endpoint == "send-node-heartbeat":
            return self.protos.heartbeat.SendNodeHeartbeatResponse(success=True).SerializeToString()
        if endpoint == "pull-messages":
            return self._next_message()
        if endpoint == "pull-object":
            name = message.PullObjectRequest.FromString(body).object_id
            content = self.objects.get(name)
            return message.PullObjectResponse(
                object_found=content is not None,
                object_available=bool(content),
                object_content=content or b"",
            ).SerializeToString()
        if endpoint == "push-messages":
            request = fleet.PushMessagesRequest.FromString(body)
            names = list(_names(request.message_object_trees[0]))
            held = self.replies[-1][1] if self.replies else {}
            self.replies.append((request.messages_list[0], dict(held)))
            missing = [name for name in dict.fromkeys(names) if name not in held]
            return fleet.PushMessagesResponse(
                objects_to_push=missing, session_id="s"
            ).SerializeToString()
        if endpoint == "push-object":
            request = message.PushObjectRequest.FromString(body)
            held = self.replies[-1][1]
            pending = request.object_id not in held
            held[request.object_id] = request.object_content
            return message.PushObjectResponse(stored=pending).SerializeToString()
        return b""

    def _next_message(self) -> bytes:
        answer = self.protos.fleet.PullMessagesResponse()
        if self.inbox:
            content = self.inbox.pop(0)
            about = self.protos.message.Metadata(
                run_id=RUN_ID,
                src_node_id=1,
                dst_node_id=NODE_ID,
                group_id="3",
                ttl=100,
                message_type="train",
                created_at=time.time() + self.clock_seconds,
            )
            body = self.protos.message.Message(metadata=about).SerializeToString(deterministic=True)
            whole = pack("Message", body, (content,))
            self.objects |= {each.id: each.head + bytes(each.body) for each in in_order(whole)}
            about.message_id = whole.id
            answer.messages_list.add(metadata=about)
            answer.message_object_trees.append(self._tree(whole))
        return answer.SerializeToString()

    def _tree(self, packed: Packed) -> Any:
        children = [self._tree(child) for child in packed.children]
        return self.protos.message.ObjectTree(object_id=packed.id, children=children)


def _names(tree: Any) -> Iterator[str]:
    for child in tree.children:
        yield from _names(child)
    yield tree.object_id


@contextmanager
def serving(
    fake: FakeSuperLink, port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[FakeSuperLink]:
    """Listens at fake.port, with TLS where `tls` is given.

    Handlers that hang are left to their daemon threads.
    """
    stopping = threading.Event()
    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            endpoint = self.path.rpartition("/")[2]
            fake.asked.append(endpoint)
            answer: Any = fake.answer(endpoint, body)
            if endpoint in fake.tamper:
                answer = fake.tamper[endpoint](answer)
            if callable(answer):
                answer(self, stopping)
                self.close_connection = True
            elif answer is None:
                self.close_connection = True
            else:
                status, raw = answer if isinstance(answer, tuple) else (200, answer)
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + fake.clock_seconds)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    fake.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        stopping.set()
        server.shutdown()
        server.server_close()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(10)
