"""NTK-SAP's scores and trace: by hand, against autograd and the exact Jacobian; conservation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlean.engine.open import open_engine
from fedlean.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    GroupNorm,
    Hardswish,
    Linear,
    MaxPool2d,
    ReLU,
)
from fedlean.models.torch import to_torch
from fedlean.pruning.ntk import (
    difference_gradient,
    draw_weights,
    gaussian_inputs,
    layer_sums,
    ntk_scores,
)
from fedlean.spec import sequential

ENGINE = open_engine("torch", 1)
LINE = sequential((2,), [("fc", Linear(1, bias=False))])
MLP = sequential(
    (6,),
    [
        ("fc1", Linear(8)),
        ("relu1", ReLU()),
        ("fc2", Linear(7)),
        ("relu2", ReLU()),
        ("fc3", Linear(3)),
    ],
)
CNN = sequential(
    (2, 8, 8),
    [
        ("conv1", Conv2d(4, 3, padding=1)),
        ("relu1", ReLU()),
        ("pool1", MaxPool2d(2)),
        ("conv2", Conv2d(6, 3, stride=2, padding=1, groups=2)),
        ("relu2", ReLU()),
        ("pool2", AvgPool2d(2)),
        ("flat", Flatten()),
        ("fc", Linear(3)),
    ],
)
NORMS = sequential(
    (2, 6, 6),
    [
        ("conv1", Conv2d(4, 3, bias=False)),
        ("bn", BatchNorm()),
        ("swish", Hardswish()),
        ("conv2", Conv2d(4, 3)),
        ("gn", GroupNorm(groups=2)),
        ("flat", Flatten()),
        ("fc", Linear(3)),
    ],
)


def masks_of(spec, seed: int = 3, density: float = 0.6):
    rng = np.random.default_rng(seed)
    return {name: rng.random(spec.param_shapes[name]) < density for name in spec.prunable}


def inputs(spec, examples: int = 8, draws: int = 1, seed: int = 4):
    return list(gaussian_inputs(spec, examples, draws, seed))


def norm(scores) -> float:
    return float(
        np.sqrt(sum(np.sum(np.square(values, dtype=np.float64)) for values in scores.values()))
    )


def far(scores, expected) -> float:
    """‖scores - expected‖ / ‖expected‖ over all tensors."""
    return norm({name: scores[name] - expected[name] for name in expected}) / norm(expected)


def in_torch(spec, params, masks, x):
    """‖f(θ ⊙ m) - f((θ + Δθ) ⊙ m)‖² of both `params` in float64, and its gradient by m."""
    module = to_torch(spec).double().eval()
    m = {n: torch.tensor(masks[n], dtype=torch.float64, requires_grad=True) for n in spec.prunable}

    def f(values):
        held = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
        held |= {n: held[n] * m[n] for n in m}
        return torch.func.functional_call(module, held, (torch.tensor(x, dtype=torch.float64),))

    square = (f(params[0]) - f(params[1])).square().sum()
    return dict(zip(m, torch.autograd.grad(square, list(m.values())), strict=True)), float(
        square.detach()
    )


def exact_trace(spec, params, x) -> float:
    """‖∇_θ f(X; θ)‖_F² of the prunable weights, by torch's Jacobian in float64."""
    module = to_torch(spec).double().eval()
    held = {n: torch.tensor(v, dtype=torch.float64) for n, v in params.items()}
    weights = {n: held[n] for n in spec.prunable}

    def f(w):
        return torch.func.functional_call(module, {**held, **w}, (torch.tensor(x).double(),))

    return sum(float(j.square().sum()) for j in torch.func.jacrev(f)(weights).values())


