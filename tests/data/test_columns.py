from __future__ import annotations

import numpy as np
import pytest

from fedlean.data.columns import client_numbers, one_table, two_tables

Y = np.array([0, 1, 1, 0, 2])


@pytest.mark.parametrize(
    "split",
    [
        np.array([0, 1, 0, 0, 1]),
        np.array([0.0, 1.0, 0.0, 0.0, 1.0]),
        np.array([[0], [1], [0], [0], [1]], np.uint8),
        np.array([False, True, False, False, True]),
        np.array(["train", "test", "Train", "training", " testing "]),
        np.array([b"train", b"test", b"train", b"train", b"test"]),
        np.array(["0", "1", "0", "0", "1"]),
    ],
)
def test_a_split_of_any_kind(split: np.ndarray):
    found = one_table(Y, split=split)
    assert found.train.tolist() == [0, 2, 3] and found.test.tolist() == [1, 4]
    assert found.y_train.tolist() == [0, 1, 0] and found.y_test.tolist() == [1, 2]
    assert found.notes == ()


def test_validation_examples_are_left_out_and_that_is_said():
    found = one_table(Y, split=np.array(["train", "val", "test", "dev", "train"]))
    assert found.train.tolist() == [0, 4] and found.test.tolist() == [2]
    assert found.notes == ("2 examples for validation are left out",)


def test_without_a_split_all_are_for_training():
    found = one_table(Y, clients=np.array(["b", "a", "b", "c", "a"]))
    assert found.train.tolist() == [0, 1, 2, 3, 4] and len(found.test) == len(found.y_test) == 0
    assert found.clients is not None and found.clients.tolist() == [1, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (np.array([[5], [7], [5]]), ("5", "7"), [0, 1, 0]),
        (np.array([1, 2, 1]), ("1", "2"), [0, 1, 0]),
        (np.array([True, False, True]), ("0", "1"), [1, 0, 1]),
        (np.array(["walk", "run", "walk"]), ("run", "walk"), [1, 0, 1]),
    ],
)
def test_labels_keep_their_names(labels: np.ndarray, names: tuple[str, ...], numbers: list[int]):
    found = one_table(labels)
    assert found.class_names == names and found.y_train.tolist() == numbers


def test_two_tables_share_their_classes():
    found = two_tables(np.array([3, 7]), np.array([[9]]), clients=np.array([5, 5]))
    assert found.class_names == ("3", "7", "9")
    assert found.y_train.tolist() == [0, 1] and found.y_test.tolist() == [2]
    assert found.test.tolist() == [0] and found.clients is not None
    only = two_tables(np.empty(0, int), np.array(["b", "a"]))
    assert only.y_test.tolist() == [1, 0] and not len(only.train)


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        ([4, 9, 4], [4, 9, 4]),
        ([4.0, 9.0, 4.0], [4, 9, 4]),
        (["4", "9", "4"], [4, 9, 4]),
        ([-1, 10, 2], [0, 2, 1]),
        ([1 << 40, 3, 3], [1, 0, 0]),
        (["10", "9", "-1"], [2, 1, 0]),
        (["anna", "bert", "anna"], [0, 1, 0]),
        (["9", "p10", "9"], [0, 1, 0]),
        ([True, False, True], [1, 0, 1]),
    ],
)
def test_client_ids_of_any_kind(ids: list, numbers: list[int]):
    found = client_numbers(np.array(ids))
    assert found.dtype == np.int32 and found.tolist() == numbers


def test_ids_are_whole():
    with pytest.raises(ValueError, match=r"client: labels hold 0\.5"):
        client_numbers(np.array([0.5, 1.0]))
