"""Ranges of hyper-parameters, and the learning rate by hand."""

from __future__ import annotations

from math import inf, nan

import pytest

from fedlean.layers import BatchNorm, Flatten, Linear
from fedlean.spec import sequential
from fedlean.train.hyperparameters import at_least, check_sgd, in_range, one_of

SPEC = sequential((3,), [("fc", Linear(2))])
GOOD = {
    "lr": 0.1,
    "local_steps": 5,
    "batch_size": 20,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "loss": "ce",
}


@pytest.mark.parametrize("value", [0.0, 0, 0.5, 1, 1.0, 5e-324])
def test_in_range(value):
    in_range("x", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, nan, inf, -inf, True, False])
def test_out_of_range(value):
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\], got") as error:
        in_range("x", value, 0.0, 1.0)
    assert repr(value) in str(error.value)


def test_open_low():
    in_range("x", 1e-300, 0.0, 1.0, open_low=True)
    with pytest.raises(ValueError, match=r"x must lie in \(0, 1\], got 0.0"):
        in_range("x", 0.0, 0.0, 1.0, open_low=True)


@pytest.mark.parametrize("value", [1, 2, 1 << 31])
def test_at_least(value):
    at_least("n", value, 1)


def test_more_than_anything_counted():
    for value in ((1 << 31) + 1, 10**30, 10**400):
        with pytest.raises(ValueError, match=f"n must be at most {1 << 31}, got"):
            at_least("n", value, 1)
    with pytest.raises(ValueError, match="n must be at most 7, got 8"):
        at_least("n", 8, 1, most=7)


def test_one_of():
    one_of("x", "b", ("a", "b"))
    with pytest.raises(ValueError, match="x must be one of a, b, got 'c'"):
        one_of("x", "c", ("a", "b"))


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, 2.5, nan, inf, "3", None])
def test_not_at_least(value):
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got"):
        at_least("n", value, 1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lr": 100.0},
        {"lr": 1},
        {"local_steps": 1},
        {"batch_size": 1},
        {"momentum": 0.0},
        {"momentum": 0.9999},
        {"weight_decay": 0.0},
        {"weight_decay": 10.0},
        {"loss": "bce"},
    ],
)
def test_good_sgd(change):
    check_sgd(SPEC, **{**GOOD, **change})


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, bad) for name in ("lr", "momentum", "weight_decay") for bad in (nan, inf, -inf, True)]
    + [(name, bad) for name in ("local_steps", "batch_size") for bad in (0, -3, 1.5, nan, True)]
    + [
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", 100.1),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("weight_decay", -1e-9),
        ("weight_decay", 10.1),
        ("loss", "mse"),
        ("loss", "CE"),
        ("loss", ""),
    ],
)
def test_bad_sgd_names_the_setting(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must ") as error:
        check_sgd(SPEC, **{**GOOD, name: value})
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_a_batch_of_one_cannot_train_batch_norm():
    spec = sequential((3,), [("fc", Linear(4)), ("bn", BatchNorm()), ("out", Linear(2))])
    with pytest.raises(ValueError, match="a batch of 1 example, but BatchNorm 'bn' needs 2 values"):
        check_sgd(spec, **{**GOOD, "batch_size": 1})
    check_sgd(spec, **{**GOOD, "batch_size": 2})
    image = sequential(
        (1, 4, 4), [("bn", BatchNorm()), ("flat", Flatten()), ("out", Linear(2))]
    )  # 16 values a channel
    check_sgd(image, **{**GOOD, "batch_size": 1})
