"""Pictures and recordings in a folder for each class."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from fedlean.data.declared import Declared
from fedlean.data.load import load_dataset, load_source

RNG = np.random.default_rng(0)
SHAPES = {"L": (5, 7), "LA": (5, 7, 2), "RGB": (5, 7, 3), "RGBA": (5, 7, 4), "I;16": (5, 7)}


def pixels(kind: str) -> np.ndarray:
    dtype = np.uint16 if kind == "I;16" else np.uint8
    return RNG.integers(0, np.iinfo(dtype).max, SHAPES[kind], dtype, endpoint=True)


def picture(path: Path, x: np.ndarray, kind: str = "L") -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(x).save(path) if kind != "P" else image.fromarray(x).convert("P").save(path)


@pytest.mark.parametrize("kind", SHAPES)
def test_pictures_of_every_kind(tmp_path: Path, kind: str):
    x = {name: pixels(kind) for name in ("cat/a.png", "cat/b.PNG", "dog/a.png")}
    for name, each in x.items():
        picture(tmp_path / name, each, kind)
    (tmp_path / "dog/readme.txt").write_text("no picture")
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("cat", "dog") and data.y_train.tolist() == [0, 0, 1]
    assert len(data.y_test) == 0
    assert data.input_shape == (SHAPES[kind][2] if len(SHAPES[kind]) == 3 else 1, 5, 7)
    for found, each in zip(data.x_train, x.values(), strict=True):
        first = each[None] if each.ndim == 2 else each.transpose(2, 0, 1)
        np.testing.assert_array_equal(found, first)
    assert data.scale == (65535 if kind == "I;16" else 255)


def test_palettes_and_bits_are_kept_as_colours_and_greys(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    x = RNG.integers(0, 2, (4, 4, 3), np.uint8) * 255
    for folder, converted in (("p", "P"), ("b", "1")):
        for label in ("a", "z"):
            (tmp_path / folder / label).mkdir(parents=True)
            image.fromarray(x).convert(converted).save(tmp_path / folder / label / "1.png")
    assert load_dataset(str(tmp_path / "p")).input_shape == (3, 4, 4)
    np.testing.assert_array_equal(
        load_dataset(str(tmp_path / "p")).x_train[0], x.transpose(2, 0, 1)
    )
    bits = load_dataset(str(tmp_path / "b")).x_train
    assert bits.shape == (2, 1, 4, 4) and set(np.unique(bits)) <= {0, 255}


def test_halves_in_folders(tmp_path: Path):
    for i, name in enumerate(("train/3/a.png", "train/7/b.png", "test/7/c.png", "test/9/d.png")):
        picture(tmp_path / name, np.full((2, 2), i, np.uint8))
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("3", "7", "9")
    assert data.x_train[:, 0, 0, 0].tolist() == [0, 1] and data.y_train.tolist() == [0, 1]
    assert data.x_test[:, 0, 0, 0].tolist() == [2, 3] and data.y_test.tolist() == [1, 2]
    server = load_dataset(f"{tmp_path}:pictures")
    assert len(server.y_test) == 2
    source = load_source(str(tmp_path))
    assert source.share(np.array([1])).x_train[:, 0, 0, 0].tolist() == [1]


def test_a_class_may_be_called_train(tmp_path: Path):
    for name in ("train/a.png", "bus/b.png"):
        picture(tmp_path / name, np.zeros((2, 2), np.uint8))
    assert load_dataset(str(tmp_path)).class_names == ("bus", "train")


def test_plots_beside_a_data_set_are_none(tmp_path: Path):
    picture(tmp_path / "figures/plot.png", np.zeros((2, 2), np.uint8))
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)), y=np.arange(2))
    assert load_dataset(str(tmp_path)).input_shape == (3,)
    (tmp_path / "raw").mkdir()
    (tmp_path / "a.npz").rename(tmp_path / "raw/a.npz")
    assert load_dataset(str(tmp_path)).input_shape == (3,)


def test_pictures_must_be_alike_and_whole(tmp_path: Path):
    picture(tmp_path / "a/1.png", np.zeros((2, 3), np.uint8))
    picture(tmp_path / "b/2.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"2\.png: got L of 3 x 3, expected L of 3 x 2 like 1\.png"
    ):
        load_dataset(str(tmp_path))
    picture(tmp_path / "b/2.png", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"2\.png: got RGB of 3 x 2, expected L of 3 x 2"):
        load_dataset(str(tmp_path))
    (tmp_path / "b/2.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"2\.png: .*cannot identify"):
        load_dataset(str(tmp_path))
    picture(tmp_path / "a/1.png", np.zeros((1, 4097), np.uint8))
    with pytest.raises(ValueError, match=r"1\.png: 4097 x 1, expected sides up to 4096"):
        load_dataset(str(tmp_path))


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture(tmp_path / "a/1.png", np.zeros((2, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"Pillow.*pip install 'fedlean\[sim\]'"):
        load_dataset(str(tmp_path))


def test_room_for_a_share_of_pictures(tmp_path: Path):
    for i in range(4):
        picture(tmp_path / f"a/{i}.png", np.zeros((2, 3), np.uint8))
    asked: list[str] = []
    source = load_source(str(tmp_path), lambda needed_bytes, what, remedy: asked.append(what))
    source.share(np.arange(2))
    assert any("names of 4 files" in what for what in asked)
    assert asked[-1].startswith("loading 2 of 4 examples")


def recording(path: Path, x: np.ndarray, sample_bytes: int = 2, rate: int = 8000) -> None:
    """x: whole numbers (samples, channels)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(x.shape[1])
        file.setsampwidth(sample_bytes)
        file.setframerate(rate)
        raw = b"".join(
            int(v).to_bytes(sample_bytes, "little", signed=sample_bytes > 1) for v in x.ravel()
        )
        file.writeframes(raw)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("sample_bytes", [1, 2, 3, 4])
