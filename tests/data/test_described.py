from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlean.data.fingerprint import fingerprint
from fedlean.data.load import load_dataset

GOOD: dict[str, Any] = {"input_shape": [6, 128], "classes": ["b", "a"], "range": [-2, 3.5]}


def test_what_a_server_knows(tmp_path: Path):
    (tmp_path / "dataset.json").write_text(json.dumps(GOOD))
    data = load_dataset(str(tmp_path))
    assert data.input_shape == (6, 128) and data.class_names == ("b", "a")
    assert data.value_range == (-2.0, 3.5) and len(data.y_train) == len(data.y_test) == 0
    assert data.mean.tolist() == [0.0] * 6 and fingerprint(data)["x_train"]["shape"] == [0, 6, 128]
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)), y=np.arange(2))
    assert load_dataset(str(tmp_path)).input_shape == (3,), "examples say more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": []}, r"input_shape is \[\], expected 1 to 3 sides"),
        ({"input_shape": [6, True]}, "input_shape is"),
        ({"input_shape": [1, 2, 3, 4]}, "input_shape is"),
        ({"classes": ["a", 1]}, "classes is .*expected a list of names"),
        ({"classes": ["a", "a"]}, "class name 'a' more than once"),
        ({"range": [3, -2]}, r"range is \[3, -2\], expected the smallest and the largest"),
        ({"range": [1]}, "range is"),
        ({"more": 1}, r"got \['classes', 'input_shape', 'more', 'range'\], expected"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, change: dict[str, Any], message: str):
    (tmp_path / "dataset.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=rf"dataset\.json: .*{message}"):
        load_dataset(str(tmp_path))
