"""Bad input: a ValueError naming the argument, and a session that goes on as if nothing had been.

Nothing is converted silently: float64, Fortran order or int32 labels are refused too.
"""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import CONV, MLP, batch, masks_of, opened, start
from federation import same

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.layers import BatchNorm, Flatten, Linear, ReLU
from fedlean.spec import sequential


def with_value(array, value):
    """A copy with one element, not the first, changed."""
    out = array.copy()
    out.reshape(-1)[-2] = value
    return out


def misaligned(array):
    """Equal values at an odd address, as a view into received bytes may have."""
    raw = np.zeros(array.nbytes + 1, np.uint8)
    out = raw[1:].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


BAD_X = {
    "nan": (lambda x: with_value(x, np.nan), "x holds NaN or infinity"),
    "infinity": (lambda x: with_value(x, -np.inf), "x holds NaN or infinity"),
    "float64": (lambda x: x.astype(np.float64), "x is float64, expected float32"),
    "float16": (lambda x: x.astype(np.float16), "x is float16, expected float32"),
    "uint8": (lambda x: x.astype(np.uint8), "x is uint8, expected float32"),
    "byte order": (lambda x: x.astype(">f4"), "x is >f4, expected float32"),
    "fortran": (np.asfortranarray, "x is not C-contiguous"),
    "every other": (lambda x: np.repeat(x, 2, 0)[::2], "x is not C-contiguous"),
    "misaligned": (misaligned, "x is not C-contiguous and aligned"),
    "no batch": (lambda x: x[0], r"x has shape .*, expected \(B, "),
    "another axis": (lambda x: x[..., None], r"x has shape .*, expected \(B, "),
    "cropped": (lambda x: x[..., 1:].copy(), r"x has shape .*, expected \(B, "),
    "scalar": (lambda x: np.array(1.0, np.float32), r"x has shape \(\), expected \(B, "),
    "empty": (lambda x: x[:0], "x holds 0 examples, expected 1 to batch_size 5"),
    "too many": (lambda x: np.repeat(x, 2, 0), "x holds 10 examples, .* batch_size 5"),
    "list": (lambda x: x.tolist(), "x is a list, expected a NumPy array"),
    "none": (lambda x: None, "x is a NoneType"),
}
BAD_Y = {
    "a class too many": (lambda y: with_value(y, 3), "y has labels from 0 to 3, expected 0 to 2"),
    "negative": (lambda y: with_value(y, -1), "y has labels from -1"),
    "huge": (lambda y: with_value(y, 2**62), "y has labels from"),
    "float": (lambda y: y.astype(np.float32), "y is float32, expected int64"),
    "int32": (lambda y: y.astype(np.int32), "y is int32, expected int64"),
    "bool": (lambda y: y > 0, "y is bool, expected int64"),
    "one hot": (lambda y: np.eye(3, dtype=np.int64)[y], r"y has shape \(5, 3\), expected \(5,\)"),
    "short": (lambda y: y[:-1], r"y has shape \(4,\), expected \(5,\)"),
    "reversed": (lambda y: y[::-1], "y is not C-contiguous"),
    "list": (lambda y: y.tolist(), "y is a list"),
}
CALLS = {
    "step": lambda session, x, y: session.step(x, y, importance=True),
    "loss": lambda session, x, y: session.loss(x, y),
    "forward": lambda session, x, y: session.forward(x),
    "training forward": lambda session, x, y: session.forward(x, training=True),
}


@pytest.fixture
def untouched(engine):
    """A session for CONV that after the test must train as one that never saw bad input."""
    masks, sgd = masks_of(CONV), SGD(0.1, 0.9, 0.01, clip_norm=1.0, proximal=0.1)
    session, expected = (opened(engine, CONV, masks=masks, sgd=sgd) for _ in range(2))
    for held in (session, expected):
        held.step(*batch(CONV, seed=3))
    yield session
    for seed in range(2):
        x, y = batch(CONV, seed=seed)
        assert session.step(x, y, importance=True) == expected.step(x, y, importance=True)
    assert same(session.params(), expected.params())
    assert same(session.importance(), expected.importance())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bad", BAD_X)
def test_bad_x(untouched, call, bad):
    change, match = BAD_X[bad]
    x, y = batch(CONV)
    with pytest.raises(ValueError, match=match):
        CALLS[call](untouched, change(x), y)


