"""PruneFL's linear fit: T(M) = c + Σ_j t_j, t_j equal within a layer (arXiv 1909.12326, Sec. V).

Each layer's slope comes from the measurements in which it alone varies, by least squares; c is the
mean of what is left over of all of them.  Ours: slopes and c are not below 0, since no weight saves
time; a smaller slope is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlean.cost.measured import LayerTime, OperationTime
from fedlean.measure.cases import FIT_UP_TO
from fedlean.measure.survey import Point, Survey

Seconds = Callable[[Point], float]


@dataclass(frozen=True)
class Line:
    """y ≈ intercept + slope·x; R² = 1 - Σ(y - ŷ)² / Σ(y - ȳ)², 0 where y does not vary."""

    slope: float
    intercept: float
    r_squared: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Least squares with an intercept, the slope not below 0.

    >>> fit_line([1, 2, 3], [5, 7, 9])
    Line(slope=2.0, intercept=3.0, r_squared=1.0)
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    dx, dy = xs - xs.mean(), ys - ys.mean()
    spread, total = float(dx @ dx), float(dy @ dy)
    slope = max(0.0, float(dx @ dy) / spread) if spread else 0.0
    left = dy - slope * dx
    r_squared = 1 - float(left @ left) / total if total else 0.0
    return Line(slope, float(ys.mean() - slope * xs.mean()), r_squared)


def fit_operation(survey: Survey, seconds: Seconds) -> OperationTime:
    """The fit of one operation, of which `seconds` gives what a point took."""
    lines = {name: _line(survey, name, seconds) for name in survey.plan.base.densities}
    slopes = {name: line.slope for name, line in lines.items()}
    fitted = {id(p): p for name in slopes for p in _sparse(survey, name)}.values()
    rests = [seconds(point) - _sum(slopes, point.kept) for point in fitted]
    constant = max(0.0, float(np.mean(rests)))
    base, dense = survey.at(survey.plan.base), survey.at(survey.plan.dense)
    assert base is not None  # the survey has none without it
    layers = {}
    for name, line in lines.items():
        full = next(
            (p for p in survey.points if p.case.varied == name and p.case.density == 1), None
        )
        others = constant + _sum(slopes, {**base.kept, name: 0})
        most = None if full is None else max(0.0, seconds(full) - others)
        layers[name] = LayerTime(line.slope, most, line.r_squared)
    return OperationTime(constant, None if dense is None else seconds(dense), layers)


def _line(survey: Survey, layer: str, seconds: Seconds) -> Line:
    points = _sparse(survey, layer)
    return fit_line([p.kept[layer] for p in points], [seconds(p) for p in points])


def _sparse(survey: Survey, layer: str) -> list[Point]:
    return [p for p in survey.varying(layer) if p.case.density <= FIT_UP_TO]


def _sum(slopes: Mapping[str, float], kept: Mapping[str, int]) -> float:
    return sum(slope * kept[name] for name, slope in slopes.items())
