"""Our node at a stock SuperLink: TLS, node authentication, a stock ServerApp."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("flwr") is None:
    pytest.skip("flwr is not installed", allow_module_level=True)

from runtime.flower.stock import COMMANDS, StockSuperLink, make_certificates, make_key
from runtime.flower.tunnel import ConnectProxy

from fedlean.runtime.flower import heartbeat
from fedlean.runtime.flower import superlink as module
from fedlean.runtime.flower.address import Address
from fedlean.runtime.flower.channel import delays
from fedlean.runtime.flower.identity import new_key, read_key
from fedlean.runtime.flower.proxy import Proxy
from fedlean.runtime.flower.superlink import LinkError, SuperLink

pytestmark = pytest.mark.slow
SOURCE = Path(module.__file__).parents[3]
APP = Path(__file__).with_name("echo_app")
NODE = Path(__file__).with_name("echo_node.py")
LIMIT = 4_000_000
CONNECTED_MB = 50


@pytest.fixture
def key(superlink: StockSuperLink, tmp_path):
    """Of a node that is registered with `superlink`, and its id."""
    path = tmp_path / "node.key"
    node_id = superlink.register(make_key(path))
    return path, node_id


def linked(superlink: StockSuperLink, key: Path, said: list[str] | None = None, **settings):
    return SuperLink(
        superlink.address,
        key=read_key(key),
        root_certificates=superlink.ca,
        insecure=False,
        limit_bytes=LIMIT,
        say=(said if said is not None else []).append,
        **settings,
    )


def test_comes_and_goes(superlink, key):
    path, node_id = key
    assert superlink.nodes()[node_id] == "registered"
    for _ in range(2):  # at once after an orderly goodbye
        with closing(linked(superlink, path)) as link:
            assert link.activate() == node_id
            assert superlink.nodes()[node_id] == "online"
            assert link.pull() is None
        assert superlink.nodes()[node_id] == "offline"


def test_comes_and_goes_through_a_proxy(superlink, key):
    path, node_id = key
    with ConnectProxy().serving() as proxy:
        through = Proxy(Address("127.0.0.1", proxy.port), "https_proxy")
        with closing(linked(superlink, path, proxy=through)) as link:
            assert link.activate() == node_id and link.pull() is None
            assert superlink.nodes()[node_id] == "online"
        assert superlink.nodes()[node_id] == "offline"
    assert proxy.asked == [(superlink.address, None)] * 2


def test_a_heartbeat_keeps_it_alive(superlink, key, monkeypatch):
    monkeypatch.setattr(heartbeat, "delays", lambda first=0.0, last=0.0: delays(0.2, 0.2))
    path, node_id = key
    with closing(linked(superlink, path)) as link:
        link.activate()
        before, end = superlink.online_until(node_id), time.monotonic() + 10
        while superlink.online_until(node_id) <= before:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_strangers_are_not_let_in(superlink, tmp_path):
    make_key(tmp_path / "stranger")
    link = linked(superlink, tmp_path / "stranger", activation_seconds=0)
    with pytest.raises(LinkError, match="is the key registered there") as caught:
        link.activate()
    assert not caught.value.retry and caught.value.code == 2004
    link.close()


def test_a_second_node_with_the_same_key_waits(superlink, key):
    path, _ = key
    said: list[str] = []
    with closing(linked(superlink, path)) as first:
        first.activate()
        second = linked(superlink, path, said, activation_seconds=1.5)
        with pytest.raises(LinkError) as caught:
            second.activate()
        assert caught.value.code == 2004
        assert len(said) == 1 and "does not let this node in yet" in said[0]
        second.close()


def test_without_tls_it_is_told_what_to_give(superlink):
    link = SuperLink(
        superlink.address,
        key=None,
        root_certificates=None,
        insecure=True,
        limit_bytes=LIMIT,
        say=str,
        patience_seconds=10,
    )
    with pytest.raises(LinkError, match="speaks TLS: give --tls-ca") as caught:
        link.activate()
    assert not caught.value.retry
    link.close()


def test_a_key_of_its_own_is_refused_where_nodes_are_registered(superlink):
    link = SuperLink(
        superlink.address,
        key=None,
        root_certificates=superlink.ca,
        insecure=True,
        limit_bytes=LIMIT,
        say=str,
    )
    with pytest.raises(LinkError, match="Give this node a key"):
        link.activate()
    link.close()


def test_another_authority_is_not_trusted(superlink, tmp_path):
    make_certificates(tmp_path)
    link = SuperLink(
        superlink.address,
        key=new_key(),
        root_certificates=tmp_path / "ca.crt",
        insecure=False,
        limit_bytes=LIMIT,
        say=str,
    )
    with pytest.raises(LinkError, match="is not to be trusted") as caught:
        link.activate()
    assert not caught.value.retry
    link.close()


def test_plain_http_to_a_tls_port(superlink):
    link = SuperLink(
        superlink.address,
        key=None,
        root_certificates=None,
        insecure=True,
        limit_bytes=LIMIT,
        say=str,
        patience_seconds=0,
    )
    with pytest.raises(LinkError):
        link.activate()
    link.close()


def test_a_round_trip_with_a_stock_server_app(superlink, key):
    """Of contents of several sizes, and refusals of what is not ours."""
    path, _ = key
    command = [sys.executable, str(NODE), superlink.address, str(path), str(superlink.ca)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    node = subprocess.Popen(
        [*command, str(LIMIT)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        printed = superlink.run(APP, "-c", f'sizes="0 1 3000000" limit-bytes={LIMIT}')
    finally:
        node.send_signal(signal.SIGTERM)
        said = node.communicate(timeout=20)[0]
    for size in (0, 1, 3_000_000):
        assert f"ECHOED {size} in" in printed, printed
    for name in ("large", "config", "name", "stype", "two", "empty"):
        assert f"REFUSED {name}: refused by the node" in printed, printed
    assert "left SuperLink" in said and node.returncode == 0
    if sys.platform == "linux":
        (resident,) = [int(line.split()[1]) for line in said.splitlines() if "RESIDENT" in line]
        assert resident < CONNECTED_MB << 10, said


def test_outlives_a_restart(superlink, key):
    """Last in this module: the SuperLink is killed, and starts again with its database."""
    path, node_id = key
    said: list[str] = []
    with closing(linked(superlink, path, said)) as link:
        link.activate()
        superlink.restart()
        assert link.pull() is None
        assert superlink.nodes()[node_id] == "online"
    assert superlink.nodes()[node_id] == "offline"


def test_a_run_that_is_stopped_is_noticed_while_the_node_works(superlink, key, monkeypatch):
    """The SuperLink gives out nothing of a run that is over."""
    monkeypatch.setattr(heartbeat, "delays", lambda first=0.0, last=0.0: delays(0.2, 0.2))
    path, _ = key
    flwr = [str(COMMANDS / "flwr")]
    with closing(linked(superlink, path)) as link:
        link.activate()
        command = [*flwr, "run", str(APP), "test", "-c", "sizes=9"]
        subprocess.run(command, env=superlink.environment, check=True, capture_output=True)
        end = time.monotonic() + 60
        while (incoming := link.pull()) is None:
            assert time.monotonic() < end, "no message"
            time.sleep(0.1)
        over = link.watch(incoming)
        time.sleep(1.0)
        assert not over()
        command = [*flwr, "stop", str(incoming.run_id), "test"]
        subprocess.run(command, env=superlink.environment, check=True, capture_output=True)
        end = time.monotonic() + 10
        while not over():
            assert time.monotonic() < end, "not noticed"
            time.sleep(0.1)
