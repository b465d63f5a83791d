"""A client's round in PruneFL (arXiv 1909.12326, Algorithm 1): masked SGD, and g² where asked.

Eq. (2) for `local_steps` steps; the sums of eq. (6) are of all coordinates, or of pieces of them.
"""

from __future__ import annotations

from fedlean.core import (
    Batches,
    ClientState,
    ClientTask,
    ClientUpdate,
    Statistic,
    StatisticForm,
    Work,
)
from fedlean.engine.protocol import Engine
from fedlean.pruning.importance_pieces import SentPieces, ordered, sent_form, statistic_name
from fedlean.pruning.sent_importance import accumulated, kept_sums, largest_sums
from fedlean.train.local_sgd import open_session
from fedlean.train.sgd import local_sgd
from fedlean.train.sgd_in_pieces import sgd_in_pieces
from fedlean.train.work import sgd_work

IMPORTANCE = "importance"  # name of the statistic, where it is of all coordinates


def forms(task: ClientTask) -> dict[str, StatisticForm]:
    """Σ g² of every trainable coordinate or of pieces, where a task asks for it."""
    if task.hparams.get("piece_bytes", 0):
        return sent_form(task)
    if not task.hparams.get("upload_importance", False):
        return {}
    return {IMPORTANCE: StatisticForm(task.spec.param_shapes, non_negative=True)}


def work(task: ClientTask) -> tuple[Work, ...]:
    """Steps, all of them with the dense weight gradient where g² is summed."""
    h = task.hparams
    budget, first = (int(h.get(name, 0)) for name in ("piece_bytes", "first_piece"))
    importance = bool(h["importance"])
    return (sgd_work(task, importance=importance, piece_bytes=budget, first_piece=first),)


def answer(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """The trained weights, and the sums where they are to go up; else the client keeps them."""
    h, masks, state, statistics = task.hparams, task.sub_model.masks, {}, {}
    session = open_session(task, engine)
    drawn = {"batch_size": int(h["batch_size"]), "seed": task.seed}
    importance = bool(h["importance"])
    form = float(h["importance_multiple"]), str(h["importance_dtype"])
    if parts := ordered(task):
        sent = SentPieces(masks, *form)
        train_loss = sgd_in_pieces(session, batches, parts=parts, take=sent.take, **drawn)
        statistics[statistic_name(int(h["first_piece"]))] = sent.statistic()
    else:
        steps = int(h["local_steps"])
        train_loss = local_sgd(session, batches, steps=steps, importance=importance, **drawn)
    if importance and not parts:
        span = int(h["reconfigurations"])
        sums = accumulated(session.importance(), client_state, span)
        if h["upload_importance"]:
            statistics[IMPORTANCE] = Statistic(largest_sums(sums, masks, *form), "mean")
        else:
            state = kept_sums(sums, span)
    update = ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        statistics=statistics,
        metrics={"train_loss": train_loss},
        work=work(task),
    )
    return update, state
