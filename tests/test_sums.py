"""The sums of a merge: native and NumPy to the same bits, and what the native calls refuse."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean import sums
from fedlean.slices import place

INT64_MIN, INT64_MAX = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@pytest.fixture(scope="module")
def add(has_native):
    """The native call, of a tensor of four rows of six."""
    from fedlean import _native

    def add(total, values, rows=(1, 3), row_size=6, firsts=(0, 4), sizes=(1, 2)):
        rows, firsts, sizes = (np.array(n, np.int64) for n in (rows, firsts, sizes))
        _native.add_scaled(total, values, 2.0, rows, row_size, firsts, sizes)

    return add


def ids_of(kind, side, kept, rng):
    """So many of an axis: the first, consecutive ones that go on at its beginning, or any."""
    if kind == "prefix":
        return slice(0, kept)
    if kind == "rolling":
        return (np.arange(kept) + rng.integers(side)) % side
    chosen = rng.permutation(side)[:kept]
    return np.sort(chosen) if kind == "random" else chosen


@st.composite
def slices(draw):
    """An index and the shape that it is of, one to four axes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape, index = [], []
    for _ in range(draw(st.integers(1, 4))):
        side = draw(st.integers(1, 40 if not shape else 9))
        kept = draw(st.integers(0, side) if draw(st.booleans()) else st.just(side))
        kind = draw(st.sampled_from(["prefix", "rolling", "random", "any order"]))
        shape.append(side)
        index.append(ids_of(kind, side, kept, rng))
    return tuple(index), tuple(shape), rng


def wide(rng, shape):
    """float32 of many magnitudes and both zeros: sums of them round."""
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-60, 60, shape)
    return np.where(rng.random(shape) < 0.1, -0.0, values).astype(np.float32)


@pytest.mark.usefixtures("has_native")
@settings(deadline=None, max_examples=200)
@given(slices(), st.sampled_from([1, 5, 1 << 15]), st.floats(0, 1e9))
def test_native_and_numpy_give_the_bits_of_an_index_array(drawn, piece, weight):
    index, shape, rng = drawn
    where = place(index, shape)
    start, values = wide(rng, shape) / 3.0, wide(rng, where.shape)
    want = start.astype(np.float64)
    want[np.ix_(*where.ids)] += values.astype(np.float64) * weight
    native, by_numpy = start.astype(np.float64), start.astype(np.float64)
    where.add(native, values, weight)
    with patch.object(sums, "_native", None), patch.object(sums, "PIECE", piece):
        where.add(by_numpy, values, weight)
    assert native.tobytes() == want.tobytes()
    assert by_numpy.tobytes() == want.tobytes()


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("size", [0, 1, 7, 100_003])
def test_whole_tensors_are_added_to_the_same_bits(size):
    rng = np.random.default_rng(size)
    start, values = wide(rng, size).astype(np.float64), wide(rng, size)
    native, by_numpy = start.copy(), start.copy()
    sums.add_scaled(native, values, 37.0)
    with patch.object(sums, "_native", None):
        sums.add_scaled(by_numpy, values, 37.0)
    assert native.tobytes() == by_numpy.tobytes() == (start + values * np.float64(37)).tobytes()


@pytest.mark.parametrize(
    "values",
    [
        np.arange(6, dtype=np.float64).reshape(2, 3),
        np.arange(12, dtype=np.float32).reshape(2, 6)[:, ::2],
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.frombuffer(b"\0" + np.arange(6, dtype=np.float32).tobytes(), np.uint8)[1:]
        .view(np.float32)
        .reshape(2, 3),
    ],
    ids=["float64", "with gaps", "of another byte order", "at odd addresses"],
)
def test_values_that_the_native_call_refuses_are_added_by_numpy(values):
    total = np.zeros((4, 6))
    index = (np.array([3, 1]), np.array([0, 4, 5]))
    place(index, total.shape).add(total, values, 2.0)
    want = np.zeros((4, 6))
    want[np.ix_(*index)] = 2.0 * values.astype(np.float64)
    assert total.tolist() == want.tolist()


