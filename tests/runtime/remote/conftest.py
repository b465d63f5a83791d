"""Devices behind a post, and a clock on which only waiting takes time."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import Clock, Loopback, stand_in


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stand_in(monkeypatch)


@pytest.fixture
def post(tmp_path: Path) -> Loopback:
    return Loopback(tmp_path / "nodes")
