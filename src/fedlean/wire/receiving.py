"""Bytes to objects.  Whatever the bytes, a valid object or a WireError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fedlean.core import ClientTask, ClientUpdate, Masks, Params, SubModel, Work
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts
from fedlean.wire.errors import OverLimit, UnknownPattern, UnknownSpec, WireError
from fedlean.wire.fields import (
    AS_MASKED,
    MAX_JSON_BYTES,
    Table,
    check_kept,
    load_canonical,
    read_task,
    read_update,
)
from fedlean.wire.frozen import FrozenSection, decode_frozen, decode_frozen_values, dense
from fedlean.wire.header import (
    BARE,
    DRAWN,
    FROZEN,
    PATTERN,
    SPEC,
    TASK,
    UPDATE,
    VALUES,
    Header,
    read_header,
)
from fedlean.wire.pattern import NO_PATTERN, check_masks, pattern_hash
from fedlean.wire.reader import Reader
from fedlean.wire.sections import (
    decode_drawn,
    decode_masks,
    decode_names,
    decode_spec,
)
from fedlean.wire.statistic import decode_statistics
from fedlean.wire.values import decode_params, dtype_of

DEFAULT_LIMIT_BYTES = 1 << 28
_NOTHING: Params = MappingProxyType({})


def decode_task(
    data: bytes | memoryview,
    specs: Mapping[str, ModelSpec],
    patterns: Mapping[str, Masks],
    frozen: Params = _NOTHING,
    *,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    allow_nonfinite: bool = False,
    packed: bool = False,
) -> ClientTask:
    """The task in `data`; `specs` and `patterns` are what this side holds, by hash, and `frozen`
    the newest values of frozen tensors, packed or dense, by name.

    `limit_bytes` bounds the message and, apart from it, the arrays that it decodes into; with
    `packed` those of masked tensors are their kept values alone.  Raises
    UnknownSpec, UnknownPattern or UnknownFrozen where the sender took for granted what is not held
    here, WireError for everything else that is wrong.
    """
    reader, header, document = _open(data, TASK, limit_bytes)
    fields = read_task(document)
    if header.num_examples:
        raise WireError(f"a task has no examples, the header says {header.num_examples}")
    spec = _spec(reader, header, specs)
    section = decode_frozen(reader, spec) if header.flags & FROZEN else FrozenSection()
    sub_model = SubModel(_masks(reader, header, spec, patterns), section.frozen)
    kept = _frozen(reader, header, spec, sub_model.masks, section, frozen, allow_nonfinite)
    params = _params(reader, header, spec, sub_model, allow_nonfinite, packed)
    params |= kept if packed else dense(kept, sub_model.masks, reader)
    table: Table = {key: ("mean", forms) for key, forms in fields.arrays.items()}
    arrays = decode_statistics(reader, table, spec.tensor_shapes, allow_nonfinite)
    reader.finish()
    return ClientTask(
        round=header.round,
        phase=fields.phase,
        client=header.client,
        seed=header.seed,
        spec=spec,
        params=params,
        sub_model=sub_model,
        hparams=fields.hparams,
        arrays={key: one.tensors for key, one in arrays.items()},
    )


def decode_update(
    data: bytes | memoryview,
    task: ClientTask,
    *,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    allow_nonfinite: bool = False,
    packed: bool = False,
) -> ClientUpdate:
    """The answer to `task` in `data`; its sub-model is the task's own object where unchanged.

    Limits and errors as in `decode_task`; an answer to another task is a WireError, too.
    """
    reader, header, document = _open(data, UPDATE, limit_bytes)
    fields = read_update(document)
    _check_answers(header, task)
    check_kept(fields.work, task.spec)
    spec, given = task.spec, task.sub_model
    masks = _masks(reader, header, spec, {pattern_hash(given.masks): given.masks})
    sub_model = given if masks is given.masks else SubModel(masks, given.frozen)
    params = _params(reader, header, spec, sub_model, allow_nonfinite, packed)
    statistics = decode_statistics(reader, fields.statistics, spec.tensor_shapes, allow_nonfinite)
    reader.finish()
    return ClientUpdate(
        client=header.client,
        num_examples=header.num_examples,
        params=params,
        sub_model=sub_model,
        statistics=statistics,
        metrics=fields.metrics,
        work=tuple(_with_kept(work, sub_model.masks) for work in fields.work),
    )


def _open(
    data: bytes | memoryview, kind: int, limit_bytes: int
) -> tuple[Reader, Header, dict[str, Any]]:
    """Past the header and the JSON part."""
    if len(data) > limit_bytes:
        raise OverLimit(f"the message has {len(data)} bytes, the limit is {limit_bytes}")
    reader = Reader(data, limit_bytes)
    header = read_header(reader, kind)
    if header.json_bytes > MAX_JSON_BYTES:
        raise WireError(f"JSON part has {header.json_bytes} bytes, the limit is {MAX_JSON_BYTES}")
    return reader, header, load_canonical(bytes(reader.take(header.json_bytes, "the JSON part")))


def _spec(reader: Reader, header: Header, specs: Mapping[str, ModelSpec]) -> ModelSpec:
    claimed = header.spec.hex()
    if header.flags & SPEC:
        return decode_spec(reader, claimed)
    if claimed not in specs:
        raise UnknownSpec(claimed)
    return specs[claimed]


def _masks(
    reader: Reader,
    header: Header,
    spec: ModelSpec,
    patterns: Mapping[str, Masks],
) -> Masks:
    claimed = header.pattern.hex()
    if header.flags & DRAWN and not header.flags & PATTERN:
        raise WireError("the flag of random masks comes without that of a pattern")
    if header.flags & PATTERN:
        drawn = bool(header.flags & DRAWN)
        masks = decode_drawn(reader, spec) if drawn else decode_masks(reader, spec)
        got = pattern_hash(masks)
        if not masks or got != claimed:
            raise WireError(f"the pattern received has hash {got}, the header says {claimed}")
        return masks
    if claimed not in patterns:
        if claimed == NO_PATTERN:
            return {}
        raise UnknownPattern(claimed)
    # Held under this hash, but perhaps for another model.
    check_masks(patterns[claimed], spec.tensor_shapes)
    return patterns[claimed]


def _frozen(
    reader: Reader,
    header: Header,
    spec: ModelSpec,
    masks: Masks,
    section: FrozenSection,
    held: Params,
    allow_nonfinite: bool,
) -> dict[str, np.ndarray]:
    """Packed values of the frozen tensors, those that came and those that are held."""
    sent = bool(header.flags & VALUES)
    if sent and not header.flags & FROZEN:
        raise WireError("the flag of frozen values comes without that of frozen tensors")
    if not sent and not section.valued:
        return {}
    return decode_frozen_values(
        reader, spec, section, masks, held, sent=sent, allow_nonfinite=allow_nonfinite
    )


def _params(
    reader: Reader,
    header: Header,
    spec: ModelSpec,
    sub_model: SubModel,
    allow_nonfinite: bool,
    packed: bool,
) -> dict[str, np.ndarray]:
    """The tensors carried that are not frozen."""
    if header.flags & BARE:
        return {}
    carried = {name: spec.tensor_shapes[name] for name in decode_names(reader, spec, "params")}
    if frozen := sorted(carried.keys() & sub_model.frozen):
        raise WireError(f"params: {frozen[0]!r} is frozen, its values have a section of their own")
    value_dtype = dtype_of(header.value_dtype)
    return decode_params(reader, carried, sub_model.masks, value_dtype, allow_nonfinite, packed)


def _with_kept(work: Work, masks: Masks) -> Work:
    return replace(work, kept=kept_counts(masks)) if work.kept is AS_MASKED else work


def _check_answers(header: Header, task: ClientTask) -> None:
    expected = {
        "round": (header.round, task.round),
        "client": (header.client, task.client),
        "seed": (header.seed, task.seed),
        "spec": (header.spec.hex(), task.spec.hash),
    }
    for what, (got, wanted) in expected.items():
        if got != wanted:
            raise WireError(f"the update answers {what} {got}, expected {wanted}")
