"""The tails of parts by name."""

from __future__ import annotations

import pytest

from fedlean.freezing.tail import tail
from fedlean.layers import Conv2d, Flatten, GroupNorm, Linear
from fedlean.models.catalog import build
from fedlean.spec import sequential
from fedlean.submodels.parts import parts

NORM = ("weight", "bias")
BATCH_NORM = (*NORM, "running_mean", "running_var")


def named(layer: str, suffixes: tuple[str, ...]) -> set[str]:
    return {f"{layer}.{suffix}" for suffix in suffixes}


@pytest.mark.parametrize(
    ("model", "part", "layer", "suffixes", "norm"),
    [
        # NeuLite's release: children 3 and 4 of a stage's last BasicBlock
        ("resnet18", 0, "stage1_2_conv2", ("weight",), NORM),
        ("resnet18,norm=batch", 2, "stage3_2_conv2", ("weight",), BATCH_NORM),
        # of one residual block: not the convolution on its shortcut, which comes later
        ("resnet8", 1, "stage2_1_conv2", ("weight",), NORM),
        ("mobilenetv3_small", 0, "stage1_1_project", ("weight",), BATCH_NORM),
        ("vgg16", 1, "conv4", ("weight", "bias"), ()),
        ("lenet300", 0, "fc1", ("weight", "bias"), ()),
        ("lenet300", 1, "fc3", ("weight", "bias"), ()),
    ],
)
def test_the_last_layer_with_weights_and_its_norm(model, part, layer, suffixes, norm):
    spec = build(model, (3, 32, 32), 10)
    expected = named(layer, suffixes) | named(layer.replace("conv", "norm"), norm)
    if "project" in layer:
        expected = named(layer, suffixes) | named(f"{layer}_norm", norm)
    assert tail(spec, parts(spec)[part]) == expected


def test_a_part_without_weights_has_none():
    """A norm alone."""
    layers = [("a", Conv2d(4, 3)), ("n", GroupNorm(groups=2)), ("f", Flatten()), ("c", Linear(3))]
    spec = sequential((1, 8, 8), layers)
    own = parts(spec, "a n")
    with pytest.raises(ValueError, match="part 'n' has no convolution or linear layer"):
        tail(spec, own[1])
