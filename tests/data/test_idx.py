from __future__ import annotations

import gzip
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fedlean.data.idx import find_idx, idx_source
from fedlean.data.idxfile import read_idx
from fedlean.data.load import load_dataset

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (6, 3, 4), np.uint8)
TEST = RNG.integers(0, 256, (2, 3, 4), np.uint8)
TRAIN_Y, TEST_Y = np.array([0, 1, 2, 0, 1, 2], np.uint8), np.array([2, 0], np.uint8)


def encode(array: np.ndarray, magic: int | None = None, shape: tuple[int, ...] | None = None):
    head = struct.pack(">I", 0x0800 + array.ndim if magic is None else magic)
    return head + struct.pack(f">{array.ndim}I", *(shape or array.shape)) + array.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_set(
    folder: Path,
    prefix: str = "",
    *,
    test: str = "t10k",
    joint: str = "-",
    ending: str = "",
    labels: tuple[np.ndarray, np.ndarray] = (TRAIN_Y, TEST_Y),
) -> None:
    for part, x, y in (("train", TRAIN, labels[0]), (test, TEST, labels[1])):
        write(folder / f"{prefix}{part}-images{joint}idx3-ubyte{ending}", encode(x))
        write(folder / f"{prefix}{part}-labels{joint}idx1-ubyte{ending}", encode(y))


@pytest.mark.parametrize("prefix", ["", "mine-"])
@pytest.mark.parametrize("test", ["t10k", "test"])
@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_published_names(tmp_path: Path, prefix: str, test: str, joint: str, ending: str):
    write_set(tmp_path, prefix, test=test, joint=joint, ending=ending)
    data = load_dataset(str(tmp_path))
    np.testing.assert_array_equal(data.x_train, TRAIN[:, None])
    np.testing.assert_array_equal(data.x_test, TEST[:, None])
    np.testing.assert_array_equal(data.y_train, TRAIN_Y)
    np.testing.assert_array_equal(data.y_test, TEST_Y)
    assert (data.classes, data.class_names, data.scale) == (3, ("0", "1", "2"), 255.0)
    assert data.name == (prefix.rstrip("-") or tmp_path.name)


@pytest.mark.parametrize(("part", "x", "y"), [("train", TRAIN, TRAIN_Y), ("t10k", TEST, TEST_Y)])
def test_one_half_is_enough(tmp_path: Path, part: str, x: np.ndarray, y: np.ndarray):
    write_set(tmp_path)
    for path in tmp_path.iterdir():
        if not path.name.startswith(part):
            path.unlink()
    data = load_dataset(str(tmp_path))
    held, none = ("train", "test") if part == "train" else ("test", "train")
    np.testing.assert_array_equal(getattr(data, f"x_{held}"), x[:, None])
    np.testing.assert_array_equal(getattr(data, f"y_{held}"), y)
    assert len(getattr(data, f"x_{none}")) == 0
    next(tmp_path.glob("*labels*")).unlink()
    with pytest.raises(ValueError, match="expected images with their labels in one folder"):
        load_dataset(str(tmp_path))


def test_emnist_is_turned_back_and_counts_from_one(tmp_path: Path):
    letters = (TRAIN_Y + 1, TEST_Y + 1)
    write_set(tmp_path, "emnist-letters-", test="test", ending=".gz", labels=letters)
    data = load_dataset(str(tmp_path))
    np.testing.assert_array_equal(data.x_train, TRAIN.transpose(0, 2, 1)[:, None])
    np.testing.assert_array_equal(data.y_train, TRAIN_Y)
    np.testing.assert_array_equal(data.y_test, TEST_Y)
    assert data.input_shape == (1, 4, 3) and data.class_names == ("1", "2", "3")


def test_a_test_label_without_training_examples(tmp_path: Path):
    """A device's folder may lack classes: test labels 5 and 7 beside training labels 0, 1, 2."""
    write_set(tmp_path, labels=(TRAIN_Y, TEST_Y + 5))
    data = load_dataset(str(tmp_path))
    assert data.class_names == tuple("01234567") and data.labels_held == ("0", "1", "2")
    assert data.y_test.tolist() == [7, 5]


def test_labels_are_kept(tmp_path: Path):
    """A folder with the digits 3 and 7 holds these, not 0 and 1."""
    write_set(tmp_path, labels=(3 + 4 * (TRAIN_Y % 2), 3 + 4 * (TEST_Y % 2)))
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("3", "7")
    assert data.y_train.tolist() == [0, 1, 0, 0, 1, 0] and data.y_test.tolist() == [0, 0]


