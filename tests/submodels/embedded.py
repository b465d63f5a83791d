"""What a cut computes, beside the full model in which all that is not in the cut is zero."""

from __future__ import annotations

import numpy as np
from engine.oracle import Oracle

from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut


def embedded(cut: Cut, params) -> dict[str, np.ndarray]:
    """`params` of the cut at their places in the full model, zeros everywhere else."""
    full = {name: np.zeros(shape, np.float32) for name, shape in cut.full.tensor_shapes.items()}
    for name, axes in cut.index.items():
        full[name][np.ix_(*(np.r_[axis] for axis in axes))] = params[name]
    return full


def output(spec: ModelSpec, params, x: np.ndarray) -> np.ndarray:
    """In evaluation mode and float64."""
    return Oracle(spec, params).forward(x, training=False)[spec.nodes[-1].name].detach().numpy()
