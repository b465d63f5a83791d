"""AllSmall: the width that all devices can hold, chosen once, and FedAvg of the narrow model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import (
    ENGINE,
    SPEC,
    client_data,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)

from fedlean.algorithm import Device
from fedlean.core import Model, Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.methods.allsmall import State, allsmall
from fedlean.methods.fedavg import fedavg
from fedlean.models.initialise import init_params
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint, state_tree
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.rounds import LoopState
from fedlean.submodels.width import width as sliced

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=allsmall,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "width": 0.5},
    knob={"width": 0.25},
    neutral={**SGD_SETTINGS, "width": 1.0},
    fedavg=SGD_SETTINGS,
    why_no_masks="a narrow model is dense",
)
NEEDS = {
    rate: peak_memory_bytes(sliced(SPEC, rate).spec, [Work(2, 8)]) for rate in (1.0, 0.5, 0.25)
}


def having(*memory_bytes: int | None) -> list[Device]:
    return [Device(client, memory_bytes=each) for client, each in enumerate(memory_bytes)]


def dispatch(algorithm, *rounds: Sequence[Device]) -> LocalDispatch:
    """Of devices that change from step to step; the last of `rounds` stays."""
    return LocalDispatch(
        algorithm.client_update,
        ENGINE,
        client_data(),
        lambda step: rounds[min(step, len(rounds)) - 1],
    )


def test_it_is_fedavg_of_the_narrow_model():
    """From the narrow model's own draw, with the seeds of the run."""
    narrow = sliced(SPEC, 0.5).spec
    drawn = Model(narrow, init_params(narrow, server().seed))
    plain = run(fedavg(replace(server(), spec=narrow), **SGD_SETTINGS), first=drawn)
    state = run(allsmall(server(), width=0.5, **SGD_SETTINGS))
    assert same(dict(state.params), dict(plain.params))
    model = allsmall(server(), width=0.5).model(state)
    assert model.spec == narrow and model.params is state.params and not model.masks


@pytest.mark.parametrize(
    ("memory", "width"),
    [
        ((None, None, None, None), 1.0),
        ((NEEDS[1.0], None, 10**9, NEEDS[1.0]), 1.0),
        ((NEEDS[1.0], NEEDS[1.0] - 1, None, None), 0.5),
        ((NEEDS[0.5], NEEDS[1.0], NEEDS[1.0], NEEDS[0.25]), 0.25),
        ((NEEDS[0.25] - 1, None, None, None), 0.25),  # which client 0 will not be sent
    ],
)
def test_the_width_is_what_all_devices_can_hold(memory, width: float):
    """All that are there count, not the cohort alone, and each gets the same model."""
    algorithm = allsmall(server(), cohort=2, **SGD_SETTINGS)
    tasks = algorithm.configure(algorithm.init(first_model()), having(*memory))
    assert len(tasks) == 2
    for task in tasks:
        assert task.hparams["width"] == width and task.spec == sliced(SPEC, width).spec
        assert task.params is tasks[0].params


def test_the_width_stays_when_devices_change():
    algorithm = allsmall(server(), **SGD_SETTINGS)
    first, later = having(*[NEEDS[0.5]] * 4), having(None, None, NEEDS[0.25], None)
    left_out = []
    widths = []

    def watch(progress, record):
        left_out.append(record.left_out)
        widths.append({task.hparams["width"] for task in record.tasks})

    state = run(algorithm, dispatch=dispatch(algorithm, first, later), watch=watch)
    assert state.width == 0.5 and widths == [{0.5}] * 6
    assert left_out[0] == {} and all(list(each) == [2] for each in left_out[1:])
    assert "needs" in left_out[1][2]


def test_an_unanswered_first_round_chooses_nothing():
    algorithm = allsmall(server(), **SGD_SETTINGS)
    state = algorithm.server_update(algorithm.init(first_model()), [])
    assert state.width == 0 and same(dict(state.params), dict(params()))
    assert algorithm.model(state).spec == SPEC
    tasks = algorithm.configure(state, having(NEEDS[0.25], None, None, None))
    assert {task.hparams["width"] for task in tasks} == {0.25}


def test_a_run_is_resumed_before_and_after_the_choice(tmp_path):
    """In step 1 nobody answers, in step 2 the width is chosen: each step's checkpoint goes on."""
    memory = [having(NEEDS[0.5]), having(*[NEEDS[0.25] - 1] * 4), having(*[NEEDS[0.5]] * 4)]
    saved = []

    def save(progress, record):
        tree = {"state": state_tree(progress.state), "store": progress.store.to_tree()}
        folder = tmp_path / str(progress.step)
        save_checkpoint(folder, progress.step, {**tree, "step": progress.step})
        saved.append(folder)

    def trained(progress=None, watch=None):
        algorithm = allsmall(server(), **SGD_SETTINGS)
        silent = dispatch(algorithm, memory[1], memory[2], memory[0])
        return run(algorithm, dispatch=silent, progress=progress, watch=watch)

    expected = trained(watch=save)
    assert expected.width == 0.5 and len(saved) == 7
    widths = []
    for folder in saved:
        tree, _ = load_checkpoint(folder)
        state = State(**tree["state"])
        widths.append(state.width)
        resumed = trained(LoopState(state, ClientStore(tree["store"]), tree["step"]))
        assert same(resumed, expected)
    assert widths == [0.0] + [0.5] * 6


@pytest.mark.parametrize("width", [0.0, 0.5])
def test_a_given_model_is_sliced_and_a_drawn_one_is_not(width: float):
    cut = sliced(SPEC, 0.5)
    for given in (False, True):
        algorithm = allsmall(replace(server(), given=given), width=width, **SGD_SETTINGS)
        state = algorithm.init(first_model())
        (task, *_) = algorithm.configure(state, having(*[NEEDS[0.5]] * 4))
        begins = cut.take(params()) if given else init_params(cut.spec, server().seed)
        assert same(dict(task.params), dict(begins))


def test_weights_are_examples():
    """(25·1 + 75·5) / 100 = 4."""
    algorithm = allsmall(server(), width=0.5, **SGD_SETTINGS)
    state = algorithm.init(first_model())
    tasks = algorithm.configure(state, devices())
    answered, _ = algorithm.client_update(tasks[0], client_data()[0], ENGINE, {})
    updates = [
        replace(
            answered,
            client=client,
            num_examples=examples,
            params={name: np.full_like(v, value) for name, v in state.params.items()},
        )
        for client, examples, value in ((0, 25, 1.0), (1, 75, 5.0))
    ]
    merged = algorithm.server_update(state, updates)
    assert all((value == 4.0).all() for value in merged.params.values())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"width": -0.1}, "width"),
        ({"width": 1.1}, "width"),
        ({"widths": "0.25 0.5"}, "widths must be numbers"),
        ({"lr": 0.0}, "lr"),
        ({"cohort": 0}, "cohort"),
    ],
)
def test_bad_hyperparameters_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        allsmall(server(), **setting)


def test_a_model_with_masks_is_refused():
    masks = {"fc1.weight": np.ones((12, 64), bool)}
    with pytest.raises(ValueError, match="has masks"):
        allsmall(server()).init(Model(SPEC, params(), masks))
