"""A density of which a plan says that it fits does so with any split over the layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.algorithm import Device
from fedlean.core import SubModel, Work
from fedlean.cost.price import Model, cost
from fedlean.cost.profile import load_profile
from fedlean.cost.split import memory_split
from fedlean.engine.forms import step_forms
from fedlean.models.lenet300 import lenet300
from fedlean.planning import plan
from fedlean.planning.pricing import Search, peak_bytes, pricer
from fedlean.planning.rehearse import Stage
from fedlean.planning.uneven import uneven

SPEC = lenet300((1, 8, 8), 10)
SIZES = {"fc1.weight": 300 * 64, "fc2.weight": 100 * 300, "fc3.weight": 10 * 100}


def test_every_way_keeps_as_many_and_no_more_than_there_are():
    ways = list(uneven(Work(1, 8, kept={name: size // 2 for name, size in SIZES.items()}), SPEC))
    assert len(ways) == 16
    for way in ways:
        assert sum(way.kept.values()) == sum(SIZES.values()) // 2
        assert all(0 <= way.kept[name] <= SIZES[name] for name in SIZES)
    assert any(way.kept["fc2.weight"] == 0.55 * 30_000 - 1 for way in ways)  # just below dense
    assert any(way.kept["fc1.weight"] == 300 * 64 - 1 for way in ways)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_no_other_split_takes_much_more(shares):
    work = Work(5, 20, kept={n: int(s * SIZES[n]) for n, s in zip(SIZES, shares, strict=True)})
    most = max(memory_split(SPEC, [way]).peak_bytes for way in uneven(work, SPEC))
    assert memory_split(SPEC, [work]).peak_bytes <= 1.05 * most


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_nor_where_memory_asks_for_the_smaller_forms(shares):
    work = Work(5, 20, kept={n: int(s * SIZES[n]) for n, s in zip(SIZES, shares, strict=True)})

    def least(way):
        forms = step_forms(SPEC, way.kept, 1, batch_size=20, optimizer_floats=0)
        return memory_split(SPEC, [way], slower=[forms]).peak_bytes

    assert least(work) <= 1.05 * max(map(least, uneven(work, SPEC)))


def test_a_search_says_of_every_value_what_all_splits_do():
    profile, stage = load_profile("raspberry_pi_4"), Stage(SPEC)
    device = Device(0, profile=profile, memory_bytes=230_000)
    base = stage.walked("synflow", {"density": 0.2}, device, profile)
    kinds, here = base.walk.kinds, pricer(device, profile, {})
    search, found = Search(kinds, here, 0.2), set()
    for value in (0.3, 0.001, 1.0, 0.15, 0.56, 0.02, 0.2, 0.5, 0.1):
        fits = peak_bytes(kinds, here, density=0.2, value=value) <= 230_000
        assert search.fits(value) == fits, value
        found.add(fits)
    assert found == {True, False}
    assert Search([], here, 0.2).fits(1.0)


@pytest.mark.parametrize("method", ["synflow", "ntk_zo"])
def test_the_density_that_is_said_fits_masks_that_are_split_otherwise(method):
    limit = 300_000
    device = Device(0, memory_bytes=limit)
    (block,) = plan(
        SPEC, [device], profile=load_profile("raspberry_pi_4"), methods=[method]
    ).devices
    (one,) = block.methods
    assert one.fits and one.knob is not None and one.knob.value is not None
    assert one.phases[-1].memory.peak_bytes < one.needs_bytes <= limit
    if method == "ntk_zo":
        return  # its forward passes take less than the steps of which the rest is
    here = replace(load_profile("raspberry_pi_4"), memory_bytes=limit)
    kept = round(one.knob.value * sum(SIZES.values()))
    rng = np.random.default_rng(0)
    for _ in range(50):
        cuts = np.sort(rng.integers(0, kept + 1, 2))
        parts = np.diff([0, *cuts, kept])
        if any(p > size for p, size in zip(parts, SIZES.values(), strict=True)):
            continue
        counts = dict(zip(SIZES, map(int, parts), strict=True))
        price = cost(Model(SPEC, SubModel()), [Work(5, 20, kept=counts)], here)
        assert price.peak_memory_bytes <= limit, counts
