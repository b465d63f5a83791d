"""The session of a task's own settings of local SGD."""

from __future__ import annotations

from fedlean.core import ClientTask, Masks, Params, SubModel
from fedlean.engine.protocol import SGD, Engine, Session


def open_session(task: ClientTask, engine: Engine, params: Params, masks: Masks) -> Session:
    """At `params` under `masks`, with what `check_sgd` has checked of the hyper-parameters."""
    h = task.hparams
    return engine.open(
        task.spec,
        params,
        SubModel(masks=masks),
        batch_size=int(h["batch_size"]),
        optimizer=SGD(float(h["lr"]), float(h["momentum"]), float(h["weight_decay"])),
        loss="bce" if h["loss"] == "bce" else "ce",
    )
