"""What a run expects of its devices' data, and what a device holds: compared at the greeting.

A device cannot derive the run's classes, its shape or its value range from its own examples, and
what does not fit trains at chance without a word.  Both sides compare, by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.data.labels import listed

RANGE_FACTOR = 10.0  # by which the largest values of honest devices may differ: ours, generous


@dataclass(frozen=True)
class Holding:
    """Of a run: all classes, and the range of its own examples.  Of a device: what it has."""

    input_shape: tuple[int, ...]
    classes: tuple[str, ...]  # names; of a device, those with at least one example
    value_range: tuple[float, float]  # smallest and largest stored value / scale

    def to_fields(self) -> dict[str, Any]:
        """As the fields of an envelope."""
        return {
            "input_shape": list(self.input_shape),
            "classes": list(self.classes),
            "value_range": list(self.value_range),
        }

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> Holding:
        """Of an envelope whose fields were checked."""
        low, high = fields["value_range"]
        return Holding(tuple(fields["input_shape"]), tuple(fields["classes"]), (low, high))


def expected_by(dataset: Dataset) -> Holding:
    """What a run on this data set expects."""
    return Holding(dataset.input_shape, dataset.class_names, dataset.value_range)


def held_by(data: ClientData) -> Holding:
    """What a client has."""
    dataset = data.dataset
    labels = np.unique(dataset.y_train[data.indices])
    names = tuple(dataset.class_names[label] for label in labels)
    return Holding(dataset.input_shape, names, dataset.value_range)


def mismatch(held: Holding, expected: Holding) -> str | None:
    """Why a device that holds this cannot take part; both sides are in the reason."""
    if held.input_shape != expected.input_shape:
        return f"its examples have shape {held.input_shape}, the run expects {expected.input_shape}"
    known = set(expected.classes)
    unknown = [name for name in held.classes if name not in known]
    if unknown:
        return (
            f"it holds the classes {listed(held.classes)}, the run has {listed(expected.classes)}:"
            f" {listed(unknown)} must be renamed or left out"
        )
    return _other_range(held.value_range, expected.value_range)


def _other_range(held: tuple[float, float], expected: tuple[float, float]) -> str | None:
    """Pixels from 0 to 1 are held to that; other values to their order of magnitude."""
    (low, high), (least, most) = held, expected
    pixels = least >= 0 and most <= 1
    largest, usual = max(-low, high), max(-least, most)
    outside = not (low >= 0 and high <= 1) if pixels else largest > RANGE_FACTOR * usual
    if not outside and largest * RANGE_FACTOR >= usual:
        return None
    wanted = f"0..1 (its own are {least:g}..{most:g})" if pixels else f"about {least:g}..{most:g}"
    return (
        f"its values lie in {low:g}..{high:g}, the run expects {wanted}: store pixels as bytes or "
        "divided by their largest value, signals in the same unit everywhere"
    )
