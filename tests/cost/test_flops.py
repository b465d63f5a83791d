"""FLOPs by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from fedlean.core import Work
from fedlean.cost.flops import (
    forward_flops,
    importance_share,
    layer_flops,
    positions,
    step_flops,
    weight_size,
    work_flops,
)
from fedlean.engine.pieces import Piece, sweep
from fedlean.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedlean.models.conv2 import conv2
from fedlean.spec import sequential

B = 20
MLP = sequential((40,), [("fc1", Linear(30)), ("relu", ReLU()), ("fc2", Linear(10))])


def test_linear_by_hand():
    """Second layer of an MLP, 30 -> 10: 2·30·10·B = 12000 each way."""
    flops = layer_flops(MLP, MLP.by_name["fc2"], {}, B)
    assert (flops.forward, flops.grad_input, flops.grad_weight) == (12000, 12000, 12000)
    assert flops.dense_grad_weight == 12000
    assert flops.step == 36000


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_linear_at_a_density(density):
    """6·d with the kept gradients only, 2 + 4·d with the gradients of all coordinates."""
    size = 30 * 10
    kept = {"fc1.weight": 0, "fc2.weight": round(density * size)}
    assert step_flops(MLP, kept, B) == round(6 * density * size * B)
    first = 2 * 40 * 30 * B  # of the other layer: its dense gradient alone
    expected = round((2 + 4 * density) * size * B) + first
    assert step_flops(MLP, kept, B, importance=True) == expected


@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
def test_first_layer_needs_no_input_gradient(density):
    """4·d, and 2 + 2·d with importance."""
    size = 40 * 30
    kept = {"fc1.weight": round(density * size), "fc2.weight": 0}
    assert layer_flops(MLP, MLP.by_name["fc1"], kept, B).grad_input == 0
    assert step_flops(MLP, kept, B) == round(4 * density * size * B)
    expected = round((2 + 2 * density) * size * B) + 2 * 30 * 10 * B
    assert step_flops(MLP, kept, B, importance=True) == expected


def test_flatten_is_still_the_input():
    spec = sequential((1, 4, 5), [("flat", Flatten()), ("fc", Linear(3))])
    assert step_flops(spec, {}, B) == 4 * 20 * 3 * B


def test_conv_by_hand():
    """3 -> 8 channels, 5x5 kernel, 9x7 image, stride 2, padding 1: 4x3 outputs.

    Then 8 -> 4 in 2 groups, 3x3 kernel: 2x1 outputs, 4·4·9 weights.
    """
    spec = sequential(
        (3, 9, 7),
        [
            ("conv1", Conv2d(8, 5, stride=2, padding=1)),
            ("relu", ReLU()),
            ("conv2", Conv2d(4, 3, groups=2)),
        ],
    )
    first, second = spec.weighted
    assert (weight_size(spec, first), positions(spec, first)) == (8 * 3 * 25, 4 * 3)
    assert (weight_size(spec, second), positions(spec, second)) == (4 * 4 * 9, 2 * 1)
    one, two = 2 * 600 * 12 * B, 2 * 144 * 2 * B
    assert forward_flops(spec, {}, B) == one + two
    assert step_flops(spec, {}, B) == 2 * one + 3 * two
    kept = {"conv1.weight": 60, "conv2.weight": 36}  # 10% and 25%
    assert forward_flops(spec, kept, B) == one // 10 + two // 4
    assert step_flops(spec, kept, B) == 2 * one // 10 + 3 * two // 4
    with_importance = one // 10 + one + 2 * two // 4 + two
    assert step_flops(spec, kept, B, importance=True) == with_importance


def test_biases_pools_and_activations_are_not_counted():
    bare = sequential((1, 8, 8), [("conv", Conv2d(4, 3, bias=False))])
    more = sequential((1, 8, 8), [("conv", Conv2d(4, 3)), ("r", ReLU()), ("pool", MaxPool2d(2))])
    assert step_flops(bare, {}, B) == step_flops(more, {}, B)


def test_dense_importance_costs_nothing_more():
    assert step_flops(MLP, {}, B, importance=True) == step_flops(MLP, {}, B)


def test_conv2_by_hand():
    """Per example and step: 4·conv1 + 6·(conv2 + fc1 + fc2), each weight times its positions."""
    spec = conv2((1, 28, 28), 62)
    conv1, second = 32 * 25 * 28 * 28, 64 * 32 * 25 * 14 * 14
    full = 7 * 7 * 64 * 2048 + 2048 * 62
    assert step_flops(spec, {}, 1) == 4 * conv1 + 6 * (second + full)
    assert spec.num_params == 800 + 32 + 51200 + 64 + 3136 * 2048 + 2048 + 2048 * 62 + 62


def test_work_as_the_paper_counts_it():
    """Half of fc2 kept, 2 steps: (2 + 4·0.5)·300·B a step, not 6·0.5·300·B."""
    kept = {"fc1.weight": 0, "fc2.weight": 150}
    work = Work(2, B, kept=kept)
    first = 2 * 40 * 30 * B
    assert work_flops(MLP, work, dense_gradient=True) == 2 * (4 * 300 * B + first)
    assert work_flops(MLP, work) == 2 * 3 * 300 * B
    forward = Work(forward_examples=B, kept=kept)
    assert work_flops(MLP, forward, dense_gradient=True) == work_flops(MLP, forward)


def test_work_adds_up():
    kept = {name: prod(MLP.param_shapes[name]) // 4 for name in MLP.prunable}
    plain, dense = (step_flops(MLP, kept, B, importance=flag) for flag in (False, True))
    work = Work(steps=5, batch_size=B, importance_steps=2, forward_examples=7, kept=kept)
    assert work_flops(MLP, work) == 3 * plain + 2 * dense + forward_flops(MLP, kept, 7)
    assert work_flops(MLP, Work()) == 0


def test_pieces_take_the_dense_gradients_of_their_rows_by_hand():
    """Half of each layer kept; 12 of 30 rows of fc1 (40 weights each), 5 of 10 of fc2 (30)."""
    kept = {"fc1.weight": 600, "fc2.weight": 150}
    pieces = (Piece("fc1.weight", 3, 12), Piece("fc2.weight", 0, 5), Piece("fc1.bias", 0, 30))
    more = 12 * 40 // 2 + 5 * 30 // 2  # weights that are pruned there
    assert step_flops(MLP, kept, B, importance=pieces) == step_flops(MLP, kept, B) + 2 * more * B
    assert importance_share(MLP, pieces) == (12 * 40 + 5 * 30) / 1500


def test_work_in_pieces_adds_up_to_steps_with_each():
    kept = {name: prod(MLP.param_shapes[name]) // 4 for name in MLP.prunable}
    parts = sweep(MLP, 2000)
    assert len(parts) == 4
    work = Work(steps=5, batch_size=B, importance_steps=3, kept=kept, piece_bytes=2000)
    plain = step_flops(MLP, kept, B)
    each = [step_flops(MLP, kept, B, importance=part) for part in parts]
    assert work_flops(MLP, work) == 2 * plain + sum(each[:3])
    rest = replace(work, first_piece=3)
    assert work_flops(MLP, rest) == 2 * plain + 3 * each[3]
    whole = replace(work, importance_steps=4, steps=4)
    dense = step_flops(MLP, kept, B, importance=True)
    assert work_flops(MLP, whole) - 4 * plain == dense - plain, "a sweep is once everything"
