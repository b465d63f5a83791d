"""The loaders on the published files, where FEDLEAN_DATA names the folder that holds them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedlean.data.dataset import Dataset
from fedlean.data.load import load_dataset
from fedlean.data.partition import partition


def published(name: str) -> Dataset:
    root = os.environ.get("FEDLEAN_DATA", "")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"FEDLEAN_DATA names no folder with {name}")
    return load_dataset(str(Path(root) / name))


def test_fashion_mnist():
    data = published("fashion_mnist")
    assert data.x_train.shape == (60000, 1, 28, 28) and data.x_test.shape == (10000, 1, 28, 28)
    assert np.bincount(data.y_train).tolist() == [6000] * 10
    np.testing.assert_allclose([data.mean[0], data.std[0]], [0.2860, 0.3530], atol=1e-4)


def test_mnist_by_writer():
    data = published("mnist_by_writer")
    assert data.x_train.shape == (60000, 1, 28, 28) and data.classes == 10
    np.testing.assert_allclose([data.mean[0], data.std[0]], [0.1307, 0.3081], atol=1e-4)
    sizes = [len(share) for share in partition("natural", data, None, 0)]
    assert (len(sizes), min(sizes), max(sizes)) == (539, 19, 131)
    merged = [len(share) for share in partition("natural", data, 10, 0)]
    # 53 writers each, and the 9 that are left over for the last
    assert merged == [*(sum(sizes[53 * i : 53 * (i + 1)]) for i in range(9)), sum(sizes[477:])]


@pytest.mark.slow
def test_cifar10_as_jpeg():
    data = published("cifar10")
    assert data.x_train.shape == (50000, 3, 32, 32) and data.x_test.shape == (10000, 3, 32, 32)
    assert data.class_names[:2] == ("airplane", "automobile") and data.name == "cifar10 (JPEG)"
    np.testing.assert_allclose(data.mean, [0.4913, 0.4821, 0.4465], atol=1e-3)
    np.testing.assert_allclose(data.std, [0.2452, 0.2428, 0.2606], atol=1e-3)


def test_text_is_not_mistaken_for_images():
    with pytest.raises(ValueError, match=r"shakespeare_roles\.npz with"):
        published("shakespeare")
