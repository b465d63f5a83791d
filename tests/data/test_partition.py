from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.data import partition as module
from fedlean.data.dataset import Dataset
from fedlean.data.partition import partition

SCHEMES = ("iid", "dirichlet:0.5", "dirichlet:100", "shards:1", "shards:2", "natural")


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def skew(shares: list[np.ndarray], labels: np.ndarray) -> float:
    """Mean over clients of the share of each one's most frequent class: 0.1 (even) to 1."""
    return float(np.mean([np.bincount(labels[s]).max() / len(s) for s in shares]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 30), st.integers(0, 2**63 - 1))
def test_every_example_has_exactly_one_client(
    balanced: Dataset, scheme: str, clients: int, seed: int
):
    shares = partition(scheme, balanced, clients, seed)
    assert len(shares) == clients and min(len(share) for share in shares) >= 1
    assert all(share.dtype == np.int64 and np.all(np.diff(share) > 0) for share in shares)
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(1000))
    assert same(shares, partition(scheme, balanced, clients, seed))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "natural"])
def test_the_seed_changes_the_partition(balanced: Dataset, scheme: str):
    assert not same(partition(scheme, balanced, 8, 0), partition(scheme, balanced, 8, 1))


def test_iid_parts_are_equal(balanced: Dataset):
    sizes = [len(share) for share in partition("iid", balanced, 7, 0)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_small_alpha_is_more_skewed(balanced: Dataset, seed: int):
    skews = [
        skew(partition(f"dirichlet:{alpha}", balanced, 10, seed), balanced.y_train)
        for alpha in (0.05, 1, 1000)
    ]
    assert skews[0] > skews[1] + 0.1 > skews[2] + 0.2 and skews[2] < 0.2


def test_dirichlet_cuts_by_hand():
    """A class of 10 in proportions 0.25, 0.35, 0.4: floors of 2.5 and 6 give 2, 4 and 4."""
    cuts = module._cuts(np.array([[0.25, 0.35, 0.4], [1.0, 0.0, 0.0]]), np.array([10, 3]))
    assert cuts.tolist() == [[0, 2, 6, 10], [0, 3, 3, 3]]


def test_dirichlet_draws_again_until_everyone_has_enough(
    balanced: Dataset, monkeypatch: pytest.MonkeyPatch
):
    def drawn(seed: int) -> bool:
        try:
            shares = partition("dirichlet:0.05", balanced, 10, seed)
        except ValueError as error:
            assert "1 draws of 1000 examples over 10 clients left one" in str(error)
            return False
        return min(len(share) for share in shares) >= 10

    assert all(drawn(seed) for seed in range(20))
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    assert {drawn(seed) for seed in range(20)} == {True, False}


def test_impossible_dirichlet_ends_with_an_error(balanced: Dataset):
    with pytest.raises(
        ValueError, match=r"1000 draws .* or a smaller minimum, as dirichlet:0\.001:1"
    ):
        partition("dirichlet:0.001", balanced, 500, 0)


def test_dirichlet_with_a_minimum(balanced: Dataset):
    for minimum in (1, 40):
        shares = partition(f"dirichlet:0.3:{minimum}", balanced, 10, 0)
        assert min(len(share) for share in shares) >= minimum
    default = partition("dirichlet:0.3", balanced, 10, 0)
    assert same(default, partition("dirichlet:0.3:10", balanced, 10, 0)), "which is 10 here"
    with pytest.raises(ValueError, match="10 clients with 101 examples each need 1010, there are"):
        partition("dirichlet:0.3:101", balanced, 10, 0)


def test_a_small_minimum_is_the_way_out(balanced: Dataset):
    with pytest.raises(ValueError, match=r"fewer than 4; .* as dirichlet:0\.03:1"):
        partition("dirichlet:0.03", balanced, 25, 0)
    assert len(partition("dirichlet:0.03:1", balanced, 25, 0)) == 25


def test_shards_hold_few_classes(balanced: Dataset):
    """10 clients, 2 shards of 50 from 10 classes of 100: no shard spans two classes."""
    shares = partition("shards:2", balanced, 10, 0)
    assert all(len(share) == 100 for share in shares)
    assert all(len(np.unique(balanced.y_train[share])) <= 2 for share in shares)


def test_uneven_shards_lose_nothing(make):
    shares = partition("shards:3", make(np.arange(101) % 7), 4, 0)
    assert sum(len(share) for share in shares) == 101


def test_natural_gives_each_id_its_examples(make):
    data = make(np.zeros(6), np.array([9, 2, 9, 5, 2, 9], np.int32))
    for clients in (None, 3):
        shares = partition("natural", data, clients, 0)
        assert [share.tolist() for share in shares] == [[1, 4], [3], [0, 2, 5]]


def test_merged_writers_are_consecutive(balanced: Dataset):
    """40 writers on 6 clients: six each, and the last four more."""
    ids = balanced.clients
    assert ids is not None
    owners = [np.unique(ids[share]).tolist() for share in partition("natural", balanced, 6, 0)]
    assert [len(each) for each in owners] == [6, 6, 6, 6, 6, 10]
    assert [one for each in owners for one in each] == sorted(set(ids.tolist()))


def test_natural_limits(make, balanced: Dataset):
    with pytest.raises(ValueError, match=r"got 41 clients, expected 1\.\.40"):
        partition("natural", balanced, 41, 0)
    with pytest.raises(ValueError, match=r"got 0 clients, expected 1\.\.40"):
        partition("natural", balanced, 0, 0)
    with pytest.raises(ValueError, match="no client ids; choose one of iid, dirichlet:A, shards:K"):
        partition("natural", make(np.zeros(3)), 2, 0)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet:1", "shards:2"])
@pytest.mark.parametrize("clients", [0, -1, 1001])
def test_impossible_numbers_of_clients(balanced: Dataset, scheme: str, clients: int):
    with pytest.raises(ValueError, match=f"got {clients} clients.*training example .1000."):
        partition(scheme, balanced, clients, 0)


def test_more_shards_than_examples(balanced: Dataset):
    with pytest.raises(ValueError, match="got 300 clients with 4 shards each"):
        partition("shards:4", balanced, 300, 0)


def test_only_natural_goes_without_a_number(balanced: Dataset):
    with pytest.raises(ValueError, match="'iid' needs a number of clients"):
        partition("iid", balanced, None, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("irid", "unknown partition 'irid'.*did you mean 'iid'"),
        ("dirichelt:0.5", "did you mean 'dirichlet:A'"),
        ("", "expected one of iid, dirichlet:A, natural, shards:K$"),
        ("iid:3", "expected 'iid' alone"),
        ("natural:", "expected 'natural' alone"),
        ("dirichlet", "got '', expected dirichlet:A.*as 'dirichlet:0.5'"),
        ("dirichlet:half", "got 'half'"),
        ("dirichlet:nan", "got 'nan'"),
        ("dirichlet:inf", "got 'inf'"),
        ("dirichlet:0", "got '0'"),
        ("dirichlet:0.5:", "got '', expected dirichlet:A:M"),
        ("dirichlet:0.5:0", "got '0', expected dirichlet:A:M.*as 'dirichlet:0.5:20'"),
        ("dirichlet:0.5:few", "got 'few'"),
        ("dirichlet:half:3", "got 'half'"),
        ("dirichlet:-1", "got '-1'"),
        ("shards", "got '', expected shards:K.*as 'shards:2'"),
        ("shards:1.5", "whole number"),
        ("shards:0", "got '0'"),
        ("shards:" + "9" * 5000, "whole number"),
    ],
)
def test_texts_that_cannot_be_read(balanced: Dataset, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        partition(text, balanced, 4, 0)
