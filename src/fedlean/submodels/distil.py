"""Data-free distillation on the server: sub-networks learn on noise to answer as the supernet does.

Dynamic model selection (Yao, arXiv 2409.08858): the smallest first, then random ones.  What a
sub-network has learnt goes back into the supernet, of which it is a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedlean.core import Params, SubModel, Work, generator
from fedlean.cost.flops import work_flops
from fedlean.engine.protocol import SGD, Engine
from fedlean.submodels.cut import Cut
from fedlean.train.forward_updates import Held, Rule, advance
from fedlean.train.losses import divergence

_NO_SCALARS = np.zeros(0, np.float32)  # of a rule that is not of forward passes


@dataclass(frozen=True)
class Distillation:
    """steps: of Adam for each sub-network; lr: its rate; batch_size: noise inputs a step."""

    steps: int
    lr: float
    batch_size: int


class Distilled(NamedTuple):
    params: dict[str, np.ndarray]  # of the supernet
    divergence: float  # mean KL over the sub-networks, before they learn
    flops: int  # of the server


def distil(
    cuts: Sequence[Cut], params: Params, how: Distillation, *, engine: Engine, seed: int, round: int
) -> Distilled:
    """Each of `cuts`, sub-networks of one supernet, in their order.

    KL(sub-network(x) || supernet(x)) for x ~ N(0, I), the supernet being a target through which no
    gradient flows; the next one learns from the supernet that the one before has changed.  Running
    statistics stay: noise is not the data.  Raises ValueError for what the engine refuses.
    """
    learnt, first, flops = dict(params), [], 0
    for number, cut in enumerate(cuts):
        noise = _noise(cut, how, seed=seed, round=round, number=number)
        values, begun = _taught(cut, learnt, how, engine, noise)
        learnt = cut.put(learnt, values)
        first.append(begun)
        flops += work_flops(cut.spec, Work(how.steps, how.batch_size))
        flops += work_flops(cut.full, Work(forward_examples=how.steps * how.batch_size))
    return Distilled(learnt, float(np.mean(first)) if first else 0.0, flops)


def _noise(
    cut: Cut, how: Distillation, *, seed: int, round: int, number: int
) -> Iterator[np.ndarray]:
    """x float32 (B, *input_shape), once for each step."""
    random = generator(seed, round, number, "noise")
    for _ in range(how.steps):
        shape = (how.batch_size, *cut.spec.input_shape)
        yield random.standard_normal(shape, dtype=np.float32)


def _taught(
    cut: Cut, params: Params, how: Distillation, engine: Engine, noise: Iterator[np.ndarray]
) -> tuple[dict[str, np.ndarray], float]:
    """What the sub-network's trained tensors are in the end, and the divergence at first."""
    teacher = engine.open_forward(cut.full, params, SubModel(), batch_size=how.batch_size)
    student = engine.open(
        cut.spec, cut.take(params), SubModel(), batch_size=how.batch_size, optimizer=SGD(0.0)
    )
    output, answer = cut.full.nodes[-1].name, cut.spec.nodes[-1].name
    begun: float | None = None
    held = Held({name: student.params()[name] for name in cut.spec.param_shapes})
    for x in noise:
        taps = {
            "supernet": teacher.forward(x)[output],
            "sub-network": student.forward(x, training=True)[answer],
        }
        lost, gradient = divergence(taps, _NO_LABELS, student="sub-network", teacher="supernet")
        begun = lost if begun is None else begun
        gradients = student.backward({answer: gradient["sub-network"]})
        held = advance(held, gradients, Rule("adam"), how.lr, _NO_SCALARS)
        student.load({**student.params(), **held.params})
    return dict(held.params), begun or 0.0


_NO_LABELS = np.zeros(0, np.int64)
