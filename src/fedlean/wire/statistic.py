"""Arrays beside the parameters, bit for bit; bool arrays as patterns.

float32 arrays take as little as they need without loss: two bytes a value where all are bfloat16
or float16, one where all are steps of a scale, as a sender may have rounded them, and a pattern
with the values that are not 0 where that is less.
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
from fedlean.wire.fields import (
    BFLOAT16,
    FLOAT16,
    SCALED,
    SPARSE,
    STATISTIC_DTYPES,
    Table,
    TensorForm,
)
from fedlean.wire.pattern import decode_mask, encode_mask, mask_bytes
from fedlean.wire.reader import Reader
from fedlean.wire.scaled_int8 import SCALE_BYTES, fits_int8, from_int8, to_int8
from fedlean.wire.values import check_finite, raw_bytes

_CODES = {np.dtype(form): code for code, form in STATISTIC_DTYPES.items()}
_NARROW = {BFLOAT16: "<u2", FLOAT16: "<f2", SCALED: "<i1"}  # codes of float32 in fewer bytes


def tensor_form(
    array: np.ndarray, own: Shape | None, what: str, mask: np.ndarray | None = None
) -> TensorForm:
    """Code and shape; the shape is left out where it is the tensor's `own`.

    With a mask, `array` holds its values where that is True: it travels so, and arrives dense.
    """
    if mask is not None:
        _check_packed(array, mask, what)
        return _packed_code(array), None if mask.shape == own else mask.shape
    if array.dtype not in _CODES:
        allowed = ", ".join(map(str, _CODES))
        raise WireError(f"statistic {what!r} has dtype {array.dtype}, expected one of {allowed}")
    return _code(array), None if array.shape == own else array.shape


def statistics_bytes(statistics: Mapping[str, Statistic]) -> int:
    return sum(
        _num_bytes(array, one.masks.get(name))
        for one in statistics.values()
        for name, array in one.tensors.items()
    )


def encode_statistics(statistics: Mapping[str, Statistic]) -> list[bytes | memoryview]:
    return [
        piece
        for key in sorted(statistics)
        for name in sorted(statistics[key].tensors)
        for piece in _encode(statistics[key].tensors[name], statistics[key].masks.get(name))
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
    if fits_int8(array):
        return SCALED
    code = BFLOAT16 if fits_bfloat16(array) else "f4"
    if code == "f4" and _fits_float16(array):
        return FLOAT16
    item, sent = _item_dtype(code).itemsize, _not_zero(array)
    pruned = sent.size - int(np.count_nonzero(sent))
    return code + SPARSE if item * pruned > mask_bytes(sent) else code


def _check_packed(values: np.ndarray, mask: np.ndarray, what: str) -> None:
    count = int(np.count_nonzero(mask))
    if values.dtype != np.float32 or mask.dtype != np.bool_ or values.shape != (count,):
        raise WireError(
            f"statistic {what!r} is {values.dtype} {values.shape} under a mask of {mask.dtype}, "
            f"expected float32 ({count},), what the mask keeps, under bool"
        )


def _packed_code(values: np.ndarray) -> str:
    return (BFLOAT16 if fits_bfloat16(values) else "f4") + SPARSE


def _fits_float16(array: np.ndarray) -> bool:
    """Whether every value of a float32 array is a float16, and there is one."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    if not array.size or int(np.bitwise_or.reduce(bits, axis=None)) & 0x1FFF:
        return False
    with np.errstate(over="ignore"):
        again = np.ascontiguousarray(array).astype("<f2").astype(np.float32)
    return np.array_equal(again.view(np.uint32), bits)


def _item_dtype(code: str) -> np.dtype:
    return np.dtype(_NARROW.get(code[:2]) or STATISTIC_DTYPES[code[:2]])


def _not_zero(array: np.ndarray) -> np.ndarray:
    """By its bits, for -0 is not to come back as 0."""
    return np.ascontiguousarray(array).view(np.uint32).reshape(array.shape) != 0


def _num_bytes(array: np.ndarray, mask: np.ndarray | None) -> int:
    if mask is not None:
        return mask_bytes(mask) + _item_dtype(_packed_code(array)).itemsize * array.size
    if array.dtype == np.bool_:
        return mask_bytes(array)
    code = _code(array)
    item = _item_dtype(code).itemsize
    if not code.endswith(SPARSE):
        return item * array.size + (SCALE_BYTES if code == SCALED else 0)
    sent = _not_zero(array)
    return mask_bytes(sent) + item * int(np.count_nonzero(sent))


def _encode(array: np.ndarray, mask: np.ndarray | None) -> list[bytes | memoryview]:
    if mask is not None:
        return [encode_mask(mask), _values(array, _packed_code(array))]
    if array.dtype == np.bool_:
        return [encode_mask(array)]
    code = _code(array)
    if code == SCALED:
        scale, steps = to_int8(array)
        return [scale.astype("<f4").tobytes(), raw_bytes(steps, "<i1")]
    if not code.endswith(SPARSE):
        return [_values(array, code)]
    sent = _not_zero(array)
    return [encode_mask(sent), _values(array[sent], code)]


def _values(array: np.ndarray, code: str) -> memoryview:
    if code.startswith(BFLOAT16):
        return raw_bytes(to_halves(array), "<u2")
    return raw_bytes(array, _item_dtype(code).str)


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
    dtype, narrow = _item_dtype(code), code[:2] in _NARROW
    scale = np.float32(1)
    if code == SCALED:
        scale = np.frombuffer(reader.take(SCALE_BYTES, f"statistic {what!r}"), "<f4")[0]
        if not 0 <= scale < np.inf:
            raise WireError(f"statistic {what!r} has the scale {scale}, expected a number >= 0")
    raw = reader.take(dtype.itemsize * count, f"statistic {what!r}")
    reader.reserve(4 * count if narrow else len(raw), f"statistic {what!r}")
    array = np.frombuffer(raw, dtype)
    if code == SCALED:
        with np.errstate(over="ignore"):  # the caller looks for what this hides
            return from_int8(np.float32(scale), array)
    if code.startswith(BFLOAT16):
        return from_halves(array)
    return array.astype(np.float32 if narrow else dtype.newbyteorder("="))
