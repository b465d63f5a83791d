from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedlean.runtime.flower.project import write_project

# --doctest-modules would import these, and with them flwr.
collect_ignore = [
    "echo_app",
    "oracle.py",
    *(["stock.py", "processes.py"] if find_spec("flwr") is None else []),
]


@pytest.fixture(scope="session", autouse=True)
def no_proxies() -> Iterator[None]:
    """Nodes of tests find their SuperLinks on this machine, wherever the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [each for each in os.environ if each.lower().endswith("_proxy")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Path:
    """The project of `fedlean app new`."""
    folder = tmp_path_factory.mktemp("project") / "app"
    write_project(folder)
    return folder


@pytest.fixture(scope="module")
def superlink(tmp_path_factory) -> Iterator:
    """A running StockSuperLink with TLS and node authentication, one for a module's tests."""
    if find_spec("flwr") is None:
        pytest.skip("flwr is not installed")
    from runtime.flower.stock import StockSuperLink

    stock = StockSuperLink(tmp_path_factory.mktemp("superlink"))
    stock.start()
    yield stock
    stock.stop()
