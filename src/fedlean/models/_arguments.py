"""Checks that every model function makes on its arguments, so that the messages agree."""

from __future__ import annotations

from fedlean.layers import Shape


def check_classes(classes: int) -> None:
    """A classifier needs two classes or more."""
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 2:
        raise ValueError(f"classes must be an integer of at least 2, got {classes!r}")


def check_image(model: str, input_shape: Shape) -> None:
    """`model` reads images; the sides themselves are checked by the spec, layer by layer."""
    if len(input_shape) != 3:
        raise ValueError(
            f"{model} reads images: input_shape must be (channels, height, width), "
            f"got {tuple(input_shape)}"
        )
