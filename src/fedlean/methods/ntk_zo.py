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

    c_{n,k} = (L_n(θ + σ z_k) - L_n(θ)) / σ,                                                   (1)

the server takes a step of its optimiser along

    ĝ = (1/K) Σ_k (Σ_n p_n c_{n,k}) z_k.                                                       (2)

The z_k come from a seed that all clients of a round share; a pruned coordinate has none.  (1) and
(2), our numbers, are in `train.forward_round` and `train.slope_fold`, a client's scores in
`pruning.client_scores`, replay in `train.missed_rounds`.

**Deviations** (ours, as no source that we have says it):
- The optimiser, "normalised" steps (the step over the standard deviation of the K slopes), the
  moving average for evaluation, central differences, ±1 and rank-1 directions.
- `lr` is for the dense model and grows with 1/√density (`lr_by_density`).
- Slopes may travel as fp16 or int8, and the model as the slopes of the rounds that a client missed
  (`download="scalars"`): it replays them, bit for bit.
- `last_block="backprop"` takes the last block's exact gradient (as ElasticZO does).
- A run that starts from a model with masks keeps those, and prunes nothing.
- No unit loses its last weight, and kept weights grow by 1/√(their layer's density).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    StatisticForm,
    SubModel,
    Work,
    derive_seed,
)
from fedlean.engine.protocol import Engine
from fedlean.pruning import client_scores
from fedlean.pruning.client_scores import FROM_CLIENTS, Inputs
from fedlean.pruning.density import density as density_of
from fedlean.pruning.density import full_masks
from fedlean.pruning.foresight import Criterion, Scoring, foresight_masks, shuffled_as
from fedlean.pruning.global_top import count_at
from fedlean.pruning.ntk_pruning import prune_step
from fedlean.pruning.rescale import rescale_kept
from fedlean.train import forward_round, forward_training, missed_rounds
from fedlean.train.cohort import sample_cohort
from fedlean.train.forward_round import LastBlock
from fedlean.train.forward_training import ForwardTraining, run_seed
from fedlean.train.forward_updates import Entry, Held, Space, averaged, round_seed
from fedlean.train.hyperparameters import at_least, in_range, one_of
from fedlean.train.local_sgd import with_settings
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.slope_fold import SlopeFold, own_seed
from fedlean.tree import apply_mask, fold, pack, unpack

Scorer = Literal["server", "clients"]
Download = Literal["model", "scalars"]


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


