"""Forward-only sessions: losses at the parameters and at perturbed ones, on every engine."""

from __future__ import annotations

import re

import numpy as np
import pytest
from engine.cases import (
    BLOCK,
    CONV,
    LOSSES,
    MLP,
    NET,
    PLAIN,
    assert_near,
    batch,
    masks_of,
    mlp_by_hand,
    opened,
    packed,
    positive_zeros,
    start,
)
from federation import same

from fedlean.core import SubModel
from fedlean.engine.directions import direction
from fedlean.layers import BatchNorm, Conv2d, Flatten, GlobalAvgPool, Linear, ReLU
from fedlean.spec import sequential

KINDS = ["gaussian", "sign", "rank1"]
# Their weights are more than what the native engine perturbs at once.
WIDE_CONV = sequential(
    (40, 6, 5),
    [("conv", Conv2d(221, 3, 2, 1)), ("pool", GlobalAvgPool()), ("fc", Linear(5))],
)
WIDE = sequential((900,), [("fc1", Linear(201)), ("relu", ReLU()), ("fc2", Linear(10))])
MODELS = {"mlp": MLP, "plain": PLAIN, "conv": CONV, "net": NET, "residual": BLOCK}
MODELS |= {"wide": WIDE, "wide conv": WIDE_CONV}


def forward(engine, spec, params=None, *, masks=None, frozen=(), batch_size=5, **settings):
    sub_model = SubModel(masks=masks or {}, frozen=frozenset(frozen))
    params = start(spec) if params is None else params
    return engine.open_forward(spec, params, sub_model, batch_size=batch_size, **settings)


def moved(spec, params, *, seed, k, sigma, kind, masks, frozen=()):
    """params + sigma·z_k, dense, pruned coordinates 0: by NumPy alone."""
    result = {}
    for name, value in params.items():
        mask = masks.get(name)
        result[name] = value.copy() if mask is None else np.where(mask, value, np.float32(0))
        if name not in spec.param_shapes or name in frozen:
            continue
        z = direction(seed, k, name, value.shape, mask, kind)
        kept = np.ones(value.shape, bool) if mask is None else mask
        result[name][kept] += np.float32(sigma) * z
    return result


