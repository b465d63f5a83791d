"""Algorithm 2 against hand-computed numbers, all subsets, and a literal transcription."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.cost.time import LinearTime
from fedlean.pruning.empirical_risk import gamma, maximise_linear

CONV_2 = {  # the FEMNIST model of the paper, with the authors' seconds per coefficient
    "conv1.weight": ((32, 1, 5, 5), 5.56e-6),
    "conv2.weight": ((64, 32, 5, 5), 4.106e-5),
    "fc1.weight": ((2048, 3136), 6.525e-6),
    "fc2.weight": ((62, 2048), 6.453e-6),
}


def arrays(layers):
    """Importance and P from [(t, [(g², in P), ..]), ..], tensors a, b, .. in order."""
    names = "abcdef"[: len(layers)]
    importance = {
        n: np.array([g for g, _ in xs], np.float32)
        for n, (_, xs) in zip(names, layers, strict=True)
    }
    removable = {
        n: np.array([p for _, p in xs], bool) for n, (_, xs) in zip(names, layers, strict=True)
    }
    return importance, removable, {n: t for n, (t, _) in zip(names, layers, strict=True)}


def exact_gamma(layers, constant, fixed_delta, chosen) -> Fraction:
    """Eq. (6) and (7) over P̄ and the (layer, place) pairs `chosen`, in rational numbers."""
    delta, seconds = Fraction(fixed_delta), Fraction(constant)
    for layer, (t, xs) in enumerate(layers):
        for place, (g, in_p) in enumerate(xs):
            if not in_p or (layer, place) in chosen:
                delta += g
                seconds += Fraction(t)
    return delta / seconds if seconds else Fraction(0)


def candidates(layers):
    return [(i, j) for i, (_, xs) in enumerate(layers) for j, (_, p) in enumerate(xs) if p]


def algorithm_2(layers, constant, fixed_delta, max_kept=None) -> set:
    """The paper's Algorithm 2 to the letter: a sort and a loop (free coordinates by g², ours)."""

    def ratio(at):
        g, t = layers[at[0]][1][at[1]][0], layers[at[0]][0]
        return (Fraction(g) / Fraction(t), 0) if t else (float("inf") if g else 0, g)

    total = sum(len(xs) for _, xs in layers)
    room = total if max_kept is None else max_kept - (total - len(candidates(layers)))
    chosen: set = set()
    # sorted() is stable, and candidates() comes in tensor, then flat order.
    for at in sorted(candidates(layers), key=ratio, reverse=True):
        if len(chosen) >= room or not ratio(at)[0] > exact_gamma(
            layers, constant, fixed_delta, chosen
        ):
            break
        chosen.add(at)
    return chosen


def kept_pairs(masks, layers) -> set:
    """What of P the masks keep; fails if they drop a coordinate of P̄."""
    chosen = set()
    for layer, (name, (_, xs)) in enumerate(zip(masks, layers, strict=True)):
        for place, (_, in_p) in enumerate(xs):
            assert in_p or masks[name][place], "P̄ must stay"
            if in_p and masks[name][place]:
                chosen.add((layer, place))
    return chosen


# Few values and dyadic times make ties common and float64 sums exact.
SECONDS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])
COORDINATE = st.tuples(st.integers(0, 6), st.booleans())


def problems(size: int):
    layers = st.lists(
        st.tuples(SECONDS, st.lists(COORDINATE, max_size=size)), min_size=1, max_size=3
    )
    return st.tuples(layers, st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 5))


def test_equations_6_and_7_by_hand() -> None:
    """c = 2, t_a = 1, t_b = 0.5, fixed Δ = 1, g² of a = 9 and 4 (P̄), of b = 1.

    Γ(P̄)                = (1 + 4) / (2 + 1)              = 5/3
    a0: 9 / 1 = 9 > 5/3 -> in:   Γ = (5 + 9) / (3 + 1)   = 14/4 = 3.5
    b0: 1 / 0.5 = 2 < 3.5 -> the algorithm stops.
    """
    time = LinearTime(2.0, {"a": 1.0, "b": 0.5})
    importance = {"a": np.array([9, 4], np.float32), "b": np.array([1], np.float32)}
    removable = {"a": np.array([True, False]), "b": np.array([True])}
    assert gamma(1 + 9 + 4, 2 + 2 * 1.0) == 3.5
    masks = maximise_linear(importance, removable, time, fixed_delta=1.0)
    assert masks["a"].tolist() == [True, True]
    assert masks["b"].tolist() == [False]


def test_fixed_delta_raises_the_bar_by_hand() -> None:
    """c = 2, t = 1, P̄ = ∅, g² = 3, 2.  Without a fixed part 3/1 > 0 and 2/1 > 3/3: both stay.

    With fixed Δ = 8: Γ(∅) = 8/2 = 4 > 3: nothing repays its time.
    """
    importance, time = {"a": np.array([3, 2], np.float32)}, LinearTime(2.0, {"a": 1.0})
    p = {"a": np.ones(2, dtype=bool)}
    assert maximise_linear(importance, p, time)["a"].all()
    assert not maximise_linear(importance, p, time, fixed_delta=8.0)["a"].any()


