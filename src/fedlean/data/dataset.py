"""`Dataset`: a labelled image set in memory, and how its pixels become network inputs.

Images stay as they were stored (uint8 wherever possible) and are normalised batch by batch: a set
that takes 47 MB as bytes would take 188 MB as float32.  This module reads no files (the loaders do)
and knows nothing of clients' shares (`fedlean.data.partition`) or batches (`fedlean.data.batches`).
"""

# n examples, C channels, H height, W width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from fedlean.data.labels import MAX_CLASSES, check_class_names, listed, numbered

CHUNK = 256  # images converted at a time, so that statistics never hold a float copy of the set


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set of images of one shape, with what normalises them.

    x_train, x_test: uint8 or float32 (n, C, H, W).  y_train, y_test: int64 (n,) in 0..classes-1.
    mean, std: float32 (C,), of x_train / scale.  clients: int32 (n,) ≥ 0, who owns each training
    example, or None.  class_names: one per class, all different; given as (), classes count from
    "0".  A device's share has no test examples.

    Raises ValueError naming the field when dtypes, lengths, labels or values do not fit.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    mean: np.ndarray
    std: np.ndarray
    scale: float = 255.0
    class_names: tuple[str, ...] = ()
    clients: np.ndarray | None = None

    def __post_init__(self) -> None:
        for part, x, y in (
            ("train", self.x_train, self.y_train),
            ("test", self.x_test, self.y_test),
        ):
            _check_images(f"data set {self.name!r}: x_{part}", x)
            _check_labels(f"data set {self.name!r}: y_{part}", y, len(x), self.classes)
        _check_some(f"data set {self.name!r}: x_train", self.x_train)
        if not self.class_names:
            object.__setattr__(self, "class_names", numbered(self.classes))
        self._check_class_names()
        self._check_shapes()
        self._check_statistics()
        self._check_clients()

    @classmethod
    def from_images(
        cls,
        name: str,
        train: tuple[np.ndarray, np.ndarray],  # x (n, C, H, W), y int64 (n,)
        test: tuple[np.ndarray, np.ndarray],
        *,
        classes: int,
        scale: float,  # the stored value that counts as 1.0
        class_names: tuple[str, ...] = (),
        clients: np.ndarray | None = None,
    ) -> Self:
        """A `Dataset` whose mean and std are computed on its training images.

        >>> x, y = np.array([[[[0, 255]]]], np.uint8), np.array([0])
        >>> data = Dataset.from_images("tiny", (x, y), (x, y), classes=1, scale=255.0)
        >>> data.input_shape, data.normalise(x).tolist()
        ((1, 1, 2), [[[[-1.0, 1.0]]]])
        """
        _check_images(f"data set {name!r}: x_train", train[0])  # the statistics need sound images
        _check_some(f"data set {name!r}: x_train", train[0])
        _check_some(f"data set {name!r}: x_test", test[0])
        mean, std = channel_statistics(train[0], scale)
        return cls(name, *train, *test, classes, mean, std, scale, class_names, clients)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one example."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    @cached_property
    def labels_held(self) -> tuple[str, ...]:
        """The names of the classes that have training examples, in the order of the classes."""
        counts = np.bincount(self.y_train, minlength=self.classes)
        return tuple(name for name, n in zip(self.class_names, counts, strict=True) if n)

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest value of x_train / scale."""
        return _value_range(self.x_train, self.scale)

    def with_classes(self, names: Sequence[str]) -> Self:
        """The same examples with labels that count `names`, as a federation lists its classes.

        Raises ValueError with both lists when an example, of training or test, has none of them.
        """
        names = tuple(names)
        if names == self.class_names:
            return self
        number = {name: i for i, name in enumerate(names)}
        table = np.array([number.get(name, -1) for name in self.class_names], np.int64)
        held = np.unique(np.concatenate([self.y_train, self.y_test]))
        unknown = [self.class_names[label] for label in held if table[label] < 0]
        if unknown:
            raise ValueError(
                f"data set {self.name!r} has examples of"
                f" {listed([self.class_names[label] for label in held])}, expected classes among"
                f" {listed(names)}: {listed(unknown)} must be renamed or left out"
            )
        y_train, y_test = table[self.y_train], table[self.y_test]
        return replace(self, y_train=y_train, y_test=y_test, classes=len(names), class_names=names)

    def normalise(self, x: np.ndarray) -> np.ndarray:
        """(x / scale - mean) / std as float32 (B, C, H, W), for stored images `x` of that shape."""
        # One multiplication and one subtraction in place: a device does this on every batch.
        factor = (1 / (np.float64(self.scale) * self.std)).astype(np.float32)
        shift = (self.mean.astype(np.float64) / self.std).astype(np.float32)
        out = np.multiply(x, factor[:, None, None], dtype=np.float32, order="C")
        out -= shift[:, None, None]
        return out

    def _check_class_names(self) -> None:
        if len(self.class_names) != self.classes:
            raise ValueError(
                f"data set {self.name!r}: got {len(self.class_names)} class names, expected"
                f" {self.classes} (one per class) or none"
            )
        try:
            check_class_names(self.class_names)
        except ValueError as error:
            raise ValueError(f"data set {self.name!r}: {error}") from error

    def _check_shapes(self) -> None:
        if self.x_test.shape[1:] != self.x_train.shape[1:]:
            raise ValueError(
                f"data set {self.name!r}: test images have shape {self.x_test.shape[1:]}, expected"
                f" {self.x_train.shape[1:]} as in training; resize one of the two"
            )
        if self.x_test.dtype != self.x_train.dtype:
            raise ValueError(
                f"data set {self.name!r}: test images are {self.x_test.dtype}, expected"
                f" {self.x_train.dtype} as in training; store both alike"
            )

    def _check_statistics(self) -> None:
        channels = self.x_train.shape[1]
        for label, values in (("mean", self.mean), ("std", self.std)):
            if (
                values.shape != (channels,)
                or values.dtype != np.float32
                or not np.isfinite(values).all()
            ):
                raise ValueError(
                    f"data set {self.name!r}: {label} is {values.dtype} {values.shape}, expected"
                    f" finite float32 ({channels},); let Dataset.from_images compute it"
                )
        if not (self.std > 0).all() or not 0 < self.scale < np.inf:
            raise ValueError(
                f"data set {self.name!r}: std {self.std.tolist()} and scale {self.scale} must be"
                " positive; use 1 where a channel is constant"
            )
        smallest = float(self.std.min()) * self.scale
        if not 1 / np.finfo(np.float32).max < smallest:
            raise ValueError(
                f"data set {self.name!r}: pixels spread over {smallest:g} only, which float32"
                " cannot scale to 1; store them in a larger unit"
            )

    def _check_clients(self) -> None:
        ids, count = self.clients, len(self.y_train)
        if ids is None:
            return
        if ids.shape != (count,) or ids.dtype != np.int32 or (ids < 0).any():
            raise ValueError(
                f"data set {self.name!r}: clients is {ids.dtype} {ids.shape}, expected int32"
                f" ({count},) of ids from 0: one per training example, or None"
            )


def channel_statistics(x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float32 (C,) each, per channel of x (n, C, H, W) / scale.

    A constant channel gets std 1, so that it normalises to 0 and not to NaN.
    """
    count = x.size // x.shape[1]
    mean = sum(chunk.sum(axis=(0, 2, 3)) for chunk in _float_chunks(x)) / count
    # Two passes: E[x²] - E[x]² loses digits where the spread is small beside the mean.
    squares = (((c - mean[:, None, None]) ** 2).sum(axis=(0, 2, 3)) for c in _float_chunks(x))
    std = np.sqrt(sum(squares) / count) / scale
    constant = x.min(axis=(0, 2, 3)) == x.max(axis=(0, 2, 3))
    return (mean / scale).astype(np.float32), np.where(constant, 1.0, std).astype(np.float32)