@pytest.mark.parametrize("density", [None, 0.8, 0.3, 0.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_losses_are_those_at_the_perturbed_parameters(engine, model, kind, density):
    """The same arithmetic, so the same bits: nothing but the weights may differ."""
    spec = MODELS[model]
    masks = {} if density is None else masks_of(spec, density)
    if model == "net" and masks:
        masks["fc1.bias"] = np.arange(20) % 3 > 0  # any trainable tensor may be masked
    (x, y), params = batch(spec, 21), start(spec)
    session = forward(engine, spec, params, masks=masks, batch_size=21)
    got = session.losses_perturbed(x, y, seed=7, ks=[3, 0, 11], sigma=0.05, kind=kind)
    assert got.dtype == np.float64 and got.shape == (3,)
    for loss, k in zip(got, (3, 0, 11), strict=True):
        there = moved(spec, params, seed=7, k=k, sigma=0.05, kind=kind, masks=masks)
        session.load(there)
        assert session.loss(x, y) == loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_a_training_session(engine, loss, kind):
    masks, frozen = masks_of(CONV), {"conv2.bias", "bn.weight", "fc.weight"}
    (x, y), params = batch(CONV), start(CONV)
    session = forward(engine, CONV, params, masks=masks, frozen=frozen, loss=loss)
    settings = {"seed": 2, "sigma": -0.1, "kind": kind}
    got = session.losses_perturbed(x, y, ks=range(4), **settings)
    assert len(set(got)) == 4
    for k in range(4):
        there = moved(CONV, params, k=k, masks=masks, frozen=frozen, **settings)
        trained = opened(engine, CONV, there, masks=masks, loss=loss)
        assert got[k] == pytest.approx(trained.loss(x, y), rel=1e-6)
    trained = opened(engine, CONV, params, masks=masks, loss=loss)
    assert session.loss(x, y) == pytest.approx(trained.loss(x, y), rel=1e-6)


@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_frozen_tensors_are_not_perturbed(engine, part, density):
    """Neither with their layer's other one, nor when nothing is left."""
    masks = {} if density is None else masks_of(WIDE, density)
    (x, y), params = batch(WIDE), start(WIDE)
    settings = {"seed": 3, "sigma": 0.1, "kind": "gaussian"}
    for frozen in ({f"fc1.{part}"}, set(WIDE.param_shapes)):
        session = forward(engine, WIDE, params, masks=masks, frozen=frozen)
        (got,) = session.losses_perturbed(x, y, ks=[6], **settings)
        session.load(moved(WIDE, params, k=6, masks=masks, frozen=frozen, **settings))
        assert session.loss(x, y) == got


def test_difference_is_the_directional_derivative(engine):
    params, (x, y) = start(MLP), batch(MLP)
    session = forward(engine, MLP, params)
    _, _, gradients, _ = mlp_by_hand(params, x, y, "ce")
    slope = sum(
        (direction(0, 5, name, g.shape, None, "gaussian").reshape(g.shape) * g).sum()
        for name, g in gradients.items()
    )
    up, down = (session.losses_perturbed(x, y, seed=0, ks=[5], sigma=s)[0] for s in (1e-3, -1e-3))
    assert (up - down) / 2e-3 == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_no_perturbation(engine, kind):
    session, (x, y) = forward(engine, BLOCK, masks=masks_of(BLOCK)), batch(BLOCK)
    unmoved = session.losses_perturbed(x, y, seed=1, ks=[0, 1], sigma=0.0, kind=kind)
    assert unmoved.tolist() == [session.loss(x, y)] * 2
    assert session.losses_perturbed(x, y, seed=1, ks=[], sigma=0.1, kind=kind).shape == (0,)


def test_losses_do_not_depend_on_what_was_asked_before(engine):
    masks, (x, y) = masks_of(NET), batch(NET)
    session, other = (forward(engine, NET, masks=masks) for _ in range(2))
    ks = [5, 2, 9, 2]
    first = session.losses_perturbed(x, y, seed=3, ks=ks, sigma=0.1)
    other.forward(x, taps=["gn"])
    other.losses_perturbed(x[:2], y[:2], seed=4, ks=[0], sigma=1.0, kind="sign")
    alone = [other.losses_perturbed(x, y, seed=3, ks=[k], sigma=0.1)[0] for k in ks]
    assert first.tolist() == alone
    assert first[1] == first[3] and len(set(alone)) == 3


def test_many_directions_at_once(engine):
    """More than keys are made for in one go."""
    session, (x, y) = forward(engine, MLP), batch(MLP)
    losses = session.losses_perturbed(x, y, seed=3, ks=range(150), sigma=0.1)
    assert len(set(losses)) == 150
    assert losses[149] == session.losses_perturbed(x, y, seed=3, ks=[149], sigma=0.1)[0]


def test_parameters_stay(engine):
    masks, params, (x, y) = masks_of(CONV), start(CONV), batch(CONV)
    session = forward(engine, CONV, params, masks=masks)
    before = x.copy(), y.copy()
    session.losses_perturbed(x, y, seed=0, ks=[0, 1], sigma=0.1)
    session.forward(x, taps=["bn"])
    held = session.params()
    assert positive_zeros(held, masks)
    assert same(packed(held, masks), packed(params, masks))
    assert same(session.params(packed=True), packed(params, masks))
    assert same((x, y), before)


def test_packed_parameters_are_taken(engine):
    masks, params, (x, y) = masks_of(NET, 0.3), start(NET), batch(NET)
    dense, kept = forward(engine, NET, params, masks=masks), packed(params, masks)
    session = forward(engine, NET, kept, masks=masks)
    settings = {"seed": 0, "ks": [1], "sigma": 0.1}
    expected = dense.losses_perturbed(x, y, **settings)
    assert session.losses_perturbed(x, y, **settings) == expected
    session.load(start(NET, 5))
    assert session.losses_perturbed(x, y, **settings) != expected
    session.load(kept)
    assert session.losses_perturbed(x, y, **settings) == expected


@pytest.mark.parametrize("model", ["net", "residual"])
def test_activations_are_those_of_a_training_session(engine, model):
    spec = MODELS[model]
    masks, (x, _), taps = masks_of(spec), batch(spec), list(spec.by_name)
    session = forward(engine, spec, masks=masks)
    expected = opened(engine, spec, masks=masks).forward(x, taps=taps)
    assert_near(session.forward(x, taps=taps), expected)
    output = spec.nodes[-1].name
    assert list(session.forward(x)) == [output]
    assert_near(session.forward(x), {output: expected[output]})


def test_batch_norm_evaluates_on_any_batch(engine):
    spec = sequential((4,), [("fc", Linear(3)), ("bn", BatchNorm()), ("flat", Flatten())])
    session, (x, y) = forward(engine, spec), batch(spec)
    singles = [session.loss(x[i : i + 1], y[i : i + 1]) for i in range(5)]
    assert session.loss(x, y) == pytest.approx(np.mean(singles), rel=1e-5)


def test_a_model_may_end_in_an_image(engine):
    session = forward(engine, sequential((2, 3, 3), [("relu", ReLU())]), {})
    x, y = np.ones((5, 2, 3, 3), np.float32), np.zeros(5, np.int64)
    np.testing.assert_array_equal(session.forward(x)["relu"], x)
    for call in (lambda: session.loss(x, y), lambda: perturb(session, x, y)):
        with pytest.raises(ValueError, match=r"'relu' has shape \(2, 3, 3\), but a loss needs"):
            call()


def perturb(session, x, y, **changed):
    arguments = {"seed": 0, "ks": [0], "sigma": 0.1} | changed
    return session.losses_perturbed(x, y, **arguments)


BAD = {
    "sigma nan": ({"sigma": np.nan}, "sigma must be finite in float32, got nan"),
    "sigma huge": ({"sigma": 1e39}, "sigma must be finite in float32, got 1e+39"),
    "sigma text": ({"sigma": "1"}, "sigma must be finite in float32, got '1'"),
    "k": ({"ks": [0, 1.5]}, "ks holds 1.5, expected the numbers of directions"),
    "k bool": ({"ks": [True]}, "ks holds True, expected the numbers of directions"),
    "seed": ({"seed": "1"}, "seed must be an integer, got '1'"),
    "kind": ({"kind": "uniform"}, "kind must be one of gaussian, sign, rank1, got 'uniform'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_perturbations(engine, bad):
    changed, message = BAD[bad]
    session, (x, y) = forward(engine, MLP), batch(MLP)
    expected = perturb(session, x, y)
    with pytest.raises(ValueError, match=re.escape(message)):
        perturb(session, x, y, **changed)
    assert perturb(session, x, y) == expected


BAD_BATCHES = {
    "float64": (lambda x, y: (x.astype(np.float64), y), "x is float64, expected float32"),
    "nan": (lambda x, y: (x * np.float32(np.nan), y), "x holds NaN or infinity"),
    "too many": (lambda x, y: (np.repeat(x, 2, 0), np.repeat(y, 2)), "x holds 10 examples"),
    "cropped": (lambda x, y: (x[:, :6].copy(), y), "x has shape (5, 6), expected (B, 7)"),
    "int32": (lambda x, y: (x, y.astype(np.int32)), "y is int32, expected int64"),
    "short": (lambda x, y: (x, y[:-1]), "y has shape (4,), expected (5,)"),
    "label": (lambda x, y: (x, y + 4), "y has labels from"),
}


@pytest.mark.parametrize("ks", [[0], []], ids=["one", "none"])
@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_bad_batches(engine, bad, ks):
    change, message = BAD_BATCHES[bad]
    session, (x, y) = forward(engine, MLP), batch(MLP)
    for call in (session.loss, lambda x, y: perturb(session, x, y, ks=ks)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(*change(x, y))


def test_bad_taps(engine):
    session, (x, _) = forward(engine, MLP), batch(MLP)
    with pytest.raises(ValueError, match="no layer named 'nowhere'"):
        session.forward(x, taps=["nowhere"])


def test_bad_sessions(engine):
    for settings, message in (
        ({"batch_size": 0}, "batch_size must be an integer from 1 to 1048576, got 0"),
        ({"loss": "mse"}, "loss must be 'ce' or 'bce', got 'mse'"),
        (
            {"directions_at_once": 0},
            "directions_at_once must be an integer from 1 to 1048576, got 0",
        ),
        ({"directions_at_once": 1.0}, "directions_at_once must be an integer"),
        ({"frozen": {"nowhere"}}, "frozen 'nowhere' is no tensor of the model"),
        ({"masks": {"fc1.weight": np.ones((2, 2), bool)}}, "mask 'fc1.weight' has shape (2, 2)"),
        ({"params": {}}, "parameter 'fc1.weight' of shape (6, 7) is missing"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            forward(engine, MLP, **settings)
    session = forward(engine, MLP)
    with pytest.raises(ValueError, match="is missing"):
        session.load({})
