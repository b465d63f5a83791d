"""JPEG files that lie end to end in one array of an .npz file.  Owns the import of Pillow."""

# n images

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlean.data.npzfile import Member, streamed
from fedlean.data.source import READING_BYTES

MAX_SIDE = 512  # pixels; a JPEG of 100 bytes can claim 65,535 x 65,535
MAX_RATIO = 1000  # decoded to encoded bytes: 3 for small photographs, up to 430 for blank images
DECODER_BYTES = 6_000_000  # resident once Pillow is imported


@dataclass(frozen=True, eq=False)
class Jpegs:
    """Images of one size.  offset: int64 (n + 1,), where each starts and the last one ends."""

    member: Member
    offset: np.ndarray
    size: tuple[int, int]  # height, width

    @property
    def reading_bytes(self) -> int:
        """What `decode` takes beside its result."""
        height, width = self.size
        longest = int(np.diff(self.offset).max())
        return READING_BYTES + 4 * longest + 16 * height * width

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Sets out[i], uint8 (3, height, width), to image rows[i]; the others are not decoded.

        rows: int64 (len(out),).  Raises ValueError naming the image that is damaged or of another
        size.
        """
        with streamed(self.member) as stream:
            for i in np.argsort(rows, kind="stable").tolist():
                row = int(rows[i])
                start, end = self.offset[row : row + 2].tolist()
                stream.skip_to(start)
                data = stream.read(end - start)
                try:
                    out[i] = self._pixels(data)
                except Exception as error:  # Pillow raises many kinds
                    raise _unusable(self.member, row, error) from error
            stream.finish()

    def _pixels(self, data: bytes) -> np.ndarray:
        with _image(data) as image:
            width, height = image.size
            if (height, width) != self.size:
                raise ValueError(
                    f"{width} x {height}, expected {self.size[1]} x {self.size[0]} like image 0"
                )
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def open_jpegs(member: Member, offset: np.ndarray, count: int) -> Jpegs:
    """The images member[offset[i]:offset[i + 1]], of which the header of the first is read.

    member: uint8 (bytes,); offset: integers (count + 1,).  Raises ValueError when an image is out
    of bounds, the first one is damaged or too large, or Pillow is not installed.
    """
    offset = _checked(member, offset, count)
    with streamed(member) as stream:
        stream.skip_to(int(offset[0]))
        data = stream.read(int(offset[1] - offset[0]))
    try:
        with _image(data) as image:
            width, height = image.size
        if max(width, height) > MAX_SIDE:
            raise ValueError(f"{width} x {height}, expected sides up to {MAX_SIDE}")
        decoded_bytes = count * 3 * height * width
        if decoded_bytes > MAX_RATIO * member.data_bytes:
            raise ValueError(
                f"{count} of its size decode to {decoded_bytes} bytes, expected at most {MAX_RATIO}"
                f" times the {member.data_bytes} bytes of all"
            )
    except ImportError as error:
        raise ValueError(
            "JPEG images need Pillow, which is not installed; pip install 'fedlean[sim]'"
        ) from error
    except Exception as error:  # Pillow raises many kinds
        raise _unusable(member, 0, error) from error
    return Jpegs(member, offset, (height, width))


def _image(data: bytes) -> Any:
    """The image, of which Pillow has read the header only."""
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=["JPEG"])


def _unusable(member: Member, image: int, error: Exception) -> ValueError:
    return ValueError(f"{member.path}: JPEG image {image} cannot be used: {error}")


def _checked(member: Member, offset: np.ndarray, count: int) -> np.ndarray:
    """`offset` as int64 (count + 1,), rising within the array."""
    if member.dtype != np.uint8 or len(member.shape) != 1:
        raise ValueError(f"jpeg is {member.dtype} {member.shape}, expected uint8 (bytes,)")
    if offset.dtype.kind not in "iu" or offset.shape != (count + 1,) or count < 1:
        raise ValueError(
            f"offset is {offset.dtype} {offset.shape}, expected integers ({count + 1},):"
            " one per image, at least 1, and the end"
        )
    # Compared as they are: uint64 beyond int64 would turn negative.
    starts, ends = offset[:-1], offset[1:]
    wrong = np.flatnonzero((starts < 0) | (starts >= ends) | (ends > member.data_bytes))
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"offset puts image {i} at bytes {starts[i]}..{ends[i]}, expected rising offsets"
            f" within 0..{member.data_bytes}"
        )
    return offset.astype(np.int64)
