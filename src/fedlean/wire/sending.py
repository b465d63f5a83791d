"""Objects to bytes.  The sizes come from the same draft as the messages, short of the arrays."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedlean.core import ClientTask, ClientUpdate, Masks, Params, Statistic, SubModel, Work
from fedlean.spec import ModelSpec
from fedlean.tree import kept_counts
from fedlean.wire.errors import WireError
from fedlean.wire.fields import (
    AS_MASKED,
    TensorForm,
    check_kept,
    dump,
    read_task,
    read_update,
    write_forms,
    write_statistic,
    write_work,
)
from fedlean.wire.frozen import (
    FrozenSection,
    encode_frozen,
    encode_frozen_values,
    frozen_hashes,
    frozen_params,
    frozen_values_bytes,
    hash_of,
)
from fedlean.wire.header import (
    BARE,
    DRAWN,
    FROZEN,
    HEADER_BYTES,
    PATTERN,
    SPEC,
    TASK,
    UPDATE,
    VALUES,
    Header,
)
from fedlean.wire.pattern import NO_PATTERN, check_masks, pattern_hash, pattern_payload_bytes
from fedlean.wire.sections import (
    drawn_bytes,
    encode_drawn,
    encode_masks,
    encode_names,
    encode_spec,
    names_bytes,
)
from fedlean.wire.statistic import encode_statistics, statistics_bytes, tensor_form
from fedlean.wire.values import (
    ValueDtype,
    check_params,
    dtype_code,
    encode_params,
    values_bytes,
)


@dataclass(frozen=True)
class Known:
    """Hashes of the specs, patterns and values of each frozen tensor that the receiver holds."""

    specs: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


DRAWN_COORDINATES = 1 << 20  # of a tensor whose random mask is left to the receiver to draw
_NOTHING = Known()


def encode_task(
    task: ClientTask, known: Known = _NOTHING, *, value_dtype: ValueDtype = "fp32"
) -> bytes:
    """The message for a receiver that holds `known`.  Raises WireError naming what cannot travel.

    Masked coordinates are not sent and arrive as 0.
    """
    return _draft_task(task, known, value_dtype).to_bytes()


def task_bytes(
    task: ClientTask, known: Known = _NOTHING, *, value_dtype: ValueDtype = "fp32"
) -> int:
    """len(encode_task(...)), without writing an array."""
    return _draft_task(task, known, value_dtype).num_bytes()


def encode_update(
    update: ClientUpdate, task: ClientTask, *, value_dtype: ValueDtype = "fp32"
) -> bytes:
    """The answer to `task`: of the sub-model only what differs from the task's, nothing frozen.

    `value_dtype` is for the parameters; statistics travel as they are.  Raises WireError naming
    what cannot travel.
    """
    return _draft_update(update, task, value_dtype).to_bytes()


def update_bytes(
    update: ClientUpdate, task: ClientTask, *, value_dtype: ValueDtype = "fp32"
) -> int:
    """len(encode_update(...)), without writing an array."""
    return _draft_update(update, task, value_dtype).num_bytes()


@dataclass(frozen=True)
class _Draft:
    """A checked message short of its arrays; its header does not know the payload's length yet."""

    header: Header
    text: bytes  # the JSON part
    opening: bytes  # spec, and which tensors are frozen
    spec: ModelSpec
    params: Params  # those that are not frozen
    sub_model: SubModel
    value_dtype: ValueDtype
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    frozen: Params = field(default_factory=dict)  # of which the receiver lacks the values

    def __post_init__(self) -> None:
        check_masks(self.sub_model.masks, self.spec.tensor_shapes)
        check_params(self.params, self.spec.tensor_shapes, self.sub_model.masks)

    @property
    def _sends_masks(self) -> bool:
        return bool(self.header.flags & PATTERN)

    @property
    def _draws_masks(self) -> bool:
        return bool(self.header.flags & DRAWN)

    @property
    def _sends_frozen(self) -> bool:
        return bool(self.header.flags & VALUES)

    @property
    def _bare(self) -> bool:
        return bool(self.header.flags & BARE)

    def num_bytes(self) -> int:
        carried = {name: self.spec.tensor_shapes[name] for name in self.params}
        size = HEADER_BYTES + len(self.text) + len(self.opening)
        size += 0 if self._bare else names_bytes(self.spec)
        if self._draws_masks:
            size += drawn_bytes(self.sub_model.masks, self.spec)
        elif self._sends_masks:
            size += names_bytes(self.spec) + pattern_payload_bytes(self.sub_model.masks)
        if self._sends_frozen:
            size += frozen_values_bytes(self.frozen, self.sub_model.masks, self.spec)
        size += values_bytes(carried, self.sub_model.masks, self.value_dtype)
        return size + statistics_bytes(self.statistics)

    def to_bytes(self) -> bytes:
        masks = self.sub_model.masks
        carried = [name for name in self.spec.tensor_shapes if name in self.params]
        payload = [
            self.opening,
            *self._pattern(),
            *(encode_frozen_values(self.frozen, masks, self.spec) if self._sends_frozen else ()),
            b"" if self._bare else encode_names(self.params, self.spec, "params"),
            *encode_params(self.params, carried, masks, self.value_dtype),
            *encode_statistics(self.statistics),
        ]
        header = replace(self.header, payload_bytes=sum(map(len, payload)))
        return b"".join([header.pack(), self.text, *payload])

    def _pattern(self) -> list[bytes]:
        sub_model = self.sub_model
        if self._draws_masks and sub_model.mask_seed is not None:
            return encode_drawn(sub_model.masks, sub_model.mask_seed, self.spec)
        return encode_masks(sub_model.masks, self.spec) if self._sends_masks else []


