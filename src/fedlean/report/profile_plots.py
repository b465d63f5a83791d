"""The plots of a device profile: round time against density, of all layers and of each."""

from __future__ import annotations

from math import prod

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlean.measure.cases import FIT_UP_TO
from fedlean.measure.result import Measurement
from fedlean.report.figure import NUM_COLOURS, SERIES, STEPS, Plot, draw, marker
from fedlean.report.profile_rows import modelled_seconds

_ROUND = "Time of a round against density, all layers alike"
_INFERENCE = "Inference time of a batch against density"
_LAYERS = "Time of a round against the density of one layer"


def profile_plots(result: Measurement) -> list[Plot]:
    return [_round(result), _layers(result), _inference(result)]


def _round(result: Measurement) -> Plot:
    points = result.survey.uniform()
    x = [100 * point.case.density for point in points]

    def fill(axes: Axes) -> None:
        axes.plot(x, [1000 * p.round for p in points], marker(0), color=SERIES[0], zorder=3)
        modelled = [1000 * modelled_seconds(result, point) for point in points]
        axes.plot(x, modelled, color=SERIES[1], zorder=2)
        _label(axes, "computation of a round (ms)", "density")

    alt = f"{_ROUND}: {_ends([p.round for p in points], x)}."
    legend = ((0, "measured"), (1, "as the emulated clock charges it"))
    return Plot("round", _ROUND, draw("round", fill, alt), alt, legend)


def _inference(result: Measurement) -> Plot:
    points = result.survey.uniform()
    x = [100 * point.case.density for point in points]

    def fill(axes: Axes) -> None:
        y = [1000 * point.forward for point in points]
        axes.plot(x, y, color=SERIES[0], marker=marker(0), zorder=3)
        _label(axes, "one batch, forward only (ms)", "density")

    alt = f"{_INFERENCE}: {_ends([p.forward for p in points], x)}."
    return Plot("inference", _INFERENCE, draw("inference", fill, alt), alt)


def _layers(result: Measurement) -> Plot:
    """The layers that time depends on most, with their lines where they were fitted."""
    fits, shapes = result.round.layers, result.spec.param_shapes
    steps = result.survey.setting.local_steps
    weight = {name: fits[name].seconds_per_weight * prod(shapes[name]) for name in fits}
    shown = sorted(sorted(fits, key=lambda name: -weight[name])[:NUM_COLOURS], key=list(fits).index)
    slopes = {name: fit.seconds_per_weight for name, fit in fits.items()}

    def fill(axes: Axes) -> None:
        for at, name in enumerate(shown):
            points, size = result.survey.varying(name), prod(shapes[name])
            x = np.array([point.kept[name] for point in points])
            y = [1000 * (point.session + steps * point.step) for point in points]
            axes.plot(100 * x / size, y, marker(at), color=SERIES[at], zorder=3, clip_on=False)
            base = next(p for p in points if p.case == result.survey.plan.base)
            others = sum(slopes[other] * base.kept[other] for other in fits if other != name)
            ends = np.array([0, FIT_UP_TO * size])
            line = result.round.constant_seconds + others + slopes[name] * ends
            axes.plot(100 * ends / size, 1000 * line, color=SERIES[at], zorder=2)
        _label(axes, "computation of a round (ms)", "density of the layer that varies")

    alt = f"{_LAYERS}: R² from {min(fit.r_squared for fit in fits.values()):.3f}."
    legend = tuple((at, name.removesuffix(".weight")) for at, name in enumerate(shown))
    return Plot("layers", _LAYERS, draw("layers", fill, alt), alt, legend)


def _label(axes: Axes, y: str, x: str) -> None:
    axes.set_xlim(0, 101)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _ends(seconds: list[float], densities: list[float]) -> str:
    return (
        f"{1000 * seconds[0]:.3g} ms at {densities[0]:g}%, "
        f"{1000 * seconds[-1]:.3g} ms at {densities[-1]:g}%"
    )
