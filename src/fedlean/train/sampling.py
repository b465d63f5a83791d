"""Which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

from fedlean.core import Device, generator


def sample_cohort(
    devices: Sequence[Device], size: int | None, *, seed: int, round: int
) -> list[int]:
    """Ids of `size` clients, uniformly without replacement, ascending; None or too large: all.

    A pure function of (seed, round) and the devices present.
    """
    ids = sorted(device.id for device in devices)
    if size is None or size >= len(ids):
        return ids
    drawn = generator(seed, round, 0, "cohort").choice(len(ids), size, replace=False)
    return sorted(ids[position] for position in drawn)
