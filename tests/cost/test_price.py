"""`cost` against the messages that are really sent, and against its parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, Statistic, SubModel, Work
from fedlean.cost.flops import step_flops, work_flops
from fedlean.cost.price import cost, work_memory_bytes
from fedlean.cost.profile import load_profile
from fedlean.cost.time import link_seconds, round_seconds, work_seconds
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.protocol import SGD
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU
from fedlean.spec import sequential
from fedlean.tree import apply_mask, kept_counts

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
SETTING = {"batch_size": 4, "local_steps": 3, "optimizer": SGD(0.1)}
NAMES_BYTES = (len(SPEC.tensor_shapes) + 7) // 8  # one bit per tensor: which ones follow


def masked(density):
    rng = np.random.default_rng(0)
    masks = {name: rng.random(SPEC.param_shapes[name]) < density for name in SPEC.prunable}
    return SubModel(masks=masks)


def values(sub_model):
    rng = np.random.default_rng(1)
    drawn = {n: rng.standard_normal(s).astype(np.float32) for n, s in SPEC.tensor_shapes.items()}
    return apply_mask(drawn, sub_model.masks)


def task(sub_model):
    return ClientTask(0, "train", 3, 5, SPEC, values(sub_model), sub_model, {"lr": 0.1})


def payload_bytes(message):
    """All but the 80-byte header, whose last 12 bytes hold the length of the JSON, and the JSON."""
    json_bytes = int.from_bytes(message[wire.HEADER_BYTES - 12 : wire.HEADER_BYTES - 8], "little")
    return len(message) - wire.HEADER_BYTES - json_bytes


SUB_MODELS = [SubModel(), masked(0.5), masked(0.02), masked(0.0), masked(1.1)]


@pytest.mark.parametrize("sub_model", SUB_MODELS)
@pytest.mark.parametrize("value_dtype", ["fp32", "fp16", "int8"])
def test_uplink_is_what_an_update_takes(sub_model, value_dtype):
    claim = cost(SPEC, sub_model, PI, value_dtype=value_dtype, **SETTING).uplink_bytes
    answer = ClientUpdate(3, 10, values(sub_model), sub_model, metrics={"loss": 0.5})
    message = wire.encode_update(answer, task(sub_model), value_dtype=value_dtype)
    assert payload_bytes(message) == claim + NAMES_BYTES
    assert len(message) <= claim + 250  # "about a hundred bytes" of header, and the JSON


@pytest.mark.parametrize("sub_model", SUB_MODELS)
@pytest.mark.parametrize(("each", "value"), [(4, 0.1), (2, 1.0)])
def test_uplink_with_full_importance(sub_model, each, value):
    """1 is a bfloat16, 0.1 is not."""
    plain, full = (
        cost(SPEC, sub_model, PI, importance_bytes=size * SPEC.num_params, **SETTING).uplink_bytes
        for size in (0, each)
    )
    assert full - plain == each * SPEC.num_params
    sums = {name: np.full(shape, value, np.float32) for name, shape in SPEC.param_shapes.items()}
    statistics = {"importance": Statistic(sums, "mean")}
    answer = ClientUpdate(3, 10, values(sub_model), sub_model, statistics)
    message = wire.encode_update(answer, task(sub_model))
    assert payload_bytes(message) == full + NAMES_BYTES


@pytest.mark.parametrize("sub_model", SUB_MODELS)
@pytest.mark.parametrize("pattern_known", [True, False])
def test_downlink_is_what_a_task_takes(sub_model, pattern_known):
    priced = cost(SPEC, sub_model, PI, pattern_known=pattern_known, **SETTING)
    patterns = {wire.pattern_hash(sub_model.masks)} if pattern_known else set()
    known = wire.Known(frozenset({SPEC.hash}), frozenset(patterns))
    message = wire.encode_task(task(sub_model), known)
    names = NAMES_BYTES if pattern_known or not sub_model.masks else 2 * NAMES_BYTES
    assert payload_bytes(message) == priced.downlink_bytes + names


@pytest.mark.parametrize("sub_model", SUB_MODELS)
def test_an_unknown_pattern_adds_its_bytes_down_only(sub_model):
    known, unknown = (
        cost(SPEC, sub_model, PI, pattern_known=flag, **SETTING) for flag in (True, False)
    )
    pattern = wire.pattern_payload_bytes(sub_model.masks)
    assert unknown.downlink_bytes - known.downlink_bytes == pattern
    assert unknown.uplink_bytes == known.uplink_bytes
    assert unknown.seconds - known.seconds == pytest.approx(link_seconds(pattern, 0, PI), abs=1e-9)


def test_dense_bytes_by_hand():
    """Buffers included."""
    every = SPEC.num_params + 2 * 8
    priced = cost(SPEC, SubModel(), PI, **SETTING)
    assert priced.uplink_bytes == priced.downlink_bytes == 4 * every


def test_seconds_and_flops_are_those_of_the_work():
    sub_model = masked(0.1)
    kept = kept_counts(sub_model.masks)
    priced = cost(
        SPEC, sub_model, SPARSE, importance_steps=2, importance_bytes=4 * SPEC.num_params, **SETTING
    )
    work = Work(3, 4, 2, kept=kept)
    link = link_seconds(priced.downlink_bytes, priced.uplink_bytes, SPARSE)
    assert priced.flops == work_flops(SPEC, work)
    plain, dense = (step_flops(SPEC, kept, 4, importance=flag) for flag in (False, True))
    assert priced.flops == plain + 2 * dense
    assert priced.seconds == pytest.approx(work_seconds(SPEC, work, SPARSE) + link)


def test_flops_and_memory_are_of_the_execution_that_is_timed():
    """Where the dense way is faster, its operations and its memory are charged with its time."""
    fast = replace(PI, dense_flops_per_s=1e15)
    masked_price = cost(SPEC, masked(0.1), fast, **SETTING)
    dense_price = cost(SPEC, SubModel(), fast, **SETTING)
    assert masked_price.flops == dense_price.flops
    assert masked_price.peak_memory_bytes == dense_price.peak_memory_bytes
    assert masked_price.uplink_bytes < dense_price.uplink_bytes
    slow = cost(SPEC, masked(0.1), SPARSE, **SETTING)
    assert slow.flops < dense_price.flops


@pytest.mark.parametrize("sub_model", SUB_MODELS)
def test_a_values_only_round_agrees_with_round_seconds(sub_model):
    priced = cost(SPEC, sub_model, PI, **SETTING).seconds
    kept = kept_counts(sub_model.masks)
    expected = round_seconds(SPEC, kept, PI, batch_size=4, local_steps=3)
    assert priced == pytest.approx(expected)


def test_kept_counts():
    sub_model = masked(0.3)
    expected = {name: int(mask.sum()) for name, mask in sub_model.masks.items()}
    assert kept_counts(sub_model.masks) == expected
    assert kept_counts({}) == {}


def test_memory_is_that_of_the_model():
    sub_model = masked(0.3)
    kept = kept_counts(sub_model.masks)
    plain = cost(SPEC, sub_model, SPARSE, **SETTING).peak_memory_bytes
    assert plain == step_memory(SPEC, kept, batch_size=4).peak_bytes
    momentum = {**SETTING, "optimizer": SGD(0.1, momentum=0.9)}
    frozen = SubModel(sub_model.masks, frozen=frozenset({"fc1.weight"}))
    assert cost(SPEC, sub_model, SPARSE, **momentum).peak_memory_bytes > plain
    assert cost(SPEC, sub_model, SPARSE, importance_steps=1, **SETTING).peak_memory_bytes > plain
    trained, held = (cost(SPEC, s, SPARSE, **momentum) for s in (sub_model, frozen))
    saved = trained.peak_memory_bytes - held.peak_memory_bytes
    assert saved >= 4 * kept["fc1.weight"]  # a frozen weight has no momentum
    work = Work(3, 4, 1, kept=kept, optimizer_floats=1)
    expected = cost(SPEC, sub_model, SPARSE, importance_steps=1, **momentum).peak_memory_bytes
    assert work_memory_bytes(SPEC, work) == expected


def test_forward_work_needs_no_more_than_a_forward_pass():
    """Frozen tensors too, which are perturbed where nothing is trained by backpropagation."""
    kept = kept_counts(masked(0.3).masks)
    work = Work(0, 4, forward_examples=204, kept=kept)
    expected = forward_memory(SPEC, kept, batch_size=4).peak_bytes
    found = work_memory_bytes(SPEC, work, frozen=frozenset({"fc1.weight"}))
    assert found == expected < work_memory_bytes(SPEC, Work(1, 4, kept=kept))
