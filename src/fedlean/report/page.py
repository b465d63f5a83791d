"""One HTML file per run or comparison that needs nothing else: no script, no font, no network.

Every value that comes from a file is escaped, and the content policy in the page's head forbids
scripts and loads besides.  The same runs give the same bytes.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import fedlean
from fedlean.report import markup, units
from fedlean.report.notices import notices_section
from fedlean.report.outcome import comparison_outcome, run_outcome
from fedlean.report.run_folder import (
    Run,
    check_target,
    final_accuracy,
    has_clock,
    number,
    read_run,
    run_total,
    targets_of,
    total,
)
from fedlean.report.served import served_section
from fedlean.report.stage_table import stages_section
from fedlean.report.stages import stages_notes
from fedlean.report.style import CSS
from fedlean.report.tables import (
    costs,
    density,
    differences,
    labels,
    mean_memory,
    peak_memory,
    summary_rows,
)

MAX_TABLE_ROWS = 60
MAX_FLEET_CHARACTERS = 20_000  # a trace may have megabytes
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def run_page(run: Run) -> str:
    """The page of one run."""
    targets = targets_of([run])
    about = [run.fact(key) for key in ("method", "dataset", "model", "partition")]
    kicker = "FedLean run · " + " · ".join(str(fact) for fact in about if fact is not None)
    parts = [
        head(kicker, run.name, run_outcome(run, targets)),
        _notices([run]),
        markup.tiles(_tiles(run)),
        section("Cost to each target", _costs([run], targets)),
        _plots([run], targets),
        *(section("Stages", content) for content in [stages_section(run)] if content),
        *(section("Whom it serves", content) for content in [served_section(run)] if content),
        section("The run", markup.summary_table(labels([run]), summary_rows([run]))),
        section("How these figures were made", _method_note([run])),
        _evaluations(run),
        _config("Configuration", run),
    ]
    return document(f"{run.name} · FedLean run", parts)


def comparison_page(runs: Sequence[Run], targets: Sequence[float] | None = None) -> str:
    """The page of several runs; the first is the baseline of all ratios."""
    if not runs:
        raise ValueError("a comparison needs at least one run, got none")
    wanted = targets_of(runs) if targets is None else sorted({check_target(t) for t in targets})
    names = labels(runs)
    outcome = comparison_outcome(runs, wanted) if len(runs) > 1 else run_outcome(runs[0], wanted)
    title = " · ".join(names)
    parts = [
        head(f"FedLean comparison of {len(runs)} runs", title, outcome),
        _differences(runs),
        _notices(runs),
        section("Cost to each target", _costs(runs, wanted)),
        _plots(runs, wanted),
        section("The runs", markup.summary_table(names, summary_rows(runs))),
        *(
            markup.details(f"Stages of {name}", content)
            for name, run in zip(names, runs, strict=True)
            if (content := stages_section(run))
        ),
        section("How these figures were made", _method_note(runs)),
        *(_config(f"Configuration of {name}", run) for name, run in zip(names, runs, strict=True)),
    ]
    return document(f"{title} · FedLean comparison", parts)


def write_report(folder: Path) -> str:
    """FOLDER/report.html of the run in `folder`; a line that says where it is, or why it is not."""
    page = folder / "report.html"
    try:
        write_page(page, run_page(read_run(folder)))
    except ValueError as error:  # matplotlib is optional: the run is whole without its page
        return f"no report: {error}"
    return f"report: {page}"


def write_page(path: Path, html: str) -> None:
    """Write a page so that a reader finds the old one or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name that nobody can have put a link at, in a folder that others may write
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            # "replace": a folder name that is not UTF-8 must not cost the page.
            file.write(html.encode("utf-8", "replace"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def document(title: str, parts: Iterable[str], source: str = "the run's own log") -> str:
    """The whole file around `parts` (HTML); `source` says what its figures were made from."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n"
        f"<footer>Made by FedLean {escape(fedlean.__version__)} from {source}; this file needs "
        "no network.</footer>\n</body>\n</html>\n"
    )


def head(kicker: str, title: str, outcome: Sequence[str]) -> str:
    """The page's title with sentences below it; plain text."""
    lead = "".join(f"<p>{escape(sentence)}</p>" for sentence in outcome)
    return (
        f'<header>\n<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n'
        f'<div class="lead">{lead}</div>\n</header>'
    )


def section(title: str, content: str) -> str:
    """`content` is HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _notices(runs: Sequence[Run]) -> str:
    """Nothing, where there is nothing to remark."""
    parts = [
        section("Notices" if len(runs) == 1 else f"Notices of {name}", content)
        for name, run in zip(labels(runs), runs, strict=True)
        if (content := notices_section(run))
    ]
    return "\n".join(parts)


def _tiles(run: Run) -> list[tuple[str, str]]:
    clock = run_total(run, "simulated_seconds") if has_clock(run) else None
    return [
        ("memory of a device, mean round", units.human(mean_memory(run.rounds), "bytes")),
        ("its peak, modelled", units.human(peak_memory(run), "bytes")),
        ("bytes, both ways", units.human(run_total(run, "bytes"), "bytes")),
        ("simulated time", units.human(clock, "seconds")),
        ("final accuracy", units.percent(final_accuracy(run))),
        ("rounds", str(run.num_rounds)),
        ("density", units.density_text(density(run))),
        ("FLOPs per client", units.human(run_total(run, "flops_per_client"), "flops")),
    ]


def _plots(runs: Sequence[Run], targets: Sequence[float]) -> str:
    try:
        plots: Any = importlib.import_module("fedlean.report.plots")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ValueError("a report needs matplotlib: pip install 'fedlean[sim]'") from None
    notes = "".join(f"<p>{escape(note)}</p>\n" for note in stages_notes(labels(runs), runs))
    return section("Curves", notes + markup.plot_grid(plots.all_plots(runs, targets)))


def _costs(runs: Sequence[Run], targets: Sequence[float]) -> str:
    if not targets:
        return "<p>No target accuracy was set for this page.</p>"
    text = (
        "What was paid, from the first step on, until an evaluation first reached the target. "
        "Simulated time is the emulated device's; measured here is the wall time of each round's "
        "median client on this machine, without the link. Bytes are both directions, all clients "
        "together. FLOPs count sampled weight gradients, as they are computed here, and dense "
        "ones, as the PruneFL paper counts."
    )
    if len(runs) > 1:
        text += f" Ratios are against {labels(runs)[0]}."
    return f"<p>{escape(text)}</p>\n{markup.cost_table(costs(runs, targets))}"


def _differences(runs: Sequence[Run]) -> str:
    found = differences(runs)
    if not found:
        return ""
    text = (
        f"These runs differ in {', '.join(found)}: part of what is shown below may come from that "
        "rather than from the methods."
    )
    return f'<p class="note">{escape(text)}</p>'


def _method_note(runs: Sequence[Run]) -> str:
    paragraphs = [_clock_note(runs), _arithmetic_note(runs), _charge_note(runs), _odd_note(runs)]
    return "\n".join(f"<p>{escape(text)}</p>" for text in paragraphs if text)


def _odd_note(runs: Sequence[Run]) -> str:
    """Why a pruned run's figures may look wrong and are not."""
    pruned = [name for name, run in zip(labels(runs), runs, strict=True) if (density(run) or 1) < 1]
    if not pruned:
        return ""
    return (
        f"Memory and time fall less than the density{_whom(pruned, runs)}: activations stay as "
        "large, and the modelled device computes a layer densely where its profile says that this "
        "is quicker. Single rounds that take more are reconfigurations, which need the gradients "
        "of all weights."
    )


def _grouped(runs: Sequence[Run], key: str) -> dict[str, list[str]]:
    """Value of a fact -> names of the runs with it; "" where a run does not say."""
    groups: dict[str, list[str]] = {}
    for name, run in zip(labels(runs), runs, strict=True):
        groups.setdefault(str(run.fact(key) or ""), []).append(name)
    return groups


def _whom(names: Sequence[str], runs: Sequence[Run]) -> str:
    return "" if len(names) == len(runs) else f" ({', '.join(names)})"


def _clock_note(runs: Sequence[Run]) -> str:
    parts = []
    clocked = [run for run in runs if has_clock(run)]
    for device, names in _grouped(runs, "device").items():
        with_clock = [
            n for n, r in zip(labels(runs), runs, strict=True) if n in names and r in clocked
        ]
        if not with_clock:
            parts.append(f"No simulated clock was charged{_whom(names, runs)}.")
            continue
        profile = (
            f"the device profile “{device}”" if device else "a device profile not recorded here"
        )
        if any(run.config.get("fleet") for run in runs if run.name in names):
            profile = f"each device of its fleet, of which those without a profile have {profile}"
        parts.append(f"The simulated clock is that of {profile}{_whom(names, runs)}.")
    if clocked:
        parts.append(
            "A step lasts as long as its slowest client needs to download, compute and upload; "
            "evaluation is not part of it."
        )
    return " ".join(parts)


def _arithmetic_note(runs: Sequence[Run]) -> str:
    notes = {
        "masked": (
            "Arithmetic is masked{}: the engine computed densely and multiplied by masks, so wall "
            "time and RAM on this machine show no saving. FLOPs, bytes, memory and simulated "
            "seconds are those of the modelled device."
        ),
        "sparse": (
            "Arithmetic is sparse{}: pruned weights were neither stored nor computed here either, "
            "so wall time shows the saving too. FLOPs, memory and simulated seconds are those of "
            "the modelled device."
        ),
    }
    unknown = (
        "The run does not record yet{} whether its arithmetic is masked or sparse, so read no "
        "saving from wall time. FLOPs, memory and simulated seconds are of the modelled device."
    )
    groups = _grouped(runs, "arithmetic")
    return " ".join(notes.get(k, unknown).format(_whom(names, runs)) for k, names in groups.items())


def _charge_note(runs: Sequence[Run]) -> str:
    text = (
        "Everything is charged from the first step: initial pruning or warm-up, full-gradient "
        "uploads, masks and models, in both directions."
    )
    for name, run in zip(labels(runs), runs, strict=True):
        before = [row for row in run.rounds if row["round"] == 0]
        if not before or not total(before[-1], "bytes"):
            continue
        paid = [units.human(total(before[-1], "bytes"), "bytes")]
        paid.append(units.human(total(before[-1], "flops_per_client"), "flops") + " per client")
        if has_clock(run):
            paid.insert(0, units.human(total(before[-1], "simulated_seconds"), "seconds"))
        steps = f"{len(before)} step{'' if len(before) == 1 else 's'}"
        text += f" Before round 1, {name} spent {', '.join(paid)} in {steps}."
    return text


def _evaluations(run: Run) -> str:
    rows = run.evaluations
    if not rows:
        return ""
    # Ends included; indices repeat where there are few rows, hence the dict.
    count = min(len(rows), MAX_TABLE_ROWS)
    at = [round(i * (len(rows) - 1) / max(1, count - 1)) for i in range(count)]
    cells = []
    for row in (rows[i] for i in dict.fromkeys(at)):
        loss = number(row.get("loss"))
        clock = total(row, "simulated_seconds") if has_clock(run) else None
        cells.append(
            [
                str(row["round"]),
                units.percent(row["accuracy"], 2),
                "–" if loss is None else f"{loss:.4g}",
                units.density_text(number(row.get("density"))),
                units.human(clock, "seconds"),
                units.human(total(row, "bytes"), "bytes"),
                units.human(total(row, "flops_per_client"), "flops"),
            ]
        )
    title = f"Evaluations ({len(rows)})"
    if len(cells) < len(rows):
        title = f"Evaluations ({len(cells)} of {len(rows)}, evenly spaced)"
    heads = ("round", "accuracy", "loss", "density", "simulated", "bytes", "FLOPs per client")
    return markup.details(title, markup.plain_table(heads, cells))


def _config(title: str, run: Run) -> str:
    content = run.config.get("fleet_content")
    long = len(json.dumps(content)) > MAX_FLEET_CHARACTERS
    shown = {**run.config, "fleet_content": "see config.json"} if long else run.config
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    return markup.details(title, f"<pre>{escape(text)}</pre>")
