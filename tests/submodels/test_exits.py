"""Early exits: where they are by hand, what they compute, and which models have none."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import start
from engine.oracle import Oracle

from fedlean.layers import Add, BatchNorm, Conv2d, Flatten, GlobalAvgPool, Linear, MaxPool2d, ReLU
from fedlean.models.catalog import available, build
from fedlean.spec import INPUT, ModelSpec, Node, sequential
from fedlean.submodels.exits import ending_at, with_exits

THREE = sequential(
    (2, 4, 4),
    [
        ("conv1", Conv2d(3, 3, padding=1), "stem"),
        ("relu1", ReLU(), "stem"),
        ("conv2", Conv2d(4, 3, padding=1), "body"),
        ("relu2", ReLU(), "body"),
        ("pool", MaxPool2d(2), "body"),
        ("conv3", Conv2d(5, 1), "tail"),
        ("flat", Flatten(), "tail"),
        ("fc1", Linear(6), "head"),
        ("relu3", ReLU(), "head"),
        ("fc2", Linear(3), "head"),
    ],
)


def test_exits_by_hand():
    """After the body, pooled, and after the tail, a vector; the stem is none where others are."""
    exits = with_exits(THREE)
    assert exits.names == ("exit_body", "exit_tail", "fc2")
    added = {n: node for n, node in exits.spec.by_name.items() if n not in THREE.by_name}
    assert {name: (node.layer, node.inputs) for name, node in added.items()} == {
        "exit_body_pool": (GlobalAvgPool(), ("pool",)),
        "exit_body": (Linear(3), ("exit_body_pool",)),
        "exit_tail": (Linear(3), ("flat",)),
    }
    assert {node.block for node in added.values()} == {"exit"}
    assert not {"exit_body.weight", "exit_tail.weight"} & set(exits.spec.prunable)
    assert exits.spec.nodes[-1] == THREE.nodes[-1]
    assert [exits.spec.by_name[node.name] for node in THREE.nodes] == list(THREE.nodes)


def test_models_end_at_an_exit_and_give_the_sum_of_theirs():
    """Each exit computes what it computes in the whole; no depth holds more than it uses."""
    exits = with_exits(THREE)
    params = start(exits.spec)
    x = np.random.default_rng(0).standard_normal((5, 2, 4, 4)).astype(np.float32)
    values = Oracle(exits.spec, params).forward(x, training=False)
    for count in (1, 2, 3):
        cut = ending_at(exits, count)
        own = Oracle(cut.spec, cut.take(params)).forward(x, training=False)
        for name in exits.names[:count]:
            np.testing.assert_array_equal(own[name].detach(), values[name].detach())
        summed = sum(values[name].detach().numpy() for name in exits.names[:count])
        np.testing.assert_allclose(own[cut.spec.nodes[-1].name].detach(), summed, rtol=1e-12)
    shallow = ending_at(exits, 1).spec
    assert [node.name for node in shallow.nodes] == [
        *("conv1", "relu1", "conv2", "relu2", "pool", "exit_body_pool", "exit_body"),
    ]
    assert ending_at(exits, 2).spec.tensor_shapes.keys() == {
        f"{layer}.{kind}"
        for layer in ("conv1", "conv2", "conv3", "exit_body", "exit_tail")
        for kind in ("weight", "bias")
    }


def test_a_model_of_one_block_is_taken_layer_by_layer():
    """fc2's exit would be the model's own head, and fc1 is the first where others remain."""
    layers = [("fc1", Linear(6)), ("relu", ReLU()), ("fc2", Linear(5)), ("out", Linear(3))]
    assert with_exits(sequential((4,), layers)).names == ("exit_fc1", "out")
    assert with_exits(sequential((4,), [*layers[:2], layers[3]])).names == ("exit_fc1", "out")
    four = [*layers[:3], ("fc3", Linear(4)), layers[3]]
    assert with_exits(sequential((4,), four)).names == ("exit_fc2", "out")
    assert with_exits(sequential((4,), four)).spec.by_name["exit_fc2"].inputs == ("fc2",)


def test_a_block_that_is_read_past_its_end_has_no_exit():
    """The sum reads `a1` beside `b2`: nothing may end after `b`."""
    spec = ModelSpec(
        (4,),
        (
            Node("a1", Linear(4), (INPUT,), "a"),
            Node("b1", Linear(4), ("a1",), "b"),
            Node("b2", ReLU(), ("b1",), "b"),
            Node("c1", Linear(4), ("b2",), "c"),
            Node("sum", Add(), ("c1", "a1"), "c"),
            Node("d1", Linear(4), ("sum",), "d"),
            Node("e1", Linear(4), ("d1",), "e"),
            Node("out", Linear(2), ("e1",), "out"),
        ),
    )
    assert with_exits(spec).names == ("exit_c", "exit_d", "out")


@pytest.mark.parametrize(
    "spec",
    [
        sequential((4,), [("fc", Linear(3))]),
        sequential((4,), [("bn", BatchNorm()), ("fc", Linear(3))]),
        sequential((4,), [("relu", ReLU(), "first"), ("fc", Linear(3), "second")]),
    ],
)
def test_a_model_that_cannot_end_earlier_is_refused(spec):
    with pytest.raises(ValueError, match="no block after which it could end: it needs two blocks"):
        with_exits(spec)


EXITS = {
    "conv2": ("conv2",),
    "lenet300": ("fc1",),
    "lenet5": ("conv2", "fc1"),
    "lenet5_small": ("conv2", "fc1"),
    "mlp": ("fc1",),
    "mlp_13_7": ("fc1",),
    "mlp_27_14": ("fc1",),
    "mlp_40_20": ("fc1",),
    "mobilenetv3_small": ("stage1", "stage2", "stage3", "stage4"),
    "resnet18": ("stage1", "stage2", "stage3"),
    "resnet20": ("stage1", "stage2"),
    "resnet34": ("stage1", "stage2", "stage3"),
    "resnet8": ("stage1", "stage2"),
    "vgg11": ("stage2", "stage3", "stage4", "stage5", "fc1"),
    "vgg16": ("stage2", "stage3", "stage4", "stage5", "fc1"),
}


@pytest.mark.parametrize("model", available())
def test_every_model_of_the_catalogue_has_exits(model: str):
    spec = build(model, (1, 32, 32), 7)
    exits = with_exits(spec)
    assert exits.names == (*(f"exit_{block}" for block in EXITS[model]), spec.nodes[-1].name)
    sizes = [ending_at(exits, count).spec.num_params for count in range(1, len(exits.names) + 1)]
    assert sizes == sorted(sizes) and sizes[-1] == exits.spec.num_params
