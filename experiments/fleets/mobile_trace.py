"""Draws `mobile.csv`: memory and link of 20 phones that nobody has measured, over 200 rounds.

What it imitates, with our numbers: a phone has one of four sizes of memory, of which a part that
wanders is free (log-normal, AR(1)); it is in a wireless network or in a mobile one and changes
between them now and then (a Markov chain of two states), with rates that wander as well
(log-normal, AR(1)); and sometimes it is away.

    python experiments/fleets/mobile_trace.py experiments/fleets/mobile.csv
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from statistics import NormalDist

from fedlean.core import generator

SEED, DEVICES, ROUNDS, EVERY = 0, 20, 200, 5  # a line holds for so many rounds
SIZES_BYTES = (60e6, 100e6, 150e6, 220e6)  # that training may take, in the middle
LEAST_BYTES, MOST_BYTES = 43 * 2**20, 223 * 2**20
SPREAD = 0.35  # of the logarithm of what is free
CORRELATION = 0.8  # from line to line
AWAY = 0.1  # probability


@dataclass(frozen=True)
class Network:
    """Rates in the middle, in bytes a second."""

    uplink: float
    downlink: float


WIRELESS, MOBILE = Network(1e6, 3e6), Network(0.2e6, 0.8e6)
IN_WIRELESS, STAYS = 0.6, 0.8  # share of the time; probability of no change
RATE_SPREAD = 0.6


def lines() -> Iterator[str]:
    yield "round,device,memory_bytes,uplink_bytes_per_second,downlink_bytes_per_second,present"
    for device in range(DEVICES):
        draw = generator(SEED, 0, device, "a phone").random
        middle = SIZES_BYTES[int(len(SIZES_BYTES) * draw())]
        free, rate = _normal(draw()), _normal(draw())
        wireless = draw() < IN_WIRELESS
        for round in range(1, ROUNDS + 1, EVERY):
            network = WIRELESS if wireless else MOBILE
            memory = min(max(middle * exp(SPREAD * free), LEAST_BYTES), MOST_BYTES)
            factor = exp(RATE_SPREAD * rate)
            up, down = network.uplink * factor, network.downlink * factor
            yield f"{round},{device},{memory:.3g},{up:.3g},{down:.3g},{int(draw() >= AWAY)}"
            free, rate = (_wandered(one, draw()) for one in (free, rate))
            if draw() >= STAYS:
                wireless = draw() < IN_WIRELESS


def _normal(share: float) -> float:
    return NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9))


def _wandered(value: float, share: float) -> float:
    """Standard normal again, and correlated with `value`."""
    return CORRELATION * value + sqrt(1 - CORRELATION**2) * _normal(share)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("\n".join(lines()) + "\n")
