"""How good the model is that each device holds: the sub-models of a run's end, on the test set.

The method of a finished run chooses once more for every device of its fleet, in the round after the
last, from the run's final model.  Each sub-model is then evaluated by itself, with HeteroFL's
scaler, as it was trained.

    python benchmarks/sub_network_accuracy.py runs/heterofl runs/model_selection --json held.json

Models with BatchNorm are refused, since a sub-model has no running statistics of its own, and so
are methods whose final model is not the whole one (of allsmall every device holds the model that
its report is of).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from fedlean.algorithm import Server
from fedlean.core import ClientTask, SubModel
from fedlean.data.batches import eval_batches, own_inputs, test_subset
from fedlean.data.dataset import Dataset, with_inputs
from fedlean.data.load import load_dataset
from fedlean.engine.open import engine_for
from fedlean.engine.protocol import SGD, Engine
from fedlean.models.catalog import build as build_model
from fedlean.runtime.config import read_document
from fedlean.runtime.devices import recorded_devices
from fedlean.runtime.method import build as build_method
from fedlean.runtime.modelfile import read_model

BATCH = 100
MANY = 500  # sub-networks that a search knows: more than a run of hundreds of rounds gathers


def held(folder: Path, examples: int, data: str | None) -> dict[str, Any]:
    """Of one run: a row for each sub-model, and the mean over devices."""
    config, document = read_document(folder)
    dataset = with_inputs(load_dataset(data or config.dataset), config.inputs)
    spec = build_model(config.model, dataset.input_shape, dataset.classes)
    if spec.variances:
        raise SystemExit(f"{folder}: the model has BatchNorm")
    engine, _ = engine_for(spec, config.engine, 1)
    profile, fleet = recorded_devices(folder, document)
    if fleet is None:
        raise SystemExit(f"{folder}: the run has no fleet")
    server = Server(
        spec,
        engine,
        config.seed,
        config.rounds,
        profile,
        config.init,
        config.num_clients,
        inputs=partial(own_inputs, dataset),
    )
    settings = {**config.settings, "cohort": None}
    if "known" in settings:
        settings["known"] = MANY
    algorithm = build_method(config.method, server, settings)
    devices = fleet.present(config.seed, config.rounds + 1, config.num_clients)
    state = algorithm.init(read_model(folder / "model.safetensors", spec))
    tasks = algorithm.configure(state, devices)
    counts = Counter(task.spec.hash for task in tasks)
    rows = [
        {
            "parameters": task.spec.num_params / spec.num_params,
            "devices": counts[task.spec.hash],
            "accuracy": accuracy(task, engine, dataset, examples),
        }
        for task in {task.spec.hash: task for task in tasks}.values()
    ]
    weights = [row["devices"] for row in rows]
    found = [row["accuracy"] for row in rows]
    return {
        "run": folder.name,
        "devices": len(devices),
        "mean": float(np.average(found, weights=weights)),
        "least": min(found),
        "most": max(found),
        "sub_models": sorted(rows, key=lambda row: row["parameters"]),
    }


def accuracy(task: ClientTask, engine: Engine, dataset: Dataset, examples: int) -> float:
    """On a fixed part of the test set; in training mode, in which a scaler multiplies."""
    session = engine.open(task.spec, task.params, SubModel(), batch_size=BATCH, optimizer=SGD(0.0))
    output, right = task.spec.nodes[-1].name, 0
    chosen = test_subset(dataset, examples)
    for x, y in eval_batches(dataset, BATCH, chosen):
        right += int((session.forward(x, training=True)[output].argmax(1) == y).sum())
    return right / len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--examples", type=int, default=10_000, help="of the test set")
    parser.add_argument("--data", help="where the data set is now, if it has moved")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [held(folder, options.examples, options.data) for folder in options.runs]
    for one in results:
        print(
            f"{one['run']:30} {one['devices']} devices, {len(one['sub_models'])} sub-models, mean "
            f"{one['mean']:.1%}, from {one['least']:.1%} to {one['most']:.1%}"
        )
    if options.json:
        document = {"machine": describe(), "runs": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
