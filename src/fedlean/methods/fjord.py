"""FjORD: ordered dropout. Each step trains a width drawn from those that the device can hold.

Horváth, Laskaridis, Almeida, Leontiadis, Venieris and Lane, "FjORD: Fair and Accurate Federated
Learning under heterogeneous targets with Ordered Dropout", NeurIPS 2021, arXiv 2102.13451,
Algorithm 1.  A device whose largest width is p_max holds the first ⌈p_max·C⌉ of each layer's C
channels.  In each local step it draws p uniformly from the widths up to p_max and trains the first
⌈p·C⌉ of them:

    w_p <- w_p - η ∇ CE(F_p(x), y)

With self-distillation a step trains the largest as well, whose output the smaller one learns
(their loss with α = T = 1, the values that they found best):

    w <- w - η ∇ [ CE(F_pmax(x), y) + KL(F_pmax(x) || F_p(x)) ]     F_pmax in KL being a target

It sends w_pmax back, and the server averages each element over the devices that hold it.

**What a step costs.**  Widths of a device are slices within one another, and there is one set of
weights, the largest.  A width is trained as a model of its own, in a session of its own that is
opened on the first channels of these weights and written back into them; steps of one width in a
row share it.  So a step costs what its width does, which is what the log charges, short of opening
sessions.  One is open at a time.  Memory is that of the largest width, and what is read out of it
beside the weights that go back; with self-distillation the weights once more.

**Deviations.**  Means are weighted by examples.  An element that nobody held keeps its value.  A
narrower width is rounded up within the slice that the device holds, so that it may have a channel
more than the same width elsewhere.  Weight decay acts on the width that a step trains.  There is no
momentum, as in the paper's experiments: of a width that is drawn now and then it would mean
something else.  p_max follows from what the device has (`assign`); the paper has clusters of
devices.  Its BatchNorm is one for each width; our models have GroupNorm unless told otherwise, and
`static_norm` is HeteroFL's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import fsum, prod
from typing import Any

import numpy as np

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Params,
    Scalar,
    Work,
    generator,
)
from fedlean.engine.protocol import SGD, Engine, Session
from fedlean.narrowed import narrowed
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut, whole
from fedlean.submodels.levels import rates_from
from fedlean.submodels.sliced import Slices, sliced, without_effect, without_statistics
from fedlean.submodels.width import width
from fedlean.train.local_sgd import (
    LocalSGD,
    open_session,
    train_kept_weights,
    with_settings,
)
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.train.losses import distillation
from fedlean.train.work import sgd_work


@with_settings(LocalSGD, Slices)
def fjord(
    server: Server, sgd: LocalSGD, slices: Slices, *, self_distillation: bool = False
) -> FederatedAlgorithm:
    """Federated averaging of slices of one model, of which each step trains a part.

    Args:
      sgd: local SGD, whose settings are this method's as well; its momentum must be 0, and with
        self-distillation its loss "ce".
      slices: the same; `widths` are the values of p, and the device's own is the largest that it
        trains.
      self_distillation: each step trains the device's largest width too, and the smaller one on
        what that gives instead of the labels.

    Raises ValueError naming the hyper-parameter that is out of range, the layer that cannot be
    sliced, or what `static_norm` lacks.
    """
    rates = rates_from(slices.widths)
    if sgd.momentum and len(rates) > 1:
        raise ValueError(
            f"momentum must be 0, got {sgd.momentum}: a step trains one of several widths, which "
            "have no momentum in common"
        )
    if self_distillation and sgd.loss != "ce":
        raise ValueError(f"loss must be 'ce' with self_distillation, got {sgd.loss!r}")
    cuts = {rate: width(server.spec, rate) for rate in rates}

    def told(at: int) -> dict[str, Scalar]:
        """The widths that the device trains, as shares of its own, which comes first."""
        shares = " ".join(str(rate / rates[at]) for rate in rates[at:])
        return {"shares": shares, "self_distillation": self_distillation}

    def most(spec: ModelSpec, at: int) -> Sequence[Work]:
        """Where each step draws the largest, or of two the two largest."""
        shares = tuple(rate / rates[at] for rate in rates[at:])
        drawn = shares[: 2 if self_distillation else 1][-1:] * sgd.local_steps
        return _works(spec, sgd.work, shares, drawn, self_distillation)

    def cut_of(rate: float, round: int, client: int) -> Cut:
        return cuts[rate]

    return sliced(server, sgd, slices, cut_of, client_update, work=work, most=most, told=told)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    out = without_effect(settings)
    if len(rates_from(settings["widths"])) == 1:
        out["self_distillation"] = "widths names one width"
    return out


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps of each width that this task draws, known before it does."""
    distilled = bool(task.hparams["self_distillation"])
    return _works(task.spec, sgd_work(task), _shares(task), _drawn(task), distilled)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps, each on a width of its own; the largest slice goes back."""
    if len(_shares(task)) == 1:
        return replace(train_kept_weights(task, batches, engine), work=work(task)), client_state
    h = task.hparams
    steps = batches.draw(
        steps=int(h["local_steps"]), batch_size=int(h["batch_size"]), seed=task.seed
    )
    drawn = zip(_drawn(task), steps, strict=True)
    train = _distilled if h["self_distillation"] else _dropped
    params, losses = train(task, engine, drawn)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=params,
        sub_model=task.sub_model,
        metrics={"train_loss": fsum(losses) / len(losses) if losses else 0.0},
        work=work(task),
    )
    return without_statistics(task, update), client_state


def _dropped(task: ClientTask, engine: Engine, drawn: Any) -> tuple[Params, list[float]]:
    """w_p <- w_p - η ∇ CE; steps of one width in a row share a session."""
    cuts = _cuts(task)
    held = {name: value.copy() for name, value in task.params.items()}
    losses: list[float] = []
    session: Session | None = None
    now = 0.0
    for share, (x, y) in drawn:
        if session is None or share != now:
            if session is not None:
                _put(held, cuts[now], session.params())
                session = None  # its memory goes before the next one takes some
            now, session = share, open_session(_narrowed(task, cuts[share], held), engine)
        losses.append(session.step(x, y))
    if session is not None:
        _put(held, cuts[now], session.params())
    return held, losses


def _distilled(task: ClientTask, engine: Engine, drawn: Any) -> tuple[Params, list[float]]:
    """The sum of both gradients at the same w, as what two sessions that begin there move.

    w' = w - η ∇ CE(F_pmax) comes from one, and from the other what -η ∇ KL adds to the first
    channels.
    """
    cuts, output = _cuts(task), task.spec.nodes[-1].name
    held: Params = task.params
    losses: list[float] = []
    full: Session | None = None
    for share, (x, y) in drawn:
        full = full or open_session(replace(task, params=held), engine)
        before = {} if share == 1 else cuts[share].take(held := full.params())
        logits = full.forward(x, training=True)[output]
        loss, gradient = loss_and_gradient(logits, y, "ce")
        losses.append(loss)
        full.descend({output: gradient})
        if share != 1:  # of the largest itself the KL is 0
            held, full = dict(full.params()), None  # its memory goes before the next one takes some
            moved = _taught(task, engine, cuts[share], before, (x, y), logits)
            for name in cuts[share].spec.param_shapes:
                held[name][cuts[share].index[name]] += moved[name] - before[name]
    return held if full is None else full.params(), losses


def _taught(
    task: ClientTask,
    engine: Engine,
    cut: Cut,
    params: Params,
    batch: tuple[np.ndarray, np.ndarray],
    teacher: np.ndarray,
) -> Params:
    """One step of the narrower model on KL(teacher || its own output); decay is the other's."""
    (x, y), output = batch, task.spec.nodes[-1].name
    session = engine.open(
        cut.spec,
        params,
        task.sub_model,
        batch_size=int(task.hparams["batch_size"]),
        optimizer=SGD(float(task.hparams["lr"])),
        seed=task.seed,
    )
    taps = {"teacher": teacher, output: session.forward(x, training=True)[output]}
    _, gradients = distillation(taps, y, student=output, teacher="teacher")
    session.descend(gradients)
    return session.params()


