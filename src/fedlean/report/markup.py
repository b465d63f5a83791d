"""Tables, tiles, legends and figures as HTML; every text is escaped here, callers pass it raw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from fedlean.report.tables import PRICES, Cost, Figure

if TYPE_CHECKING:
    from fedlean.report.figure import Plot  # imports matplotlib, which may be missing

# The end markers of `figure.MARKERS` (o s ^ D v P) around (20, 5), and its dash patterns.
_SHAPES = (
    "M17 5a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "M17.3 2.3h5.4v5.4h-5.4z",
    "M20 1.6l3.3 6.2h-6.6z",
    "M20 1.4l3.6 3.6-3.6 3.6-3.6-3.6z",
    "M20 8.4l-3.3-6.2h6.6z",
    "M18.9 1.5h2.2v2.4h2.4v2.2h-2.4v2.4h-2.2v-2.4h-2.4v-2.2h2.4z",
)
_DASHES = ("", "5 2", "1.5 1.5")


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Key figures as a definition list."""
    cells = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in figures)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def details(title: str, content: str) -> str:
    """A part that opens on demand; `content` is HTML."""
    return f"<details>\n<summary>{escape(title)}</summary>\n{content}\n</details>"


def swatch(series: int) -> str:
    """The line and the marker with which the plots draw the i-th series."""
    colour = f"var(--s{series % len(_SHAPES)})"
    shape = _SHAPES[(series + series // len(_SHAPES)) % len(_SHAPES)]
    dash = _DASHES[series // len(_SHAPES) % len(_DASHES)]
    return (
        '<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
        f'<path d="M0 5h26" style="stroke:{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        f'<path d="{shape}" style="fill:{colour}"/></svg>'
    )


def plot_grid(plots: Iterable[Plot]) -> str:
    """All figures with their captions and legends."""
    return f'<div class="plots">\n{"".join(_figure(plot) for plot in plots)}</div>'


def _figure(plot: Plot) -> str:
    items = "".join(f"<li>{swatch(i)}{escape(label)}</li>" for i, label in plot.legend)
    legend = f'<ul class="legend">{items}</ul>' if items else ""
    return (
        f'<figure id="{plot.key}">\n<figcaption>{escape(plot.title)}</figcaption>\n'
        f"{plot.svg}\n{legend}</figure>\n"
    )


def _scroll(table: str) -> str:
    # Focusable, so that a keyboard can scroll it on a narrow screen.
    return f'<div class="scroll" tabindex="0">{table}</div>'


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    lines = "\n".join(f"<tr>{cells}</tr>" for cells in body)
    return _scroll(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>")


def named_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts whose first column has names, which may be long."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    lines = "\n".join(
        f'<tr><th scope="row" class="name">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return _scroll(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>")


def summary_table(names: Sequence[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """Quantities downwards, runs sideways."""
    head = "".join(
        f'<th scope="col" class="name">{swatch(i) if len(names) > 1 else ""}{escape(name)}</th>'
        for i, name in enumerate(names)
    )
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return _scroll(
        f'<table class="summary"><thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table>"
    )


def cost_table(groups: Sequence[Sequence[Cost]]) -> str:
    """One block of rows per target, one row per run."""
    alone = all(len(group) == 1 for group in groups)
    heads = ("target" if alone else "run", "round", *PRICES)
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    blocks = "\n".join(_target(group, alone=alone) for group in groups)
    return _scroll(f"<table><thead><tr>{head}</tr></thead>\n{blocks}</table>")


def _target(group: Sequence[Cost], *, alone: bool) -> str:
    if alone:
        return f"<tbody>{_cost(group[0], escape(group[0].target))}</tbody>"
    lines = "\n".join(_cost(c, swatch(i) + escape(c.run)) for i, c in enumerate(group))
    title = (
        f'<tr><th colspan="{2 + len(PRICES)}" scope="rowgroup">{escape(group[0].target)}</th></tr>'
    )
    return f'<tbody class="group">{title}\n{lines}</tbody>'


def _cost(cost: Cost, head: str) -> str:
    row = f'<tr><th scope="row" class="name">{head}</th>'
    if cost.missed:
        said = f'<td colspan="{len(PRICES)}" class="missed">{escape(cost.missed)}</td>'
        return f"{row}<td>–</td>{said}</tr>"
    figures = "".join(_cell(figure) for figure in cost.figures.values())
    return f"{row}<td>{escape(cost.round)}</td>{figures}</tr>"


def _cell(figure: Figure) -> str:
    ratio = f"<small>{escape(figure.ratio)}</small>" if figure.ratio else ""
    return f"<td>{escape(figure.text)}{ratio}</td>"