def test_by_hand() -> None:
    """f = w·x, x = (1, 2): θ = (1, 2) gives 5, θ + Δθ = (1.5, 1) gives 3.5, so r = 1.5.

    s_j = 2r·x_j·(θ_j - (θ + Δθ)_j) = 3·1·(-0.5), 3·2·1.
    """
    start, moved = ({"fc.weight": np.array([w], np.float32)} for w in ((1, 2), (1.5, 1)))
    x = np.array([[1, 2]], np.float32)
    scores, square = difference_gradient(ENGINE, LINE, {}, x, start, moved)
    assert square == 2.25
    assert scores["fc.weight"].tolist() == [[-1.5, 6.0]]
    # without w_0: f = 4 and 2, r = 2, s_1 = 4·2·1
    masks = {"fc.weight": np.array([[False, True]])}
    scores, square = difference_gradient(ENGINE, LINE, masks, x, start, moved)
    assert square == 4 and scores["fc.weight"].tolist() == [[0.0, 8.0]]


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("spec", [MLP, CNN, NORMS], ids=["mlp", "cnn", "norms"])
def test_scores_are_autograds_on_the_mask(spec, engine) -> None:
    if engine == "native":
        pytest.importorskip("fedlean._native")
    masks, (x,) = masks_of(spec), inputs(spec)
    params = draw_weights(spec, 5, 0, 0.1)
    expected, expected_square = in_torch(spec, params, masks, x)
    scores, square = difference_gradient(
        open_engine(engine, 1), spec, masks, x, *params, batch_size=3
    )
    assert square == pytest.approx(expected_square, rel=1e-4)
    expected = {name: np.where(masks[name], value.numpy(), 0) for name, value in expected.items()}
    assert far(scores, expected) < 1e-4
    assert all(not scores[name][~masks[name]].any() for name in masks)


def test_scores_sum_the_draws_in_units_of_the_trace() -> None:
    batches = inputs(MLP, draws=2)
    found = ntk_scores(ENGINE, MLP, {}, batches, 5, epsilon=0.1)
    each = [
        difference_gradient(ENGINE, MLP, {}, x, *draw_weights(MLP, 5, draw, 0.1))
        for draw, x in enumerate(batches)
    ]
    for name, values in found.scores.items():
        np.testing.assert_allclose(values, (each[0][0][name] + each[1][0][name]) / 0.1**2)
        np.testing.assert_allclose(found.mean()[name], values / 16, rtol=1e-6)
    assert found.trace == pytest.approx((each[0][1] + each[1][1]) / 0.1**2)
    assert found.examples == 16
    weights = [draw_weights(MLP, 5, draw, 0.1)[0]["fc1.weight"] for draw in (0, 1)]
    assert not np.array_equal(*weights), "re-initialised for every draw"


def test_weights_move_by_epsilon_and_nothing_else_does() -> None:
    start, moved = draw_weights(NORMS, 1, 0, 0.01)
    steps = np.concatenate([(moved[name] - start[name]).ravel() for name in NORMS.prunable])
    assert np.std(steps) == pytest.approx(0.01, rel=0.1) and abs(np.mean(steps)) < 0.002
    for name in start.keys() - set(NORMS.prunable):
        assert np.array_equal(start[name], moved[name])
        assert name.endswith(("weight", "var")) or not start[name].any(), "biases are 0"


def test_expected_trace_of_a_linear_model() -> None:
    """f(θ) - f(θ + Δθ) = -Δθ·x: the estimate is ‖Δθ‖²/ε² for x = 1, 0, ..., of mean C·‖X‖².

    For X = I of 6 inputs and C = 5 outputs each draw is χ² of 30, of mean 30 and variance 60.
    """
    spec = sequential((6,), [("fc", Linear(5))])
    draws = 400
    found = ntk_scores(ENGINE, spec, {}, [np.eye(6, dtype=np.float32)] * draws, 2)
    one = ntk_scores(ENGINE, spec, {}, [np.eye(6, dtype=np.float32)], 2)
    start, moved = draw_weights(spec, 2, 0, 0.01)
    step = (moved["fc.weight"] - start["fc.weight"]).astype(np.float64)
    assert one.trace == pytest.approx(np.sum(step**2) / 0.01**2, rel=1e-4)
    np.testing.assert_allclose(
        one.scores["fc.weight"], 2 * step**2 / 0.01**2, rtol=2e-3, atol=1e-3 * one.trace / 30
    )
    assert found.trace / draws == pytest.approx(30, abs=4 * (60 / draws) ** 0.5)


