"""Scores by forward passes alone: by hand, and beside what backpropagation says."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.core import SubModel
from fedlean.data.batches import ClientData
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, Flatten, GroupNorm, Linear, ReLU
from fedlean.pruning.node_perturbation import node_gradient, node_scores, with_biases
from fedlean.pruning.ntk import difference_gradient, draw_weights, gaussian_inputs
from fedlean.spec import sequential

ENGINE = open_engine("torch", 1)
LINE = sequential((2,), [("fc", Linear(1, bias=False))])
DIGITS = sequential(
    (1, 8, 8),
    [
        ("flat", Flatten()),
        ("fc1", Linear(32)),
        ("relu1", ReLU()),
        ("fc2", Linear(24)),
        ("relu2", ReLU()),
        ("fc3", Linear(10)),
    ],
)
CONVS = sequential(
    (2, 4, 4),
    [
        ("conv1", Conv2d(4, 3, padding=1, bias=False)),
        ("norm", GroupNorm(groups=2)),
        ("relu", ReLU()),
        ("conv2", Conv2d(6, 3, stride=2, groups=2)),
        ("flat", Flatten()),
        ("fc", Linear(3)),
    ],
)


class ForwardOnly:
    """An engine that cannot run backward."""

    def __init__(self) -> None:
        self.forwards = 0

    def open_forward(self, *arguments, **settings):
        session = ENGINE.open_forward(*arguments, **settings)
        whole, forward = self, session.forward

        def counted(x, *, taps=()):
            whole.forwards += 1
            return forward(x, taps=taps)

        session.forward = counted
        return session


def digits(examples: int) -> np.ndarray:
    pytest.importorskip("sklearn")
    from fedlean.data.digits import load_digits

    data = ClientData(load_digits(), np.arange(examples))
    return next(iter(data.draw(steps=1, batch_size=examples, seed=0)))[0]


def overlap(a, b, share: float = 0.05) -> float:
    """Intersection over union of the largest |score|s."""

    def top(scores) -> set[int]:
        flat = np.concatenate([np.abs(values).ravel() for values in scores.values()])
        return set(np.argsort(-flat, kind="stable")[: int(share * flat.size)].tolist())

    return len(top(a) & top(b)) / len(top(a) | top(b))


def shares(spec, params, masks, x):
    """Σ_x ‖∂f/∂w(x)‖² by backpropagation, one example and one output at a time."""
    session = ENGINE.open(spec, params, SubModel(masks=masks), batch_size=1, optimizer=SGD(0.0))
    output, total = spec.nodes[-1].name, dict.fromkeys(spec.prunable, 0.0)
    for i in range(len(x)):
        for entering in np.eye(spec.output_shape[0], dtype=np.float32):
            session.forward(x[i : i + 1], training=True)
            gradients = session.backward({output: entering[None]})
            total = {name: total[name] + gradients[name].astype(float) ** 2 for name in total}
    return total


def test_both_scores_by_hand() -> None:
    """f = w·x has ∂f/∂h = 1: shares are Σ x_j², and NTK-SAP's as in the test of `ntk`."""
    x = np.array([[1, 2], [3, -1]], np.float32)
    found = node_scores(ForwardOnly(), LINE, {}, [x], 0)["fc.weight"]
    np.testing.assert_allclose(found, [[10, 5]], rtol=1e-3)
    masks = {"fc.weight": np.array([[False, True]])}
    np.testing.assert_allclose(
        node_scores(ForwardOnly(), LINE, masks, [x, x], 0)["fc.weight"], [[0, 10]], rtol=1e-3
    )
    start, moved = ({"fc.weight": np.array([w], np.float32)} for w in ((1, 2), (1.5, 1)))
    scores, square = node_gradient(ForwardOnly(), LINE, {}, x[:1], start, moved)
    assert square == 2.25
    np.testing.assert_allclose(scores["fc.weight"], [[-1.5, 6.0]], rtol=1e-2)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_shares_are_those_of_backpropagation(masked) -> None:
    x, rng = digits(24), np.random.default_rng(0)
    masks = {}
    if masked:
        masks = {n: rng.random(DIGITS.param_shapes[n]) < 0.5 for n in DIGITS.prunable}
    params, _ = draw_weights(DIGITS, 3, 0, 0.0)
    found, exact = node_scores(ENGINE, DIGITS, masks, [x], 3), shares(DIGITS, params, masks, x)
    assert overlap(found, exact) > 0.95
    for name, values in found.items():
        assert np.corrcoef(values.ravel(), exact[name].ravel())[0, 1] > 0.999, name
        assert values.sum() == pytest.approx(exact[name].sum(), rel=0.02)


