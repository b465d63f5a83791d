"""Seeds and generators: no two uses share a stream, and every machine draws the same numbers."""

from __future__ import annotations

from itertools import product

import numpy as np

from fedlean.core import derive_seed, generator


def test_no_two_uses_share_a_seed():
    """Small numbers in all positions, so that a sum or a missing separator would collide."""
    purposes = ["batches", "cohort", "direction/fc.weight", "direction/fc.bias", "", "1", "/", "1/"]
    uses = list(product(range(12), range(34), range(34), purposes))
    assert len(uses) > 100_000
    assert len({derive_seed(*use) for use in uses}) == len(uses)


def test_digits_do_not_run_into_each_other():
    assert derive_seed(1, 12, 3, "a") != derive_seed(11, 2, 3, "a")
    assert derive_seed(1, 1, 23, "a") != derive_seed(1, 12, 3, "a")
    assert derive_seed(0, 0, 1, "1") != derive_seed(0, 0, 11, "")


def test_known_seeds():
    """Pinned: another value here means that runs of earlier versions cannot be resumed."""
    assert derive_seed(0, 1, 2, "batches") == 6080359406193017069
    assert derive_seed(2**63 - 1, 9999, 7, "direction/conv1.weight") == 6085129723092406596


def test_seeds_are_63_bits():
    seeds = [derive_seed(0, 0, client, "range") for client in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds).bit_length() == 63


def test_numpy_integers_give_the_same_seed():
    assert derive_seed(np.int64(3), np.int32(1), np.int64(2), "a") == derive_seed(3, 1, 2, "a")


def test_generators_do_not_depend_on_the_order_of_use():
    uses = [(0, round, client, "draw") for round in range(3) for client in range(3)]
    forward = {use: generator(*use).standard_normal(5) for use in uses}
    # backwards, and interleaved draw by draw
    streams = {use: generator(*use) for use in reversed(uses)}
    drawn = {use: [] for use in uses}
    for _ in range(5):
        for use in reversed(uses):
            drawn[use].append(streams[use].standard_normal())
    for use in uses:
        np.testing.assert_array_equal(forward[use], drawn[use])


def test_generators_are_counter_based_and_differ():
    assert isinstance(generator(0, 0, 0, "a").bit_generator, np.random.Philox)
    assert not np.array_equal(generator(0, 0, 0, "a").random(8), generator(0, 0, 1, "a").random(8))


def test_generators_leave_the_global_stream_alone():
    before = np.random.get_state()  # noqa: NPY002
    generator(0, 0, 0, "a").random(8)
    after = np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0] and before[2:] == after[2:]
    np.testing.assert_array_equal(before[1], after[1])
