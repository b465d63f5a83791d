"""What a measured device profile says, as rows of text for the terminal and for the page."""

from __future__ import annotations

from math import prod

from fedlean.core import Work
from fedlean.cost.time import work_seconds
from fedlean.measure.result import Measurement
from fedlean.measure.survey import Point
from fedlean.report import units

Rows = list[tuple[str, ...]]

LAYER_HEADS = ("layer", "weights", "t (ns)", "t · weights", "in full", "R²")
DENSITY_HEADS = ("density", "round", "modelled", "speed-up", "step", "inference")


def layer_rows(result: Measurement) -> Rows:
    """The fit of a round's computation: a row per layer, then the intercept and the dense round."""
    rows = []
    for name, layer in result.round.layers.items():
        size = prod(result.spec.param_shapes[name])
        rows.append(
            (
                name.removesuffix(".weight"),
                f"{size:,}",
                units.figures(1e9 * layer.seconds_per_weight),
                milliseconds(layer.seconds_per_weight * size),
                milliseconds(layer.full_seconds),
                f"{layer.r_squared:.4f}",
            )
        )
    rows.append(("c", "", "", milliseconds(result.round.constant_seconds), "", ""))
    rows.append(("dense model", "", "", "", milliseconds(result.round.dense_seconds), ""))
    return rows


def density_rows(result: Measurement) -> Rows:
    """All layers at one density: measured beside what the emulated clock will charge."""
    dense = result.survey.at(result.survey.plan.dense)
    return [
        (
            f"{100 * point.case.density:g}%",
            milliseconds(point.round),
            milliseconds(modelled_seconds(result, point)),
            units.times(dense.round / point.round) if dense else "–",
            milliseconds(point.step),
            milliseconds(point.forward),
        )
        for point in result.survey.uniform()
    ]


def notes(result: Measurement) -> list[str]:
    """Sentences on how it was measured, on the link, and on what was left out."""
    held, setting = result.measured.conditions, result.survey.setting
    how = (
        f"A round is opening the engine with packed values and masks, {setting.local_steps} steps "
        f"of {setting.batch_size} examples, and reading the values back: computation only, "
        f"with the masks of the round before{_new_masks(result)}. "
        f"{result.measured.model} on {held['machine']} ({held['cores']} cores), engine "
        f"{held['engine']} ({held['instruction_set']}), threads: {held['threads']}, "
        f"{held['date']}; medians of at least {held['fewest_repeats']} visits in turns; "
        f"while one layer varied the others had {100 * float(held['middle_density']):g}%."
    )
    left_out = [f"Left out: {what}." for what in result.survey.left_out]
    return [how, _importance(result), _link(result), *left_out]


def modelled_seconds(result: Measurement, point: Point) -> float:
    """Computation of a round as the emulated clock charges it."""
    setting = result.survey.setting
    work = Work(setting.local_steps, setting.batch_size, kept=point.kept)
    return work_seconds(result.spec, work, result.profile)


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{units.figures(1000 * seconds)} ms"


def _new_masks(result: Measurement) -> str:
    base = result.survey.at(result.survey.plan.base)
    return f" (new ones take {milliseconds(base.new_masks)} longer, not charged)" if base else ""


def _importance(result: Measurement) -> str:
    measured = result.measured
    return (
        "A step that also sums g² of all coordinates takes "
        f"{milliseconds(measured.importance_seconds)} longer, of the dense model "
        f"{milliseconds(measured.dense_importance_seconds)}."
    )


def _link(result: Measurement) -> str:
    profile, link = result.profile, result.link
    rates = (
        f"up {units.figures(profile.uplink_bytes_per_s / 1e6)} MB/s, "
        f"down {units.figures(profile.downlink_bytes_per_s / 1e6)} MB/s"
    )
    if link is None:
        return f"The link was not measured (--link): {rates} are assumed."
    return (
        f"The link: {rates}, empty round trip {milliseconds(link.round_trip_seconds)}; medians of "
        f"{link.repeats} transfers of {link.uplink_bytes / 1e6:.1f} MB up and "
        f"{link.downlink_bytes / 1e6:.1f} MB down."
    )
