"""A trained model as a file for other programs, compared with ours before it is written."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from safetensors.numpy import save

from fedlean.api.model import Model
from fedlean.core import generator
from fedlean.export.c import c_source
from fedlean.export.onnx import onnx_bytes, onnx_outputs
from fedlean.normalisation import Normalisation, nothing
from fedlean.runtime.checkpoint import write_atomically

Format = Literal["onnx", "torch", "safetensors", "c"]
ENDINGS: Mapping[str, Format] = {
    ".onnx": "onnx",
    ".pt2": "torch",
    ".safetensors": "safetensors",
    ".c": "c",
}
FORMATS = get_args(Format)
EXAMPLES = 8  # on which a file is compared with the model
TOLERANCE = 1e-4  # of the largest output, at least of 1


def export(model: Model, path: str | Path, format: str | None = None) -> Path:
    """Writes `model` to a file; format: None for what the file's ending says.

    onnx, c and torch take stored values and normalise them; safetensors has the tensors under the
    names of the user's module.  ONNX and torch files are run before they are written, and must give
    the model's outputs.

    Raises ValueError naming the layer that the format lacks, or what to install.
    """
    path = Path(path).expanduser()
    chosen = format or ENDINGS.get(path.suffix) or ""
    if chosen not in FORMATS:
        got = f"got {format!r}" if format else f"{path.name!r} ends in none of {', '.join(ENDINGS)}"
        raise ValueError(f"format must be one of {', '.join(FORMATS)}: {got}")
    content = _WRITERS[chosen](model, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def _onnx(model: Model, path: Path) -> bytes:
    content = onnx_bytes(model, _normalisation(model), model.class_names)
    x = _examples(model)
    _compare("onnxruntime", onnx_outputs(content, x), model.outputs(x))
    return content


def _c(model: Model, path: Path) -> bytes:
    name = re.sub(r"[^a-z0-9_]", "_", path.stem.lower())[:40]
    name = name if name[:1].isalpha() else f"model_{name}"[:40]
    return c_source(model, _normalisation(model), model.class_names, name).encode()


def _torch(model: Model, path: Path) -> bytes:
    try:
        from fedlean.models.torch import exported, run_exported
    except ImportError:
        raise ValueError("writing PyTorch needs it: pip install 'fedlean[torch]'") from None
    normal = _normalisation(model)
    file = io.BytesIO()
    exported(model.spec, model.params, normal.factor, normal.shift, file)
    x = _examples(model)
    _compare("torch.export", run_exported(file, x), model.outputs(x))
    return file.getvalue()


def _safetensors(model: Model, path: Path) -> bytes:
    about = {"class_names": json.dumps(list(model.class_names))}
    about["normalisation"] = json.dumps(_normalisation(model).to_json())
    return save(model.arrays(), about)


_WRITERS: Mapping[str, Callable[[Model, Path], bytes]] = {
    "onnx": _onnx,
    "torch": _torch,
    "safetensors": _safetensors,
    "c": _c,
}


def _normalisation(model: Model) -> Normalisation:
    return model.normalisation or nothing(model.spec.input_shape[0])


def _examples(model: Model) -> np.ndarray:
    """Stored values of the spread that the model was trained on."""
    normal = _normalisation(model)
    drawn = generator(0, 0, 0, "export").standard_normal(
        (EXAMPLES, *model.spec.input_shape), np.float32
    )
    each = (-1, *(1 for _ in model.spec.input_shape[1:]))
    return ((drawn * normal.std.reshape(each) + normal.mean.reshape(each)) * normal.scale).astype(
        np.float32
    )


def _compare(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    off = float(np.abs(got - expected).max())
    if not off <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ValueError(
            f"{what} computes something else than the model, by up to {off:.3g}: the file is not "
            "written; report this with the model"
        )
