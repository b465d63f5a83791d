"""Slices by depth: units that go, who reads what then, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine.cases import batch, opened, start
from submodels.embedded import output

from fedlean.layers import Add, Conv2d, Linear, ReLU
from fedlean.models.mlp import mlp
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet8, resnet18, resnet20
from fedlean.models.vgg import vgg11
from fedlean.spec import INPUT, ModelSpec, Node, sequential
from fedlean.submodels.choose import random
from fedlean.submodels.depth import depth, drop_blocks, stages
from fedlean.submodels.width import width

RESNET18 = resnet18((3, 8, 8), 10, blocks="unit")
RESNET20 = resnet20((3, 8, 8), 10, blocks="unit")
MOBILE = mobilenetv3_small((3, 16, 16), 10, blocks="unit")
TWO = sequential(
    (4,), [("a", Linear(4), "one"), ("relu", ReLU(), "two"), ("b", Linear(3), "three")]
)


def test_the_stages_of_a_model():
    assert {name: len(units) for name, units in stages(MOBILE).items()} == {
        "stage1": 1,
        "stage2": 2,
        "stage3": 5,
        "stage4": 3,
    }
    assert stages(mlp((1, 8, 8), 10)) == {}


def test_what_read_a_unit_reads_what_it_read():
    cut = depth(RESNET20, {"stage1": 1, "stage2": 2})
    gone = {n.name for n in RESNET20.nodes} - {n.name for n in cut.spec.nodes}
    assert gone == {
        n.name for u in ("stage1_2", "stage1_3", "stage2_3") for n in RESNET20.blocks[u]
    }
    by_name = cut.spec.by_name
    assert (
        by_name["stage2_1_conv1"].inputs == by_name["stage2_1_down"].inputs == ("stage1_1_relu2",)
    )
    assert by_name["stage3_1_conv1"].inputs == ("stage2_2_relu2",)
    assert cut.full is RESNET20 and cut.index.keys() == cut.spec.tensor_shapes.keys()
    params = start(RESNET20)
    assert all(value is params[name] for name, value in cut.take(params).items())


def test_a_number_is_that_of_every_stage():
    assert list(depth(RESNET18, 1).spec.blocks) == [
        "stem",
        *(f"stage{number}_1" for number in range(1, 5)),
        "head",
    ]
    assert (
        depth(RESNET18, 2).spec == depth(RESNET18, 99).spec == depth(RESNET18, {}).spec == RESNET18
    )


def test_a_resnet_without_second_units_is_one_of_depth_one():
    """The 6n + 2 layers of n = 1, as resnet8 builds them."""
    small = depth(RESNET20, 1).spec
    want = {n.name: (n.layer, n.inputs) for n in resnet8((3, 8, 8), 10).nodes}
    assert {n.name: (n.layer, n.inputs) for n in small.nodes} == want


@pytest.mark.parametrize("count", [1, 2])
def test_dropping_units_of_zero_weight_changes_nothing(count: int):
    """relu(0 + x) = x for x ≥ 0, and in mobilenet 0 + x = x."""
    for spec, last in ((RESNET20, "norm2"), (MOBILE, "project_norm")):
        cut = depth(spec, {"stage1": 1, "stage2": count} if spec is RESNET20 else {"stage2": count})
        params = start(spec)
        for block in spec.blocks.keys() - cut.spec.blocks.keys():
            for tensor in ("weight", "bias"):
                params[f"{block}_{last}.{tensor}"][:] = 0
        x, _ = batch(spec, 2)
        want = output(spec, params, x)
        np.testing.assert_allclose(output(cut.spec, cut.take(params), x), want, rtol=1e-12)


def test_the_last_unit_of_mobilenet_goes_and_its_last_convolution_stays():
    cut = depth(MOBILE, {"stage4": 1})
    assert cut.spec.by_name["last"].inputs == ("stage4_1_project_norm",)
    assert [n.name for n in cut.spec.blocks["stage4_3"]] == ["last", "last_norm", "last_act"]
    assert cut.spec.output_shape == (10,)
    by_two = drop_blocks(MOBILE, ["stage4_2", "stage4_3"])
    assert by_two.spec == cut.spec == drop_blocks(MOBILE, ["stage4_3", "stage4_2", "stage4_2"]).spec


def test_depth_and_width_compose():
    outer = depth(RESNET20, {"stage2": 1, "stage3": 2})
    inner = width(outer.spec, 0.5, random(0))
    both = outer.compose(inner)
    params = start(RESNET20)
    taken = inner.take(outer.take(params))
    assert all(np.array_equal(value, taken[name]) for name, value in both.take(params).items())
    other = width(RESNET20, 0.5, random(0))
    swapped = other.compose(depth(other.spec, {"stage2": 1, "stage3": 2}))
    assert swapped.spec == both.spec
    for name, axes in both.index.items():
        assert all(map(np.array_equal, map(_ids, axes), map(_ids, swapped.index[name])))


def _ids(axis):
    return np.r_[axis]


@pytest.mark.parametrize("spec", [RESNET18, MOBILE], ids=["resnet18", "mobilenet"])
def test_engines_train_shallow_models(engine, spec):
    cut = depth(spec, 1) if spec is RESNET18 else depth(spec, {"stage3": 4, "stage4": 1})
    session = opened(engine, cut.spec, cut.take(start(spec)), batch_size=4)
    assert np.isfinite([session.step(*batch(cut.spec, 4)) for _ in range(2)]).all()


def test_units_that_change_the_shape_are_refused():
    with pytest.raises(
        ValueError,
        match=r"'stage3_1' cannot be dropped: .* it turns \(128, 4, 4\) into \(256, 2, 2\)",
    ):
        drop_blocks(RESNET18, ["stage3_1"])
    with pytest.raises(ValueError, match="'stage3_4' cannot be dropped: it must keep the shape"):
        depth(MOBILE, {"stage3": 3})  # from 40 to 48 channels
    with pytest.raises(ValueError, match="'stage3' cannot be dropped"):
        drop_blocks(vgg11((3, 32, 32), 10), ["stage3"])


def test_the_output_cannot_go():
    spec = replace(TWO, nodes=TWO.nodes[:2])
    with pytest.raises(ValueError, match=r"'two' cannot be dropped: .* gives the output"):
        drop_blocks(spec, ["two"])
    assert drop_blocks(TWO, ["one", "two"]).spec.nodes == (replace(TWO.nodes[2], inputs=(INPUT,)),)


def test_blocks_with_several_ends_are_refused():
    nodes = (
        Node("a", Linear(4), (INPUT,), "one"),
        Node("b", Linear(4), ("a",), "two"),
        Node("c", Linear(4), ("b",), "two"),
        Node("sum", Add(), ("b", "c"), "three"),
        Node("d", Linear(4), ("sum",), "four"),
        Node("e", Linear(4), ("a",), "four"),
        Node("out", Add(), ("d", "e"), "five"),
    )
    spec = ModelSpec((4,), nodes)
    with pytest.raises(ValueError, match=r"'two' cannot be dropped: .* reads a and gives b, c"):
        drop_blocks(spec, ["two"])
    with pytest.raises(
        ValueError, match=r"'four' cannot be dropped: .* reads a, sum and gives d, e"
    ):
        drop_blocks(spec, ["four"])


def test_a_shortcut_from_elsewhere_makes_no_unit():
    """The sum of what the block reads, but a layer of the block is read after it too."""
    nodes = (
        Node("conv", Conv2d(2, 1), (INPUT,), "one"),
        Node("sum", Add(), ("conv", INPUT), "one"),
        Node("wide", Conv2d(2, 1), ("conv",), "one"),
        Node("both", Add(), ("sum", "wide"), "one"),
        Node("more", Conv2d(3, 1), ("both",), "one"),
        Node("out", Conv2d(3, 1), ("more",), "two"),
    )
    with pytest.raises(ValueError, match="'one' cannot be dropped: it must keep the shape"):
        drop_blocks(ModelSpec((2, 3, 3), nodes), ["one"])


def test_unknown_names_and_counts_are_refused():
    with pytest.raises(ValueError, match="no block 'stage9' to drop; there are stem, stage1_1"):
        drop_blocks(RESNET18, ["stage9"])
    with pytest.raises(ValueError, match="no stage 'stem' to shorten; there are stage1, stage2"):
        depth(RESNET18, {"stem": 1})
    with pytest.raises(ValueError, match="a stage keeps 1 unit or more, got 0 of 'stage1'"):
        depth(RESNET18, 0)
    with pytest.raises(ValueError, match=r'named STAGE_1, .*, got stem, .* with blocks="unit"'):
        depth(resnet18((3, 8, 8), 10), 1)
