"""FedRolex: the slice that a device trains rolls over the channels, and covers each equally often.

Alam, Liu, Yan and Zhang, "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model
Extraction", NeurIPS 2022, arXiv 2212.01548, Algorithm 1.  In round j a device of share β holds, of
each layer's K channels, the ⌈βK⌉ from the (j mod K)-th on, beginning again at the first after the
last; the server averages each element over the devices that hold it.  Rounds are those that were
completed, whoever took part.

A weight is trained where both of its channels are in their windows.  Those of layers of one size
move together, here and in the authors' code, so that channels further apart than the window never
meet in it; a wider device, or `reshuffle`, brings them together.

**Deviations.**  Means are weighted by examples; the authors' code counts devices.  An element that
nobody held keeps its value.  The share follows from what the device has, where the paper gives it
out by hand (`assign`).  `shift="window"` and `reshuffle` are ours: variants of them in the authors'
code do not cover a layer evenly.  Norms and scaler as in `heterofl`; the masked cross-entropy for
clients that lack classes is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.core import Batches, ClientState, ClientTask, ClientUpdate
from fedlean.engine.protocol import Engine
from fedlean.submodels.choose import Stride, rolling
from fedlean.submodels.cut import Cut
from fedlean.submodels.levels import rates_from
from fedlean.submodels.sliced import Slices, sliced, train_slice, without_effect
from fedlean.submodels.width import width
from fedlean.train.hyperparameters import one_of
from fedlean.train.local_sgd import LocalSGD, with_settings


@with_settings(LocalSGD, Slices)
def fedrolex(
    server: Server,
    sgd: LocalSGD,
    slices: Slices,
    *,
    shift: Stride = "channel",
    reshuffle: bool = False,
    scaler: bool = True,
) -> FederatedAlgorithm:
    """Federated averaging of slices of one model, which move by rounds.

    Args:
      sgd: local SGD, whose settings are this method's as well.
      slices: the same; `widths` may all be below 1, and no device holds the whole model.
      shift: how far the window moves in a round.  "channel": by one, as in the paper.  "window": by
        its own size, so that a layer is covered in the fewest rounds.
      reshuffle: the channels of a layer are in a new random order in each cycle of its window, of
        each layer for itself.
      scaler: a slice multiplies what its layers give by 1/width in training.

    Raises ValueError naming the hyper-parameter that is out of range, the layer that cannot be
    sliced, or what `static_norm` lacks.
    """
    one_of("shift", shift, get_args(Stride))
    seed = server.seed if reshuffle else None

    @lru_cache(maxsize=2 * len(rates_from(slices.widths)))  # one object for all clients of a round
    def window(rate: float, round: int) -> Cut:
        choose = rolling(round - 1, by=shift, shuffle_seed=seed)
        return width(server.spec, rate, choose, scaler=scaler)

    def cut_of(rate: float, round: int, client: int) -> Cut:
        return window(rate, round)

    return sliced(server, sgd, slices, cut_of, client_update)


def unused(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings without effect beside the others, and why."""
    return without_effect(settings, "shift", "reshuffle", "scaler")


def client_update(
    task: ClientTask, batches: Batches, engine: Engine, client_state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """w_n <- w - η·g for `local_steps` steps on the slice."""
    return train_slice(task, batches, engine), client_state
