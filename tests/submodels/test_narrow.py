"""A narrower model for its own sake: its channels, and what it begins with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from federation import SPEC, params, same, server

from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8, resnet20
from fedlean.submodels.narrow import first_params, narrow, narrow_after
from fedlean.submodels.parts import parts
from fedlean.submodels.width import width


def test_narrow_is_a_prefix_without_a_scaler():
    cut = narrow(SPEC, 0.5)
    assert cut.spec == width(SPEC, 0.5).spec and cut.index == width(SPEC, 0.5).index
    assert {n: node.layer for n, node in cut.spec.by_name.items()}.keys() == SPEC.by_name.keys()
    assert narrow(SPEC, 1.0).spec is SPEC


@pytest.mark.parametrize("init", ["pytorch", "he"])
def test_a_narrow_model_draws_its_own_first_weights(init: str):
    """By a slice's fan-in: fc2 of 6 instead of 12 inputs has weights up to 1/√6, not 1/√12."""
    cut = narrow(SPEC, 0.5)
    drawn = first_params(cut, params(), replace(server(), init=init))
    assert same(dict(drawn), init_params(cut.spec, server().seed, init))
    assert {n: v.shape for n, v in drawn.items()} == dict(cut.spec.tensor_shapes)
    if init == "pytorch":
        assert 12**-0.5 < np.abs(drawn["fc2.weight"]).max() <= 6**-0.5


def test_of_a_given_model_it_is_a_slice():
    cut = narrow(SPEC, 0.5)
    taken = first_params(cut, params(), replace(server(), given=True))
    assert np.array_equal(taken["fc1.weight"], params()["fc1.weight"][:6, :32])
    assert np.array_equal(taken["fc2.weight"], params()["fc2.weight"][:, :6])
    assert taken.keys() == cut.spec.tensor_shapes.keys()


@pytest.mark.parametrize("given", [False, True])
def test_the_whole_width_begins_as_the_run_does(given: bool):
    held = params()
    assert first_params(narrow(SPEC, 1.0), held, replace(server(), given=given)) is held


IMAGES = resnet8((1, 8, 8), 10, norm="batch")


def test_a_narrow_head_by_hand():
    """The first part whole; its output is read whole by a head with a quarter of its channels."""
    cut = narrow_after(IMAGES, parts(IMAGES)[0].layers, 0.25)
    shapes = cut.spec.param_shapes
    assert shapes["stage1_1_conv2.weight"] == (16, 16, 3, 3)
    assert shapes["stage2_1_conv1.weight"] == (8, 16, 3, 3)
    assert shapes["stage2_1_conv2.weight"] == (8, 8, 3, 3)
    assert shapes["stage2_1_down.weight"] == (8, 16, 1, 1)
    assert shapes["stage3_1_conv1.weight"] == (16, 8, 3, 3)
    assert shapes["fc.weight"] == (10, 16)
    assert cut.index["stage3_1_conv1.weight"][:2] == (slice(0, 16), slice(0, 8))


def test_channels_that_a_head_shares_with_what_is_full_stay_whole():
    """Units of one stage are added: only what is inside the later ones is narrow."""
    spec = resnet20((1, 8, 8), 10, norm="batch", blocks="unit")
    shapes = narrow_after(spec, parts(spec)[0].layers, 0.5).spec.param_shapes
    assert shapes["stage1_2_conv1.weight"] == (8, 16, 3, 3)
    assert shapes["stage1_2_conv2.weight"] == (16, 8, 3, 3)
    assert shapes["stage2_1_conv1.weight"] == (16, 16, 3, 3)


def test_counts_are_multiples_of_the_groups():
    spec = resnet8((1, 8, 8), 10)  # 4 groups: ceil(0.3 * 32) = 10 becomes 12
    cut = narrow_after(spec, parts(spec)[0].layers, 0.3)
    assert cut.spec.shapes["stage2_1_relu2"][0] == 12
