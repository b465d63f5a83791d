from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlean.data.declared import Declared
from fedlean.data.leaf import find_leaf, leaf_source
from fedlean.data.load import load_dataset

SIDE = 3


def image(level: int) -> list[float]:
    return [((level + i) % 256) / 255 for i in range(SIDE * SIDE)]


def content(users: dict[str, list[tuple[int, int]]]) -> dict[str, Any]:
    """users: name -> (grey level, label) of each example."""
    return {
        "users": list(users),
        "num_samples": [len(each) for each in users.values()],
        "user_data": {
            user: {"x": [image(level) for level, _ in each], "y": [y for _, y in each]}
            for user, each in users.items()
        },
    }


TRAIN = [{"f02": [(1, 0), (2, 61)], "empty": []}, {"f01": [(3, 5)], "f02": [(4, 7)]}]
TEST = {"f01": [(200, 60)]}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture(params=["", "data"])
def femnist(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for i, users in enumerate(TRAIN):
        write_json(tmp_path / request.param / "train" / f"all_data_{i}.json", content(users))
    write_json(tmp_path / request.param / "test" / "all_data_0.json", content(TEST))
    return tmp_path


def test_femnist_layout(femnist: Path):
    data = load_dataset(str(femnist))
    assert data.classes == 62 and data.input_shape == (1, SIDE, SIDE)
    assert data.x_train.dtype == np.uint8 and data.scale == 255.0
    assert data.x_train[:, 0, 0, 0].tolist() == [3, 1, 2, 4]  # users sorted: f01, then f02
    assert data.x_train[0, 0].ravel().tolist() == list(range(3, 12))
    assert data.y_train.tolist() == [5, 0, 61, 7]
    assert data.clients is not None and data.clients.tolist() == [0, 1, 1, 1]
    assert data.x_test[:, 0, 0, 0].tolist() == [200] and data.y_test.tolist() == [60]


def test_pixels_between_the_bytes_stay_floats(tmp_path: Path):
    odd = content({"b": [(0, 0)], "a": [(9, 0)]})
    odd["user_data"]["b"]["x"][0] = [0.1234] * 9
    write_json(tmp_path / "train/a.json", odd)
    write_json(tmp_path / "test/a.json", content(TEST))
    data = leaf_source("odd", tmp_path).dataset()
    assert data.x_train.dtype == data.x_test.dtype == np.float32 and data.scale == 1.0
    np.testing.assert_allclose(data.x_train[0].ravel(), image(9), rtol=1e-6)
    np.testing.assert_allclose(data.x_train[1], 0.1234, rtol=1e-6)
    np.testing.assert_allclose(data.x_test[0].ravel(), image(200), rtol=1e-6)


def bad(**changes: Any) -> dict[str, Any]:
    """One user `u` with one example; `changes` replace x or y of the user, or a top-level key."""
    value = content({"u": [(1, 1)]})
    for key, change in changes.items():
        (value["user_data"]["u"] if key in ("x", "y") else value)[key] = change
    return value


BAD = [
    ("{", "not readable as JSON"),
    ("[" * 100_000, "not readable as JSON"),
    ([], "expected LEAF's lists .* got list"),
    ({"users": []}, r"got \['users'\]"),
    (bad(users=["u", "v"]), "2 users and 1 num_samples"),
    (bad(users=["u", "u"], num_samples=[1, 1]), "different names"),
    (bad(users=[1]), "different names"),
    (bad(users=["v"]), "user 'v': expected an entry in user_data"),
    (bad(num_samples=[2]), r"got \[1, 1\] entries of x and y, expected lists of 2"),
    (bad(y=[1, 2]), r"got \[1, 2\] entries"),
    (bad(x="text"), r"got \['str', 1\]"),
    (bad(x=["some text"]), "image sets given as pixels"),
    (bad(x=[[0.5] * 8]), r"shape \(1, 8\), expected .examples, side².: square"),
    (bad(x=[[]]), "square"),
    (bad(x=[0.5]), "square"),
    (bad(x=[[2.0] * 9]), "x is in 2.0..2.0, expected pixels in 0..1"),
    (bad(x=[[float("nan")] * 9]), "expected pixels in 0..1"),
    (bad(x=[[None] * 9]), "expected pixels in 0..1"),
    (bad(y=[10**30]), "labels must be classes"),
    (bad(y=[None]), "y has None, expected whole numbers or text"),
    (bad(y=[[1]]), r"y has \[1\], expected"),
    (bad(y=[1.5]), "labels hold 1.5, expected whole numbers or text"),
    (bad(y=["a"]), "1 labels that are text and 1 numbers"),
    (bad(x=[[10**400] * 9]), "int too large to convert to float"),
    (bad(x=[[float("inf")] * 9]), "expected pixels in 0..1"),
    (bad(x=[[[[0.5]]] * 9]), "square"),
    (bad(y=[10**400]), "labels must be classes"),
    (bad(y=[float("nan")]), "labels hold nan"),
    (bad(y=[float("inf")]), "labels hold inf"),
    (bad(num_samples=[10**400]), "entries of x and y, expected lists of 1000"),
    ('{"users": [], "users": []}', "the key 'users' twice"),
    (json.dumps(bad()).replace("0.00392156862745098", "1" * 5000), "4300 digits"),
    (json.dumps(bad(y=["NEST"])).replace('"NEST"', "[" * 600 + "]" * 600), "y has .*, expected"),
    (
        json.dumps(bad(x="NEST")).replace('"NEST"', "[" * 600 + "]" * 600),
        "not rows of numbers|square",
    ),
    (content({"u": []}), "no examples, expected at least 1.*preprocess.sh"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=range(len(BAD)))
def test_damaged_files_are_named(tmp_path: Path, value: Any, message: str):
    write_json(tmp_path / "train/a.json", value)
    write_json(tmp_path / "test/a.json", content(TEST))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        leaf_source("a", tmp_path).dataset()


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path):
    write_json(tmp_path / "test/a.json", content(TEST))
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / "train/a.json")
    with pytest.raises(ValueError, match=r"a\.json: not readable as JSON \(it is not a file\)"):
        leaf_source("a", tmp_path).dataset()


