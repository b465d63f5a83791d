"""What progressive methods promise of their stages, each of them over a whole run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
from federation import ENGINE, SEED, client_data, same, server

from fedlean.algorithm import Device, FederatedAlgorithm
from fedlean.core import ClientTask, Model
from fedlean.engine.open import open_engine
from fedlean.freezing.client import train_stage
from fedlean.freezing.stages import merge_stage, stage, stage_model
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.methods import fedavg, neulite, profl, smartfreeze
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.report.stage_plots import FROZEN
from fedlean.submodels.parts import Part
from fedlean.train.local_sgd import LocalSGD

NORM = resnet8((1, 8, 8), 3, norm="batch")
DATA = client_data()[:2]
DEVICES = [Device(client, num_examples=data.num_examples) for client, data in enumerate(DATA)]
SGD = {"lr": 0.05, "local_steps": 2, "batch_size": 8, "weight_decay": 0.1}
# the method, its rounds and the settings by which every stage has one of them
METHODS = {
    "smartfreeze": (smartfreeze, 3, {"pace": False}),
    "profl": (
        profl,
        7,
        {"freezing": "never", "map_rounds": 1, "map_steps": 2, "map_weight_decay": 0.1},
    ),
    "neulite": (neulite, 6, {"mu": 0.1}),
}
RUNNING = ("running_mean", "running_var")


def begun(method: str, **settings) -> tuple[FederatedAlgorithm, object, Callable]:
    module, rounds, own = METHODS[method]
    make = getattr(module, method)
    algorithm = make(replace(server(rounds), spec=NORM), **SGD, **own, **settings)
    return algorithm, algorithm.init(Model(NORM, init_params(NORM, SEED))), module.client_update


class Watching:
    """An engine that keeps the sessions of training which it opens."""

    def __init__(self, name: str):
        self._inner, self.opened = open_engine(name, threads=1), []

    def open(self, *given, **named):
        self.opened.append(self._inner.open(*given, **named))
        return self.opened[-1]

    def __getattr__(self, name: str):
        return getattr(self._inner, name)


def momentum_of(method: str, momentum: float) -> dict[str, float]:
    own = {"map_momentum": momentum} if method == "profl" else {}
    return {"momentum": momentum, **own}


def stage_of(task: ClientTask) -> tuple[str, str]:
    return task.phase, str(task.hparams["stage"])


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("beginning", ["together", "pieces", "memory", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_stays_bit_for_bit(method, beginning, engine):
    """On the devices, in their answers and in the merge; BatchNorm's running statistics, too.

    Under momentum and weight decay, which move what has no gradient.
    """
    if engine == "native":
        pytest.importorskip("fedlean._native")
    settings = {"beginning": beginning, "micro_batch": 3, **momentum_of(method, 0.9)}
    algorithm, state, client_update = begun(method, **settings)
    stages, statistics = set(), False
    while not algorithm.done(state):
        tasks, updates = algorithm.configure(state, DEVICES), []
        assert len(tasks) == len(DEVICES)
        for task in tasks:
            watching = Watching(engine)
            update, _ = client_update(task, DATA[task.client], watching, {})
            assert update.params.keys() == task.spec.tensor_shapes.keys() - task.sub_model.frozen
            (session,) = watching.opened
            held = session.params()
            for name in task.sub_model.frozen & held.keys():
                assert same(held[name], task.params[name]), name
            updates.append(replace(update, task=task))
        after = algorithm.server_update(state, updates)
        before, now = ({**one.params, **one.extra} for one in (state, after))
        frozen, trained = tasks[0].sub_model.frozen, updates[0].params.keys()
        for name in now.keys() & before.keys():
            assert same(before[name], now[name]) == (name not in trained), name
        stages.add(stage_of(tasks[0]))
        weights = {name for name in frozen if name.endswith(".weight")}
        running = {name for name in tasks[0].spec.tensor_shapes if name.endswith(RUNNING)}
        of_frozen = {name for name in running if f"{name.rsplit('.', 1)[0]}.weight" in weights}
        assert of_frozen <= frozen
        statistics |= bool(of_frozen)
        state = after
    assert statistics and len(stages) == (7 if method == "profl" else 3)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("beginning", ["together", "pieces", "memory"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_has_no_state_of_an_optimiser(method, beginning):
    """A plan with momentum has four bytes more for each parameter that trains, and no other."""
    how = {"beginning": beginning, "micro_batch": 3}
    plain, state, client_update = begun(method, **how, **momentum_of(method, 0.0))
    moving, _, _ = begun(method, **how, **momentum_of(method, 0.9))
    while not plain.done(state):
        peaks = []
        for algorithm in (plain, moving):
            task, watching = algorithm.configure(state, DEVICES)[0], Watching("native")
            client_update(task, DATA[0], watching, {})
            peaks.append(watching.opened[0].peak_memory_bytes)
            trained = task.spec.param_shapes.keys() - task.sub_model.frozen
        assert trained < task.spec.param_shapes.keys() or not task.sub_model.frozen
        weights = sum(prod(task.spec.param_shapes[name]) for name in trained)
        assert peaks[1] - peaks[0] == 4 * weights, stage_of(task)
        state = plain.server_update(state, ())


@pytest.mark.parametrize("method", ["smartfreeze", "profl"])
def test_a_rule_reports_what_the_page_of_a_run_marks(method):
    algorithm, state, _ = begun(method)
    state = algorithm.server_update(state, ())
    assert algorithm.report is not None
    assert algorithm.report(state)[FROZEN] == 0.0


def test_one_part_and_nothing_frozen_is_a_round_of_fedavg():
    """Bit for bit, from the tasks to the merge; the model has BatchNorm."""
    settings = LocalSGD(**SGD, momentum=0.9)
    alone = replace(server(3), spec=NORM)
    params, every = init_params(NORM, SEED), frozenset(NORM.tensor_shapes)
    whole = Part("all", NORM.nodes[-1].name, tuple(NORM.by_name), every)
    one = stage(NORM, [whole], 0)
    assert one.spec == NORM and not one.frozen and not one.module
    tasks = stage_tasks(
        alone,
        Staging(beginning="pieces"),  # there is none
        DEVICES,
        round=1,
        phase="train",
        one=one,
        model=stage_model(one, params, {}),
        hparams=settings.hparams(0),
    )
    updates = [replace(train_stage(task, DATA[task.client], ENGINE), task=task) for task in tasks]
    merged, extra = merge_stage(NORM, params, {}, updates)
    plain = fedavg.fedavg(alone, **SGD, momentum=0.9)
    state = plain.init(Model(NORM, params))
    answers = [
        replace(fedavg.client_update(task, DATA[task.client], ENGINE, {})[0], task=task)
        for task in plain.configure(state, DEVICES)
    ]
    assert same(merged, dict(plain.server_update(state, answers).params)) and not extra
    assert not same(merged, dict(params))
