"""ExclusiveFL: FedAvg among the devices that can hold the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, first_model, params, run, same, server

from fedlean.algorithm import Device
from fedlean.core import Model, Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.methods.exclusivefl import exclusivefl
from fedlean.methods.fedavg import fedavg
from fedlean.models.initialise import init_params
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.rounds import RunFailed
from fedlean.submodels.width import width as sliced

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=exclusivefl,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "width": 0.75},
    knob={"width": 0.5},
    neutral=SGD_SETTINGS,
    fedavg=SGD_SETTINGS,
    why_no_masks="the model is dense",
)
WHOLE = peak_memory_bytes(SPEC, [Work(2, 8)])
HALF = peak_memory_bytes(sliced(SPEC, 0.5).spec, [Work(2, 8)])


def having(*memory_bytes: int | None) -> list[Device]:
    return [Device(client, memory_bytes=each) for client, each in enumerate(memory_bytes)]


def dispatch(algorithm, *memory_bytes: int | None) -> LocalDispatch:
    present = having(*memory_bytes)
    return LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: present)


def test_a_cohort_is_drawn_from_the_able_alone():
    """Clients 1 and 3 can hold the model to the byte; each round draws one of the two."""
    algorithm = exclusivefl(server(60), cohort=1, **SGD_SETTINGS)
    state, drawn = algorithm.init(first_model()), set()
    for round in range(20):
        present = having(WHOLE - 1, WHOLE, 0, None)
        tasks = algorithm.configure(replace(state, round=round), present)
        assert len(tasks) == 1
        drawn.add(tasks[0].client)
    assert drawn == {1, 3}
    both = exclusivefl(server(), cohort=4, **SGD_SETTINGS).configure(
        state, having(WHOLE - 1, WHOLE, 0, None)
    )
    assert [task.client for task in both] == [1, 3]


def test_it_is_fedavg_without_the_others():
    algorithm = exclusivefl(server(), **SGD_SETTINGS)
    records = []
    state = run(
        algorithm,
        dispatch=dispatch(algorithm, WHOLE, WHOLE - 1, WHOLE, None),
        watch=lambda progress, record: records.append(record),
    )
    assert all(record.answered == [0, 2, 3] and not record.left_out for record in records)
    plain = fedavg(server(), **SGD_SETTINGS)
    three = [Device(client) for client in (0, 2, 3)]
    present = LocalDispatch(plain.client_update, ENGINE, client_data(), lambda step: three)
    assert same(dict(state.params), dict(run(plain, dispatch=present).params))


def test_where_nobody_is_able_the_run_says_what_each_lacks():
    algorithm = exclusivefl(server(), cohort=2, **SGD_SETTINGS)
    records = []
    with pytest.raises(RunFailed, match=r"4 left out, the smallest task needs \d+\.\d+ MB"):
        run(
            algorithm,
            dispatch=dispatch(algorithm, *[WHOLE - 1] * 4),
            watch=lambda progress, record: records.append(record),
        )
    assert sorted(records[0].left_out) == [0, 1, 2, 3]


def test_a_narrower_model_takes_more_devices_along():
    """`width` < 1: what the narrow model needs decides, and it is what is trained and saved."""
    algorithm = exclusivefl(server(), width=0.5, **SGD_SETTINGS)
    state = algorithm.init(first_model())
    assert same(dict(state.params), init_params(sliced(SPEC, 0.5).spec, server().seed))
    tasks = algorithm.configure(state, having(HALF - 1, HALF, WHOLE, None))
    assert [task.client for task in tasks] == [1, 2, 3]
    assert all(task.spec == sliced(SPEC, 0.5).spec for task in tasks)
    assert algorithm.model(state).spec == sliced(SPEC, 0.5).spec
    given = exclusivefl(replace(server(), given=True), width=0.5).init(first_model())
    assert same(dict(given.params), sliced(SPEC, 0.5).take(params()))


@pytest.mark.parametrize(
    "setting", [{"width": 0.0}, {"width": 1.1}, {"lr": 0.0}, {"cohort": 0}, {"local_steps": 0}]
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        exclusivefl(server(), **setting)


def test_a_model_with_masks_is_refused():
    masks = {"fc1.weight": np.ones((12, 64), bool)}
    with pytest.raises(ValueError, match="has masks"):
        exclusivefl(server()).init(Model(SPEC, params(), masks))
