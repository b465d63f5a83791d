from __future__ import annotations

import numpy as np
import pytest

from fedlean.data.layout import LAYOUTS, arranged, kept_as, layout_of

UINT8, FLOAT, INT16 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.int16)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((9, 561), FLOAT, "nf"),
        ((9, 2048), INT16, "nf"),
        ((9, 28, 28), UINT8, "nhw"),
        ((9, 3, 32, 32), FLOAT, "nchw"),
        ((9, 32, 32, 3), UINT8, "nhwc"),
        ((9, 2, 9, 1), UINT8, "nhwc"),  # 1 and 3 are what most pictures have
        ((9, 64, 64, 4), UINT8, "nhwc"),  # RGBA
        ((9, 28, 28, 2), UINT8, "nhwc"),
        ((9, 6, 1, 128), FLOAT, "nchw"),
        ((9, 6, 32, 128), FLOAT, "nchw"),
        ((9, 13, 64, 64), np.dtype(np.uint16), "nchw"),
    ],
)
def test_what_has_one_reading(shape: tuple[int, ...], dtype: np.dtype, layout: str):
    assert layout_of("x", shape, dtype) == layout


@pytest.mark.parametrize(
    ("shape", "dtype", "readings"),
    [
        (
            (9, 3, 128),
            FLOAT,
            "ncl (signals of 3 channels and 128 values each) or as nlc (signals of 128 channels"
            " and 3 values each) or as nhw (grey pictures of 3 x 128)",
        ),
        ((9, 28, 28), INT16, "nhw (grey pictures of 28 x 28)"),
        (
            (9, 8, 8, 4),
            UINT8,
            "nhwc (pictures of 4 channels and 8 x 8) or as nchw (pictures of 8 channels and 8 x 4)",
        ),
        ((9, 32, 32, 20), UINT8, "nchw (pictures of 32 channels and 32 x 20)"),
        ((9, 1, 8, 3), UINT8, "nhwc (pictures of 3 channels and 1 x 8)"),
    ],
)
def test_what_has_two_is_an_error_that_shows_both(
    shape: tuple[int, ...], dtype: np.dtype, readings: str
):
    with pytest.raises(ValueError, match=f"x is {dtype} of shape .*say which with --layout") as no:
        layout_of("x", shape, dtype)
    assert readings in str(no.value)
    for layout in LAYOUTS:
        if len(layout) == len(shape):
            assert layout_of("x", shape, dtype, layout) == layout


def test_a_declaration_must_fit():
    with pytest.raises(ValueError, match=r"shape \(9, 5\), expected \(n, c, l\).*2 axes are nf"):
        layout_of("x", (9, 5), FLOAT, "ncl")
    with pytest.raises(ValueError, match="layout is 'lnc', expected one of nf, ncl, nlc, nhw"):
        layout_of("x", (9, 5, 5), FLOAT, "lnc")
    for shape in ((9,), (9, 1, 2, 3, 4)):
        with pytest.raises(ValueError, match=r"expected \(n, f\) or \(n, c, l\)"):
            layout_of("x", shape, FLOAT)


def test_channels_come_first():
    x = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    np.testing.assert_array_equal(arranged(x, "ncl"), x)
    np.testing.assert_array_equal(arranged(x, "nlc"), x.transpose(0, 2, 1))
    np.testing.assert_array_equal(arranged(x, "nhw")[:, 0], x)
    y = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(arranged(y, "nhwc"), y.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(arranged(y, "nchw"), y)
    np.testing.assert_array_equal(arranged(x[0], "nf"), x[0])


@pytest.mark.parametrize(
    ("stored", "kept", "scale"),
    [
        ("uint8", "uint8", 255.0),
        (">u2", "uint16", 65535.0),
        ("int8", "int8", 1.0),
        (">i2", "int16", 1.0),
        ("bool", "uint8", 1.0),
        *((each, "float32", 1.0) for each in ("int32", "uint32", "int64", "float16", ">f8")),
    ],
)
def test_small_integers_stay_and_others_become_floats(stored: str, kept: str, scale: float):
    assert kept_as(np.dtype(stored)) == (np.dtype(kept), scale)


@pytest.mark.parametrize("other", ["U3", "S3", "complex64", "datetime64[s]"])
def test_other_types_are_no_numbers(other: str):
    with pytest.raises(ValueError, match="expected numbers, got"):
        kept_as(np.dtype(other))
