"""Updates as a rogue client may make them: honest ones with a few things changed, at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, Statistic, SubModel, Work
from fedlean.tree import pack

Rng = np.random.Generator
EXTREMES = (3e38, -3e38, 1e30, 1e18, -1e18, 1e9, 1e-45, -0.0, 0.0, -1.0, np.nan, np.inf, -np.inf)
COUNTS = (-1, 0, 1, 2, 10**9, 10**9 + 1, 2**31, 2**62, 2**63 - 1)
NAMES = ("", "fc9.weight", "conv.weight", "bn.running_var", "\x1b[2J", "ü", "a" * 300, "../x")
SHAPES = ((), (0,), (1,), (3, 0), (12,), (4, 1, 3, 3), (108,), (2, 2, 2))


def one_of(rng: Rng, options: tuple) -> object:
    return options[int(rng.integers(len(options)))]


def some_name(rng: Rng, update: ClientUpdate) -> str:
    held = tuple(update.params) or ("conv.weight",)
    return str(one_of(rng, held if rng.random() < 0.8 else NAMES))


def with_tensor(update: ClientUpdate, name: str, values: np.ndarray) -> ClientUpdate:
    return replace(update, params={**update.params, name: values})


def spoilt(rng: Rng, values: np.ndarray) -> np.ndarray:
    """One value, some or all of them set to an extreme, or all scaled."""
    out = values.astype(np.float32, copy=True).reshape(-1)
    extreme = np.float32(one_of(rng, EXTREMES))
    kind = rng.integers(4)
    with np.errstate(all="ignore"):
        if kind == 0 and out.size:
            out[rng.integers(out.size)] = extreme
        elif kind == 1:
            out[rng.random(out.size) < 0.3] = extreme
        elif kind == 2:
            out[:] = extreme
        else:
            out *= extreme
    return out.reshape(values.shape)


def a_value(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    name = some_name(rng, update)
    values = update.params.get(name, np.zeros(3, np.float32))
    return with_tensor(update, name, spoilt(rng, values))


def a_shape(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    shape = one_of(rng, SHAPES)
    values = rng.normal(size=shape).astype(one_of(rng, ("f4", "f4", "f8", "i4", "f2")))
    return with_tensor(update, some_name(rng, update), np.asarray(values))


def without(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    name = some_name(rng, update)
    return replace(update, params={n: v for n, v in update.params.items() if n != name})


def nothing(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    return replace(update, params={}, statistics={} if rng.random() < 0.5 else update.statistics)


def masks(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    """Of all weights, of some, of what has none; as bool or not; the values packed or dense."""
    shapes = task.spec.tensor_shapes
    names = [n for n in task.spec.prunable if rng.random() < 0.9]
    if rng.random() < 0.1:
        names.append(str(one_of(rng, tuple(shapes))))
    density = float(one_of(rng, (0.0, 0.3, 1.0)))
    held = {name: rng.random(shapes[name]) < density for name in names}
    if names and rng.random() < 0.2:
        odd = one_of(rng, (np.ones(3, bool), np.ones((2, 2), np.int64), np.zeros((), bool)))
        held[names[0]] = np.asarray(odd)
    update = replace(update, sub_model=SubModel(masks=held))
    if rng.random() < 0.5:
        try:
            return replace(update, params=pack(update.params, held))
        except (ValueError, IndexError):
            return update
    return update


def structure(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    frozen = frozenset(n for n in task.spec.tensor_shapes if rng.random() < 0.5)
    return replace(update, sub_model=replace(update.sub_model, frozen=frozen))


def statistics(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    held = dict(update.statistics)
    kind = rng.integers(4)
    if kind == 0 or not held:
        held[str(one_of(rng, (*NAMES, "importance", "c")))] = Statistic(
            {some_name(rng, update): np.ones(2, np.float32)}, "mean"
        )
    else:
        key = str(one_of(rng, tuple(held)))
        tensors = dict(held[key].tensors)
        name = str(one_of(rng, tuple(tensors))) if tensors else "x"
        if kind == 1:
            tensors[name] = spoilt(rng, tensors.get(name, np.zeros(2, np.float32)))
            held[key] = replace(held[key], tensors=tensors)
        elif kind == 2:
            held[key] = replace(held[key], reduction="sum")
        else:
            tensors[name] = rng.normal(size=one_of(rng, SHAPES)).astype(np.float32)
            held[key] = replace(held[key], tensors=tensors)
    return replace(update, statistics=held)


def claims(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    kind = rng.integers(3)
    if kind == 0:
        return replace(update, num_examples=int(one_of(rng, COUNTS)))
    if kind == 1:
        # those that methods read among them
        name = str(one_of(rng, (*NAMES, "train_loss", "lost_state", *update.metrics)))
        said = dict(update.metrics) if rng.random() < 0.5 else {}
        return replace(update, metrics={**said, name: float(one_of(rng, EXTREMES))})
    counts = [int(one_of(rng, COUNTS)) for _ in range(4)]
    kept = {some_name(rng, update): int(one_of(rng, COUNTS))} if rng.random() < 0.5 else {}
    floats, beside, held, piece, first, outside = (
        int(one_of(rng, (0, 1, *COUNTS))) for _ in range(6)
    )
    begin, end = (str(one_of(rng, ("", *task.spec.by_name, *NAMES))) for _ in range(2))
    work = Work(
        *counts,
        kept=kept,
        optimizer_floats=floats,
        beside=beside,
        held_examples=held,
        piece_bytes=piece,
        first_piece=first,
        held_floats=outside,
        begin=begin,
        end=end,
        taps=(str(one_of(rng, (*task.spec.by_name, *NAMES))),) * int(rng.integers(3)),
    )
    return replace(update, work=(work,))


CHANGES: tuple[Callable[[Rng, ClientUpdate, ClientTask], ClientUpdate], ...] = (
    a_value,
    a_value,
    a_value,
    a_shape,
    without,
    nothing,
    masks,
    masks,
    structure,
    statistics,
    statistics,
    claims,
    claims,
)


def fuzzed(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate:
    for _ in range(int(rng.integers(1, 4))):
        change = CHANGES[int(rng.integers(len(CHANGES)))]
        update = change(rng, update, task)
    return update


def travelled(rng: Rng, update: ClientUpdate, task: ClientTask) -> ClientUpdate | None:
    """As a server decodes it, perhaps with a byte changed on its way; None: it refuses the bytes.

    What this side's encoder does not send comes as it is: another's encoder might.
    """
    try:
        data = bytearray(wire.encode_update(update, task))
    except (wire.WireError, ValueError, KeyError, AttributeError, TypeError, OverflowError):
        return update
    if rng.random() < 0.3:
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    try:
        return wire.decode_update(bytes(data), task, allow_nonfinite=True, packed=True)
    except wire.WireError:
        return None
