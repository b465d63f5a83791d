"""Where a SuperLink is, as operators write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MOST_PORT = 65535


@dataclass(frozen=True)
class Address:
    """host: an ASCII name or an IP address, an IPv6 one without brackets.

    tls: what https:// or http:// said; None where neither was written.

    >>> str(Address("board.local", 80)), str(Address("::1", 9000))
    ('board.local:80', '[::1]:9000')
    """

    host: str
    port: int
    tls: bool | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: str) -> Address:
    """HOST:PORT, with https:// or http:// before it or not.  Raises ValueError.

    >>> parse_address("https://superlink.local:8000/")
    Address(host='superlink.local', port=8000, tls=True)
    """
    scheme, rest = split_scheme(text)
    if scheme not in ("", "https", "http"):
        raise ValueError(
            f"--superlink: {scheme}:// is not spoken here; expected HOST:PORT or https://HOST:PORT"
        )
    if "@" in rest:  # not shown: what stands before it is a secret
        raise ValueError(
            "--superlink takes no user and password, since a node's --key says who it is; "
            "expected HOST:PORT"
        )
    rest = rest.removesuffix("/")
    try:
        if any(mark in rest for mark in "/?#"):
            raise ValueError("nothing may follow the port")
        host, port = host_and_port(rest)
    except ValueError as error:
        raise ValueError(
            f"--superlink {text!r}: {error}; expected HOST:PORT, e.g. 192.168.1.2:8000"
        ) from None
    return Address(host, port, {"": None, "https": True, "http": False}[scheme])


def split_scheme(text: str) -> tuple[str, str]:
    """The scheme in small letters, "" where there is none, and what follows it."""
    match = _SCHEME.fullmatch(text.strip())
    return (match[1].lower(), match[2]) if match else ("", text.strip())


def host_and_port(text: str) -> tuple[str, int]:
    """Of HOST:PORT, an IPv6 host in brackets.  Raises ValueError that says what is wrong.

    >>> host_and_port("[::1]:9000"), host_and_port("board.local:80")
    (('::1', 9000), ('board.local', 80))
    """
    before, colon, port = text.rpartition(":")
    if text.count(":") > 1 and not before.startswith("["):
        raise ValueError("an IPv6 address stands in brackets, as in [::1]:8000")
    if not colon or not port or before.count("[") > before.count("]"):
        raise ValueError("the port is missing")
    numeric = port.isascii() and port.isdigit() and len(port) <= len(str(_MOST_PORT))
    if not numeric or not 1 <= int(port) <= _MOST_PORT:
        raise ValueError(f"the port must be a number from 1 to {_MOST_PORT}")
    return _host(before), int(port)


def _host(text: str) -> str:
    if not text:
        raise ValueError("the host is missing")
    if text.startswith("["):
        return _ipv6(text)
    try:
        name = text.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not _NAME.fullmatch(name):
        raise ValueError("this is no name of a host")
    if name.rstrip(".").rpartition(".")[2].isdigit():
        _check_ipv4(name)
    return name


def _ipv6(text: str) -> str:
    host = text[1:-1]
    try:
        if not text.endswith("]") or not host.isprintable() or " " in host:
            raise AddressValueError
        IPv6Address(host)
    except AddressValueError:
        raise ValueError("this is no IPv6 address") from None
    return host


def _check_ipv4(name: str) -> None:
    """Of 192.168.1 the system's resolver would make 192.168.0.1."""
    try:
        IPv4Address(name)
    except AddressValueError:
        raise ValueError("this is no IPv4 address") from None