def test_runs_by_hand(add):
    total, values = np.ones((4, 6)), np.arange(1, 7, dtype=np.float32)
    add(total, values, rows=(3, 1))
    want = np.ones((4, 6))
    want[3, [0, 4, 5]] += [2, 4, 6]
    want[1, [0, 4, 5]] += [8, 10, 12]
    assert total.tolist() == want.tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": (1, 4)},
        {"rows": (-1, 1)},
        {"rows": (1, INT64_MAX)},
        {"rows": (INT64_MIN, 1)},
        {"rows": (1,)},
        {"rows": ((1, 3),)},
        {"row_size": 0},
        {"row_size": -6},
        {"row_size": 7},
        {"row_size": INT64_MAX},
        {"firsts": (0, 5)},
        {"firsts": (-1, 4)},
        {"firsts": (0, INT64_MAX)},
        {"firsts": (0, INT64_MIN)},
        {"firsts": (0,)},
        {"sizes": (1, 3)},
        {"sizes": (7, -4)},
        {"sizes": (1, INT64_MAX)},
        {"sizes": (INT64_MIN, 2)},
        {"sizes": (0, 0)},
    ],
    ids=str,
)
def test_the_native_call_refuses_what_does_not_lie_in_the_tensor(add, wrong):
    memory = np.ones((12, 6))  # the tensor is in its middle
    with pytest.raises(ValueError):
        add(memory[4:8], np.ones(6, np.float32), **wrong)
    assert (memory == 1).all()


def test_the_native_call_converts_and_copies_nothing(add):
    total, values = np.zeros((4, 6)), np.ones(6, np.float32)
    fixed = total.copy()
    fixed.flags.writeable = False
    odd = np.zeros(4 * 6 * 8 + 1, np.uint8)[1:].view(np.float64).reshape(4, 6)
    for one, other in [
        (total.astype(np.float32), values),
        (np.zeros((4, 12))[:, ::2], values),
        (fixed, values),
        (odd, values),
        (total, values.astype(np.float64)),
        (total, np.ones(12, np.float32)[::2]),
        (total, values[:-1]),
        (total, np.ones(7, np.float32)),
    ]:
        with pytest.raises((TypeError, ValueError)):
            add(one, other)


@pytest.mark.usefixtures("has_native")
@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.sampled_from([1, 2, 9, 49]),
    st.sampled_from([1, 5, 1 << 15]),
)
def test_means_by_native_and_by_numpy_have_the_bits_of_a_plain_division(seed, chunks, size, piece):
    """Where the weight is 0, the base comes back, its NaN and its -0 included."""
    rng = np.random.default_rng(seed)
    base, total = wide(rng, (chunks, size)), wide(rng, (chunks, size)) / 3.0
    base[rng.random(base.shape) < 0.1] = np.nan
    weights = rng.integers(0, 3, chunks) * rng.integers(1, 10**6, chunks).astype(np.float64)
    native = sums.mean_onto(base, total.astype(np.float64), weights)
    with patch.object(sums, "_native", None), patch.object(sums, "PIECE", piece):
        by_numpy = sums.mean_onto(base, total.astype(np.float64), weights)
    want = base.copy()
    trained = weights > 0
    want[trained] = (total[trained].astype(np.float64) / weights[trained, None]).astype(np.float32)
    assert native.tobytes() == by_numpy.tobytes() == want.tobytes()


def test_means_of_another_type_are_taken_by_numpy():
    base, total = np.array([[7.0, 8.0], [5.0, 6.0]]), np.array([[1.0, 2.0], [3.0, 4.0]])
    merged = sums.mean_onto(base, total, np.array([0.0, 3.0]))
    assert merged.tolist() == [[7.0, 8.0], [1.0, 4.0 / 3.0]]


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize(
    ("base", "weights", "merged"),
    [(11, 4, 12), (12, 5, 12), (12, 0, 12), (12, 4, 11), (12, 24, 12)],
)
def test_the_native_mean_refuses_arrays_that_do_not_fit(base, weights, merged):
    from fedlean import _native

    old, new = np.ones(base, np.float32), np.ones(merged, np.float32)
    with pytest.raises(ValueError):
        _native.mean(np.ones(12), old, np.ones(weights), new)
    assert (new == 1).all()