def _draft_task(task: ClientTask, known: Known, value_dtype: ValueDtype) -> _Draft:
    sub_model, spec = task.sub_model, task.spec
    pattern = pattern_hash(sub_model.masks)
    flags = 0 if spec.hash in known.specs else SPEC
    flags |= 0 if pattern == NO_PATTERN or pattern in known.patterns else PATTERN
    flags |= DRAWN if flags & PATTERN and _better_drawn(sub_model, spec) else 0
    frozen = frozen_params(task)
    check_masks(sub_model.masks, spec.tensor_shapes)
    check_params(frozen, spec.tensor_shapes, sub_model.masks)
    hashes = frozen_hashes(frozen, sub_model.masks)
    section = FrozenSection(sub_model.frozen, frozenset(frozen), hash_of(hashes))
    lacked = {name: frozen[name] for name, one in hashes.items() if one not in known.frozen}
    flags |= FROZEN if sub_model.frozen else 0
    flags |= VALUES if lacked else 0
    arrays = {key: Statistic(tensors, "mean") for key, tensors in task.arrays.items()}
    document = _nonempty(
        phase=task.phase,
        hparams=dict(task.hparams),
        arrays={key: write_forms(_forms(one, key, spec)) for key, one in arrays.items()},
    )
    read_task(document)
    text = dump(document)
    return _Draft(
        header=_header(TASK, flags, task, 0, pattern, value_dtype, text),
        text=text,
        opening=_opening(flags, spec, section),
        spec=spec,
        params=_without(task.params, frozen),
        sub_model=sub_model,
        value_dtype=value_dtype,
        statistics=arrays,
        frozen=lacked,
    )


def _draft_update(update: ClientUpdate, task: ClientTask, value_dtype: ValueDtype) -> _Draft:
    if update.client != task.client:
        raise WireError(f"client {update.client} cannot answer the task of client {task.client}")
    sub_model, old = update.sub_model, task.sub_model
    if sub_model.frozen != old.frozen:
        raise WireError("the frozen tensors of an answer are those of its task, got others")
    params = _without(update.params, sub_model.frozen)
    pattern = pattern_hash(sub_model.masks)
    same = sub_model.masks is old.masks or pattern == pattern_hash(old.masks)
    flags = 0 if same or pattern == NO_PATTERN else PATTERN
    flags |= BARE if update.statistics and not params else 0
    works = update.work
    if flags & BARE:
        works = tuple(_as_masked(work, sub_model.masks) for work in works)
    document = _nonempty(
        metrics=dict(update.metrics),
        work=[write_work(work) for work in works],
        statistics={
            key: write_statistic(
                one.reduction, _forms(one, key, task.spec), short=bool(flags & BARE)
            )
            for key, one in update.statistics.items()
        },
    )
    check_kept(read_update(document).work, task.spec)
    text = dump(document)
    return _Draft(
        header=_header(UPDATE, flags, task, update.num_examples, pattern, value_dtype, text),
        text=text,
        opening=b"",
        spec=task.spec,
        params=params,
        sub_model=sub_model,
        value_dtype=value_dtype,
        statistics=update.statistics,
    )


def _header(
    kind: int,
    flags: int,
    task: ClientTask,
    num_examples: int,
    pattern: str,
    value_dtype: ValueDtype,
    text: bytes,
) -> Header:
    return Header(
        kind=kind,
        flags=flags,
        value_dtype=dtype_code(value_dtype),
        round=task.round,
        client=task.client,
        seed=task.seed,
        num_examples=num_examples,
        spec=bytes.fromhex(task.spec.hash),
        pattern=bytes.fromhex(pattern),
        json_bytes=len(text),
        payload_bytes=0,
    )


def _opening(flags: int, spec: ModelSpec, section: FrozenSection) -> bytes:
    sent = encode_spec(spec) if flags & SPEC else b""
    return sent + (encode_frozen(section, spec) if flags & FROZEN else b"")


def _without(params: Params, names: Collection[str]) -> Params:
    """What is no tensor of the model stays, to be refused by its name."""
    return {name: value for name, value in params.items() if name not in names} if names else params


def _better_drawn(sub_model: SubModel, spec: ModelSpec) -> bool:
    """Whether seed and counts are what makes the masks, and shorter than they.

    Not for large tensors: drawing takes 24 bytes per coordinate of one, which a small device lacks.
    """
    masks = sub_model.masks
    if sub_model.mask_seed is None or not masks:
        return False
    if max(mask.size for mask in masks.values()) > DRAWN_COORDINATES:
        return False
    whole = names_bytes(spec) + pattern_payload_bytes(sub_model.masks)
    return drawn_bytes(sub_model.masks, spec) < whole


def _forms(statistic: Statistic, key: str, spec: ModelSpec) -> dict[str, TensorForm]:
    return {
        name: tensor_form(
            array, spec.tensor_shapes.get(name), f"{key}.{name}", statistic.masks.get(name)
        )
        for name, array in statistic.tensors.items()
    }


def _as_masked(work: Work, masks: Masks) -> Work:
    return replace(work, kept=AS_MASKED) if masks and work.kept == kept_counts(masks) else work


def _nonempty(**document: Any) -> dict[str, Any]:
    return {key: value for key, value in document.items() if value}
