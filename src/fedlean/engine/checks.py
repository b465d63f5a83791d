"""What every engine refuses, before it computes or changes anything.

Nothing is converted silently: arrays are C-contiguous and of the stated type, or a ValueError names
the argument, what was given, what is expected and the remedy.  Pure NumPy and O(1) extra memory, as
a device runs it too.
"""

# B examples of a batch, K kept coordinates of a masked tensor

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, get_args

import numpy as np

from fedlean.core import Masks, Params, SubModel
from fedlean.engine.directions import Kind
from fedlean.layers import BatchNorm, Shape
from fedlean.spec import ModelSpec

MAX_BATCH_SIZE = 1 << 20  # engines count examples, and their products with lanes, in 32 bits
MAX_DIRECTIONS_AT_ONCE = 1 << 20
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def check_settings(batch_size: int, loss: str) -> None:
    """ValueError unless batch_size is an integer of 1 to MAX_BATCH_SIZE and loss 'ce' or 'bce'."""
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not whole or not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise ValueError(
            f"batch_size must be an integer from 1 to {MAX_BATCH_SIZE}, got {batch_size!r:.40}"
        )
    if loss not in ("ce", "bce"):
        raise ValueError(f"loss must be 'ce' or 'bce', got {loss!r}")


def check_sub_model(spec: ModelSpec, sub_model: SubModel) -> None:
    """ValueError naming what of it does not fit the model."""
    check_masks(spec, sub_model.masks)
    check_frozen(spec, sub_model.frozen)


def check_masks(spec: ModelSpec, masks: Masks) -> None:
    """ValueError naming the mask that is not bool, or not of the shape of a trainable tensor."""
    for name, mask in masks.items():
        what = f"mask {name!r}"
        if name not in spec.param_shapes:
            raise ValueError(f"{what} fits no trainable tensor of the model")
        _check_array(what, mask, np.bool_, (spec.param_shapes[name],))


def check_frozen(spec: ModelSpec, frozen: Iterable[str]) -> None:
    """ValueError naming a frozen tensor that the model does not have."""
    for name in sorted(set(frozen) - spec.tensor_shapes.keys()):
        raise ValueError(f"frozen {name!r} is no tensor of the model")


def check_params(spec: ModelSpec, params: Params, masks: Masks) -> None:
    """Every tensor of `spec` and no other: float32, dense or, where masked, packed (K,).

    Values at pruned coordinates are not looked at.  `masks` have passed `check_masks`.  Raises
    ValueError naming the parameter.
    """
    for name, shape in spec.tensor_shapes.items():
        if name not in params:
            raise ValueError(f"parameter {name!r} of shape {shape} is missing")
    for name in sorted(params.keys() - spec.tensor_shapes.keys()):
        raise ValueError(f"parameter {name!r} is not in the model: leave it out")
    for name, shape in spec.tensor_shapes.items():
        value, mask, what = params[name], masks.get(name), f"parameter {name!r}"
        if mask is None:
            _check_floats(what, value, (shape,))
            continue
        packed = (int(np.count_nonzero(mask)),)
        _check_array(what, value, np.float32, (shape, packed))
        if not _finite(value) and (value.shape == packed or not _finite(value[mask])):
            raise ValueError(_not_finite(what))


def check_input(spec: ModelSpec, x: np.ndarray, batch_size: int) -> None:
    """x float32 (B, *input_shape), finite, 1 <= B <= batch_size.  Raises ValueError."""
    wanted = f"(B, {', '.join(map(str, spec.input_shape))})"
    _check_kind("x", x, np.float32)
    if x.ndim == 0 or x.shape[1:] != tuple(spec.input_shape):
        raise ValueError(f"x has shape {x.shape}, expected {wanted}")
    if not 1 <= len(x) <= batch_size:
        raise ValueError(
            f"x holds {len(x)} examples, expected 1 to batch_size {batch_size}: split the batch or "
            "open with a larger batch_size"
        )
    if not _finite(x):
        raise ValueError(_not_finite("x"))


def check_batch(
    spec: ModelSpec, x: np.ndarray, y: np.ndarray, batch_size: int, classes: int
) -> None:
    """`check_input` for x, and y int64 (B,) in [0, classes).  Raises ValueError."""
    if len(spec.output_shape) != 1:
        raise ValueError(
            f"the output {spec.nodes[-1].name!r} has shape {spec.output_shape}, but a loss needs "
            "one logit per class, (classes,): use forward and backward"
        )
    check_input(spec, x, batch_size)
    _check_array("y", y, np.int64, ((len(x),),))
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(f"y has labels from {low} to {high}, expected 0 to {classes - 1}")


