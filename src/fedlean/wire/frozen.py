"""Frozen tensors: who holds their values is sent one hash in their place.

    frozen   names of the frozen, names of those that the task has values of, 16 bytes of their hash
             (all zero: it has none)
    values   names of those whose values travel, then their kept coordinates in C order, as fp32

The hash is over the hashes of the tensors, each under its name.  A receiver keeps the newest values
by name, so that those which it has not travel alone; with what it holds of the others they must
have the hash, or it asks for all.  What both sides name by a hash is the same to the bit, so it is
never rounded.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from fedlean.core import ClientTask, Masks, Params
from fedlean.spec import ModelSpec
from fedlean.tree import fixed, is_packed, kept_values, pack, read_only, unpack
from fedlean.wire.errors import UnknownFrozen, WireError
from fedlean.wire.pattern import NO_PATTERN, pattern_hash
from fedlean.wire.reader import Reader
from fedlean.wire.sections import decode_names, encode_names, names_bytes
from fedlean.wire.values import check_params, decode_params, encode_params, values_bytes

NO_FROZEN = "0" * 32  # the hash of no values
_HASH_BYTES = 16
# Of read-only arrays while they live, by id, name and pattern: a round asks for the same ones once
# a client, perhaps of one under two names.
_hashed: dict[tuple[int, str, str], tuple[weakref.ref[np.ndarray], str]] = {}


class FrozenSection(NamedTuple):
    """What a task says of frozen tensors, short of the values."""

    frozen: frozenset[str] = frozenset()
    valued: frozenset[str] = frozenset()  # of those it has values
    key: str = NO_FROZEN  # the hash of these


def frozen_params(task: ClientTask) -> dict[str, np.ndarray]:
    """The task's values of frozen tensors, in the spec's order."""
    frozen = task.sub_model.frozen
    return {
        name: task.params[name]
        for name in task.spec.tensor_shapes
        if name in frozen and name in task.params
    }


def frozen_hashes(params: Params, masks: Masks) -> dict[str, str]:
    """By tensor, 32 hex digits over its name, kept values and mask, packed or dense alike.

    That of a read-only array is computed once.
    """
    return {name: _tensor_hash(name, value, masks.get(name)) for name, value in params.items()}


def hash_of(hashes: Mapping[str, str]) -> str:
    """32 hex digits over tensors' hashes by name.

    >>> hash_of({}) == NO_FROZEN
    True
    """
    if not hashes:
        return NO_FROZEN
    digest = hashlib.blake2b(digest_size=_HASH_BYTES)
    for name in sorted(hashes):
        digest.update(repr((name, hashes[name])).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def frozen_hash(params: Params, masks: Masks) -> str:
    """`hash_of` the `frozen_hashes`: what a task names its frozen values by."""
    return hash_of(frozen_hashes(params, masks))


def pattern_of(name: str, masks: Masks) -> str:
    """The hash of the mask of `name` alone."""
    return pattern_hash({name: masks[name]}) if name in masks else NO_PATTERN


def packed_hash(name: str, packed: np.ndarray, pattern: str) -> str:
    """That of `frozen_hashes`, of packed values whose mask has the hash `pattern`."""
    value = np.ascontiguousarray(packed, "<f4")
    digest = hashlib.blake2b(pattern.encode(), digest_size=_HASH_BYTES)
    digest.update(repr((name, value.shape)).encode("utf-8", "surrogatepass"))
    digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _tensor_hash(name: str, value: np.ndarray, mask: np.ndarray | None) -> str:
    pattern = NO_PATTERN if mask is None else pattern_hash({name: mask})
    key = id(value), name, pattern
    known = _hashed.get(key)
    if known is not None and known[0]() is value:
        return known[1]
    packed = value
    if mask is not None and not is_packed(value, mask):
        packed = kept_values(value, mask)
    found = packed_hash(name, packed, pattern)
    if fixed(value):
        _hashed[key] = (weakref.ref(value, lambda _: _hashed.pop(key, None)), found)
    return found


def frozen_values_bytes(names: Iterable[str], masks: Masks, spec: ModelSpec) -> int:
    shapes = {name: spec.tensor_shapes[name] for name in names}
    return names_bytes(spec) + values_bytes(shapes, masks, "fp32")


def encode_frozen(section: FrozenSection, spec: ModelSpec) -> bytes:
    names = encode_names(section.frozen, spec, "frozen")
    return names + encode_names(section.valued, spec, "frozen") + bytes.fromhex(section.key)


def encode_frozen_values(params: Params, masks: Masks, spec: ModelSpec) -> list[bytes | memoryview]:
    names = encode_names(params, spec, "values of the frozen")
    return [names, *encode_params(params, params, masks, "fp32")]


def decode_frozen(reader: Reader, spec: ModelSpec) -> FrozenSection:
    names = frozenset(decode_names(reader, spec, "frozen"))
    valued = frozenset(decode_names(reader, spec, "frozen"))
    key = bytes(reader.take(_HASH_BYTES, "the hash of the frozen")).hex()
    if not names:
        raise WireError("frozen: no tensor is named, which goes without saying")
    if not valued <= names:
        raise WireError("frozen: values of tensors that are not frozen")
    if bool(valued) == (key == NO_FROZEN):
        raise WireError(f"frozen: {len(valued)} tensors with values have the hash {key}")
    return FrozenSection(names, valued, key)


def decode_frozen_values(
    reader: Reader,
    spec: ModelSpec,
    section: FrozenSection,
    masks: Masks,
    held: Params,
    *,
    sent: bool,
    allow_nonfinite: bool,
) -> dict[str, np.ndarray]:
    """All of them, packed and read-only: those that were sent, and the others as they are held.

    Raises UnknownFrozen where others are held than the message takes for granted, or none, and
    WireError where what was sent is none of them or, all of them, has another hash.
    """
    come: dict[str, np.ndarray] = {}
    if sent:
        names = decode_names(reader, spec, "frozen values")
        if not names or not section.valued.issuperset(names):
            raise WireError("values of the frozen: none, or of tensors that are not frozen")
        shapes = {name: spec.tensor_shapes[name] for name in names}
        come = read_only(decode_params(reader, shapes, masks, "fp32", allow_nonfinite, packed=True))
    rest = section.valued - come.keys()
    come |= _held_values(reader, spec, rest, section.key, masks, held)
    values = {name: come[name] for name in spec.tensor_shapes if name in come}
    got = frozen_hash(values, masks)
    if got != section.key and rest:
        raise UnknownFrozen(section.key)
    if got != section.key:
        raise WireError(f"the values of the frozen have hash {got}, the message says {section.key}")
    return values


def _held_values(
    reader: Reader,
    spec: ModelSpec,
    names: Iterable[str],
    key: str,
    masks: Masks,
    held: Params,
) -> dict[str, np.ndarray]:
    """What is held of these.  Raises UnknownFrozen where one is not, or is of another shape."""
    shapes = {name: spec.tensor_shapes[name] for name in sorted(names)}
    # before it is read from wherever it is held
    reader.reserve(values_bytes(shapes, masks, "fp32"), "the frozen tensors held here")
    try:
        values = {name: held[name] for name in shapes}
        check_params(values, shapes, masks)
    except (KeyError, WireError):
        raise UnknownFrozen(key) from None
    return pack(values, masks)


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
