"""The last block of a model and its exact gradient, where forward passes alone train the others.

ElasticZO divides a model so: backpropagation ends where it would begin to cost memory.
"""

# B examples

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedlean.core import Params, SubModel
from fedlean.engine.protocol import SGD, Engine, Loss
from fedlean.spec import ModelSpec
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.tree import pack


def last_block(spec: ModelSpec) -> tuple[str, ...]:
    """Trainable tensors of the last block that has any."""
    for nodes in reversed(list(spec.blocks.values())):
        names = {f"{node.name}.{suffix}" for node in nodes for suffix in ("weight", "bias")}
        if own := tuple(name for name in spec.param_shapes if name in names):
            return own
    return ()


def exact_gradient(
    engine: Engine,
    spec: ModelSpec,
    params: Params,
    sub_model: SubModel,
    names: Collection[str],
    x: np.ndarray,
    y: np.ndarray,
    *,
    loss: Loss,
    at_once: int,
) -> dict[str, np.ndarray]:
    """The gradient of the mean loss on x (B, *input_shape), y (B,), of the tensors `names` alone.

    sub_model: freezes the others; at_once: examples per pass, changes memory only.  Masked tensors
    come packed: of their kept weights alone.
    """
    output = spec.nodes[-1].name
    session = engine.open(
        spec, params, sub_model, batch_size=at_once, optimizer=SGD(0.0), loss=loss
    )
    total: dict[str, np.ndarray] = {}
    for at in range(0, len(y), at_once):
        part_x, part_y = x[at : at + at_once], y[at : at + at_once]
        logits = session.forward(part_x, training=True)[output]
        _, pull = loss_and_gradient(logits, part_y, loss)
        gradients = session.backward({output: pull * np.float32(len(part_y) / len(y))})
        for name in names:
            total[name] = total[name] + gradients[name] if name in total else gradients[name]
    return pack(total, {name: mask for name, mask in sub_model.masks.items() if name in total})
