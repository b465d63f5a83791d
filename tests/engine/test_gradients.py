"""Gradients against NumPy in float64, and how `forward` and `backward` compose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.cases import (
    CONV,
    LOSSES,
    MLP,
    assert_near,
    batch,
    masks_of,
    mlp_by_hand,
    opened,
    start,
)
from federation import same

from fedlean.engine.protocol import SGD
from fedlean.layers import (
    Linear,
    ReLU,
)
from fedlean.spec import ModelSpec, Node
from fedlean.tree import apply_mask


@pytest.mark.parametrize("size", [1, 2, 5, 13])
@pytest.mark.parametrize("loss", LOSSES)
def test_step_is_the_hand_written_gradient(engine, loss, size):
    params, (x, y) = start(MLP), batch(MLP, size)
    session = opened(engine, MLP, params, sgd=SGD(1.0), loss=loss, batch_size=13)
    value, _, gradients, _ = mlp_by_hand(params, x, y, loss)
    assert session.step(x, y) == pytest.approx(value, rel=1e-5)
    moved = {name: params[name] - after for name, after in session.params().items()}
    assert_near(moved, gradients)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_and_backward_are_the_hand_written_gradient(engine, loss, size):
    params, (x, y) = start(MLP), batch(MLP, size)
    session = opened(engine, MLP, params, loss=loss, batch_size=13)
    value, activations, gradients, d_logits = mlp_by_hand(params, x, y, loss)
    out = session.forward(x, taps=["fc1", "relu"], training=True)
    assert_near(out, activations)
    assert_near(session.backward({"fc2": d_logits.astype(np.float32)}), gradients)
    assert session.loss(x, y) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_step_equals_forward_backward_apply(engine, loss):
    """The fused path and the parts, through every kind of layer of CONV, with masks."""
    masks, sgd = masks_of(CONV), SGD(0.1, 0.9, 0.01)
    fused, parts = (opened(engine, CONV, masks=masks, sgd=sgd, loss=loss) for _ in range(2))
    for seed in range(3):
        x, y = batch(CONV, seed=seed)
        fused.step(x, y)
        logits = torch.tensor(parts.forward(x, training=True)["fc"], requires_grad=True)
        target = torch.from_numpy(y)
        if loss == "ce":
            value = F.cross_entropy(logits, target)
        else:
            one_hot = F.one_hot(target, 3).float()
            value = F.binary_cross_entropy_with_logits(logits, one_hot)
        (gradient,) = torch.autograd.grad(value, [logits])
        parts.apply(parts.backward({"fc": gradient.numpy()}))
        assert_near(parts.params(), fused.params(), 1e-6)


def test_gradients_may_enter_at_several_nodes(engine):
    params, (x, _) = start(MLP), batch(MLP)
    session = opened(engine, MLP, params)
    rng = np.random.default_rng(4)
    at_relu, at_output = (rng.standard_normal((5, n)).astype(np.float32) for n in (6, 4))

    def gradients(**entering):
        session.forward(x, taps=["relu"], training=True)
        return session.backward(entering)

    both = gradients(relu=at_relu, fc2=at_output)
    only_relu, only_output = gradients(relu=at_relu), gradients(fc2=at_output)
    assert_near(both, {name: only_relu[name] + only_output[name] for name in both})
    assert not only_relu["fc2.weight"].any()  # above where the gradient entered
    hidden = np.maximum(x @ params["fc1.weight"].T + params["fc1.bias"], 0)
    np.testing.assert_allclose(
        only_relu["fc1.weight"], (at_relu * (hidden > 0)).T @ x, rtol=1e-5, atol=1e-5
    )


def test_backward_dense_or_masked(engine):
    masks = masks_of(MLP)
    params, (x, y) = apply_mask(start(MLP), masks), batch(MLP)
    session = opened(engine, MLP, params, masks=masks)
    _, _, gradients, d_logits = mlp_by_hand(params, x, y, "ce")
    entering = {"fc2": d_logits.astype(np.float32)}
    session.forward(x, training=True)
    dense = session.backward(entering, dense=True)
    assert_near(dense, gradients)
    assert all(dense[name][~mask].any() for name, mask in masks.items())
    session.forward(x, training=True)
    masked = session.backward(entering)
    assert all(not masked[name][~mask].any() for name, mask in masks.items())
    assert_near(masked, {n: g * masks[n] if n in masks else g for n, g in dense.items()}, 1e-7)


def test_backward_needs_a_training_forward(engine):
    session, (x, _) = opened(engine, MLP), batch(MLP)
    entering = {"fc2": np.ones((5, 4), np.float32)}
    with pytest.raises(ValueError, match="'fc2': call forward"):
        session.backward(entering)
    session.forward(x)
    with pytest.raises(ValueError, match="'fc2': call forward"):
        session.backward(entering)
    session.forward(x, training=True)
    with pytest.raises(ValueError, match="'relu': call forward"):  # not tapped
        session.backward({"relu": np.ones((5, 6), np.float32)})
    session.backward(entering)
    with pytest.raises(ValueError, match="once for each backward"):
        session.backward(entering)


@pytest.mark.parametrize(
    "compute",
    [
        lambda session, x, y: session.step(x, y),
        lambda session, x, y: session.loss(x, y),
        lambda session, x, y: session.forward(x),
        lambda session, x, y: session.apply({"fc2.bias": np.ones(4, np.float32)}),
        lambda session, x, y: session.load(session.params()),
        lambda session, x, y: session.descend({"fc2": np.ones((5, 4), np.float32)}),
    ],
    ids=["step", "loss", "forward", "apply", "load", "descend"],
)
def test_backward_comes_right_after_its_forward(engine, compute):
    """What it needs may be overwritten by anything else that the session computes."""
    session, (x, y) = opened(engine, MLP), batch(MLP)
    session.forward(x, training=True)
    compute(session, x, y)
    for call in (session.backward, session.descend):
        with pytest.raises(ValueError, match="'fc2': call forward"):
            call({"fc2": np.ones((5, 4), np.float32)})


def test_backward_does_not_depend_on_the_arrays_of_the_forward(engine):
    """Neither on the caller's x nor on the activations that the caller got."""
    session, (x, _) = opened(engine, CONV), batch(CONV)
    entering = {"fc": np.ones((5, 3), np.float32)}
    session.forward(x, taps=list(CONV.by_name), training=True)
    expected = session.backward(entering)
    out = session.forward(x, taps=list(CONV.by_name), training=True)
    for array in (x, *out.values()):
        array[:] = 7
    assert same(session.backward(entering), expected)


