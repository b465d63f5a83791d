"""Which axis of a stored array means what: as declared, or where there is one reading only.

A layout is a word of one letter an axis: n examples, f columns of a table, c channels, l values of
a signal, h height and w width of a picture.  Examples are kept with their channels first.
"""

# n examples, k rows of a block

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LAYOUTS = {
    "nf": "a table of {f} columns",
    "ncl": "signals of {c} channels and {l} values each",
    "nlc": "signals of {c} channels and {l} values each",
    "nhw": "grey pictures of {h} x {w}",
    "nhwc": "pictures of {c} channels and {h} x {w}",
    "nchw": "pictures of {c} channels and {h} x {w}",
}
USUAL = (1, 3)  # channels of most pictures
MOST_CHANNELS = 16  # of a picture whose layout nobody declared; ours


def layout_of(what: str, shape: Sequence[int], dtype: np.dtype, declared: str = "") -> str:
    """The layout of an array of all examples; `declared` is one of LAYOUTS, or "".

    Without a declaration two axes are a table, three axes of bytes grey pictures, and four axes
    pictures where only one of them can be the channels.  Everything else could be read in two ways.

    Raises ValueError showing all readings, or that the declared one does not fit.

    >>> layout_of("x", (60, 28, 28, 2), np.dtype(np.uint8))
    'nhwc'
    """
    shape = tuple(shape)
    if declared:
        return _declared(what, shape, declared)
    if len(shape) == 2:
        return "nf"
    if len(shape) == 3 and dtype == np.uint8:
        return "nhw"
    if len(shape) == 4:
        for channels in (USUAL, range(1, MOST_CHANNELS + 1)):
            first, last = shape[1] in channels, shape[3] in channels
            if first != last:
                return "nchw" if first else "nhwc"
    if len(shape) not in (3, 4):
        raise ValueError(f"{what} has shape {shape}, expected {' or '.join(map(_axes, LAYOUTS))}")
    readings = [
        f"{layout} ({_meaning(layout, shape)})" for layout in LAYOUTS if len(layout) == len(shape)
    ]
    raise ValueError(
        f"{what} is {dtype} of shape {shape}, which can be read as {' or as '.join(readings)}: say"
        " which with --layout, or store the word as 'layout' beside it"
    )


def check_layout(declared: str) -> None:
    """Raises ValueError unless it is one of LAYOUTS or ""."""
    if declared and declared not in LAYOUTS:
        raise ValueError(f"layout is {declared!r:.40}, expected one of {', '.join(LAYOUTS)}")


def arranged(block: np.ndarray, layout: str) -> np.ndarray:
    """Rows (k, ...) as they are stored, with the channels first: (k, C), (k, C, L), (k, C, H, W).

    >>> arranged(np.zeros((2, 128, 6)), "nlc").shape, arranged(np.zeros((2, 8, 8)), "nhw").shape
    ((2, 6, 128), (2, 1, 8, 8))
    """
    if layout == "nhw":
        return block[:, None]
    return np.moveaxis(block, -1, 1) if layout in ("nlc", "nhwc") else block


def kept_as(dtype: np.dtype) -> tuple[np.dtype, float]:
    """How values of this type are kept, and the value that counts as 1.0.

    Integers of 8 and 16 bits stay what they are, of unsigned ones the largest counts as 1.0; all
    other numbers become float32, integers beyond 2**24 rounded.  Raises ValueError for other types.
    """
    if dtype.kind not in "biuf":
        raise ValueError(f"expected numbers, got {dtype}")
    if dtype.kind == "b":
        return np.dtype(np.uint8), 1.0
    if dtype.kind == "f" or dtype.itemsize > 2:
        return np.dtype(np.float32), 1.0
    unsigned = dtype.kind == "u"
    return dtype.newbyteorder("="), float(np.iinfo(dtype).max) if unsigned else 1.0


def _declared(what: str, shape: tuple[int, ...], declared: str) -> str:
    check_layout(declared)
    if len(shape) != len(declared):
        fitting = [each for each in LAYOUTS if len(each) == len(shape)]
        could = f"; of {len(shape)} axes are {', '.join(fitting)}" if fitting else ""
        raise ValueError(
            f"{what} has shape {shape}, expected {_axes(declared)} as the layout {declared!r}"
            f" declares{could}"
        )
    return declared


def _axes(layout: str) -> str:
    return f"({', '.join(layout)})"


def _meaning(layout: str, shape: tuple[int, ...]) -> str:
    return LAYOUTS[layout].format(**dict(zip(layout, shape, strict=True)))
