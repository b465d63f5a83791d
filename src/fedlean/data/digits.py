"""scikit-learn's digits: 1,797 grey 8 x 8 images of handwritten digits, nothing to download."""

from __future__ import annotations

import sys

import numpy as np

from fedlean.data.dataset import Dataset
from fedlean.data.source import Room, Source, in_memory, unlimited
from fedlean.data.stratify import stratified_sample

SHAPE, CLASSES, TRAINING_EXAMPLES = (1, 8, 8), 10, 1438  # known without scikit-learn
SPLIT_SEED = 0  # fixed: runs with different seeds must be tested on the same examples
TEST_SHARE = 0.2
SKLEARN_BYTES = 100_000_000  # counted for scikit-learn and SciPy, once imported


def digits_source(room: Room = unlimited) -> Source:
    """The digits as a source, whose examples are in memory already.  Raises ValueError as below."""
    if "sklearn.datasets" not in sys.modules:
        what = "scikit-learn, with which 'digits' comes,"
        room(SKLEARN_BYTES, what, "give a folder as --data")
    return in_memory(load_digits(), room)


def load_digits() -> Dataset:
    """The digits, shape (1, 8, 8), values 0..16, 1,438 for training and 359 held out by class.

    Raises ValueError when scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ModuleNotFoundError as error:
        raise ValueError(
            "data set 'digits' needs scikit-learn, which is not installed;"
            " pip install 'fedlean[sim]'"
        ) from error
    flat, labels = sklearn_digits(return_X_y=True)  # float64 (1797, 64) of whole numbers
    x = flat.astype(np.uint8).reshape(-1, 1, 8, 8)
    y = labels.astype(np.int64)
    held_out = np.zeros(len(y), bool)
    held_out[stratified_sample(y, round(TEST_SHARE * len(y)), SPLIT_SEED)] = True
    return Dataset.from_images(
        "digits",
        (x[~held_out], y[~held_out]),
        (x[held_out], y[held_out]),
        classes=10,
        scale=16.0,
        class_names=tuple("0123456789"),
    )
