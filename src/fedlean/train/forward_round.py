"""A client's round of training by forward passes: what it is asked, what it answers, what it takes.

It draws one batch and sends the slopes of its loss along K directions (`zeroth_order`), and where
asked the last block's exact gradient (`last_block`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil, prod
from typing import Any, Literal, get_args

import numpy as np

from fedlean.core import (
    Batches,
    ClientTask,
    ClientUpdate,
    Params,
    Scalar,
    Statistic,
    StatisticForm,
    SubModel,
    Work,
)
from fedlean.engine.directions import Kind
from fedlean.engine.protocol import Engine, ForwardSession, Loss
from fedlean.spec import ModelSpec
from fedlean.train.hyperparameters import at_least, in_range, one_of
from fedlean.train.last_block import exact_gradient, last_block
from fedlean.train.quantised_scalars import rounded
from fedlean.train.zeroth_order import Differences, Form, Probe, directional_derivatives
from fedlean.tree import kept_counts

LastBlock = Literal["zeroth", "backprop"]
SLOPES = "c"  # name of the statistic and of its one tensor: short, for every byte counts
GRADIENT = "gradient"  # of the last block
SLOPE_LIMIT = 1e9  # beyond what a loss can rise by over σ; one such number would undo the model


@dataclass(frozen=True)
class ForwardRound:
    """The settings of a round.  Raises ValueError naming the one that is out of range."""

    batch_size: int  # B
    micro_batch: int  # of them at once in memory; 0: all
    loss: Loss
    directions: int  # K
    sigma: float  # σ
    kind: Kind
    differences: Differences
    scalars: Form  # in which the slopes go up
    last_block: LastBlock  # "backprop": its gradient is exact

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        at_least("micro_batch", self.micro_batch, 0)
        at_least("directions", self.directions, 1)
        in_range("sigma", self.sigma, 1e-8, 1.0)  # less is lost beside a weight in float32
        one_of("loss", self.loss, get_args(Loss))
        one_of("kind", self.kind, get_args(Kind))
        one_of("differences", self.differences, get_args(Differences))
        one_of("scalars", self.scalars, get_args(Form))
        one_of("last_block", self.last_block, get_args(LastBlock))

    @property
    def at_once(self) -> int:
        """Examples in memory."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    @property
    def probe(self) -> Probe:
        return Probe(self.directions, float(self.sigma), self.kind, self.differences)

    def exact(self, spec: ModelSpec) -> tuple[str, ...]:
        """Tensors whose gradient is exact; the slopes are those of all others."""
        return last_block(spec) if self.last_block == "backprop" else ()

    def work(self, kept: Mapping[str, int] | None = None) -> Work:
        """The evaluations of a round on whatever model; `kept` as of `Work`."""
        examples = self.batch_size * self.probe.evaluations
        return Work(0, self.at_once, forward_examples=examples, kept=kept or {})

    def to_hparams(self) -> dict[str, Scalar]:
        return asdict(self)

    @staticmethod
    def from_hparams(h: Mapping[str, Any]) -> ForwardRound:
        return ForwardRound(**{field.name: h[field.name] for field in fields(ForwardRound)})


def forms(task: ClientTask) -> dict[str, StatisticForm]:
    """K slopes, and where asked for the last block's gradient, packed."""
    asked = ForwardRound.from_hparams(task.hparams)
    kept, shapes = kept_counts(task.sub_model.masks), task.spec.param_shapes
    forms = {SLOPES: StatisticForm({SLOPES: (asked.directions,)}, limit=SLOPE_LIMIT)}
    if exact := asked.exact(task.spec):
        forms[GRADIENT] = StatisticForm(
            {name: (kept[name],) if name in kept else shapes[name] for name in exact},
            limit=SLOPE_LIMIT,
        )
    return forms


def work(task: ClientTask) -> tuple[Work, ...]:
    """The evaluations, after forward and backward through the last block where asked for."""
    asked, kept = ForwardRound.from_hparams(task.hparams), kept_counts(task.sub_model.masks)
    along = asked.work(kept)
    names = asked.exact(task.spec)
    if not names:
        return (along,)
    exact = Work(
        ceil(asked.batch_size / asked.at_once),
        asked.at_once,
        kept=kept,
        # the gradient as the engine holds it, and as arrays that it returns
        held_floats=2 * sum(prod(task.spec.param_shapes[name]) for name in names),
        taps=(task.spec.nodes[-1].name,),
    )
    return (exact, along)


def answer(task: ClientTask, params: Params, batches: Batches, engine: Engine) -> ClientUpdate:
    """Eq. (1) of `methods.ntk_zo` at `params`, on one batch, in parts that fit in memory.

    The directions are of what the task does not freeze; where an exact gradient goes up, of all
    other tensors.
    """
    asked, spec = ForwardRound.from_hparams(task.hparams), task.spec
    x, y = drawn(task, batches)
    sent = {}
    if exact := asked.exact(spec):
        gradient = exact_gradient(
            engine,
            spec,
            params,
            task.sub_model,
            exact,
            x,
            y,
            loss=asked.loss,
            at_once=asked.at_once,
        )
        sent[GRADIENT] = Statistic(gradient, "mean")
    session = engine.open_forward(
        spec,
        params,
        SubModel(masks=task.sub_model.masks, frozen=frozenset(exact) or task.sub_model.frozen),
        batch_size=asked.at_once,
        loss=asked.loss,
    )
    sent[SLOPES] = slopes(session, task, x, y)
    return ClientUpdate(
        task.client, batches.num_examples, {}, task.sub_model, sent, work=work(task)
    )


def drawn(task: ClientTask, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """The one batch of the task: x (B, *input_shape), y (B,)."""
    size = int(task.hparams["batch_size"])
    ((x, y),) = batches.draw(steps=1, batch_size=size, seed=task.seed)
    return x, y


def slopes(session: ForwardSession, task: ClientTask, x: np.ndarray, y: np.ndarray) -> Statistic:
    """Those that the task asks for, of the loss on x, y, as they go up."""
    asked = ForwardRound.from_hparams(task.hparams)
    found = directional_derivatives(
        session, x, y, asked.probe, seed=int(task.hparams["direction_seed"]), at_once=asked.at_once
    )
    return Statistic({SLOPES: rounded(found, asked.scalars)}, "mean")
