"""Checks that every model function makes on its arguments, so that the messages agree."""

from __future__ import annotations

from fedlean.layers import Shape

ANY_SHAPE = "lenet300, mlp, mlp_40_20, mlp_27_14 and mlp_13_7"  # what begins with Flatten


def check_classes(classes: int) -> None:
    """A classifier needs two classes or more."""
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 2:
        raise ValueError(f"classes must be an integer of at least 2, got {classes!r}")


def check_image(model: str, input_shape: Shape) -> None:
    """`model` reads images; the sides themselves are checked by the spec, layer by layer."""
    if len(input_shape) != 3:
        raise ValueError(
            f"{model} reads images: input_shape must be (channels, height, width), "
            f"got {tuple(input_shape)}; {ANY_SHAPE} read signals and tables, too"
        )


def check_width(width: int) -> None:
    """The channels of a model's first layer, of which its others are multiples."""
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"width must be an integer of at least 1, got {width!r:.40}")