def _float_chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    return (chunk.astype(np.float64) for chunk in _chunks(x))


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[start : start + CHUNK] for start in range(0, len(x), CHUNK))


def _value_range(x: np.ndarray, scale: float) -> tuple[float, float]:
    return float(x.min()) / scale, float(x.max()) / scale


def _check_images(what: str, x: np.ndarray) -> None:
    if x.dtype not in (np.uint8, np.float32) or x.ndim != 4:
        raise ValueError(
            f"{what} is {x.dtype} {x.shape}, expected uint8 or float32 of (examples, channels,"
            " height, width); convert it first"
        )
    if x.dtype == np.float32 and not all(np.isfinite(chunk).all() for chunk in _chunks(x)):
        raise ValueError(
            f"{what} holds NaN or infinity, or values beyond float32's 3.4e38, expected finite"
            " pixels; clean the data"
        )


def _check_some(what: str, x: np.ndarray) -> None:
    if x.size == 0:
        raise ValueError(f"{what} is empty, shape {x.shape}; at least 1 example is needed")


def _check_labels(what: str, y: np.ndarray, examples: int, classes: int) -> None:
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{what}: got {classes} classes, expected 1..{MAX_CLASSES}")
    if y.dtype != np.int64 or y.shape != (examples,):
        raise ValueError(
            f"{what} is {y.dtype} {y.shape}, expected int64 ({examples},): one label per image"
        )
    if len(y) and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f"{what} has labels {y.min()}..{y.max()}, expected 0..{classes - 1};"
            " map them to classes counted from 0"
        )


def with_inputs(dataset: Dataset, inputs: str) -> Dataset:
    """The data set with network inputs "standardised" (as loaded) or "unit" (0 to 1, as stored).

    Standardising needs the training images' mean and deviation, which a federation has to agree
    on; "unit" needs nothing.  Raises ValueError for any other word, and for "unit" where pixels lie
    outside 0..1.
    """
    if inputs == "standardised":
        return dataset
    if inputs != "unit":
        raise ValueError(f"inputs must be 'standardised' or 'unit', got {inputs!r}")
    _check_unit(dataset, "training", dataset.value_range)
    if len(dataset.x_test):
        _check_unit(dataset, "test", _value_range(dataset.x_test, dataset.scale))
    zeros = np.zeros_like(dataset.mean)
    return replace(dataset, mean=zeros, std=np.ones_like(dataset.std))


def _check_unit(dataset: Dataset, part: str, found: tuple[float, float]) -> None:
    low, high = found
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"data set {dataset.name!r}: inputs 'unit' with {part} pixels in {low:.9g}..{high:.9g},"
            " expected 0..1; store the pixels as bytes or divided by their largest value, or give"
            " --inputs standardised"
        )
