"""Where a SuperLink is: what operators write, and what is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.runtime.flower.address import Address, parse_address

RIGHT = {
    "127.0.0.1:8000": Address("127.0.0.1", 8000),
    "superlink.local:1": Address("superlink.local", 1),
    "my_container-2:65535": Address("my_container-2", 65535),
    "superlink.:8000": Address("superlink.", 8000),
    "https://superlink:8000": Address("superlink", 8000, tls=True),
    "HTTPS://superlink:8000/": Address("superlink", 8000, tls=True),
    "http://10.0.0.5:8000": Address("10.0.0.5", 8000, tls=False),
    "  superlink:8000/\n": Address("superlink", 8000),
    "[::1]:8000": Address("::1", 8000),
    "https://[2001:db8::7]:443/": Address("2001:db8::7", 443, tls=True),
    "[fe80::1%eth0]:8000": Address("fe80::1%eth0", 8000),
    "bücher.example:8000": Address("xn--bcher-kva.example", 8000),
}
WRONG = {
    "": "the port is missing",
    "superlink": "the port is missing",
    "https://superlink": "the port is missing",
    "superlink:": "the port is missing",
    "[::1]": "the port is missing",
    "https://": "the port is missing",
    "superlink:0": "a number from 1 to 65535",
    "superlink:65536": "a number from 1 to 65535",
    "superlink:" + "9" * 5000: "a number from 1 to 65535",
    "superlink:-1": "a number from 1 to 65535",
    "superlink:80x": "a number from 1 to 65535",
    "superlink:٣": "a number from 1 to 65535",
    "superlink: 80": "a number from 1 to 65535",
    ":8000": "the host is missing",
    "https://:8000": "the host is missing",
    "::1": r"in brackets, as in \[::1\]:8000",
    "::1:8000": "in brackets",
    "https:superlink:8000": "in brackets",
    "[]:8000": "no IPv6 address",
    "[superlink]:8000": "no IPv6 address",
    "[::1]x:8000": "no IPv6 address",
    "[fe80::1%\r\nx]:8000": "no IPv6 address",
    "super link:8000": "no name of a host",
    "super\r\nlink:8000": "no name of a host",
    "a..b:8000": "no name of a host",
    ".:8000": "no name of a host",
    "a" * 64 + ":8000": "no name of a host",
    "192.168.1:8000": "no IPv4 address",
    "192.168.1.256:8000": "no IPv4 address",
    "superlink:8000/v1": "nothing may follow the port",
    "superlink:8000//": "nothing may follow the port",
    "superlink:8000?a=b": "nothing may follow the port",
    "superlink:8000#a": "nothing may follow the port",
    "http:/superlink:8000": "nothing may follow the port",
    "grpc://superlink:8000": "grpc:// is not spoken here",
    "socks5h://superlink:8000": "socks5h:// is not spoken here",
}


@pytest.mark.parametrize("text", RIGHT)
def test_right(text):
    assert parse_address(text) == RIGHT[text]


@pytest.mark.parametrize("text", WRONG)
def test_wrong(text):
    with pytest.raises(ValueError, match=f"--superlink.*{WRONG[text]}.*HOST:PORT") as caught:
        parse_address(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["https://me:secret@superlink:8000", "me:secret@superlink:8000"])
def test_a_password_is_not_repeated(text):
    with pytest.raises(ValueError, match="takes no user and password") as caught:
        parse_address(text)
    assert "secret" not in str(caught.value)


@given(st.text() | st.text(alphabet="a1.:/[]@%-# ٣ßh\r\n", max_size=20))
def test_whatever_is_written_is_an_address_or_a_value_error(text):
    with suppress(ValueError):
        address = parse_address(text)
        assert parse_address(str(address)).host == address.host
        assert str(address).isascii() and str(address).isprintable() and " " not in str(address)


LABELS = st.from_regex(r"[a-z0-9_-]{0,20}[a-z]", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)
HOSTS = NAMES | st.ip_addresses().map(str)


@given(HOSTS, st.integers(1, 65535), st.sampled_from([None, True, False]))
def test_every_valid_address_comes_back(host, port, tls):
    address = Address(host, port, tls)
    scheme = {None: "", True: "https://", False: "http://"}[tls]
    assert parse_address(f"{scheme}{address}") == address
