"""Frozen tensors: who holds their values is sent a hash in their place.

    frozen   names of the frozen, 16 bytes of hash (all zero: none of them has values)
    values   names of those with values, then their kept coordinates in C order, always as fp32

Values that both sides name by a hash are the same to the bit, so they are never rounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from fedlean.core import ClientTask, Masks, Params
from fedlean.spec import ModelSpec
from fedlean.tree import is_packed, pack, unpack
from fedlean.wire.errors import UnknownFrozen, WireError
from fedlean.wire.pattern import NO_PATTERN, pattern_hash
from fedlean.wire.reader import Reader
from fedlean.wire.sections import decode_names, encode_names, names_bytes
from fedlean.wire.values import check_params, decode_params, encode_params, values_bytes

NO_FROZEN = "0" * 32  # the hash of no values
_HASH_BYTES = 16


def frozen_params(task: ClientTask) -> dict[str, np.ndarray]:
    """The task's values of frozen tensors, in the spec's order."""
    frozen = task.sub_model.frozen
    return {
        name: task.params[name]
        for name in task.spec.tensor_shapes
        if name in frozen and name in task.params
    }


def frozen_hash(params: Params, masks: Masks) -> str:
    """32 hex digits over names, kept values and the masks of `params`, packed or dense alike.

    >>> frozen_hash({}, {}) == NO_FROZEN
    True
    """
    return hash_of(pack(params, masks), pattern_of(params, masks)) if params else NO_FROZEN


def pattern_of(names: Iterable[str], masks: Masks) -> str:
    """The hash of the masks of `names` alone."""
    own = {name: masks[name] for name in names if name in masks}
    return pattern_hash(own) if own else NO_PATTERN


def hash_of(packed: Params, pattern: str) -> str:
    """`frozen_hash` of packed values, whose masks have the hash `pattern`."""
    digest = hashlib.blake2b(pattern.encode(), digest_size=_HASH_BYTES)
    for name in sorted(packed):
        value = np.ascontiguousarray(packed[name], "<f4")
        digest.update(repr((name, value.shape)).encode("utf-8", "surrogatepass"))
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def frozen_values_bytes(params: Params, masks: Masks, spec: ModelSpec) -> int:
    shapes = {name: spec.tensor_shapes[name] for name in params}
    return names_bytes(spec) + values_bytes(shapes, masks, "fp32")


def encode_frozen(frozen: frozenset[str], key: str, spec: ModelSpec) -> bytes:
    return encode_names(frozen, spec, "frozen") + bytes.fromhex(key)


def encode_frozen_values(params: Params, masks: Masks, spec: ModelSpec) -> list[bytes | memoryview]:
    names = encode_names(params, spec, "values of the frozen")
    return [names, *encode_params(params, params, masks, "fp32")]


def decode_frozen(reader: Reader, spec: ModelSpec) -> tuple[frozenset[str], str]:
    """Names of the frozen, and the hash of those values of theirs that the task has."""
    names = frozenset(decode_names(reader, spec, "frozen"))
    key = bytes(reader.take(_HASH_BYTES, "the hash of the frozen")).hex()
    if not names:
        raise WireError("frozen: no tensor is named, which goes without saying")
    return names, key


def decode_frozen_values(
    reader: Reader,
    spec: ModelSpec,
    frozen: frozenset[str],
    key: str,
    masks: Masks,
    allow_nonfinite: bool,
) -> dict[str, np.ndarray]:
    """Packed.  Raises WireError unless they are of frozen tensors and have the hash `key`."""
    shapes = {
        name: spec.tensor_shapes[name] for name in decode_names(reader, spec, "frozen values")
    }
    if not shapes or not shapes.keys() <= frozen:
        raise WireError("values of the frozen: none, or of tensors that are not frozen")
    values = decode_params(reader, shapes, masks, "fp32", allow_nonfinite, packed=True)
    got = hash_of(pack(values, masks), pattern_of(values, masks))
    if got != key:
        raise WireError(f"the values of the frozen have hash {got}, the message says {key}")
    return values


def held_values(
    reader: Reader,
    spec: ModelSpec,
    frozen: frozenset[str],
    key: str,
    masks: Masks,
    held: Mapping[str, Params],
) -> dict[str, np.ndarray]:
    """What is held under `key`.  Raises UnknownFrozen where it is not, WireError if it is of
    another model or has no room.
    """
    shapes = {name: spec.tensor_shapes[name] for name in sorted(frozen)}
    # before it is read from wherever it is held
    reader.reserve(values_bytes(shapes, masks, "fp32"), "the frozen tensors held here")
    try:
        values = dict(held[key])
    except KeyError:
        raise UnknownFrozen(key) from None
    check_params(values, shapes, masks)
    return values


def dense(values: Params, masks: Masks, reader: Reader) -> dict[str, np.ndarray]:
    """With zeros where pruned, as a task has them that is not asked for packed."""
    out: dict[str, np.ndarray] = {}
    for name, value in values.items():
        mask = masks.get(name)
        if mask is not None and is_packed(value, mask):
            reader.reserve(4 * mask.size, f"params: {name!r}")
            value = unpack(value, mask)
        out[name] = value
    return out