@pytest.mark.parametrize("call", ["step", "loss"])
@pytest.mark.parametrize("bad", BAD_Y)
def test_bad_y(untouched, call, bad):
    change, match = BAD_Y[bad]
    x, y = batch(CONV)
    y[:3] = 0, 1, 2
    with pytest.raises(ValueError, match=match):
        CALLS[call](untouched, x, change(y))


def test_unknown_taps(untouched):
    x, _ = batch(CONV)
    for name in ("nowhere", "input", "conv1.weight"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            untouched.forward(x, taps=["relu1", name], training=True)


BAD_GRADIENTS = {
    "nan": lambda g: with_value(g, np.nan),
    "float64": lambda g: g.astype(np.float64),
    "fortran": np.asfortranarray,
    "shape": lambda g: g[..., None],
    "short": lambda g: g[:-1],
    "list": lambda g: g.tolist(),
}


@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_bad_output_gradients(engine, bad):
    """The forward before is not used up: the right gradients may still come."""
    session, (x, _) = opened(engine, MLP), batch(MLP)
    right = np.ones((5, 4), np.float32)
    session.forward(x, training=True)
    expected = session.backward({"fc2": right})
    session.forward(x, training=True)
    with pytest.raises(ValueError, match="output gradient 'fc2' "):
        session.backward({"fc2": BAD_GRADIENTS[bad](right)})
    with pytest.raises(ValueError, match="output_gradients is empty"):
        session.backward({})
    with pytest.raises(ValueError, match=r"enter at 'fc2\.weight'"):
        session.backward({"fc2": right, "fc2.weight": right})
    assert same(session.backward({"fc2": right}), expected)


@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_bad_gradients(untouched, bad):
    right = {name: np.ones(shape, np.float32) for name, shape in CONV.param_shapes.items()}
    wrong = BAD_GRADIENTS[bad](right["conv1.weight"])
    with pytest.raises(ValueError, match=r"gradient 'conv1\.weight' "):
        untouched.apply(right | {"conv1.weight": wrong})
    for name in ("bn.running_mean", "other.weight"):
        with pytest.raises(ValueError, match=f"gradient '{name}'"):
            untouched.apply(right | {name: np.ones(4, np.float32)})


# Parameters, on `open` and on `load`

BAD_PARAMS = {
    "nan": (lambda w: with_value(w, np.nan), "holds NaN or infinity"),
    "infinity": (lambda w: with_value(w, np.inf), "holds NaN or infinity"),
    "float64": (lambda w: w.astype(np.float64), "is float64, expected float32"),
    "fortran": (np.asfortranarray, "is not C-contiguous"),
    "misaligned": (misaligned, "is not C-contiguous and aligned"),
    "transposed": (lambda w: w.T.copy(), "has shape"),
    "flat": (lambda w: w.reshape(-1), "has shape"),
    "list": (lambda w: w.tolist(), "is a list"),
}


def refused(engine, session, spec, params, match, masks=None):
    """By both ways in."""
    with pytest.raises(ValueError, match=match):
        session.load(params)
    with pytest.raises(ValueError, match=match):
        opened(engine, spec, params, masks=masks)


@pytest.mark.parametrize("bad", BAD_PARAMS)
def test_bad_parameters(engine, untouched, bad):
    change, match = BAD_PARAMS[bad]
    params, masks = start(CONV), masks_of(CONV)
    masks["fc.weight"][:] = True
    masks["fc.weight"][0, 0] = False  # not where `change` puts its value
    session = opened(engine, CONV, masks=masks)
    wrong = params | {"fc.weight": change(params["fc.weight"])}
    refused(engine, session, CONV, wrong, rf"parameter 'fc\.weight' {match}", masks)
    wrong = params | {"bn.running_var": with_value(params["bn.running_var"], np.nan)}
    refused(engine, untouched, CONV, wrong, r"parameter 'bn\.running_var' holds NaN", masks)


@pytest.mark.parametrize("name", CONV.tensor_shapes)
def test_a_missing_parameter_is_named(engine, untouched, name):
    params = start(CONV)
    shape = params.pop(name).shape
    match = rf"parameter '{name}' of shape \({shape[0]},.*\) is missing"
    refused(engine, untouched, CONV, params, match, masks_of(CONV))


def test_an_extra_parameter_is_named(engine, untouched):
    params = start(CONV) | {"conv3.weight": np.zeros(3, np.float32)}
    refused(engine, untouched, CONV, params, r"'conv3\.weight' is not in the model")


@pytest.mark.parametrize("more", [-1, 1])
def test_packed_values_of_another_count(engine, untouched, more):
    params, masks = start(CONV), masks_of(CONV)
    kept = int(masks["fc.weight"].sum())
    params["fc.weight"] = np.ones(kept + more, np.float32)
    match = rf"'fc\.weight' has shape \({kept + more},\), expected \(3, 4\) or \({kept},\)"
    refused(engine, untouched, CONV, params, match, masks)
    params["fc.weight"] = with_value(np.ones(kept, np.float32), np.nan)
    refused(engine, untouched, CONV, params, r"'fc\.weight' holds NaN", masks)
    dense = opened(engine, CONV)
    params = start(CONV) | {"fc.weight": np.ones(kept, np.float32)}
    refused(engine, dense, CONV, params, rf"has shape \({kept},\), expected \(3, 4\)$")


# Sub-models and settings


def try_open(engine, sub_model=SubModel(), batch_size=1, loss="ce"):  # noqa: B008
    engine.open(MLP, start(MLP), sub_model, batch_size=batch_size, optimizer=SGD(0.1), loss=loss)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("fc1.weight", np.ones((7, 6), bool)),
        ("fc1.weight", np.ones(42, bool)),
        ("fc1.weight", np.ones((6, 7), np.uint8)),
        ("fc1.weight", np.ones((6, 7), np.float32)),
        ("fc1.weight", np.ones((6, 7), bool, order="F")),
        ("fc1.weight", np.ones((6, 7), bool).tolist()),
        ("other.weight", np.ones((6, 7), bool)),
        ("fc1", np.ones((6, 7), bool)),
    ],
)
def test_a_mask_that_does_not_fit_is_named(engine, name, mask):
    with pytest.raises(ValueError, match=f"mask '{name}' "):
        try_open(engine, SubModel(masks={name: mask}))


