"""A plan as one HTML file, in the style of reports."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from fedlean.planning.document import to_document
from fedlean.planning.records import DevicePlan, MethodPlan, Phase, Plan
from fedlean.planning.rows import NOTES, heads, rows, title, verdicts
from fedlean.report import markup
from fedlean.report.page import document, head, section

MB = 1e6
PARTS = {
    "weights": "weights_bytes",
    "optimiser": "optimizer_bytes",
    "importance": "importance_bytes",
    "activations and scratch": "activations_bytes",
    "held beside": "beside_bytes",
}


def plan_page(plan: Plan) -> str:
    """Self-contained.  Raises ValueError without matplotlib."""
    try:
        drawing: Any = importlib.import_module("fedlean.report.bars")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ValueError("a plan's page needs matplotlib: pip install 'fedlean[sim]'") from None
    names = list(dict.fromkeys(block.model for block in plan.devices))
    lead = [block.reason for block in plan.devices] if len(plan.devices) == 1 else []
    parts = [head("FedLean plan", " · ".join(names), lead)]
    for at, block in enumerate(plan.devices):
        parts.append(section(title(block), _block(block, at, drawing)))
    notes = [*NOTES, *(f"{name} is left out: {why}." for name, why in plan.left_out.items())]
    parts.append(section("How to read this", _paragraphs(notes)))
    text = json.dumps(to_document(plan), indent=1, ensure_ascii=False)
    parts.append(markup.details("As JSON", f"<pre>{escape(text)}</pre>"))
    return document(f"{' · '.join(names)} · FedLean plan", parts, "the methods' own orders")


def _block(block: DevicePlan, at: int, drawing: Any) -> str:
    recommended = f'<p class="note">{escape(block.reason)}</p>'
    shown = [
        drawing.Bar(_name(one, phase), _parts(phase))
        for one in block.methods
        for phase in one.phases
    ]
    plot = drawing.bars(
        f"memory-{at}",
        "Memory of a client, by method and phase",
        shown,
        block.memory_bytes / MB,
        unit="MB",
        limit_name="what the device has",
    )
    table = markup.plain_table(heads(block), rows(block))
    said = [*verdicts(block), block.note] if block.note else verdicts(block)
    return "\n".join([recommended, table, _paragraphs(said), markup.plot_grid([plot])])


def _name(one: MethodPlan, phase: Phase) -> str:
    return " ".join(part for part in (f"{one.method}:", phase.name, phase.about) if part)


def _parts(phase: Phase) -> dict[str, float]:
    return {name: getattr(phase.memory, field) / MB for name, field in PARTS.items()}


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)