def test_gradients_are_zero_where_nothing_trains(engine):
    """Below the lowest trained tensor there is nothing to compute."""
    frozen = {"fc1.weight", "fc1.bias"}
    session, (x, y) = opened(engine, MLP, frozen=frozen), batch(MLP)
    session.forward(x, taps=["relu"], training=True)
    gradients = session.backward({"relu": np.ones((5, 6), np.float32)})
    assert set(gradients) == {"fc2.weight", "fc2.bias"}
    assert not any(gradient.any() for gradient in gradients.values())
    session = opened(engine, MLP, frozen=set(MLP.param_shapes))
    assert session.step(x, y, importance=True) == pytest.approx(session.loss(x, y), rel=1e-6)
    session.forward(x, training=True)
    assert session.backward({"fc2": np.ones((5, 4), np.float32)}) == {}
    assert session.importance() == {}


def test_forward_taps(engine):
    session, (x, _) = opened(engine, CONV), batch(CONV)
    assert list(session.forward(x)) == ["fc"]
    taps = ["conv1", "bn", "flat"]
    out = session.forward(x, taps=taps)
    assert set(out) == {*taps, "fc"}
    for name, value in out.items():
        assert value.shape == (5, *CONV.shapes[name]) and value.dtype == np.float32
    with pytest.raises(ValueError, match="'nowhere'"):
        session.forward(x, taps=["nowhere"])


def test_what_does_not_reach_the_output_stays(engine):
    """A branch for taps only: a step leaves it as it is."""
    nodes = (
        Node("fc1", Linear(6), ("input",)),
        Node("exit", Linear(4), ("fc1",)),
        Node("relu", ReLU(), ("fc1",)),
        Node("fc2", Linear(4), ("relu",)),
    )
    spec = ModelSpec((7,), nodes)
    params, (x, y) = start(spec), batch(spec)
    session = opened(engine, spec, params)
    session.step(x, y, importance=True)
    after = session.params()
    assert same(after["exit.weight"], params["exit.weight"])
    assert not same(after["fc1.weight"], params["fc1.weight"])
    assert not session.importance()["exit.weight"].any()
    session.forward(x, taps=["exit"], training=True)
    gradients = session.backward({"exit": np.ones((5, 4), np.float32)})
    assert gradients["exit.weight"].any() and not gradients["fc2.weight"].any()
