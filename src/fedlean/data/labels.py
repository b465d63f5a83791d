"""From the labels that a data set stores to classes: numbers from 0, each with a name.

A label keeps its meaning whatever else the set holds: a folder with the digits 3 and 7 only has
the classes "3" and "7", so that a federation can find them among its own.
"""

# n examples

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

MAX_CLASSES = 1 << 16  # a larger label is a damaged file, and would size a model's last layer
MAX_NAME_CHARACTERS = 200
WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,198}")  # as `str` writes it
SHOWN = 12  # names in a message


def classes_of(
    labels: np.ndarray, names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, and the class of each example, int64 (n,).

    labels: (n,) with n >= 1, of training and test examples together: booleans (0 and 1), whole
    numbers of any dtype, or text (also as UTF-8 bytes).  With `names`, numbers count them from 0
    and text is one of them.  Without, whole numbers from 0 on are class numbers, those between them
    included, and their digits are the names; of other numbers (smallest not 0) and of text every
    distinct value is a class, in ascending order.  Text that is whole numbers throughout counts as
    these.

    Raises ValueError when the labels are none of these or do not fit the names.

    >>> classes_of(np.array([7, 3, 7]))
    (('3', '7'), array([1, 0, 1]))
    >>> classes_of(np.array([2.0, 0.0]))
    (('0', '1', '2'), array([2, 0]))
    """
    values, which = distinct(labels)
    if names is not None:
        check_class_names(names)
        return tuple(names), _among(values, names)[which]
    if all(isinstance(value, int) or WHOLE_NUMBER.fullmatch(value) for value in values):
        numbers = [int(value) for value in values]
        if min(numbers) == 0:
            _check_count(max(numbers) + 1)
            return numbered(max(numbers) + 1), np.array(numbers, np.int64)[which]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
    else:  # text, which NumPy sorts by code point; so does it bytes of UTF-8
        order = list(range(len(values)))
    found = tuple(str(values[i]) for i in order)
    check_class_names(found)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return found, rank[which]


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes that count from 0: their digits."""
    return tuple(map(str, range(count)))


def distinct(labels: np.ndarray) -> tuple[Sequence[int | str], np.ndarray]:
    """The distinct values, all of one kind, and which of them each label is, int64 (n,).

    Numbers, and text by code point, are in ascending order.  Raises ValueError when they are
    neither whole numbers nor text.
    """
    kind = labels.dtype.kind
    if labels.ndim != 1 or not labels.size or kind not in "biufSU":
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}, expected one whole number or text per"
            " example; labels must be classes"
        )
    found, which = np.unique(labels, return_inverse=True)
    if kind in "SU":
        return [str(value) for value in as_text(found)], which
    if kind == "f":
        broken = found[~(np.isfinite(found) & (found == np.rint(found)))]
        if len(broken):
            raise ValueError(
                f"labels hold {broken[0]}, expected whole numbers or text; labels must be classes"
            )
    return [int(value) for value in found], which


def as_text(array: np.ndarray) -> np.ndarray:
    """UTF-8 bytes (dtype kind S) as text (kind U); text as it is.

    Raises ValueError for bytes that are not UTF-8.
    """
    if array.dtype.kind == "U":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"got bytes that are not UTF-8 ({error}); store text") from error


def check_class_names(names: Sequence[str]) -> None:
    """Raises ValueError unless they are 1..MAX_CLASSES different texts of a fit length."""
    _check_count(len(names))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"got the class name {repeated[0][:40]!r} more than once, expected {len(names)}"
            " different names"
        )
    for name in names:
        if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
            raise ValueError(
                f"got a class name of {len(name)} characters ({name[:40]!r}), expected"
                f" 1..{MAX_NAME_CHARACTERS}; name the class shortly"
            )


def listed(names: Sequence[str]) -> str:
    """For a message: the names, of many only the first ones and the last."""
    if len(names) <= SHOWN:
        return ", ".join(repr(name[:40]) for name in names)
    return f"{listed(names[: SHOWN - 1])}, ... {names[-1][:40]!r} ({len(names)} in all)"


def _among(values: Sequence[int | str], names: Sequence[str]) -> np.ndarray:
    """The class of each distinct value among `names`, int64; values are all of one kind."""
    number = {name: i for i, name in enumerate(names)}
    texts = [value for value in values if isinstance(value, str)]
    unknown = [text for text in texts if text not in number]
    if unknown:
        raise ValueError(
            f"labels hold {listed(unknown)}, expected names among the classes {listed(names)}"
        )
    numbers = [value for value in values if isinstance(value, int)]
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(names):
        raise ValueError(
            f"labels are {min(numbers)}..{max(numbers)}, expected 0..{len(names) - 1}, which count"
            f" the classes {listed(names)}"
        )
    return np.array([number[text] for text in texts] or numbers, np.int64)


def _check_count(classes: int) -> None:
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"got {classes} classes, expected 1..{MAX_CLASSES}; check the labels")
