"""The server's half of the app of nodes.py: rounds with each kind of node in turn.

It is copied into an app, and finds plan.json in the folder that the run configuration calls `out`.
A round is what the round loop does between two checkpoints, evaluation left out: tasks made, sent,
answered, decoded and averaged.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.core import ClientTask, ClientUpdate
from fedlean.cost.profile import load_profile
from fedlean.data.dataset import Dataset
from fedlean.data.load import load_dataset
from fedlean.engine.open import open_engine
from fedlean.layers import Flatten, Linear
from fedlean.methods.fedavg import fedavg
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.runtime.checks import Expected, refusal
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.flower.post import GridPost
from fedlean.runtime.remote.dispatch import Failed, RemoteDispatch, Terms
from fedlean.spec import ModelSpec, sequential

log = logging.getLogger("flwr")
app = ServerApp()


class Some:
    """A post to some of the connected nodes."""

    def __init__(self, post: GridPost, nodes: Collection[int]):
        self._post, self._nodes = post, frozenset(nodes)

    def nodes(self) -> Collection[int]:
        return self._nodes & frozenset(self._post.nodes())

    def fetch(
        self, ids: Mapping[str, int], *, seconds: float
    ) -> Iterable[tuple[str, bytes | Failed]]:
        return self._post.fetch(ids, seconds=seconds)

    def send(self, letters: Sequence[tuple[int, bytes]], *, seconds: float) -> list[str]:
        return self._post.send(letters, seconds=seconds)


class Side:
    """FedAvg with the nodes of one kind: one step on one example, so that transport is the rest."""

    def __init__(self, post: Some, dataset: Dataset, spec: ModelSpec, terms: Terms):
        clients = terms.min_clients
        server = Server(spec, open_engine("native", 1), 0, 1 << 30, load_profile("raspberry_pi_4"))
        self._dispatch = RemoteDispatch(
            post, method="fedavg", dataset=dataset, clients=clients, terms=terms, say=log.info
        )
        self._algorithm: FederatedAlgorithm = fedavg(server, local_steps=1, batch_size=1)
        self._state = self._algorithm.init(init_params(spec, 0))
        self._store = ClientStore()
        self._step = 0

    def round(self) -> dict[str, Any]:
        self._step += 1
        began = time.perf_counter()
        devices = self._dispatch.begin(self._store, self._step)
        tasks = self._algorithm.configure(self._state, devices)
        asked = {task.client: task for task in tasks}
        answered = []

        def answers():
            for update in self._dispatch(tasks, sound):
                self._store.acknowledge(asked[update.client], update)
                answered.append(update.client)
                yield update

        self._state = self._algorithm.server_update(self._state, answers())
        self._dispatch.acknowledge(answered, [])
        return {
            "seconds": time.perf_counter() - began,
            "answered": len(answered),
            "node_seconds": max(self._dispatch.measured_seconds().values(), default=None),
            "troubles": list(self._dispatch.troubles().values()),
        }


def sound(update: ClientUpdate, task: ClientTask) -> str | None:
    return refusal(update, task, Expected())


@app.main()
def main(grid: Grid, context: Context) -> None:
    out = Path(str(context.run_config["out"]))
    plan = json.loads((out / "plan.json").read_text())
    dataset = load_dataset(plan["data"])
    spec = model(plan["model"], dataset)
    terms = Terms(min_clients=plan["nodes"], join_seconds=120, deadline_seconds=120)
    sides = {
        kind: Side(Some(GridPost(grid), ids), dataset, spec, terms)
        for kind, ids in plan["kinds"].items()
    }
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in sides}
    for number in range(plan["rounds"]):
        for kind, side in sides.items():
            rounds[kind].append(side.round())
            log.info("%s round %s: %s", kind, number, rounds[kind][-1])
    document = {"parameters": spec.num_params, "rounds": rounds}
    (out / "rounds.json").write_text(json.dumps(document))


def model(name: str, dataset: Dataset) -> ModelSpec:
    """`empty`: logistic regression, 31 kB; else a model of the catalogue."""
    if name != "empty":
        return build(name, dataset.input_shape, dataset.classes)
    layers = [("flatten", Flatten(), "fc"), ("fc", Linear(dataset.classes), "fc")]
    return sequential(dataset.input_shape, layers)
