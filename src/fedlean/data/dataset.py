"""`Dataset`: labelled examples in memory, and how their values become network inputs.

Tables (n, C), signals (n, C, L) and pictures (n, C, H, W) differ in their shape alone.  Values stay
as they were stored (small integers wherever possible) and are normalised batch by batch: a set that
takes 47 MB as bytes would take 188 MB as float32.  This module reads no files (the loaders do) and
knows nothing of clients' shares (`fedlean.data.partition`) or batches (`fedlean.data.batches`).
"""

# n examples, C channels or columns, L length, H height, W width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedlean.data.labels import MAX_CLASSES, check_class_names, listed, numbered
from fedlean.data.moments import moments
from fedlean.normalisation import Normalisation

KEPT = (np.uint8, np.int8, np.int16, np.uint16, np.float32)  # types of examples in memory
MAX_AXES = 4  # of the array of all examples
CHUNK = 256  # examples looked at together, so that checks never hold a copy of the set


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set of examples of one shape, with what normalises them.

    x_train, x_test: (n, C), (n, C, L) or (n, C, H, W), of a type in KEPT.  y_train, y_test: int64
    (n,) in 0..classes-1.  mean, std: float32 (C,), of x_train / scale.  clients: int32 (n,) ≥ 0,
    who owns each training example, or None.  class_names: one per class, all different; given as
    (), classes count from "0".  notes: lines for the user about how it was read.  A device's share
    has no test examples, and a server's set may have no training examples: its mean is 0 and its
    deviation 1 then.  One without any has a declared_range of its values.

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
    notes: tuple[str, ...] = ()
    declared_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for part, x, y in (
            ("train", self.x_train, self.y_train),
            ("test", self.x_test, self.y_test),
        ):
            _check_examples(f"data set {self.name!r}: x_{part}", x)
            _check_labels(f"data set {self.name!r}: y_{part}", y, len(x), self.classes)
        if not self.x_train.size and not self.x_test.size and self.declared_range is None:
            raise ValueError(f"data set {self.name!r} is empty; at least 1 example is needed")
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
        train: tuple[np.ndarray, np.ndarray],  # x (n, C, ...), y int64 (n,)
        test: tuple[np.ndarray, np.ndarray],
        *,
        classes: int,
        scale: float,  # the stored value that counts as 1.0
        class_names: tuple[str, ...] = (),
        clients: np.ndarray | None = None,
        notes: tuple[str, ...] = (),
        declared_range: tuple[float, float] | None = None,
    ) -> Self:
        """A `Dataset` whose mean and std are computed on its training examples, if it has any.

        >>> x, y = np.array([[[[0, 255]]]], np.uint8), np.array([0])
        >>> data = Dataset.from_images("tiny", (x, y), (x, y), classes=1, scale=255.0)
        >>> data.input_shape, data.normalise(x).tolist()
        ((1, 1, 2), [[[[-1.0, 1.0]]]])
        """
        _check_examples(f"data set {name!r}: x_train", train[0])  # sound ones, for the statistics
        channels = train[0].shape[1]
        mean, std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        if train[0].size:
            mean, std = moments(train[0]).statistics(scale)
        about = (scale, class_names, clients, notes, declared_range)
        return cls(name, *train, *test, classes, mean, std, *about)

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        y: Any,
        *,
        clients: Any = None,
        test: tuple[Any, Any] | float | None = None,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> Dataset:
        """Your own arrays, or what NumPy makes one of.

        x: numbers (n, ...), each example in exactly the shape that the model takes, channels first:
        no axis is added or moved.  y: (n,) labels, whole numbers or text.  clients: (n,) ids of any
        kind, who owns each example.  test: (x, y) alike, or the share of the examples to hold out,
        drawn by class and always the same.  class_names: what integer labels count.

        Raises ValueError naming the argument that does not fit.

        >>> x, y = np.zeros((4, 1, 2, 2)), ["run", "walk", "run", "walk"]
        >>> data = Dataset.from_arrays(x, y, clients=["a", "a", "b", "b"], test=0.5)
        >>> data.class_names, len(data.y_train), data.input_shape
        (('run', 'walk'), 2, (1, 2, 2))
        """
        from fedlean.data.arrays import from_arrays

        return from_arrays(x, y, clients=clients, test=test, class_names=class_names, name=name)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        layout: str = "",
        label: str = "",
        length: int | None = None,
        test_share: float = 0.0,
    ) -> Dataset:
        """The data set in a folder, FOLDER:NAME, or "digits" (docs/data.md).

        What the files do not say is declared, as for `fedlean run`: what the axes of arrays are,
        the column of the classes, samples of a recording, the share held out for testing.  Raises
        ValueError when nothing there is recognised, or it is damaged.
        """
        from fedlean.data.declared import Declared
        from fedlean.data.load import load_dataset

        return load_dataset(str(folder), Declared(layout, label, length, test_share))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C,), (C, L) or (C, H, W) of one example."""
        return self.x_train.shape[1:]

    @cached_property
    def labels_held(self) -> tuple[str, ...]:
        """The names of the classes that have training examples, in the order of the classes."""
        counts = np.bincount(self.y_train, minlength=self.classes)
        return tuple(name for name, n in zip(self.class_names, counts, strict=True) if n)

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """The smallest and the largest value of x_train / scale; without any, of x_test / scale."""
        if not self.x_train.size and not self.x_test.size and self.declared_range is not None:
            return self.declared_range
        return _value_range(self.x_train if self.x_train.size else self.x_test, self.scale)

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
        """(x / scale - mean) / std as float32, for stored examples `x` (B, C, ...)."""
        return Normalisation(self.mean, self.std, self.scale)(x)

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
                f"data set {self.name!r}: test examples have shape {self.x_test.shape[1:]},"
                f" expected {self.x_train.shape[1:]} as in training; bring both to one shape"
            )
        if self.x_test.dtype != self.x_train.dtype:
            raise ValueError(
                f"data set {self.name!r}: test examples are {self.x_test.dtype}, expected"
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
                f"data set {self.name!r}: values spread over {smallest:g} only, which float32"
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


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[start : start + CHUNK] for start in range(0, len(x), CHUNK))


def _value_range(x: np.ndarray, scale: float) -> tuple[float, float]:
    return float(x.min()) / scale, float(x.max()) / scale


def _check_examples(what: str, x: np.ndarray) -> None:
    if x.dtype not in KEPT or not 2 <= x.ndim <= MAX_AXES:
        raise ValueError(
            f"{what} is {x.dtype} {x.shape}, expected {', '.join(t.__name__ for t in KEPT)} of"
            " (examples, columns), (examples, channels, length) or (examples, channels, height,"
            " width); convert it first"
        )
    if x.dtype == np.float32 and not all(np.isfinite(chunk).all() for chunk in _chunks(x)):
        raise ValueError(
            f"{what} holds NaN or infinity, or values beyond float32's 3.4e38, expected finite"
            " numbers; clean the data"
        )


def _check_labels(what: str, y: np.ndarray, examples: int, classes: int) -> None:
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{what}: got {classes} classes, expected 1..{MAX_CLASSES}")
    if y.dtype != np.int64 or y.shape != (examples,):
        raise ValueError(
            f"{what} is {y.dtype} {y.shape}, expected int64 ({examples},): one label per example"
        )
    if len(y) and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f"{what} has labels {y.min()}..{y.max()}, expected 0..{classes - 1};"
            " map them to classes counted from 0"
        )


def with_inputs(
    dataset: Dataset, inputs: str, mean: Sequence[float] = (), deviation: Sequence[float] = ()
) -> Dataset:
    """The data set with network inputs "standardised" (as loaded) or "unit" (0 to 1, as stored).

    Standardising needs the training examples' mean and deviation, which a federation has to agree
    on, or those that are given: one number for all channels, or one each, in units of the value
    that counts as 1.0.  "unit" needs nothing.  Raises ValueError for any other word, for numbers
    that do not fit, and for "unit" where values lie outside 0..1.
    """
    if mean or deviation:
        return _fixed(dataset, inputs, mean, deviation)
    if inputs == "standardised":
        return dataset
    if inputs != "unit":
        raise ValueError(f"inputs must be 'standardised' or 'unit', got {inputs!r}")
    for part, x in (("training", dataset.x_train), ("test", dataset.x_test)):
        if len(x):
            _check_unit(dataset, part, _value_range(x, dataset.scale))
    zeros = np.zeros_like(dataset.mean)
    return replace(dataset, mean=zeros, std=np.ones_like(dataset.std))


def _fixed(
    dataset: Dataset, inputs: str, mean: Sequence[float], deviation: Sequence[float]
) -> Dataset:
    channels = dataset.input_shape[0]
    if inputs != "standardised":
        raise ValueError(f"--mean and --deviation standardise: leave out --inputs {inputs}")
    for name, values in (("mean", mean), ("deviation", deviation)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"--{name} has {len(values)} numbers, expected 1, or {channels}: one for each"
                f" channel of {dataset.name!r}; --mean and --deviation go together"
            )
    given = (np.resize(np.array(each, np.float32), channels) for each in (mean, deviation))
    return replace(dataset, **dict(zip(("mean", "std"), given, strict=True)))


def _check_unit(dataset: Dataset, part: str, found: tuple[float, float]) -> None:
    low, high = found
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"data set {dataset.name!r}: inputs 'unit' with {part} values in {low:.9g}..{high:.9g},"
            " expected 0..1; store the values as bytes or divided by the largest, or give"
            " --inputs standardised"
        )
