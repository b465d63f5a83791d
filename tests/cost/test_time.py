"""Seconds: the published Raspberry Pi figures, and what must hold for any model and profile."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import Work
from fedlean.cost.flops import forward_flops, step_flops
from fedlean.cost.price import round_seconds
from fedlean.cost.profile import Profile, load_profile
from fedlean.cost.time import (
    activations,
    forward_seconds,
    linear_round_time,
    link_seconds,
    step_seconds,
    work_seconds,
)
from fedlean.engine.pieces import Piece
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedlean.models.conv2 import conv2
from fedlean.spec import sequential

PI = load_profile("raspberry_pi_4")
CONV2 = conv2((1, 28, 28), 62)
ROUND = {"batch_size": 20, "local_steps": 5}  # the published setting
EPS = 1e-9

SMALL = sequential(
    (2, 8, 8),
    [
        ("conv1", Conv2d(4, 3, padding=1)),
        ("bn", BatchNorm()),
        ("relu", ReLU()),
        ("conv2", Conv2d(6, 3)),
        ("pool", MaxPool2d(2)),
        ("flat", Flatten()),
        ("fc1", Linear(20)),
        ("fc2", Linear(5)),
    ],
)
SIZES = {name: prod(SMALL.param_shapes[name]) for name in SMALL.prunable}
BY_HAND = Profile("p", "", "", 1000.0, 0.01, 0.02, 0.5, 4.0, 8.0, 1)


def at(density, spec=CONV2):
    return {name: round(density * prod(spec.param_shapes[name])) for name in spec.prunable}


def linear(spec, kept, profile, **setting):
    fit = linear_round_time(spec, profile, **setting)
    assert set(fit.seconds_per_weight) == set(spec.prunable)
    return fit.constant_seconds + sum(t * kept[name] for name, t in fit.seconds_per_weight.items())


# The published figures


def test_dense_compute_of_five_iterations():
    assert 5 * step_seconds(CONV2, {}, 20, PI) == pytest.approx(11.24, rel=1e-6)


def test_dense_communication():
    size = 4 * CONV2.num_params
    assert link_seconds(size, size, PI) == pytest.approx(36.73, abs=0.1)


def test_dense_round():
    assert round_seconds(CONV2, {}, PI, **ROUND) == pytest.approx(47.96, abs=0.01)


@pytest.mark.parametrize(("density", "seconds"), [(1.0, 51.08), (0.134, 12.2)])
def test_sparse_round_by_the_published_fit(density, seconds):
    assert linear(CONV2, at(density), PI, **ROUND) == pytest.approx(seconds, abs=0.15)


def test_the_fit_at_100_percent_is_never_charged():
    """The authors charge FedAvg 51.08 s; a device computes densely instead."""
    full = round_seconds(CONV2, at(1.0), PI, **ROUND)
    assert full == pytest.approx(round_seconds(CONV2, {}, PI, **ROUND), rel=1e-12)


def test_low_density_takes_the_sparse_way():
    kept = at(0.134)
    assert round_seconds(CONV2, kept, PI, **ROUND) == pytest.approx(
        linear(CONV2, kept, PI, **ROUND), rel=1e-9
    )


def test_published_coefficients_come_back():
    """Seconds per coefficient and round as in the paper's fit, the link included."""
    per_weight = linear_round_time(CONV2, PI, **ROUND).seconds_per_weight
    assert per_weight["conv2.weight"] == pytest.approx(4.106e-5, rel=1e-6)
    assert per_weight["fc1.weight"] == pytest.approx(6.525e-6, rel=1e-3)
    assert per_weight["fc2.weight"] == pytest.approx(6.453e-6, rel=2e-2)


# By hand


def test_activations_by_hand():
    """4·64 + 4·64 + 4·64 + 6·36 + 6·9 + 20 + 5; Flatten is a view."""
    assert activations(SMALL) == 3 * 256 + 216 + 54 + 25