@with_settings(ForwardTraining)
def ntk_zo(
    server: Server,
    forward: ForwardTraining,
    *,
    lr_by_density: bool = True,
    ema: float = 0.0,
    shared_directions: bool = True,
    download: Download = "model",
    last_block: LastBlock = "zeroth",
    density: float = 0.2,
    criterion: Criterion = "ntk",
    scores: Scorer = "server",
    inputs: Inputs = "gaussian",
    prune_steps: int = 20,
    prune_draws: int = 1,
    prune_examples: int = 256,
    epsilon: float = 0.01,
    keep_units: bool = True,
    rescale: bool = True,
    rescale_given: bool = False,
) -> FederatedAlgorithm:
    """Foresight pruning, then zeroth-order training.

    Args:
      forward: training by forward passes, whose settings are this method's as well; `lr` is for the
        dense model.  Of the examples that a client scores on, too, `micro_batch` are in memory.
      lr_by_density: whether `lr` is divided by √density.
      ema: decay in [0, 1) of a moving average of the models, which is then what is evaluated and
        saved; 0: none.
      shared_directions: False gives each client directions of its own, as a control.
      download: "model", or "scalars" for clients that replay the rounds they missed: those keep the
        model and the optimiser's moments between rounds.
      last_block: "backprop" takes the last block's gradient exactly, and sends it.
      density: kept share of all prunable weights together; 1: no pruning.
      criterion: see `fedlean.pruning.foresight.foresight_masks`.
      scores: who scores: the "server", or the "clients" (criteria of FROM_CLIENTS).
      inputs: on which they score, "gaussian" or "local" ones.
      prune_steps: T of the density schedule d^(t/T).
      prune_draws: models and batches of a step of it.
      prune_examples: inputs of a batch.
      epsilon: ε, by which weights are moved.
      keep_units: no unit loses its last weight.
      rescale: kept weights grow by 1/√(their layer's density).
      rescale_given: weights grow so, too, where the run starts from a model that has masks (density
        and criterion are then not used): for weights that are not trained yet.

    Raises ValueError naming the hyper-parameter that is out of range or does not go with another.
    """
    in_range("ema", ema, 0.0, 0.99999)
    in_range("epsilon", epsilon, 0.0, 1.0, open_low=True)
    in_range("density", density, 0.0, 1.0, open_low=True)
    at_least("prune_steps", prune_steps, 1)
    at_least("prune_draws", prune_draws, 1)
    at_least("prune_examples", prune_examples, 1)
    one_of("download", download, get_args(Download))
    one_of("criterion", criterion, get_args(Criterion))
    one_of("scores", scores, get_args(Scorer))
    one_of("inputs", inputs, get_args(Inputs))
    rule, asked = forward.rule, replace(forward.asked, last_block=last_block)
    if scores == "clients" and criterion not in FROM_CLIENTS:
        raise ValueError(
            f"scores='clients' goes with the criteria {', '.join(FROM_CLIENTS)}, got "
            f"criterion={criterion!r}: it needs no client, take scores='server'"
        )
    if inputs == "local" and scores == "server":
        raise ValueError("inputs='local' needs scores='clients': the server has no data")
    if download == "scalars" and (last_block == "backprop" or not shared_directions):
        raise ValueError(
            "download='scalars' replays shared directions: it goes neither with "
            "last_block='backprop' nor with shared_directions=False"
        )
    spec = server.spec
    count_at(density, spec)
    exact = asked.exact(spec)
    moved = {name: shape for name, shape in spec.param_shapes.items() if name not in exact}
    if not moved:
        raise ValueError(
            "last_block='backprop' leaves nothing to train by forward passes: the model has one "
            "block only"
        )

    scoring = Scoring(prune_steps, prune_draws, prune_examples, epsilon, server.init, keep_units)
    seed = run_seed(server)
    prune_seed = derive_seed(server.seed, 0, 0, "prune")

    def init(model: Model) -> State:
        params = model.params
        if model.masks and rescale_given:
            return _pruned(State(0, "prune", params), model.masks, None, True)
        if model.masks:
            return State(0, "train", params, model.masks)
        if density == 1.0:
            return State(0, "train", params)
        if scores == "clients":
            return State(0, "score", params, choosing=full_masks(spec))
        return State(0, "prune", params)

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        if state.phase == "prune":
            return []
        return (score_tasks if state.phase == "score" else slope_tasks)(state, devices)

    def score_tasks(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        step = state.prune_step + 1
        weights_seed = derive_seed(prune_seed, 0, step, "weights")
        request = client_scores.request(
            scoring, criterion, inputs, forward.micro_batch, weights_seed
        )
        hparams, sub_model = request.to_hparams(), SubModel(masks=state.choosing)
        cohort_seed = derive_seed(server.seed, 0, 0, "score")  # another cohort than any round's
        tasks = []
        for client in sample_cohort(devices, forward.cohort, seed=cohort_seed, round=step):
            draws = derive_seed(server.seed, step, client, "score")
            tasks.append(ClientTask(step, "score", client, draws, spec, {}, sub_model, hparams))
        return tasks

    def slope_tasks(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round, whole, hparams = state.round + 1, _held(state), asked.to_hparams()
        if download == "scalars":
            hparams |= missed_rounds.replaying(rule, seed, state.round)
        sub_model = SubModel(
            masks=state.masks,
            frozen=frozenset(spec.tensor_shapes.keys() - exact if exact else ()),
            mask_seed=state.mask_seed,
        )
        shared_seed, tasks = round_seed(seed, round), []
        for client in forward.clients(server, devices, round):
            own = shared_seed if shared_directions else own_seed(seed, round, client)
            given = {**hparams, "direction_seed": own}
            draws = derive_seed(server.seed, round, client, "train")
            task = ClientTask(round, "train", client, draws, spec, whole.params, sub_model, given)
            if download == "scalars":
                at = state.held.get(str(client))
                task = missed_rounds.from_what_it_keeps(task, whole, state.log, at, state.round)
            tasks.append(task)
        return tasks

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.phase == "prune":
            masks, mask_seed = foresight_masks(
                server.engine, spec, state.params, density, criterion, scoring, prune_seed
            )
            return _pruned(state, masks, mask_seed, rescale)
        return (after_scores if state.phase == "score" else after_slopes)(state, updates)

    def after_scores(state: State, updates: Iterable[ClientUpdate]) -> State:
        signed = fold(state.params, updates).statistic(client_scores.SCORES)
        if not signed:
            return state
        signed = {name: unpack(values, state.choosing[name]) for name, values in signed.items()}
        step = state.prune_step + 1
        ends = scoring.density_after(step, density)
        masks = prune_step(spec, signed, state.choosing, ends, keep_units=keep_units)
        if step < prune_steps:
            return replace(state, choosing=masks, prune_step=step)
        shuffled = criterion == "ntk_shuffled"
        masks, mask_seed = shuffled_as(spec, masks, prune_seed) if shuffled else (masks, None)
        return replace(_pruned(state, masks, mask_seed, rescale), choosing={}, prune_step=step)

    def after_slopes(state: State, updates: Iterable[ClientUpdate]) -> State:
        round, space = state.round + 1, Space(moved, state.masks, asked.kind)
        folded = SlopeFold(state.params, seed, round, space, shared=shared_directions)
        held = dict(state.held)
        for update in updates:
            if missed_rounds.has_lost(update):
                held.pop(str(update.client), None)
                continue
            held[str(update.client)] = state.round
            folded.add(update)
        before, slopes = _held(state), folded.slopes()
        if slopes is None and held.keys() != state.held.keys():
            return replace(state, held=held)  # all have lost their model: asked again
        if slopes is None:  # nobody answered: the round is over
            entry, after = Entry(round, 0.0, np.zeros(asked.directions, np.float32)), before
        else:
            rate = forward.rate(state.round)
            if lr_by_density:
                rate /= density_of(state.masks) ** 0.5
            entry = Entry(round, float(np.float32(rate)), slopes)
            after = folded.step(before, entry, rule)
        state = replace(state, round=round, moments=after.moments, steps=after.steps)
        state = _shown(state, before, after, ema)
        if download != "scalars":
            return state
        log = missed_rounds.logged(state.log, entry, _held(state))
        return replace(state, log=log, held=missed_rounds.within_reach(held, log, round))

    def done(state: State) -> bool:
        return state.phase == "train" and state.round >= server.rounds

    return FederatedAlgorithm(
        init,
        configure,
        client_update,
        server_update,
        done,
        statistics,
        work,
        sends_params=lambda task: False,
    )


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    found = forward_training.unused(settings)
    scoring = ("prune_steps", "prune_draws", "prune_examples", "epsilon", "keep_units")
    choosing = ("criterion", "scores", "inputs", *scoring)
    if settings["density"] == 1:
        pruned = ("rescale", "lr_by_density")
        found |= dict.fromkeys((*choosing, *pruned), "density is 1: nothing is pruned")
    elif settings["criterion"] not in FROM_CLIENTS:
        found |= dict.fromkeys(scoring, f"criterion {settings['criterion']!r} takes no scores")
    return found


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    until = 2 if settings["download"] == "scalars" else 1  # who replays needs a round to replay
    if settings["scores"] == "clients":
        return [Rehearsal({"prune_steps": 1}, rounds=until, until=until)]
    shorter = {"ntk_shuffled": "random", "node_ntk": "ntk", "node": "ntk"}
    criterion = shorter.get(settings["criterion"], settings["criterion"])  # as many weights
    quick = {"prune_steps": 1, "prune_draws": 1, "prune_examples": 1, "keep_units": False}
    return [Rehearsal({**quick, "criterion": criterion}, rounds=until, until=until)]


def statistics(task: ClientTask) -> dict[str, StatisticForm]:
    """The scores of kept weights; or K slopes, and where asked for the last block's gradient."""
    return client_scores.forms(task) if task.phase == "score" else forward_round.forms(task)


def work(task: ClientTask) -> tuple[Work, ...]:
    """Forward passes of bumps, of both points of a pruning step, or along the directions."""
    return client_scores.work(task) if task.phase == "score" else forward_round.work(task)


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


# --- the client ---


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Signed scores of a pruning step, or the slopes of the loss along the round's directions."""
    if task.phase == "score":
        return client_scores.answer(task, batches, engine), client_state
    if not missed_rounds.replays(task):
        return forward_round.answer(task, task.params, batches, engine), client_state
    held = missed_rounds.replayed(task, client_state)
    if held is None:
        return missed_rounds.lost(task, batches), {}
    update = forward_round.answer(task, held.params, batches, engine)
    return update, missed_rounds.kept_for_later(held, task)
