"""Running statistics from data, against a computation that averages what each batch gives."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import CONV, MLP, batch, opened, start
from engine.oracle import Oracle

from fedlean.layers import BatchNorm, Conv2d, Linear
from fedlean.models.resnet import resnet8
from fedlean.spec import sequential
from fedlean.submodels.static_norm import calibrate
from fedlean.submodels.width import width


def test_one_norm_by_hand(engine):
    """Batches (0, 2) and (3, 7): means 1 and 5, unbiased variances 2 and 8."""
    spec = sequential((1,), [("bn", BatchNorm(momentum=0.1)), ("fc", Linear(2))])
    batches = [
        (np.array([[a], [b]], np.float32), np.zeros(2, np.int64)) for a, b in ((0, 2), (3, 7))
    ]
    params = start(spec)
    found = calibrate(spec, params, iter(batches), engine)
    assert found["bn.running_mean"].tolist() == pytest.approx([3.0])
    assert found["bn.running_var"].tolist() == pytest.approx([5.0])
    assert found["bn.running_var"].dtype == np.float32
    others = params.keys() - spec.buffer_shapes.keys()
    assert all(np.array_equal(found[name], params[name]) for name in others)


def naive(spec, params, batches):
    """Mean and unbiased variance of what each norm reads in training mode, weighted by examples."""
    norms = [node for node in spec.nodes if isinstance(node.layer, BatchNorm)]
    sums = dict.fromkeys(spec.buffer_shapes, 0.0)
    oracle = Oracle(spec, params)
    for x, _ in batches:
        values = oracle.forward(x, training=True)
        for node in norms:
            value = values[node.inputs[0]].detach().numpy()
            axes = (0, *range(2, value.ndim))
            sums[f"{node.name}.running_mean"] += len(x) * value.mean(axes)
            sums[f"{node.name}.running_var"] += len(x) * value.var(axes, ddof=1)
    examples = sum(len(x) for x, _ in batches)
    return {name: total / examples for name, total in sums.items()}


RESNET = resnet8((3, 8, 8), 10, norm="batch")
SPECS = {"conv": CONV, "resnet8": RESNET, "half": width(RESNET, 0.5).spec}


@pytest.mark.parametrize("name", SPECS)
def test_against_a_naive_mean(engine, name: str):
    spec = SPECS[name]
    params = start(spec)
    kept = {n: value.copy() for n, value in params.items()}
    batches = [batch(spec, size, seed) for seed, size in enumerate((6, 6, 4))]
    found = calibrate(spec, params, batches, engine)
    for tensor, want in naive(spec, params, batches).items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(found[tensor], want, rtol=1e-4, atol=1e-5 * scale)
    assert all(np.array_equal(params[n], kept[n]) for n in kept)
    assert found.keys() == params.keys()


def test_one_batch_makes_evaluation_as_training(engine):
    """Over one batch the variance is the batch's, but for n - 1, so that both modes agree."""
    spec = sequential((2, 9, 9), [("conv", Conv2d(3, 1)), ("bn", BatchNorm())])
    x, y = batch(sequential((2, 9, 9), [("conv", Conv2d(3, 1))]), 12)
    found = calibrate(spec, start(spec), [(x, y)], engine)
    session = opened(engine, spec, found, batch_size=12)
    evaluated = session.forward(x)["bn"].copy()
    np.testing.assert_allclose(
        evaluated, session.forward(x, training=True)["bn"], rtol=2e-3, atol=2e-3
    )


def test_nothing_to_find(engine):
    params = start(MLP)
    found = calibrate(MLP, params, [batch(MLP)], engine)
    assert found == params and found is not params


def test_no_data_is_refused(engine):
    with pytest.raises(ValueError, match="calibration needs batches of data, got none"):
        calibrate(CONV, start(CONV), [], engine)