def test_a_ratio_equal_to_gamma_stays_out() -> None:
    """c = 1, t = 1, fixed Δ = 1: Γ = 1; g² = 1 gives 1/1 = Γ, which does not exceed it.

    With thirds: c = 3, fixed Δ = 1, t = 3, g² = 1: 1/3 against 1/3.
    """
    importance, p = {"a": np.ones(4, np.float32)}, {"a": np.ones(4, dtype=bool)}
    for t in (1.0, 3.0):
        masks = maximise_linear(importance, p, LinearTime(t, {"a": t}), fixed_delta=1.0)
        assert not masks["a"].any()


def test_free_coordinates_stay_if_they_reduce_the_risk() -> None:
    importance, p = {"a": np.array([0, 1e-30], np.float32)}, {"a": np.ones(2, dtype=bool)}
    masks = maximise_linear(importance, p, LinearTime(1.0, {"a": 0.0}), fixed_delta=5.0)
    assert masks["a"].tolist() == [False, True]


@settings(deadline=None)
@given(problems(3))
def test_no_subset_of_p_is_better(problem) -> None:
    layers, constant, fixed_delta = problem
    importance, removable, times = arrays(layers)
    masks = maximise_linear(
        importance, removable, LinearTime(constant, times), fixed_delta=fixed_delta
    )
    chosen = kept_pairs(masks, layers)
    places = candidates(layers)
    best = max(
        exact_gamma(layers, constant, fixed_delta, set(subset))
        for size in range(len(places) + 1)
        for subset in combinations(places, size)
    )
    assert exact_gamma(layers, constant, fixed_delta, chosen) == best


@settings(deadline=None)
@given(problems(30), st.none() | st.integers(0, 60))
def test_equals_the_sorted_loop(problem, max_kept) -> None:
    layers, constant, fixed_delta = problem
    importance, removable, times = arrays(layers)
    masks = maximise_linear(
        importance,
        removable,
        LinearTime(constant, times),
        fixed_delta=fixed_delta,
        max_kept=max_kept,
    )
    assert kept_pairs(masks, layers) == algorithm_2(layers, constant, fixed_delta, max_kept)


@settings(deadline=None)
@given(problems(8))
def test_without_base_time_equals_the_sorted_loop(problem) -> None:
    """Γ = 0 while T = 0: everything free, then the one best coordinate."""
    layers, _, fixed_delta = problem
    layers = [(t, [(g, True) for g, _ in xs]) for t, xs in layers]
    importance, removable, times = arrays(layers)
    masks = maximise_linear(importance, removable, LinearTime(0.0, times), fixed_delta=fixed_delta)
    assert kept_pairs(masks, layers) == algorithm_2(layers, 0, fixed_delta)


@settings(deadline=None)
@given(problems(2), st.integers(0, 6))
def test_under_a_limit_no_subset_has_larger_ratios(problem, max_kept) -> None:
    """The rule: of the unlimited A, as many as fit, none outside with a larger g²/t.

    That the limited set also maximises Γ among all that fit holds for one t (next test) only.
    """
    layers, constant, fixed_delta = problem
    importance, removable, times = arrays(layers)
    time = LinearTime(constant, times)
    free = kept_pairs(maximise_linear(importance, removable, time, fixed_delta=fixed_delta), layers)
    limited = kept_pairs(
        maximise_linear(importance, removable, time, fixed_delta=fixed_delta, max_kept=max_kept),
        layers,
    )
    fixed = sum(len(xs) for _, xs in layers) - len(candidates(layers))
    assert limited <= free
    assert len(limited) == min(len(free), max(0, max_kept - fixed))

    def ratio(at):
        t = layers[at[0]][0]
        return layers[at[0]][1][at[1]][0] / t if t else float("inf")

    assert all(ratio(out) <= ratio(at) for out in free - limited for at in limited)


@settings(deadline=None)
@given(problems(8), st.integers(0, 8))
def test_under_a_limit_with_one_t_no_subset_that_fits_is_better(problem, max_kept) -> None:
    layers, constant, fixed_delta = problem
    layers = layers[:1]
    importance, removable, times = arrays(layers)
    masks = maximise_linear(
        importance,
        removable,
        LinearTime(constant, times),
        fixed_delta=fixed_delta,
        max_kept=max_kept,
    )
    places = candidates(layers)
    room = max(0, max_kept - (len(layers[0][1]) - len(places)))
    best = max(
        exact_gamma(layers, constant, fixed_delta, set(subset))
        for size in range(min(room, len(places)) + 1)
        for subset in combinations(places, size)
    )
    assert exact_gamma(layers, constant, fixed_delta, kept_pairs(masks, layers)) == best


def test_what_must_stay_exceeds_the_limit() -> None:
    importance = {"a": np.array([0, 0, 9], np.float32)}
    removable = {"a": np.array([False, False, True])}
    time = LinearTime(1.0, {"a": 1.0})
    masks = maximise_linear(importance, removable, time, max_kept=1)
    assert masks["a"].tolist() == [True, True, False]


