"""One HTTP connection to a SuperLink: signed requests, bounded answers, and what can go wrong."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import (
    BadStatusLine,
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    RemoteDisconnected,
)

from fedlean.printable import printable
from fedlean.runtime.flower.address import Address
from fedlean.runtime.flower.identity import PrivateKey
from fedlean.runtime.flower.objects import Buffer
from fedlean.runtime.flower.proxy import Proxy
from fedlean.runtime.flower.stranger import PROBE_SECONDS, why_not_wait
from fedlean.runtime.flower.trust import not_trusted

_PIECE_BYTES = 1 << 16  # of one send or receive, each of which has the whole timeout
_ERROR_BYTES = 1 << 14
_FIRST_SECONDS = 10.0  # of a first TLS handshake, before somebody asks what else the port speaks
_IDLE_SECONDS = 3.0  # a SuperLink hangs up on a connection that is idle for 5
_CLOCK_SECONDS = 5.0  # the least difference of two clocks that a Date, in whole seconds, shows
_SLOWEST_BYTES_PER_S = 256  # an answer that trickles in more slowly is given up
_NO_SUPERLINK = (404, 405, 501, 505)  # statuses of a server that knows no such call
_WRONG_VERSION = 1001  # flwr's ApiErrorCode
_HEADERS = {
    "Content-Type": "application/protobuf",
    "Accept": "application/protobuf",
    "flwr-package-name": "flwr",
    "flwr-component-name": "SuperNode",
}


class LinkError(Exception):
    """The SuperLink could not be reached, refused something or sent something wrong.

    retry: whether the same call may succeed later.  status, code: of an HTTP answer and of Flower's
    error in it, where there were any.
    """

    def __init__(
        self, text: str, *, retry: bool, status: int | None = None, code: int | None = None
    ) -> None:
        super().__init__(text)
        self.retry, self.status, self.code = retry, status, code


class Away(LinkError):
    """No answer, or the answer of a SuperLink that is not itself at the moment."""

    def __init__(self, text: str) -> None:
        super().__init__(text, retry=True)


def plain(text: object, length: int = 200) -> str:
    """What another machine wrote, fit for one line of a log."""
    return printable(str(text)[:length])[:length]


def delays(first: float = 0.5, last: float = 30.0) -> Iterator[float]:
    """Seconds between tries: doubling from `first` to `last`, each cut at random by up to half.

    At random, so that the nodes of a SuperLink that comes back do not come all at once.
    """
    while True:
        yield first * (0.5 + int.from_bytes(os.urandom(2), "big") / (1 << 17))
        first = min(2 * first, last)


class Channel:
    """Answers are views of one buffer, good until the next request.  For one thread."""

    def __init__(
        self,
        address: Address,
        proxy: Proxy | None,
        context: ssl.SSLContext | None,
        key: PrivateKey,
        version: str,
        *,
        timeout_seconds: float,
    ) -> None:
        # it gets its sockets from here, with TLS where there is a context
        self._http = HTTPConnection(address.host, address.port, timeout=timeout_seconds)
        self._address, self._proxy, self._context = address, proxy, context
        self._where = str(address)
        self._key, self._version, self._timeout = key, version, timeout_seconds
        self._answer = bytearray()
        self._used = 0.0  # the monotonic second of the last answer
        # a SuperLink has answered at this address: from then on whatever is wrong there will pass
        self.met = False
        self._reached = False  # the last connection was taken, by whomever
        self.failures = 0  # requests that may or may not have reached the SuperLink
        self.clock_ahead_seconds = 0.0  # this device's clock against the SuperLink's; small: 0

    def post(self, path: str, parts: Sequence[Buffer], limit_bytes: int) -> memoryview:
        """The answer to a request whose body is `parts`; at most limit_bytes.

        Raises Away where another try may help, else LinkError.
        """
        if time.monotonic() - self._used > _IDLE_SECONDS:
            self._http.close()
        fresh = self._http.sock is None
        try:
            try:
                return self._exchange(path, parts, limit_bytes)
            except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                if fresh:
                    raise
                self.failures += 1  # it had hung up since the last answer: no news
                self._http.close()
                return self._exchange(path, parts, limit_bytes)
        except (OSError, HTTPException) as error:
            self.failures += 1
            self._http.close()
            if self._reached and not self.met:
                self._examine(error)
            via = f"through {self._proxy}: " if self._proxy else ""
            raise Away(f"{via}{type(error).__name__}: {plain(error)}") from None
        except BaseException:
            self._http.close()  # an answer half read is no place to go on from
            raise

    def _exchange(self, path: str, parts: Sequence[Buffer], limit_bytes: int) -> memoryview:
        if self._http.sock is None:
            self._connect()
        length = str(sum(len(part) for part in parts))
        headers = {"Content-Length": length, "flwr-package-version": self._version}
        headers |= _HEADERS | self._key.headers()
        self._http.request("POST", path, _pieces(parts), headers)
        response = self._http.getresponse()
        self.clock_ahead_seconds = _clock_ahead_seconds(response.getheader("Date"))
        if response.status != 200:
            self._refuse(response, path)
        answer = self._read(response, limit_bytes)
        self.met = True
        self._used = time.monotonic()
        return answer

    def _connect(self) -> None:
        self._reached = False
        connected = self._http.sock = self._reach(self._timeout)
        self._reached = True
        if self._context is None:
            return
        if not self.met:
            connected.settimeout(min(_FIRST_SECONDS, self._timeout))
        try:
            host = self._address.host
            secured = self._context.wrap_socket(connected, server_hostname=host)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLCertVerificationError as error:
            why = not_trusted(error)
            raise LinkError(f"the certificate of {self._here()} {why}", retry=False) from None
        except ssl.SSLError as error:
            if not self.met:
                self._examine(error)
            raise LinkError(
                f"no TLS with {self._here()} ({error.reason}): is it a SuperLink, with TLS?",
                retry=False,
            ) from None
        secured.settimeout(self._timeout)
        self._http.sock = secured

    def _reach(self, seconds: float) -> socket.socket:
        """A connection to the SuperLink's port, without TLS."""
        proxy = self._proxy
        to = self._address if proxy is None else proxy.address
        connected = socket.create_connection((to.host, to.port), seconds)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if proxy is not None:
                # Not http.client's set_tunnel, which leaves IPv6 hosts without brackets and tells a
                # proxy's answers apart in prose only.
                _ask_for_tunnel(connected, proxy, self._where, met=self.met)
        except BaseException:
            connected.close()
            raise
        return connected

    def _examine(self, error: Exception) -> None:
        """Raises LinkError where the port is none that a SuperLink could be waited for at."""

        def reach() -> socket.socket:
            try:
                return self._reach(PROBE_SECONDS)
            except (LinkError, HTTPException) as refused:  # the proxy's
                raise ConnectionError(str(refused)) from None

        why = why_not_wait(error, reach, self._address.host, tls=self._context is not None)
        if why is not None:
            raise LinkError(f"{self._here()} {plain(why, 400)}", retry=False) from None

    def _here(self) -> str:
        return f"{self._where} through {self._proxy}" if self._proxy else self._where

    def _read(self, response: HTTPResponse, limit_bytes: int) -> memoryview:
        length = response.length  # None where it comes in chunks
        if length is not None and length > limit_bytes:
            raise LinkError(
                f"{self._where} announced an answer of {length} bytes, at most {limit_bytes} are "
                "taken here",
                retry=True,
            )
        if length is None or length > len(self._answer):
            self._answer = bytearray(length or 0)
        answer, got, began = self._answer, 0, time.monotonic()
        while piece := response.read1(_PIECE_BYTES):
            end = got + len(piece)
            if end > limit_bytes:
                raise LinkError(
                    f"{self._where} sent more than the {limit_bytes} bytes taken here", retry=True
                )
            answer[got:end] = piece
            got = end
            if time.monotonic() - began > self._timeout + got / _SLOWEST_BYTES_PER_S:
                raise TimeoutError(f"{got} bytes of an answer trickled in")
            if got == length:
                break
        if length is not None and got != length:
            raise Away(f"an answer ended after {got} of {length} bytes")
        response.close()
        return memoryview(answer)[:got]

    def _refuse(self, response: HTTPResponse, path: str) -> None:
        raw = response.read1(_ERROR_BYTES)
        self._http.close()
        code, detail = _flower_error(raw)
        status = response.status
        text = f"{self._where} answered {path.rpartition('/')[2]} with HTTP {status}"
        text += f" [code {code}]" if code is not None else ""
        text += f": {plain(detail)}" if detail else ""
        passing = status >= 500 or status in (408, 429)
        if passing and (self.met or status not in _NO_SUPERLINK):
            raise Away(text)
        if status == 400 and self._context is None and not self.met:
            self._examine(HTTPException(text))  # of a TLS port
        text += self._remedy(status, code, response.getheader("Location", ""))
        if status == 401:
            text += "; is this node's key registered there (flwr supernode register KEY.pub)?"
            if self.clock_ahead_seconds:
                text += f" And {clock_line(self.clock_ahead_seconds)}"
        raise LinkError(text, retry=False, status=status, code=code)

    def _remedy(self, status: int, code: int | None, location: str) -> str:
        if code == _WRONG_VERSION:
            return f"; this node has flwr {self._version}: install the SuperLink's version here"
        if status in _NO_SUPERLINK:
            return f"; is it a SuperLink, and of flwr {self._version}, as this node?"
        if 300 <= status < 400 and location:
            return f"; it leads to {plain(location)}: give that host and port, with its TLS"
        return ""

    def forget(self) -> None:
        """Gives the last answer's memory back."""
        self._answer = bytearray()

    def abort(self) -> None:
        """From another thread: ends a request that is under way."""
        connected = self._http.sock
        if connected is not None:
            with suppress(OSError):
                # Not SSLSocket.shutdown, which also takes the TLS state from under the reader.
                socket.socket.shutdown(connected, socket.SHUT_RDWR)

    def close(self) -> None:
        self._http.close()


