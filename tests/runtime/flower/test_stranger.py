"""A port that is no SuperLink ends a node with the reason; a SuperLink that is away is waited for.

Each stranger is one that operators meet: a TLS port without TLS and the other way round, a foreign
certificate, another service, an older SuperLink.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed", allow_module_level=True)

from runtime.flower.fake import NODE_ID, FakeSuperLink, serving
from runtime.flower.stock import make_certificates, make_key
from runtime.flower.tunnel import ConnectProxy

from fedlean.runtime.flower import calls
from fedlean.runtime.flower.address import Address
from fedlean.runtime.flower.channel import Away, delays
from fedlean.runtime.flower.proxy import Proxy
from fedlean.runtime.flower.superlink import LinkError, SuperLink

SECONDS = 8.0  # within which a stranger is told; a SuperLink that is away is waited for longer
Serve = Callable[[socket.socket], None]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """Of localhost and 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.fixture(autouse=True)
def swift(monkeypatch):
    """Waits of milliseconds between tries."""
    monkeypatch.setattr(calls, "delays", lambda: delays(0.05, 0.1))


def secured(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


def link_to(port: int, host: str = "localhost", **settings: Any) -> SuperLink:
    """A node that waits for a SuperLink longer than a test may take; without TLS."""
    defaults = {"root_certificates": None, "patience_seconds": SECONDS, "say": str}
    return SuperLink(
        f"{host}:{port}", key=None, insecure=True, limit_bytes=1 << 20, **(defaults | settings)
    )


def ended(link: SuperLink) -> str:
    """Why it ended, without waiting."""
    began = time.monotonic()
    with pytest.raises(LinkError) as caught:
        link.activate()
    link.close()
    assert not caught.value.retry, f"it would be waited for: {caught.value}"
    assert time.monotonic() - began < SECONDS
    assert str(caught.value).isprintable()
    return str(caught.value)


def waited_for(link: SuperLink) -> str:
    """The last failure of a port that is tried again and again."""
    with pytest.raises(Away) as caught:
        link.activate()
    link.close()
    return str(caught.value)


@contextmanager
def listening(serve: Serve) -> Iterator[int]:
    """A port at which every connection is given to `serve`, one after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connected, _ = listener.accept()
                    with connected, suppress(OSError):
                        connected.settimeout(5)
                        serve(connected)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def saying(answer: bytes) -> Serve:
    """A service that greets."""

    def serve(connected: socket.socket) -> None:
        connected.sendall(answer)
        connected.shutdown(socket.SHUT_WR)
        while connected.recv(1 << 16):
            pass

    return serve


def within_tls(folder: Path, serve: Serve, protocols: tuple[str, ...] = ()) -> Serve:
    """protocols: that it demands one of, as gRPC does."""
    context = secured(folder)
    if protocols:
        context.set_alpn_protocols(list(protocols))

    def within(connected: socket.socket) -> None:
        with context.wrap_socket(connected, server_side=True) as inner:
            if not protocols or inner.selected_alpn_protocol():
                serve(inner)

    return within


def hanging_up(connected: socket.socket) -> None:
    connected.recv(1 << 16)


def resetting(connected: socket.socket) -> None:
    connected.recv(1 << 16)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def alerting(connected: socket.socket) -> None:
    """A TLS end that answers what is no TLS with an alert, as rustls and Go do."""
    if connected.recv(1) != b"\x16":
        connected.sendall(b"\x15\x03\x01\x00\x02\x02\x46")
    connected.sendall(b"\x15\x03\x01\x00\x02\x02\x28")


def nginx(folder: Path) -> Serve:
    """A TLS port that answers what is no TLS with HTTP."""
    context = secured(folder)

    def serve(connected: socket.socket) -> None:
        if connected.recv(1, socket.MSG_PEEK) == b"\x16":
            context.wrap_socket(connected, server_side=True).close()
        else:
            connected.recv(1 << 16)
            connected.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    return serve


def test_without_tls_at_a_tls_port(certificates):
    with serving(FakeSuperLink(), tls=secured(certificates)) as fake:
        assert "speaks TLS: give --tls-ca" in ended(link_to(fake.port))
        assert not fake.asked


@pytest.mark.parametrize("kind", ["alert", "bad request", "reset"])
def test_without_tls_at_tls_ports_of_other_makes(certificates, kind):
    def reset(connected: socket.socket) -> None:
        if connected.recv(1, socket.MSG_PEEK) == b"\x16":
            secured(certificates).wrap_socket(connected, server_side=True).close()
        else:
            resetting(connected)

    serve = {"alert": alerting, "bad request": nginx(certificates), "reset": reset}[kind]
    with listening(serve) as port:
        assert "speaks TLS: give --tls-ca" in ended(link_to(port))


def test_with_tls_at_a_port_without(certificates):
    with serving(FakeSuperLink()) as fake:
        link = link_to(fake.port, root_certificates=certificates / "ca.crt", timeout_seconds=1)
        assert "answers without TLS" in ended(link)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_with_tls_at_ports_without_of_other_makes(certificates, answer):
    """What a client's TLS is answered with, if anything; None: it waits for the rest."""

    def serve(connected: socket.socket) -> None:
        begin = connected.recv(1 << 16)
        if begin.startswith(b"HEAD "):
            connected.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")
        elif answer is None:
            connected.recv(1 << 16)
        else:
            connected.sendall(answer)

    with listening(serve) as port:
        link = link_to(port, root_certificates=certificates / "ca.crt", timeout_seconds=1)
        assert "answers without TLS" in ended(link)


def test_a_foreign_authority(certificates, tmp_path):
    make_certificates(tmp_path)
    with serving(FakeSuperLink(), tls=secured(certificates)) as fake:
        why = ended(link_to(fake.port, root_certificates=tmp_path / "ca.crt"))
        assert "not to be trusted" in why and "give as --tls-ca" in why


@pytest.mark.parametrize(
    ("made", "host", "says"),
    [
        ({"hours": -1}, "localhost", r"has expired: renew it, or set this device's clock"),
        ({"name": "board.example"}, "localhost", "a name that is in the certificate"),
    ],
)
def test_certificates_that_do_not_fit(tmp_path, made, host, says):
    make_certificates(tmp_path, **made)
    with serving(FakeSuperLink(), tls=secured(tmp_path)) as fake:
        why = ended(link_to(fake.port, host, root_certificates=tmp_path / "ca.crt"))
        assert says in why and f"{host}:{fake.port}" in why
        assert not fake.asked


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"SSH-2.0-OpenSSH_9.6\x1b[31m\r\n", "answers with 'SSH-2.0-OpenSSH_9.6"),
        (b"220 mail.example ESMTP\r\n", "answers with '220 mail.example ESMTP"),
        (b"HTTP/1.1 501 Unsupported method\r\n\r\n", "HTTP 501; is it a SuperLink"),
        (b"HTTP/1.1 505 Version\r\n\r\n", "HTTP 505; is it a SuperLink"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP 404; is it a SuperLink"),
        (
            b"HTTP/1.1 301 Moved\r\nLocation: https://superlink.example/\r\n\r\n",
            "it leads to https://superlink.example/",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "no number: is it a SuperLink"),
    ],
)
def test_other_services(certificates, answer, says, tls):
    serve = saying(answer)
    ca = certificates / "ca.crt" if tls else None
    with listening(within_tls(certificates, serve) if tls else serve) as port:
        assert says in ended(link_to(port, root_certificates=ca))


