"""Arrays beside the parameters, bit for bit; bool arrays as patterns.

float32 arrays take as little as they need without loss: two bytes a value where all are bfloat16,
as a sender may have rounded them, and a pattern with the values that are not 0 where that is less.
They are written in the order of their names; the table in the JSON part says what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from fedlean.core import Statistic
from fedlean.layers import Shape
from fedlean.wire.bfloat16 import fits_bfloat16, from_halves, to_halves
from fedlean.wire.errors import WireError
from fedlean.wire.fields import BFLOAT16, SPARSE, STATISTIC_DTYPES, Table, TensorForm
from fedlean.wire.pattern import decode_mask, encode_mask, mask_bytes
from fedlean.wire.reader import Reader
from fedlean.wire.values import check_finite, raw_bytes

_CODES = {np.dtype(form): code for code, form in STATISTIC_DTYPES.items()}


def tensor_form(array: np.ndarray, own: Shape | None, what: str) -> TensorForm:
    """Code and shape; the shape is left out where it is the tensor's `own`."""
    if array.dtype not in _CODES:
        allowed = ", ".join(map(str, _CODES))
        raise WireError(f"statistic {what!r} has dtype {array.dtype}, expected one of {allowed}")
    return _code(array), None if array.shape == own else array.shape


def statistics_bytes(statistics: Mapping[str, Statistic]) -> int:
    arrays = (array for one in statistics.values() for array in one.tensors.values())
    return sum(map(_num_bytes, arrays))


def encode_statistics(statistics: Mapping[str, Statistic]) -> list[bytes | memoryview]:
    return [
        piece
        for _, tensors in sorted((key, one.tensors) for key, one in statistics.items())
        for name in sorted(tensors)
        for piece in _encode(tensors[name])
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


def _code(array: np.ndarray) -> str:
    """The shortest form."""
    if array.dtype != np.float32:
        return _CODES[array.dtype]
    code = BFLOAT16 if fits_bfloat16(array) else "f4"
    item, sent = _item_bytes(code), _not_zero(array)
    pruned = sent.size - int(np.count_nonzero(sent))
    return code + SPARSE if item * pruned > mask_bytes(sent) else code


def _item_bytes(code: str) -> int:
    return 2 if code.startswith(BFLOAT16) else np.dtype(STATISTIC_DTYPES[code[:2]]).itemsize


def _not_zero(array: np.ndarray) -> np.ndarray:
    """By its bits, for -0 is not to come back as 0."""
    return np.ascontiguousarray(array).view(np.uint32).reshape(array.shape) != 0


def _num_bytes(array: np.ndarray) -> int:
    if array.dtype == np.bool_:
        return mask_bytes(array)
    code = _code(array)
    if not code.endswith(SPARSE):
        return _item_bytes(code) * array.size
    sent = _not_zero(array)
    return mask_bytes(sent) + _item_bytes(code) * int(np.count_nonzero(sent))


def _encode(array: np.ndarray) -> list[bytes | memoryview]:
    if array.dtype == np.bool_:
        return [encode_mask(array)]
    code = _code(array)
    if not code.endswith(SPARSE):
        return [_values(array, code)]
    sent = _not_zero(array)
    return [encode_mask(sent), _values(array[sent], code)]


def _values(array: np.ndarray, code: str) -> memoryview:
    if code.startswith(BFLOAT16):
        return raw_bytes(to_halves(array), "<u2")
    return raw_bytes(array, STATISTIC_DTYPES[code[:2]])


def _decode(
    reader: Reader, form: TensorForm, own: Shape | None, what: str, allow_nonfinite: bool
) -> np.ndarray:
    code, shape = form
    shape = own if shape is None else shape
    if shape is None:
        raise WireError(f"statistic {what!r} names no tensor of the spec and gives no shape")
    if code == "b1":
        return decode_mask(reader, shape, what)
    if code.endswith(SPARSE):
        sent = decode_mask(reader, shape, what)
        values = _read_values(reader, int(np.count_nonzero(sent)), code, what)
        reader.reserve(values.itemsize * sent.size, f"statistic {what!r}")
        array = np.zeros(shape, values.dtype)
        array[sent] = values
    else:
        array = _read_values(reader, prod(shape), code, what).reshape(shape)
    if not allow_nonfinite:
        check_finite(array, f"statistic {what!r}")
    return array


def _read_values(reader: Reader, count: int, code: str, what: str) -> np.ndarray:
    """(count,), a copy: what lies in the message is neither aligned nor ours."""
    halves = code.startswith(BFLOAT16)
    dtype = np.dtype("<u2" if halves else STATISTIC_DTYPES[code[:2]])
    raw = reader.take(dtype.itemsize * count, f"statistic {what!r}")
    reader.reserve(2 * len(raw) if halves else len(raw), f"statistic {what!r}")
    array = np.frombuffer(raw, dtype)
    return from_halves(array) if halves else array.astype(dtype.newbyteorder("="))
