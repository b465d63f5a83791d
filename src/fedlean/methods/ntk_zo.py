"""Pruning by the neural tangent kernel before training, then training by forward passes alone.

After Zhang et al., arXiv 2405.04765 (Journal of Systems Architecture 168, 2025): federated
foresight pruning on the neural tangent kernel, then training without backpropagation.

**A reconstruction.**  Of that paper we had the abstract and the methods that it builds on, not its
body: NTK-SAP (Wang et al., ICLR 2023) for the masks, BAFFLE (Feng et al., arXiv 2301.12195) for the
training.  Models, settings and figures of the paper are not known to us, and none here is claimed
to be its.

Phase "prune" or "score" chooses a mask: the server alone, on Gaussian inputs (default), or the
clients, who send signed scores that add up to those of their pooled data.  Phase "train": each
client evaluates the loss at K points θ + σ z_k around the model and sends the K slopes

    c_{n,k} = (L_n(θ + σ z_k) - L_n(θ)) / σ,

the server takes ĝ = (1/K) Σ_k (Σ_n p_n c_{n,k}) z_k and a step of its optimiser.  The z_k come from
a seed that all clients of a round share; a pruned coordinate has none.

**Deviations** (ours, as no source that we have says it):
- The optimiser, "normalised" steps (the step over the standard deviation of the K slopes), the
  moving average for evaluation, central differences, ±1 and rank-1 directions.
- `lr` is for the dense model and grows with 1/√density (`lr_by_density`).
- Slopes may travel as fp16 or int8, and the model as the slopes of the rounds that a client missed
  (`download="scalars"`): it replays them, bit for bit.
- `last_block="backprop"` takes the last block's exact gradient (as ElasticZO does), and
  `masks_from` the mask of another run.
- No unit loses its last weight, and kept weights grow by 1/√(their layer's density).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
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
    Statistic,
    StatisticForm,
    SubModel,
    Work,
    derive_seed,
)
from fedlean.engine.directions import Kind
from fedlean.engine.protocol import SGD, Engine, Loss
from fedlean.models.initialise import INIT_SCHEMES
from fedlean.pruning.density import density as density_of
from fedlean.pruning.density import full_masks
from fedlean.pruning.finished_run import read_finished_run
from fedlean.pruning.foresight import Criterion, Scoring, foresight_masks, shuffled_as
from fedlean.pruning.global_top import count_at
from fedlean.pruning.node_perturbation import node_gradient, node_scores
from fedlean.pruning.ntk import gaussian_inputs, ntk_scores
from fedlean.pruning.ntk_pruning import prune_step
from fedlean.pruning.rescale import rescale_kept
from fedlean.spec import ModelSpec
from fedlean.train.cohort import check_cohort, sample_cohort
from fedlean.train.forward_updates import (
    Entry,
    Held,
    Optimizer,
    Rule,
    Space,
    advance,
    averaged,
    estimate,
    groups,
    log_arrays,
    read_log,
    replay,
    round_seed,
)
from fedlean.train.hyperparameters import at_least, in_range, learning_rate
from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.train.quantised_scalars import rounded
from fedlean.train.zeroth_order import Differences, Form, Probe, directional_derivatives
from fedlean.tree import Fold, apply_mask, kept_counts, pack, unpack

SLOPES = "c"  # name of the statistic and of its one tensor: short, for every byte counts
MAX_LOG_ROUNDS = 1000  # of scalars that the server keeps for those who missed rounds
FROM_CLIENTS = ("ntk", "ntk_shuffled", "node_ntk", "node")  # criteria that clients can score
FORWARD_ONLY = ("node_ntk", "node")  # whose scores take no backward pass
SLOPE_LIMIT = 1e9  # beyond what a loss can rise by over σ; one such number would undo the model
DOWNLOADS = ("model", "scalars")


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # "prune" (the server alone) or "score" (the clients), then "train"
    params: Params  # the model, or its moving average
    masks: Masks = field(default_factory=dict)  # empty: dense
    mask_seed: int | None = None  # of random masks, which travel as it and their counts
    prune_step: int = 0  # steps of the density schedule done
    choosing: Masks = field(default_factory=dict)  # what those have left
    iterate: Params = field(default_factory=dict)  # packed: where the average is not the model
    moments: Mapping[str, Params] = field(default_factory=dict)  # of the optimiser, packed
    steps: int = 0  # of the optimiser
    log: tuple[np.ndarray, ...] = ()  # of the last rounds: lr, then the averaged slopes
    held: Mapping[str, int] = field(default_factory=dict)  # client -> round whose model it keeps


def ntk_zo(
    server: Server,
    *,
    lr: float = 0.01,
    lr_by_density: bool = True,
    lr_half_life_rounds: float = 0.0,
    optimizer: Optimizer = "adam",
    momentum: float = 0.9,
    ema: float = 0.0,
    directions: int = 50,
    sigma: float = 1e-3,
    kind: Kind = "gaussian",
    differences: Differences = "forward",
    shared_directions: bool = True,
    batch_size: int = 32,
    micro_batch: int = 0,
    cohort: int | None = None,
    loss: Loss = "ce",
    scalars: Form = "fp32",
    download: Literal["model", "scalars"] = "model",
    last_block: Literal["zeroth", "backprop"] = "zeroth",
    density: float = 0.2,
    criterion: Criterion = "ntk",
    scores: Literal["server", "clients"] = "server",
    inputs: Literal["gaussian", "local"] = "gaussian",
    prune_steps: int = 20,
    prune_draws: int = 1,
    prune_examples: int = 256,
    epsilon: float = 0.01,
    keep_units: bool = True,
    rescale: bool = True,
    masks_from: str = "",
    masks_weights: Literal["initial", "trained"] = "initial",
) -> FederatedAlgorithm:
    """Foresight pruning, then zeroth-order training.

    Args:
      lr: of the server's optimiser on the dense model; divided by √density where `lr_by_density`,
        halved every `lr_half_life_rounds` rounds (0: constant).
      optimizer: "adam", "momentum" (with `momentum`) or "normalised"; see
        `fedlean.train.forward_updates.Rule`.
      ema: decay in [0, 1) of a moving average of the models, which is then what is evaluated and
        saved; 0: none.
      directions: K; sigma: σ; kind: "gaussian", "sign" (±1) or "rank1"; differences: "forward",
        K + 1 evaluations of each example, or "central", 2K.
      shared_directions: False gives each client directions of its own, as a control.
      batch_size: B, examples of a client's round; micro_batch: of them, and of those that a client
        scores on, at once in memory, 0: all.
      cohort: clients a round, drawn anew each round; None: all.  loss: as in `fedavg`.
      scalars: in which the slopes go up: "fp32", "fp16" or "int8".
      download: "model", or "scalars" for clients that replay the rounds they missed: those keep the
        model and the optimiser's moments between rounds.
      last_block: "backprop" takes the last block's gradient exactly, and sends it.
      density: kept share of all prunable weights together; 1: no pruning.
      criterion: see `fedlean.pruning.foresight.foresight_masks`.
      scores: who scores: the "server", or the "clients" (criteria of FROM_CLIENTS) on
        `inputs`, "gaussian" or "local" ones.
      prune_steps: T of the density schedule d^(t/T); prune_draws: models and batches per step;
        prune_examples: inputs of a batch; epsilon: ε; keep_units: no unit loses its last weight;
        rescale: kept weights grow by 1/√(their layer's density).
      masks_from: folder of a finished run on the same model, whose masks are taken instead (density
        and criterion are then not used); masks_weights: "trained" goes on from its weights.

    Raises ValueError naming the hyper-parameter that is out of range or does not go with another.
    """
    _check_numbers(lr, lr_half_life_rounds, momentum, ema, directions, sigma, epsilon, density)
    for name, count, least in (
        ("batch_size", batch_size, 1),
        ("micro_batch", micro_batch, 0),
        ("prune_steps", prune_steps, 1),
        ("prune_draws", prune_draws, 1),
        ("prune_examples", prune_examples, 1),
    ):
        at_least(name, count, least)
    check_cohort(cohort, server)
    for name, choice, choices in (
        ("optimizer", optimizer, get_args(Optimizer)),
        ("kind", kind, get_args(Kind)),
        ("differences", differences, get_args(Differences)),
        ("loss", loss, get_args(Loss)),
        ("scalars", scalars, get_args(Form)),
        ("download", download, DOWNLOADS),
        ("last_block", last_block, ("zeroth", "backprop")),
        ("criterion", criterion, get_args(Criterion)),
        ("scores", scores, ("server", "clients")),
        ("inputs", inputs, ("gaussian", "local")),
        ("masks_weights", masks_weights, ("initial", "trained")),
    ):
        if choice not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
    if scores == "clients" and criterion not in FROM_CLIENTS:
        raise ValueError(
            f"scores='clients' goes with the criteria {', '.join(FROM_CLIENTS)}, got "
            f"criterion={criterion!r}: it needs no client, take scores='server'"
        )
    if optimizer == "normalised" and directions == 1:
        raise ValueError(
            "optimizer='normalised' divides by the standard deviation of a round's slopes, and one "
            "has none: take directions=2 or more, or another optimizer"
        )
    if inputs == "local" and scores == "server":
        raise ValueError("inputs='local' needs scores='clients': the server has no data")
    if download == "scalars" and (last_block == "backprop" or not shared_directions):
        raise ValueError(
            "download='scalars' replays shared directions: it goes neither with "
            "last_block='backprop' nor with shared_directions=False"
        )
    if masks_weights == "trained" and not masks_from:
        raise ValueError("masks_weights='trained' needs masks_from, the folder of a finished run")
    spec = server.spec
    count_at(density, spec)
    moved = _moved_by_slopes(spec, last_block)
    if not moved:
        raise ValueError(
            "last_block='backprop' leaves nothing to train by forward passes: the model has one "
            "block only"
        )
    run = read_finished_run(Path(masks_from), spec) if masks_from else None

    scoring = Scoring(prune_steps, prune_draws, prune_examples, epsilon, server.init, keep_units)
    rule = Rule(optimizer, momentum)
    run_seed = derive_seed(server.seed, 0, 0, "zeroth order")
    prune_seed = derive_seed(server.seed, 0, 0, "prune")

    def space(masks: Masks) -> Space:
        return Space({name: spec.param_shapes[name] for name in moved}, masks, kind)

    def init(model: Model) -> State:
        params = model.params
        if run is not None and masks_weights == "trained":
            return State(0, "train", apply_mask(run.params, run.masks), run.masks)
        if run is not None:
            return _pruned(State(0, "prune", params), run.masks, None, rescale)
        if density == 1.0:
            return State(0, "train", params)
        if scores == "clients":
            return State(0, "score", params, choosing=full_masks(spec))
        return State(0, "prune", params)

    def score_tasks(state: State, clients: Sequence[int]) -> list[ClientTask]:
        step = state.prune_step + 1
        hparams: dict[str, Scalar] = {
            "criterion": criterion if criterion in FORWARD_ONLY else "ntk",
            "inputs": inputs,
            "draws": prune_draws,
            "examples": prune_examples,
            "micro_batch": micro_batch,
            "epsilon": epsilon,
            "init": server.init,
            "weights_seed": derive_seed(prune_seed, 0, step, "weights"),
        }
        sub_model = SubModel(masks=state.choosing)
        return [
            ClientTask(
                step,
                "score",
                client,
                derive_seed(server.seed, step, client, "score"),
                spec,
                {},
                sub_model,
                hparams,
            )
            for client in clients
        ]

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "prune":
            return []
        if state.phase == "score":
            # another cohort than any round's
            step = state.prune_step + 1
            seed = derive_seed(server.seed, 0, 0, "score")
            return score_tasks(state, sample_cohort(devices, cohort, seed=seed, round=step))
        round = state.round + 1
        hparams: dict[str, Scalar] = {
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "loss": loss,
            "directions": directions,
            "sigma": sigma,
            "kind": kind,
            "differences": differences,
            "scalars": scalars,
            "last_block": last_block,
        }
        if download == "scalars":
            hparams |= {
                "optimizer": optimizer,
                "momentum": momentum,
                "run_seed": run_seed,
                "round": state.round,  # whose model is asked for
            }
        frozen = spec.tensor_shapes.keys() - _by_backprop(spec, last_block)
        sub_model = SubModel(
            masks=state.masks,
            frozen=frozenset(frozen if last_block == "backprop" else ()),
            mask_seed=state.mask_seed,
        )
        whole = _held(state)
        tasks = []
        for client in sample_cohort(devices, cohort, seed=server.seed, round=round):
            own = 0 if shared_directions else client + 1
            task = ClientTask(
                round,
                "train",
                client,
                derive_seed(server.seed, round, client, "train"),
                spec,
                whole.params,
                sub_model,
                {**hparams, "direction_seed": round_seed(run_seed, round, own)},
            )
            if download == "scalars":
                task = _with_log(task, state, whole)
            tasks.append(task)
        return tasks

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.phase == "prune":
            masks, mask_seed = foresight_masks(
                server.engine, spec, state.params, density, criterion, scoring, prune_seed
            )
            return _pruned(state, masks, mask_seed, rescale)
        if state.phase == "score":
            return after_scores(state, updates)
        return after_slopes(state, updates)

    def after_scores(state: State, updates: Iterable[ClientUpdate]) -> State:
        merged = Fold(state.params)
        for update in updates:
            merged.add(update)
        signed = merged.statistic("scores")
        if not signed:
            return state
        signed = {name: unpack(values, state.choosing[name]) for name, values in signed.items()}
        step = state.prune_step + 1
        ends = scoring.density_after(step, density)
        masks = prune_step(spec, signed, state.choosing, ends, keep_units=keep_units)
        if step < prune_steps:
            return replace(state, choosing=masks, prune_step=step)
        mask_seed = None
        if criterion == "ntk_shuffled":
            masks, mask_seed = shuffled_as(spec, masks, prune_seed)
        return replace(_pruned(state, masks, mask_seed, rescale), choosing={}, prune_step=step)

    def after_slopes(state: State, updates: Iterable[ClientUpdate]) -> State:
        round, here = state.round + 1, space(state.masks)
        merged, apart = Fold(state.params), _Apart(run_seed, round, here)
        held = dict(state.held)
        for update in updates:
            if update.metrics.get("lost_state", 0.0):
                held.pop(str(update.client), None)
                continue
            held[str(update.client)] = state.round
            merged.add(update)
            if not shared_directions:
                apart.add(update)
        before = _held(state)
        slopes = merged.statistic(SLOPES).get(SLOPES)
        if slopes is None:
            # nobody answered (the round is over), or all have lost their model (asked again)
            entry, after = Entry(round, 0.0, np.zeros(directions, np.float32)), before
            if held.keys() != state.held.keys():
                return replace(state, held=held)
        else:
            rate = learning_rate(lr, state.round, lr_half_life_rounds)
            if lr_by_density:
                rate /= density_of(state.masks) ** 0.5
            entry = Entry(round, float(np.float32(rate)), slopes)
            if shared_directions and last_block == "zeroth":
                after = replay(before, [entry], seed=run_seed, space=here, rule=rule)
            else:
                seed = round_seed(run_seed, round)
                gradient = estimate(seed, slopes, here) if shared_directions else apart.mean()
                spread = slopes if shared_directions else apart.slopes()
                gradient = {**gradient, **merged.statistic("gradient")}
                after = advance(before, gradient, rule, entry.lr, spread)
        state = replace(state, round=round, moments=after.moments, steps=after.steps)
        state = _shown(state, before, after, ema)
        return _logged(state, entry, held) if download == "scalars" else state

    def done(state: State) -> bool:
        return state.phase == "train" and state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, statistics, work)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    found = {}
    if settings["optimizer"] != "momentum":
        found["momentum"] = f"optimizer is {settings['optimizer']!r}"
    scoring = ("prune_steps", "prune_draws", "prune_examples", "epsilon", "keep_units")
    choosing = ("criterion", "scores", "inputs", *scoring)
    if settings["masks_from"]:
        found |= dict.fromkeys(("density", *choosing), "masks_from names the mask")
        if settings["masks_weights"] == "trained":
            found["rescale"] = "masks_weights is 'trained'"
    elif settings["density"] == 1:
        pruned = ("rescale", "lr_by_density")
        found |= dict.fromkeys((*choosing, *pruned), "density is 1: nothing is pruned")
    elif settings["criterion"] not in FROM_CLIENTS:
        found |= dict.fromkeys(scoring, f"criterion {settings['criterion']!r} takes no scores")
    return found


def _check_numbers(
    lr: float,
    lr_half_life_rounds: float,
    momentum: float,
    ema: float,
    directions: int,
    sigma: float,
    epsilon: float,
    density: float,
) -> None:
    in_range("lr", lr, 0.0, 100.0, open_low=True)
    in_range("lr_half_life_rounds", lr_half_life_rounds, 0.0, 1e12)
    in_range("momentum", momentum, 0.0, 0.9999)
    in_range("ema", ema, 0.0, 0.99999)
    at_least("directions", directions, 1)
    in_range("sigma", sigma, 1e-8, 1.0)  # less is lost beside a weight in float32
    in_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
    in_range("density", density, 0.0, 1.0, open_low=True)


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """The scores of kept weights; or K slopes, and where asked for the last block's gradient."""
    kept = kept_counts(task.sub_model.masks)
    if task.phase == "score":
        return {"scores": StatisticForm({name: (kept[name],) for name in task.spec.prunable})}
    shape = (int(task.hparams["directions"]),)
    forms = {SLOPES: StatisticForm({SLOPES: shape}, limit=SLOPE_LIMIT)}
    if exact := _by_backprop(task.spec, str(task.hparams["last_block"])):
        shapes = task.spec.param_shapes
        forms["gradient"] = StatisticForm(
            {name: (kept[name],) if name in kept else shapes[name] for name in exact},
            limit=SLOPE_LIMIT,
        )
    return forms


def work(task: ClientTask) -> tuple[Work, ...]:
    """Forward passes of bumps, of both points of a pruning step, or along the directions."""
    return _score_work(task) if task.phase == "score" else _slopes_work(task)


def _score_work(task: ClientTask) -> tuple[Work, ...]:
    h, spec = task.hparams, task.spec
    draws, examples = int(h["draws"]), int(h["examples"])
    at_once = _at_once(task, examples)
    kept = kept_counts(task.sub_model.masks)
    # forward passes of one example that a bump of every unit takes
    bumps = sum(spec.param_shapes[name][0] + 1 for name in spec.prunable)
    if h["criterion"] == "node":
        return (Work(0, at_once, forward_examples=draws * examples * bumps, kept=kept),)
    if h["criterion"] == "node_ntk":
        forward = 2 * draws * examples * (bumps + 1)
        return (Work(0, at_once, forward_examples=forward, kept=kept),)
    # forward and backward at both points, and a forward before
    passes = draws * ceil(examples / at_once)
    return (Work(2 * passes, at_once, forward_examples=draws * examples, kept=kept),)


def _slopes_work(task: ClientTask) -> tuple[Work, ...]:
    h, kept = task.hparams, kept_counts(task.sub_model.masks)
    batch_size = int(h["batch_size"])
    at_once = _at_once(task, batch_size)
    forward = batch_size * _probe(task).evaluations
    along = Work(0, at_once, forward_examples=forward, kept=kept)
    if not _by_backprop(task.spec, str(h["last_block"])):
        return (along,)
    return (Work(ceil(batch_size / at_once), at_once, kept=kept), along)


def _at_once(task: ClientTask, examples: int) -> int:
    return min(int(task.hparams["micro_batch"]) or examples, examples)


def _probe(task: ClientTask) -> Probe:
    h = task.hparams
    return Probe(
        int(h["directions"]),
        float(h["sigma"]),
        h["kind"],  # type: ignore[arg-type]  # the engine checks it
        "central" if h["differences"] == "central" else "forward",
    )


def _by_backprop(spec: ModelSpec, last_block: str) -> tuple[str, ...]:
    """Trainable tensors of the last block that has any, where it is trained exactly."""
    if last_block != "backprop":
        return ()
    for nodes in reversed(list(spec.blocks.values())):
        names = {f"{node.name}.{suffix}" for node in nodes for suffix in ("weight", "bias")}
        if own := tuple(name for name in spec.param_shapes if name in names):
            return own
    return ()


def _moved_by_slopes(spec: ModelSpec, last_block: str) -> tuple[str, ...]:
    exact = _by_backprop(spec, last_block)
    return tuple(name for name in spec.param_shapes if name not in exact)


# --- the server's state ---


def _pruned(state: State, masks: Masks, mask_seed: int | None, rescale: bool) -> State:
    params = (rescale_kept if rescale else apply_mask)(state.params, masks)
    return replace(state, phase="train", params=params, masks=masks, mask_seed=mask_seed)


def _held(state: State) -> Held:
    """The model in training, which is not the one shown where that is an average."""
    params = state.iterate or pack(state.params, state.masks)
    return Held(params, state.moments, state.steps)


def _shown(state: State, before: Held, after: Held, ema: float) -> State:
    """The state that shows the model after the round, or the average of the models."""
    shown, iterate = after.params, {}
    if ema and after is not before:
        # the decay of a short history is that of its length
        decay = min(ema, (1 + after.steps) / (10 + after.steps))
        shown = averaged(pack(state.params, state.masks), after.params, decay)
        iterate = after.params
    elif ema:
        return state
    dense = {
        name: unpack(value, state.masks[name]) if name in state.masks else value
        for name, value in shown.items()
    }
    return replace(state, params=dense, iterate=iterate)


def _logged(state: State, entry: Entry, held: Mapping[str, int]) -> State:
    """With one more round in the log, which ends where the model itself is shorter."""
    line = np.concatenate([np.array([entry.lr], np.float32), entry.scalars])
    model = _held(state)
    tensors = [model.params, *model.moments.values()]
    size_bytes = sum(value.nbytes for group in tensors for value in group.values())
    rounds = max(1, min(MAX_LOG_ROUNDS, size_bytes // line.nbytes))
    log = (*state.log, line)[-rounds:]
    known = {client: at for client, at in held.items() if at >= state.round - len(log)}
    return replace(state, log=log, held=known)


def _with_log(task: ClientTask, state: State, whole: Held) -> ClientTask:
    """For a client that keeps an earlier model: the rounds since; for others the optimiser too."""
    at = state.held.get(str(task.client))
    if at is None or at < state.round - len(state.log):
        return replace(task, arrays=whole.moments, hparams={**task.hparams, "steps": whole.steps})
    missed = state.log[len(state.log) - (state.round - at) :]
    entries = [Entry(at + 1 + i, float(line[0]), line[1:]) for i, line in enumerate(missed)]
    arrays = {"log": log_arrays(entries)} if entries else {}
    return replace(task, params={}, arrays=arrays, hparams={**task.hparams, "from": at})


class _Apart:
    """Σ p_n ĝ_n where every client has its own directions."""

    def __init__(self, seed: int, round: int, space: Space):
        self._seed, self._round, self._space = seed, round, space
        self._sums: dict[str, np.ndarray] = {}
        self._weight = 0.0
        self._slopes: list[np.ndarray] = []

    def add(self, update: ClientUpdate) -> None:
        slopes = update.statistics[SLOPES].tensors[SLOPES]
        seed = round_seed(self._seed, self._round, update.client + 1)
        for name, values in estimate(seed, slopes, self._space).items():
            term = np.multiply(values, update.num_examples, dtype=np.float64)
            self._sums[name] = self._sums[name] + term if name in self._sums else term
        self._weight += update.num_examples
        self._slopes.append(slopes)

    def mean(self) -> dict[str, np.ndarray]:
        return {name: (sums / self._weight).astype(np.float32) for name, sums in self._sums.items()}

    def slopes(self) -> np.ndarray:
        return np.concatenate(self._slopes)


# --- the client ---


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Signed scores of a pruning step, or the slopes of the loss along the round's directions."""
    if task.phase == "score":
        return _score(task, batches, engine), client_state
    if "run_seed" not in task.hparams:
        return _slopes(task, task.params, batches, engine), client_state
    held = _replayed(task, client_state)
    if held is None:
        return _lost(task, batches), {}
    return _slopes(task, held.params, batches, engine), _kept_state(held, task)


def _score(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """Of kept weights, per example; the weights' seed is all clients', the inputs are its own."""
    h, spec, masks = task.hparams, task.spec, task.sub_model.masks
    draws, examples = int(h["draws"]), int(h["examples"])
    seed, epsilon, init = int(h["weights_seed"]), float(h["epsilon"]), str(h["init"])
    if init not in INIT_SCHEMES:
        raise ValueError(f"init must be one of {', '.join(INIT_SCHEMES)}, got {init!r}")
    if h["inputs"] == "local":
        drawn = batches.draw(steps=draws, batch_size=examples, seed=task.seed)
        inputs: Iterable[np.ndarray] = (x for x, _ in drawn)
    else:
        inputs = gaussian_inputs(spec, examples, draws, task.seed)
    at_once = _at_once(task, examples)
    if h["criterion"] == "node":
        sums = node_scores(
            engine, spec, masks, inputs, seed, bump=epsilon, init=init, batch_size=at_once
        )
        scores = {n: (s / (draws * examples)).astype(np.float32) for n, s in sums.items()}
    elif h["criterion"] == "node_ntk":
        found = ntk_scores(
            engine,
            spec,
            masks,
            inputs,
            seed,
            epsilon=epsilon,
            init=init,
            batch_size=at_once,
            difference=node_gradient,
        )
        scores = found.mean()
    else:
        found = ntk_scores(
            engine, spec, masks, inputs, seed, epsilon=epsilon, init=init, batch_size=at_once
        )
        scores = found.mean()
    return ClientUpdate(
        task.client,
        batches.num_examples,
        {},
        task.sub_model,
        {"scores": Statistic(pack(scores, masks), "mean")},
        work=_score_work(task),
    )


def _slopes(task: ClientTask, params: Params, batches: Batches, engine: Engine) -> ClientUpdate:
    """c_{n,k} on one batch, in parts that fit."""
    h, spec, masks = task.hparams, task.spec, task.sub_model.masks
    probe, batch_size = _probe(task), int(h["batch_size"])
    at_once = _at_once(task, batch_size)
    ((x, y),) = batches.draw(steps=1, batch_size=batch_size, seed=task.seed)
    exact = _by_backprop(spec, str(h["last_block"]))
    sent = {}
    if exact:
        sent["gradient"] = Statistic(_last_gradient(task, params, engine, x, y, at_once), "mean")
    session = engine.open_forward(
        spec,
        params,
        SubModel(masks=masks, frozen=frozenset(exact)),
        batch_size=at_once,
        loss=_loss(task),
    )
    slopes = directional_derivatives(
        session, x, y, probe, seed=int(h["direction_seed"]), at_once=at_once
    )
    form: Form = "int8" if h["scalars"] == "int8" else "fp16" if h["scalars"] == "fp16" else "fp32"
    sent[SLOPES] = Statistic({SLOPES: rounded(slopes, form)}, "mean")
    return ClientUpdate(
        task.client, batches.num_examples, {}, task.sub_model, sent, work=_slopes_work(task)
    )


def _last_gradient(
    task: ClientTask,
    params: Params,
    engine: Engine,
    x: np.ndarray,
    y: np.ndarray,
    at_once: int,
) -> dict[str, np.ndarray]:
    """Of the last block, packed, by backpropagation through that block alone."""
    spec, masks, loss = task.spec, task.sub_model.masks, _loss(task)
    exact, output = _by_backprop(spec, "backprop"), spec.nodes[-1].name
    session = engine.open(
        spec, params, task.sub_model, batch_size=at_once, optimizer=SGD(0.0), loss=loss
    )
    total: dict[str, np.ndarray] = {}
    for at in range(0, len(y), at_once):
        part_x, part_y = x[at : at + at_once], y[at : at + at_once]
        logits = session.forward(part_x, training=True)[output]
        _, pull = loss_and_gradient(logits, part_y, loss)
        gradients = session.backward({output: pull * np.float32(len(part_y) / len(y))})
        for name in exact:
            total[name] = total[name] + gradients[name] if name in total else gradients[name]
    return pack(total, {name: mask for name, mask in masks.items() if name in total})


def _loss(task: ClientTask) -> Loss:
    return "bce" if task.hparams["loss"] == "bce" else "ce"


def _replayed(task: ClientTask, client_state: ClientState) -> Held | None:
    """The model that the task is about; None where it starts from one that is not here."""
    h, masks = task.hparams, task.sub_model.masks
    if task.params:
        return Held(pack(task.params, masks), task.arrays, int(h["steps"]))
    if "round" not in client_state or int(client_state["round"]) != int(h["from"]):
        return None
    rule = Rule(h["optimizer"], float(h["momentum"]))  # type: ignore[arg-type]
    held = Held(
        _group(client_state, "params"),
        {group: _group(client_state, group) for group in groups(rule)},
        int(client_state["steps"]),
    )
    space = Space(task.spec.param_shapes, masks, h["kind"])  # type: ignore[arg-type]
    entries = read_log(task.arrays.get("log", {}))
    return replay(held, entries, seed=int(h["run_seed"]), space=space, rule=rule)


def _kept_state(held: Held, task: ClientTask) -> dict[str, np.ndarray]:
    arrays = {
        f"{group}/{name}": value
        for group, tensors in {"params": held.params, **held.moments}.items()
        for name, value in tensors.items()
    }
    counters = {"round": int(task.hparams["round"]), "steps": held.steps}
    return arrays | {name: np.array(value) for name, value in counters.items()}


def _group(state: ClientState, group: str) -> dict[str, np.ndarray]:
    prefix = f"{group}/"
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _lost(task: ClientTask, batches: Batches) -> ClientUpdate:
    """Says that the model is not here; the slopes that it must hold count for nothing."""
    slopes = np.zeros(int(task.hparams["directions"]), np.float32)
    return ClientUpdate(
        task.client,
        batches.num_examples,
        {},
        task.sub_model,
        {SLOPES: Statistic({SLOPES: slopes}, "mean")},
        metrics={"lost_state": 1.0},
    )
