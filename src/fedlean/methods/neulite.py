"""NeuLite: the parts of a model train in turns, a round each, with what comes before them frozen.

Wu et al., "NeuLite: Memory-Efficient Federated Learning via Elastic Progressive Training", arXiv
2408.10826; code at github.com/Wuxiaobo315/NeuLiteCode.  Of T parts, round r trains part r mod T.

- *Training harmonizer*: in stage t part t trains, with the output module and the projector, which
  are the stage's own, and with the tail of part t-1, its last convolution or linear layer and the
  norm after that.  All else is frozen.  There is one model, so what a stage has made of a tail
  arrives in the others.
- *Curriculum mentor*: a stage's loss is

      L = CE - λ1 nHSIC(X, Z) - λ2 nHSIC(Y, proj(GAP Z)) + μ/2 |w - w_sent|²

  over the inputs X of a batch, its labels Y (one-hot) and the representation Z.  λ1 falls with
  depth and λ2 rises: early parts should keep what the input says, late ones what the label needs.

**Deviations.**  What is frozen runs as in evaluation; the release leaves it in training mode, so
that the BatchNorm statistics of frozen parts drift.  λ1, λ2 and μ are not known: the release has
None and multiplies its last term by 0.  Ours are straight lines over the stages, and μ = 0; that λ1
falls and λ2 rises, and that R is the proximal term, is our reading.  nHSIC is estimated without
bias (`train/hsic.py`); `hsic="biased"` is the release's, which is 0.98 on independent noise.  Z is
the part's output; the release takes what the classifier reads, behind the stand-ins, as
`representation="module"` does (the last stage always does).  The projector is smaller, with ReLU
between its layers, where the release has 512-2056-1024-512 without.  Means are weighted by
examples.  Only devices that can hold a stage are drawn for it; the release's lists are empty.
"""

# T stages, B examples of a batch

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, prod
from typing import Any, Literal, get_args

import numpy as np

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Masks,
    Model,
    Params,
    Scalar,
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.freezing import foresight
from fedlean.freezing.beginning import frozen_beginning, split_alone
from fedlean.freezing.client import open_stage, stage_update, stage_work
from fedlean.freezing.eligible import Eligibility
from fedlean.freezing.foresight import Foresight
from fedlean.freezing.stages import (
    Stage,
    check_rounds,
    merge_stage,
    module_params,
    stage,
    stage_model,
)
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.freezing.tail import tail
from fedlean.layers import Flatten, GlobalAvgPool, Layer, Linear, ReLU
from fedlean.spec import INPUT, ModelSpec, Node
from fedlean.submodels.parts import Part
from fedlean.submodels.stages import graft
from fedlean.train.cohort import devices_of
from fedlean.train.descent import local_descent
from fedlean.train.hsic import LEAST, Estimator, held_floats, nhsic
from fedlean.train.hyperparameters import in_range, one_of
from fedlean.train.local_sgd import LocalSGD, with_settings
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.sgd import local_sgd

Representation = Literal["part", "module"]
MOST_STAGES = 32  # that a plan walks through; no model of the catalogue has more than half
MOST_WEIGHT = 1e3


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str
    params: Params  # of the whole model
    extra: Params  # of every stage's output module and projector
    masks: Masks = field(default_factory=dict)  # of the whole model; empty: dense


@dataclass(frozen=True)
class Mentored:
    """A stage with its projector, and where the mentor looks."""

    stage: Stage
    z: str  # the layer whose activation is Z
    projection: str  # the last layer of the projector; "" where λ2 is 0
    lambda1: float
    lambda2: float

    @property
    def hparams(self) -> dict[str, Scalar]:
        return {
            "lambda1": self.lambda1,
            "lambda2": self.lambda2,
            "z": self.z,
            "projection": self.projection,
        }


