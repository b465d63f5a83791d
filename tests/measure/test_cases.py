"""What is measured: the plan, and the sub-models that it asks for."""

from __future__ import annotations

import numpy as np
import pytest
from measure.fake import SIZES, SPEC

from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear
from fedlean.measure.cases import DENSE, UNIFORM, draw, plan
from fedlean.spec import sequential

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.7)


def test_one_layer_varies_at_a_time():
    cases = plan(SPEC, DENSITIES).cases
    for name in SIZES:
        series = [case for case in cases if case.varied == name]
        assert sorted(case.density for case in series) == [0.1, 0.5, 0.7, 1.0]
        for case in series:
            assert case.densities == {**dict.fromkeys(SIZES, 0.2), name: case.density}


def test_all_layers_alike_and_the_dense_model():
    chosen = plan(SPEC, DENSITIES)
    uniform = [case for case in chosen.cases if case.varied == UNIFORM]
    assert sorted(case.density for case in uniform) == [0.1, 0.2, 0.5, 0.7]
    assert all(set(case.densities.values()) == {case.density} for case in uniform)
    assert [case for case in chosen.cases if case.varied == DENSE] == [chosen.dense]
    assert chosen.dense.densities == {}
    assert chosen.base in chosen.cases and chosen.base.density == 0.2  # of 0.1, 0.2 and 0.5


def test_what_a_fit_needs_comes_first():
    """The dense model, the middle, and both ends of the sparse range for every layer."""
    chosen = plan(SPEC, DENSITIES)
    first = chosen.cases[: chosen.needed]
    assert first[:2] == (chosen.dense, chosen.base)
    ends = {(case.varied, case.density) for case in first[2:]}
    assert ends == {(name, density) for name in SIZES for density in (0.1, 0.5)}
    assert len({(case.varied, case.density) for case in chosen.cases}) == len(chosen.cases) == 17


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_densities_are_fractions(density):
    with pytest.raises(ValueError, match=r"densities must lie in \(0, 1\]"):
        plan(SPEC, (*DENSITIES, density))


@pytest.mark.parametrize("densities", [(), (1.0,), (0.1, 0.2), (0.1, 0.2, 0.51, 0.9, 1.0)])
def test_three_densities_must_be_in_the_sparse_range(densities):
    with pytest.raises(ValueError, match=r"at least three of at most 0\.5"):
        plan(SPEC, densities)


def test_a_model_without_prunable_layers():
    with pytest.raises(ValueError, match="no layer that can be pruned"):
        plan(sequential((1, 4, 4), [("flat", Flatten())]), DENSITIES)


def test_sub_models_are_packed_and_repeatable():
    chosen = plan(SPEC, (0.5, 0.1, 0.02))
    case = next(case for case in chosen.cases if (case.varied, case.density) == ("fc1.weight", 0.5))
    params, masks = draw(SPEC, case)
    assert set(masks) == set(SIZES)
    for name, mask in masks.items():
        kept = int(np.count_nonzero(mask))
        assert mask.dtype == np.bool_ and mask.shape == SPEC.param_shapes[name]
        assert params[name].shape == (kept,) and params[name].dtype == np.float32
        assert abs(params[name]).max() > 0
    assert masks["fc1.weight"].mean() == pytest.approx(0.5, abs=0.02)
    again = draw(SPEC, case)
    for first, second in zip((params, masks), again, strict=True):
        assert all((first[name] == second[name]).all() for name in first)
    # the layers that do not vary are the same in every case of the series
    _, others = draw(SPEC, chosen.base)
    assert (masks["conv.weight"] == others["conv.weight"]).all()


def test_the_dense_model_and_norms():
    spec = sequential(
        (1, 6, 6),
        [("conv", Conv2d(4, 3)), ("bn", BatchNorm()), ("flat", Flatten()), ("fc", Linear(3))],
    )
    chosen = plan(spec, (1.0, 0.5, 0.2, 0.1))
    params, masks = draw(spec, chosen.dense)
    assert masks == {}
    assert {name: value.shape for name, value in params.items()} == dict(spec.tensor_shapes)
    assert (params["bn.weight"] == 1).all() and (params["bn.running_var"] == 1).all()
    assert (params["bn.bias"] == 0).all() and (params["bn.running_mean"] == 0).all()
    full = next(case for case in chosen.cases if case.varied == "fc.weight" and case.density == 1)
    assert draw(spec, full)[1]["fc.weight"].all()
