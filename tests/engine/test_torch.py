"""The torch engine: against NumPy in float64, torch.nn and torch.optim, and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federation import same
from torch import nn

from fedlean.core import SubModel, generator
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.engine.torch import TorchEngine
from fedlean.layers import (
    Add,
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Linear,
    MaxPool2d,
    ReLU,
    Scale,
)
from fedlean.models.initialise import init_params
from fedlean.spec import LAYERS, ModelSpec, Node, sequential
from fedlean.tree import apply_mask

LOSSES = ["ce", "bce"]
MLP = sequential((7,), [("fc1", Linear(6)), ("relu", ReLU()), ("fc2", Linear(4))])
CONV = sequential(
    (2, 6, 6),
    [
        ("conv1", Conv2d(4, 3, padding=1)),
        ("bn", BatchNorm()),
        ("relu1", ReLU()),
        ("pool", MaxPool2d(2)),
        ("conv2", Conv2d(4, 3, groups=2)),
        ("gn", GroupNorm(groups=2)),
        ("flat", Flatten()),
        ("fc", Linear(3)),
    ],
)
PLAIN = sequential(
    (2, 6, 6),
    [
        ("conv", Conv2d(4, 3)),
        ("relu", ReLU()),
        ("flat", Flatten()),
        ("fc1", Linear(8)),
        ("relu2", ReLU()),
        ("fc2", Linear(3)),
    ],
)
BUFFERS = ("bn.running_mean", "bn.running_var")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def start(spec, seed=0):
    """Nothing is zero, so that nothing passes by accident."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in spec.tensor_shapes.items():
        value = 0.5 * rng.standard_normal(shape)
        params[name] = (abs(value) + 0.5 if name.endswith("var") else value).astype(np.float32)
    return params


def batch(spec, size=5, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, *spec.input_shape)).astype(np.float32)
    return x, rng.integers(0, spec.output_shape[0], size)


def masks_of(spec, density=0.5, seed=2):
    rng = np.random.default_rng(seed)
    return {name: rng.random(spec.param_shapes[name]) < density for name in spec.prunable}


def opened(spec, params=None, *, masks=None, frozen=(), sgd=SGD(0.1), loss="ce", batch_size=5):  # noqa: B008
    sub_model = SubModel(masks=masks or {}, frozen=frozenset(frozen))
    params = start(spec) if params is None else params
    return TorchEngine(1).open(
        spec, params, sub_model, batch_size=batch_size, optimizer=sgd, loss=loss
    )


def positive_zeros(values, masks):
    """Whether all pruned coordinates are +0, in every bit."""
    return all(not values[n][~mask].view(np.uint32).any() for n, mask in masks.items())


# Gradients, against NumPy


