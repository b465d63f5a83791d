"""Checks of the hyper-parameters that methods share, of numbers and of local SGD."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from fedlean.engine.checks import MAX_BATCH_SIZE, check_moments
from fedlean.spec import ModelSpec

MOST = 1 << 31  # of anything counted; what travels to clients has 64 bits


def in_range(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> None:
    """Raises ValueError unless low <= value <= high (low < value if `open_low`)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    above = number and (value > low if open_low else value >= low)
    if not number or not isfinite(value) or not above or value > high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must lie in {bracket}{low:g}, {high:g}], got {value!r}")


def at_least(name: str, value: int, low: int, *, most: int = MOST) -> None:
    """Raises ValueError unless value is an integer from `low` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r:.40}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r:.40}")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless value is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.40}")


def check_sgd(
    spec: ModelSpec,
    *,
    lr: float,
    local_steps: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    loss: str,
) -> None:
    """The hyper-parameters of local SGD of `spec`.  Raises ValueError naming what is wrong."""
    in_range("lr", lr, 0.0, 100.0, open_low=True)
    at_least("local_steps", local_steps, 1)
    at_least("batch_size", batch_size, 1, most=MAX_BATCH_SIZE)
    check_moments(spec, batch_size, ())
    in_range("momentum", momentum, 0.0, 0.9999)
    in_range("weight_decay", weight_decay, 0.0, 10.0)
    if loss not in ("ce", "bce"):
        raise ValueError(f"loss must be 'ce' or 'bce', got {loss!r}")
