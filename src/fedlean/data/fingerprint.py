"""What a data set holds, in a few digests: so that a run is not continued on other data.

It depends on the arrays and not on the files that they came from.  Of a part above SAMPLED_BYTES
only a sample is digested, in which a single changed pixel may be missed; another order, other
images or another size is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlean.data.dataset import Dataset
from fedlean.data.labels import listed

SAMPLED_BYTES = 16_000_000  # digested of one part at most
PIECES = 4000  # of a sample, spread evenly
DIGEST_BYTES = 16
MEANING = {
    "x_train": "the training images",
    "y_train": "the training labels",
    "x_test": "the test images",
    "y_test": "the test labels",
    "clients": "the client ids",
}


def fingerprint(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """One entry per array of the data set (shape, dtype, digest), and `classes` (names, scale).

    Values that JSON holds unchanged.  The time it takes is bounded, however large the data set is.
    """
    arrays = {part: getattr(dataset, part) for part in MEANING}
    entries = {part: _entry(array) for part, array in arrays.items() if array is not None}
    return entries | {"classes": {"names": list(dataset.class_names), "scale": dataset.scale}}


def changed_parts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; [] when nothing does.

    >>> before = {"y_test": {"shape": [360], "dtype": "int64", "digest": "a"}}
    >>> changed_parts(before, {"y_test": {"shape": [359], "dtype": "int64", "digest": "b"}})
    ['the test labels (y_test): 359 examples, 360 before']
    """
    parts = [part for part in (*MEANING, "classes") if old.get(part) != new.get(part)]
    return [_change(part, old.get(part), new.get(part)) for part in parts]


def _entry(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "digest": _digest(array)}


def _digest(array: np.ndarray) -> str:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if len(data) <= SAMPLED_BYTES:
        digest.update(data)
        return digest.hexdigest()
    piece = SAMPLED_BYTES // PIECES
    for i in range(PIECES):
        start = (len(data) - piece) * i // (PIECES - 1)  # the first piece and the last included
        digest.update(data[start : start + piece])
    return digest.hexdigest()


def _change(part: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    if part == "classes":
        return _changed_classes(old or {}, new or {})
    what = f"{MEANING[part]} ({part})"
    if old is None or new is None:
        return f"{what}: {'there are none any more' if new is None else 'there were none before'}"
    if old["shape"][:1] != new["shape"][:1]:
        return f"{what}: {new['shape'][0]} examples, {old['shape'][0]} before"
    for field in ("shape", "dtype"):
        if old[field] != new[field]:
            return f"{what}: {field} {new[field]}, {old[field]} before"
    return what


def _changed_classes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if old.get("names") != new.get("names"):
        now, before = (listed(each.get("names", [])) for each in (new, old))
        return f"the classes: {now}; {before} before"
    return f"the value that counts as 1 (scale): {new['scale']:g}, {old['scale']:g} before"