def _ask_for_tunnel(connected: socket.socket, proxy: Proxy, where: str, *, met: bool) -> None:
    """Raises Away where another try may help, else LinkError.  met: it gave tunnels before."""
    headers = [f"CONNECT {where} HTTP/1.1", f"Host: {where}"]
    if proxy.authorization is not None:
        headers.append(f"Proxy-Authorization: {proxy.authorization}")
    connected.sendall("\r\n".join([*headers, "", ""]).encode("ascii"))
    response = HTTPResponse(connected, method="CONNECT")
    try:
        response.begin()
    except RemoteDisconnected:
        raise
    except BadStatusLine as error:
        if met:
            raise
        raise LinkError(
            f"{proxy} answers with {plain(error, 60)!r}, which is no HTTP: is it a proxy, and "
            "one without TLS of its own?",
            retry=False,
        ) from None
    finally:
        response.close()  # its reader; the connection stays
    status = response.status
    if 200 <= status < 300:
        return
    text = f"{proxy} answered CONNECT {where} with HTTP {status} {plain(response.reason)}".rstrip()
    if status >= 500 or status in (408, 429):
        raise Away(text)
    if status == 407:
        text += f"; are user and password right (http://USER:PASSWORD@{proxy.address})?"
    else:
        text += "; it must allow CONNECT to this port, or no_proxy except this host"
    raise LinkError(text, retry=False)


def clock_line(ahead_seconds: float) -> str:
    way = "ahead of" if ahead_seconds > 0 else "behind"
    return (
        f"this device's clock is {abs(ahead_seconds):.0f} s {way} the SuperLink's: set it "
        "(timedatectl)"
    )


def _clock_ahead_seconds(date: str | None) -> float:
    """This machine's clock minus that of an answer's Date header; 0.0 where there is none."""
    try:
        theirs = parsedate_to_datetime(date or "").timestamp()
    except (ValueError, OverflowError):  # the second: digits without end
        return 0.0
    ahead = time.time() - theirs
    return ahead if abs(ahead) >= _CLOCK_SECONDS else 0.0


def _pieces(parts: Sequence[Buffer]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]


def _flower_error(raw: bytes) -> tuple[int | None, str]:
    """Code and text of an error's JSON body; (None, "") where it is none."""
    try:
        error = json.loads(raw)
    except (ValueError, RecursionError):
        return None, ""
    if not isinstance(error, dict):
        return None, ""
    code = error.get("code")
    return (code if type(code) is int else None), str(error.get("detail", ""))
