"""The settings of progressive training, and the tasks of a stage."""

from __future__ import annotations

import inspect

import pytest
from federation import SPEC, first_model, server

from fedlean.algorithm import Device
from fedlean.freezing.stages import stage_model
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.methods.fedavg import fedavg
from fedlean.train.local_sgd import LocalSGD, with_settings

EXTRA = Staging().stages(SPEC)


def test_what_a_client_is_told():
    assert Staging().hparams(Device(0, 35)) == {"beginning": "together", "micro_batch": 8}
    assert Staging(beginning="pieces", micro_batch=3).hparams(Device(0)) == {
        "beginning": "pieces",
        "micro_batch": 3,
    }


@pytest.mark.parametrize("beginning", ["memory", "disk"])
def test_a_client_of_unknown_size_takes_pieces(beginning):
    staging = Staging(beginning=beginning)
    assert staging.hparams(Device(0, 35))["beginning"] == beginning
    assert staging.hparams(Device(0, 35))["held"] == 35
    assert staging.hparams(Device(0)) == {"beginning": "pieces", "micro_batch": 8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beginning": "later"}, "beginning must be"),
        ({"micro_batch": 0}, "micro_batch must be an integer from 1"),
        ({"ends": "nowhere"}, "no block or layer 'nowhere' to be divided after"),
        ({"ends": "fc2"}, "cannot be divided after 'fc2'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Staging(**settings).check(server())


def test_ends_divide_the_model():
    assert [part.name for part in Staging(ends="pool").parts(SPEC)] == ["pool", "head"]
    one, last = Staging(ends="pool", module_norm=True).stages(SPEC, "own")
    assert one.own == {"conv.weight", "conv.bias"} and last.frozen == one.own
    assert one.module == {"own_fc.weight", "own_fc.bias"} and last.spec == SPEC


def test_the_tasks_of_a_stage_freeze_what_it_freezes_and_name_it():
    last = EXTRA[-1]
    tasks = stage_tasks(
        server(),
        Staging(beginning="memory"),
        [Device(2, 50), Device(3)],
        round=4,
        phase="grow",
        one=last,
        model=stage_model(last, first_model().params, {}),
        hparams={"lr": 0.5},
    )
    assert [(task.client, task.round, task.phase) for task in tasks] == [
        (2, 4, "grow"),
        (3, 4, "grow"),
    ]
    assert all(task.sub_model.frozen == last.frozen and task.spec == SPEC for task in tasks)
    assert tasks[0].seed != tasks[1].seed
    shared = {"lr": 0.5, "micro_batch": 8, "stage": last.name}
    assert tasks[0].hparams == {**shared, "beginning": "memory", "held": 50}
    assert tasks[1].hparams == {**shared, "beginning": "pieces"}


def test_records_of_settings_become_arguments_of_a_method():
    seen = []

    @with_settings(LocalSGD, Staging)
    def method(server, sgd, staging, *, own: int = 1):
        seen.append((sgd, staging, own))
        return fedavg(server)

    parameters = inspect.signature(method).parameters
    fields = [*LocalSGD.__dataclass_fields__, *Staging.__dataclass_fields__]
    assert list(parameters) == ["server", *fields, "own"]
    assert parameters["beginning"].default == "together" and parameters["lr"].annotation is float
    method(server(), lr=0.5, micro_batch=2, own=7)
    assert seen == [(LocalSGD(lr=0.5), Staging(micro_batch=2), 7)]
    for wrong, message in [({"lr": -1.0}, "lr must"), ({"micro_batch": 0}, "micro_batch must")]:
        with pytest.raises(ValueError, match=message):
            method(server(), **wrong)
    with pytest.raises(TypeError, match="nothing"):
        method(server(), nothing=1)
    assert len(seen) == 1
