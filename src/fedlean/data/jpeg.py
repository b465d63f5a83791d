"""Decoding many JPEG files that lie end to end in one array.  Owns the import of Pillow."""

from __future__ import annotations

import io
from math import prod

import numpy as np

MAX_SIDE = 512  # pixels; a JPEG of 100 bytes can claim 65,535 x 65,535
MAX_RATIO = 1000  # decoded to encoded bytes: 3 for small photographs, up to 430 for blank images


def decode_jpegs(jpeg: np.ndarray, offset: np.ndarray, count: int) -> np.ndarray:
    """uint8 (count, 3, H, W) of the images jpeg[offset[i]:offset[i + 1]], which share one size.

    jpeg: uint8 (bytes,); offset: integers (count + 1,).  Raises ValueError naming the image that is
    out of bounds, damaged, too large or of another size, or when Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            "JPEG images need Pillow, which is not installed; pip install 'fedlean[sim]'"
        ) from error
    bounds = _bounds(jpeg, offset, count)
    data = np.ascontiguousarray(jpeg).data
    out: np.ndarray | None = None
    for i in range(count):
        source = io.BytesIO(data[bounds[i] : bounds[i + 1]])
        try:
            with Image.open(source, formats=["JPEG"]) as image:  # reads the header only
                width, height = image.size
                if max(image.size) > MAX_SIDE:
                    raise ValueError(f"{width} x {height}, expected sides up to {MAX_SIDE}")
                if out is None:
                    out = _allocate((count, 3, height, width), len(jpeg))
                if out.shape[2:] != (height, width):
                    raise ValueError(
                        f"{width} x {height}, expected {out.shape[3]} x {out.shape[2]} like image 0"
                    )
                out[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"JPEG image {i} cannot be used: {error}") from error
    assert out is not None  # count >= 1, checked with the bounds
    return out


def _allocate(shape: tuple[int, int, int, int], encoded_bytes: int) -> np.ndarray:
    decoded_bytes = prod(shape)
    if decoded_bytes > MAX_RATIO * encoded_bytes:
        raise ValueError(
            f"{shape[0]} of its size decode to {decoded_bytes} bytes, expected at most {MAX_RATIO}"
            f" times the {encoded_bytes} bytes of all"
        )
    return np.empty(shape, np.uint8)


def _bounds(jpeg: np.ndarray, offset: np.ndarray, count: int) -> list[int]:
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1:
        raise ValueError(f"jpeg is {jpeg.dtype} {jpeg.shape}, expected uint8 (bytes,)")
    if offset.dtype.kind not in "iu" or offset.shape != (count + 1,) or count < 1:
        raise ValueError(
            f"offset is {offset.dtype} {offset.shape}, expected integers ({count + 1},):"
            " one per image, at least 1, and the end"
        )
    bounds = offset.tolist()  # Python integers: differences of uint64 would wrap around
    for i in range(count):
        if not 0 <= bounds[i] < bounds[i + 1] <= len(jpeg):
            raise ValueError(
                f"offset puts image {i} at bytes {bounds[i]}..{bounds[i + 1]}, expected rising"
                f" offsets within 0..{len(jpeg)}"
            )
    return bounds