@with_settings(LocalSGD, Staging, Foresight)
def neulite(
    server: Server,
    sgd: LocalSGD,
    staging: Staging,
    pruning: Foresight,
    *,
    lambda1_first: float = 0.1,
    lambda1_last: float = 0.01,
    lambda2_first: float = 0.01,
    lambda2_last: float = 0.1,
    mu: float = 0.0,
    sigma: float = 5.0,
    hsic: Estimator = "unbiased",
    representation: Representation = "part",
    projector: str = "32 16",
) -> FederatedAlgorithm:
    """Federated averaging of the parts of a model, in turns.

    The model that is evaluated and saved is the whole one with its own output, which the last stage
    trains; before round T its last part is as it began.

    Args:
      sgd: local SGD, whose settings are this method's as well; its loss must be "ce".
      staging, pruning: how the model is divided, how clients run what is frozen, and what is pruned
        before the first round.
      lambda1_first, lambda1_last: λ1 in the first and in the last stage, on a line between them; 0
        leaves the term out.
      lambda2_first, lambda2_last: λ2 likewise.
      mu: μ of the proximal term, whose weights w_sent are kept in memory where it is not 0.
      sigma: σ of the Gaussian kernels (release: 5).
      hsic: "unbiased", or "biased" as released.
      representation: whether Z is the output of the "part" or what the classifier of the output
        "module" reads, as released.
      projector: widths of its linear layers, as "2056 1024 512" (the release's).

    Raises ValueError naming the hyper-parameter that is out of range, for a model that cannot be
    divided, for a part without a convolution or linear layer, for fewer rounds than stages, and
    where `beginning` is not "together" and no cut is passed by one tensor.
    """
    lines = {
        "lambda1_first": lambda1_first,
        "lambda1_last": lambda1_last,
        "lambda2_first": lambda2_first,
        "lambda2_last": lambda2_last,
    }
    for name, value in {**lines, "mu": mu}.items():
        in_range(name, value, 0.0, MOST_WEIGHT)
    in_range("sigma", sigma, 0.0, 1e6, open_low=True)
    one_of("hsic", hsic, get_args(Estimator))
    one_of("representation", representation, get_args(Representation))
    if sgd.loss != "ce":
        raise ValueError(f"loss must be 'ce', the mentor's first term, got {sgd.loss!r}")
    if any(lines.values()) and sgd.batch_size < LEAST:
        raise ValueError(
            f"batch_size must be at least {LEAST}, got {sgd.batch_size}: nHSIC compares the "
            "examples of a batch; or set lambda1_* and lambda2_* to 0"
        )
    widths = _widths(projector)
    own = staging.parts(server.spec)
    found = tuple(
        _mentored(
            server.spec,
            staging,
            own,
            number,
            _on_line(lambda1_first, lambda1_last, number, len(own)),
            _on_line(lambda2_first, lambda2_last, number, len(own)),
            representation,
            widths,
        )
        for number in range(len(own))
    )
    check_rounds(len(found), server.rounds)
    if staging.beginning != "together":
        for one in found:
            if frozen_beginning(one.stage.spec, one.stage.frozen):
                split_alone(one.stage.spec, one.stage.frozen)
    eligible = Eligibility(work, server.profile)

    def init(model: Model) -> State:
        extra = {
            name: value
            for one in found
            for name, value in module_params(one.stage, server.seed, server.init).items()
        }
        return State(0, "train", model.params, extra, model.masks)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        one, round = found[state.round % len(found)], state.round + 1
        told = {**sgd.hparams(state.round), **one.hparams, "mu": mu, "sigma": sigma, "hsic": hsic}
        sent = stage_model(one.stage, state.params, state.extra, state.masks)
        fit = eligible(staging, devices, state.phase, one.stage, told, sent.masks)
        return stage_tasks(
            server,
            staging,
            devices_of(fit, sgd.clients(server, fit, round)),
            round=round,
            phase=state.phase,
            one=one.stage,
            model=sent,
            hparams=told,
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        params, extra = merge_stage(server.spec, state.params, state.extra, updates)
        return replace(state, round=state.round + 1, params=params, extra=extra)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    algorithm = FederatedAlgorithm(init, configure, client_update, server_update, done, work=work)
    return pruning.ahead_of(algorithm, server, own)


def _mentored(
    spec: ModelSpec,
    staging: Staging,
    own: Sequence[Part],
    number: int,
    lambda1: float,
    lambda2: float,
    representation: Representation,
    widths: Sequence[int],
) -> Mentored:
    """Stage `number` of the training harmonizer: what trains is the part, the tail of the one
    before it, the output module and the projector.
    """
    prefix = f"surrogate{number + 1}"  # a stage's own, since all have tensors of the same shapes
    plain = stage(spec, own, number, prefix=prefix, norm=staging.module_norm)
    tails = [tail(spec, part) for part in own]  # of all: one without weights is found at once
    at_part = representation == "part" and number < len(own) - 1
    z = own[number].end if at_part else _read_by_classifier(plain.spec)
    small, projection = plain.spec, ""
    if lambda2:
        nodes = _projector(f"projector{number + 1}", plain.spec.shapes[z], widths)
        small, projection = graft(plain.spec, nodes, at=z), nodes[-1].name
    frozen = plain.frozen - tails[number - 1] if number else plain.frozen
    module = frozenset(small.tensor_shapes).difference(spec.tensor_shapes)
    one = replace(plain, spec=small, frozen=frozen, module=module)
    return Mentored(one, z, projection, lambda1, lambda2)


def _read_by_classifier(spec: ModelSpec) -> str:
    """The activation that the last layer with weights reads, before pooling."""
    (name,) = spec.weighted[-1].inputs
    while isinstance(spec.by_name[name].layer, GlobalAvgPool | Flatten):
        (name,) = spec.by_name[name].inputs
    return name


def _projector(prefix: str, shape: tuple[int, ...], widths: Sequence[int]) -> list[Node]:
    """Linear layers with ReLU between them, behind global average pooling of an image."""
    layers: list[tuple[str, Layer]] = [("pool", GlobalAvgPool())] if len(shape) > 1 else []
    for at, width in enumerate(widths, start=1):
        layers += [(f"fc{at}", Linear(width)), (f"relu{at}", ReLU())]
    nodes: list[Node] = []
    for name, layer in layers[:-1]:
        nodes.append(Node(f"{prefix}_{name}", layer, (nodes[-1].name if nodes else INPUT,), prefix))
    return nodes


def _on_line(first: float, last: float, number: int, count: int) -> float:
    return first + (last - first) * number / (count - 1)


def _widths(text: str) -> tuple[int, ...]:
    """Raises ValueError naming what is no list of widths."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and 1 <= int(word) <= 1 << 16 for word in words):
        raise ValueError(f"projector must be widths of linear layers, as '32 16', got {text!r:.60}")
    return tuple(map(int, words))


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    first, second = (
        any(settings[f"{name}_{end}"] for end in ("first", "last"))
        for name in ("lambda1", "lambda2")
    )
    found = foresight.unused(settings) | ({} if second else {"projector": "lambda2 is 0"})
    if not first and not second:
        terms = "lambda1 and lambda2 are 0"
        found |= dict.fromkeys(("sigma", "hsic", "representation", "projector"), terms)
    return found


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """A run in which every stage has a round."""
    return [Rehearsal(foresight.walked(settings), rounds=MOST_STAGES, until=MOST_STAGES)]


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps of the stage, on the engine's loss or on the mentor's.

    The arrays that the mentor holds are charged.  Its operations are not: `Work` counts those of
    layers.
    """
    h, taps = task.hparams, _taps(task)
    read = (*taps, task.spec.nodes[-1].name) if taps else ()
    *before, steps = stage_work(task, taps=read)
    size, held = int(h["batch_size"]), 0
    for name in taps:
        features = prod(task.spec.shapes[name])
        other = prod(task.spec.input_shape) if name == h["z"] else task.spec.output_shape[0]
        held += size * features + held_floats(size, features, other)
    floats = steps.optimizer_floats + bool(h["mu"])
    return *before, replace(steps, held_floats=held, optimizer_floats=floats)


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """`local_steps` steps on the loss of the task's stage."""
    h = task.hparams
    session, drawn = open_stage(task, batches, engine, proximal=float(h["mu"]))
    loop: dict[str, Any] = {"batch_size": int(h["batch_size"]), "seed": task.seed}
    loop["steps"] = int(h["local_steps"])
    if not _taps(task):
        metrics = {"train_loss": local_sgd(session, drawn, **loop)}
        return stage_update(task, batches, session, metrics, work), client_state
    mentor = Mentor(task)
    # where `drawn` are activations, the same draws of the data are what they were made of
    inputs = None if drawn is batches else batches.draw(**loop)
    train_loss = local_descent(
        session,
        drawn,
        mentor,
        taps=_taps(task),
        beside=lambda x: {INPUT: x if inputs is None else next(inputs)[0]},
        **loop,
    )
    metrics = {"train_loss": train_loss, **mentor.means()}
    return stage_update(task, batches, session, metrics, work), client_state


class Mentor:
    """The curriculum mentor's loss of a task, a `TapsLoss`, which remembers its terms."""

    def __init__(self, task: ClientTask):
        h = task.hparams
        self._output = task.spec.nodes[-1].name
        self._terms = (  # by name: the weight, whose dependence, and on what
            ("nhsic_input", float(h["lambda1"]), str(h["z"]), INPUT),
            ("nhsic_label", float(h["lambda2"]), str(h["projection"]), ""),
        )
        self._sigma = float(h["sigma"])
        self._estimator: Estimator = "biased" if h["hsic"] == "biased" else "unbiased"
        self._seen: dict[str, list[float]] = {}

    def __call__(
        self, taps: Mapping[str, np.ndarray], y: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        """CE - λ1 nHSIC(X, Z) - λ2 nHSIC(Y, projection), and its gradients at the taps."""
        logits = taps[self._output]
        loss, gradient = loss_and_gradient(logits, y, "ce")
        gradients = {self._output: gradient}
        self._seen.setdefault("cross_entropy", []).append(loss)
        for name, weight, at, on in self._terms:
            if weight:
                other = taps[on] if on else np.eye(logits.shape[1])[y]
                value, gradient = nhsic(
                    taps[at], other, sigma=self._sigma, estimator=self._estimator
                )
                gradient *= np.float32(-weight)
                gradients[at] = gradient
                loss -= weight * value
                self._seen.setdefault(name, []).append(value)
        return loss, gradients

    def means(self) -> dict[str, float]:
        """Of the terms over the batches so far, by name."""
        return {name: fsum(values) / len(values) for name, values in self._seen.items()}


def _taps(task: ClientTask) -> tuple[str, ...]:
    """The layers that the mentor reads beside the output; none where its weights are 0."""
    h = task.hparams
    pairs = ((h["lambda1"], h["z"]), (h["lambda2"], h["projection"]))
    return tuple(str(name) for weight, name in pairs if weight)
