"""SynFlow: R and its scores by hand, the conservation laws, and that no layer collapses."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from federation import SPEC, params, same

from fedlean.layers import AvgPool2d, Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedlean.models.initialise import init_params
from fedlean.models.lenet300 import lenet300
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet18
from fedlean.pruning.global_top import count_at
from fedlean.pruning.linearised import magnitudes
from fedlean.pruning.synaptic_flow import prune_by_flow, synaptic_flow
from fedlean.spec import sequential
from fedlean.tree import kept_counts, num_kept

TWO_LAYERS = sequential((2,), [("fc1", Linear(2)), ("relu", ReLU()), ("fc2", Linear(1))])
CONV = sequential(
    (2, 9, 9),
    [
        ("conv1", Conv2d(6, 3, stride=2, padding=1)),
        ("relu1", ReLU()),
        ("pool1", MaxPool2d(2, stride=1, padding=1)),
        ("conv2", Conv2d(8, 3, padding=1, groups=2)),
        ("relu2", ReLU()),
        ("pool2", AvgPool2d(2)),
        ("flat", Flatten()),
        ("fc", Linear(4)),
    ],
)
MLP = lenet300((1, 8, 8), 10)
DEEP = sequential(
    (1, 8, 8),
    [("flat", Flatten())]
    + [layer for i in range(6) for layer in ((f"fc{i}", Linear(20)), (f"relu{i}", ReLU()))]
    + [("out", Linear(3))],
)


def two_layers(first, second):
    """Parameters whose biases would change every figure if they counted."""
    return {
        "fc1.weight": np.array(first, np.float32),
        "fc1.bias": np.full(2, 100, np.float32),
        "fc2.weight": np.array(second, np.float32),
        "fc2.bias": np.full(1, -100, np.float32),
    }


def pruned(spec, start, masks):
    held = magnitudes(spec, start)
    return {**held, **{name: held[name] * mask for name, mask in masks.items()}}


def test_flow_and_scores_by_hand() -> None:
    """|W1| 1 = (3, 7), R = 5·3 + 6·7 = 57; W2 scores 5·3, 6·7 and W1 5·(1, 2), 6·(3, 4)."""
    start = two_layers([[1, -2], [3, 4]], [[5, -6]])
    flow, scores = synaptic_flow(TWO_LAYERS, magnitudes(TWO_LAYERS, start))
    assert flow == 57
    assert scores["fc1.weight"].tolist() == [[5, 10], [18, 24]]
    assert scores["fc2.weight"].tolist() == [[15, 42]]


def test_algorithm_1_by_hand() -> None:
    """Six weights to 2 = floor(6 / 3).

    In one step the scores are W1 (3, 3, 2, 2) and W2 (6, 4): both of W2 stay, W1 dies.  In two, 3 =
    floor(6 · 3^-½) stay first, (6, 4) and the first 3; then only W2's first has a path: 3, 0 and 3.
    """
    start = two_layers([[1, 1], [1, 1]], [[3, 2]])
    once = prune_by_flow(TWO_LAYERS, start, 1 / 3, 1)
    assert once["fc1.weight"].tolist() == [[False, False], [False, False]]
    assert once["fc2.weight"].tolist() == [[True, True]]
    twice = prune_by_flow(TWO_LAYERS, start, 1 / 3, 2)
    assert twice["fc1.weight"].tolist() == [[True, False], [False, False]]
    assert twice["fc2.weight"].tolist() == [[True, False]]


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("spec", [SPEC, CONV, MLP, DEEP], ids=["spec", "conv", "mlp", "deep"])
def test_every_layer_of_a_chain_carries_the_whole_flow(spec, density) -> None:
    """Layer-wise conservation, of the whole model and of the pruned one."""
    start = init_params(spec, 3)
    held = pruned(spec, start, prune_by_flow(spec, start, density, 20))
    flow, scores = synaptic_flow(spec, held)
    assert flow > 0 and set(scores) == set(spec.prunable)
    for name, values in scores.items():
        assert (values >= 0).all()
        assert values.sum() == pytest.approx(flow, rel=1e-10), name


def test_every_hidden_unit_passes_on_what_it_gets() -> None:
    """Neuron-wise conservation: scores into a unit and out of it add up to the same."""
    start = init_params(MLP, 3)
    held = pruned(MLP, start, prune_by_flow(MLP, start, 0.1, 10))
    _, scores = synaptic_flow(MLP, held)
    for before, after in (("fc1", "fc2"), ("fc2", "fc3")):
        into, out = scores[f"{before}.weight"].sum(1), scores[f"{after}.weight"].sum(0)
        np.testing.assert_allclose(into, out, rtol=1e-10, atol=1e-12 * out.max())


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(
    ("model", "head"), [(resnet18, "fc.weight"), (mobilenetv3_small, "fc2.weight")]
)
def test_stem_and_head_of_a_graph_carry_the_whole_flow(model, head, norm) -> None:
    """Residual sums, gates, norms and strides keep the flow; what is not prunable has no score."""
    spec = model((3, 16, 16), 5, norm=norm)
    flow, scores = synaptic_flow(spec, magnitudes(spec, init_params(spec, 0)))
    assert set(scores) == set(spec.prunable)
    for name in ("stem.weight", head):
        assert scores[name].sum() == pytest.approx(flow, rel=1e-9), name
    assert all(values.any() for values in scores.values()), "gates have paths to the output"


@pytest.mark.parametrize(("spec", "layers"), [(SPEC, 3), (MLP, 3), (DEEP, 7)])
def test_one_weight_per_layer_still_is_a_path(spec, layers) -> None:
    """As few weights as layers: one in each, in a row; in one step, layers collapse."""
    start = init_params(spec, 0)
    total = sum(prod(spec.param_shapes[name]) for name in spec.prunable)
    density = (layers + 0.5) / total
    masks = prune_by_flow(spec, start, density, 100)
    assert list(kept_counts(masks).values()) == [1] * layers
    flow, _ = synaptic_flow(spec, pruned(spec, start, masks))
    assert flow > 0
    at_once = prune_by_flow(spec, start, density, 1)
    assert 0 in kept_counts(at_once).values()


def test_scale_of_a_layer_changes_nothing_and_float32_is_no_limit() -> None:
    """Scores of all layers scale together; R is 2^300 times as large, float32 ends at 2^128."""
    start = init_params(MLP, 1)
    scaled = {
        name: value * np.float32(2.0**100) if name in MLP.prunable else value
        for name, value in start.items()
    }
    assert synaptic_flow(MLP, magnitudes(MLP, scaled))[0] > 2.0**299
    assert same(prune_by_flow(MLP, scaled, 0.1, 10), prune_by_flow(MLP, start, 0.1, 10))


def test_counts_follow_the_schedule_and_pruned_weights_stay_pruned() -> None:
    """More steps to the same density, and steps that prune nothing more, keep the count."""
    start, before = params(), None
    for step in range(1, 5):  # the first steps of the same schedule, by its definition
        masks = prune_by_flow(SPEC, start, 0.1 ** (step / 4), step)
        assert num_kept(masks) == count_at(0.1 ** (step / 4), SPEC)
        if before is not None:
            assert not any((masks[name] & ~before[name]).any() for name in masks)
        before = masks
    assert all(mask.all() for mask in prune_by_flow(SPEC, start, 1.0, 3).values())


def test_without_flow_it_says_so() -> None:
    dead = {name: np.zeros_like(value) for name, value in params().items()}
    with pytest.raises(ValueError, match=r"flow is 0\.0 with 840 weights"):
        prune_by_flow(SPEC, dead, 0.5, 2)
    with pytest.raises(ValueError, match="keeps none"):
        prune_by_flow(SPEC, params(), 1e-6, 2)
