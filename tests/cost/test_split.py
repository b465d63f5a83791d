"""The parts of a peak add up to it, whatever the work."""

from __future__ import annotations

import federation
import pytest

from fedlean.core import SubModel, Work
from fedlean.cost.price import Model, cost
from fedlean.cost.profile import load_profile
from fedlean.cost.split import MemorySplit, memory_split

PROFILE = load_profile("generic")
HALF = {"fc1.weight": 300}
WORKS = {
    "dense": (Work(5, 20),),
    "momentum": (Work(5, 20, optimizer_floats=1),),
    "importance": (Work(5, 20, importance_steps=1, kept=HALF),),
    "forward": (Work(0, 16, forward_examples=64, kept=HALF),),
    "two": (Work(0, 4, forward_examples=64), Work(3, 8, kept=HALF, beside=1)),
    "span": (Work(0, 4, forward_examples=8, end="pool"), Work(2, 8, begin="pool", beside=1)),
    "held": (Work(2, 8, begin="pool", held_examples=100),),
    "none": (),
}


@pytest.mark.parametrize("name", WORKS)
def test_the_parts_are_the_whole(name):
    works = WORKS[name]
    price = cost(Model(federation.SPEC, SubModel()), works, PROFILE)
    found = memory_split(federation.SPEC, [one.work for one in price.done])
    assert found.peak_bytes == price.peak_memory_bytes
    assert all(value >= 0 for value in vars(found).values())


def test_by_hand():
    values = 4 * federation.SPEC.num_params
    dense = memory_split(federation.SPEC, WORKS["dense"])
    momentum = memory_split(federation.SPEC, WORKS["momentum"])
    assert values <= dense.weights_bytes == momentum.weights_bytes < 1.1 * values
    assert dense.optimizer_bytes == 0 and values <= momentum.optimizer_bytes < 1.1 * values
    assert memory_split(federation.SPEC, WORKS["importance"]).importance_bytes == values
    assert memory_split(federation.SPEC, WORKS["held"]).beside_bytes == 4 * 100 * 4 * 4 * 4
    assert memory_split(federation.SPEC, ()) == MemorySplit()