def test_another_version_of_flower():
    fake = FakeSuperLink()
    fake.tamper["register-node"] = lambda _: (412, b'{"code": 1001, "detail": "No."}')
    with serving(fake):
        assert "install the SuperLink's version here" in ended(link_to(fake.port))


@pytest.mark.parametrize("tls", [False, True])
def test_a_superlink_that_speaks_grpc(certificates, tls):
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    if tls:
        pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem"))
        pairs = [(pair[0], pair[1].read_bytes())]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pairs))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        ca = certificates / "ca.crt" if tls else None
        assert "speaks HTTP/2 only" in ended(link_to(port, root_certificates=ca))
    finally:
        server.stop(None).wait(10)


def test_a_tls_end_that_asks_for_a_client_certificate(certificates):
    context = secured(certificates)
    context.load_verify_locations(certificates / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    with serving(FakeSuperLink(), tls=context) as fake:
        link = link_to(fake.port, root_certificates=certificates / "ca.crt")
        assert "asks for a client's certificate" in ended(link)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("serve", [hanging_up, resetting])
def test_ends_that_hang_up_are_waited_for(certificates, serve, tls):
    """As a forwarded port, or a TLS end in front, does it while the SuperLink restarts."""
    ca = certificates / "ca.crt" if tls else None
    with listening(within_tls(certificates, serve) if tls else serve) as port:
        link = link_to(port, root_certificates=ca, patience_seconds=0.5)
        assert waited_for(link)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_proxy_in_front_of_a_superlink_that_restarts_is_waited_for(status):
    with listening(saying(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status)) as port:
        assert f"HTTP {status}" in waited_for(link_to(port, patience_seconds=0.5))


def test_a_superlink_that_is_not_there_yet_is_waited_for(certificates):
    with listening(hanging_up) as port:
        pass
    fake = FakeSuperLink()
    came = threading.Event()
    stop = threading.Event()

    def come() -> None:
        time.sleep(0.5)
        with serving(fake, port, tls=secured(certificates)):
            came.set()
            stop.wait(20)

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    said: list[str] = []
    link = link_to(port, root_certificates=certificates / "ca.crt", say=said.append)
    try:
        assert link.activate() == NODE_ID
        assert came.is_set() and "ConnectionRefusedError" in said[0]
    finally:
        link.close()
        stop.set()
        thread.join(10)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", b"\x15\x03\x01\x00\x02\x02\x46\n", b""])
def test_once_met_everything_passes(answer):
    """What stands between may answer anything for a while; the SuperLink comes back behind it."""
    fake = FakeSuperLink()
    with serving(fake):
        link = link_to(fake.port, patience_seconds=SECONDS)
        assert link.activate() == NODE_ID
        link._calls.channel.close()
    odd = threading.Event()

    def serve(connected: socket.socket) -> None:
        odd.set()
        saying(answer)(connected)

    pulled: list[Any] = []
    puller = threading.Thread(target=lambda: pulled.append(link.pull()), daemon=True)
    with socket.create_server(("127.0.0.1", fake.port)) as listener:
        puller.start()
        for _ in range(2):
            connected, _ = listener.accept()
            with connected, suppress(OSError):
                serve(connected)
    assert odd.is_set() and not pulled
    with serving(fake, fake.port):
        puller.join(SECONDS)
        assert pulled == [None]
        link.close()


@pytest.mark.parametrize("tls", [False, True])
def test_through_a_proxy(certificates, tls):
    """The questions go through it, too."""
    proxy = ConnectProxy()
    fake = FakeSuperLink()
    with serving(fake, tls=None if tls else secured(certificates)), proxy.serving():
        through = Proxy(Address("127.0.0.1", proxy.port), "https_proxy")
        ca = certificates / "ca.crt" if tls else None
        link = link_to(fake.port, proxy=through, root_certificates=ca, timeout_seconds=1)
        says = "answers without TLS" if tls else "speaks TLS: give --tls-ca"
        assert f"through the proxy 127.0.0.1:{proxy.port} (https_proxy) {says}" in ended(link)


def test_what_is_no_proxy():
    with listening(saying(b"SSH-2.0-OpenSSH\r\n")) as port:
        through = Proxy(Address("127.0.0.1", port), "https_proxy")
        why = ended(link_to(1, proxy=through))
        assert f"127.0.0.1:{port} (https_proxy) answers with 'SSH-2.0" in why and "a proxy" in why


def node(port: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedlean", "node", "--superlink", f"localhost:{port}"]
    command += ["--data", "digits", "--state", str(folder / "state"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)


def test_the_command_ends_with_one_line(certificates, tmp_path):
    make_key(tmp_path / "node.key")
    identity = ["--key", str(tmp_path / "node.key")]
    with serving(FakeSuperLink(), tls=secured(certificates)) as fake:
        insecure = node(fake.port, tmp_path, "--insecure")
    with serving(FakeSuperLink()) as fake:
        ca = ["--tls-ca", str(certificates / "ca.crt")]
        foreign = node(fake.port, tmp_path, *ca, *identity)
    for done, says in ((insecure, "speaks TLS"), (foreign, "answers without TLS")):
        assert done.returncode == 2 and "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("fedlean node: ") and says in last
