"""What every example has beside its values: a class, a part (training or test), perhaps a client.

Files store these in many forms; here they become numbers, with the names that they had.
"""

# n examples

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlean.data.labels import WHOLE_NUMBER, as_text, classes_of, distinct, listed

# Words of a split; numbers and booleans are 0, False (training) and 1, True (test).
TRAIN = frozenset({"train", "training", "0", "false"})
TEST = frozenset({"test", "testing", "1", "true"})
OTHER = frozenset({"val", "valid", "validation", "dev"})  # neither trained on nor tested on
MOST_CLIENTS = 1 << 31


@dataclass(frozen=True)
class Columns:
    """Of all examples of a set.

    train, test: int64, rows of the file (or of each part's file).  y_train, y_test: int64, numbers
    of class_names.  clients: int32, of the training examples.  notes: what the user should know.
    """

    train: np.ndarray
    test: np.ndarray
    y_train: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    clients: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def one_table(
    labels: np.ndarray,
    *,
    names: Sequence[str] | None = None,
    split: np.ndarray | None = None,
    clients: np.ndarray | None = None,
) -> Columns:
    """Of a file whose rows are training and test examples; without `split` all are for training.

    labels, split, clients: (n,) or (n, 1).  Raises ValueError naming what does not fit.
    """
    class_names, y = classes_of(flat("y", labels), names)
    count = len(y)
    train, test = np.arange(count), np.empty(0, np.int64)
    notes: tuple[str, ...] = ()
    if split is not None:
        train, test = _parts(flat("split", split, count))
        left_out = count - len(train) - len(test)
        notes = (f"{left_out} examples for validation are left out",) if left_out else ()
    ids = None if clients is None else client_numbers(flat("client", clients, count))[train]
    return Columns(train, test, y[train], y[test], class_names, ids, notes)


def two_tables(
    train: np.ndarray,
    test: np.ndarray,
    *,
    names: Sequence[str] | None = None,
    clients: np.ndarray | None = None,
) -> Columns:
    """Of a file of training and one of test examples, of which one may be missing (length 0).

    train, test: labels (n,) or (n, 1); clients: of the training examples.  Raises ValueError naming
    what does not fit.
    """
    labels = [flat(f"y_{part}", y) for part, y in (("train", train), ("test", test)) if len(y)]
    class_names, y = classes_of(np.concatenate(labels), names) if labels else ((), np.empty(0, int))
    count = len(train)
    ids = None if clients is None else client_numbers(flat("client", clients, count))
    rows = np.arange(count), np.arange(len(test))
    return Columns(*rows, y[:count], y[count:], class_names, ids)


def flat(name: str, array: np.ndarray, count: int | None = None) -> np.ndarray:
    """(n,) of an array (n,) or (n, 1); of `count` entries, where that is known.

    Raises ValueError naming it when it is neither.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        hint = "; of one-hot rows take numpy.argmax(y, axis=1)" if name.startswith("y") else ""
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, expected (examples,) or (examples, 1): one"
            f" entry per example{hint}"
        )
    if count is not None and len(array) != count:
        raise ValueError(f"{name} has {len(array)} entries, expected {count} as in y")
    return array


def client_numbers(ids: np.ndarray) -> np.ndarray:
    """Client ids (n,) of any kind as int32 ≥ 0: numbers that fit as they are, others by their rank.

    >>> client_numbers(np.array([7, 3, 7])).tolist(), client_numbers(np.array(["b", "a"])).tolist()
    ([7, 3, 7], [1, 0])
    """
    try:
        values, which = distinct(ids)
    except ValueError as error:
        raise ValueError(f"client: {error}") from None
    if all(isinstance(value, int) or WHOLE_NUMBER.fullmatch(value) for value in values):
        numbers = [int(value) for value in values]
        if min(numbers) >= 0 and max(numbers) < MOST_CLIENTS:
            return np.array(numbers, np.int32)[which]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order))
        return rank[which]
    return which.astype(np.int32)


def _parts(split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the test examples."""
    if split.dtype.kind in "SU":
        words = np.char.lower(np.char.strip(as_text(split)))
        unknown = sorted(set(words.tolist()) - TRAIN - TEST - OTHER)
        if unknown:
            raise ValueError(
                f"split holds {listed(unknown)}, expected 'train' and 'test', or 0 and 1"
            )
        train, test = (np.isin(words, list(known)) for known in (TRAIN, TEST))
        return np.flatnonzero(train), np.flatnonzero(test)
    if split.dtype.kind not in "biuf" or not np.isin(split, (0, 1)).all():
        found = f"values {split.min()}..{split.max()}" if split.dtype.kind in "iuf" else split.dtype
        raise ValueError(
            f"split has {found}, expected 0 for training and 1 for test examples, or 'train' and"
            " 'test'"
        )
    return np.flatnonzero(split == 0), np.flatnonzero(split == 1)
