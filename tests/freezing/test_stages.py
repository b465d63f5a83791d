"""Stages: what clients hold while a part trains, the merge, and the devices that can."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import start

from fedlean.core import ClientUpdate, SubModel
from fedlean.freezing.stages import deadline, merge_stage, module_params, stage, stage_model
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.submodels.parts import parts

WHOLE = resnet8((1, 8, 8), 3, norm="batch")
PARTS = parts(WHOLE)
FIRST, SECOND, LAST = (stage(WHOLE, PARTS, number) for number in range(3))
PARAMS = start(WHOLE)


def test_stages_by_hand():
    """ResNet-8: the second stage lacks stage3, for which a convolution to 64 channels stands in."""
    assert [one.name for one in (FIRST, SECOND, LAST)] == ["stage1", "stage2", "stage3"]
    assert [one.number for one in (FIRST, SECOND, LAST)] == [0, 1, 2]
    assert FIRST.frozen == frozenset() and FIRST.own == PARTS[0].tensors
    assert SECOND.frozen == PARTS[0].tensors and "stem_norm.running_mean" in SECOND.frozen
    assert LAST.frozen == PARTS[0].tensors | PARTS[1].tensors
    assert SECOND.module == {
        "surrogate_stage3.weight",
        "surrogate_fc.weight",
        "surrogate_fc.bias",
    }
    assert FIRST.module == SECOND.module | {"surrogate_stage2.weight"}
    assert LAST.module == frozenset() and LAST.spec == WHOLE
    convs = {f"stage2_1_{layer}.weight" for layer in ("conv1", "conv2", "down")}
    norms = [f"stage2_1_{norm}" for norm in ("norm1", "norm2", "down_norm")]
    assert SECOND.own_params == convs | {
        f"{n}.{kind}" for n in norms for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("one", [FIRST, SECOND, LAST], ids=lambda one: one.name)
def test_a_stage_trains_its_part_and_its_module_and_freezes_the_rest(one):
    groups = (one.frozen, one.own, one.module)
    assert sum(map(len, groups)) == len(one.spec.tensor_shapes)
    assert frozenset().union(*groups) == one.spec.tensor_shapes.keys()


def test_the_prefix_and_the_linear_layer_can_be_named():
    named = stage(WHOLE, PARTS, 1, prefix="own", fc="fc", norm=True)
    assert named.module == {
        *("own_stage3.weight", "own_stage3_norm.weight", "own_stage3_norm.bias"),
        *("fc.weight", "fc.bias"),
    }


def test_values_of_a_module_are_drawn_and_those_of_the_model_are_its_own():
    extra = module_params(SECOND, 5, "pytorch")
    drawn = init_params(SECOND.spec, 5, "pytorch")
    assert extra.keys() == SECOND.module
    assert all(extra[name].tobytes() == drawn[name].tobytes() for name in extra)
    model = stage_model(SECOND, PARAMS, extra)
    assert model.spec == SECOND.spec and list(model.params) == list(SECOND.spec.tensor_shapes)
    assert all(
        model.params[name] is (extra[name] if name in extra else PARAMS[name])
        for name in model.params
    )


def test_the_merge_leaves_what_no_answer_trains_the_same_arrays():
    """Of 30 and 10 examples: (30·1 + 10·5) / 40 = 2."""
    extra = module_params(SECOND, 5, "pytorch")
    trained = SECOND.own | SECOND.module
    updates = [
        ClientUpdate(
            client,
            examples,
            {name: np.full(SECOND.spec.tensor_shapes[name], value) for name in trained},
            SubModel(frozen=SECOND.frozen),
        )
        for client, examples, value in [(0, 30, np.float32(1)), (1, 10, np.float32(5))]
    ]
    params, others = merge_stage(WHOLE, PARAMS, extra, updates)
    assert params.keys() == PARAMS.keys() and others.keys() == extra.keys()
    assert all(params[name] is PARAMS[name] for name in PARAMS.keys() - trained)
    for name in trained - WHOLE.variances.keys():
        value = others[name] if name in others else params[name]
        np.testing.assert_array_equal(value, np.full_like(value, 2.0))
    # pooled: the mean of the variances, and that of the means around theirs, (30·1 + 10·9) / 40
    np.testing.assert_array_equal(params["stage2_1_norm1.running_var"], np.full(32, 2.0 + 3.0))
    assert not any(params[name].flags.writeable for name in PARAMS.keys() & trained)
    assert all(PARAMS[name].flags.writeable for name in PARAMS)  # what was given is left as it is
    alone, _ = merge_stage(WHOLE, PARAMS, extra, [])
    assert all(alone[name] is PARAMS[name] for name in PARAMS)


@pytest.mark.parametrize(
    ("count", "rounds", "expected"),
    [(3, 9, [3, 6, 9]), (3, 10, [3, 6, 10]), (4, 2, [0, 1, 1, 2]), (1, 7, [7])],
)
def test_deadlines_share_the_rounds(count, rounds, expected):
    assert [deadline(number, count, rounds) for number in range(count)] == expected
