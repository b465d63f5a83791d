"""Losses over several outputs: by hand, by differences, against PyTorch and DepthFL's own loop."""

from __future__ import annotations

from functools import partial
from math import log

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedlean.train.loss_gradient import loss_and_gradient
from fedlean.train.losses import (
    distillation,
    divergence,
    exits_cross_entropy,
    logits_mse,
    mutual_distillation,
)

EXITS = ("one", "two", "three")
Y = np.array([0, 3, 1, 3])


def logits(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (2 * rng.standard_normal((4, 5))).astype(np.float32) for name in EXITS}


LOSSES = {
    "exits": partial(exits_cross_entropy, exits=EXITS),
    "weighted exits": partial(exits_cross_entropy, exits=EXITS, weights=(0.5, 1, 2)),
    "mutual": partial(mutual_distillation, exits=EXITS),
    "mutual, soft": partial(mutual_distillation, exits=EXITS, weight=0.3, temperature=2.0),
    "two exits": partial(mutual_distillation, exits=EXITS[:2]),
    "mse": partial(logits_mse, student="one", teacher="two"),
    "kl": partial(distillation, student="one", teacher="two"),
    "kl, soft": partial(distillation, student="one", teacher="two", temperature=4.0),
    "kl of the student": partial(divergence, student="one", teacher="two"),
}


def in_torch(name: str, taps: dict[str, torch.Tensor]) -> torch.Tensor:
    """The published formulas, and autograd's work."""
    y = torch.from_numpy(Y)

    def kl(student, teacher, t=1.0):
        p = F.softmax(teacher.detach() / t, 1)
        return t * t * F.kl_div(F.log_softmax(student / t, 1), p, reduction="batchmean")

    def mutual(exits, weight=1.0, t=1.0):
        loss = sum(F.cross_entropy(taps[i], y) for i in exits)
        for i in exits:
            for j in exits:
                if i != j:
                    loss = loss + weight * kl(taps[i], taps[j], t) / (len(exits) - 1)
        return loss

    return {
        "exits": lambda: sum(F.cross_entropy(taps[i], y) for i in EXITS),
        "weighted exits": lambda: sum(
            w * F.cross_entropy(taps[i], y) for i, w in zip(EXITS, (0.5, 1, 2), strict=True)
        ),
        "mutual": lambda: mutual(EXITS),
        "mutual, soft": lambda: mutual(EXITS, 0.3, 2.0),
        "two exits": lambda: mutual(EXITS[:2]),
        "mse": lambda: F.mse_loss(taps["one"], taps["two"].detach()),
        "kl": lambda: kl(taps["one"], taps["two"]),
        "kl, soft": lambda: kl(taps["one"], taps["two"], 4.0),
        "kl of the student": lambda: F.kl_div(
            F.log_softmax(taps["two"].detach(), 1),
            F.log_softmax(taps["one"], 1),
            reduction="batchmean",
            log_target=True,
        ),
    }[name]()


@pytest.mark.parametrize("name", LOSSES)
def test_pytorch_finds_the_same(name):
    arrays = logits()
    value, gradients = LOSSES[name](arrays, Y)
    tensors = {n: torch.from_numpy(v).double().requires_grad_() for n, v in arrays.items()}
    expected = in_torch(name, tensors)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    flowing = {n: t.grad for n, t in tensors.items() if t.grad is not None}
    assert gradients.keys() == flowing.keys()
    for at, gradient in flowing.items():
        assert gradients[at].dtype == np.float32
        np.testing.assert_allclose(gradients[at], gradient.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_slopes(name):
    """With the targets held, which is what detaching them means."""
    arrays = {n: v.astype(np.float64) for n, v in logits(1).items()}
    _, gradients = LOSSES[name](arrays, Y)
    for own, gradient in gradients.items():
        for at in [(0, 0), (1, 3), (3, 4)]:
            values = []
            for step in (1e-5, -1e-5):
                moved = {n: v.copy() for n, v in arrays.items()}
                moved[own][at] += step
                values.append(with_held_targets(name, moved, arrays, own))
            assert gradient[at] == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-6)


