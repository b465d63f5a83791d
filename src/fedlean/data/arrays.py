"""A data set out of arrays that the user has in memory."""

# n examples

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlean.data.columns import client_numbers, flat
from fedlean.data.dataset import Dataset
from fedlean.data.labels import classes_of
from fedlean.data.stratify import stratified_sample

SPLIT_SEED = 0


def from_arrays(
    x: Any,
    y: Any,
    *,
    clients: Any = None,
    test: tuple[Any, Any] | float | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """See `Dataset.from_arrays`."""
    x, y = _examples("x", x), np.asarray(y)
    ids = None
    if clients is not None:
        ids = client_numbers(flat("clients", np.asarray(clients), len(x)))
    if isinstance(test, tuple | list):
        if len(test) != 2:
            raise ValueError(f"test has {len(test)} parts, expected (x, y) or a share")
        x_test, y_test = _examples("the test examples", test[0]), np.asarray(test[1])
    else:
        x_test, y_test = x[:0], y[:0]
    for what, some, labels in (("y", x, y), ("the test labels", x_test, y_test)):
        if labels.shape[:1] != some.shape[:1]:
            raise ValueError(
                f"{what} has shape {labels.shape}, expected ({len(some)},): one label per example"
            )
    names, classes = classes_of(
        np.concatenate([flat("y", y), flat("the test labels", y_test)]), class_names
    )
    train, held = np.arange(len(x)), np.arange(0)
    if isinstance(test, float):
        if not 0 < test < 1:
            raise ValueError(f"test is {test}, expected a share in (0, 1), or (x, y)")
        count = min(max(1, round(test * len(x))), len(x) - 1)
        held = stratified_sample(classes[: len(x)], count, SPLIT_SEED)
        train = np.setdiff1d(train, held)
        x_test, classes = x[held], np.concatenate([classes, classes[held]])
    return Dataset.from_images(
        name,
        (np.ascontiguousarray(x[train]), classes[train]),
        (np.ascontiguousarray(x_test), classes[len(x) :]),
        classes=len(names),
        scale=255.0 if x.dtype == np.uint8 else 1.0,
        class_names=names,
        clients=None if ids is None else ids[train],
    )


def _examples(what: str, values: Any) -> np.ndarray:
    """uint8 as it is, other numbers as float32."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim < 2 or not len(array):
        raise ValueError(
            f"{what} is {array.dtype} {array.shape}, expected numbers (examples, ...), at least "
            "one example"
        )
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        return array if array.dtype == np.uint8 else array.astype(np.float32)
