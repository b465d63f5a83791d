"""Initial parameters of a `ModelSpec`, drawn with NumPy only, the same on every machine.

The default scheme is PyTorch's, so that published learning rates carry over.  Each tensor has its
own random stream, named after it: adding, removing or reordering layers leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Container
from math import prod, sqrt

import numpy as np

from fedlean.core import Params, generator
from fedlean.layers import Shape
from fedlean.spec import ModelSpec

INIT_SCHEMES = ("pytorch", "he")
_CONSTANTS = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}  # of norms


def init_params(
    spec: ModelSpec, seed: int, scheme: str = "pytorch", *, only: Container[str] | None = None
) -> Params:
    """All tensors of `spec` (parameters, then buffers), or `only` those of these names, float32.

    With fan_in = the inputs of one output, weights of Linear and Conv2d are

        pytorch  U(-1/√fan_in, 1/√fan_in), PyTorch's `kaiming_uniform_(a=√5)`; biases the same
        he       U(-√(6/fan_in), √(6/fan_in)) (He et al., ICCV 2015, eq. (10)); biases 0

    Norms start as the identity.  The second keeps the size of a signal through many ReLU layers
    without norms (VGG-11), where the first makes it vanish.

    >>> from fedlean.models.lenet300 import lenet300
    >>> params = init_params(lenet300((1, 8, 8), 10), seed=0)
    >>> params["fc1.weight"].shape, float(abs(params["fc1.weight"]).max()) <= 1 / 8
    ((300, 64), True)
    """
    weighted = {node.name for node in spec.weighted}
    params = {}
    for tensor, shape in spec.tensor_shapes.items():
        if only is not None and tensor not in only:
            continue
        node, suffix = tensor.rsplit(".", 1)
        if node in weighted:
            fan_in = prod(spec.param_shapes[f"{node}.weight"][1:])  # a bias uses its weight's
            bound = _bound(scheme, suffix, fan_in)
            params[tensor] = _uniform(seed, tensor, shape, bound)
        else:
            params[tensor] = np.full(shape, _CONSTANTS[suffix], np.float32)
    return params


def _bound(scheme: str, suffix: str, fan_in: int) -> float:
    """Raises ValueError on an unknown scheme."""
    if scheme == "pytorch":
        return 1 / sqrt(fan_in)
    if scheme == "he":
        return sqrt(6 / fan_in) if suffix == "weight" else 0.0
    raise ValueError(f"init must be one of {', '.join(INIT_SCHEMES)}, got {scheme!r}")


def _uniform(seed: int, tensor: str, shape: Shape, bound: float) -> np.ndarray:
    """U(-bound, bound); drawn and scaled in float32 and in place, for a device's memory."""
    values = generator(seed, 0, 0, f"init/{tensor}").random(shape, dtype=np.float32)
    values *= np.float32(2 * bound)
    values -= np.float32(bound)
    return values


def check_params(spec: ModelSpec, params: Params) -> None:
    """ValueError naming the tensor if `params` are not the float32 tensors of `spec`."""
    for name in spec.tensor_shapes.keys() ^ params.keys():
        where = "the spec but not in params" if name not in params else "params but not in the spec"
        raise ValueError(f"tensor {name!r} is in {where}")
    for name, shape in spec.tensor_shapes.items():
        if params[name].shape != shape or params[name].dtype != np.float32:
            raise ValueError(
                f"tensor {name!r} must be float32 of shape {shape}, got {params[name].dtype} of "
                f"shape {params[name].shape}"
            )
