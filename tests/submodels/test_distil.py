"""Distillation on noise: it moves the supernet, and the sub-networks come nearer to it."""

from __future__ import annotations

import numpy as np
import pytest
from federation import ENGINE

from fedlean.core import SubModel, Work, generator
from fedlean.cost.flops import work_flops
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.submodels.distil import Distillation, distil
from fedlean.submodels.supernet import supernet

SPEC = build("mlp", (1, 8, 8), 10)
NETS = supernet(SPEC, (1.0, 0.5))
CUTS = [NETS.cut(NETS.smallest), NETS.cut(NETS.named("1/0.5"))]
HOW = Distillation(steps=100, lr=0.001, batch_size=16)


def sharp(seed: int) -> dict[str, np.ndarray]:
    """First weights whose answers differ: at the usual scale all models say nearly the same."""
    return {name: 3 * value for name, value in init_params(SPEC, seed).items()}


def apart(cut, params, seed: int = 99) -> float:
    """KL(sub-network || supernet) on fresh noise, in NumPy."""
    x = generator(seed, 0, 0, "fresh").standard_normal((256, 1, 8, 8), dtype=np.float32)

    def answers(spec, values):
        session = ENGINE.open_forward(spec, values, SubModel(), batch_size=256)
        z = session.forward(x)[spec.nodes[-1].name].astype(np.float64)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    own, whole = answers(cut.spec, cut.take(params)), answers(SPEC, params)
    return float((np.exp(own) * (own - whole)).sum(1).mean())


@pytest.mark.parametrize("seed", range(3))
def test_on_fresh_noise_they_are_nearer_and_the_supernet_has_moved(seed: int):
    before = sharp(seed)
    kept = {name: value.copy() for name, value in before.items()}
    after = distil(CUTS, before, HOW, engine=ENGINE, seed=seed, round=1)
    for cut in CUTS:
        assert apart(cut, after.params) < 0.95 * apart(cut, before)
    assert all(np.array_equal(before[name], kept[name]) for name in before), "the caller's stay"
    for name, axes in CUTS[0].index.items():
        inside = np.ix_(*(np.arange(axis.start, axis.stop) for axis in axes))
        assert not np.array_equal(after.params[name][inside], before[name][inside])
    outside = np.ones(SPEC.param_shapes["fc2.weight"], bool)
    for cut in CUTS:
        outside[tuple(cut.index["fc2.weight"])] = False
    assert outside.any()
    same = after.params["fc2.weight"][outside].tobytes() == before["fc2.weight"][outside].tobytes()
    assert same, "what no sub-network holds stays"


def test_one_step_of_adam_by_hand():
    """Its first step is lr·g/(|g| + ε), ε small beside every gradient that counts."""
    how = Distillation(steps=1, lr=0.001, batch_size=8)
    before = sharp(0)
    after = distil(CUTS[:1], before, how, engine=ENGINE, seed=0, round=1)
    index = tuple(CUTS[0].index["fc3.weight"])
    moved = np.abs(after.params["fc3.weight"][index] - before["fc3.weight"][index])
    assert np.median(moved) == pytest.approx(0.001, rel=1e-3)


def test_its_operations_are_the_servers():
    after = distil(CUTS, sharp(0), HOW, engine=ENGINE, seed=0, round=1)
    learning = sum(work_flops(cut.spec, Work(100, 16)) for cut in CUTS)
    assert after.flops == learning + 2 * work_flops(SPEC, Work(forward_examples=100 * 16))


def test_the_same_model_has_nothing_to_learn():
    same = distil([NETS.cut(NETS.largest)], sharp(0), HOW, engine=ENGINE, seed=0, round=1)
    assert same.divergence == pytest.approx(0.0, abs=1e-9)


def test_no_sub_network_changes_nothing():
    before = sharp(0)
    after = distil([], before, HOW, engine=ENGINE, seed=0, round=1)
    assert after.params == before and after.flops == 0
