"""A model in one file, `model.safetensors`: its tensors, and its masks beside them as NAME.mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlean.core import Model
from fedlean.jsonfile import parse_json, read_bytes
from fedlean.models.initialise import check_params
from fedlean.runtime.checkpoint import write_atomically
from fedlean.spec import ModelSpec
from fedlean.tree import apply_mask, read_only

MASK, SPEC = ".mask", "spec"  # ending of a mask's name; of the metadata
LARGEST, HEADER_BYTES = 8, 16 << 20  # bytes per weight with its mask (5), and of their names


def write_model(path: Path, model: Model, run: ModelSpec | None = None) -> None:
    """Masks are uint8, 1 where a weight is kept.

    run: the spec that the run folder names.  Where the model is of another one (a narrow model, one
    with exits), its own stands in the file's metadata, as JSON under "spec".
    """
    tensors = {name: np.ascontiguousarray(value) for name, value in model.params.items()}
    masks = {f"{name}{MASK}": mask.astype(np.uint8) for name, mask in model.masks.items()}
    other = run is not None and run.hash != model.spec.hash
    metadata = {SPEC: model.spec.to_json()} if other else None
    write_atomically(path, save({**tensors, **masks}, metadata))


def read_model(path: Path, spec: ModelSpec) -> Model:
    """A model of `spec`, whose pruned weights are 0.

    Raises ValueError naming the tensor that is missing, too many, of another shape or type, not
    finite, or a mask of what cannot be pruned.
    """
    try:
        content = read_bytes(path, LARGEST * spec.num_params + HEADER_BYTES)
        _check_spec(content, spec)
        tensors = load(content)
        params = {name: value for name, value in tensors.items() if not name.endswith(MASK)}
        check_params(spec, params)
        check_values(tensors)
        masks = {
            name.removesuffix(MASK): value.astype(bool)
            for name, value in tensors.items()
            if name.endswith(MASK)
        }
        _check_masks(masks, spec)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or holds another model: {error}") from None
    return Model(spec, apply_mask(params, masks), read_only(masks))


def _check_spec(content: bytes, spec: ModelSpec) -> None:
    """Raises ValueError where the file says that its model is of another spec."""
    length = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + length])
    named = header.get("__metadata__", {}).get(SPEC) if isinstance(header, dict) else None
    saved = spec if named is None else ModelSpec.from_json(named)
    if saved.hash != spec.hash:
        raise ValueError(
            f"its run's method saves another model than the run's own, with {saved.num_params} "
            f"parameters instead of {spec.num_params}"
        )


def check_values(tensors: Mapping[str, np.ndarray]) -> None:
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
