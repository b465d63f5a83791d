"""A test that takes `engine` holds the protocol: it runs on every engine."""

from __future__ import annotations

import pytest
import torch

from fedlean.engine.open import open_engine
from fedlean.engine.protocol import Engine


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["torch", "native"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """On one thread, so that no test depends on the machine."""
    if request.param == "native":
        request.getfixturevalue("has_native")
    return open_engine(request.param, 1)
