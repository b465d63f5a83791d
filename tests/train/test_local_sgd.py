"""The settings that first-order methods share, and the signature they give a method."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields, replace

import pytest
from federation import devices, first_model, server

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.method import complete, given_settings
from fedlean.train.cohort import cohort_tasks
from fedlean.train.local_sgd import LocalSGD, loss_of, with_local_sgd


def noted(seen: list):
    def method(server: Server, sgd: LocalSGD, *, depth: int = 3) -> FederatedAlgorithm:
        """A method."""
        seen.append((sgd, depth))
        return fedavg(server)

    return with_local_sgd(method)


def test_settings_are_the_methods_own():
    parameters = inspect.signature(noted([])).parameters
    assert list(parameters) == ["server", *(field.name for field in fields(LocalSGD)), "depth"]
    shared = {name: parameters[name].default for name in asdict(LocalSGD())}
    assert shared == asdict(LocalSGD()) and parameters["depth"].default == 3
    assert parameters["lr"].annotation is float and parameters["depth"].annotation is int


def test_what_is_given_reaches_the_method():
    seen = []
    noted(seen)(server(), lr=0.3, depth=5, momentum=0.5)
    noted(seen)(server())
    assert seen == [(LocalSGD(lr=0.3, momentum=0.5), 5), (LocalSGD(), 3)]


def test_bad_settings_are_named_before_the_method_is_built():
    seen = []
    for name, value in {"lr": 0.0, "local_steps": 0, "loss": "mse", "cohort": 0}.items():
        with pytest.raises(ValueError, match=name):
            noted(seen)(server(), **{name: value})
    assert not seen
    with pytest.raises(TypeError, match="width"):
        noted(seen)(server(), width=2)


def test_a_cohort_is_of_the_clients():
    few = replace(server(), clients=3)
    fedavg(few, cohort=3)
    with pytest.raises(ValueError, match="a cohort of 4 cannot be drawn from 3 clients"):
        fedavg(few, cohort=4)
    with pytest.raises(ValueError, match="warmup_client must be from 0 to 2, got 3"):
        fedavg(few, warmup_client=3)


def test_the_command_line_knows_them():
    assert given_settings("fedavg", ["momentum=0.5"]) == {"momentum": 0.5}
    assert complete("fedavg", {})["batch_size"] == 20


def test_a_round_by_hand():
    """lr 0.2 halves every 4 rounds; after 8 it is 0.05."""
    sgd = LocalSGD(lr=0.2, cohort=2, lr_half_life_rounds=4, loss="bce")
    clients = sgd.clients(server(), devices(), 9)
    assert len(clients) == 2 and clients == sorted(clients)
    tasks = cohort_tasks(
        server(), clients, round=9, phase="train", model=first_model(), hparams=sgd.hparams(8)
    )
    assert [task.client for task in tasks] == clients
    assert tasks[0].hparams["lr"] == pytest.approx(0.05)
    assert tasks[0].seed != tasks[1].seed and tasks[0].sub_model is tasks[1].sub_model
    assert loss_of(tasks[0]) == "bce"
