"""Proxies: which one the environment names, and links that go through a real one."""

from __future__ import annotations

import socket
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from runtime.flower.tunnel import ConnectProxy

from fedlean.runtime.flower import calls
from fedlean.runtime.flower.address import Address, parse_address
from fedlean.runtime.flower.channel import Away, delays
from fedlean.runtime.flower.objects import pack_content
from fedlean.runtime.flower.proxy import Proxy, proxy_for
from fedlean.runtime.flower.superlink import LinkError, SuperLink

needs_flwr = pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed")
SUPERLINK = "superlink.example:8000"


def basic(credentials: bytes) -> str:
    return "Basic " + b64encode(credentials).decode()


def chosen(monkeypatch, variables: dict[str, str], address: str = SUPERLINK, *, tls: bool = True):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return proxy_for(parse_address(address), tls=tls)


@pytest.mark.parametrize(
    ("variables", "tls", "named", "authorization"),
    [
        ({}, True, None, None),
        ({"https_proxy": "http://p:1"}, True, "the proxy p:1 (https_proxy)", None),
        ({"HTTPS_PROXY": "http://p:1/"}, True, "the proxy p:1 (HTTPS_PROXY)", None),
        ({"https_proxy": "http://p:1", "HTTPS_PROXY": "http://q:2"}, True, "p:1 (https_", None),
        ({"https_proxy": "p:1"}, True, "the proxy p:1 (https_proxy)", None),
        ({"https_proxy": "http://[::1]:1"}, True, "the proxy [::1]:1 (https_proxy)", None),
        ({"https_proxy": "http://p:1"}, False, None, None),
        ({"http_proxy": "http://p:1"}, True, None, None),
        ({"http_proxy": "http://p:1"}, False, "the proxy p:1 (http_proxy)", None),
        ({"all_proxy": "http://p:1"}, True, "the proxy p:1 (all_proxy)", None),
        ({"ALL_PROXY": "http://p:1"}, False, "the proxy p:1 (ALL_PROXY)", None),
        ({"all_proxy": "http://p:1", "https_proxy": "http://q:2"}, True, "q:2 (https_", None),
        ({"https_proxy": "", "HTTPS_PROXY": "http://q:2"}, True, None, None),
        ({"https_proxy": "http://me:secret@p:1"}, True, "the proxy p:1 (", b"me:secret"),
        ({"https_proxy": "me:p@ss/w@p:1"}, True, "the proxy p:1 (", b"me:p@ss/w"),
        ({"https_proxy": "http://m%40e:s%3Ac%C3%BC@p:1"}, True, "p:1", "m@e:s:cü".encode()),
        ({"https_proxy": "http://me@p:1"}, True, "the proxy p:1 (", b"me:"),
    ],
)
def test_the_proxy_of_the_environment(monkeypatch, variables, tls, named, authorization):
    proxy = chosen(monkeypatch, variables, tls=tls)
    if named is None:
        assert proxy is None
        return
    assert proxy is not None and named in str(proxy)
    assert proxy.authorization == (None if authorization is None else basic(authorization))
    assert "secret" not in repr(proxy) and basic(authorization or b"-") not in repr(proxy)


@pytest.mark.parametrize(
    ("excepted", "address", "direct"),
    [
        ("superlink.example", SUPERLINK, True),
        ("SuperLink.Example", SUPERLINK, True),
        ("other, superlink.example", SUPERLINK, True),
        (".example", SUPERLINK, True),
        ("example", SUPERLINK, True),
        ("link.example", SUPERLINK, False),
        ("superlink.example:8000", SUPERLINK, True),
        ("superlink.example:8001", SUPERLINK, False),
        ("*", SUPERLINK, True),
        ("", SUPERLINK, False),
        ("localhost", "127.0.0.1:8000", False),
        ("", "localhost:8000", False),
        ("10.0.0.5", "10.0.0.5:8000", True),
        ("10.0.0.0/8,192.168.1.0/24", "192.168.1.7:8000", True),
        ("10.0.0.1/8", "10.9.9.9:8000", True),
        ("10.0.0.0/8", "11.0.0.5:8000", False),
        ("10.0.0.0/8", SUPERLINK, False),
        ("::1", "[::1]:8000", True),
        ("[::1]", "[::1]:8000", True),
        ("[::1]:8000", "[::1]:8000", True),
        ("[::1]:8001", "[::1]:8000", False),
        ("0:0:0:0:0:0:0:1", "[::1]:8000", True),
        ("fd00::/8", "[fd12::1]:8000", True),
        ("10.0.0.0/8", "[fd12::1]:8000", False),
    ],
)
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
def test_exceptions(monkeypatch, excepted, address, direct, variable):
    variables = {"https_proxy": "http://p:1", variable: excepted}
    assert (chosen(monkeypatch, variables, address) is None) == direct


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("socks5://me:secret@p:1", "names a socks5:// proxy"),
        ("https://me:secret@p:1", "names a https:// proxy"),
        ("http://me:secret@p", "names 'p' as proxy: the port is missing"),
        ("http://me:secret@p:1/x", "the port must be"),
        ("http://me:secret@p q:1", "no name of a host"),
        ("http://", "the port is missing"),
    ],
)
def test_proxies_that_are_refused(monkeypatch, value, says):
    with pytest.raises(ValueError, match=f"^HTTPS_PROXY .*{says}.*expected http://") as caught:
        chosen(monkeypatch, {"HTTPS_PROXY": value})
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert chosen(monkeypatch, {"no_proxy": "*"}) is None


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """Of localhost and 127.0.0.1."""
    from runtime.flower.stock import make_certificates

    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


def to(proxy: ConnectProxy, authorization: str | None = None) -> Proxy:
    return Proxy(Address("127.0.0.1", proxy.port), "https_proxy", authorization)


