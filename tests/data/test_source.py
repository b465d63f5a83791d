from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import FORMATS, WITH_CLIENTS, Stored, idx, idx_gz, leaf, npz, npz_deflated, npz_jpeg

from fedlean.data import source as module
from fedlean.data.load import load_source
from fedlean.data.partition import partition
from fedlean.data.source import in_memory, rows_at_once, take

SCHEMES = ("iid", "dirichlet:0.5", "shards:2", "natural")


@given(st.lists(st.integers(0, 5), max_size=8), st.randoms(use_true_random=False))
def test_take_equals_indexing(sizes: list[int], order):
    total = sum(sizes)
    data = np.arange(total * 2, dtype=np.uint8).reshape(total, 2)
    rows = np.array(order.sample(range(total), order.randint(0, total)), np.int64)
    out = np.zeros((len(rows), 2), np.float32)
    read = []
    blocks = np.split(data, np.cumsum(sizes)[:-1]) if sizes else []
    take((read.append(i) or block for i, block in enumerate(blocks)), rows, out)
    np.testing.assert_array_equal(out, data[rows])
    assert len(read) == len(blocks), "to the end, where a checksum may be"


def test_blocks_have_at_least_a_row():
    assert rows_at_once(1) == module.BLOCK_BYTES
    assert rows_at_once(module.BLOCK_BYTES + 1) == 1


@pytest.fixture(params=[1 << 18, 100])  # all rows in one block; two or three of them
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("write", FORMATS)
def test_a_share_is_that_of_the_whole_set(tmp_path: Path, write, scheme: str, block_bytes: int):
    """Bit for bit, whoever else's examples lie between."""
    if scheme == "natural" and write not in WITH_CLIENTS:
        pytest.skip("no client ids")
    write(Stored(), tmp_path)
    source = load_source(str(tmp_path))
    whole = source.dataset()
    dealt, expected = (partition(scheme, each, 4, 3) for each in (source, whole))
    for indices, same in zip(dealt, expected, strict=True):
        np.testing.assert_array_equal(indices, same)
        share = source.share(indices)
        assert share.x_train.dtype == whole.x_train.dtype
        assert share.x_train.tobytes() == whole.x_train[indices].tobytes()
        np.testing.assert_array_equal(share.y_train, whole.y_train[indices])
        assert (share.name, share.scale) == (whole.name, whole.scale)
        assert share.class_names == whole.class_names and share.input_shape == whole.input_shape
        assert len(share.x_test) == len(share.y_test) == 0
        if whole.clients is not None:
            assert share.clients is not None
            np.testing.assert_array_equal(share.clients, whole.clients[indices])
    assert (source.input_shape, source.dtype) == (whole.input_shape, whole.x_train.dtype)


@pytest.mark.parametrize("write", FORMATS)
def test_a_whole_set_in_small_blocks(tmp_path: Path, write, block_bytes: int):
    """What was written comes back, in bytes or as floats."""
    stored = Stored()
    write(stored, tmp_path)
    data = load_source(str(tmp_path)).dataset()
    for x, written, part in (
        (data.x_train, stored.x, "x_train"),
        (data.x_test, stored.x_test, "x_test"),
    ):
        if write is npz_jpeg:  # lossy
            assert x.shape == (len(written), 3, 6, 6) and x.dtype == np.uint8
            continue
        level = {"npz_floats": 255, "leaf_floats": 300}.get(write.__name__, 1)
        first = np.sort(np.rint(x[:, 0].astype(np.float64) * level), axis=0)
        np.testing.assert_array_equal(first, np.sort(written, axis=0), err_msg=part)


@pytest.mark.parametrize("write", FORMATS)
def test_labels_are_known_before_an_image_is_decoded(tmp_path: Path, write, monkeypatch):
    write(Stored(), tmp_path)
    source = load_source(str(tmp_path))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()
    assert np.bincount(source.y_train).tolist() == [20] * 8
    with pytest.raises((OSError, ValueError)):
        source.dataset()


