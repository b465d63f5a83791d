"""The optional parts of a payload, each self-delimiting given the spec: names, spec, extras, masks.

names    one bit per tensor of the spec, in its order, in ceil(tensors / 8) bytes
spec     u32 length, canonical JSON
masks    names of the masked, then their patterns
drawn    names of the masked, u64 seed, u32 kept coordinates of each
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import numpy as np

from fedlean.core import Masks
from fedlean.patterns.shuffled import shuffled_masks
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts, read_only
from fedlean.wire.errors import WireError
from fedlean.wire.fields import MAX_JSON_BYTES, dump, load
from fedlean.wire.pattern import decode_mask, encode_mask
from fedlean.wire.reader import Reader

_MAX_INPUT_AXES = 8


def names_bytes(spec: ModelSpec) -> int:
    return (len(spec.tensor_shapes) + 7) // 8


def encode_names(names: Collection[str], spec: ModelSpec, what: str) -> bytes:
    """Raises WireError where a name is no tensor of `spec`."""
    for name in names:
        if name not in spec.tensor_shapes:
            raise WireError(f"{what}: {name!r} names no tensor of the spec")
    return np.packbits(np.array([name in names for name in spec.tensor_shapes], bool)).tobytes()


def decode_names(reader: Reader, spec: ModelSpec, what: str) -> list[str]:
    """Names in the spec's order."""
    raw = np.frombuffer(reader.take(names_bytes(spec), what), np.uint8)
    bits = np.unpackbits(raw)
    if bits[len(spec.tensor_shapes) :].any():
        raise WireError(f"{what}: padding bits are set")
    return [name for name, bit in zip(spec.tensor_shapes, bits, strict=False) if bit]


def encode_spec(spec: ModelSpec) -> bytes:
    """Raises WireError beyond 1 MiB."""
    text = spec.to_json().encode()
    if len(text) > MAX_JSON_BYTES:
        raise WireError(f"the spec has {len(text)} bytes, the limit is {MAX_JSON_BYTES}")
    return len(text).to_bytes(4, "little") + text


def decode_spec(reader: Reader, expected: str) -> ModelSpec:
    """Raises WireError unless it is a spec in canonical form whose hash is `expected`."""
    length = reader.u32("the spec")
    if length > MAX_JSON_BYTES:
        raise WireError(f"the spec has {length} bytes, the limit is {MAX_JSON_BYTES}")
    raw = bytes(reader.take(length, "the spec"))
    document = load(raw, "spec")
    dump(document, "spec")  # NaN, infinity and lone surrogates pass Python's reader
    axes = document.get("input_shape")
    # Shape inference compares shapes for every input of every node: bound what that can cost.
    if not isinstance(axes, list) or len(axes) > _MAX_INPUT_AXES:
        raise WireError(f"spec: input_shape must have at most {_MAX_INPUT_AXES} axes")
    try:
        spec = ModelSpec.from_json(raw.decode())
        canonical = spec.to_json().encode() == raw
    # A layer's arithmetic on a stranger's numbers can fail in all these ways.
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise WireError(f"spec: {str(error)[:200]}") from None
    if not canonical:
        raise WireError("spec: not canonical")
    if spec.hash != expected:
        raise WireError(f"the spec received has hash {spec.hash}, the header says {expected}")
    _check_sides(spec)
    return spec


def _check_sides(spec: ModelSpec) -> None:
    """A fractional stride passes the layers' own checks and gives shapes that are no integers."""
    for name, shape in (*spec.shapes.items(), *spec.tensor_shapes.items()):
        if any(type(side) is not int or side < 1 for side in shape):
            raise WireError(f"spec: {name!r} has shape {str(shape)[:100]}")


def encode_masks(masks: Masks, spec: ModelSpec) -> list[bytes]:
    names = encode_names(masks, spec, "masks")
    return [names, *(encode_mask(masks[n]) for n in spec.tensor_shapes if n in masks)]


def encode_drawn(masks: Masks, seed: int, spec: ModelSpec) -> list[bytes]:
    if not 0 <= seed < 1 << 64:
        raise WireError(f"mask_seed must be in [0, 2^64), got {seed}")
    counts = kept_counts(masks)
    numbers = [counts[name].to_bytes(4, "little") for name in spec.tensor_shapes if name in masks]
    return [encode_names(masks, spec, "masks"), seed.to_bytes(8, "little"), *numbers]


def drawn_bytes(masks: Masks, spec: ModelSpec) -> int:
    return names_bytes(spec) + 8 + 4 * len(masks)


def decode_drawn(reader: Reader, spec: ModelSpec) -> Masks:
    """bool arrays in the spec's shapes."""
    names = decode_names(reader, spec, "masks")
    seed = int.from_bytes(reader.take(8, "the masks' seed"), "little")
    counts = {name: reader.u32(f"the kept coordinates of {name!r}") for name in names}
    sizes = [prod(spec.tensor_shapes[name]) for name in names]
    # the masks, and the random words of the largest of them, of which a selection makes copies
    reader.reserve(sum(sizes) + 3 * 8 * max(sizes, default=0), "the masks' seed and counts")
    try:
        return shuffled_masks(spec, counts, seed)
    except ValueError as error:
        raise WireError(f"random masks: {error}") from None


def decode_masks(reader: Reader, spec: ModelSpec) -> dict[str, np.ndarray]:
    """bool arrays in the spec's shapes, read-only."""
    names = decode_names(reader, spec, "masks")
    masks = {name: decode_mask(reader, spec.tensor_shapes[name], name) for name in names}
    return read_only(masks)
