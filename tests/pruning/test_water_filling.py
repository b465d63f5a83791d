"""Budgets min(n_l, c) that add up to the target exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlean.pruning.water_filling import water_filling


@pytest.mark.parametrize(
    ("sizes", "target", "expected"),
    [
        ((100, 100, 100), 90, (30, 30, 30)),
        ((100, 100, 10), 70, (30, 30, 10)),  # the small one is kept whole
        ((100, 100, 10), 71, (31, 30, 10)),  # c = 30, one left over: to the first
        ((10, 100, 100), 73, (10, 32, 31)),  # not to one that is full
        ((5, 5, 5), 2, (1, 1, 0)),  # c = 0
        ((5, 7, 9), 21, (5, 7, 9)),
        ((5, 7, 9), 0, (0, 0, 0)),
        ((3, 3, 9), 7, (3, 2, 2)),
        ((0, 4), 3, (0, 3)),
    ],
)
def test_by_hand(sizes, target, expected) -> None:
    named = {f"fc{i}.weight": size for i, size in enumerate(sizes)}
    assert tuple(water_filling(named, target).values()) == expected


@given(st.lists(st.integers(0, 40), max_size=6), st.floats(0, 1))
def test_one_level_for_all(sizes, share) -> None:
    """Exact sum; what is not kept whole differs by one weight at most."""
    target = round(share * sum(sizes))
    budgets = list(water_filling({str(i): size for i, size in enumerate(sizes)}, target).values())
    assert sum(budgets) == target
    assert all(0 <= kept <= size for kept, size in zip(budgets, sizes, strict=True))
    open_ = [kept for kept, size in zip(budgets, sizes, strict=True) if kept < size]
    if open_:
        assert max(budgets) <= min(open_) + 1


def test_refuses_what_cannot_be_met() -> None:
    for target in (-1, 9):
        with pytest.raises(ValueError, match=rf"target must be in \[0, 8\].*got {target}"):
            water_filling({"a": 3, "b": 5}, target)
    with pytest.raises(ValueError, match="sizes must be at least 0"):
        water_filling({"a": -3, "b": 5}, 1)
    assert water_filling({}, 0) == {}