@pytest.mark.parametrize("write", FORMATS)
def test_room_is_asked_for_before_examples_are_read(tmp_path: Path, write):
    write(Stored(), tmp_path)
    asked: list[tuple[int, str]] = []

    def room(needed_bytes: int, what: str, remedy: str) -> None:
        del remedy
        asked.append((needed_bytes, what))
        if what.startswith("loading"):
            raise ValueError("no room")

    source = load_source(str(tmp_path), room)
    assert asked and not any(what.startswith("loading") for _, what in asked)
    with pytest.raises(ValueError, match="no room"):
        source.share(np.arange(40))
    needed_bytes, what = asked[-1]
    assert what == f"loading 40 of 160 examples of {source.name!r}"
    assert needed_bytes == source.reading_bytes + 40 * 36 * source.input_shape[0] * (
        source.dtype.itemsize
    )


def test_a_json_file_needs_many_times_its_size(tmp_path: Path):
    leaf(Stored(), tmp_path)
    path = tmp_path / "train/a0.json"

    def room(needed_bytes: int, what: str, remedy: str) -> None:
        if needed_bytes > 5 * path.stat().st_size:
            raise ValueError(f"{what} {remedy}")

    with pytest.raises(ValueError, match=r"reading .*a0\.json, 0\.0 MB, spread its users"):
        load_source(str(tmp_path), room)


@pytest.mark.parametrize("write", [idx, idx_gz, npz, npz_deflated])
def test_others_examples_are_never_held(tmp_path: Path, write):
    """6 MB of images, of which a share is 1%."""
    stored = Stored(np.arange(6000) % 10, np.arange(600) % 10)
    stored.x, stored.x_test = (np.tile(x, (1, 5, 5)) for x in (stored.x, stored.x_test))
    write(stored, tmp_path)
    source = load_source(str(tmp_path))
    indices = np.arange(0, 6000, 100)
    tracemalloc.start()
    source.share(indices)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 900 + source.reading_bytes


@pytest.mark.parametrize("write", [npz, npz_deflated])
def test_a_whole_set_is_held_once(tmp_path: Path, write):
    """Not the archive's array beside the training and the test images."""
    stored = Stored(np.arange(6000) % 10, np.arange(600) % 10)
    stored.x, stored.x_test = (np.tile(x, (1, 5, 5)) for x in (stored.x, stored.x_test))
    write(stored, tmp_path)
    source = load_source(str(tmp_path))
    tracemalloc.start()
    source.read(np.arange(6000), np.arange(600))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 6600 * 900 <= peak < 6600 * 900 + source.reading_bytes


def test_damage_beyond_the_share_is_found(tmp_path: Path):
    """The checksum is at the end, and covers what is passed over."""
    stored = Stored()
    npz(stored, tmp_path)
    path = tmp_path / "set.npz"
    raw = bytearray(path.read_bytes())
    raw[raw.index(stored.x[7].tobytes()) + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"array 'x' cannot be read.*CRC"):
        load_source(str(tmp_path)).share(np.array([0]))


def test_a_file_that_changes_meanwhile(tmp_path: Path):
    npz(Stored(), tmp_path)
    source = load_source(str(tmp_path))
    npz(Stored(), tmp_path, lambda x: x[:, :3])
    with pytest.raises(ValueError, match="array 'x' cannot be read: the file has changed"):
        source.share(np.arange(3))


def test_users_that_change_meanwhile(tmp_path: Path):
    leaf(Stored(), tmp_path)
    source = load_source(str(tmp_path))
    leaf(Stored(np.arange(80) % 8), tmp_path)
    with pytest.raises(ValueError, match="the file has changed while it was read"):
        source.share(np.arange(3))


def test_a_jpeg_of_another_client_is_not_decoded(tmp_path: Path):
    npz_jpeg(Stored(), tmp_path)
    with np.load(tmp_path / "set.npz") as file:
        arrays = dict(file)
    arrays["jpeg"] = arrays["jpeg"].copy()
    arrays["jpeg"][arrays["offset"][9]] = 0
    np.savez(tmp_path / "set.npz", **arrays)
    source = load_source(str(tmp_path))
    assert len(source.share(np.arange(9)).y_train) == 9
    with pytest.raises(ValueError, match=r"set\.npz: JPEG image 9 cannot be used"):
        source.share(np.arange(10))


def test_in_memory(balanced):
    source = in_memory(balanced)
    assert source.share(np.array([3, 5])).x_train[:, 0, 0, 0].tolist() == [3, 5]
    whole = source.dataset()
    np.testing.assert_array_equal(whole.x_train, balanced.x_train)
    np.testing.assert_array_equal(whole.mean, balanced.mean)