def link_to(address: str, proxy: Proxy | None, **settings: Any) -> SuperLink:
    """Fails at once, without TLS, where `settings` say nothing else."""
    defaults = {"root_certificates": None, "timeout_seconds": 5, "patience_seconds": 0, "say": str}
    chosen = defaults | settings
    return SuperLink(address, proxy=proxy, key=None, insecure=True, limit_bytes=1 << 20, **chosen)


@contextmanager
def superlink(folder: Path | None = None) -> Iterator[Any]:
    """A SuperLink that answers; with TLS, where its certificates are in `folder`."""
    from runtime.flower.fake import FakeSuperLink, serving

    tls = None
    if folder is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(folder / "server.pem", folder / "server.key")
    with serving(FakeSuperLink(), tls=tls) as fake:
        yield fake


@needs_flwr
@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("authorization", [None, basic(b"me:secret")])
def test_a_link_through_a_proxy(certificates, tls, authorization):
    proxy = ConnectProxy(wants=authorization)
    with superlink(certificates if tls else None) as fake, proxy.serving():
        fake.send(pack_content(b"hello" * 1000))
        address = f"localhost:{fake.port}"
        root = certificates / "ca.crt" if tls else None
        link = link_to(address, to(proxy, authorization), root_certificates=root)
        link.activate()
        incoming = link.pull()
        assert incoming is not None and incoming.content == b"hello" * 1000
        link.push(incoming, b"bye")
        link.close()
    assert fake.replies and fake.asked[-2:] == ["deactivate-node", "unregister-node"]
    assert proxy.asked == [(address, authorization)] * 2  # the second: signing off


@needs_flwr
def test_the_certificate_is_checked_against_the_superlinks_name(certificates):
    """Not against the proxy's: 127.0.0.1 stands in the certificate."""
    proxy = ConnectProxy()
    with superlink(certificates) as fake, proxy.serving():
        address = f"other.example:{fake.port}"
        link = link_to(address, to(proxy), root_certificates=certificates / "ca.crt")
        with pytest.raises(LinkError, match=f"{address} through the proxy 127.* trusted") as caught:
            link.activate()
        assert not caught.value.retry and not fake.asked
        link.close()


@needs_flwr
def test_an_ipv6_superlink_stands_in_brackets():
    proxy = ConnectProxy()
    with superlink() as fake, proxy.serving():
        link = link_to(f"[2001:db8::7]:{fake.port}", to(proxy))
        link.activate()
        link.close()
    assert proxy.asked[0] == (f"[2001:db8::7]:{fake.port}", None)


@needs_flwr
@pytest.mark.parametrize(
    ("answer", "retry", "says"),
    [
        (b"HTTP/1.1 407 Who are you?\r\n\r\n", False, "HTTP 407 Who are you.*USER:PASSWORD@"),
        (b"HTTP/1.1 403 \r\n\r\n", False, "HTTP 403; it must allow CONNECT"),
        (b"HTTP/1.0 302 Found\r\nLocation: http://login/\r\n\r\n", False, "HTTP 302 Found"),
        (b"HTTP/1.1 502 Bad\x1b gateway\r\n\r\n", True, r"HTTP 502 Bad\\x1b gateway"),
        (b"HTTP/1.1 429 Later\r\n\r\n", True, "HTTP 429 Later"),
        (b"", True, "RemoteDisconnected"),
        (b"SSH-2.0-OpenSSH\r\n", False, "answers with 'SSH-2.0-OpenSSH.*no HTTP"),
    ],
)
def test_a_proxy_that_gives_no_tunnel(answer, retry, says):
    with ConnectProxy(answer=answer).serving() as proxy:
        link = link_to(SUPERLINK, to(proxy, basic(b"me:secret")))
        named = rf"the proxy 127\.0\.0\.1:{proxy.port} \(https_proxy\).*{says}"
        with pytest.raises(LinkError, match=named) as caught:
            link.activate()
        assert caught.value.retry == retry == isinstance(caught.value, Away)
        assert "secret" not in str(caught.value) and str(caught.value).isprintable()
        link.close()


@needs_flwr
def test_a_proxy_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        link = link_to(
            SUPERLINK, Proxy(Address("127.0.0.1", port), "all_proxy"), timeout_seconds=0.3
        )
        with pytest.raises(Away, match=rf"through the proxy 127\.0\.0\.1:{port} .*timed out"):
            link.activate()
        link.close()


@needs_flwr
def test_a_proxy_that_is_down():
    with ConnectProxy().serving() as proxy:
        pass
    link = link_to(SUPERLINK, to(proxy))
    down = rf"through the proxy 127\.0\.0\.1:{proxy.port} \(https_proxy\): ConnectionRefused"
    with pytest.raises(Away, match=down) as caught:
        link.activate()
    assert caught.value.retry
    link.close()


@needs_flwr
def test_a_proxy_that_comes_back(monkeypatch, certificates):
    monkeypatch.setattr(calls, "delays", lambda: delays(0.01, 0.02))
    with ConnectProxy().serving() as proxy:
        pass
    said: list[str] = []
    with superlink(certificates) as fake, ExitStack() as later:

        def say(line: str) -> None:
            said.append(line)
            if " is away " in line:
                later.enter_context(proxy.serving(proxy.port))

        address, ca = f"127.0.0.1:{fake.port}", certificates / "ca.crt"
        link = link_to(address, to(proxy), root_certificates=ca, patience_seconds=20, say=say)
        link.activate()
        link.close()
    assert f"is away (through the proxy 127.0.0.1:{proxy.port} (https_proxy): " in said[0]
    assert said[1] == f"SuperLink {address} is back"
