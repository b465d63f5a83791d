from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import FORMATS, Stored, leaf, npz

from fedlean.data.labels import classes_of, listed
from fedlean.data.load import load_dataset

TABLE = [
    ([3, 7, 3], ("3", "7"), [0, 1, 0]),
    ([0, 2], ("0", "1", "2"), [0, 2]),
    ([1, 26, 2], ("1", "2", "26"), [0, 2, 1]),
    ([-1, 0, 1], ("-1", "0", "1"), [0, 1, 2]),
    ([10, 9], ("9", "10"), [1, 0]),
    ([3.0, -0.0], ("0", "1", "2", "3"), [3, 0]),
    ([True, False], ("0", "1"), [1, 0]),
    (["b", "a", "B"], ("B", "a", "b"), [2, 1, 0]),
    (["10", "9"], ("9", "10"), [1, 0]),
    (["2", "0"], ("0", "1", "2"), [2, 0]),
    (["02", "0"], ("0", "02"), [1, 0]),
    (["-0", "1"], ("-0", "1"), [0, 1]),
    ([b"\xc3\xa9", b"z"], ("z", "é"), [1, 0]),
    ([b"3", b"7"], ("3", "7"), [0, 1]),
]


@pytest.mark.parametrize(("labels", "names", "classes"), TABLE)
def test_by_hand(labels: list[Any], names: tuple[str, ...], classes: list[int]):
    found, y = classes_of(np.array(labels))
    assert (found, y.tolist(), y.dtype) == (names, classes, np.int64)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", ">u8", "f2", "f4", ">f8", "U", "S"])
@given(st.lists(st.integers(-3, 40), min_size=1))
def test_the_same_numbers_of_any_dtype(dtype: str, labels: list[int]):
    if min(labels) < 0 and "u" in dtype:
        labels = [abs(label) for label in labels]
    names, y = classes_of(np.array(list(map(str, labels)) if dtype in "US" else labels, dtype))
    assert [int(names[each]) for each in y] == labels
    expected = range(max(labels) + 1) if min(labels) == 0 else sorted(set(labels))
    assert names == tuple(map(str, expected))


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
    )
)
def test_text_means_itself(labels: list[str]):
    names, y = classes_of(np.array(["a", *labels]))
    assert [names[each] for each in y] == ["a", *labels]
    assert names == tuple(sorted({"a", *labels}))


def test_names():
    names = ["cat", "dog", "owl"]
    assert classes_of(np.array([2, 0]), names)[1].tolist() == [2, 0]
    assert classes_of(np.array([2.0, 0]), names)[1].tolist() == [2, 0]
    found, y = classes_of(np.array(["owl", "cat"]), names)
    assert found == tuple(names) and y.tolist() == [2, 0]
    assert classes_of(np.array(["1"]), ["1", "0"])[1].tolist() == [0], "a name, not a number"


BAD = [
    ([0.5, 1], None, "labels hold 0.5, expected whole numbers or text"),
    ([np.nan], None, "labels hold nan"),
    ([np.inf], None, "labels hold inf"),
    ([1j], None, "labels are complex128"),
    ([None], None, "labels are object"),
    ([[1]], None, r"labels are int64 \(1, 1\)"),
    ([], None, r"labels are float64 \(0,\)"),
    ([b"\xff"], None, "not UTF-8"),
    ([""], None, "a class name of 0 characters"),
    (["x" * 201], None, "a class name of 201 characters"),
    (["9" * 5000], None, "a class name of 5000 characters"),
    ([0, 65536], None, "got 65537 classes, expected 1..65536"),
    (range(1, 65538), None, "got 65537 classes"),
    ([3], ["a", "b"], "labels are 3..3, expected 0..1, which count the classes 'a', 'b'"),
    ([-1, 0], ["a", "b"], "labels are -1..0"),
    (
        ["a", "d", "c"],
        ["a", "b"],
        "labels hold 'c', 'd', expected names among the classes 'a', 'b'",
    ),
    (["1"], ["a", "b"], "labels hold '1'"),
    ([0], ["a", "a"], "class name 'a' more than once"),
    ([0], [], "got 0 classes"),
]


@pytest.mark.parametrize(("labels", "names", "message"), BAD, ids=range(len(BAD)))
def test_what_are_no_classes(labels: Any, names: list[str] | None, message: str):
    with pytest.raises(ValueError, match=message):
        classes_of(np.array(labels), names)


def test_long_lists_are_cut():
    assert listed(["a", "b"]) == "'a', 'b'"
    text = listed([f"class {i}" for i in range(1000)])
    assert text.startswith("'class 0', ") and text.endswith("... 'class 999' (1000 in all)")
    assert len(text) < 200


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_keeps_labels(tmp_path: Path, write):
    """Training has 3, 7 and 9, the test set 5 as well: the classes are these four."""
    labels, test_labels = np.array([3, 7, 9, 3] * 40), np.array([7, 5])
    write(Stored(labels, test_labels), tmp_path)
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("3", "5", "7", "9") and data.labels_held == ("3", "7", "9")
    held = [data.class_names[y] for y in data.y_train]
    assert sorted(held) == sorted(map(str, labels))
    assert sorted(data.y_test) == [1, 2]


@pytest.mark.parametrize("write", [npz, leaf])
def test_text_labels_in_files(tmp_path: Path, write):
    write(Stored(["owl", "cat"] * 40, ["dog"] * 4), tmp_path)
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("cat", "dog", "owl") and data.labels_held == ("cat", "owl")


def test_names_in_an_npz(tmp_path: Path):
    stored = Stored(["owl", "cat"] * 40, ["cat"] * 4)
    names = np.array([b"cat", b"dog", b"owl"])
    npz(stored, tmp_path, save=lambda path, **arrays: np.savez(path, classes=names, **arrays))
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("cat", "dog", "owl") and set(data.y_train) == {0, 2}
