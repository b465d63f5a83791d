from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stored import Stored, idx, idx_gz, npz, npz_deflated, npz_floats

from fedlean.data import fingerprint as module
from fedlean.data.dataset import Dataset
from fedlean.data.fingerprint import changed_parts, fingerprint
from fedlean.data.load import load_dataset


def small(**changes) -> Dataset:
    """Six training and two test images with client ids."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (8, 1, 3, 3), np.uint8)
    y = np.array([0, 1, 2, 0, 1, 2, 1, 0])
    clients = np.array([0, 0, 1, 1, 2, 2], np.int32)
    data = Dataset.from_images(
        "small", (x[:6], y[:6]), (x[6:], y[6:]), classes=3, scale=255.0, clients=clients
    )
    return replace(data, **changes)


def large(x: np.ndarray | None = None) -> Dataset:
    """47 MB of images, all different."""
    n = 60_000
    if x is None:
        x = np.random.default_rng(0).integers(0, 256, (n, 1, 28, 28), np.uint8)
    y = np.zeros(n, np.int64)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    return Dataset("large", x, y, x[:9], y[:9], 1, zero, one)


def changed(name: str, position: int | tuple, value: float) -> dict[str, np.ndarray]:
    array = getattr(small(), name).copy()
    array[position] = value
    return {name: array}


CHANGES = [
    ({}, []),
    ({"name": "other"}, []),
    ({"mean": np.full(1, 0.4, np.float32)}, []),  # follows from the training images
    (changed("x_train", (4, 0, 1, 2), 7), ["the training images (x_train)"]),
    (changed("x_test", (1, 0, 0, 0), 7), ["the test images (x_test)"]),
    (changed("y_test", 0, 2), ["the test labels (y_test)"]),
    (changed("clients", 3, 0), ["the client ids (clients)"]),
    ({"y_train": small().y_train[::-1].copy()}, ["the training labels (y_train)"]),
    ({"x_train": small().x_train[::-1].copy()}, ["the training images (x_train)"]),
    (
        {"clients": None},
        ["the client ids (clients): there are none any more"],
    ),
    (
        {"x_test": small().x_test[:1], "y_test": small().y_test[:1]},
        [
            "the test images (x_test): 1 examples, 2 before",
            "the test labels (y_test): 1 examples, 2 before",
        ],
    ),
    (
        {each: getattr(small(), each).reshape(-1, 1, 1, 9) for each in ("x_train", "x_test")},
        [
            "the training images (x_train): shape [6, 1, 1, 9], [6, 1, 3, 3] before",
            "the test images (x_test): shape [2, 1, 1, 9], [2, 1, 3, 3] before",
        ],
    ),
    (
        {each: getattr(small(), each).astype(np.float32) for each in ("x_train", "x_test")},
        [
            "the training images (x_train): dtype float32, uint8 before",
            "the test images (x_test): dtype float32, uint8 before",
        ],
    ),
    ({"class_names": tuple("abc")}, ["the classes: 'a', 'b', 'c'; '0', '1', '2' before"]),
    ({"scale": 16.0}, ["the value that counts as 1 (scale): 16, 255 before"]),
]


@pytest.mark.parametrize(("change", "lines"), CHANGES, ids=range(len(CHANGES)))
def test_a_change_is_named(change: dict, lines: list[str]):
    before = json.loads(json.dumps(fingerprint(small())))
    assert changed_parts(before, fingerprint(small(**change))) == lines


def test_client_ids_that_are_new():
    without = fingerprint(small(clients=None))
    assert changed_parts(without, fingerprint(small())) == [
        "the client ids (clients): there were none before"
    ]


def test_entries_say_what_they_are_of():
    entries = fingerprint(small())
    assert list(entries) == ["x_train", "y_train", "x_test", "y_test", "clients", "classes"]
    assert entries["x_train"]["shape"] == [6, 1, 3, 3] and entries["x_train"]["dtype"] == "uint8"
    assert len(entries["y_test"]["digest"]) == 2 * 16
    assert entries["classes"] == {"names": ["0", "1", "2"], "scale": 255.0}


def test_the_same_data_in_other_files_is_the_same(tmp_path: Path):
    found = []
    for write in (idx, idx_gz, npz, npz_deflated):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(Stored(), folder)
        # In the npz they lie in another order, which is another order to train in.
        data = load_dataset(str(folder))
        order, test = (
            np.argsort(x[:, 0, 0, :].view("S6")[:, 0]) for x in (data.x_train, data.x_test)
        )
        data = replace(
            data,
            x_train=data.x_train[order],
            y_train=data.y_train[order],
            x_test=data.x_test[test],
            y_test=data.y_test[test],
            clients=None,
        )
        found.append(fingerprint(data))
    assert all(changed_parts(found[0], each) == [] for each in found)


def test_bytes_and_floats_differ(tmp_path: Path):
    for write in (npz, npz_floats):
        (tmp_path / write.__name__).mkdir()
        write(Stored(), tmp_path / write.__name__)
    before, after = (
        fingerprint(load_dataset(str(tmp_path / each))) for each in ("npz", "npz_floats")
    )
    assert len(changed_parts(before, after)) == 3  # images of both parts, scale


def test_of_a_large_array_the_order_is_found_and_both_ends():
    before = large()
    x = before.x_train
    order = np.random.default_rng(1).permutation(len(x))
    assert changed_parts(fingerprint(before), fingerprint(large(x[order])))
    swapped = x.copy()
    swapped[:2000] = x[2000:0:-1]  # an order that is another for few of them only
    for other in (swapped, _flipped(x, 0), _flipped(x, -1)):
        assert changed_parts(fingerprint(before), fingerprint(large(other))) == [
            "the training images (x_train)",
            *(["the test images (x_test)"] if not np.array_equal(other[:9], x[:9]) else []),
        ]


def _flipped(x: np.ndarray, position: int) -> np.ndarray:
    other = x.copy()
    other.reshape(-1)[position] ^= 1
    return other


def test_it_is_cheap_however_large_the_set_is():
    data = large()
    seconds = []
    for _ in range(5):
        began = time.process_time()
        fingerprint(data)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.1


def test_the_sample_is_spread_from_the_first_byte_to_the_last(monkeypatch: pytest.MonkeyPatch):
    """Of 100 bytes, 4 pieces of 5: at 0, 31, 63 and 95."""
    monkeypatch.setattr(module, "SAMPLED_BYTES", 20)
    monkeypatch.setattr(module, "PIECES", 4)
    array = np.arange(100, dtype=np.uint8)
    found = {i for i in range(100) if module._digest(_flipped(array, i)) != module._digest(array)}
    assert found == {*range(5), *range(31, 36), *range(63, 68), *range(95, 100)}
