"""Which proxy leads to a SuperLink: that of the environment, as curl and others read it."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import unquote
from urllib.request import getproxies_environment, proxy_bypass

from fedlean.runtime.flower.address import Address, host_and_port, split_scheme

_EXPECTED = "expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that is asked for a tunnel (CONNECT).

    variable: of the environment, which named it.  authorization: the header's value, None for a
    proxy that was named without credentials.
    """

    address: Address
    variable: str
    authorization: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.address} ({self.variable})"


def proxy_for(address: Address, *, tls: bool) -> Proxy | None:
    """Of https_proxy where the link has TLS, else of http_proxy, else of all_proxy.

    None where there is none or no_proxy excepts the address.  Raises ValueError that names the
    variable and keeps its password to itself.
    """
    proxies = getproxies_environment()
    kinds = ("https" if tls else "http", "all")
    kind = next((kind for kind in kinds if proxies.get(kind)), None)
    if kind is None or _excepted(address, proxies):
        return None
    return _parse(proxies[kind], _variable(f"{kind}_proxy"))


def _excepted(address: Address, proxies: Mapping[str, str]) -> bool:
    # once more without the port, and without the brackets: no_proxy=::1
    forms = (str(address), address.host)
    if any(proxy_bypass(form) for form in forms):
        return True
    with suppress(ValueError):  # a name; the standard library knows no networks
        ip = ip_address(address.host)
        return any(_within(ip, each) for each in proxies.get("no", "").split(","))
    return False


def _within(ip: IPv4Address | IPv6Address, network: str) -> bool:
    with suppress(ValueError):
        return ip in ip_network(network.strip().strip("[]"), strict=False)
    return False


def _variable(name: str) -> str:
    """As the operator wrote it; of several spellings the one that counts."""
    written = [each for each in os.environ if each.lower() == name and os.environ[each]]
    return name if name in written else written[-1]


def _parse(value: str, variable: str) -> Proxy:
    scheme, rest = split_scheme(value)
    if scheme not in ("", "http"):
        raise ValueError(
            f"{variable} names a {scheme}:// proxy, and only HTTP proxies are spoken to here: "
            f"{_EXPECTED}, or except the SuperLink with no_proxy"
        )
    credentials, at, where = rest.removesuffix("/").rpartition("@")
    try:
        host, port = host_and_port(where)
    except ValueError as error:
        raise ValueError(f"{variable} names {where!r} as proxy: {error}; {_EXPECTED}") from None
    return Proxy(Address(host, port), variable, _basic(credentials) if at else None)


def _basic(credentials: str) -> str:
    user, _, password = credentials.partition(":")
    plain = f"{unquote(user)}:{unquote(password)}"
    return "Basic " + b64encode(plain.encode("utf-8", "surrogateescape")).decode("ascii")
