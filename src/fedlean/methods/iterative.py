"""Iterative pruning: the smallest weights go in steps over the first half of the rounds.

A baseline of Jiang et al. (PruneFL), TNNLS 2022, arXiv 1909.12326: training begins dense; at each
step the server drops the smallest |w| of every prunable layer at an equal rate, until the model has
its final size after half of the rounds.  What is pruned stays pruned.  Between and after the steps
it is FedAvg on the kept weights.

**Deviations.**
- Steps are equal in density: each drops the same share of all weights.  The paper says "equal
  steps" and no more, this is our reading; its code drops the same share of the weights that are
  left (`spacing="geometric"`).
- Its 20 steps are a whole number of rounds apart, so where half of the rounds is no multiple of 20
  the last comes before half: of 100 rounds after the 40th.  Ours; the paper's 10,000 have no such
  case.
- The final `density` is a hyper-parameter; the paper's comparison takes PruneFL's.
- A layer keeps round(density · size) weights, at least one; of equal magnitudes the first stay.
  Both ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlean.algorithm import Device, FederatedAlgorithm, Server
from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Masks,
    Model,
    Params,
)
from fedlean.engine.protocol import Engine
from fedlean.pruning.equal_density import keep_largest
from fedlean.pruning.prune_steps import Spacing, density_after, steps_in_first_half
from fedlean.train.cohort import cohort_tasks
from fedlean.train.hyperparameters import at_least, in_range
from fedlean.train.local_sgd import LocalSGD, train_kept_weights, with_local_sgd
from fedlean.train.rehearsal import Rehearsal
from fedlean.train.start import dense_params
from fedlean.train.work import only_sgd
from fedlean.tree import apply_mask, fold

STEPS = 20  # of the paper's code


@dataclass(frozen=True)
class State:
    """What survives a round."""

    round: int  # training rounds completed
    phase: str  # always "train"
    params: Params
    masks: Masks = field(default_factory=dict)  # empty until the first step: dense


@with_local_sgd
def iterative(
    server: Server,
    sgd: LocalSGD,
    *,
    density: float = 0.2,
    prune_every: int | None = None,
    spacing: Spacing = "linear",
) -> FederatedAlgorithm:
    """Magnitude pruning in equal steps during federated learning.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      density: kept share of every prunable layer after the last step, in (0, 1]; 1: FedAvg.
      prune_every: rounds between steps; None: as many as give 20 steps (paper's code), or one
        where the first half has fewer rounds.
      spacing: "linear", every step drops the same share of all weights; "geometric", of those that
        are left (paper's code).

    Raises ValueError naming the hyper-parameter that is out of range, and where the first half of
    the rounds has no room for a step.
    """
    in_range("density", density, 0.0, 1.0, open_low=True)
    if prune_every is not None:
        at_least("prune_every", prune_every, 1)
    if spacing not in ("linear", "geometric"):
        raise ValueError(f"spacing must be 'linear' or 'geometric', got {spacing!r}")

    spec = server.spec
    every = prune_every or max(1, server.rounds // 2 // STEPS)
    steps = steps_in_first_half(server.rounds, every)
    if prune_every is None:
        steps = min(steps, STEPS)
    if density < 1 and server.rounds < 2:
        raise ValueError(
            f"rounds must be at least 2, got {server.rounds}: the first half holds the pruning "
            "(density=1 is FedAvg)"
        )
    if density < 1 and not steps:
        raise ValueError(
            f"prune_every must be at most half of the rounds ({server.rounds // 2} of "
            f"{server.rounds}), got {every}: nothing would be pruned"
        )

    def init(model: Model) -> State:
        return State(round=0, phase="train", params=dense_params(model))

    def configure(state: State, devices: Sequence[Device]) -> list[ClientTask]:
        round = state.round + 1
        return cohort_tasks(
            server,
            sgd.clients(server, devices, round),
            round=round,
            phase="train",
            model=Model(spec, state.params, state.masks),
            hparams=sgd.hparams(state.round),
        )

    def server_update(state: State, updates: Iterable[ClientUpdate]) -> State:
        params = fold(state.params, updates, variances=spec.variances).params()
        round = state.round + 1
        step, between = divmod(round, every)
        if density == 1 or between or step > steps:
            return replace(state, round=round, params=params)
        kept = density_after(step, steps, density, spacing)
        masks = keep_largest(params, state.masks, kept, spec.prunable)
        return replace(state, round=round, params=apply_mask(params, masks), masks=masks)

    def done(state: State) -> bool:
        return state.round >= server.rounds

    return FederatedAlgorithm(init, configure, client_update, server_update, done, work=only_sgd)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    if settings["density"] < 1:
        return {}
    return dict.fromkeys(("prune_every", "spacing"), "density is 1: nothing is pruned")


def rehearsals(settings: Mapping[str, Any]) -> Sequence[Rehearsal]:
    """The shortest run in which clients do all that they do in a long one."""
    every = None if settings["prune_every"] is None else 1
    return [Rehearsal({"prune_every": every}, rounds=3, until=2)]


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g ⊙ m for `local_steps` steps."""
    return train_kept_weights(task, batches, engine), client_state
