"""PruneFL's reconfiguration on a measured device: its T(M) decides what is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean import wire
from fedlean.core import ClientTask, SubModel
from fedlean.cost.measured import LayerTime, MeasuredTime, OperationTime
from fedlean.cost.profile import Profile, load_profile
from fedlean.layers import Linear
from fedlean.models.initialise import init_params
from fedlean.pruning.density import full_masks
from fedlean.pruning.reconfigure import Pruner
from fedlean.spec import sequential
from fedlean.tree import kept_counts

SPEC = sequential((40,), [("fc1", Linear(30)), ("fc2", Linear(20))])


def measured_profile(fc1: float, fc2: float) -> Profile:
    """A board with a free link, on which a kept weight costs so many seconds a step."""

    def operation(constant: float, first: float, second: float) -> OperationTime:
        layers = {
            "fc1.weight": LayerTime(first, None, 1.0),
            "fc2.weight": LayerTime(second, None, 1.0),
        }
        return OperationTime(constant, None, layers)

    times = MeasuredTime(
        model="mine",
        spec_hash=SPEC.hash,
        batch_size=20,
        session=operation(0.0, 0.0, 0.0),
        step=operation(10.0, fc1, fc2),
        forward=operation(0.0, 0.0, 0.0),
        importance_seconds=0.0,
        dense_importance_seconds=0.0,
        conditions={"machine": "a board"},
    )
    free = replace(load_profile("generic"), uplink_bytes_per_s=1e12, downlink_bytes_per_s=1e12)
    return replace(free, measured=times)


def pruner(profile: Profile, time_model: str = "linear") -> Pruner:
    return Pruner(
        time_model=time_model,
        profile=profile,
        batch_size=20,
        local_steps=5,
        fraction=1.0,
        limit=None,
        readd_scale=0.1,
    )


def kept(which: Pruner) -> dict[str, int]:
    rng = np.random.default_rng(0)
    params = init_params(SPEC, 0)
    importance = {name: rng.random(shape, np.float32) for name, shape in SPEC.param_shapes.items()}
    _, masks = which.reconfigure(SPEC, params, full_masks(SPEC), importance, seed=1)
    return kept_counts(masks)


@pytest.mark.parametrize("time_model", ["linear", "device"])
def test_a_layer_that_was_measured_to_be_slow_is_pruned_harder(time_model):
    even = kept(pruner(measured_profile(0.1, 0.1), time_model))
    slow = kept(pruner(measured_profile(1.0, 0.1), time_model))
    assert slow["fc1.weight"] < 0.7 * even["fc1.weight"]
    # by the same g² per second in both layers: a tenth of the time, a tenth of the threshold
    assert slow["fc2.weight"] > slow["fc1.weight"] * 400 / 1200
    rates = kept(pruner(replace(measured_profile(1.0, 0.1), measured=None), time_model))
    assert rates != slow


def test_algorithm_2_and_3_agree_on_linear_times():
    profile = measured_profile(1.0, 0.1)
    assert kept(pruner(profile, "linear")) == kept(pruner(profile, "device"))


@pytest.mark.parametrize("dense_way", [True, False])
def test_the_initial_client_gets_the_measured_times(dense_way):
    """Over the wire and back: the same T(M), so the same masks."""
    sent = pruner(replace(measured_profile(1.0, 0.1), dense_way=dense_way))
    hparams = {**sent.to_hparams(), "batch_size": 20, "local_steps": 5}
    task = ClientTask(0, "initial", 0, 1, SPEC, {}, SubModel(), hparams)
    got = Pruner.from_hparams(wire.decode_task(wire.encode_task(task), {}, {}).hparams)
    expected = replace(
        sent.profile,
        name="task",
        description="",
        source="",
        measured=replace(sent.profile.measured, conditions={}),  # pyright: ignore
    )
    assert got == replace(sent, profile=expected)
    assert kept(got) == kept(sent)
    assert all(isinstance(value, int | float | str) for value in hparams.values())


def test_without_measured_times_the_task_is_as_it_was():
    hparams = pruner(load_profile("raspberry_pi_4")).to_hparams()
    assert "device/measured" not in hparams
    assert sorted(key for key in hparams if key.startswith("device/")) == [
        "device/dense_flops_per_s",
        "device/downlink_bytes_per_s",
        "device/memory_bytes",
        "device/sparse_conv_seconds_per_flop",
        "device/sparse_linear_seconds_per_flop",
        "device/sparse_seconds_per_activation",
        "device/uplink_bytes_per_s",
    ]


@pytest.mark.parametrize("text", ["", "{", "3", '{"model": "x"}', 7])
def test_a_damaged_profile_in_a_task_is_refused(text):
    hparams = {**pruner(measured_profile(1.0, 0.1)).to_hparams(), "batch_size": 20}
    with pytest.raises(ValueError):
        Pruner.from_hparams({**hparams, "local_steps": 5, "device/measured": text})
