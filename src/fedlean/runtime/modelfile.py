"""A model in one safetensors file (docs/run-folder.md).

A pruned weight NAME is stored as its kept values, NAME.kept, and their places, NAME.pattern.  Early
versions stored it densely, with its mask beside it as NAME.mask; such files are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlean.core import Masks, Model, Params
from fedlean.jsonfile import parse_json, read_bytes
from fedlean.models.brought import Names
from fedlean.models.initialise import check_params
from fedlean.normalisation import Normalisation
from fedlean.runtime.checkpoint import write_atomically
from fedlean.spec import ModelSpec
from fedlean.tree import apply_mask, kept_values, read_only, unpack
from fedlean.wire.errors import WireError
from fedlean.wire.pattern import decode_mask, encode_mask
from fedlean.wire.reader import Reader

MASK, KEPT, PATTERN, REST = ".mask", ".kept", ".pattern", "rest/"  # endings, and a beginning
SPEC, SPARSE, ABOUT = "spec", "sparse", "about"  # of the metadata
LARGEST, HEADER_BYTES = 8, 16 << 20  # bytes per weight with its mask (5), and of their names


class About(NamedTuple):
    """What belongs to a model beside its values, so that others can use it."""

    names: Names | None = None  # by which the module that it came from knows its tensors
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values; `rest` of the names are arrays, and stand in the file of a model."""
        return {
            "tensor_names": None if self.names is None else self.names.to_json(),
            "normalisation": None if self.normalisation is None else self.normalisation.to_json(),
            "class_names": list(self.class_names),
        }


class Stored(NamedTuple):
    """The content of a file."""

    model: Model
    about: About
    rest: Params  # what a user's module holds beside the layers of the spec


def write_model(
    path: Path,
    model: Model,
    run: ModelSpec | None = None,
    *,
    about: About | None = None,
    rest: Params | None = None,
) -> None:
    """run: the spec that the run folder names.

    Where the model is of another one (a narrow model, one with exits), or without a run, its own
    stands in the file's metadata, as JSON under "spec"; `about` stands there, too.  rest: what a
    user's module holds beside the layers of the spec.
    """
    tensors: dict[str, np.ndarray] = {}
    sparse = {}
    for name, value in model.params.items():
        mask = model.masks.get(name)
        if mask is None:
            tensors[name] = np.ascontiguousarray(value)
            continue
        tensors[f"{name}{KEPT}"] = kept_values(np.ascontiguousarray(value), mask)
        tensors[f"{name}{PATTERN}"] = np.frombuffer(encode_mask(mask), np.uint8)
        sparse[name] = list(mask.shape)
    tensors |= {f"{REST}{name}": np.ascontiguousarray(v) for name, v in (rest or {}).items()}
    metadata = {}
    if about is not None or (run is not None and run.hash != model.spec.hash):
        metadata[SPEC] = model.spec.to_json()
    if sparse:
        metadata[SPARSE] = json.dumps(sparse, sort_keys=True)
    if about is not None:
        metadata[ABOUT] = json.dumps(about.to_json())
    write_atomically(path, save(tensors, metadata or None))


def read_model(path: Path, spec: ModelSpec) -> Model:
    """A model of `spec`, whose pruned weights are 0.

    Raises ValueError naming the tensor that is missing, too many, of another shape or type, not
    finite, or a mask of what cannot be pruned.
    """
    return read_stored(path, spec, other=False).model


def read_stored(path: Path, spec: ModelSpec | None, *, other: bool = True) -> Stored:
    """The model of a file and what it says about it; raises ValueError as `read_model`.

    spec: of the run; None: the file has to say it.  other: the file may name another one.
    """
    try:
        most = None if spec is None else LARGEST * spec.num_params + HEADER_BYTES
        content = read_bytes(path, None if other else most)
        metadata = _metadata(content)
        said = metadata.get(SPEC)
        own = spec if said is None else ModelSpec.from_json(said)
        if own is None:
            raise ValueError("it does not say its spec: give the run folder that it lies in")
        if not other and spec is not None and own.hash != spec.hash:
            raise ValueError(
                f"its run's method saves another model than the run's own, with {own.num_params} "
                f"parameters instead of {spec.num_params}"
            )
        model, rest = _parts(load(content), own)
        return Stored(model, _about(metadata.get(ABOUT), own, rest), rest)
    except (SafetensorError, WireError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or holds another model: {error}") from None


def _metadata(content: bytes) -> Mapping[str, str]:
    length = int.from_bytes(content[:8], "little")
    header = parse_json(content[8 : 8 + length])
    found = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return found if isinstance(found, dict) else {}


def _parts(tensors: Mapping[str, np.ndarray], spec: ModelSpec) -> tuple[Model, Params]:
    """The model, and what a user's module has beside it."""
    rest = {n.removeprefix(REST): v for n, v in tensors.items() if n.startswith(REST)}
    params: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name.endswith(KEPT):
            name = name.removesuffix(KEPT)
            masks[name] = _mask(name, tensors.get(f"{name}{PATTERN}"), spec)
            if value.shape != (np.count_nonzero(masks[name]),) or value.dtype != np.float32:
                raise ValueError(
                    f"tensor {name!r:.60} has {value.dtype} values {value.shape} of "
                    f"{np.count_nonzero(masks[name])} kept float32 ones"
                )
            params[name] = unpack(value, masks[name])
        elif name.endswith(MASK):
            masks[name.removesuffix(MASK)] = _early_mask(name, value)
        elif not name.endswith(PATTERN) and not name.startswith(REST):
            params[name] = value
    check_params(spec, params)
    check_values(params)
    _check_masks(masks, spec)
    return Model(spec, apply_mask(params, masks), read_only(masks)), rest


def _mask(name: str, pattern: np.ndarray | None, spec: ModelSpec) -> np.ndarray:
    if name not in spec.prunable:
        raise ValueError(f"its mask of {name!r:.60} fits no prunable weight of the model")
    if pattern is None or pattern.dtype != np.uint8:
        raise ValueError(f"the places of the kept values of {name!r:.60} are missing")
    reader = Reader(pattern.tobytes(), 1 << 32)
    mask = decode_mask(reader, spec.param_shapes[name], name)
    reader.finish()
    return mask


def _early_mask(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype not in (np.uint8, np.bool_) or values.max(initial=0) > 1:
        raise ValueError(f"{name!r:.60} must hold 0 and 1 as uint8, it has {values.dtype}")
    return values.astype(bool)


def _about(text: str | None, spec: ModelSpec, rest: Params) -> About:
    if text is None:
        return About()
    document = parse_json(text)
    return about_from(document, spec, rest)


def about_from(document: Mapping[str, Any], spec: ModelSpec, rest: Params) -> About:
    """Of JSON values; raises ValueError where they do not fit `spec`."""
    names, normal = document.get("tensor_names"), document.get("normalisation")
    return About(
        None if names is None else Names.from_json(names, spec, rest),
        None if normal is None else Normalisation.from_json(normal, spec.input_shape[0]),
        tuple(str(each) for each in document.get("class_names") or ()),
    )


def check_values(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for what is not finite."""
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {name!r:.60} has values that are NaN or infinite")


def _check_masks(masks: Masks, spec: ModelSpec) -> None:
    for name, mask in masks.items():
        if name not in spec.prunable or mask.shape != spec.param_shapes[name]:
            raise ValueError(
                f"its mask of {name!r:.60} with shape {mask.shape} fits no prunable weight of the "
                "model"
            )
