"""A matplotlib figure as inline SVG that follows the page's light or dark colours.

Colours are drawn as placeholder hex values and become CSS variables afterwards, so one drawing
serves both schemes.  Text stays text (selectable, read by screen readers, set in the page's font);
layout is measured with matplotlib's own DejaVu Sans, which is wider than system fonts.  No pyplot:
nothing here touches global state that outlives a call.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholder -> CSS variable; any colour that no drawing uses for itself would do.
INK, MUTED, GRID = "#fe0101", "#fe0102", "#fe0103"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
NUM_COLOURS = 6
SERIES = tuple(f"#fe02{i:02x}" for i in range(NUM_COLOURS))
_VARIABLES |= {colour: f"--s{i}" for i, colour in enumerate(SERIES)}

# A second cue beside colour; the page draws the same shapes in its legends.
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # after six runs colours repeat

STEPS = [1, 2, 2.5, 5, 10]  # of ticks; no 150, 300, 450
WIDTH, HEIGHT = 4.7, 3.0  # inches; small, so that text is still readable on a phone
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlean",  # without it ids are random and no two pages are equal
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a layer called $x$ is no formula
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Plot:
    """One finished drawing with what the page writes around it."""

    key: str
    title: str
    svg: str
    alt: str
    legend: tuple[tuple[int, str], ...] = ()  # (series, label); empty: the drawing says it all


def series_style(series: int) -> dict[str, Any]:
    """Line style of the i-th run: the same in every plot of a page."""
    return {
        "color": SERIES[series % NUM_COLOURS],
        "linestyle": DASHES[series // NUM_COLOURS % len(DASHES)],
    }


def marker(series: int) -> str:
    """End marker of the i-th run; shifted where colours repeat, so that no two runs share both."""
    return MARKERS[(series + series // NUM_COLOURS) % len(MARKERS)]


def plain(text: str, longest: int = 24) -> str:
    """Text for the inside of a drawing: glyphs that the layout font has, cut in the middle."""
    # DejaVu Sans covers Latin; anything else would be measured wrongly and warned about.
    short = "".join(c if 32 <= ord(c) < 0x250 else "?" for c in unicodedata.normalize("NFC", text))
    if len(short) <= longest:
        return short
    half = (longest - 1) // 2
    return f"{short[: longest - half - 1]}…{short[-half:]}"


def draw(key: str, fill: Callable[[Axes], None], alt: str, height: float = HEIGHT) -> str:
    """SVG of one axes that `fill` draws on; the same data gives the same bytes."""
    # "default" first: a user's matplotlibrc must not change a report.
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height))
        fill(figure.add_subplot())
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue(), key, alt)


def empty(key: str, title: str, why: str) -> Plot:
    """In place of a plot for which there is no data."""

    def fill(axes: Axes) -> None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, transform=axes.transAxes)

    alt = f"{title}: {why}"
    return Plot(key, title, draw(key, fill, alt, HEIGHT / 2), alt)


def _inline(svg: str, key: str, alt: str) -> str:
    """The drawing without the parts of a file of its own, its ids distinct within the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg))
    body = svg[svg.index(">") + 1 :]
    # Inside tags only: text between them is data and stays as it is.
    body = re.sub(r"<[^>]*>", lambda tag: _page_tag(tag[0], key, used), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    return f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box[1]}">\n{body}'


def _page_tag(tag: str, key: str, used: set[str]) -> str:
    """One tag with its ids under `key` and its placeholders as CSS variables."""
    tag = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", tag)
    tag = tag.replace('xlink:href="#', f'href="#{key}-').replace("xlink:href", "href")
    tag = tag.replace("url(#", f"url(#{key}-")
    return re.sub(r"#fe0[0-9a-f]{3}", lambda m: f"var({_VARIABLES[m[0]]})", tag)
