"""HeteroFL's scaler after each sliced layer."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import BLOCK, batch, opened, start

from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU, Scaler
from fedlean.models.mlp import mlp
from fedlean.models.resnet import resnet8
from fedlean.spec import Node, sequential
from fedlean.submodels.choose import random
from fedlean.submodels.scaler import with_scalers
from fedlean.submodels.width import width

SPEC = sequential(
    (2, 4, 4),
    [
        ("conv", Conv2d(8, 3), "first"),
        ("bn", BatchNorm(), "first"),
        ("flat", Flatten(), "second"),
        ("fc1", Linear(6), "second"),
        ("relu", ReLU(), "second"),
        ("fc2", Linear(3), "third"),
    ],
)


def test_after_each_sliced_layer_and_not_after_the_output():
    cut = width(SPEC, 0.25, scaler=True)
    assert [(n.name, n.inputs, n.block) for n in cut.spec.nodes] == [
        ("conv", ("input",), "first"),
        ("conv_scaler", ("conv",), "first"),
        ("bn", ("conv_scaler",), "first"),
        ("flat", ("bn",), "second"),
        ("fc1", ("flat",), "second"),
        ("fc1_scaler", ("fc1",), "second"),
        ("relu", ("fc1_scaler",), "second"),
        ("fc2", ("relu",), "third"),
    ]
    assert cut.spec.by_name["conv_scaler"].layer == Scaler(4.0)
    plain = width(SPEC, 0.25)
    assert cut.index == plain.index and cut.spec.tensor_shapes == plain.spec.tensor_shapes


def test_factors_are_those_of_the_block():
    cut = width(SPEC, {"first": 0.5}, scaler=True)
    scalers = {n.name: n.layer for n in cut.spec.nodes if isinstance(n.layer, Scaler)}
    assert scalers == {"conv_scaler": Scaler(2.0)}


def test_nothing_is_scaled_where_nothing_is_sliced():
    assert width(SPEC, 1.0, scaler=True).spec == SPEC


def test_depthwise_convolutions_take_none():
    spec = with_scalers(BLOCK, {"expand": 2.0})
    assert spec.by_name["bn1"].inputs == ("expand_scaler",)
    dense = tuple(
        n if n.name != "grouped" else Node(n.name, Conv2d(6, 1), n.inputs) for n in BLOCK.nodes
    )
    cut = width(type(BLOCK)(BLOCK.input_shape, dense), 0.5, scaler=True)
    scaled = {n.name for n in cut.spec.nodes if isinstance(n.layer, Scaler)}
    assert scaled == {
        f"{n}_scaler" for n in ("stem", "expand", "reduce", "excite", "project", "grouped")
    }


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_sums_are_scaled_in_training_only(engine, rate: float):
    spec = mlp((1, 8, 8), 10)
    plain, scaled = width(spec, rate), width(spec, rate, scaler=True)
    params, (x, _) = plain.take(start(spec)), batch(spec, 3)
    sessions = [opened(engine, cut.spec, params, batch_size=3) for cut in (plain, scaled)]
    evaluated = [session.forward(x)["fc3"] for session in sessions]
    np.testing.assert_array_equal(*evaluated)
    nodes = ("fc1", "fc1_scaler", "act1")
    values = sessions[1].forward(x, taps=nodes, training=True)
    np.testing.assert_allclose(values["fc1_scaler"], values["fc1"] / rate, rtol=1e-6)
    before = values["fc1_scaler"].astype(np.float64)
    want = before * np.clip(before + 3, 0, 6) / 6
    np.testing.assert_allclose(values["act1"], want, rtol=1e-5, atol=1e-6)


def test_engines_train_scaled_slices(engine):
    full = resnet8((3, 8, 8), 10)
    cut = width(full, 0.5, random(0), scaler=True)
    session = opened(engine, cut.spec, cut.take(start(full)), batch_size=4)
    assert np.isfinite([session.step(*batch(cut.spec, 4)) for _ in range(2)]).all()
