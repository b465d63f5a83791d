"""Tensors as bytes: values of the kept coordinates in C order, as fp32, fp16 or scaled int8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Literal

import numpy as np

from fedlean.core import Masks, Params
from fedlean.layers import Shape
from fedlean.spec import ModelSpec
from fedlean.tree import is_packed, kept_count, pack
from fedlean.wire.errors import WireError
from fedlean.wire.reader import Reader

ValueDtype = Literal["fp32", "fp16", "int8"]
VALUE_DTYPES: tuple[ValueDtype, ...] = ("fp32", "fp16", "int8")  # position = code in the header
_FORMS = {"fp32": "<f4", "fp16": "<f2", "int8": "<i1"}
_SCALE_BYTES = 4
_MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))


def dtype_code(value_dtype: ValueDtype) -> int:
    if value_dtype not in VALUE_DTYPES:
        raise WireError(f"unknown value_dtype {value_dtype!r}, expected one of {VALUE_DTYPES}")
    return VALUE_DTYPES.index(value_dtype)


def dtype_of(code: int) -> ValueDtype:
    if code >= len(VALUE_DTYPES):
        raise WireError(f"unknown value dtype {code}, expected one of {VALUE_DTYPES} by position")
    return VALUE_DTYPES[code]


def params_payload_bytes(spec: ModelSpec, masks: Masks, *, value_dtype: ValueDtype = "fp32") -> int:
    """Bytes of the values of all tensors of `spec` under `masks`.

    >>> from fedlean.layers import Linear
    >>> from fedlean.spec import sequential
    >>> spec = sequential((4,), [("fc", Linear(3))])
    >>> half = {"fc.weight": np.arange(12).reshape(3, 4) % 2 == 0}
    >>> [params_payload_bytes(spec, half, value_dtype=d) for d in ("fp32", "fp16", "int8")]
    [36, 18, 17]
    """
    return values_bytes(spec.tensor_shapes, masks, value_dtype)


def values_bytes(shapes: Mapping[str, Shape], masks: Masks, value_dtype: ValueDtype) -> int:
    """Bytes of the values of the tensors named by `shapes`."""
    dtype_code(value_dtype)
    item = np.dtype(_FORMS[value_dtype]).itemsize
    scale = _SCALE_BYTES if value_dtype == "int8" else 0
    return sum(scale + item * _kept(masks.get(name), shape) for name, shape in shapes.items())


def check_params(params: Params, shapes: Mapping[str, Shape], masks: Masks) -> None:
    """Raises WireError where a tensor is not float32 in its shape, or packed where masked."""
    for name, value in params.items():
        if name not in shapes:
            raise WireError(f"params: {name!r} names no tensor of the spec")
        mask = masks.get(name)
        packed = mask is not None and is_packed(value, mask)
        if value.dtype != np.float32 or (value.shape != shapes[name] and not packed):
            raise WireError(
                f"params: {name!r} must be float32 of shape {shapes[name]}, got {value.dtype} of "
                f"shape {value.shape}"
            )


def encode_params(
    params: Params, names: Iterable[str], masks: Masks, value_dtype: ValueDtype
) -> list[bytes | memoryview]:
    """One piece per tensor, in the order of `names`."""
    sent = pack(params, masks)
    pieces: list[bytes | memoryview] = []
    for name in names:
        pieces.append(_encode_values(sent[name], value_dtype, name))
    return pieces


def decode_params(
    reader: Reader,
    shapes: Mapping[str, Shape],
    masks: Masks,
    value_dtype: ValueDtype,
    allow_nonfinite: bool,
    packed: bool = False,
) -> dict[str, np.ndarray]:
    """float32 arrays by name; masked coordinates are 0, or left out where `packed`.

    Raises WireError if malformed.
    """
    params: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        mask = masks.get(name)
        values = _decode_values(reader, _kept(mask, shape), value_dtype, name)
        if not allow_nonfinite:
            check_finite(values, f"params: {name!r}")
        if mask is None:
            params[name] = values.reshape(shape)
        elif packed:
            params[name] = values
        else:
            reader.reserve(4 * mask.size, f"params: {name!r}")
            params[name] = np.zeros(shape, np.float32)
            params[name][mask] = values
    return params


def check_finite(values: np.ndarray, what: str) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise WireError(f"{what} holds values that are not finite")


def raw_bytes(array: np.ndarray, form: str) -> memoryview:
    """The bytes of `array` as dtype `form`, in C order; no copy where it is so already."""
    return np.ascontiguousarray(array, form).reshape(-1).view(np.uint8).data


def _kept(mask: np.ndarray | None, shape: Shape) -> int:
    return prod(shape) if mask is None else kept_count(mask)


def _encode_values(values: np.ndarray, value_dtype: ValueDtype, name: str) -> bytes | memoryview:
    if value_dtype == "int8":
        return _encode_int8(values, name)
    with np.errstate(over="ignore"):
        sent = values.astype(_FORMS[value_dtype], copy=False)
    if value_dtype == "fp16" and np.any(np.isinf(sent) & np.isfinite(values)):
        raise WireError(f"params: {name!r} has values beyond float16's 65504: send it as fp32")
    return raw_bytes(sent, _FORMS[value_dtype])


def _encode_int8(values: np.ndarray, name: str) -> bytes:
    """Scale float32 = max|x| / 127, then round(x / scale) as int8."""
    check_finite(values, f"params: {name!r}, to be sent as int8,")
    scale = np.abs(values).max(initial=0.0).astype(np.float32) / np.float32(127)
    scale = np.minimum(scale, _MAX_SCALE)  # rounded up, 127 times it would be infinite
    # All zero, or so small that the scale itself is lost: send zeros.
    steps = np.rint(values / scale) if scale > 0 else np.zeros(values.shape)
    return scale.astype("<f4").tobytes() + np.clip(steps, -127, 127).astype(np.int8).tobytes()


def _decode_values(reader: Reader, kept: int, value_dtype: ValueDtype, name: str) -> np.ndarray:
    """float32 (kept,), a copy: what lies in the message is neither aligned nor ours."""
    what = f"params: {name!r}"
    form = np.dtype(_FORMS[value_dtype])
    scale_bytes = _SCALE_BYTES if value_dtype == "int8" else 0
    raw = reader.take(scale_bytes + form.itemsize * kept, what)
    reader.reserve(4 * kept, what)
    values = np.frombuffer(raw[scale_bytes:], form).astype(np.float32)
    if value_dtype != "int8":
        return values
    scale = np.frombuffer(raw[:scale_bytes], "<f4")[0].astype(np.float32)
    if not scale >= 0:
        raise WireError(f"{what} has the scale {scale}, expected a number >= 0")
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what this hides
        values *= scale
    return values
