"""The generator against Philox written out, the table's moments, and who draws what."""

from statistics import NormalDist

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fedlean.engine.directions import (
    direction,
    direction_key,
    normal_table,
    normals,
    raw_words,
    signs,
)

WORD = (1 << 64) - 1
SHAPES = {"fc1.weight": (6, 4), "fc1.bias": (6,), "fc2.weight": (3, 6), "fc2.bias": (3,)}


def philox_block(counter: int, key: int) -> list[int]:
    """Philox4x64-10 from the paper's definition, in whole numbers."""
    c = [counter & WORD, counter >> 64 & WORD, 0, 0]
    k0, k1 = key, 0
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [high >> 64 ^ c[1] ^ k0, high & WORD, low >> 64 ^ c[3] ^ k1, low & WORD]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & WORD, k1 + 0xBB67AE8584CAA73B & WORD
    return c


def test_words_are_philox_from_counter_one():
    key = direction_key(7, 3, "fc.weight")
    expected = [word for counter in (1, 2, 3) for word in philox_block(counter, key)]

    assert raw_words(key, 10).tolist() == expected[:10]


def test_normals_read_four_entries_of_the_table_from_a_word():
    words = [int(word) for word in raw_words(5, 2)]
    table = normal_table()

    expected = [table[word >> 16 * i & 0xFFFF] for word in words for i in range(4)]
    assert_array_equal(normals(5, 7), np.array(expected[:7], np.float32))


def test_signs_read_64_bits_from_a_word():
    words = [int(word) for word in raw_words(5, 2)]

    expected = [1.0 if word >> i & 1 else -1.0 for word in words for i in range(64)]
    assert_array_equal(signs(5, 70), np.array(expected[:70], np.float32))


def test_the_table_is_the_normal_law_with_unit_mean_square():
    table = normal_table().astype(np.float64)

    assert_array_equal(table, -table[::-1])
    assert np.all(np.diff(table) > 0)
    assert abs(np.mean(table**2) - 1) < 1e-8
    assert abs(np.mean(table**4) - 3) < 6e-3  # the tails end at 4.32
    quantile = NormalDist().inv_cdf((60000 + 0.5) / 65536)
    assert table[60000] == pytest.approx(quantile, rel=1e-4)


def test_the_drawn_bits_never_change():
    """Models are rebuilt from seeds: a value drawn today must be drawn in a year."""
    drawn = direction(11, 2, "fc.weight", (2, 3), None, "gaussian")

    assert [value.hex() for value in drawn.tolist()] == [
        "0x1.2dc2c80000000p-2",
        "-0x1.3677980000000p-1",
        "0x1.289c560000000p-2",
        "-0x1.20ef800000000p+0",
        "-0x1.12b88c0000000p+0",
        "0x1.2a80400000000p-1",
    ]


@pytest.mark.parametrize("kind", ["gaussian", "sign"])
def test_pruned_coordinates_take_no_number(kind):
    mask = np.array([[True, False, True], [False, False, True]])

    kept = direction(1, 0, "fc.weight", (2, 3), mask, kind)
    dense = direction(1, 0, "fc.weight", (2, 3), None, kind)

    assert kept.shape == (3,)
    assert_array_equal(kept, dense[:3])


def test_rank_one_is_an_outer_product_at_kept_coordinates():
    mask = np.zeros((3, 2, 2), bool)
    mask[0, 1, 0] = mask[2, 0, 1] = True

    dense = direction(1, 0, "conv.weight", (3, 2, 2), None, "rank1")
    kept = direction(1, 0, "conv.weight", (3, 2, 2), mask, "rank1")
    u = normals(direction_key(1, 0, "conv.weight/rows"), 3)
    v = normals(direction_key(1, 0, "conv.weight/columns"), 4)

    assert dense.dtype == np.float32 and dense.shape == (12,)
    assert_array_equal(dense.reshape(3, 4), np.outer(u, v))
    assert_array_equal(kept, [u[0] * v[2], u[2] * v[1]])
    assert np.linalg.matrix_rank(dense.reshape(3, 4)) == 1


def test_rank_one_of_a_vector_is_normal():
    assert_array_equal(
        direction(1, 0, "fc.bias", (5,), None, "rank1"),
        direction(1, 0, "fc.bias", (5,), None, "gaussian"),
    )


@pytest.mark.parametrize("kind", ["gaussian", "sign", "rank1"])
def test_the_mean_square_is_one(kind):
    values = [direction(0, k, "fc.weight", (40, 50), None, kind) for k in range(50)]

    # 100,000 values (rank1: 4,500 free ones) put the mean square within 4 standard errors
    assert np.mean(np.square(values)) == pytest.approx(1.0, abs=0.2 if kind == "rank1" else 0.02)


def test_no_two_uses_share_a_key():
    purposes = [*SHAPES, *(f"{name}/{part}" for name in SHAPES for part in ("rows", "columns"))]
    keys = {
        direction_key(seed, k, purpose)
        for seed in range(40)
        for k in range(50)
        for purpose in purposes
    }

    assert len(keys) == 40 * 50 * len(purposes)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'cauchy'"):
        direction(0, 0, "fc.weight", (2,), None, "cauchy")  # type: ignore[arg-type]
