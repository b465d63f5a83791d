"""What a convolution or pooling reads, in rows and columns: a signal is an image of one row."""

from __future__ import annotations

from typing import Any, NamedTuple

Pair = tuple[int, int]


class Window(NamedTuple):
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


def window(layer: Any) -> Window:
    """Of a layer whose settings are one number for both sides, or (rows, columns)."""
    signal = getattr(layer, "rank", 3) == 2

    def sides(value: Any, along: int) -> Pair:
        """along: of the one row of a signal."""
        rows, columns = value if isinstance(value, tuple) else (value, value)
        return (along, columns) if signal else (rows, columns)

    kernel = layer.kernel_size
    stride = kernel if layer.stride is None else layer.stride
    dilation = getattr(layer, "dilation", 1)
    return Window(sides(kernel, 1), sides(stride, 1), sides(layer.padding, 0), sides(dilation, 1))