def test_equal_ratios_under_a_limit_go_by_tensor_and_flat_order() -> None:
    """All g²/t = 4 > Γ: b comes first in the mapping, so two of b and one of a fill the limit."""
    importance = {"b": np.full((1, 2), 8, np.float32), "a": np.full((2, 2), 4, np.float32)}
    removable = {name: np.ones(x.shape, dtype=bool) for name, x in importance.items()}
    time = LinearTime(100.0, {"a": 1.0, "b": 2.0})
    masks = maximise_linear(importance, removable, time, max_kept=3)
    assert masks["b"].tolist() == [[True, True]]
    assert masks["a"].tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_threshold_is_compared_exactly(dtype) -> None:
    """Γ·t = 1 + 2^-30 lies between 1 and the next number of float16 and float32.

    g² = 1 does not exceed it; the next representable number does, unless it is nearer to 1 than
    2^-30 (float64).  The comparison must not round Γ·t up or down past either.
    """
    one, next_up = dtype(1), np.nextafter(dtype(1), dtype(2))
    importance = {"a": np.array([one, next_up], dtype)}
    p = {"a": np.ones(2, dtype=bool)}
    time = LinearTime(1e9, {"a": 1.0})
    masks = maximise_linear(importance, p, time, fixed_delta=1e9 * (1 + 2**-30))
    assert masks["a"].tolist() == [False, dtype != np.float64]


def test_a_threshold_beyond_float32_keeps_nothing() -> None:
    importance = {"a": np.array([3e38, 1.0], np.float32)}
    p = {"a": np.ones(2, dtype=bool)}
    masks = maximise_linear(importance, p, LinearTime(1.0, {"a": 1.0}), fixed_delta=1e60)
    assert not masks["a"].any()


def test_no_tensors_and_empty_tensors() -> None:
    assert maximise_linear({}, {}, LinearTime(0.0, {})) == {}
    empty = {"a": np.zeros((0, 3), np.float32)}
    p = {"a": np.zeros((0, 3), dtype=bool)}
    for constant in (0.0, 1.0):
        masks = maximise_linear(empty, p, LinearTime(constant, {"a": 1.0}), max_kept=0)
        assert masks["a"].shape == (0, 3)


def test_inputs_are_not_changed() -> None:
    importance = {"a": np.arange(4, dtype=np.float32)}
    removable = {"a": np.array([True, False, True, True])}
    importance["a"].flags.writeable = removable["a"].flags.writeable = False
    masks = maximise_linear(importance, removable, LinearTime(1.0, {"a": 1.0}), max_kept=2)
    assert not np.shares_memory(masks["a"], removable["a"])


@pytest.mark.parametrize("bad", [-1e-9, np.nan, np.inf])
def test_bad_times_name_the_tensor(bad: float) -> None:
    importance, p = {"fc1.weight": np.ones(1)}, {"fc1.weight": np.ones(1, dtype=bool)}
    with pytest.raises(ValueError, match=r"fc1\.weight"):
        maximise_linear(importance, p, LinearTime(1.0, {"fc1.weight": bad}))
    with pytest.raises(ValueError, match="constant_seconds"):
        maximise_linear(importance, p, LinearTime(bad, {"fc1.weight": 1.0}))


def test_a_tensor_without_a_time_is_named() -> None:
    with pytest.raises(ValueError, match="'a'"):
        maximise_linear({"a": np.ones(1)}, {"a": np.ones(1, dtype=bool)}, LinearTime(1.0, {}))


def test_conv_2_at_full_size_equals_the_sorted_cumulative_sums() -> None:
    """6.6 million weights: sort by g²/t, accumulate Δ and T, stop where the ratio meets Γ."""
    rng = np.random.default_rng(0)
    importance = {n: rng.standard_exponential(s, np.float32) for n, (s, _) in CONV_2.items()}
    removable = {n: rng.random(s, np.float32) < 0.9 for n, (s, _) in CONV_2.items()}
    times = {n: t for n, (_, t) in CONV_2.items()}
    masks = maximise_linear(importance, removable, LinearTime(6.246, times), fixed_delta=1e4)

    squares = np.concatenate([importance[n][removable[n]].astype(np.float64) for n in CONV_2])
    seconds = np.concatenate([np.full(np.sum(removable[n]), times[n]) for n in CONV_2])
    order = np.argsort(-squares / seconds)
    delta = 1e4 + sum(importance[n][~removable[n]].sum(dtype=np.float64) for n in CONV_2)
    base = 6.246 + sum(times[n] * np.sum(~removable[n]) for n in CONV_2)
    running = (delta + np.cumsum(squares[order])) / (base + np.cumsum(seconds[order]))
    running = np.concatenate([[delta / base], running[:-1]])
    stop = int(np.argmin(squares[order] / seconds[order] > running))
    added = np.zeros(len(order), dtype=bool)
    added[order[:stop]] = True
    found = np.concatenate([masks[n][removable[n]] for n in CONV_2])
    assert 0 < stop < len(order)
    np.testing.assert_array_equal(found, added)
    assert all(masks[n][~removable[n]].all() for n in CONV_2)