def test_images_of_two_sizes(tmp_path: Path):
    write_set(tmp_path)
    write(tmp_path / "t10k-images-idx3-ubyte", encode(TEST.transpose(0, 2, 1)))
    with pytest.raises(
        ValueError, match=r"t10k.*images of \(4, 3\), expected \(3, 4\) as in train"
    ):
        load_dataset(str(tmp_path))


def test_several_sets_in_one_folder(tmp_path: Path):
    write_set(tmp_path, "emnist-letters-")
    write_set(tmp_path)
    with pytest.raises(ValueError, match=r"2 data sets; choose one of .*:, .*:emnist-letters$"):
        load_dataset(str(tmp_path))
    assert load_dataset(f"{tmp_path}:emnist-letters").name == "emnist-letters"
    assert load_dataset(f"{tmp_path}:").name == tmp_path.name
    with pytest.raises(ValueError, match="no data set named 'emnist-leters'"):
        load_dataset(f"{tmp_path}:emnist-leters")


def test_plain_beside_its_gz_is_one_set(tmp_path: Path):
    write_set(tmp_path, ending=".gz")
    write_set(tmp_path)
    files = find_idx(tmp_path)[""]
    assert all(path.suffix != ".gz" for path in files.values())
    assert len(load_dataset(str(tmp_path)).y_train) == 6


def test_two_files_for_one_role(tmp_path: Path):
    write_set(tmp_path)
    write_set(tmp_path, test="test")
    with pytest.raises(ValueError, match=r"t10k-images.* and test-images.* are both test images"):
        find_idx(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path):
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no file of test-labels"):
        idx_source("some", find_idx(tmp_path)[""])


DAMAGED = [
    (b"", "got 0 bytes, expected an IDX header of 16"),
    (b"\0\0\x08", "got 3 bytes, expected an IDX header"),
    (encode(TRAIN)[:10], "got 10 bytes, expected an IDX header"),
    (encode(TRAIN, magic=2049), "magic number 2049, expected 2051"),
    (encode(TRAIN, magic=0x0D03), "magic number 3331, expected 2051"),
    (encode(TRAIN)[:-1], "72.*truncated"),
    (encode(TRAIN) + b"\0", "more than the 72 bytes"),
    (encode(TRAIN, shape=(6, 0, 4)), r"shape \(6, 0, 4\), expected at least 1"),
    (encode(TRAIN, shape=(5, 3, 4)), "claims 5 images, expected 6 as in the labels"),
    (encode(TRAIN, shape=(6, 2**32 - 1, 2**32 - 1)), "bytes of data, but a file of this size"),
]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(("content", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str, ending: str):
    path = write(tmp_path / f"train-images-idx3-ubyte{ending}", content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        read_idx(path, dimensions=3, count=6)


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_truncated_gzip(tmp_path: Path, cut: int):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(encode(TRAIN))[:-cut])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: the gzip stream ends early"):
        read_idx(path, dimensions=3)


def test_a_damaged_gzip(tmp_path: Path):
    path = tmp_path / "a.gz"
    good = bytearray(gzip.compress(encode(TRAIN)))
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="the gzip stream is damaged"):
        read_idx(path, dimensions=3)
    good[-5] ^= 1  # in the checksum
    path.write_bytes(good)
    with pytest.raises(ValueError, match="the gzip stream is damaged"):
        read_idx(path, dimensions=3)


def test_something_after_the_gzip(tmp_path: Path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(encode(TRAIN)) + b"more")
    with pytest.raises(ValueError, match="something follows the gzip stream"):
        read_idx(path, dimensions=3)


def test_a_bomb_is_not_inflated(tmp_path: Path):
    """64 MB of zeros behind a header that claims 72 bytes: refused without inflating them."""
    path = write(tmp_path / "a.gz", encode(TRAIN) + bytes(64 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than the 72 bytes"):
        read_idx(path, dimensions=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_large_file_is_read_in_pieces(tmp_path: Path):
    big = RNG.integers(0, 4, (50, 100, 100), np.uint8)  # several chunks on either side of gzip
    path = write(tmp_path / "a.gz", encode(big))
    np.testing.assert_array_equal(read_idx(path, dimensions=3), big)
