"""Initial parameters: the distribution, and that nothing but seed and name decides them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU
from fedlean.models.initialise import check_params, init_params
from fedlean.models.resnet import resnet8
from fedlean.spec import ModelSpec, sequential

torch.set_num_threads(1)


def chain(*, hidden: int = 64, extra: bool = False) -> ModelSpec:
    layers = [("conv", Conv2d(32, 3, groups=2)), ("flat", Flatten()), ("fc", Linear(hidden))]
    return sequential((4, 8, 8), [*layers, *([("relu", ReLU()), ("out", Linear(9))] * extra)])


@pytest.mark.parametrize(("tensor", "fan_in"), [("conv", 2 * 3 * 3), ("fc", 32 * 6 * 6)])
@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_uniform_within_one_over_root_fan_in(tensor: str, fan_in: int, suffix: str):
    values = init_params(chain(hidden=512), 3)[f"{tensor}.{suffix}"]
    bound = fan_in**-0.5
    assert values.dtype == np.float32
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.8 * bound
    # the mean of n uniforms has deviation bound / sqrt(3 n)
    assert abs(values.mean()) < 4 * bound / np.sqrt(3 * values.size)
    if suffix == "weight":
        assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)


def test_he_keeps_a_signal_through_relus():
    """U(-√(6/fan_in), √(6/fan_in)): variance 2/fan_in, biases 0, the other tensors as ever."""
    spec = chain(hidden=512)
    he, default = init_params(spec, 3, "he"), init_params(spec, 3)
    for tensor, fan_in in (("conv", 18), ("fc", 1152)):
        assert not he[f"{tensor}.bias"].any()
        # of one stream: U(-1/√fan_in, 1/√fan_in) times √6
        expected = default[f"{tensor}.weight"] * np.float32(6**0.5)
        np.testing.assert_allclose(he[f"{tensor}.weight"], expected, rtol=1e-4, atol=1e-6)
        assert he[f"{tensor}.weight"].var() == pytest.approx(2 / fan_in, rel=0.1)
    with pytest.raises(ValueError, match="init must be one of pytorch, he, got 'xavier'"):
        init_params(spec, 3, "xavier")


def test_same_distribution_as_torch():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.nn.Linear(256, 512).weight.detach().numpy()
    spec = sequential((256,), [("fc", Linear(512))])
    ours = init_params(spec, 0)["fc.weight"]
    quantiles = np.linspace(0, 1, 21)
    difference = np.quantile(ours, quantiles) - np.quantile(theirs, quantiles)
    assert np.abs(difference).max() < 0.01 * (1 / 16)


def test_norms_start_as_the_identity():
    spec = resnet8((3, 8, 8), 10, norm="batch")
    params = init_params(spec, 0)
    assert list(params) == list(spec.tensor_shapes)
    norms = [node.name for node in spec.nodes if isinstance(node.layer, BatchNorm)]
    assert len(norms) == 9
    for norm in norms:
        assert (params[f"{norm}.weight"] == 1).all() and (params[f"{norm}.bias"] == 0).all()
        assert (params[f"{norm}.running_mean"] == 0).all()
        assert (params[f"{norm}.running_var"] == 1).all()
    check_params(spec, params)


def test_seed_and_name_decide():
    params, again = init_params(chain(), 5), init_params(chain(), 5)
    assert all(np.array_equal(params[name], again[name]) for name in params)
    other = init_params(chain(), 6)
    assert all(not np.array_equal(params[name], other[name]) for name in params)


def test_other_layers_do_not_matter():
    small, large = init_params(chain(), 5), init_params(chain(extra=True), 5)
    assert all(np.array_equal(small[name], large[name]) for name in small)


def test_known_values():
    """Philox and the arithmetic are specified: the same bits everywhere, for ever."""
    weight = init_params(sequential((4,), [("fc", Linear(2))]), 0)["fc.weight"]
    assert weight.tobytes().hex() == KNOWN


KNOWN = "b07299bd70da613e8023223c70831f3e58c8a93d60f24abde051aebc404c0c3c"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, "'fc.weight' is in the spec but not in params"),
        ({"more": np.zeros(1, np.float32)}, "'more' is in params but not in the spec"),
        ({"fc.bias": np.zeros(3, np.float32)}, r"'fc.bias' must be float32 of shape \(64,\)"),
        ({"fc.bias": np.zeros(64)}, r"'fc.bias' must be float32.*got float64"),
    ],
)
def test_check_params_names_the_tensor(change: dict, message: str):
    params = {k: v for k, v in {**init_params(chain(), 0), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        check_params(chain(), params)