def test_sparse_step_by_hand():
    """Linear 10 -> 4 after 6 -> 10, batch 2, 5 and 3 kept; 1000 FLOP/s, 0.02 s per FLOP.

    4·5·2 + 6·3·2 = 76 FLOPs at 0.02 s, 14 · 2 activations at 0.5 s each: 15.52 s.
    """
    spec = sequential((6,), [("fc1", Linear(10)), ("fc2", Linear(4))])
    kept = {"fc1.weight": 5, "fc2.weight": 3}
    profile = replace(BY_HAND, dense_flops_per_s=1.0)
    assert step_seconds(spec, kept, 2, profile) == pytest.approx(15.52)
    # dense weight gradients: 2·(60 + 40)·2 = 400 FLOPs at 20 a second, 20 s, instead of the
    # sparse 2·5·2 + 2·3·2 = 32 FLOPs at 0.02 s
    profile = replace(BY_HAND, dense_flops_per_s=20.0)
    assert step_seconds(spec, kept, 2, profile, importance=True) == pytest.approx(34.88)
    # of 5 of the 10 rows of fc1 and none of fc2: 2·30·2 = 120 at 20 a second, instead of 10 sparse
    piece = (Piece("fc1.weight", 2, 5),)
    assert step_seconds(spec, kept, 2, profile, importance=piece) == pytest.approx(21.32)
    # the dense way: (4·60 + 6·40)·2 = 960 FLOPs
    assert step_seconds(spec, kept, 2, replace(BY_HAND, dense_flops_per_s=100)) == pytest.approx(
        9.6
    )
    assert step_seconds(spec, {}, 2, profile) == pytest.approx(48)


def test_without_a_dense_way_each_layer_takes_its_shorter_one():
    """As above: fc1 40 FLOPs at 0.02 s, fc2 36; 480 each in full at 640 a second, 0.75 s."""
    spec = sequential((6,), [("fc1", Linear(10)), ("fc2", Linear(4))])
    kept = {"fc1.weight": 5, "fc2.weight": 3}
    board = replace(BY_HAND, dense_way=False, dense_flops_per_s=640.0)
    assert step_seconds(spec, kept, 2, board) == pytest.approx(14 + 0.75 + 0.72)
    # with dense weight gradients fc1 0.02·20 + 240/640 = 0.775 s, fc2 0.02·24 + 160/640 s
    assert step_seconds(spec, kept, 2, board, importance=True) == pytest.approx(14 + 0.75 + 0.73)
    assert step_seconds(spec, {}, 2, board) == pytest.approx(1.5), "there are no masks"
    one = sequential((6,), [("fc", Linear(10))])
    assert forward_seconds(one, {"fc.weight": 2}, 3, board) == pytest.approx(5 + 0.24)
    assert forward_seconds(one, {"fc.weight": 50}, 3, board) == pytest.approx(5 + 360 / 640)


def test_conv_and_linear_have_their_own_rates():
    conv = sequential((1, 4, 4), [("conv", Conv2d(2, 3))])
    slow = replace(BY_HAND, dense_flops_per_s=1e-3, sparse_seconds_per_activation=0.0)
    # 4 · 7 kept · 4 positions = 112 FLOPs at 0.01 s
    assert step_seconds(conv, {"conv.weight": 7}, 1, slow) == pytest.approx(1.12)


def test_forward_seconds_by_hand():
    """Dense 2·6·10·3 = 360 FLOPs; sparse 2·5·3 = 30 at 0.02 s + a third of 0.5 s · 10 · 3."""
    spec = sequential((6,), [("fc", Linear(10))])
    assert forward_seconds(spec, {}, 3, BY_HAND) == pytest.approx(0.36)
    slow = replace(BY_HAND, dense_flops_per_s=1.0)
    assert forward_seconds(spec, {"fc.weight": 5}, 3, slow) == pytest.approx(0.6 + 5.0)
    assert forward_seconds(spec, {"fc.weight": 5}, 3, BY_HAND) == pytest.approx(0.36)
    assert forward_seconds(spec, {"fc.weight": 5}, 0, slow) == 0


def test_link_seconds_by_hand():
    """Down at 8 bytes a second, up at 4."""
    assert link_seconds(16, 0, BY_HAND) == 2
    assert link_seconds(0, 16, BY_HAND) == 4
    assert link_seconds(16, 16, BY_HAND) == 6


# What must hold

counts = st.fixed_dictionaries({name: st.integers(0, size) for name, size in SIZES.items()})
rate = st.floats(1e3, 1e12)
per_flop = st.floats(0, 1e-3)
profiles = st.builds(
    Profile, st.just("p"), st.just(""), st.just(""), rate, per_flop, per_flop, per_flop, rate, rate,
    st.just(10**9),
)  # fmt: skip
batches = st.integers(1, 64)
steps = st.integers(1, 10)


@settings(deadline=None, max_examples=150)
@given(counts, profiles, batches, steps, st.data())
def test_round_seconds_is_monotone_in_every_count(kept, profile, batch_size, local_steps, data):
    """Also where the memory decides which way is taken: a step takes 20 to 500 KB."""
    memory = data.draw(st.sampled_from([1, 10**9]) | st.integers(20_000, 500_000))
    profile = replace(profile, memory_bytes=memory)
    name = data.draw(st.sampled_from(sorted(SIZES)))
    more = {**kept, name: data.draw(st.integers(kept[name], SIZES[name]))}
    low, high = (
        round_seconds(SMALL, k, profile, batch_size=batch_size, local_steps=local_steps)
        for k in (kept, more)
    )
    assert low <= high * (1 + EPS)
    if more[name] > kept[name]:  # its values travel at least
        assert low < high