def test_an_unknown_frozen_tensor_is_named(engine):
    with pytest.raises(ValueError, match=r"'fc3\.weight'"):
        try_open(engine, SubModel(frozen=frozenset({"fc1.weight", "fc3.weight"})))


@pytest.mark.parametrize("loss", ["mse", "CE", ""])
def test_an_unknown_loss_is_refused(engine, loss):
    with pytest.raises(ValueError, match=f"'ce' or 'bce', got {loss!r}"):
        try_open(engine, loss=loss)


@pytest.mark.parametrize("batch_size", [0, -1, 1.0, True, None, 2**20 + 1, 2**31, 10**100])
def test_a_bad_batch_size_is_refused(engine, batch_size):
    with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 1048576, got"):
        try_open(engine, batch_size=batch_size)


def test_a_loss_needs_logits(engine):
    """A model may end in an image; then only its parts can be used."""
    spec = sequential((2, 3, 3), [("relu", ReLU())])
    session = opened(engine, spec, {})
    x, y = np.ones((5, 2, 3, 3), np.float32), np.zeros(5, np.int64)
    for call in ("step", "loss"):
        with pytest.raises(ValueError, match=r"'relu' has shape \(2, 3, 3\), but a loss needs"):
            CALLS[call](session, x, y)
    np.testing.assert_array_equal(session.forward(x)["relu"], x)


@pytest.mark.parametrize("frozen", [(), ("bn.running_mean", "bn.running_var")])
def test_batch_norm_needs_two_values_per_channel(engine, frozen):
    spec = sequential((4,), [("fc", Linear(3)), ("bn", BatchNorm()), ("flat", Flatten())])
    session, (x, y) = opened(engine, spec, frozen=frozen), batch(spec, 1)
    before = session.params()
    if frozen:
        assert np.isfinite(session.step(x, y))
        return
    for call in ("step", "training forward"):
        with pytest.raises(ValueError, match="a batch of 1 example, but BatchNorm 'bn'"):
            CALLS[call](session, x, y)
    assert np.isfinite(session.loss(x, y))
    assert same(session.params(), before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, bad) for name in ("lr", "momentum", "weight_decay", "proximal") for bad in (
            -0.1, np.nan, np.inf)),
        *(("clip_norm", bad) for bad in (0.0, -1.0, np.nan, np.inf)),
    ],
)  # fmt: skip
def test_bad_settings_of_the_optimiser(field, value):
    with pytest.raises(ValueError, match=f"{field} must be finite and .*, got"):
        SGD(**{"lr": 0.1, field: value})
