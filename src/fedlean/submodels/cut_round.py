"""A round in which each client trains a cut of the server's model: its tasks and their merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from fedlean.algorithm import Server
from fedlean.core import ClientTask, ClientUpdate, Model, Params, Scalar
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import Cut
from fedlean.train.cohort import cohort_tasks
from fedlean.tree import Fold, pack


class Given(NamedTuple):
    """What one client is given."""

    client: int
    cut: Cut
    hparams: Mapping[str, Scalar]  # what its task says beside that of all, as which cut it is


def cut_tasks(
    server: Server,
    given: Iterable[Given],
    *,
    round: int,
    phase: str,
    model: Model,
    hparams: Mapping[str, Scalar],
) -> list[ClientTask]:
    """One task for each of `given`: its cut of `model`, under the masks that the model has.

    hparams: what every task says.  Clients with the same cut, one object, get the same arrays.
    """
    sent: dict[int, Model] = {}
    tasks = []
    for client, cut, own in given:
        if id(cut) not in sent:
            params, masks = cut.take(model.params), cut.take_masks(model.masks)
            sent[id(cut)] = Model(cut.spec, pack(params, masks), masks)
        tasks += cohort_tasks(
            server,
            [client],
            round=round,
            phase=phase,
            model=sent[id(cut)],
            hparams={**hparams, **own},
        )
    return tasks


def fold_cuts(
    full: ModelSpec,
    base: Params,
    updates: Iterable[ClientUpdate],
    cut_of: Callable[[ClientTask], Cut],
) -> Fold:
    """The merge of sub-models into `base`, the tensors of `full`: each element is the mean over the
    clients whose sub-model has it, and one that no client has keeps its value.  So with statistics
    of tensors by their names, whose shapes become those of `full` (`Fold.sent` says who sent what).

    Updates are those that the runtime hands to `server_update`, which know their task.
    """
    result = Fold(base, variances=full.variances)
    for update in updates:
        if update.task is None:
            raise ValueError("an update without its task cannot be merged: which part is it of?")
        result.add(update, index=cut_of(update.task).index)
    return result