def with_held_targets(name, moved, before, own) -> float:
    """The terms in which `own` is a student; as a target it is what it was."""
    loss = LOSSES[name]
    if "exits" not in loss.keywords or loss.func is exits_cross_entropy:
        return loss(moved, Y)[0]
    exits, given = loss.keywords["exits"], loss.keywords
    total, _ = exits_cross_entropy({own: moved[own]}, Y, exits=[own])
    for other in exits:
        if other != own:
            pair = {"s": moved[own], "t": before[other]}
            t = given.get("temperature", 1.0)
            value, _ = distillation(pair, Y, student="s", teacher="t", temperature=t)
            total += given.get("weight", 1.0) / (len(exits) - 1) * value
    return total


def test_by_hand():
    """Exits that say (3/4, 1/4) and (1/2, 1/2), label 0.

    CE: ln 4/3 and ln 2.  KL(p₂ || p₁) = ½ ln ⅔ + ½ ln 2 = ½ ln 4/3, KL(p₁ || p₂) = ¾ ln 3/2 +
    ¼ ln ½; with two exits the factor 1/(E-1) is 1.  Gradient at exit 1: (3/4 - 1) + (3/4 - 1/2).
    """
    taps = {
        "a": np.array([[log(3), 0]], np.float32),
        "b": np.array([[0, 0]], np.float32),
    }
    value, gradients = mutual_distillation(taps, np.array([0]), exits=["a", "b"])
    mutual = 0.5 * log(4 / 3) + 0.75 * log(3 / 2) + 0.25 * log(1 / 2)
    assert value == pytest.approx(log(4 / 3) + log(2) + mutual, rel=1e-6)
    assert gradients["a"] == pytest.approx(np.array([[0.0, 0.0]]), abs=1e-6)
    assert gradients["b"] == pytest.approx(np.array([[-0.5 - 0.25, 0.5 + 0.25]]), abs=1e-6)
    value, gradients = logits_mse(taps, np.array([0]), student="b", teacher="a")
    assert value == pytest.approx(log(3) ** 2 / 2, rel=1e-6)
    assert gradients["b"] == pytest.approx(np.array([[-log(3), 0]]), rel=1e-6)
    value, gradients = distillation(taps, np.array([0]), student="b", teacher="a")
    assert value == pytest.approx(0.75 * log(3 / 2) + 0.25 * log(1 / 2), rel=1e-6)
    assert gradients["b"] == pytest.approx(np.array([[-0.25, 0.25]]), rel=1e-6)


def test_one_exit_is_cross_entropy():
    taps = logits()
    value, gradients = mutual_distillation(taps, Y, exits=["two"])
    expected, gradient = loss_and_gradient(taps["two"], Y, "ce")
    assert value == expected and gradients.keys() == {"two"}
    np.testing.assert_array_equal(gradients["two"], gradient)


def test_equal_exits_have_nothing_to_tell_each_other():
    same = dict.fromkeys(EXITS, logits()["one"])
    value, gradients = mutual_distillation(same, Y, exits=EXITS)
    plain, expected = exits_cross_entropy(same, Y, exits=EXITS)
    assert value == pytest.approx(plain)
    assert all(np.allclose(gradients[name], expected[name], atol=1e-8) for name in EXITS)


def test_large_logits_do_not_overflow():
    taps = {"a": np.array([[1e4, -1e4]], np.float32), "b": np.array([[-1e4, 1e4]], np.float32)}
    value, gradients = mutual_distillation(taps, np.array([0]), exits=["a", "b"])
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: exits_cross_entropy(t, Y, exits=["four"]), "'four' is not tapped, only 'one'"),
        (lambda t: exits_cross_entropy(t, Y, exits=[]), "exits must be one name or more"),
        (lambda t: mutual_distillation(t, Y, exits=["one", "one"]), "each once"),
        (lambda t: exits_cross_entropy(t, Y, exits=EXITS, weights=[1]), "1 weights for 3 exits"),
        (lambda t: logits_mse(t, Y, student="one", teacher="x"), "'x' is not tapped"),
        (
            lambda t: logits_mse(t | {"x": Y}, Y, student="one", teacher="x"),
            r"'one' has shape \(4, 5\) and 'x' \(4,\)",
        ),
        (
            lambda t: distillation(t, Y, student="one", teacher="two", temperature=0.0),
            "temperature must be positive, got 0.0",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(logits())
