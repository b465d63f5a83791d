"""A model in one file, `model.safetensors`: its tensors, and its masks beside them as NAME.mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlean.core import Model
from fedlean.jsonfile import read_bytes
from fedlean.models.initialise import check_params
from fedlean.runtime.checkpoint import write_atomically
from fedlean.spec import ModelSpec
from fedlean.tree import apply_mask, read_only

MASK = ".mask"  # ending of a mask's name
LARGEST, HEADER_BYTES = 8, 16 << 20  # bytes per weight with its mask (5), and of their names


def write_model(path: Path, model: Model) -> None:
    """Masks are uint8, 1 where a weight is kept."""
    tensors = {name: np.ascontiguousarray(value) for name, value in model.params.items()}
    masks = {f"{name}{MASK}": mask.astype(np.uint8) for name, mask in model.masks.items()}
    write_atomically(path, save({**tensors, **masks}))


def read_model(path: Path, spec: ModelSpec) -> Model:
    """A model of `spec`, whose pruned weights are 0.

    Raises ValueError naming the tensor that is missing, too many, of another shape or type, not
    finite, or a mask of what cannot be pruned.
    """
    try:
        tensors = load(read_bytes(path, LARGEST * spec.num_params + HEADER_BYTES))
        params = {name: value for name, value in tensors.items() if not name.endswith(MASK)}
        check_params(spec, params)
        _check_values(tensors)
        masks = {
            name.removesuffix(MASK): value.astype(bool)
            for name, value in tensors.items()
            if name.endswith(MASK)
        }
        _check_masks(masks, spec)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or holds another model: {error}") from None
    return Model(spec, apply_mask(params, masks), read_only(masks))


def _check_values(tensors: Mapping[str, np.ndarray]) -> None:
    for name, values in tensors.items():
        if name.endswith(MASK):
            if values.dtype not in (np.uint8, np.bool_) or values.max(initial=0) > 1:
                raise ValueError(f"{name!r:.60} must hold 0 and 1 as uint8, it has {values.dtype}")
        elif not np.isfinite(values).all():
            raise ValueError(f"tensor {name!r:.60} has values that are NaN or infinite")


def _check_masks(masks: Mapping[str, np.ndarray], spec: ModelSpec) -> None:
    for name, mask in masks.items():
        if name not in spec.prunable or mask.shape != spec.param_shapes[name]:
            raise ValueError(
                f"its mask of {name!r:.60} with shape {mask.shape} fits no prunable weight of the "
                "model"
            )
