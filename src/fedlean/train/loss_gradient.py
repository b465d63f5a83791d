"""A session's loss and its gradient at the logits, for methods that run forward and backward apart.

`Session.step` does the same inside the engine, fused with the update.
"""

# B examples, C classes

from __future__ import annotations

import numpy as np

from fedlean.engine.protocol import Loss


def loss_and_gradient(logits: np.ndarray, y: np.ndarray, loss: Loss) -> tuple[float, np.ndarray]:
    """Mean loss of logits float32 (B, C) with labels y int64 (B,), and dL/dlogits, float32 (B, C).

    "ce" is cross-entropy, mean over B; "bce" is BCE-with-logits on one-hot labels, mean over B·C.

    >>> value, gradient = loss_and_gradient(np.zeros((1, 2), np.float32), np.array([1]), "ce")
    >>> round(value, 4), gradient.tolist()
    (0.6931, [[0.5, -0.5]])
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a diverged model has no finite loss
        return _value_and_gradient(logits.astype(np.float64), y, loss)


def _value_and_gradient(z: np.ndarray, y: np.ndarray, loss: Loss) -> tuple[float, np.ndarray]:
    one_hot = np.zeros_like(z)
    one_hot[np.arange(len(y)), y] = 1
    if loss == "ce":
        z -= z.max(1, keepdims=True)
        log_sum = np.log(np.exp(z).sum(1, keepdims=True))
        value = float(np.mean(log_sum[:, 0] - z[np.arange(len(y)), y]))
        return value, ((np.exp(z - log_sum) - one_hot) / len(y)).astype(np.float32)
    value = float(np.mean(np.logaddexp(0, z) - one_hot * z))
    sigmoid = np.exp(-np.logaddexp(0, -z))  # 1 / (1 + e^-z) without overflow
    return value, ((sigmoid - one_hot) / z.size).astype(np.float32)
