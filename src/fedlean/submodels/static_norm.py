"""HeteroFL's static BatchNorm (Diao et al., ICLR 2021, arXiv 2010.01264, Section 3).

Slices of several widths see different statistics, and no mean of theirs is that of the full model.
So clients train with the statistics of each batch, whose running means nobody uses, and the server
finds those of the merged model afterwards, on data that it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fedlean.algorithm import Server
from fedlean.core import Params, SubModel
from fedlean.engine.protocol import SGD, Engine
from fedlean.layers import BatchNorm
from fedlean.spec import ModelSpec
from fedlean.tree import Fold


def check_norms(server: Server, static_norm: bool) -> None:
    """Raises ValueError for a model with BatchNorm without `static_norm`, and for what it lacks."""
    norms = [name.removesuffix(".running_mean") for name in server.spec.variances.values()]
    if norms and not static_norm:
        raise ValueError(
            f"layer {norms[0]!r} is a BatchNorm, whose running statistics differ between widths: "
            "take a model with GroupNorm, or static_norm=true"
        )
    if static_norm and not norms:
        raise ValueError("static_norm is for models with BatchNorm, and this one has none")
    if static_norm and server.inputs is None:
        raise ValueError("static_norm needs inputs of the server's own, and there are none")


def calibrated(server: Server, static_norm: bool, merged: Fold, params: Params) -> Params:
    """What a round ends with: `params`, with static_norm and after any answer `calibrate`d."""
    if not static_norm or server.inputs is None or not merged.count:
        return params
    return calibrate(server.spec, params, server.inputs(), server.engine)


def calibrate(
    spec: ModelSpec,
    params: Params,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    engine: Engine,
) -> dict[str, np.ndarray]:
    """`params` with the running statistics of every BatchNorm found anew on `batches`.

    batches: (x float32 (B, *input_shape), y), of which y is not used; the first is the largest.

    Running mean and variance become the means over the batches of their means and unbiased
    variances, as with PyTorch's momentum=None, each batch weighted by its examples.  Each BatchNorm
    sees what the ones below it give with the statistics of the batch, as in training.  Raises
    ValueError without batches and for what the engine refuses.  A model without BatchNorm comes
    back as it is.
    """
    if not spec.buffer_shapes:
        return dict(params)
    sums = {name: np.zeros(shape) for name, shape in spec.buffer_shapes.items()}
    session, examples = None, 0
    for x, _ in batches:
        if session is None:
            session = engine.open(
                _remembering_one_batch(spec),
                params,
                SubModel(),
                batch_size=len(x),
                optimizer=SGD(0.0),
            )
        session.forward(x, training=True)
        seen = session.params()
        for name, total in sums.items():
            total += len(x) * seen[name].astype(np.float64)
        examples += len(x)
    if not examples:
        raise ValueError("calibration needs batches of data, got none")
    return {**params, **{n: (total / examples).astype(np.float32) for n, total in sums.items()}}


def _remembering_one_batch(spec: ModelSpec) -> ModelSpec:
    """With momentum 1 the running statistics are those of the last batch."""
    nodes = (
        replace(node, layer=replace(node.layer, momentum=1.0))
        if isinstance(node.layer, BatchNorm)
        else node
        for node in spec.nodes
    )
    return ModelSpec(spec.input_shape, tuple(nodes))
