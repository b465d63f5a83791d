"""For all tests."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end one worker would wait for them alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def has_native() -> None:
    """Skips where the extension is not built; one that is built and broken must fail."""
    if importlib.util.find_spec("fedlean._native") is None:
        pytest.skip("the native engine is not built: there is no fedlean._native")
