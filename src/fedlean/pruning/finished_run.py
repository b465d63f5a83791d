"""The mask and the weights that a finished run left in its folder (docs/run-folder.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from fedlean.core import Masks, Params
from fedlean.jsonfile import read_bytes, read_json
from fedlean.models.initialise import INIT_SCHEMES, check_params
from fedlean.spec import ModelSpec
from fedlean.tree import read_only

MASK = ".mask"  # ending of a mask's name in model.safetensors
LARGEST, HEADER_BYTES = 8, 16 << 20  # bytes per weight with its mask (5), and of their names


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run leaves: its mask, its final weights and how its first ones were drawn."""

    params: Params
    masks: Masks
    seed: int
    init: str


def read_finished_run(folder: Path, spec: ModelSpec) -> FinishedRun:
    """Of the run in `folder`, whose model must be `spec` and pruned.

    Raises ValueError, as of a setting `masks_from`, saying what is missing or does not fit.
    """
    for name, remedy in (
        ("config.json", "give the folder that its --out named"),
        ("model.safetensors", f"finish it with 'fedlean resume {folder}'"),
    ):
        if not (folder / name).is_file():
            raise ValueError(
                f"masks_from: {folder} is not the folder of a finished run, it has no {name}: "
                f"{remedy}"
            )
    seed, init, trained, method = _read_config(folder / "config.json")
    if trained.hash != spec.hash:
        raise ValueError(
            f"masks_from: the run in {folder} trained another model than this run's: take the same "
            "--model and a data set of the same shape and classes"
        )
    path = folder / "model.safetensors"
    try:
        tensors = load(read_bytes(path, LARGEST * spec.num_params + HEADER_BYTES))
        params = {name: value for name, value in tensors.items() if not name.endswith(MASK)}
        check_params(spec, params)
        _check_values(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"masks_from: {path} is damaged: {error}") from None
    masks = {
        name.removesuffix(MASK): value.astype(bool)
        for name, value in tensors.items()
        if name.endswith(MASK)
    }
    if not masks:
        raise ValueError(
            f"masks_from: the run in {folder} has no masks, {method} left a dense model: take a "
            "run of a method that prunes"
        )
    _check_masks(masks, spec, folder)
    return FinishedRun(params, read_only(masks), seed, init)


def _read_config(path: Path) -> tuple[int, str, ModelSpec, str]:
    """Seed, way of drawing the first weights, model and method of a run."""
    try:
        document: Mapping[str, Any] = read_json(path)
        spec = ModelSpec.from_json(json.dumps(document["spec"]))
        init = document.get("init", "pytorch")  # early runs do not name it
        if init not in INIT_SCHEMES:
            raise ValueError(f"init is {init!r:.40}")
        if not isinstance(document["seed"], int):
            raise TypeError(f"seed is {document['seed']!r:.40}")
        return document["seed"], init, spec, str(document["method"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"masks_from: {path} is damaged: {type(error).__name__}: {error}"
        ) from None


def _check_values(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for a mask that is not of zeros and ones, and for a weight that is NaN."""
    for name, values in tensors.items():
        if name.endswith(MASK):
            if values.dtype not in (np.uint8, np.bool_) or values.max(initial=0) > 1:
                raise ValueError(f"{name!r:.60} must hold 0 and 1 as uint8, it has {values.dtype}")
        elif not np.isfinite(values).all():
            raise ValueError(f"tensor {name!r:.60} has values that are NaN or infinite")


def _check_masks(masks: Mapping[str, np.ndarray], spec: ModelSpec, folder: Path) -> None:
    for name, mask in masks.items():
        if name not in spec.prunable or mask.shape != spec.param_shapes[name]:
            raise ValueError(
                f"masks_from: the run in {folder} has a mask of {name!r} with shape {mask.shape}, "
                "which fits no prunable weight of the model"
            )
