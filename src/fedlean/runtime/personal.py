"""Personal fine-tuning after a run: each client trains the finished model on its own examples.

What it gains is the difference of what it may expect (`runtime.served`) of its own model and of the
common one, on the same test examples.  Nothing of it comes back into the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlean.core import Model, Scalar, SubModel, derive_seed
from fedlean.data.batches import ClientData
from fedlean.engine.protocol import SGD, Engine, Loss
from fedlean.runtime.evaluate import Evaluate
from fedlean.runtime.served import class_counts, expected, spread
from fedlean.train.sgd import local_sgd

NEEDED = ("lr", "batch_size")


def check_personalize(method: str, settings: Mapping[str, Scalar | None], steps: int) -> None:
    """Raises ValueError where a method has no step of SGD that a client could go on with."""
    missing = [name for name in NEEDED if name not in settings]
    if steps and missing:
        raise ValueError(
            f"--personalize {steps}: {method} has no {' and no '.join(missing)}, with which a "
            "client could train the finished model: leave it out"
        )


def personalised(
    model: Model,
    clients: Mapping[int, ClientData],
    engine: Engine,
    evaluate: Evaluate,
    settings: Mapping[str, Scalar | None],
    *,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """For `summary.json`: the gain of each client, and what they may then expect.

    The steps have the method's rate, batch and momentum;
    pruned weights stay pruned.
    """
    common = evaluate(model, False).confusion
    classes = len(common)
    gains: dict[int, float] = {}
    after: dict[int, float] = {}
    for client, batches in clients.items():
        held = class_counts(batches.labels, classes)
        own = _trained(model, client, batches, engine, settings, steps, seed)
        before, then = (expected(each, held) for each in (common, evaluate(own, False).confusion))
        if before is not None and then is not None:
            gains[client], after[client] = then - before, then
    return {"steps": steps, **spread(after), "gain": spread(gains).get("clients")}


def _trained(
    model: Model,
    client: int,
    batches: ClientData,
    engine: Engine,
    settings: Mapping[str, Scalar | None],
    steps: int,
    seed: int,
) -> Model:
    batch = int(settings["batch_size"] or 0)
    momentum, decay = (float(settings.get(name) or 0.0) for name in ("momentum", "weight_decay"))
    loss: Loss = "bce" if settings.get("loss") == "bce" else "ce"
    session = engine.open(
        model.spec,
        model.params,
        SubModel(masks=model.masks),
        batch_size=batch,
        optimizer=SGD(float(settings["lr"] or 0.0), momentum, decay),
        loss=loss,
    )
    drawn = derive_seed(seed, 0, client, "personal")
    local_sgd(session, batches, steps=steps, batch_size=batch, seed=drawn)
    return Model(model.spec, session.params(), model.masks)
