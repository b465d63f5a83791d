"""Arrays beside the parameters: dense and bit for bit; bool arrays as patterns.

They are written in the order of their names; the table in the JSON part says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from fedlean.core import Statistic
from fedlean.layers import Shape
from fedlean.wire.errors import WireError
from fedlean.wire.fields import STATISTIC_DTYPES, Table, TensorForm
from fedlean.wire.pattern import decode_mask, encode_mask, mask_bytes
from fedlean.wire.reader import Reader
from fedlean.wire.values import check_finite, raw_bytes

_CODES = {np.dtype(form): code for code, form in STATISTIC_DTYPES.items()}


def tensor_form(array: np.ndarray, own: Shape | None, what: str) -> TensorForm:
    """Dtype code and shape; the shape is left out where it is the tensor's `own`."""
    if array.dtype not in _CODES:
        allowed = ", ".join(map(str, _CODES))
        raise WireError(f"statistic {what!r} has dtype {array.dtype}, expected one of {allowed}")
    return _CODES[array.dtype], None if array.shape == own else array.shape


def statistics_bytes(statistics: Mapping[str, Statistic]) -> int:
    arrays = (array for one in statistics.values() for array in one.tensors.values())
    return sum(mask_bytes(a) if a.dtype == np.bool_ else a.nbytes for a in arrays)


def encode_statistics(statistics: Mapping[str, Statistic]) -> list[bytes | memoryview]:
    return [
        _encode(tensors[name])
        for _, tensors in sorted((key, one.tensors) for key, one in statistics.items())
        for name in sorted(tensors)
    ]


def decode_statistics(
    reader: Reader, table: Table, shapes: Mapping[str, Shape], allow_nonfinite: bool
) -> dict[str, Statistic]:
    """The arrays that `table` announces.  Raises WireError if malformed."""
    out: dict[str, Statistic] = {}
    for key, (reduction, forms) in sorted(table.items()):
        tensors = {
            name: _decode(reader, forms[name], shapes.get(name), f"{key}.{name}", allow_nonfinite)
            for name in sorted(forms)
        }
        out[key] = Statistic(tensors, reduction)
    return out


def _encode(array: np.ndarray) -> bytes | memoryview:
    if array.dtype == np.bool_:
        return encode_mask(array)
    return raw_bytes(array, STATISTIC_DTYPES[_CODES[array.dtype]])


def _decode(
    reader: Reader, form: TensorForm, own: Shape | None, what: str, allow_nonfinite: bool
) -> np.ndarray:
    code, shape = form
    shape = own if shape is None else shape
    if shape is None:
        raise WireError(f"statistic {what!r} names no tensor of the spec and gives no shape")
    if code == "b1":
        return decode_mask(reader, shape, what)
    dtype = np.dtype(STATISTIC_DTYPES[code])
    raw = reader.take(dtype.itemsize * prod(shape), f"statistic {what!r}")
    reader.reserve(len(raw), f"statistic {what!r}")
    array = np.frombuffer(raw, dtype).astype(dtype.newbyteorder("=")).reshape(shape)
    if not allow_nonfinite:
        check_finite(array, f"statistic {what!r}")
    return array
