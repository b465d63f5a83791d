"""Picture files by class, all of one size and kind.  Needs Pillow."""

# C channels, H height, W width

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlean.data.byclass import Files, by_class_source, find_by_class
from fedlean.data.jpeg import DECODER_BYTES
from fedlean.data.source import READING_BYTES, Room, Source, unlimited

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
MAX_SIDE = 4096  # pixels; a small file can claim 65,535 x 65,535
DECODED_BYTES = 24  # of a pixel while its picture is decoded
# How Pillow's kinds are kept; of a palette the colours, and every other kind as RGB.
KINDS = {"L": "L", "1": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA", "I;16": "I;16"}


def find_pictures(folder: Path) -> dict[str, Files]:
    """{"pictures": files} where a folder holds pictures by class, else {}."""
    files = find_by_class(folder, ENDINGS)
    return {"pictures": files} if files else {}


def pictures_source(name: str, files: Files, room: Room = unlimited) -> Source:
    """Grey pictures (1, H, W), grey and opacity (2, ...), RGB (3, ...), RGBA (4, ...) as bytes.

    Grey ones of 16 bits stay so.  Raises ValueError naming the file that is damaged, or of another
    size or kind than the first, or what `room` raises.
    """
    some = next(iter(files.values()))[0]
    room(DECODER_BYTES, f"the decoder for {some}", "store the pictures as an array in an .npz")
    with _opened(some) as image:
        kind, size = _kind(image), image.size
    decode = partial(_decode, kind=kind, size=size, first=some)

    def examine(path: Path) -> tuple[tuple[int, ...], np.dtype, float]:
        wide = kind == "I;16"
        shape = (1 if wide else len(kind), size[1], size[0])
        return shape, np.dtype(np.uint16 if wide else np.uint8), 65535.0 if wide else 255.0

    def decoding_bytes(path: Path) -> int:
        return READING_BYTES + DECODED_BYTES * size[0] * size[1]

    return by_class_source(name, files, room, examine, decode, decoding_bytes)


def _decode(path: Path, out: np.ndarray, *, kind: str, size: tuple[int, int], first: Path) -> None:
    with _opened(path) as image:
        found = _kind(image), image.size
        if found != (kind, size):
            raise ValueError(
                f"{path}: got {found[0]} of {found[1][0]} x {found[1][1]}, expected {kind} of"
                f" {size[0]} x {size[1]} like {first.name}; bring all pictures to one size and kind"
            )
        pixels = np.asarray(image if image.mode == kind else image.convert(kind))
        out[...] = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _kind(image: Any) -> str:
    if image.mode == "P" and "transparency" in image.info:
        return "RGBA"
    return KINDS.get("I;16" if image.mode.startswith("I;16") else image.mode, "RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The picture, of which Pillow has read the header only, of a size that may be decoded."""
    try:
        from PIL import Image

        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:
                raise ValueError(
                    f"{image.size[0]} x {image.size[1]}, expected sides up to {MAX_SIDE}"
                )
            yield image
    except ImportError as error:
        raise ValueError(
            "pictures need Pillow, which is not installed; pip install 'fedlean[sim]'"
        ) from error
    except Exception as error:  # Pillow raises many kinds
        said = str(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {said}") from error
