"""The penalty, its coefficient and its proximal operator by hand."""

from __future__ import annotations

import numpy as np
import pytest
from federation import SPEC
from hypothesis import given
from hypothesis import strategies as st

from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.pruning.channels import channels
from fedlean.pruning.group_lasso import coefficient, group_axes, penalty, shrunk

W = {"a": np.array([[3, 0], [4, 12]], np.float32)}  # rows 3 and √160, columns 5 and 12


def test_penalty_by_hand():
    assert penalty(W, {"a": (0,)}) == pytest.approx(3 + 160**0.5)
    assert penalty(W, {"a": (1,)}) == pytest.approx(5 + 12)
    assert penalty(W, {"a": (0, 1)}) == pytest.approx(20 + 160**0.5)
    assert penalty(W, {"a": ()}) == 0
    conv = {"c": np.full((2, 3, 2, 2), 0.5, np.float32)}  # rows √(12/4), columns √(8/4)
    assert penalty(conv, {"c": (0, 1)}) == pytest.approx(2 * 3**0.5 + 3 * 2**0.5)


def test_coefficient_by_hand():
    """0.2 of the whole: λ·10 = 0.5 beside a loss of 2; 0.75 of it: λ·10 = 6."""
    assert coefficient(0.2, 2.0, 10.0) == pytest.approx(0.05)
    assert coefficient(0.75, 2.0, 10.0) == pytest.approx(0.6)
    assert coefficient(0.0, 2.0, 10.0) == 0
    assert coefficient(0.5, 2.0, 0.0) == 0, "nothing to penalise"
    with pytest.raises(ValueError, match="ratio"):
        coefficient(1.0, 2.0, 10.0)


def test_shrinking_by_hand():
    """By 4: columns of 5 and 12 become 1 and 8; a row of 3 becomes 0, then columns see that."""
    columns = shrunk(W, {"a": (1,)}, 4.0)["a"]
    assert columns == pytest.approx(np.array([[3 / 5, 0], [4 / 5, 8]]))
    rows = shrunk(W, {"a": (0,)}, 4.0)["a"]
    left = 1 - 4 / 160**0.5
    assert rows == pytest.approx(np.array([[0, 0], [4 * left, 12 * left]]))
    both = shrunk(W, {"a": (0, 1)}, 4.0)["a"]
    assert both == pytest.approx(np.array([[0, 0], [0, 12 * left - 4]]))  # 4·left is below 4
    assert np.array_equal(W["a"], [[3, 0], [4, 12]]), "the argument is left alone"
    assert shrunk(W, {"a": (0, 1)}, 0.0)["a"].tolist() == W["a"].tolist()
    assert not shrunk({"a": np.zeros((2, 2), np.float32)}, {"a": (0, 1)}, 1.0)["a"].any()


@given(
    st.sampled_from([(3, 4), (2, 3, 2, 2)]),
    st.sampled_from([0, 1]),
    st.floats(0.01, 3.0),
    st.integers(0, 2**32 - 1),
)
def test_it_is_the_proximal_operator(shape, axis, amount, seed):
    """Of ½‖w - v‖² + amount·Σ‖w_g‖: no step from the result makes that smaller."""
    rng = np.random.default_rng(seed)
    v = {"a": rng.normal(size=shape).astype(np.float32)}
    found = shrunk(v, {"a": (axis,)}, amount)["a"]

    def objective(w):
        pull = 0.5 * np.sum((w - v["a"].astype(np.float64)) ** 2)
        return pull + amount * penalty({"a": w}, {"a": (axis,)})

    best = objective(found.astype(np.float64))
    for _ in range(20):
        step = rng.normal(size=shape) * rng.choice([1e-2, 1e-1, 1])
        assert objective(found + step) >= best - 1e-5
    assert objective(np.zeros(shape)) >= best - 1e-5


def test_above_its_length_it_is_the_gradient_step():
    """w - ηλ·w/‖w‖, the gradient of λ‖w‖ times η."""
    w = {"a": np.array([[3, 4]], np.float32)}
    assert shrunk(w, {"a": (0,)}, 0.1)["a"] == pytest.approx(np.array([[3 - 0.06, 4 - 0.08]]))


def test_groups_leave_out_inputs_outputs_and_grouped_convolutions():
    axes = group_axes(SPEC, channels(SPEC))
    assert axes == {"conv.weight": (0,), "fc1.weight": (0, 1), "fc2.weight": (1,)}
    mobile = mobilenetv3_small((3, 32, 32), 10)
    axes = group_axes(mobile, channels(mobile))
    depthwise = {f"{n.name}.weight" for n in mobile.weighted if not n.prunable}
    assert depthwise and not depthwise & axes.keys()
    assert axes["stem.weight"] == (0,)
    heads = [name for name, own in axes.items() if own == (1,)]
    assert len(heads) == 1, "the classifier's outputs are classes"