@pytest.mark.parametrize("spec", [MLP, CNN], ids=["mlp", "cnn"])
def test_trace_is_that_of_the_exact_jacobian(spec) -> None:
    draws = 150
    batches = inputs(spec, draws=draws)
    found = ntk_scores(ENGINE, spec, {}, batches, 6)
    exact = sum(
        exact_trace(spec, draw_weights(spec, 6, draw, 0.01)[0], x) for draw, x in enumerate(batches)
    )
    assert found.trace == pytest.approx(exact, rel=0.12)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("spec", [MLP, CNN], ids=["mlp", "cnn"])
def test_every_layers_scores_add_up_to_twice_the_trace(spec, masked) -> None:
    masks = masks_of(spec) if masked else {}
    found = ntk_scores(ENGINE, spec, masks, inputs(spec, draws=2), 1)
    assert found.trace > 0
    sums = layer_sums(found.scores)
    assert set(sums) == set(spec.prunable)
    for name, total in sums.items():
        assert total == pytest.approx(2 * found.trace, rel=2e-4), name


def test_the_law_needs_layers_without_memory_of_size() -> None:
    """A norm behind conv2 makes f independent of conv2's size: its scores add up to nothing."""
    found = ntk_scores(ENGINE, NORMS, {}, inputs(NORMS, 64), 1)
    sums = layer_sums(found.scores)
    assert abs(sums["conv2.weight"]) < 0.02 * found.trace
    assert sums["fc.weight"] == pytest.approx(2 * found.trace, rel=2e-4)


@pytest.mark.parametrize("spec", [MLP, CNN, NORMS], ids=["mlp", "cnn", "norms"])
def test_scores_of_clients_add_up_to_those_of_their_pooled_examples(spec) -> None:
    """Σ n_c/n of the means that clients send is the mean over all, and so is the trace."""
    masks, pooled = masks_of(spec), inputs(spec, examples=20, draws=2)
    whole = ntk_scores(ENGINE, spec, masks, pooled, 9)
    cuts = [slice(0, 3), slice(3, 11), slice(11, 20)]
    parts = [ntk_scores(ENGINE, spec, masks, [x[cut] for x in pooled], 9) for cut in cuts]
    assert sum(part.trace for part in parts) == pytest.approx(whole.trace, rel=1e-5)
    mean = {
        name: sum(part.examples / 40 * part.mean()[name].astype(np.float64) for part in parts)
        for name in spec.prunable
    }
    assert far(mean, {n: values / 40 for n, values in whole.scores.items()}) <= 1e-5
    # what does not add up is absolute values, so clients keep the signs
    unsigned = {name: sum(abs(part.scores[name]) for part in parts) for name in spec.prunable}
    assert far(unsigned, {n: abs(values) for n, values in whole.scores.items()}) > 0.01


def test_batches_change_nothing_and_seeds_do() -> None:
    x = inputs(MLP, examples=9)
    whole = ntk_scores(ENGINE, MLP, {}, x, 1)
    assert far(ntk_scores(ENGINE, MLP, {}, x, 1, batch_size=4).scores, whole.scores) < 1e-5
    again = ntk_scores(ENGINE, MLP, {}, x, 1)
    assert all(np.array_equal(again.scores[name], whole.scores[name]) for name in again.scores)
    assert far(ntk_scores(ENGINE, MLP, {}, x, 2).scores, whole.scores) > 0.1
    he = ntk_scores(ENGINE, MLP, {}, x, 1, init="he")
    assert far(he.scores, whole.scores) > 0.1


def test_gaussian_inputs() -> None:
    first, second = gaussian_inputs(CNN, 300, 2, 7)
    assert first.shape == (300, 2, 8, 8) and first.dtype == np.float32
    assert abs(first.mean()) < 0.02 and first.std() == pytest.approx(1, abs=0.02)
    assert not np.array_equal(first, second)
    assert np.array_equal(next(gaussian_inputs(CNN, 300, 1, 7)), first)


def test_refusals() -> None:
    for epsilon in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="epsilon must be finite and positive"):
            ntk_scores(ENGINE, MLP, {}, inputs(MLP), 0, epsilon=epsilon)
    with pytest.raises(ValueError, match="inputs holds no examples"):
        ntk_scores(ENGINE, MLP, {}, [], 0)
