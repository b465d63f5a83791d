"""The plots of a page, each as a `Plot`, in reading order.

Run names never enter a drawing (the page writes the legends), so no name can break a layout; layer
names do, shortened.  A plot for which the runs hold no data says so instead of vanishing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlean.report import units
from fedlean.report.borders import Borders, borders
from fedlean.report.curves import layer_density, layer_grid, layer_names, series, thin
from fedlean.report.figure import (
    HEIGHT,
    MUTED,
    NUM_COLOURS,
    SERIES,
    STEPS,
    Plot,
    draw,
    empty,
    marker,
    plain,
    series_style,
)
from fedlean.report.lines import (
    Curve,
    Value,
    cost_axis,
    curves_of,
    furthest,
    in_round,
    lines,
    named,
    round_axis,
)
from fedlean.report.run_folder import Row, Run, first_reaching, has_clock, total
from fedlean.report.stage_plots import measured, memory_of_rounds, participation
from fedlean.report.tables import labels, legend
from fedlean.report.time_plots import split_compared, split_of_run

MAX_LINES = NUM_COLOURS  # more layers than this are a heat map
HEAT_MAP_POINTS = 170.0  # width of its axes beside the names of layers
MAX_LAYERS = 60  # rows of a heat map or dot plot that a page can still label


@dataclass(frozen=True)
class _Axis:
    """What accuracy is plotted against."""

    key: str
    against: str
    label: str  # {} is the unit
    value: Value
    kind: units.Kind | None = None


def _total(key: str) -> Value:
    return lambda row: total(row, key)


_ROUNDS = _Axis("rounds", "rounds", "round", in_round)
AXES = (
    _ROUNDS,
    _Axis("time", "simulated time", "simulated time ({})", _total("simulated_seconds"), "seconds"),
    _Axis("bytes", "bytes", "sent and received, all clients ({})", _total("bytes"), "bytes"),
    _Axis("flops", "FLOPs", "computed per client ({})", _total("flops_per_client"), "flops"),
)


def all_plots(runs: Sequence[Run], targets: Sequence[float]) -> list[Plot]:
    """Every plot of a page about `runs`, in reading order."""
    plots = [accuracy(runs, targets, axis) for axis in AXES]
    plots += [loss(runs), density(runs)]
    plots.append(layers_of_run(runs[0]) if len(runs) == 1 else layers_compared(runs))
    plots += [memory_of_rounds(runs), *participation(runs)]
    plots += measured(runs[0]) if len(runs) == 1 else []
    plots.append(split_of_run(runs[0]) if len(runs) == 1 else split_compared(runs))
    return plots


def accuracy(runs: Sequence[Run], targets: Sequence[float], axis: _Axis) -> Plot:
    """Test accuracy against one kind of cost."""
    key, title = f"accuracy-{axis.key}", f"Accuracy against {axis.against}"
    clocked = [axis.key != "time" or has_clock(run) for run in runs]
    raw = [series(run.evaluations, axis.value, lambda row: 100 * row["accuracy"]) for run in runs]
    curves = [(i, *thin(*xy)) for i, xy in enumerate(raw) if len(xy[0]) and clocked[i]]
    if not curves:
        why = "no simulated clock: no device profile" if not any(clocked) else "no evaluation yet"
        return empty(key, title, why)
    largest = furthest(curves)
    by, unit = units.scale(largest, axis.kind) if axis.kind else (1.0, "")
    curves = [(i, x / by, y) for i, x, y in curves]

    def scaled(row: Row) -> float | None:
        value = axis.value(row)
        return None if value is None else value / by

    shown = borders(runs) if axis is _ROUNDS else Borders()

    def fill(axes: Axes) -> None:
        lines(axes, curves)
        _accuracy_axis(axes, curves, targets)
        _targets(axes, targets)
        _first_reached(axes, {i: runs[i] for i, _, _ in curves}, targets, scaled)
        cost_axis(axes, axis.label.format(unit), largest / by, whole=axis.kind is None)
        shown.draw(axes)

    names = labels(runs)
    ends = [f"{names[i]} goes from {y[0]:.1f}% to {y[-1]:.1f}%" for i, _, y in curves]
    alt = f"{title}: {'; '.join(ends)}."
    svg = draw(key, fill, alt, HEIGHT + shown.inches)
    return Plot(key, title, svg, alt, legend(runs))


def _accuracy_axis(axes: Axes, curves: Sequence[Curve], targets: Sequence[float]) -> None:
    shown = [100 * target for target in targets]
    low = min([float(y.min()) for _, _, y in curves] + shown)
    high = max([float(y.max()) for _, _, y in curves] + shown)
    pad = max(0.06 * (high - low), 0.5)
    axes.set_ylim(max(0.0, low - pad), min(100.0, high + pad) + 0.01)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
    axes.set_ylabel("test accuracy")


def _targets(axes: Axes, targets: Sequence[float]) -> None:
    """Thin lines, labelled at the right; labels of close targets move apart."""
    low, high = axes.get_ylim()
    heights = _spread([100 * t for t in sorted(targets)], 0.062 * (high - low), high)
    where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "size": 8}
    for target, height in zip(sorted(targets), heights, strict=True):
        axes.axhline(100 * target, color=MUTED, linewidth=0.5, dashes=(5, 4), zorder=1)
        if height is not None:
            axes.text(1.02, height, units.target_text(target), color=MUTED, **where)


def _spread(heights: Sequence[float], gap: float, top: float) -> list[float | None]:
    """`heights` (ascending) moved at least `gap` apart below `top`; None where there is no room."""
    if len(heights) > 6:  # no use in labels that lie far from their lines
        kept: list[float | None] = []
        for height in heights:
            shown = [h for h in kept if h is not None]
            kept.append(height if not shown or height - shown[-1] >= gap else None)
        return kept
    moved: list[float | None] = []
    ceiling = top + gap / 2
    for height in reversed(heights):
        moved.append(min(height, ceiling))
        ceiling = min(height, ceiling) - gap
    return moved[::-1]


def _first_reached(axes: Axes, runs: Mapping[int, Run], targets: Sequence[float], x: Value) -> None:
    """A ring where a run first reaches a target: the points of the cost table."""
    for i, run in runs.items():
        rows = [row for target in targets if (row := first_reaching(run, target))]
        at = [(x(row), 100 * row["accuracy"]) for row in rows]
        rings = [(a, b) for a, b in at if a is not None]
        if rings:
            style = {"linestyle": "none", "marker": "o", "markersize": 5.5, "fillstyle": "none"}
            colour = SERIES[i % NUM_COLOURS]
            axes.plot(*zip(*rings, strict=True), color=colour, markeredgewidth=1.2, **style)


def loss(runs: Sequence[Run]) -> Plot:
    """Held-out loss against rounds, or the training loss where no run was evaluated."""
    for name, word in (("loss", "test loss"), ("train_loss", "training loss")):
        curves = curves_of(runs, named(name))
        if curves:
            return _loss(runs, curves, word)
    return empty("loss", "Loss", "no loss was reported")


def _loss(runs: Sequence[Run], curves: Sequence[Curve], word: str) -> Plot:
    shown = borders(runs)

    def fill(axes: Axes) -> None:
        lines(axes, curves)
        top = max(float(y.max()) for _, _, y in curves)
        low = min(float(y.min()) for _, _, y in curves)  # a method's own loss may be negative
        axes.set_ylim(min(0.0, low * 1.05), top * 1.05 if top > 0 else 1)
        axes.set_ylabel(word)
        round_axis(axes, furthest(curves))
        shown.draw(axes)

    names = labels(runs)
    ends = [f"{names[i]} goes from {y[0]:.3g} to {y[-1]:.3g}" for i, _, y in curves]
    alt = f"{word.capitalize()} against rounds: {'; '.join(ends)}."
    svg = draw("loss", fill, alt, HEIGHT + shown.inches)
    return Plot("loss", "Loss against rounds", svg, alt, legend(runs))


def density(runs: Sequence[Run]) -> Plot:
    """Kept fraction of the prunable weights over rounds."""
    title = "Density over rounds"
    curves = _density_curves(runs, named("density"))
    if not curves:
        return empty("density", title, "no density was reported")

    shown = borders(runs)

    def fill(axes: Axes) -> None:
        _density_axes(axes, curves)
        shown.draw(axes)

    names = labels(runs)
    ends = [f"{names[i]} ends at {y[-1]:.3g}% after {y[0]:.3g}%" for i, _, y in curves]
    alt = f"{title}: {'; '.join(ends)}."
    svg = draw("density", fill, alt, HEIGHT + shown.inches)
    return Plot("density", title, svg, alt, legend(runs))


def _density_curves(runs: Sequence[Run], value: Value) -> list[Curve]:
    return [(i, x, 100 * y) for i, x, y in curves_of(runs, value)]


def _density_axes(axes: Axes, curves: Sequence[Curve]) -> None:
    lines(axes, curves, drawstyle="steps-post")
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
    axes.set_ylabel("weights kept")
    round_axis(axes, furthest(curves))


def _some(layers: list[str]) -> tuple[list[str], str]:
    """The layers that fit on a page, and a word on the others."""
    left = len(layers) - MAX_LAYERS
    return layers[:MAX_LAYERS], f", first {MAX_LAYERS} of {len(layers)} layers" if left > 0 else ""


def layers_of_run(run: Run) -> Plot:
    """Density per layer over rounds: lines for a few layers, a heat map for many."""
    layers, cut = _some(layer_names([run]))
    title = f"Density per layer over rounds{cut}"
    if not layers:
        return empty("layers", title, "no prunable layer was reported")
    alt = f"{title}: " + _layer_ends(run, layers) + "."
    if len(layers) > MAX_LINES:
        return Plot("layers", title, _heat_map(run, layers, alt), alt)
    curves = [
        (i, x, y)
        for i, layer in enumerate(layers)
        for _, x, y in _density_curves([run], lambda row, name=layer: layer_density(row, name))
    ]
    if not curves:
        return empty("layers", title, "no density was reported")
    shown = borders([run])

    def fill(axes: Axes) -> None:
        _density_axes(axes, curves)
        shown.draw(axes)

    svg = draw("layers", fill, alt, HEIGHT + shown.inches)
    return Plot("layers", title, svg, alt, tuple(enumerate(layers)))


def _layer_ends(run: Run, layers: Sequence[str]) -> str:
    """The last densities in words; of many layers only the extremes, for whoever has to listen."""
    found = [(layer_density(run.rounds[-1], layer), layer) for layer in layers]
    known = [(density, layer) for density, layer in found if density is not None]
    if len(known) > MAX_LINES:
        known = [min(known), max(known)]
    return ", ".join(f"{layer} ends at {units.density_text(kept)}" for kept, layer in known)


def _layers_height(count: int) -> float:
    return max(HEIGHT, 0.9 + 0.17 * count)


def _heat_map(run: Run, layers: Sequence[str], alt: str) -> str:
    grid, last = layer_grid(run, layers)
    first = run.rounds[0]["round"]
    shown = borders([run], HEAT_MAP_POINTS)

    def fill(axes: Axes) -> None:
        box = (first - 0.5, last + 0.5, len(layers) - 0.5, -0.5)
        # Square root: what matters is whether a layer keeps 2% or 10%, not 80% or 90%.
        norm = PowerNorm(0.5, vmin=0, vmax=100)
        image = axes.imshow(
            100 * grid, aspect="auto", cmap="cividis", norm=norm, extent=box,
            interpolation="none",
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set_yticks(range(len(layers)), [plain(name) for name in layers], size=8)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=True))
        axes.set_xlabel("round")
        shown.draw(axes, shift=0.5)
        figure = axes.get_figure()
        assert figure is not None
        ticks = [0, 2, 10, 25, 50, 100]
        bar = figure.colorbar(image, ax=axes, ticks=ticks, format="%d%%", fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    return draw("layers", fill, alt, _layers_height(len(layers)) + shown.inches)


def layers_compared(runs: Sequence[Run]) -> Plot:
    """Where each run ended, layer by layer: a dot per run."""
    layers, cut = _some(layer_names(runs))
    title = f"Density per layer at the end{cut}"
    if not layers:
        return empty("layers", title, "no prunable layer was reported")
    ends = [run.rounds[-1] if run.rounds else {} for run in runs]

    def fill(axes: Axes) -> None:
        for i, row in enumerate(ends):
            found = [(layer_density(row, layer), at) for at, layer in enumerate(layers)]
            dots = [(100 * x, at) for x, at in found if x is not None]
            if dots:
                style: dict[str, Any] = series_style(i) | {
                    "linestyle": "none",
                    "clip_on": False,
                    "zorder": 3,
                }
                x, y = zip(*dots, strict=True)
                axes.plot(x, y, marker=marker(i), **style)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_yticks(range(len(layers)), [plain(name) for name in layers], size=8)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
        axes.set_xlabel("weights kept")

    names = labels(runs)
    told = [f"{names[i]}: {_layer_ends(r, layers)}" for i, r in enumerate(runs) if r.rounds]
    alt = f"{title}. {'; '.join(told)}."
    svg = draw("layers", fill, alt, _layers_height(len(layers)))
    return Plot("layers", title, svg, alt, legend(runs))
