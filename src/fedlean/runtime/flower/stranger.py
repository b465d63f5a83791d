"""What answers where a SuperLink was expected: told apart at a node's first connection.

A SuperLink that is away comes back, and a node waits for it however long that takes.  A port that
speaks another protocol does not become a SuperLink by waiting, so its node ends and says why.  Once
a SuperLink has answered nobody asks this again: what is odd then passes, as a proxy between the two
that restarts.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from http.client import BadStatusLine, RemoteDisconnected

PROBE_SECONDS = 5.0
_HEAD = b"HEAD / HTTP/1.0\r\n\r\n"
_STATUS_BYTES = len("HTTP/1.1 404")
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")  # an alert or a handshake, of TLS and SSL 3
_SETTINGS = "\x04"  # the kind of the first frame that an HTTP/2 server sends
_HTTP_2 = (
    "speaks HTTP/2 only, as the gRPC port of an older SuperLink: give the HTTP port of a SuperLink "
    "whose flwr is that of this node"
)

# Connects to the port anew, without TLS; raises OSError.
Reach = Callable[[], socket.socket]


def why_not_wait(error: Exception, reach: Reach, host: str, *, tls: bool) -> str | None:
    """What the port speaks instead, and the remedy; None where it may be a SuperLink that is away.

    error: what became of a request after the port had taken the connection.  tls: whether the
    request went over TLS.  Connects again, and sends nothing that is of use to anybody.
    """
    if not tls and speaks_tls(reach, host):
        return (
            "speaks TLS: give --tls-ca (the PEM file of the authority of its certificate), and "
            "--key in place of --insecure"
        )
    if isinstance(error, BadStatusLine) and not isinstance(error, RemoteDisconnected):
        said = str(error)
        if said[3:4] == _SETTINGS:
            return _HTTP_2
        return f"answers with {said[:60]!r}, which is no HTTP: is it a SuperLink's port?"
    if not tls:
        return None
    if isinstance(error, ssl.SSLError) and "CERTIFICATE" in str(error.reason):
        return (
            f"asks for a client's certificate ({error.reason}), and a node has none: it shows its "
            "--key; take that demand from the TLS end in front of the SuperLink"
        )
    if speaks_http(reach):
        return (
            "answers without TLS: give the SuperLink a certificate (flower-superlink "
            "--ssl-certfile, --ssl-keyfile), or for a trial give --insecure without --tls-ca"
        )
    if _agrees(reach, host, "h2") and not _agrees(reach, host, "http/1.1"):
        return _HTTP_2
    return None


def speaks_tls(reach: Reach, host: str) -> bool:
    """Whether the answer to the beginning of a TLS connection is TLS, be it a refusal."""
    begun = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):  # the answer's first bytes are enough
        _anyone().wrap_bio(ssl.MemoryBIO(), begun, server_hostname=host).do_handshake()
    return _answer(reach, begun.read(), 2) in _TLS_RECORDS


def speaks_http(reach: Reach) -> bool:
    """Whether a request without TLS is answered; TLS ports answer some with status 400."""
    answer = _answer(reach, _HEAD, _STATUS_BYTES)
    return answer.startswith(b"HTTP/") and not answer.endswith(b" 400")


def _agrees(reach: Reach, host: str, protocol: str) -> bool:
    context = _anyone()
    context.set_alpn_protocols([protocol])
    try:
        with context.wrap_socket(reach(), server_hostname=host) as connected:
            return connected.selected_alpn_protocol() == protocol
    except OSError:
        return False


def _answer(reach: Reach, request: bytes, count: int) -> bytes:
    """The first `count` bytes of it, or as many as come."""
    answer = b""
    with suppress(OSError), reach() as connected:
        connected.sendall(request)
        while len(answer) < count and (piece := connected.recv(count - len(answer))):
            answer += piece
    return answer


def _anyone() -> ssl.SSLContext:
    """Without a check of certificates, for nothing is said over these connections."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