def _works(
    spec: ModelSpec,
    plain: Work,
    shares: Sequence[float],
    drawn: Sequence[float],
    distilled: bool,
) -> tuple[Work, ...]:
    """Of steps that draw so; plain: of as many on the model itself."""
    if len(shares) == 1:
        return (plain,)
    output, counts, works = spec.nodes[-1].name, Counter(drawn), []
    for share in shares:
        if not (steps := counts[share]):
            continue
        own = _floats(narrowed(spec, share))
        if not distilled:  # beside the answer: what is read back into it
            works.append(replace(plain, steps=steps, held_floats=own, width=share))
            continue
        one = replace(plain, steps=steps, taps=(output,))
        if share == 1:
            works.append(replace(one, held_floats=own))
            continue
        works += [  # of the narrower one its own weights before and after the step
            replace(one, held_floats=_floats(spec) + own),
            replace(one, held_floats=2 * own, width=share),
        ]
    return tuple(works)


def _floats(spec: ModelSpec) -> int:
    return sum(map(prod, spec.tensor_shapes.values()))


def _shares(task: ClientTask) -> tuple[float, ...]:
    return tuple(map(float, str(task.hparams["shares"]).split()))


def _drawn(task: ClientTask) -> list[float]:
    """p / p_max of each step, uniform over those that the device trains."""
    shares = _shares(task)
    draw = generator(task.seed, 0, 0, "widths")
    return [shares[at] for at in draw.integers(len(shares), size=int(task.hparams["local_steps"]))]


def _cuts(task: ClientTask) -> dict[float, Cut]:
    """Each width as a slice of what the device holds."""
    return {
        share: whole(task.spec) if share == 1 else width(task.spec, share)
        for share in _shares(task)
    }


def _narrowed(task: ClientTask, cut: Cut, held: Params) -> ClientTask:
    """The task on a narrower model."""
    return replace(task, spec=cut.spec, params=cut.take(held))


def _put(held: dict[str, np.ndarray], cut: Cut, values: Params) -> None:
    for name, value in values.items():
        held[name][cut.index[name]] = value