@settings(deadline=None, max_examples=100)
@given(counts, profiles, batches, steps)
def test_round_seconds_is_never_above_the_linear_model(kept, profile, batch_size, local_steps):
    setting = {"batch_size": batch_size, "local_steps": local_steps}
    bound = linear(SMALL, kept, profile, **setting)
    dense = round_seconds(SMALL, {}, profile, **setting)
    assert round_seconds(SMALL, kept, profile, **setting) <= min(bound, dense) * (1 + EPS)


def sparse_gradients_are_cheaper(kept, profile) -> bool:
    """Than dense ones, in every layer; for any rates and counts they need not be."""
    rates = {"conv": profile.sparse_conv_seconds_per_flop}
    rates["fc"] = profile.sparse_linear_seconds_per_flop
    return all(
        kept[name] / SIZES[name] * rates["conv" if name.startswith("conv") else "fc"]
        <= 1 / profile.dense_flops_per_s
        for name in kept
    )


@settings(deadline=None, max_examples=100)
@given(counts, profiles, batches)
def test_importance_costs_between_a_plain_and_a_dense_step(kept, profile, batch_size):
    plain = step_seconds(SMALL, kept, batch_size, profile)
    with_importance = step_seconds(SMALL, kept, batch_size, profile, importance=True)
    dense = step_seconds(SMALL, {}, batch_size, profile)
    if sparse_gradients_are_cheaper(kept, profile):
        assert plain <= with_importance * (1 + EPS)
    assert with_importance <= dense * (1 + EPS)
    assert step_seconds(SMALL, {}, batch_size, profile, importance=True) == dense
    assert dense == pytest.approx(step_flops(SMALL, {}, batch_size) / profile.dense_flops_per_s)


@settings(deadline=None, max_examples=60)
@given(counts, profiles, batches)
def test_a_forward_pass_is_cheaper_than_a_step(kept, profile, examples):
    forward = forward_seconds(SMALL, kept, examples, profile)
    assert 0 <= forward <= step_seconds(SMALL, kept, examples, profile) * (1 + EPS)
    assert forward <= forward_flops(SMALL, {}, examples) / profile.dense_flops_per_s


@settings(deadline=None, max_examples=60)
@given(counts, profiles, batches, st.tuples(*[st.integers(0, 9)] * 6))
def test_work_seconds_are_additive(kept, profile, batch_size, numbers):
    plain, important, examples, plain2, important2, examples2 = numbers

    def of(plain, important, examples):
        work = Work(plain + important, batch_size, important, examples, kept)
        return work_seconds(SMALL, work, profile)

    both = of(plain + plain2, important + important2, examples + examples2)
    parts = of(plain, important, examples) + of(plain2, important2, examples2)
    assert both == pytest.approx(parts, rel=1e-9)
    assert both == pytest.approx(
        (plain + plain2) * of(1, 0, 0) + (important + important2) * of(0, 1, 0)
        + (examples + examples2) * of(0, 0, 1)
    )  # fmt: skip


def test_what_is_not_prunable_is_in_the_constant():
    """conv1 fixed: its operations and values, as if it were kept in full."""
    nodes = tuple(replace(n, prunable=n.name != "conv1") for n in SMALL.nodes)
    fixed = replace(SMALL, nodes=nodes)
    setting = {"batch_size": 3, "local_steps": 2}
    free, held = (linear_round_time(s, BY_HAND, **setting) for s in (SMALL, fixed))
    moved = free.seconds_per_weight["conv1.weight"] * SIZES["conv1.weight"]
    assert held.constant_seconds == pytest.approx(free.constant_seconds + moved)
    assert "conv1.weight" not in held.seconds_per_weight


def test_buffers_travel_too():
    """BatchNorm's running statistics are in the constant: 4 tensors of 4 values, and biases."""
    fit = linear_round_time(SMALL, BY_HAND, batch_size=1, local_steps=0)
    fixed = 4 * 4 + 4 + 6 + 20 + 5
    assert fit.constant_seconds == pytest.approx(fixed * link_seconds(4, 4, BY_HAND))
    assert fit.seconds_per_weight["fc1.weight"] == pytest.approx(link_seconds(4, 4, BY_HAND))