def check_moments(spec: ModelSpec, examples: int, frozen: Iterable[str]) -> None:
    """ValueError naming a BatchNorm that would train on one value per channel: no variance."""
    for node in spec.nodes if examples == 1 else ():
        moves = isinstance(node.layer, BatchNorm) and f"{node.name}.running_mean" not in frozen
        if moves and prod(spec.shapes[node.name][1:]) == 1:
            raise ValueError(
                f"a batch of 1 example, but BatchNorm {node.name!r} needs 2 values per channel to "
                f"train: use a larger batch, or freeze '{node.name}.running_mean'"
            )


def check_directions_at_once(directions_at_once: int) -> None:
    """ValueError unless an integer of 1 to MAX_DIRECTIONS_AT_ONCE."""
    if not _is_integer(directions_at_once) or not 1 <= directions_at_once <= MAX_DIRECTIONS_AT_ONCE:
        raise ValueError(
            f"directions_at_once must be an integer from 1 to {MAX_DIRECTIONS_AT_ONCE}, "
            f"got {directions_at_once!r:.40}"
        )


def check_perturbation(seed: int, ks: Iterable[int], sigma: float, kind: str) -> None:
    """ValueError unless seed and ks are integers, sigma is a finite float32, kind is known."""
    if not _is_integer(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    for k in ks:
        if not _is_integer(k):
            raise ValueError(f"ks holds {k!r}, expected the numbers of directions, integers")
    if not isinstance(sigma, float | int) or not abs(sigma) <= _FLOAT32_MAX:
        raise ValueError(f"sigma must be finite in float32, got {sigma!r}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")


def check_taps(spec: ModelSpec, taps: Iterable[str]) -> None:
    """ValueError naming a tap that is no layer of the model."""
    for tap in taps:
        if tap not in spec.by_name:
            raise ValueError(f"no layer named {tap!r} to tap, expected one of the model's layers")


def check_output_gradients(
    spec: ModelSpec, gradients: Mapping[str, np.ndarray], kept: Iterable[str], examples: int
) -> None:
    """dL/dnode float32 (B, *shape), finite, for nodes in `kept`: those of the training forward.

    Raises ValueError naming the node.
    """
    if not gradients:
        raise ValueError("output_gradients is empty, expected the gradient of a node by its name")
    kept = set(kept)
    for name, gradient in gradients.items():
        if name not in kept:
            raise ValueError(
                f"no gradient can enter at {name!r}: call forward(x, taps=[{name!r}], "
                "training=True) first, once for each backward"
            )
        _check_floats(f"output gradient {name!r}", gradient, ((examples, *spec.shapes[name]),))


def check_gradients(spec: ModelSpec, gradients: Params) -> None:
    """Dense gradients, float32 and finite, of trainable tensors.  Raises ValueError naming one."""
    for name, gradient in gradients.items():
        if name not in spec.param_shapes:
            raise ValueError(f"gradient {name!r} is of no trainable tensor of the model")
        _check_floats(f"gradient {name!r}", gradient, (spec.param_shapes[name],))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_floats(what: str, value: np.ndarray, shapes: tuple[Shape, ...]) -> None:
    _check_array(what, value, np.float32, shapes)
    if not _finite(value):
        raise ValueError(_not_finite(what))


def _check_array(what: str, value: np.ndarray, dtype: type, shapes: tuple[Shape, ...]) -> None:
    _check_kind(what, value, dtype)
    if value.shape not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{what} has shape {value.shape}, expected {wanted}")


def _check_kind(what: str, value: np.ndarray, dtype: type) -> None:
    expected = np.dtype(dtype).name
    if not isinstance(value, np.ndarray):
        raise ValueError(
            f"{what} is a {type(value).__name__}, expected a NumPy array of {expected}"
        )
    if value.dtype != dtype:  # another byte order is another type
        raise ValueError(f"{what} is {value.dtype}, expected {expected}: convert it with astype")
    if not (value.flags.c_contiguous and value.flags.aligned):
        raise ValueError(f"{what} is not C-contiguous and aligned in memory: pass its .copy()")


def _finite(value: np.ndarray) -> bool:
    """Without a temporary of its size: NaN and infinity both reach an end of the range."""
    return not value.size or bool(np.isfinite(value.min()) and np.isfinite(value.max()))


def _not_finite(what: str) -> str:
    return f"{what} holds NaN or infinity, expected finite numbers"
