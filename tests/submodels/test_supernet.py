"""A supernet's sub-networks: what they hold, their names, and every model that has some."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine.cases import start

from fedlean.core import generator
from fedlean.layers import Scaler
from fedlean.models.catalog import build
from fedlean.spec import ModelSpec
from fedlean.submodels.cut import whole_index
from fedlean.submodels.supernet import SubNet, supernet

RESNET = build("resnet18,blocks=unit,width=8", (3, 16, 16), 10)
MODELS = {
    "resnet18,blocks=unit,width=8": 2**4 * 2**4,
    "resnet18,width=8": 2**4,
    "resnet34,blocks=unit,width=8": (3 * 4 * 6 * 3) * 2**4,
    "mobilenetv3_small,blocks=unit,norm=group": (2 * 2 * 3) * 2**6,
    "conv2,width=4": 2**3,
    "vgg11,width=4": 2**7,
    "mlp": 2**2,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_sub_network_is_a_part_of_the_model(name: str):
    spec = build(name, (3, 32, 32), 10)
    net = supernet(spec, (1.0, 0.5), scaler=True)
    assert net.count == MODELS[name]
    random = generator(0, 0, 0, "test")
    for one in (net.largest, net.smallest, *(net.draw(random) for _ in range(6))):
        cut = net.cut(one)
        assert cut is net.cut(one) and cut.full == spec
        assert cut.spec.output_shape == spec.output_shape
        assert net.heard(net.said(one)) == one == net.named(net.name(one))
        assert all(len(str(said)) < 64 for said in net.said(one).values())


def test_the_largest_is_the_model():
    net = supernet(RESNET, (1.0, 0.5), scaler=True)
    cut = net.cut(net.largest)
    assert cut.spec == RESNET and cut.index == whole_index(RESNET)


def test_depths_and_widths_by_hand():
    net = supernet(RESNET, (1.0, 0.5), scaler=True)
    assert list(net.depths) == ["stage1", "stage2", "stage3", "stage4"]
    assert net.groups[0] == ("stem", "stage1_1", "stage1_2"), "they add into one sum"
    cut = net.cut(SubNet((1, 2, 1, 2), (1.0, 0.5, 1.0, 0.5)))
    units = [block for block in cut.spec.blocks if block.startswith("stage")]
    assert units == ["stage1_1", "stage2_1", "stage2_2", "stage3_1", "stage4_1", "stage4_2"]
    shapes = cut.spec.param_shapes
    assert shapes["stage1_1_conv1.weight"] == (8, 8, 3, 3)
    assert shapes["stage2_1_conv1.weight"] == (8, 8, 3, 3)  # half of 16, from all 8
    assert shapes["stage3_1_conv1.weight"] == (32, 8, 3, 3)
    assert shapes["stage4_1_conv1.weight"] == (32, 32, 3, 3)
    assert shapes["fc.weight"] == (10, 32)
    scaled = [n.name for n in cut.spec.nodes if isinstance(n.layer, Scaler)]
    assert scaled and all(name.startswith(("stage2", "stage4")) for name in scaled)


def test_a_sub_network_takes_the_first_units_and_channels():
    net, params = supernet(RESNET, (1.0, 0.5)), start(RESNET)
    taken = net.cut(net.smallest).take(params)
    assert np.array_equal(taken["stem.weight"], params["stem.weight"][:4])
    assert np.array_equal(taken["stage2_1_conv1.weight"], params["stage2_1_conv1.weight"][:8, :4])
    assert "stage2_2_conv1.weight" not in taken


def test_a_draw_reaches_all():
    net = supernet(build("mlp", (1, 8, 8), 10), (1.0, 0.5, 0.25))
    random = generator(0, 0, 0, "test")
    assert len({net.draw(random) for _ in range(200)}) == net.count == 9


def test_a_model_of_one_block_has_a_rate_for_each_layer():
    plain = build("mlp", (1, 8, 8), 10)
    spec = ModelSpec(plain.input_shape, tuple(replace(n, block="main") for n in plain.nodes))
    net = supernet(spec, (1.0, 0.5))
    assert net.groups == (("fc1",), ("fc2",))
    assert net.cut(net.named("1/0.5")).spec.param_shapes["fc2.weight"] == (32, 128)


def test_a_model_of_one_sub_network_is_refused():
    with pytest.raises(ValueError, match=r"one sub-network only .*blocks=unit"):
        supernet(build("mlp", (1, 8, 8), 10), (1.0,))
