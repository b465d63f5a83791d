"""Small labelled image sets, written to a folder in every format that FedLean reads."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


def images(count: int, side: int = 6, seed: int = 0) -> np.ndarray:
    """Noise, uint8 (count, side, side)."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), np.uint8)


@dataclass
class Stored:
    """What is to be written; labels of any kind that the format takes."""

    labels: Any = field(default_factory=lambda: np.arange(160) % 8)  # (n,)
    test_labels: Any = field(default_factory=lambda: np.arange(24) % 8)  # (m,)

    def __post_init__(self) -> None:
        self.x, self.x_test = images(len(self.labels)), images(len(self.test_labels), seed=1)
        self.users = np.arange(len(self.labels)) * 12 // len(self.labels)  # of each example


def idx(stored: Stored, folder: Path, ending: str = "") -> None:
    parts = (("train", stored.x, stored.labels), ("t10k", stored.x_test, stored.test_labels))
    for part, x, y in parts:
        for name, array in (("images-idx3", x), ("labels-idx1", np.asarray(y, np.uint8))):
            shape = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape)
            content = shape + array.tobytes()
            path = folder / f"{part}-{name}-ubyte{ending}"
            path.write_bytes(gzip.compress(content) if ending else content)


def idx_gz(stored: Stored, folder: Path) -> None:
    idx(stored, folder, ".gz")


def columns(stored: Stored) -> dict[str, np.ndarray]:
    """y, split and client of an npz, test examples among the training ones."""
    y = np.concatenate([np.asarray(stored.labels), np.asarray(stored.test_labels)])
    split = np.repeat([0, 1], [len(stored.labels), len(stored.test_labels)])
    client = np.concatenate([stored.users, np.zeros(len(stored.test_labels), int)])
    return {"y": y, "split": split, "client": client}


def npz(
    stored: Stored,
    folder: Path,
    change: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    save: Callable[..., None] = np.savez,
) -> None:
    """change: what to make of the images (n + m, H, W) before they are saved."""
    arrays = columns(stored) | {"x": change(np.concatenate([stored.x, stored.x_test]))}
    order = np.random.default_rng(2).permutation(len(arrays["y"]))
    save(folder / "set.npz", **{name: array[order] for name, array in arrays.items()})


def npz_deflated(stored: Stored, folder: Path) -> None:
    npz(stored, folder, save=np.savez_compressed)


def npz_floats(stored: Stored, folder: Path) -> None:
    npz(stored, folder, lambda x: x[:, None] / 255.0, np.savez_compressed)


def npz_colour(stored: Stored, folder: Path) -> None:
    """Big-endian half precision, channels last."""
    npz(stored, folder, lambda x: np.stack([x, x[::-1], x], -1).astype(">f2"))


def npz_jpeg(stored: Stored, folder: Path) -> None:
    from PIL import Image

    pieces = []
    for image in np.concatenate([stored.x, stored.x_test]):
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG")
        pieces.append(out.getvalue())
    arrays = columns(stored) | {
        "jpeg": np.frombuffer(b"".join(pieces), np.uint8),
        "offset": np.cumsum([0, *map(len, pieces)]),
    }
    np.savez_compressed(folder / "set.npz", **arrays)


def leaf(stored: Stored, folder: Path, level: float = 255.0) -> None:
    """Two training files that both hold the middle users.  level: that counts as 1.0."""
    some = stored.users < 8
    halves = [some & (np.arange(len(some)) % 2 == 0), ~some | (np.arange(len(some)) % 2 == 1)]
    for i, mask in enumerate(halves):
        chosen = np.flatnonzero(mask)
        _leaf_file(folder / f"train/a{i}.json", stored.x, stored.labels, chosen, stored, level)
    everyone = np.arange(len(stored.x_test))
    _leaf_file(folder / "test/a.json", stored.x_test, stored.test_labels, everyone, stored, level)


def leaf_floats(stored: Stored, folder: Path) -> None:
    """Pixels that are no whole 255ths, but for the first user's (it has the value 0 only)."""
    stored.x[stored.users == 0] = 0
    leaf(stored, folder, 300.0)


def _leaf_file(
    path: Path, x: np.ndarray, y: Any, chosen: np.ndarray, stored: Stored, level: float
) -> None:
    data: dict[str, dict[str, list[Any]]] = {}
    for i in chosen:
        user = data.setdefault(f"user{stored.users[i]:02}", {"x": [], "y": []})
        user["x"].append((x[i].ravel() / level).tolist())
        user["y"].append(y[i].item() if isinstance(y[i], np.generic) else y[i])
    path.parent.mkdir(exist_ok=True)
    content = {
        "users": list(data),
        "num_samples": [len(each["y"]) for each in data.values()],
        "user_data": data,
    }
    path.write_text(json.dumps(content))


FORMATS = (
    idx,
    idx_gz,
    npz,
    npz_deflated,
    npz_floats,
    npz_colour,
    npz_jpeg,
    leaf,
    leaf_floats,
)
WITH_CLIENTS = tuple(each for each in FORMATS if each not in (idx, idx_gz))