def mlp_by_hand(params, x, y, loss):
    """Loss, activations and gradients of MLP in float64."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    x = x.astype(np.float64)
    size, rows = len(y), np.arange(len(y))
    before = x @ p["fc1.weight"].T + p["fc1.bias"]
    hidden = np.maximum(before, 0)
    logits = hidden @ p["fc2.weight"].T + p["fc2.bias"]
    one_hot = np.eye(logits.shape[1])[y]
    if loss == "ce":
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probability = shifted / shifted.sum(1, keepdims=True)
        value = -np.log(probability[rows, y]).mean()
        d_logits = (probability - one_hot) / size
    else:
        probability = 1 / (1 + np.exp(-logits))
        terms = one_hot * np.log(probability) + (1 - one_hot) * np.log(1 - probability)
        value = -terms.mean()
        d_logits = (probability - one_hot) / logits.size
    d_before = (d_logits @ p["fc2.weight"]) * (before > 0)
    gradients = {
        "fc1.weight": d_before.T @ x,
        "fc1.bias": d_before.sum(0),
        "fc2.weight": d_logits.T @ hidden,
        "fc2.bias": d_logits.sum(0),
    }
    return value, {"fc1": before, "relu": hidden, "fc2": logits}, gradients, d_logits


def assert_near(got, expected, tolerance=1e-5):
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_allclose(
            got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("size", [1, 2, 5, 13])
@pytest.mark.parametrize("loss", LOSSES)
def test_step_is_the_hand_written_gradient(loss, size):
    params, (x, y) = start(MLP), batch(MLP, size)
    session = opened(MLP, params, sgd=SGD(1.0), loss=loss, batch_size=13)
    value, _, gradients, _ = mlp_by_hand(params, x, y, loss)
    assert session.step(x, y) == pytest.approx(value, rel=1e-5)
    moved = {name: params[name] - after for name, after in session.params().items()}
    assert_near(moved, gradients)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_and_backward_are_the_hand_written_gradient(loss, size):
    params, (x, y) = start(MLP), batch(MLP, size)
    session = opened(MLP, params, loss=loss, batch_size=13)
    value, activations, gradients, d_logits = mlp_by_hand(params, x, y, loss)
    out = session.forward(x, taps=["fc1", "relu"], training=True)
    assert_near(out, activations)
    assert_near(session.backward({"fc2": d_logits.astype(np.float32)}), gradients)
    assert session.loss(x, y) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_step_equals_forward_backward_apply(loss):
    """The fused path and the parts, through every kind of layer of CONV, with masks."""
    masks, sgd = masks_of(CONV), SGD(0.1, 0.9, 0.01)
    fused, parts = (opened(CONV, masks=masks, sgd=sgd, loss=loss) for _ in range(2))
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


def test_gradients_may_enter_at_several_nodes():
    params, (x, _) = start(MLP), batch(MLP)
    session = opened(MLP, params)
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


def test_backward_dense_or_masked():
    masks = masks_of(MLP)
    params, (x, y) = apply_mask(start(MLP), masks), batch(MLP)
    session = opened(MLP, params, masks=masks)
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


def test_backward_needs_a_training_forward():
    session, (x, _) = opened(MLP), batch(MLP)
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


def test_forward_taps():
    session, (x, _) = opened(CONV), batch(CONV)
    assert list(session.forward(x)) == ["fc"]
    taps = ["conv1", "bn", "flat"]
    out = session.forward(x, taps=taps)
    assert set(out) == {*taps, "fc"}
    for name, value in out.items():
        assert value.shape == (5, *CONV.shapes[name]) and value.dtype == np.float32
    with pytest.raises(ValueError, match="'nowhere'"):
        session.forward(x, taps=["nowhere"])


# The optimiser, against torch.optim


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
def test_sgd_is_that_of_torch(sgd, masked):
    """With masks: on masked weights, with masked gradients."""
    masks = masks_of(MLP) if masked else {}
    params = start(MLP)
    session = opened(MLP, params, masks=masks, sgd=sgd)
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


def test_apply_is_one_optimiser_step():
    """v = g, then 0.5·v + g; weight decay 0.1 on the weight before it."""
    spec = sequential((1,), [("fc", Linear(1, bias=False))])
    weight = {"fc.weight": np.array([[2.0]], np.float32)}
    session = opened(spec, weight, sgd=SGD(0.1, 0.5, 0.1))
    gradient = {"fc.weight": np.array([[1.0]], np.float32)}
    session.apply(gradient)  # v = 1 + 0.2 = 1.2
    assert session.params()["fc.weight"] == pytest.approx(2 - 0.12)
    session.apply(gradient)  # v = 0.6 + 1 + 0.188
    assert session.params()["fc.weight"] == pytest.approx(1.88 - 0.1788)
    assert gradient["fc.weight"] == 1.0  # the caller's array is as it was


def test_apply_of_some_gradients_moves_those_only():
    session = opened(MLP, sgd=SGD(0.1, 0.9, 0.1))
    before = session.params()
    session.apply({"fc1.bias": np.ones(6, np.float32)})
    changed = {name for name, value in session.params().items() if not same(value, before[name])}
    assert changed == {"fc1.bias"}


# Masks and frozen tensors


@pytest.mark.parametrize("sgd", [SGD(0.1), SGD(0.1, 0.9, 0.1)])
def test_masked_coordinates_are_exactly_zero(sgd):
    masks = masks_of(CONV)
    dirty = start(CONV)
    for name, mask in masks.items():  # a mask is not a multiplication
        dirty[name][~mask] = np.resize(np.float32([-1, np.nan, np.inf, -0.0]), (~mask).sum())
    session = opened(CONV, dirty, masks=masks, sgd=sgd)
    assert positive_zeros(session.params(), masks)
    for seed in range(4):
        session.step(*batch(CONV, seed=seed), importance=seed % 2 == 0)
        assert positive_zeros(session.params(), masks)
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradients = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in CONV.param_shapes.items()
        }
        session.apply(gradients)
        assert positive_zeros(session.params(), masks)
    session.load(dirty)
    assert positive_zeros(session.params(), masks)
    session.step(*batch(CONV))
    assert positive_zeros(session.params(), masks)
    assert all(np.isfinite(value).all() for value in session.params().values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_masked_coordinates_are_zero_even_when_training_diverges(momentum):
    """NaN·0 is NaN: gradients that are not finite must not enter where there is no weight."""
    masks = masks_of(MLP)
    session = opened(MLP, masks=masks, sgd=SGD(0.1, momentum))
    nan = {name: np.full(shape, np.nan, np.float32) for name, shape in MLP.param_shapes.items()}
    session.apply(nan)
    assert positive_zeros(session.params(), masks)
    session = opened(MLP, masks=masks, sgd=SGD(0.1, momentum))
    x, y = batch(MLP)
    session.step(np.full_like(x, np.inf), y)
    assert positive_zeros(session.params(), masks)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_frozen_tensors_keep_every_bit(momentum):
    frozen = {"conv1.weight", "conv1.bias", "gn.weight", "fc.bias", "conv2.weight"}
    masks = masks_of(CONV)
    params = apply_mask(start(CONV), masks)
    session = opened(CONV, params, masks=masks, frozen=frozen, sgd=SGD(0.1, momentum, 0.1))
    for seed in range(3):
        session.step(*batch(CONV, seed=seed), importance=True)
    session.apply({name: np.ones(shape, np.float32) for name, shape in CONV.param_shapes.items()})
    after = session.params()
    for name in CONV.param_shapes:
        assert same(after[name], params[name]) == (name in frozen), name
    assert set(session.importance()) == set(CONV.param_shapes) - frozen


def test_frozen_gradients_are_left_out():
    session, (x, _) = opened(MLP, frozen={"fc1.weight"}), batch(MLP)
    session.forward(x, training=True)
    gradients = session.backward({"fc2": np.ones((5, 4), np.float32)})
    assert set(gradients) == {"fc1.bias", "fc2.weight", "fc2.bias"}


def test_frozen_layer_trains_the_others_as_without():
    """Freezing changes nothing else in the same step."""
    x, y = batch(MLP)
    free, held = opened(MLP), opened(MLP, frozen={"fc1.weight"})
    assert free.step(x, y) == held.step(x, y)
    for name in ("fc1.bias", "fc2.weight", "fc2.bias"):
        assert same(free.params()[name], held.params()[name])


# Importance


def test_importance_is_the_sum_of_squares_of_all_coordinates():
    masks = masks_of(MLP)
    session = opened(MLP, masks=masks, sgd=SGD(0.1, 0.9, 0.01))
    expected = {name: np.zeros(shape) for name, shape in MLP.param_shapes.items()}
    assert same(session.importance(), {n: v.astype(np.float32) for n, v in expected.items()})
    for seed in range(4):
        x, y = batch(MLP, seed=seed)
        important = seed != 1
        if important:
            _, _, gradients, _ = mlp_by_hand(session.params(), x, y, "ce")
            expected = {name: total + gradients[name] ** 2 for name, total in expected.items()}
        session.step(x, y, importance=important)
    got = session.importance()
    assert_near(got, expected)
    assert all(got[name][~mask].any() for name, mask in masks.items())
    got["fc1.weight"][:] = -1  # a copy
    assert (session.importance()["fc1.weight"] >= 0).all()


def test_importance_does_not_change_training():
    masks = masks_of(CONV)
    with_it, without = (opened(CONV, masks=masks, sgd=SGD(0.1, 0.9, 0.01)) for _ in range(2))
    for seed in range(3):
        x, y = batch(CONV, seed=seed)
        assert with_it.step(x, y, importance=True) == without.step(x, y)
    assert same(with_it.params(), without.params())


# Losses


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_that_of_the_step_before_its_update(loss, size):
    session = opened(PLAIN, masks=masks_of(PLAIN), loss=loss, batch_size=8)
    for seed in range(3):
        x, y = batch(PLAIN, size, seed)
        before, params = session.loss(x, y), session.params()
        assert same(session.params(), params)  # asking changes nothing
        assert session.step(x, y) == before
        assert session.loss(x, y) != before


@pytest.mark.parametrize("loss", LOSSES)
def test_unperturbed_loss(loss):
    session, (x, y) = opened(CONV, masks=masks_of(CONV), loss=loss), batch(CONV)
    assert session.loss_perturbed(x, y, seed=1, k=0, sigma=0.0) == session.loss(x, y)


def test_perturbed_loss_is_deterministic_by_seed_and_k():
    masks, (x, y) = masks_of(CONV), batch(CONV)
    session, other = (opened(CONV, masks=masks) for _ in range(2))
    draws = [(seed, k) for seed in range(4) for k in range(4)]
    first = {d: session.loss_perturbed(x, y, seed=d[0], k=d[1], sigma=0.1) for d in draws}
    before = session.params()
    again = {d: other.loss_perturbed(x, y, seed=d[0], k=d[1], sigma=0.1) for d in draws[::-1]}
    assert first == again
    assert len(set(first.values())) == len(draws)
    assert same(session.params(), before)


@pytest.mark.parametrize("loss", LOSSES)
def test_perturbed_loss_is_the_loss_at_the_perturbed_parameters(loss):
    """The direction: standard normal by tensor, from the (seed, k) stream; masks apply to it."""
    masks, (x, y) = masks_of(CONV), batch(CONV)
    frozen = {"conv2.bias"}
    params = apply_mask(start(CONV), masks)
    session = opened(CONV, params, masks=masks, frozen=frozen, loss=loss)
    moved = dict(params)
    for name, shape in CONV.param_shapes.items():
        if name not in frozen:
            z = generator(7, 0, 3, f"direction/{name}").standard_normal(shape, dtype=np.float32)
            moved[name] = params[name] + np.float32(0.05) * z * masks.get(name, True)
    got = session.loss_perturbed(x, y, seed=7, k=3, sigma=0.05)
    assert got == pytest.approx(opened(CONV, moved, loss=loss).loss(x, y), rel=1e-6)
    assert abs(got - session.loss(x, y)) > 1e-4


def test_perturbed_difference_is_the_directional_derivative():
    params, (x, y) = start(MLP), batch(MLP)
    session = opened(MLP, params)
    _, _, gradients, _ = mlp_by_hand(params, x, y, "ce")
    slope = sum(
        (generator(0, 0, 5, f"direction/{n}").standard_normal(g.shape, dtype=np.float32) * g).sum()
        for n, g in gradients.items()
    )
    up, down = (session.loss_perturbed(x, y, seed=0, k=5, sigma=s) for s in (1e-3, -1e-3))
    assert (up - down) / 2e-3 == pytest.approx(slope, rel=1e-2)


# BatchNorm


def norm_by_hand(x, mean, var, params, eps=1e-5):
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
    scaled = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    return scaled * params["bn.weight"].reshape(shape) + params["bn.bias"].reshape(shape)


@pytest.mark.parametrize("shape", [(3, 4, 4), (3,)])
def test_batch_norm_by_hand(shape):
    """Training: batch moments, and running ones moved by momentum, the variance unbiased."""
    spec = sequential(shape, [("bn", BatchNorm(momentum=0.3))])
    params = start(spec)
    session = opened(spec, params)
    x = 2 + 3 * np.random.default_rng(0).standard_normal((6, *shape)).astype(np.float32)
    axes = (0, 2, 3) if len(shape) == 3 else (0,)
    count = x.size // 3

    mean, var = params["bn.running_mean"], params["bn.running_var"]
    out = session.forward(x)["bn"]
    np.testing.assert_allclose(out, norm_by_hand(x, mean, var, params), rtol=1e-4, atol=1e-5)
    assert same(session.params(), params)  # evaluation moves nothing

    out = session.forward(x, training=True)["bn"]
    expected = norm_by_hand(x, x.mean(axes), x.var(axes), params)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    after = session.params()
    np.testing.assert_allclose(
        after["bn.running_mean"], 0.7 * mean + 0.3 * x.mean(axes), rtol=1e-5, atol=1e-6
    )
    unbiased = x.var(axes) * count / (count - 1)
    np.testing.assert_allclose(after["bn.running_var"], 0.7 * var + 0.3 * unbiased, rtol=1e-5)
    assert same(after["bn.weight"], params["bn.weight"])


def test_running_statistics_move_in_training_only():
    session, (x, y) = opened(CONV), batch(CONV)
    before = session.params()
    assert set(before) == set(CONV.tensor_shapes) and set(BUFFERS) <= set(before)
    session.loss(x, y)
    session.loss_perturbed(x, y, seed=0, k=0, sigma=0.1)
    session.forward(x, taps=["bn"])
    assert same(session.params(), before)
    session.step(x, y)
    after = session.params()
    assert all(not same(after[name], before[name]) for name in BUFFERS)
    assert not set(BUFFERS) & set(session.importance())


def test_frozen_running_statistics_do_not_drift():
    """A frozen BatchNorm runs in evaluation mode."""
    frozen = {"bn.weight", "bn.bias", *BUFFERS}
    session, (x, y) = opened(CONV, frozen=frozen), batch(CONV)
    before = session.params()
    evaluated = session.forward(x, taps=["bn"])["bn"].copy()
    np.testing.assert_array_equal(session.forward(x, taps=["bn"], training=True)["bn"], evaluated)
    session.step(x, y)
    after = session.params()
    assert all(same(after[name], before[name]) for name in frozen)
    assert not same(after["conv1.weight"], before["conv1.weight"])


# Every layer, against torch.nn

IMAGE = (4, 7, 6)


def single(layer, shape=IMAGE):
    return sequential(shape, [("n", layer)])


def two_inputs(layer):
    """Add or Scale of a convolution and something of the input."""
    gate = Node("other", GlobalAvgPool() if isinstance(layer, Scale) else ReLU(), ("input",))
    conv = Node("conv", Conv2d(4, 3, padding=1, bias=False), ("input",))
    return ModelSpec(IMAGE, (conv, gate, Node("n", layer, ("conv", "other"))))


class AddReference(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(x) + nn.ReLU()(x)


class ScaleReference(AddReference):
    def forward(self, x):
        return self.conv(x) * nn.AdaptiveAvgPool2d(1)(x)


LAYER_CASES = {
    "linear": (single(Linear(5), (6,)), nn.Linear(6, 5)),
    "linear-no-bias": (single(Linear(5, bias=False), (6,)), nn.Linear(6, 5, bias=False)),
    "conv": (single(Conv2d(6, 3)), nn.Conv2d(4, 6, 3)),
    "conv-options": (
        single(Conv2d(6, 3, stride=2, padding=2, groups=2, bias=False)),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, groups=2, bias=False),
    ),
    "depthwise": (single(Conv2d(4, 3, groups=4)), nn.Conv2d(4, 4, 3, groups=4)),
    "max-pool": (single(MaxPool2d(2)), nn.MaxPool2d(2)),
    "max-pool-options": (single(MaxPool2d(3, 2, 1)), nn.MaxPool2d(3, 2, 1)),
    "avg-pool": (single(AvgPool2d(2)), nn.AvgPool2d(2)),
    "avg-pool-options": (single(AvgPool2d(3, 2, 1)), nn.AvgPool2d(3, 2, 1)),
    "global-pool": (
        single(GlobalAvgPool()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    ),
    "group-norm": (single(GroupNorm(groups=2)), nn.GroupNorm(2, 4)),
    "group-norm-eps": (single(GroupNorm(eps=0.1)), nn.GroupNorm(1, 4, eps=0.1)),
    "batch-norm": (single(BatchNorm(0.01, 0.2)), nn.BatchNorm2d(4, 0.01, 0.2)),
    "batch-norm-vector": (single(BatchNorm(), (4,)), nn.BatchNorm1d(4)),
    "relu": (single(ReLU()), nn.ReLU()),
    "hardswish": (single(Hardswish()), nn.Hardswish()),
    "hardsigmoid": (single(Hardsigmoid()), nn.Hardsigmoid()),
    "flatten": (single(Flatten()), nn.Flatten()),
    "add": (two_inputs(Add()), AddReference()),
    "scale": (two_inputs(Scale()), ScaleReference()),
}


def test_every_layer_has_a_case():
    seen = {type(node.layer).__name__ for spec, _ in LAYER_CASES.values() for node in spec.nodes}
    assert seen == set(LAYERS)


@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [2, 5])
def test_layer_is_that_of_torch(case, training, size):
    """Output, parameter gradients and buffers; inputs of all signs, beyond ±3 too."""
    spec, module = LAYER_CASES[case]
    params = start(spec)
    ours = {name: name.split(".")[1] for name in params if name.startswith("n.")}
    ours |= {name: name for name in params if name.startswith("conv.")}
    state = {theirs: torch.tensor(params[name]) for name, theirs in ours.items()}
    if "batch-norm" in case:
        state["num_batches_tracked"] = torch.tensor(0)
    module.load_state_dict(state)
    module.train(training)
    rng = np.random.default_rng(3)
    x = 3 * rng.standard_normal((size, *spec.input_shape)).astype(np.float32)
    session = opened(spec, params)
    got = session.forward(x, training=training)["n"]
    assert got.shape == (size, *spec.output_shape)
    expected = module(torch.tensor(x))
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    after = module.state_dict()
    for name, theirs in ours.items():
        np.testing.assert_allclose(session.params()[name], after[theirs].numpy(), rtol=1e-6)
    if training and spec.param_shapes:
        entering = rng.standard_normal(got.shape).astype(np.float32)
        gradients = session.backward({"n": entering})
        expected.backward(torch.tensor(entering))
        held = dict(module.named_parameters())
        theirs = {name: held[ours[name]].grad.numpy() for name in spec.param_shapes}
        assert_near(gradients, theirs, 1e-4)
        module.zero_grad()


@pytest.mark.parametrize(
    ("layer", "points"),
    [
        (Hardswish(), {-4: 0, -3: 0, -1: -1 / 3, 0: 0, 1: 2 / 3, 3: 3, 5: 5}),
        (Hardsigmoid(), {-4: 0, -3: 0, -1: 1 / 3, 0: 0.5, 1: 2 / 3, 3: 1, 5: 1}),
        (ReLU(), {-2: 0, 0: 0, 2: 2}),
    ],
)
def test_activation_by_hand(layer, points):
    session = opened(single(layer, (len(points),)), {})
    got = session.forward(np.array([list(points)], np.float32))["n"][0]
    np.testing.assert_allclose(got, list(points.values()), atol=1e-6)


def test_gradients_flow_back_through_every_layer():
    """To a convolution below: Add and Scale with three and with repeated inputs."""
    nodes = (
        Node("conv", Conv2d(4, 3, padding=1), ("input",)),
        Node("swish", Hardswish(), ("conv",)),
        Node("gn", GroupNorm(groups=2), ("swish",)),
        Node("gate", GlobalAvgPool(), ("conv",)),
        Node("sigmoid", Hardsigmoid(), ("gate",)),
        Node("scale", Scale(), ("gn", "sigmoid")),
        Node("add", Add(), ("scale", "conv", "conv")),
        Node("avg", AvgPool2d(3, 2, 1), ("add",)),
        Node("max", MaxPool2d(3, 2, 1), ("avg",)),
        Node("flat", Flatten(), ("max",)),
        Node("fc", Linear(3), ("flat",)),
    )
    spec = ModelSpec(IMAGE, nodes)
    params = start(spec)
    x, y = batch(spec)
    t = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    conv = F.conv2d(torch.tensor(x), t["conv.weight"], t["conv.bias"], padding=1)
    gn = F.group_norm(F.hardswish(conv), 2, t["gn.weight"], t["gn.bias"])
    add = gn * F.hardsigmoid(conv.mean((2, 3), keepdim=True)) + 2 * conv
    flat = nn.MaxPool2d(3, 2, 1)(nn.AvgPool2d(3, 2, 1)(add)).flatten(1)
    loss = F.cross_entropy(F.linear(flat, t["fc.weight"], t["fc.bias"]), torch.tensor(y))
    loss.backward()
    session = opened(spec, params, sgd=SGD(1.0))
    assert session.step(x, y) == pytest.approx(loss.item(), rel=1e-5)
    moved = {name: params[name] - value for name, value in session.params().items()}
    assert_near(moved, {name: tensor.grad.numpy() for name, tensor in t.items()})


def test_what_does_not_reach_the_output_stays():
    """A branch for taps only: a step leaves it as it is."""
    nodes = (
        Node("fc1", Linear(6), ("input",)),
        Node("exit", Linear(4), ("fc1",)),
        Node("relu", ReLU(), ("fc1",)),
        Node("fc2", Linear(4), ("relu",)),
    )
    spec = ModelSpec((7,), nodes)
    params, (x, y) = start(spec), batch(spec)
    session = opened(spec, params)
    session.step(x, y, importance=True)
    after = session.params()
    assert same(after["exit.weight"], params["exit.weight"])
    assert not same(after["fc1.weight"], params["fc1.weight"])
    assert not session.importance()["exit.weight"].any()
    session.forward(x, taps=["exit"], training=True)
    gradients = session.backward({"exit": np.ones((5, 4), np.float32)})
    assert gradients["exit.weight"].any() and not gradients["fc2.weight"].any()


# Sessions


@pytest.mark.parametrize("size", [1, 3, 7])
def test_batches_of_any_size_up_to_batch_size(size):
    """Images have many values per channel, so BatchNorm trains on one example too."""
    session, (x, y) = opened(CONV, masks=masks_of(CONV), batch_size=7), batch(CONV, size)
    assert np.isfinite(session.step(x, y, importance=True))
    assert np.isfinite(session.loss(x, y))
    assert session.forward(x)["fc"].shape == (size, 3)
    assert all(np.isfinite(value).all() for value in session.params().values())


def test_loss_of_a_batch_is_the_mean_of_its_examples():
    session, (x, y) = opened(PLAIN), batch(PLAIN, 5)
    singles = [session.loss(x[i : i + 1], y[i : i + 1]) for i in range(5)]
    assert session.loss(x, y) == pytest.approx(np.mean(singles), rel=1e-5)


def test_sessions_own_their_arrays():
    params, (x, y) = start(CONV), batch(CONV)
    kept = {name: value.copy() for name, value in params.items()}
    session = opened(CONV, params)
    session.step(x, y)
    assert same(params, kept)  # training does not write into the caller's arrays
    for value in params.values():
        value[:] = 77
    session.load(kept)
    assert same(session.params(), kept)
    session.load(params)
    for value in params.values():
        value[:] = 5
    assert all((value == 77).all() for value in session.params().values())


def test_params_are_copies():
    session = opened(CONV)
    held = session.params()
    expected = {name: value.copy() for name, value in held.items()}
    for value in held.values():
        value[:] = 9
    assert same(session.params(), expected)
    first = session.params()
    session.step(*batch(CONV))
    assert same(first, expected)


def test_steps_do_not_write_into_the_batch():
    session, (x, y) = opened(CONV, loss="bce"), batch(CONV)
    before = x.copy(), y.copy()
    session.step(x, y, importance=True)
    session.loss_perturbed(x, y, seed=0, k=0, sigma=0.1)
    assert same((x, y), before)


def test_read_only_arrays_are_taken():
    """As arrays decoded from bytes or mapped from a file are."""
    params, (x, y) = start(PLAIN), batch(PLAIN)
    masks = masks_of(PLAIN)
    gradient = np.ones((5, 3), np.float32)
    for array in (*params.values(), *masks.values(), x, y, gradient):
        array.setflags(write=False)
    session = opened(PLAIN, params, masks=masks)
    session.step(x, y)
    session.loss(x, y)
    session.forward(x, training=True)
    session.backward({"fc2": gradient})
    session.apply(params)


def test_load_keeps_the_optimiser_state():
    """The second step after a load to the same point is longer by the momentum."""
    spec = sequential((1,), [("fc", Linear(1, bias=False))])
    weight = {"fc.weight": np.array([[2.0]], np.float32)}
    session = opened(spec, weight, sgd=SGD(0.1, 0.5))
    gradient = {"fc.weight": np.array([[1.0]], np.float32)}
    session.apply(gradient)
    session.load(weight)
    session.apply(gradient)
    assert session.params()["fc.weight"] == pytest.approx(2 - 0.15)


def test_sessions_do_not_share_state():
    engine, params = TorchEngine(1), start(MLP)
    one, two = (
        engine.open(MLP, params, SubModel(), batch_size=5, optimizer=SGD(0.1, 0.9))
        for _ in range(2)
    )
    one.step(*batch(MLP))
    assert same(two.params(), params)


def test_training_repeats_bit_for_bit():
    ends = []
    for _ in range(2):
        session = opened(CONV, masks=masks_of(CONV), sgd=SGD(0.1, 0.9))
        for seed in range(3):
            session.step(*batch(CONV, seed=seed))
        ends.append(session.params())
    assert same(*ends)


def test_memory_claim():
    masks = masks_of(CONV)
    assert opened(CONV).peak_memory_bytes > 0
    assert opened(CONV, masks=masks).peak_memory_bytes > opened(CONV).peak_memory_bytes
    assert opened(CONV, batch_size=50).peak_memory_bytes > opened(CONV).peak_memory_bytes


# Refusals


def try_open(params=None, sub_model=SubModel(), loss="ce"):  # noqa: B008
    params = init_params(MLP, 0) if params is None else params
    TorchEngine().open(MLP, params, sub_model, batch_size=1, optimizer=SGD(0.1), loss=loss)


@pytest.mark.parametrize("name", MLP.tensor_shapes)
def test_a_missing_parameter_is_named(name):
    params = start(MLP)
    del params[name]
    with pytest.raises(ValueError, match=rf"'{name}' of shape .* is missing"):
        try_open(params)


def test_a_missing_buffer_is_named():
    params = start(CONV)
    del params["bn.running_var"]
    with pytest.raises(ValueError, match=r"'bn\.running_var' .*missing"):
        opened(CONV, params)


def test_a_wrong_shape_is_named():
    params = start(MLP) | {"fc2.bias": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"'fc2\.bias' has shape \(2, 2\), expected \(4,\)"):
        try_open(params)


@pytest.mark.parametrize(
    "masks",
    [{"fc1.weight": np.ones((7, 6), bool)}, {"other.weight": np.ones((6, 7), bool)}],
)
def test_a_mask_that_does_not_fit_is_named(masks):
    (name,) = masks
    with pytest.raises(ValueError, match=f"mask '{name}'"):
        try_open(sub_model=SubModel(masks=masks))


def test_slices_and_output_modules_are_refused():
    with pytest.raises(ValueError, match="slices"):
        try_open(sub_model=SubModel(index={"fc1.bias": (np.arange(3),)}))
    with pytest.raises(ValueError, match="output module"):
        try_open(sub_model=SubModel(output_module="head"))


@pytest.mark.parametrize("loss", ["mse", "CE", ""])
def test_an_unknown_loss_is_refused(loss):
    with pytest.raises(ValueError, match=f"'ce' or 'bce', got {loss!r}"):
        try_open(loss=loss)


def test_load_checks_what_open_checks():
    session = opened(MLP)
    before = session.params()
    missing = {name: value for name, value in start(MLP).items() if name != "fc2.bias"}
    with pytest.raises(ValueError, match=r"'fc2\.bias' .*missing"):
        session.load(missing)
    with pytest.raises(ValueError, match=r"'fc2\.bias' has shape"):
        session.load(start(MLP) | {"fc2.bias": np.zeros(5, np.float32)})
    assert same(session.params(), before)


def test_engines_by_name():
    engine = open_engine("torch", 1)
    assert (engine.name, engine.arithmetic) == ("torch", "masked")
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="no engine named 'jax'"):
        open_engine("jax", 1)
