"""A client's round where nothing but the kept weights is trained and sent."""

from __future__ import annotations

from fedlean.core import Batches, ClientTask, ClientUpdate
from fedlean.engine.protocol import SGD, Engine
from fedlean.train.sgd import local_sgd
from fedlean.train.work import only_sgd


def train_kept_weights(task: ClientTask, batches: Batches, engine: Engine) -> ClientUpdate:
    """w_n <- w - η·g ⊙ m for `local_steps` steps; hyper-parameters as in `fedavg`."""
    h = task.hparams
    steps, batch_size = int(h["local_steps"]), int(h["batch_size"])
    session = engine.open(
        task.spec,
        task.params,
        task.sub_model,
        batch_size=batch_size,
        optimizer=SGD(float(h["lr"]), float(h["momentum"]), float(h["weight_decay"])),
        loss="bce" if h["loss"] == "bce" else "ce",
    )
    train_loss = local_sgd(session, batches, steps=steps, batch_size=batch_size, seed=task.seed)
    return ClientUpdate(
        client=task.client,
        num_examples=batches.num_examples,
        params=session.params(packed=True),
        sub_model=task.sub_model,
        metrics={"train_loss": train_loss},
        work=only_sgd(task),
    )
