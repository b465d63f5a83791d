"""What makes network inputs of stored values, as a model that leaves its data set needs it."""

# B batch, C channels

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Normalisation:
    """(x / scale - mean) / std per channel.  mean, std: float32 (C,); scale: what counts as 1."""

    mean: np.ndarray
    std: np.ndarray
    scale: float

    @property
    def factor(self) -> np.ndarray:
        """float32 (C,): x · factor - shift."""
        return (1 / (np.float64(self.scale) * self.std)).astype(np.float32)

    @property
    def shift(self) -> np.ndarray:
        """float32 (C,)."""
        return (self.mean.astype(np.float64) / self.std).astype(np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Network inputs, float32 (B, C, ...), of stored values x of that shape.

        One multiplication and one subtraction in place: a device does this on every batch.
        """
        each = (-1, *(1 for _ in x.shape[2:]))
        out = np.multiply(x, self.factor.reshape(each), dtype=np.float32, order="C")
        out -= self.shift.reshape(each)
        return out

    def to_json(self) -> dict[str, Any]:
        return {"scale": self.scale, "mean": self.mean.tolist(), "std": self.std.tolist()}

    @staticmethod
    def from_json(document: Any, channels: int) -> Normalisation:
        """Raises ValueError where it is none of so many channels."""
        try:
            mean, std = (np.array(document[key], np.float32) for key in ("mean", "std"))
            scale = float(document["scale"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"normalisation: {type(error).__name__}: {error!s:.100}") from None
        if mean.shape != (channels,) or std.shape != (channels,):
            raise ValueError(
                f"normalisation: mean {mean.shape} and std {std.shape}, expected one value for "
                f"each of {channels} channels"
            )
        finite = np.isfinite(mean).all() and np.isfinite(std).all() and np.isfinite(scale)
        if not (finite and (std > 0).all() and scale > 0):
            raise ValueError("normalisation: mean must be finite, std and scale positive")
        return Normalisation(mean, std, scale)


def nothing(channels: int) -> Normalisation:
    """Of values that are network inputs already."""
    return Normalisation(np.zeros(channels, np.float32), np.ones(channels, np.float32), 1.0)
