"""The engines, as the tests of engines take them."""

from engine.conftest import engine, one_thread

__all__ = ["engine", "one_thread"]
