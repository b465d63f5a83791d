"""SNIP's score among clients: each sends the gradient at one model, the server multiplies.

Lee, Ajanthan and Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR
2019, arXiv 1810.02340, eq. (4)-(6).  ∂L/∂c_j at c = 1 is g_j·w_j, so a client sends g, taken at the
same w as all others, and Σ p_n g_n is the gradient of the pooled data: the score is SNIP's on that
data.
"""

from __future__ import annotations

import numpy as np

from fedlean.core import (
    Batches,
    ClientTask,
    ClientUpdate,
    Masks,
    Params,
    Scalar,
    Statistic,
    StatisticForm,
    Work,
)
from fedlean.engine.protocol import SGD, Engine
from fedlean.pruning.density import full_masks
from fedlean.pruning.global_top import keep_largest
from fedlean.spec import ModelSpec
from fedlean.train.local_sgd import LocalSGD, loss_of
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.tree import apply_mask
from fedlean.wire import round_bfloat16

GRADIENT = "gradient"  # name of the statistic


def orders(sgd: LocalSGD, batches: int, most: int = 0, dtype: str = "fp32") -> dict[str, Scalar]:
    """Hyper-parameters of a task to send the gradient over so many batches.

    most: so many values of it go up, those with the largest |g·w|; 0: all.  dtype: "bf16" or
    "fp32", in which they do.  Both are OURS.
    """
    asked: dict[str, Scalar] = {
        "batch_size": sgd.batch_size,
        "loss": sgd.loss,
        "snip_batches": batches,
    }
    return {**asked, "snip_most": most, "snip_dtype": dtype} if most or dtype != "fp32" else asked


def sensitive(spec: ModelSpec, gradient: Params, weights: Params, count: int) -> Masks:
    """The `count` weights of largest |g·w|: eq. (5) and (6); without the denominator of (5), which
    changes no order.

    gradient: Σ p_n g_n of every prunable weight, dense; weights: those at which it was taken
    """
    return keep_largest(_scores(spec, gradient, weights), count, full_masks(spec))


def _scores(spec: ModelSpec, gradient: Params, weights: Params) -> dict[str, np.ndarray]:
    return {
        name: np.abs(np.multiply(gradient[name], weights[name], dtype=np.float64))
        for name in spec.prunable
    }


def forms(task: ClientTask) -> dict[str, StatisticForm]:
    """The gradient of every prunable weight."""
    shapes = {name: task.spec.param_shapes[name] for name in task.spec.prunable}
    return {GRADIENT: StatisticForm(shapes)}


def work(task: ClientTask) -> tuple[Work, ...]:
    """As steps whose full weight gradients are summed, which is what is done.

    The engine gives them as arrays, a float for every weight beside its own.
    """
    steps = int(task.hparams["snip_batches"])
    batch_size = int(task.hparams["batch_size"])
    return (Work(steps, batch_size, importance_steps=steps, optimizer_floats=1),)


def answer(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """g of eq. (4), dL/dw of the prunable weights: the mean over `snip_batches` batches."""
    h = task.hparams
    steps, batch_size = int(h["snip_batches"]), int(h["batch_size"])
    session = engine.open(
        task.spec,
        task.params,
        task.sub_model,
        batch_size=batch_size,
        optimizer=SGD(0.0),
        loss=loss_of(task),
    )
    output, shapes = task.spec.nodes[-1].name, task.spec.param_shapes
    total = {name: np.zeros(shapes[name], np.float32) for name in task.spec.prunable}
    losses = []
    for x, y in batches.draw(steps=steps, batch_size=batch_size, seed=task.seed):
        logits = session.forward(x, training=True)[output]
        loss, entering = loss_and_gradient(logits, y, loss_of(task))
        gradients = session.backward({output: entering}, dense=True)
        for name, values in total.items():
            values += gradients[name] / np.float32(steps)
        losses.append(loss)
    return ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params={},
        sub_model=task.sub_model,
        statistics={GRADIENT: Statistic(_sent(task, total), "mean")},
        metrics={"train_loss": float(np.mean(losses))},
        work=work(task),
    )


def _sent(task: ClientTask, gradient: Params) -> Params:
    """What of the gradient goes up; 0 stands for the rest."""
    most = int(task.hparams.get("snip_most", 0))
    if most:
        gradient = apply_mask(gradient, sensitive(task.spec, gradient, task.params, most))
    if task.hparams.get("snip_dtype") == "bf16":
        return {name: round_bfloat16(values) for name, values in gradient.items()}
    return gradient
