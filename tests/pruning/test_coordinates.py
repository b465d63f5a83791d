"""The checks' messages."""

from __future__ import annotations

import numpy as np
import pytest

from fedlean.pruning.coordinates import check_importance, check_limits


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_importance_names_the_tensor(bad: float) -> None:
    squares = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        check_importance({"conv1.weight": squares}, {"conv1.weight": np.ones(3, dtype=bool)})


@pytest.mark.parametrize(
    ("importance", "mask"),
    [
        ({}, np.ones(3, dtype=bool)),
        ({"a": np.ones(4, np.float32)}, np.ones(3, dtype=bool)),
        ({"a": np.ones(3, np.int64)}, np.ones(3, dtype=bool)),
        ({"a": np.ones(3, np.float32)}, np.ones(3, np.float32)),
    ],
)
def test_inputs_that_do_not_fit_name_the_tensor(importance, mask) -> None:
    with pytest.raises(ValueError, match="'a'"):
        check_importance(importance, {"a": mask})


def test_a_bias_beside_the_masked_tensors_is_not_looked_at() -> None:
    check_importance(
        {"w": np.ones(2, np.float32), "bias": np.array([np.nan])}, {"w": np.ones(2, dtype=bool)}
    )


@pytest.mark.parametrize(("delta", "limit"), [(-1.0, None), (np.nan, None), (0.0, -1)])
def test_limits_are_sizes(delta: float, limit: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        check_limits(delta, limit)