def test_signed_scores_rank_as_those_of_backpropagation() -> None:
    x = digits(64)
    params = draw_weights(DIGITS, 3, 0, 0.01)
    exact, exact_square = difference_gradient(ENGINE, DIGITS, {}, x, *params)
    found, square = node_gradient(ForwardOnly(), DIGITS, {}, x, *params, batch_size=40)
    assert square == pytest.approx(exact_square, rel=1e-5)
    assert overlap(found, exact) > 0.9  # asked for: 0.6
    assert overlap(found, {name: values[::-1] for name, values in exact.items()}) < 0.3
    flat = [np.concatenate([s[n].ravel() for n in DIGITS.prunable]) for s in (found, exact)]
    assert np.corrcoef(*flat)[0, 1] > 0.99, "signs too"


def test_convolutions_are_exact_where_inputs_are_the_same_everywhere() -> None:
    """A kernel without padding on constant images; grouped, and without a bias of its own."""
    spec = sequential(
        (2, 3, 3),
        [
            ("conv", Conv2d(4, 2, groups=2, bias=False)),
            ("relu", ReLU()),
            ("flat", Flatten()),
            ("fc", Linear(3)),
        ],
    )
    (levels,) = gaussian_inputs(sequential((2,), [("fc", Linear(1))]), 12, 1, 0)
    x = np.ascontiguousarray(np.broadcast_to(levels[:, :, None, None], (12, 2, 3, 3)))
    params = draw_weights(spec, 1, 0, 0.05)
    found, _ = node_gradient(ENGINE, spec, {}, x, *params, bump=1e-4)
    exact, _ = difference_gradient(ENGINE, spec, {}, x, *params)
    np.testing.assert_allclose(found["conv.weight"], exact["conv.weight"], rtol=0.05, atol=1e-3)
    share = node_scores(ENGINE, spec, {}, [x], 1, bump=1e-4)["conv.weight"]
    np.testing.assert_allclose(share, shares(spec, params[0], {}, x)["conv.weight"], rtol=0.02)


def test_a_kernels_places_by_hand() -> None:
    """Image 1 2 / 3 4, kernel 2, padding 1, stride 2: each weight visits the four corners of it.

    The top left weight reads 0 0 / 0 4, so its mean square is 16/4; f is the sum of four places,
    bumped together, so ∂f/∂h = 4 and the share 16 · 4.  The others read 3, 2 and 1.
    """
    spec = sequential(
        (1, 2, 2),
        [("conv", Conv2d(1, 2, stride=2, padding=1)), ("flat", Flatten()), ("fc", Linear(1))],
    )
    x = np.array([[[[1, 2], [3, 4]]]], np.float32)
    found = node_scores(ENGINE, spec, {}, [x], 0)["conv.weight"]
    weight = draw_weights(spec, 0, 0, 0.0)[0]["fc.weight"].sum()
    np.testing.assert_allclose(
        found[0, 0] / weight**2, [[16 / 4, 9 / 4], [4 / 4, 1 / 4]], rtol=1e-2
    )


def test_scores_add_up_over_examples_and_cost_what_is_said() -> None:
    (x,) = gaussian_inputs(CONVS, 10, 1, 0)
    engine = ForwardOnly()
    whole = node_scores(engine, CONVS, {}, [x], 4)
    assert engine.forwards == (4 + 6 + 3) + 3  # output units and layers
    parts = [node_scores(engine, CONVS, {}, [part], 4) for part in (x[:3], x[3:])]
    for name, values in whole.items():
        assert (values >= 0).all() and values.any() and values.shape == CONVS.param_shapes[name]
        np.testing.assert_allclose(
            parts[0][name] + parts[1][name], values, rtol=1e-2, atol=1e-4 * values.max()
        )
    engine.forwards = 0
    node_gradient(engine, CONVS, {}, x, *draw_weights(CONVS, 4, 0, 0.01))
    assert engine.forwards == 2 * ((4 + 6 + 3) + 3 + 1)


def test_biases_are_added_where_there_are_none() -> None:
    biased = with_biases(CONVS)
    assert biased.param_shapes.keys() - CONVS.param_shapes.keys() == {"conv1.bias"}
    assert with_biases(biased) == biased


def test_refuses_a_bump_of_nothing() -> None:
    for bump in (0.0, np.nan, -1.0):
        with pytest.raises(ValueError, match="bump must be finite and positive"):
            node_scores(ENGINE, LINE, {}, [np.ones((1, 2), np.float32)], 0, bump=bump)
