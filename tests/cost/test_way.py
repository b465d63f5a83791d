"""A device takes the shorter way of those that fit its memory, and is charged for that one."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import SubModel, Work
from fedlean.cost import way
from fedlean.cost.price import Model, cost, round_seconds
from fedlean.cost.profile import load_profile
from fedlean.cost.time import work_seconds
from fedlean.cost.way import Done, as_done, work_memory_bytes
from fedlean.layers import Conv2d, Flatten, Linear
from fedlean.spec import sequential

SPEC = sequential((400,), [("fc1", Linear(300)), ("fc2", Linear(10))])
KEPT = {"fc1.weight": 12_000, "fc2.weight": 300}
WORK = Work(3, 8, kept=KEPT)
DENSE = replace(WORK, kept={})
NEEDS = work_memory_bytes(SPEC, WORK)
NEEDS_DENSE = work_memory_bytes(SPEC, DENSE)
FAST_DENSE = replace(load_profile("generic"), dense_flops_per_s=1e15)
FAST_SPARSE = replace(FAST_DENSE, dense_flops_per_s=1.0)


def test_there_is_memory_between_the_two():
    assert 2 * NEEDS < NEEDS_DENSE < FAST_DENSE.memory_bytes


@pytest.mark.parametrize(
    ("device", "memory_bytes", "taken", "may_be_dense"),
    [
        (FAST_DENSE, NEEDS_DENSE, DENSE, True),  # both fit: the shorter
        (FAST_SPARSE, NEEDS_DENSE, WORK, True),
        (FAST_DENSE, NEEDS_DENSE - 1, WORK, False),  # the shorter does not fit, the longer does
        (FAST_DENSE, NEEDS - 1, WORK, False),  # neither does
    ],
)
def test_the_way_that_fits(device, memory_bytes, taken, may_be_dense):
    device = replace(device, memory_bytes=memory_bytes)
    seconds = work_seconds(SPEC, taken, device, dense_too=may_be_dense)
    assert as_done(SPEC, WORK, device) == Done(taken, seconds)
    assert as_done(SPEC, DENSE, device) == Done(DENSE, work_seconds(SPEC, DENSE, device))
    price = cost(Model(SPEC, SubModel()), (WORK,), device)
    assert price.seconds == seconds
    assert price.peak_memory_bytes == work_memory_bytes(SPEC, taken)


@pytest.mark.parametrize("memory_bytes", [NEEDS - 1, NEEDS_DENSE, 2 * NEEDS_DENSE])
def test_a_device_without_the_dense_way_keeps_its_masks(memory_bytes):
    device = replace(FAST_DENSE, memory_bytes=memory_bytes, dense_way=False)
    assert as_done(SPEC, WORK, device).work == WORK
    assert as_done(SPEC, DENSE, device) == as_done(SPEC, DENSE, FAST_DENSE)
    price = cost(Model(SPEC, SubModel()), (WORK,), device)
    assert price.peak_memory_bytes == NEEDS
    assert price.flops < cost(Model(SPEC, SubModel()), (WORK,), FAST_DENSE).flops


def test_a_sparse_way_that_takes_more_memory_than_the_dense_one():
    """A 1x1 convolution on a large image that keeps 69%: indices and copies outweigh the rest."""
    spec = sequential(
        (16, 4, 4), [("one", Conv2d(64, 1)), ("two", Conv2d(64, 1)), ("flat", Flatten())]
    )
    kept = {name: int(0.69 * prod(spec.param_shapes[name])) for name in spec.prunable}
    work, dense = Work(3, 1, kept=kept), Work(3, 1)
    needs, needs_dense = (work_memory_bytes(spec, one) for one in (work, dense))
    assert needs > needs_dense
    least = as_done(spec, work, replace(FAST_SPARSE, memory_bytes=1)).slower
    needs_slower = work_memory_bytes(spec, work, slower=least)
    assert needs > needs_slower > needs_dense  # masked layers have bytes of mask
    tight = replace(FAST_SPARSE, memory_bytes=needs_slower - 1)
    assert as_done(spec, work, tight).work == dense
    slower = as_done(spec, work, replace(tight, memory_bytes=needs - 1))
    assert slower.work == work and slower.slower
    assert as_done(spec, work, replace(tight, memory_bytes=needs)) == Done(work, slower.seconds)


MLP = sequential((400,), [("fc1", Linear(300)), ("fc2", Linear(10))])


@pytest.mark.parametrize("steps", [3, 0])
def test_layers_in_their_slower_form_take_less_memory_and_the_longer_time(steps):
    """60% of fc1: the device decides layer by layer, and takes it sparsely where it must."""
    device = replace(FAST_DENSE, dense_way=False)
    work = Work(steps, 8, kept={"fc1.weight": 72_000}, forward_examples=8 * (not steps))
    needs = work_memory_bytes(MLP, work)
    ample, tight = (
        as_done(MLP, work, replace(device, memory_bytes=memory)) for memory in (needs, needs - 1)
    )
    assert ample.slower == frozenset() and tight.slower == {"fc1"}
    smaller = work_memory_bytes(MLP, work, slower=tight.slower)
    assert smaller < 0.8 * needs
    price = cost(Model(MLP, SubModel()), (work,), replace(device, memory_bytes=needs - 1))
    assert price.peak_memory_bytes == smaller
    passes = 2 * steps if steps else 1  # nothing runs backward to the input
    seconds = 72_000 * device.sparse_linear_seconds_per_flop - 120_000 / device.dense_flops_per_s
    assert tight.seconds - ample.seconds == pytest.approx(2 * 8 * passes * seconds, rel=1e-9)


def test_time_that_plans_masks_never_falls_as_a_count_rises_on_a_device_of_little_memory():
    """Half of a convolution takes more than 70%, and then its layers their slower forms."""
    conv = Conv2d(64, 3, padding=1)
    spec = sequential((64, 4, 4), [("a", conv), ("b", conv), ("flat", Flatten()), ("c", Linear(3))])
    device = replace(load_profile("raspberry_pi_4"), dense_way=False, memory_bytes=600_000)
    seconds = [
        round_seconds(spec, {"b.weight": count}, device, batch_size=4, local_steps=2)
        for count in range(0, 64 * 64 * 9, 1024)
    ]
    assert seconds == sorted(seconds)


def test_frozen_tensors_make_a_way_fit():
    frozen = frozenset(SPEC.param_shapes)
    less = work_memory_bytes(SPEC, replace(DENSE, optimizer_floats=1), frozen=frozen)
    device = replace(FAST_DENSE, memory_bytes=less)
    work = replace(WORK, optimizer_floats=1)
    assert as_done(SPEC, work, device).work == work
    assert as_done(SPEC, work, device, frozen).work == replace(DENSE, optimizer_floats=1)


def test_a_device_with_memory_to_spare_is_not_planned_for_each_mask(monkeypatch):
    """A time model asks for thousands of masks: one plan, of the dense way, is made for all."""
    planned = []
    memory = way.stretch_memory
    monkeypatch.setattr(way, "stretch_memory", lambda *args: planned.append(args) or memory(*args))
    way._dense_memory.cache_clear()
    for count in range(1, 50):
        as_done(SPEC, Work(3, 9, kept={"fc1.weight": count, "fc2.weight": 1}), FAST_SPARSE)
    assert len(planned) == 1


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(networks(), st.sampled_from([0.1, 0.5, 0.69, 0.95]), st.integers(1, 40))
def test_the_bound_that_saves_a_plan_holds(spec, density, batch_size):
    kept = {name: int(density * prod(spec.param_shapes[name])) for name in spec.prunable}
    work = Work(1, batch_size, kept=kept)
    dense = way.stretch_memory(spec, replace(work, kept={}), frozenset())
    assert work_memory_bytes(spec, work) <= way.enough_bytes(dense, kept)
