"""Bytes to objects.  Whatever the bytes, a valid object or a WireError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedlean.core import ClientTask, ClientUpdate, Masks, SubModel, Work
from fedlean.layers import Shape
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts
from fedlean.wire.errors import UnknownPattern, UnknownSpec, WireError
from fedlean.wire.fields import (
    AS_MASKED,
    MAX_JSON_BYTES,
    Table,
    check_kept,
    load_canonical,
    read_task,
    read_update,
)
from fedlean.wire.header import (
    BARE,
    DRAWN,
    EXTRAS,
    PATTERN,
    SPEC,
    TASK,
    UPDATE,
    Header,
    read_header,
)
from fedlean.wire.pattern import NO_PATTERN, check_masks, pattern_hash
from fedlean.wire.reader import Reader
from fedlean.wire.sections import (
    decode_drawn,
    decode_extras,
    decode_masks,
    decode_names,
    decode_spec,
    sliced_shapes,
)
from fedlean.wire.statistic import decode_statistics
from fedlean.wire.values import decode_params, dtype_of

DEFAULT_LIMIT_BYTES = 1 << 28
_WHOLE = SubModel()


def decode_task(
    data: bytes | memoryview,
    specs: Mapping[str, ModelSpec],
    patterns: Mapping[str, Masks],
    *,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    allow_nonfinite: bool = False,
    packed: bool = False,
) -> ClientTask:
    """The task in `data`; `specs` and `patterns` are what this side holds, by hash.

    `limit_bytes` bounds the message and, apart from it, the arrays that it decodes into; with
    `packed` those of masked tensors are their kept values alone.  Raises
    UnknownSpec or UnknownPattern where the sender took for granted what is not held here, WireError
    for everything else that is wrong.
    """
    reader, header, document = _open(data, TASK, limit_bytes)
    fields = read_task(document)
    if header.num_examples:
        raise WireError(f"a task has no examples, the header says {header.num_examples}")
    spec = _spec(reader, header, specs)
    sub_model = _sub_model(reader, header, spec, fields.output_module, _WHOLE, patterns)
    params, shapes = _params(reader, header, spec, sub_model, allow_nonfinite, packed)
    table: Table = {key: ("mean", forms) for key, forms in fields.arrays.items()}
    arrays = decode_statistics(reader, table, shapes, allow_nonfinite)
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
    held = {pattern_hash(task.sub_model.masks): task.sub_model.masks}
    sub_model = _sub_model(reader, header, task.spec, fields.output_module, task.sub_model, held)
    params, shapes = _params(reader, header, task.spec, sub_model, allow_nonfinite, packed)
    statistics = decode_statistics(reader, fields.statistics, shapes, allow_nonfinite)
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
        raise WireError(f"the message has {len(data)} bytes, the limit is {limit_bytes}")
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


def _sub_model(
    reader: Reader,
    header: Header,
    spec: ModelSpec,
    output_module: str | None,
    base: SubModel,
    patterns: Mapping[str, Masks],
) -> SubModel:
    """`base` itself where the message changes nothing of it."""
    frozen, index = base.frozen, base.index
    if header.flags & EXTRAS:
        frozen, index = decode_extras(reader, spec)
    elif output_module is not None:
        raise WireError("an output module needs the flag for extras")
    else:
        output_module = base.output_module
    masks = _masks(reader, header, spec, sliced_shapes(spec, index), patterns)
    if not header.flags & EXTRAS and masks is base.masks:
        return base
    return SubModel(masks, index, frozen, output_module)


def _masks(
    reader: Reader,
    header: Header,
    spec: ModelSpec,
    shapes: Mapping[str, Shape],
    patterns: Mapping[str, Masks],
) -> Masks:
    claimed = header.pattern.hex()
    if header.flags & DRAWN and not header.flags & PATTERN:
        raise WireError("the flag of random masks comes without that of a pattern")
    if header.flags & PATTERN:
        drawn = bool(header.flags & DRAWN)
        if drawn and shapes != spec.tensor_shapes:
            raise WireError("random masks are of a whole model, the task slices it")
        masks = decode_drawn(reader, spec) if drawn else decode_masks(reader, spec, shapes)
        got = pattern_hash(masks)
        if not masks or got != claimed:
            raise WireError(f"the pattern received has hash {got}, the header says {claimed}")
        return masks
    if claimed not in patterns:
        if claimed == NO_PATTERN:
            return {}
        raise UnknownPattern(claimed)
    # Held under this hash, but perhaps for another model or another slice.
    check_masks(patterns[claimed], shapes)
    return patterns[claimed]


def _params(
    reader: Reader,
    header: Header,
    spec: ModelSpec,
    sub_model: SubModel,
    allow_nonfinite: bool,
    packed: bool,
) -> tuple[dict[str, np.ndarray], Mapping[str, Shape]]:
    """The tensors carried, and the shapes in which all tensors travel."""
    shapes = sliced_shapes(spec, sub_model.index)
    if header.flags & BARE:
        return {}, shapes
    carried = {name: shapes[name] for name in decode_names(reader, spec, "params")}
    value_dtype = dtype_of(header.value_dtype)
    masks = sub_model.masks
    params = decode_params(reader, carried, masks, value_dtype, allow_nonfinite, packed)
    return params, shapes


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
