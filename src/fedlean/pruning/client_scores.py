"""Foresight pruning by the clients: each sends signed scores, which add up to those of all data.

A step of the density schedule is one task.  The weights that are scored come from a seed that all
clients share; the inputs are each client's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil, prod
from typing import Any, Literal

import numpy as np

from fedlean.core import (
    Batches,
    ClientTask,
    ClientUpdate,
    Scalar,
    Statistic,
    StatisticForm,
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.models.initialise import INIT_SCHEMES
from fedlean.pruning.foresight import Criterion, Scoring
from fedlean.pruning.node_perturbation import node_gradient, node_scores
from fedlean.pruning.ntk import gaussian_inputs, ntk_scores
from fedlean.tree import kept_counts, pack

Inputs = Literal["gaussian", "local"]
SCORES = "scores"  # name of the statistic
FROM_CLIENTS = ("ntk", "ntk_shuffled", "node_ntk", "node")  # criteria that clients can score
FORWARD_ONLY = ("node_ntk", "node")  # whose scores take no backward pass


@dataclass(frozen=True)
class ScoreRequest:
    """What a client is asked in a step.  Raises ValueError for an unknown init."""

    criterion: str  # "ntk" or one of FORWARD_ONLY
    inputs: Inputs
    draws: int  # of weights and inputs
    examples: int  # of a draw
    micro_batch: int  # of them at once in memory; 0: all
    epsilon: float
    init: str
    weights_seed: int  # all clients'

    def __post_init__(self) -> None:
        if self.init not in INIT_SCHEMES:
            raise ValueError(f"init must be one of {', '.join(INIT_SCHEMES)}, got {self.init!r}")

    @property
    def at_once(self) -> int:
        """Examples in memory."""
        return min(self.micro_batch or self.examples, self.examples)

    def to_hparams(self) -> dict[str, Scalar]:
        return asdict(self)

    @staticmethod
    def from_hparams(h: Mapping[str, Any]) -> ScoreRequest:
        return ScoreRequest(**{field.name: h[field.name] for field in fields(ScoreRequest)})


def request(
    scoring: Scoring, criterion: Criterion, inputs: Inputs, micro_batch: int, weights_seed: int
) -> ScoreRequest:
    """What the clients compute for a criterion; shuffling is the server's business."""
    return ScoreRequest(
        criterion if criterion in FORWARD_ONLY else "ntk",
        inputs,
        scoring.draws,
        scoring.examples,
        micro_batch,
        scoring.epsilon,
        scoring.init,
        weights_seed,
    )


def forms(task: ClientTask) -> dict[str, StatisticForm]:
    """A score for each kept weight."""
    kept = kept_counts(task.sub_model.masks)
    return {SCORES: StatisticForm({name: (kept[name],) for name in task.spec.prunable})}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Forward passes of a bump of every unit, or forward and backward at both points."""
    asked, spec = ScoreRequest.from_hparams(task.hparams), task.spec
    draws, examples, at_once = asked.draws, asked.examples, asked.at_once
    kept = kept_counts(task.sub_model.masks)
    # forward passes of one example that a bump of every unit takes
    bumps = sum(spec.param_shapes[name][0] + 1 for name in spec.prunable)
    if asked.criterion == "node":
        return (Work(0, at_once, forward_examples=draws * examples * bumps, kept=kept),)
    if asked.criterion == "node_ntk":
        forward = 2 * draws * examples * (bumps + 1)
        return (Work(0, at_once, forward_examples=forward, kept=kept),)
    # forward and backward at both points, and a forward before
    passes = draws * ceil(examples / at_once)
    backward = Work(
        2 * passes,
        at_once,
        forward_examples=draws * examples,
        kept=kept,
        # the gradient as the engine holds it, and as arrays that it returns
        held_floats=2 * sum(prod(spec.param_shapes[name]) for name in spec.prunable),
        taps=(spec.nodes[-1].name,),
    )
    return (backward,)


def answer(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """Scores of the kept weights, per example: the mean weighted by examples is the pooled one."""
    asked, masks = ScoreRequest.from_hparams(task.hparams), task.sub_model.masks
    scores = _scores(asked, task, batches, engine)
    return ClientUpdate(
        task.client,
        batches.num_examples,
        {},
        task.sub_model,
        {SCORES: Statistic(pack(scores, masks), "mean")},
        work=work(task),
    )


def _scores(
    asked: ScoreRequest, task: ClientTask, batches: Batches, engine: Engine
) -> dict[str, np.ndarray]:
    spec, masks, seed = task.spec, task.sub_model.masks, asked.weights_seed
    if asked.inputs == "local":
        drawn = batches.draw(steps=asked.draws, batch_size=asked.examples, seed=task.seed)
        inputs: Iterable[np.ndarray] = (x for x, _ in drawn)
    else:
        inputs = gaussian_inputs(spec, asked.examples, asked.draws, task.seed)
    if asked.criterion == "node":
        sums = node_scores(
            engine,
            spec,
            masks,
            inputs,
            seed,
            bump=asked.epsilon,
            init=asked.init,
            batch_size=asked.at_once,
        )
        examples = asked.draws * asked.examples
        return {name: (sum_ / examples).astype(np.float32) for name, sum_ in sums.items()}
    found = ntk_scores(
        engine,
        spec,
        masks,
        inputs,
        seed,
        epsilon=asked.epsilon,
        init=asked.init,
        batch_size=asked.at_once,
        difference=node_gradient if asked.criterion == "node_ntk" else None,
    )
    return found.mean()
