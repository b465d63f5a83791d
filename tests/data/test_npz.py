from __future__ import annotations

import io
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlean.data.dataset import Dataset
from fedlean.data.declared import Declared
from fedlean.data.load import load_dataset
from fedlean.data.npz import find_npz, npz_source

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (5, 4, 6), np.uint8)
GOOD: dict[str, Any] = {
    "x": X,
    "y": np.array([0, 1, 2, 1, 0], np.uint8),
    "split": np.array([0, 1, 0, 0, 1], np.uint8),
    "client": np.array([4, 9, 4, 7, 9], np.int32),
}


def jpeg_arrays(sizes: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Five grey squares as JPEG: image i is all 20·i, so that it survives compression."""
    image = pytest.importorskip("PIL.Image")
    pieces = []
    for i, (width, height) in enumerate(sizes):
        out = io.BytesIO()
        image.new(
            "RGB" if i % 2 else "L", (width, height), (20 * i,) * 3 if i % 2 else 20 * i
        ).save(out, "JPEG")
        pieces.append(out.getvalue())
    offset = np.cumsum([0, *(len(piece) for piece in pieces)]).astype(np.int64)
    jpeg = np.frombuffer(b"".join(pieces), np.uint8)
    return {"jpeg": jpeg, "offset": offset, "y": GOOD["y"], "split": GOOD["split"]}


def write(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def load(name: str, path: Path) -> Dataset:
    return npz_source(name, path).dataset()


def test_by_writer_layout(tmp_path: Path):
    write(tmp_path / "set.npz", GOOD)
    write(tmp_path / "writers.npz", {key: GOOD[key] for key in ("client", "split")})
    data = load_dataset(str(tmp_path))
    train = GOOD["split"] == 0
    np.testing.assert_array_equal(data.x_train, X[train][:, None])
    np.testing.assert_array_equal(data.x_test, X[~train][:, None])
    assert data.y_train.tolist() == [0, 2, 1] and data.y_test.tolist() == [1, 0]
    assert data.clients is not None and data.clients.tolist() == [4, 4, 7]
    assert (data.name, data.classes, data.scale) == (tmp_path.name, 3, 255.0)


@pytest.mark.parametrize("shape", [(5, 4, 2, 3), (5, 3, 4, 2), (5, 4, 6, 1), (5, 1, 4, 6)])
def test_channels_first_or_last(tmp_path: Path, shape: tuple[int, ...]):
    x = X.reshape(shape)
    data = load("a", write(tmp_path / "a.npz", {**GOOD, "x": x}))
    first = x if shape[1] in (1, 3) else np.moveaxis(x, 3, 1)
    np.testing.assert_array_equal(data.x_train, first[GOOD["split"] == 0])
    assert data.x_train.flags.c_contiguous


def test_floats_and_names(tmp_path: Path):
    arrays = {**GOOD, "x": X / 255.0, "classes": np.array(["a", "b", "c", "d"]), "layout": "nhw"}
    del arrays["client"]
    data = load("a", write(tmp_path / "a.npz", arrays))
    assert data.x_train.dtype == np.float32 and data.scale == 1.0
    assert data.classes == 4 and data.class_names == ("a", "b", "c", "d") and data.clients is None


BAD = [
    (
        {"x": X.reshape(5, 1, 8, 3)},
        r"nhwc .pictures of 3 channels and 1 x 8. or as nchw .pictures of 1 channels and 8 x 3.",
    ),
    ({"x": X.reshape(5, 2, 6, 2)}, "can be read as nhwc .* or as nchw"),
    (
        {"x": X / 255},
        r"x is float64 of shape \(5, 4, 6\), which can be read as ncl .signals of 4 channels and 6"
        r" values each. or as nlc .signals of 6 .* or as nhw .grey .*: say which with --layout",
    ),
    ({"x": X.astype(np.int32)}, "x is int32 .* can be read as ncl"),
    ({"x": X, "layout": "ncw"}, "layout is 'ncw', expected one of nf, ncl"),
    ({"x": X, "layout": "nchw"}, r"\(5, 4, 6\), expected \(n, c, h, w\) .*of 3 axes are ncl, nlc"),
    ({"x": X, "layout": np.array([1, 2])}, "layout is int64 .2,., expected one word"),
    ({"x": X[:3]}, r"x has shape \(3, 4, 6\)"),
    ({"x": X[0]}, "x has shape"),
    ({"x": X[:, 0, 0]}, r"x has shape .5,., expected .n, f. or .n, c, l. or"),
    ({"x": np.array(["a"] * 5)}, "x: expected numbers, got <U1"),
    ({"x": np.full(X.shape, 1e300), "layout": "nhw"}, "NaN or infinity"),
    ({"x": np.array([None] * 5)}, "array 'x' cannot be read.*never unpickled"),
    ({"y": GOOD["y"][:3]}, "split has 5 entries, expected 3"),
    ({"x": np.asfortranarray(X)}, "x is stored in Fortran order.*ascontiguousarray"),
    ({"x": X[:, :, :0]}, r"x has shape \(5, 4, 0\)"),
    ({"y": GOOD["y"] + 0.5}, "labels hold 0.5, expected whole numbers or text"),
    ({"y": np.eye(5)}, r"y is float64 \(5, 5\), expected .*numpy\.argmax"),
    ({"y": np.array([0, 1, 2**40, 1, 0])}, "got 1099511627777 classes, expected 1..65536"),
    (
        {"y": list("abcab"), "classes": np.array(["a", "c"])},
        "labels hold 'b', expected names among",
    ),
    ({"split": np.array([0, 1, 2, 0, 1])}, "split has values 0..2, expected 0 for training"),
    ({"split": np.array(list("aabab"))}, "split holds 'a', 'b', expected 'train' and 'test'"),
    ({"client": np.full(5, 0.5)}, "client: labels hold 0.5"),
    ({"X": X}, "got x and X, expected one of them"),
    ({"client": np.zeros(4, int)}, "client has 4 entries"),
    ({"classes": np.array([1, 2, 3])}, "expected names"),
    ({"classes": np.array(["a"])}, "labels are 0..2, expected 0..0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    path = write(tmp_path / "a.npz", {**GOOD, **change})
    with pytest.raises(ValueError, match=message):
        load("a", path)


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + data


def with_member(path: Path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """GOOD with the raw bytes `content` as its array x."""
    write(path, {key: GOOD[key] for key in ("y", "split")})
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("x.npy", content)
    return path


HOSTILE = [
    (b"", "EOF|magic"),
    (b"nonsense", "magic"),
    (
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (5, 99999999, 99999)}"),
        "but it holds",
    ),
    (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-5, -4)}", bytes(20)), "claims uint8"),
    (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (5,)}", bytes(6)), "but it holds 6"),
    (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "never unpickled"),
    (npy("{'descr': '|V0', 'fortran_order': False, 'shape': (5,)}"), "never unpickled"),
    (npy("((((((((((("), "header is damaged"),
    (npy("{'descr': '''"), "header is damaged"),
    (npy("{}", version=9), "version"),
]


@pytest.mark.parametrize(("content", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_members(tmp_path: Path, content: bytes, message: str):
    path = with_member(tmp_path / "a.npz", content)
    with pytest.raises(ValueError, match=f"array 'x' cannot be read: .*({message})"):
        load("a", path)


def test_a_false_directory_is_refused_before_reading(tmp_path: Path):
    """The central directory claims 4 GB for 20 bytes: file_size lies 24 bytes after PK 1 2."""
    path = with_member(tmp_path / "a.npz", npy("{'descr': '|u1'}"))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="directory claims 4294967280 bytes"):
        load("a", path)


def test_other_zip_methods_are_refused(tmp_path: Path):
    path = with_member(tmp_path / "a.npz", b"x" * 99, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="zip method 12"):
        load("a", path)


def test_a_damaged_checksum(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, **GOOD)  # stored, so that a pixel can be changed in place
    raw = bytearray(path.read_bytes())
    raw[raw.index(X.tobytes()) + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"array 'x' cannot be read.*CRC"):
        load("a", path)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06"])
def test_not_an_npz(tmp_path: Path, content: bytes):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: not a readable \.npz"):
        find_npz(tmp_path)


def test_wrong_arrays_are_named(tmp_path: Path):
    path = write(tmp_path / "a.npz", {"text": X})
    assert find_npz(tmp_path) == {}
    with pytest.raises(ValueError, match=r"got arrays \['text'\]"):
        load("a", path)


def test_jpeg(tmp_path: Path):
    arrays = {**jpeg_arrays([(8, 6)] * 5), "classes": np.array(["a", "b", "c"])}
    data = load("photos", write(tmp_path / "a.npz", arrays))
    assert data.name == "photos (JPEG)" and data.class_names == ("a", "b", "c")
    assert data.input_shape == (3, 6, 8) and data.x_train.dtype == np.uint8
    for image, i in zip(data.x_train, (0, 2, 3), strict=True):
        np.testing.assert_allclose(image, 20 * i, atol=2)


def change(arrays: dict[str, np.ndarray], key: str, position: int, value: int):
    array = arrays[key].copy()
    array[position] = value
    return {**arrays, key: array}


def test_jpeg_offsets_are_checked(tmp_path: Path):
    good = jpeg_arrays([(8, 8)] * 5)
    for position, value in ((0, -1), (2, 0), (5, len(good["jpeg"]) + 1), (3, 2**62)):
        path = write(tmp_path / "a.npz", change(good, "offset", position, value))
        with pytest.raises(ValueError, match="offset puts image"):
            load("a", path)
    for name, wrong in (("offset", good["offset"][:-1]), ("jpeg", good["jpeg"].astype(int))):
        with pytest.raises(ValueError, match=f"{name} is int64"):
            load("a", write(tmp_path / "a.npz", {**good, name: wrong}))


def test_jpeg_images_are_checked(tmp_path: Path):
    def refuse(arrays: dict[str, np.ndarray], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load("a", write(tmp_path / "a.npz", arrays))

    good = jpeg_arrays([(8, 8)] * 5)
    refuse(change(good, "jpeg", 0, 0), "JPEG image 0 cannot be used")
    truncated = {**good, "offset": good["offset"] - np.array([0, 0, 0, 0, 0, 200])}
    refuse(truncated, "JPEG image 4 cannot be used")
    refuse(jpeg_arrays([(8, 8)] * 4 + [(8, 9)]), "image 4 .*8 x 9, expected 8 x 8")
    refuse(jpeg_arrays([(513, 1)] * 5), "image 0 .*513 x 1, expected sides up to 512")


def test_jpeg_claims_are_checked_before_allocating(tmp_path: Path):
    """One true image of 512 x 512, then 99,999 "images" of one byte each: 79 GB if believed."""
    good = jpeg_arrays([(512, 512)] * 5)
    count, first = 100_000, int(good["offset"][1])
    arrays = {
        "jpeg": np.r_[good["jpeg"][:first], np.zeros(count, np.uint8)],
        "offset": np.r_[0, first + np.arange(count)],
        "y": np.zeros(count, np.uint8),
        "split": np.arange(count) % 2,
    }
    with pytest.raises(ValueError, match="decode to 78643200000 bytes"):
        load("a", write(tmp_path / "a.npz", arrays))


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.npz", jpeg_arrays([(8, 8)] * 5))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"Pillow.*pip install 'fedlean\[sim\]'"):
        load("a", path)


def test_without_a_split_all_are_for_training(tmp_path: Path):
    data = load("a", write(tmp_path / "a.npz", {"x": X, "y": GOOD["y"]}))
    assert len(data.y_train) == 5 and len(data.y_test) == 0


KERAS = {"x_train": X[:3], "y_train": GOOD["y"][:3, None], "x_test": X[3:], "y_test": GOOD["y"][3:]}
MEDMNIST = {
    "train_images": X[:3],
    "train_labels": GOOD["y"][:3, None],
    "val_images": X[:2],
    "val_labels": GOOD["y"][:2, None],
    "test_images": X[3:],
    "test_labels": GOOD["y"][3:, None],
}


@pytest.mark.parametrize(
    "arrays", [KERAS, MEDMNIST, {k.replace("x_", "X_"): v for k, v in KERAS.items()}]
)
def test_training_and_test_apart(tmp_path: Path, arrays: dict[str, np.ndarray]):
    write(tmp_path / "a.npz", arrays)
    data = load_dataset(str(tmp_path))
    np.testing.assert_array_equal(data.x_train, X[:3, None])
    np.testing.assert_array_equal(data.x_test, X[3:, None])
    assert data.y_train.tolist() == [0, 1, 2] and data.y_test.tolist() == [1, 0]
    left_out = ("2 examples for validation are left out",)
    assert data.notes == (left_out if arrays is MEDMNIST else ())


def test_one_half_is_enough(tmp_path: Path):
    for part, other in (("train", "test"), ("test", "train")):
        half = {name: array for name, array in KERAS.items() if part in name}
        data = load("a", write(tmp_path / f"{part}.npz", half))
        assert len(getattr(data, f"y_{part}")) == len(half[f"y_{part}"])
        assert len(getattr(data, f"y_{other}")) == 0
    del half["y_test"]
    with pytest.raises(ValueError, match="expected x and y, or x_train"):
        load("a", write(tmp_path / "none.npz", half))
    lacking = {name: array for name, array in KERAS.items() if name != "y_test"}
    with pytest.raises(ValueError, match="expected y_test beside x_test"):
        load("a", write(tmp_path / "lacking.npz", lacking))


def test_clients_of_the_training_half(tmp_path: Path):
    arrays = {**KERAS, "client_train": np.array(["b", "a", "b"])}
    data = load("a", write(tmp_path / "a.npz", arrays))
    assert data.clients is not None and data.clients.tolist() == [1, 0, 1]


def test_halves_must_go_together(tmp_path: Path):
    path = write(tmp_path / "a.npz", {**KERAS, "x_test": X[3:, :2]})
    with pytest.raises(ValueError, match=r"test examples have shape \(1, 2, 6\), expected"):
        load("a", path)


SIGNALS = np.random.default_rng(1).standard_normal((5, 6, 128)).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "layout", "shape"),
    [
        (SIGNALS, "ncl", (6, 128)),
        (SIGNALS.transpose(0, 2, 1), "nlc", (6, 128)),
        (SIGNALS, "nhw", (1, 6, 128)),
        (SIGNALS[:, :, None], "", (6, 1, 128)),
        ((1000 * SIGNALS).astype(np.int16), "ncl", (6, 128)),
        ((1000 * SIGNALS[:, 0]).astype(np.int16), "", (128,)),
        ((1000 * SIGNALS[:, 0]).astype(np.int64), "", (128,)),
        (SIGNALS[:, 0] > 0, "", (128,)),
    ],
)
def test_signals_and_tables(tmp_path: Path, x: np.ndarray, layout: str, shape: tuple[int, ...]):
    """By a member of the file, and by what the user says."""
    x = np.ascontiguousarray(x)
    word = {"layout": np.array(layout)} if layout else {}
    stored = load("a", write(tmp_path / "a.npz", {**GOOD, "x": x, **word}))
    path = write(tmp_path / "b.npz", {**GOOD, "x": x})
    said = npz_source("a", path, declared=Declared(layout)).dataset()
    for data in (stored, said):
        assert data.input_shape == shape
        first = np.moveaxis(x, -1, 1) if layout == "nlc" else x
        np.testing.assert_array_equal(
            data.x_train.reshape(3, -1).astype(np.float64),
            first[GOOD["split"] == 0].reshape(3, -1).astype(np.float64),
        )


def test_a_layout_is_said_once(tmp_path: Path):
    path = write(tmp_path / "a.npz", {**GOOD, "x": SIGNALS, "layout": np.array("ncl")})
    assert npz_source("a", path, declared=Declared("ncl")).input_shape == (6, 128)
    with pytest.raises(ValueError, match="layout is 'ncl', but --layout says 'nlc'"):
        npz_source("a", path, declared=Declared("nlc"))


def test_npy_files(tmp_path: Path):
    for name, array in {**GOOD, "x": SIGNALS, "layout": np.array("ncl")}.items():
        np.save(tmp_path / f"{name}.npy", array)
    data = load_dataset(str(tmp_path))
    np.testing.assert_array_equal(data.x_train, SIGNALS[GOOD["split"] == 0])
    assert data.y_train.tolist() == [0, 2, 1] and data.name == tmp_path.name
    assert load_dataset(f"{tmp_path}:npy").input_shape == (6, 128)


def test_damaged_npy_files(tmp_path: Path):
    for name in ("x", "y"):
        np.save(tmp_path / f"{name}.npy", GOOD[name])
    whole = (tmp_path / "x.npy").read_bytes()
    for content, message in (
        (whole[:-1], "but it holds 119"),
        (whole + b"1", "holds 121"),
        (b"", "magic|EOF"),
    ):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(ValueError, match=f"x.npy: array 'x' cannot be read: .*{message}"):
            load_dataset(str(tmp_path))
    (tmp_path / "x.npy").unlink()
    with pytest.raises(ValueError, match="holds no data set"):
        load_dataset(str(tmp_path))
