"""Numbers as people read them: s/min/h, decimal kB/MB/GB, GFLOP, percent, "2.3× sooner"."""

from __future__ import annotations

import math
from typing import Literal

Kind = Literal["seconds", "bytes", "flops"]

# (below this value, divide by, unit); the last rung holds everything above.
_SECONDS = ((1000, 1, "s"), (7200, 60, "min"), (72 * 3600, 3600, "h"), (math.inf, 86400, "d"))


def _decimal(unit: str) -> tuple[tuple[float, float, str], ...]:
    prefixes = ("", "k", "M", "G", "T", "P")
    # 999.5: what would be rounded to 1000 belongs to the next unit.
    rungs = [(999.5 * 1000.0**i, 1000.0**i, prefix + unit) for i, prefix in enumerate(prefixes)]
    return (*rungs[:-1], (math.inf, *rungs[-1][1:]))


_LADDERS = {"seconds": _SECONDS, "bytes": _decimal("B"), "flops": _decimal("FLOP")}


def scale(largest: float, kind: Kind) -> tuple[float, str]:
    """Divisor and unit in which values up to `largest` read well.

    >>> scale(5400, "seconds")
    (60, 'min')
    """
    return next((by, unit) for limit, by, unit in _LADDERS[kind] if largest < limit)


def figures(value: float) -> str:
    """Three significant figures, never an exponent for what people meet.

    >>> [figures(v) for v in (0, 0.0421, 1, 12.34, 658.7)]
    ['0', '0.0421', '1.00', '12.3', '659']
    """
    if value == 0:
        return "0"
    if abs(value) < 0.9995:
        return f"{value:.3g}"
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def split(value: float, kind: Kind) -> tuple[str, str]:
    """Number and unit apart, for sentences: `659`, `s`."""
    by, unit = scale(value, kind)
    whole = by == 1 and kind != "seconds" and float(value).is_integer()
    return (str(int(value)) if whole else figures(value / by)), unit


def human(value: float | None, kind: Kind) -> str:
    """A figure with its unit; an unknown one is a dash.

    >>> [human(v, "bytes") for v in (512, 999_600, 12_340_000, None)]
    ['512 B', '1.00 MB', '12.3 MB', '–']
    """
    return "–" if value is None else " ".join(split(value, kind))


def percent(share: float | None, decimals: int = 1) -> str:
    """Accuracy in percent: at least `decimals` places."""
    return "–" if share is None else f"{100 * share:.{decimals}f}%"


def target_text(target: float) -> str:
    """A target as it was asked for: 95.0%, 97.25%."""
    short = f"{100 * target:.1f}"
    return f"{short if math.isclose(float(short), 100 * target) else f'{100 * target:.6g}'}%"


def short_of(accuracy: float, target: float) -> str:
    """An accuracy below `target`, with enough places never to read like the target itself.

    >>> short_of(0.9496, 0.95)
    '94.96%'
    """
    for decimals in range(1, 7):
        text = percent(accuracy, decimals)
        if float(text[:-1]) < 100 * target:
            return text
    return f"just under {target_text(target)}"


def density_text(density: float | None) -> str:
    """A kept fraction in percent, three figures at most."""
    return "–" if density is None else f"{100 * density:.3g}%"


def times(ratio: float) -> str:
    """`ratio` (>= 1) with as many places as it deserves: 1.04×, 2.3×, 12×."""
    decimals = 2 if ratio < 1.095 else 1 if ratio < 9.95 else 0
    return f"{ratio:.{decimals}f}×"


def versus(baseline: float | None, value: float | None, better: str, worse: str) -> str | None:
    """How `value` compares with the baseline's, lower being better; None where undefined.

    >>> versus(230, 100, "sooner", "later"), versus(100, 150, "sooner", "later")
    ('2.3× sooner', '1.5× later')
    """
    if not baseline or not value:
        return None
    ratio = baseline / value
    if 1 / 1.005 < ratio < 1.005:
        return "same"
    return f"{times(ratio)} {better}" if ratio > 1 else f"{times(1 / ratio)} {worse}"
