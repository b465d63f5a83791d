"""The optimiser against torch.optim and numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.cases import (
    MLP,
    assert_near,
    batch,
    masks_of,
    opened,
    positive_zeros,
    start,
)
from federation import same
from torch import nn

from fedlean.engine.protocol import SGD
from fedlean.layers import (
    Linear,
)
from fedlean.spec import sequential
from fedlean.tree import apply_mask


def reference_mlp(params):
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4))
    names = {"0.weight": "fc1.weight", "0.bias": "fc1.bias"}
    names |= {"2.weight": "fc2.weight", "2.bias": "fc2.bias"}
    held = dict(model.named_parameters())
    with torch.no_grad():
        for theirs, ours in names.items():
            held[theirs].copy_(torch.tensor(params[ours]))
    return model, {ours: held[theirs] for theirs, ours in names.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "sgd", [SGD(0.1), SGD(0.1, 0.9), SGD(0.1, 0.0, 0.05), SGD(0.05, 0.9, 0.05)]
)
def test_sgd_is_that_of_torch(engine, sgd, masked):
    """With masks: on masked weights, with masked gradients."""
    masks = masks_of(MLP) if masked else {}
    params = start(MLP)
    session = opened(engine, MLP, params, masks=masks, sgd=sgd)
    model, held = reference_mlp(apply_mask(params, masks))
    optimizer = torch.optim.SGD(
        model.parameters(), sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay
    )
    for seed in range(8):
        x, y = batch(MLP, seed=seed)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.tensor(x)), torch.tensor(y))
        loss.backward()
        for name, mask in masks.items():
            held[name].grad.mul_(torch.tensor(mask))
        optimizer.step()
        assert session.step(x, y) == pytest.approx(loss.item(), rel=1e-5)
        assert_near(session.params(), {n: t.detach().numpy() for n, t in held.items()}, 1e-6)
        assert positive_zeros(session.params(), masks)


def test_apply_is_one_optimiser_step(engine):
    """v = g, then 0.5·v + g; weight decay 0.1 on the weight before it."""
    spec = sequential((1,), [("fc", Linear(1, bias=False))])
    weight = {"fc.weight": np.array([[2.0]], np.float32)}
    session = opened(engine, spec, weight, sgd=SGD(0.1, 0.5, 0.1))
    gradient = {"fc.weight": np.array([[1.0]], np.float32)}
    session.apply(gradient)  # v = 1 + 0.2 = 1.2
    assert session.params()["fc.weight"] == pytest.approx(2 - 0.12)
    session.apply(gradient)  # v = 0.6 + 1 + 0.188
    assert session.params()["fc.weight"] == pytest.approx(1.88 - 0.1788)
    assert gradient["fc.weight"] == 1.0  # the caller's array is as it was


def test_apply_of_some_gradients_moves_those_only(engine):
    session = opened(engine, MLP, sgd=SGD(0.1, 0.9, 0.1))
    before = session.params()
    session.apply({"fc1.bias": np.ones(6, np.float32)})
    changed = {name for name, value in session.params().items() if not same(value, before[name])}
    assert changed == {"fc1.bias"}


def test_load_keeps_the_optimiser_state(engine):
    """The second step after a load to the same point is longer by the momentum."""
    spec = sequential((1,), [("fc", Linear(1, bias=False))])
    weight = {"fc.weight": np.array([[2.0]], np.float32)}
    session = opened(engine, spec, weight, sgd=SGD(0.1, 0.5))
    gradient = {"fc.weight": np.array([[1.0]], np.float32)}
    session.apply(gradient)
    session.load(weight)
    session.apply(gradient)
    assert session.params()["fc.weight"] == pytest.approx(2 - 0.15)


# Clipping and the proximal term

PAIR = sequential((1,), [("fc", Linear(1))])  # y = weight·x + bias


def pair(weight, bias):
    return {
        "fc.weight": np.array([[weight]], np.float32),
        "fc.bias": np.array([bias], np.float32),
    }


def assert_pair(session, weight, bias):
    after = session.params()
    assert after["fc.weight"][0, 0] == pytest.approx(weight, rel=1e-6)
    assert after["fc.bias"][0] == pytest.approx(bias, rel=1e-6)


def test_clipping_by_hand(engine):
    """(3, 4) has the norm 5 over both tensors, so clip_norm 2.5 halves it; (0.3, 0.4) stays."""
    session = opened(engine, PAIR, pair(1, 1), sgd=SGD(0.1, clip_norm=2.5))
    session.apply(pair(3, 4))
    assert_pair(session, 1 - 0.15, 1 - 0.2)
    session.apply(pair(0.3, 0.4))
    assert_pair(session, 0.85 - 0.03, 0.8 - 0.04)


def test_proximal_by_hand(engine):
    """μ = 0.5 pulls to what `open` brought, then to what `load` brought."""
    session = opened(engine, PAIR, pair(2, 0), sgd=SGD(0.1, proximal=0.5))
    session.apply(pair(1, 0))
    assert_pair(session, 1.9, 0)  # w = w_loaded: no pull
    session.apply(pair(1, 0))
    assert_pair(session, 1.9 - 0.1 * (1 - 0.5 * 0.1), 0)
    session.load(pair(5, 1))
    session.apply(pair(1, 0))
    assert_pair(session, 4.9, 1)
    session.apply(pair(0, 0))
    assert_pair(session, 4.9 + 0.1 * 0.5 * 0.1, 1)


def test_the_order_of_clipping_decay_and_pull(engine):
    """Two steps of (0, 10), clipped to (0, 1); decay 0.1, μ 0.5, momentum 0.9, lr 0.1.

    v1 = 1 + 0.1·2 = 1.2, w1 = 2 - 0.12 = 1.88
    v2 = 0.9·1.2 + 1 + 0.1·1.88 - 0.5·0.12 = 2.208, w2 = 1.88 - 0.2208
    """
    sgd = SGD(0.1, 0.9, 0.1, clip_norm=1.0, proximal=0.5)
    session = opened(engine, PAIR, pair(0, 2), sgd=sgd)
    session.apply(pair(0, 10))
    assert_pair(session, 0, 1.88)
    session.apply(pair(0, 10))
    assert_pair(session, 0, 1.6592)


def test_clipping_is_that_of_torch(engine):
    """On masked gradients of all trained tensors, in `step`; torch adds 1e-6 to the norm."""
    masks, params, sgd = masks_of(MLP), start(MLP), SGD(0.5, 0.9, clip_norm=0.1)
    frozen = {"fc1.bias"}
    session = opened(engine, MLP, params, masks=masks, frozen=frozen, sgd=sgd)
    model, held = reference_mlp(apply_mask(params, masks))
    held["fc1.bias"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), sgd.lr, momentum=sgd.momentum)
    for seed in range(4):
        x, y = batch(MLP, seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.tensor(x)), torch.tensor(y)).backward()
        for name, mask in masks.items():
            held[name].grad.mul_(torch.tensor(mask))
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.2  # it does clip
        optimizer.step()
        session.step(x, y)
        assert_near(session.params(), {n: t.detach().numpy() for n, t in held.items()}, 2e-5)


def test_a_high_clip_norm_changes_nothing(engine):
    plain, clipped = (opened(engine, MLP, sgd=SGD(0.1, clip_norm=c)) for c in (None, 1e6))
    x, y = batch(MLP)
    plain.step(x, y)
    clipped.step(x, y)
    assert_near(clipped.params(), plain.params(), 1e-6)


def test_importance_is_of_the_gradient_that_the_loss_gives(engine):
    """Not of the clipped one, nor with decay or pull."""
    strange = SGD(0.1, 0.9, 0.3, clip_norm=1e-3, proximal=0.5)
    plain, other = (opened(engine, MLP, sgd=sgd) for sgd in (SGD(0.1), strange))
    x, y = batch(MLP)
    plain.step(x, y, importance=True)
    other.step(x, y, importance=True)
    assert_near(other.importance(), plain.importance(), 1e-6)


def test_pruned_coordinates_feel_no_pull(engine):
    """Whatever was loaded there: w_loaded is what the session holds, 0."""
    masks, sgd = masks_of(MLP), SGD(0.1, 0.9, 0.1, clip_norm=1.0, proximal=10.0)
    session = opened(engine, MLP, masks=masks, sgd=sgd)
    for seed in range(3):
        session.step(*batch(MLP, seed=seed))
    assert positive_zeros(session.params(), masks)
