"""Mean and deviation of what all devices hold, of which a server without training data knows none.

In one exchange before the first round each device says what its examples add up to, and the server
adds these up: exactly, so that the result has the bits of one machine that holds all examples.
"""

# C channels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from fedlean.data.moments import UNIT_BITS, Moments
from fedlean.printable import printable
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.exchange import Exchange, Failed, Letter, Letters
from fedlean.runtime.remote.holding import RANGE_FACTOR, Holding

MAX_REASON = 1000  # characters of what a device says that are kept


class Agreed(NamedTuple):
    """Float32 (C,) each, in units of the value that counts as 1.0, and from whom they are."""

    mean: np.ndarray
    std: np.ndarray
    clients: tuple[int, ...]


def ask(
    exchange: Exchange,
    nodes: Mapping[int, int],
    run: str,
    expected: Holding,
    *,
    ends: float,
    say: Callable[[str], None],
) -> dict[int, tuple[Moments, float]]:
    """What the clients' examples add up to, with their scales; why not, of the others, is said.

    nodes: node -> client.  ends: the monotonic second until which answers are waited for.
    """
    found: dict[int, tuple[Moments, float]] = {}

    def take(node: int, content: bytes | Failed) -> Letters:
        try:
            if isinstance(content, Failed):
                raise ValueError(content.reason)
            answer = unseal(content, expected=(env.MOMENTS, env.TROUBLE))
            if answer.kind == env.TROUBLE:
                raise ValueError(answer.fields["reason"])
            found[nodes[node]] = from_fields(answer.fields, expected)
        except ValueError as error:
            say(f"client {nodes[node]}: {printable(str(error))[:MAX_REASON]}")
        return {}

    def letter() -> bytes:
        return seal(Envelope(env.MEASURE, {"run": run}))

    letters: dict[int, Letter] = dict.fromkeys(nodes, letter)
    exchange.run(letters, ends=ends, about="what its examples add up to", take=take)
    return found


def to_fields(moments: Moments, scale: float) -> dict[str, Any]:
    """As the fields of an envelope."""
    return {
        "scale": scale,
        "count": moments.count,
        "totals": [hex(total) for total in moments.totals],
        "squares": [hex(square) for square in moments.squares],
    }


def from_fields(fields: Mapping[str, Any], expected: Holding) -> tuple[Moments, float]:
    """The moments of a device, and its scale.

    Raises ValueError where no examples of the run's shape and range can have them.
    """
    totals, squares = (tuple(int(each, 16) for each in fields[f]) for f in ("totals", "squares"))
    channels = expected.input_shape[0]
    if not len(totals) == len(squares) == channels or fields["count"] < 1:
        raise ValueError(
            f"sums of {len(totals)} and {len(squares)} channels, expected {channels} and at least"
            " one value in each"
        )
    moments, scale = Moments(fields["count"], totals, squares), float(fields["scale"])
    largest = RANGE_FACTOR * scale * max(map(abs, expected.value_range), default=0.0)
    if not moments.may_lie_in(largest):
        raise ValueError(
            f"sums that no values up to {largest:g} have, {RANGE_FACTOR:g} times the largest of the"
            " run"
        )
    return moments, scale


def agreed(parts: Sequence[tuple[Moments, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float32 (C,) each, of all values together, divided by their scales.

    parts: of each device, at least one.  A constant channel gets deviation 1.
    """
    scales = {scale for _, scale in parts}
    if len(scales) == 1:
        total, *others = (moments for moments, _ in parts)
        for each in others:
            total += each
        return total.statistics(scales.pop())
    count = sum(moments.count for moments, _ in parts)
    units = [Fraction(1, 1 << UNIT_BITS) / Fraction(scale) for _, scale in parts]
    mean, std = [], []
    for channel in range(len(parts[0][0].totals)):
        pairs = [(m.totals[channel], m.squares[channel]) for m, _ in parts]
        first = sum(t * unit for (t, _), unit in zip(pairs, units, strict=True)) / count
        second = sum(s * unit**2 for (_, s), unit in zip(pairs, units, strict=True)) / count
        spread = second - first**2
        mean.append(float(first))
        std.append(sqrt(spread) if spread else 1.0)
    return np.array(mean).astype(np.float32), np.array(std).astype(np.float32)
