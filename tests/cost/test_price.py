"""`cost`: the price of the execution that is timed, for the ledger and for T(M)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean.core import SubModel, Work
from fedlean.cost.flops import step_flops, work_flops
from fedlean.cost.price import Model, cost, round_seconds
from fedlean.cost.profile import load_profile
from fedlean.cost.time import link_seconds, work_seconds
from fedlean.cost.way import work_memory_bytes
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.pieces import sweep
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU
from fedlean.spec import sequential
from fedlean.tree import kept_counts

SPEC = sequential(
    (2, 6, 6),
    [
        ("conv", Conv2d(8, 3)),
        ("bn", BatchNorm()),
        ("relu", ReLU()),
        ("flat", Flatten()),
        ("fc1", Linear(32)),
        ("fc2", Linear(5)),
    ],
)
PI = load_profile("raspberry_pi_4")
SPARSE = replace(PI, dense_flops_per_s=1.0)  # a device on which the sparse way always wins


def masked(density):
    rng = np.random.default_rng(0)
    masks = {name: rng.random(SPEC.param_shapes[name]) < density for name in SPEC.prunable}
    return SubModel(masks=masks)


SUB_MODELS = [SubModel(), masked(0.5), masked(0.02), masked(0.0), masked(1.1)]
BEGINNING = frozenset({"conv.weight", "conv.bias"})


def price(sub_model, device, *, steps=3, importance_steps=0, floats=0):
    kept = kept_counts(sub_model.masks)
    work = Work(steps, 4, importance_steps, kept=kept, optimizer_floats=floats)
    return cost(Model(SPEC, sub_model), (work,), device)


@pytest.mark.parametrize("frozen", [frozenset(), BEGINNING])
def test_seconds_and_flops_are_those_of_the_work(frozen):
    sub_model = replace(masked(0.1), frozen=frozen)
    kept = kept_counts(sub_model.masks)
    found = price(sub_model, SPARSE, importance_steps=2)
    work = Work(3, 4, 2, kept=kept)
    assert found.flops == work_flops(SPEC, work, frozen=frozen)
    plain, dense = (
        step_flops(SPEC, kept, 4, importance=flag, frozen=frozen) for flag in (False, True)
    )
    assert found.flops == plain + 2 * dense
    assert found.flops_dense_gradient == 3 * dense
    assert found.seconds == work_seconds(SPEC, work, SPARSE, frozen=frozen)


def test_frozen_tensors_save_all_of_it():
    whole = price(masked(0.1), SPARSE, importance_steps=1)
    less = price(replace(masked(0.1), frozen=BEGINNING), SPARSE, importance_steps=1)
    assert less.flops < whole.flops and less.flops_dense_gradient < whole.flops_dense_gradient
    assert less.seconds < whole.seconds
    assert less.peak_memory_bytes < whole.peak_memory_bytes


def test_stretches_of_work_add_up_and_memory_is_of_the_neediest():
    task = Model(SPEC, SubModel())
    works = (Work(2, 4), Work(1, 64, optimizer_floats=1), Work(0, 4, forward_examples=40))
    parts = [cost(task, (work,), PI) for work in works]
    together = cost(task, works, PI)
    assert together.flops == sum(part.flops for part in parts)
    assert together.seconds == pytest.approx(sum(part.seconds for part in parts))
    memory = [part.peak_memory_bytes for part in parts]
    assert together.peak_memory_bytes == max(memory) == memory[1]
    nothing = cost(task, (), PI)
    assert (nothing.flops, nothing.seconds, nothing.peak_memory_bytes) == (0, 0, 0)


def test_flops_and_memory_are_of_the_execution_that_is_timed():
    """Where the dense way is faster, its operations and its memory are charged with its time."""
    fast = replace(PI, dense_flops_per_s=1e15)
    masked_price, dense_price = price(masked(0.1), fast), price(SubModel(), fast)
    assert masked_price.flops == dense_price.flops
    assert masked_price.peak_memory_bytes == dense_price.peak_memory_bytes
    assert price(masked(0.1), SPARSE).flops < dense_price.flops


@pytest.mark.parametrize("sub_model", SUB_MODELS)
@pytest.mark.parametrize("device", [PI, SPARSE])
def test_a_round_costs_what_is_charged_for_it(sub_model, device):
    """PruneFL plans with the price of the ledger, to the bit."""
    kept = kept_counts(sub_model.masks)
    values = 4 * (sum(kept.values()) if kept else sum(map(_size, SPEC.prunable)))
    values += 4 * sum(_size(name) for name in SPEC.tensor_shapes if name not in SPEC.prunable)
    expected = price(sub_model, device).seconds + link_seconds(values, values, device)
    assert round_seconds(SPEC, kept, device, batch_size=4, local_steps=3) == expected


def _size(name):
    return int(np.prod(SPEC.tensor_shapes[name]))


def test_kept_counts():
    sub_model = masked(0.3)
    expected = {name: int(mask.sum()) for name, mask in sub_model.masks.items()}
    assert kept_counts(sub_model.masks) == expected
    assert kept_counts({}) == {}


def test_memory_is_that_of_the_model():
    sub_model = masked(0.3)
    kept = kept_counts(sub_model.masks)
    plain = price(sub_model, SPARSE).peak_memory_bytes
    assert plain == step_memory(SPEC, kept, batch_size=4).peak_bytes
    frozen = SubModel(sub_model.masks, frozen=frozenset({"fc1.weight"}))
    assert price(sub_model, SPARSE, floats=1).peak_memory_bytes > plain
    assert price(sub_model, SPARSE, importance_steps=1).peak_memory_bytes > plain
    trained, held = (price(one, SPARSE, floats=1) for one in (sub_model, frozen))
    saved = trained.peak_memory_bytes - held.peak_memory_bytes
    assert saved >= 4 * kept["fc1.weight"]  # a frozen weight has no momentum
    pieces = Work(3, 4, 2, kept=kept, piece_bytes=2000)
    less = cost(Model(SPEC, sub_model), (pieces,), SPARSE).peak_memory_bytes
    parts = sweep(SPEC, 2000)
    assert plain < less < price(sub_model, SPARSE, importance_steps=1).peak_memory_bytes
    held = step_memory(SPEC, kept, batch_size=4, importance=True, pieces=parts[:2])
    assert less == held.peak_bytes
    work = Work(3, 4, 1, kept=kept, optimizer_floats=1)
    expected = price(sub_model, SPARSE, importance_steps=1, floats=1).peak_memory_bytes
    assert work_memory_bytes(SPEC, work) == expected


def test_forward_work_needs_no_more_than_a_forward_pass():
    """Frozen tensors too, which are perturbed where nothing is trained by backpropagation."""
    kept = kept_counts(masked(0.3).masks)
    work = Work(0, 4, forward_examples=204, kept=kept)
    expected = forward_memory(SPEC, kept, batch_size=4).peak_bytes
    found = work_memory_bytes(SPEC, work, frozen=frozenset({"fc1.weight"}))
    assert found == expected < work_memory_bytes(SPEC, Work(1, 4, kept=kept))
