"""The output modules of the papers' stages, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import batch, opened, start

from fedlean.engine.open import open_engine
from fedlean.freezing.output_module import output_module
from fedlean.layers import Conv2d, GlobalAvgPool, GroupNorm, Linear, ReLU
from fedlean.models.conv2 import conv2
from fedlean.models.lenet300 import lenet300
from fedlean.models.resnet import resnet18
from fedlean.models.vgg import vgg11
from fedlean.spec import sequential
from fedlean.submodels.parts import parts
from fedlean.submodels.stages import graft, upto

RESNET = resnet18((3, 32, 32), 10)


def module(spec, name, **settings):
    """After the part of that name."""
    own = parts(spec)
    return output_module(spec, own, [part.name for part in own].index(name), **settings)


def staged(spec, name, **settings):
    (end,) = (part.end for part in parts(spec) if part.name == name)
    return graft(upto(spec, end), module(spec, name, **settings), output=True)


def test_the_first_stage_of_resnet18_as_released():
    """NeuLite's ResNet1: three convolutions, 64-128-256-512, then mean and a linear layer."""
    nodes = module(RESNET, "stage1")
    conv = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}
    assert [node.layer for node in nodes] == [
        Conv2d(128, **conv),
        Conv2d(256, **conv),
        Conv2d(512, **conv),
        GlobalAvgPool(),
        Linear(10),
    ]
    assert [node.name for node in nodes] == [
        "surrogate_stage2",
        "surrogate_stage3",
        "surrogate_stage4",
        "surrogate_pool",
        "surrogate_fc",
    ]
    spec = staged(RESNET, "stage1")
    assert [spec.shapes[node.name] for node in nodes] == [
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512,),
        (10,),
    ]
    assert spec.param_shapes["surrogate_fc.weight"] == (10, 512) == RESNET.param_shapes["fc.weight"]


def test_stand_ins_are_alike_in_every_stage():
    shapes = [dict(staged(RESNET, block).param_shapes) for block in ("stage1", "stage2", "stage3")]
    for name in ("surrogate_stage4.weight", "surrogate_fc.weight"):
        assert len({one[name] for one in shapes}) == 1
    assert "surrogate_stage2.weight" not in shapes[1]


def test_one_pixel_stays_one_pixel():
    """Eight units of 16x16 images: seven halvings; the last convolutions have one pixel left."""
    spec = resnet18((1, 16, 16), 3, blocks="unit")
    stage = staged(spec, "stage1_1")
    assert stage.shapes["surrogate_stage2_2"] == (128, 2, 2)
    assert stage.shapes["surrogate_stage3_1"] == (256, 1, 1)
    assert stage.shapes["surrogate_stage4_2"] == (512, 1, 1)
    session = opened(open_engine("torch", 1), stage, start(stage))
    x, y = batch(stage)
    losses = [session.step(x, y) for _ in range(3)]
    assert np.isfinite(losses).all()


def test_with_norms():
    nodes = module(RESNET, "stage3", norm=True)
    assert [node.name for node in nodes] == [
        "surrogate_stage4",
        "surrogate_stage4_norm",
        "surrogate_stage4_relu",
        "surrogate_pool",
        "surrogate_fc",
    ]
    assert [node.layer for node in nodes[1:3]] == [GroupNorm(groups=128), ReLU()]


def test_the_linear_layer_may_be_the_models_own():
    nodes = module(RESNET, "stage3", prefix="own", fc="fc")
    assert [node.name for node in nodes] == ["own_stage4", "own_pool", "fc"]
    assert staged(RESNET, "stage3", fc="fc").param_shapes["fc.weight"] == (10, 512)


def test_a_last_part_of_images_and_vectors_is_one_convolution():
    """VGG-11's fifth part has two convolutions and three linear layers."""
    nodes = module(vgg11((3, 32, 32), 10), "stage4")
    assert [node.name for node in nodes] == ["surrogate_stage5", "surrogate_pool", "surrogate_fc"]


def test_after_a_vector_there_is_the_linear_layer_alone():
    (node,) = module(lenet300((1, 8, 8), 10), "fc1")
    assert (node.name, node.layer, node.inputs) == ("surrogate_fc", Linear(10), ("relu1",))


def test_parts_of_vectors_have_no_stand_in():
    """Conv-2's last part is two linear layers."""
    nodes = module(conv2((1, 28, 28), 62), "conv2")
    assert [node.name for node in nodes] == ["surrogate_pool", "surrogate_fc"]


def test_a_model_that_gives_no_vector():
    images = sequential((1, 4, 4), [("a", Conv2d(2, 1), "a"), ("b", Conv2d(3, 1), "b")])
    with pytest.raises(ValueError, match=r"output has shape \(3, 4, 4\), expected \(classes,\)"):
        module(images, "a")