def test_recordings(tmp_path: Path, channels: int, sample_bytes: int):
    bits = 8 * sample_bytes
    low, high = (0, 255) if bits == 8 else (-(1 << bits - 1), (1 << bits - 1) - 1)
    x = RNG.integers(low, high, (3, 50, channels), np.int64, endpoint=True)
    x[0, 0], x[0, 1] = low, high
    for name, each in zip(("no/a.wav", "yes/a.wav", "yes/b.wav"), x, strict=True):
        recording(tmp_path / name, each, sample_bytes)
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("no", "yes") and data.y_train.tolist() == [0, 1, 1]
    assert data.input_shape == (channels, 50)
    expected = x.transpose(0, 2, 1)
    if sample_bytes <= 2:
        assert data.x_train.dtype == (np.uint8 if sample_bytes == 1 else np.int16)
        np.testing.assert_array_equal(data.x_train, expected)
    else:
        np.testing.assert_allclose(data.x_train, expected / (1 << bits - 1), atol=1e-7)


@pytest.mark.parametrize(("sample_bytes", "silence"), [(1, 128), (2, 0), (3, 0)])
def test_recordings_are_cut_or_padded_to_the_declared_length(
    tmp_path: Path, sample_bytes: int, silence: int
):
    for name, length in (("no/a.wav", 3), ("yes/b.wav", 6)):
        recording(tmp_path / name, np.arange(1, length + 1)[:, None], sample_bytes)
    with pytest.raises(ValueError, match=r"of 3 samples .*no/a\.wav. to 6 .*b\.wav.*--length"):
        load_dataset(str(tmp_path))
    data = load_dataset(str(tmp_path), Declared(length=4))
    unit = 1 if sample_bytes < 3 else 1 << 23
    assert (unit * data.x_train[:, 0]).tolist() == [[1, 2, 3, silence], [1, 2, 3, 4]]


def test_recordings_must_be_alike_and_whole(tmp_path: Path):
    recording(tmp_path / "no/a.wav", np.zeros((4, 1), int))
    for x, more in ((np.zeros((4, 2), int), {}), (np.zeros((4, 1), int), {"rate": 16000})):
        recording(tmp_path / "yes/b.wav", x, **more)
        with pytest.raises(
            ValueError, match=r"b\.wav: got .* Hz, expected 1 of 16 bits at 8000 Hz"
        ):
            load_dataset(str(tmp_path))
    (tmp_path / "yes/b.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"b\.wav: .*expected PCM in a WAV file"):
        load_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="--layout says nothing"):
        load_dataset(str(tmp_path), Declared(layout="ncl"))