def test_rows_of_two_lengths(tmp_path: Path):
    value = content({"u": [(1, 1), (2, 2)]})
    value["user_data"]["u"]["x"][1] = [0.5] * 4
    write_json(tmp_path / "train/a.json", value)
    with pytest.raises(ValueError, match="not rows of numbers of one length"):
        leaf_source("a", tmp_path).dataset()


def test_images_of_two_sizes(tmp_path: Path):
    value = content({"u": [(1, 1)], "v": [(2, 2)]})
    value["user_data"]["v"]["x"] = [[0.5] * 4]
    write_json(tmp_path / "train/a.json", value)
    with pytest.raises(ValueError, match="expected one size"):
        leaf_source("a", tmp_path).dataset()


def test_no_test_files(tmp_path: Path):
    write_json(tmp_path / "train/a.json", content(TEST))
    assert find_leaf(tmp_path) == {"leaf": tmp_path}
    device = leaf_source("a", tmp_path).dataset()
    assert len(device.y_train) and not len(device.y_test)
    (tmp_path / "train").rename(tmp_path / "test")
    assert find_leaf(tmp_path) == {"leaf": tmp_path}
    server = leaf_source("a", tmp_path).dataset()
    np.testing.assert_array_equal(server.x_test, device.x_train)
    assert not len(server.y_train) and server.clients is None


def test_rows_of_a_table(tmp_path: Path):
    """As LEAF's synthetic set has them: five numbers of any size."""
    rng = np.random.default_rng(0)
    x = {user: 10 * rng.standard_normal((3, 5)) for user in ("a", "b")}
    for part, users in (("train", ("a", "b")), ("test", ("a",))):
        data = {user: {"x": x[user].tolist(), "y": [0, 1, 2]} for user in users}
        write_json(
            tmp_path / part / "a.json",
            {"users": list(users), "num_samples": [3] * len(users), "user_data": data},
        )
    with pytest.raises(ValueError, match=r"square grey images; rows of a table .*--layout nf"):
        load_dataset(str(tmp_path))
    data = load_dataset(str(tmp_path), Declared("nf"))
    whole = np.concatenate([x["a"], x["b"]]).astype(np.float32)
    np.testing.assert_array_equal(data.x_train, whole)
    np.testing.assert_array_equal(data.x_test, whole[:3])
    assert data.clients is not None and data.clients.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.scale == 1.0 and data.input_shape == (5,)
    with pytest.raises(ValueError, match="--layout ncl cannot be read from LEAF's JSON"):
        load_dataset(str(tmp_path), Declared("ncl"))
