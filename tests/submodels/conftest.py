"""The engines, as the tests of engines take them."""

from engine.conftest import engine, has_native, one_thread

__all__ = ["engine", "has_native", "one_thread"]
