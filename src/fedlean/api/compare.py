"""`compare`: several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from fedlean.api.run import Run, record
from fedlean.report import run_folder
from fedlean.report.run_folder import final_accuracy, first_reaching, run_total, targets_of, total
from fedlean.report.tables import density, labels, peak_memory

_WIDTH = 100
_TOTALS = ("bytes", "flops_per_client", "simulated_seconds")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is the baseline of the page's ratios."""

    runs: Sequence[run_folder.Run]
    targets: Sequence[float]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One record per run, plain numbers.

        `name`, `accuracy`, `density`, `rounds`, `bytes`, `flops_per_client`, `simulated_seconds`,
        `peak_memory_bytes`, and `to_target`: what each target accuracy took, or None.
        """
        return [
            self._row(name, run) for name, run in zip(labels(self.runs), self.runs, strict=True)
        ]

    def _row(self, name: str, run: run_folder.Run) -> dict[str, Any]:
        return {
            "name": name,
            "accuracy": final_accuracy(run),
            "density": density(run),
            "rounds": run.num_rounds,
            **{key: run_total(run, key) for key in _TOTALS},
            "peak_memory_bytes": peak_memory(run),
            "to_target": {target: _cost(run, target) for target in self.targets},
        }

    def report(self, path: str | Path) -> Path:
        """Writes the page that compares them; needs matplotlib."""
        from fedlean.report.page import comparison_page, write_page

        path = Path(path).expanduser()
        write_page(path, comparison_page(self.runs, self.targets or None))
        return path

    def __str__(self) -> str:
        from rich.console import Console

        from fedlean.report.console import cost_table

        text = StringIO()
        Console(file=text, width=_WIDTH).print(cost_table(self.runs, self.targets or None))
        return text.getvalue()


def _cost(run: run_folder.Run, target: float) -> dict[str, Any] | None:
    row = first_reaching(run, target)
    if row is None:
        return None
    return {"round": row["round"], **{key: total(row, key) for key in _TOTALS}}


def compare(
    *runs: Run | str | Path,
    out: str | Path | None = None,
    target_accuracy: Sequence[float] | None = None,
) -> Comparison:
    """Runs, or run folders, side by side; the first is the baseline.

    out: a page to write.  target_accuracy: accuracies to compare at (default: those of the runs).
    Raises ValueError without a run, or where a folder holds none.
    """
    if not runs:
        raise ValueError("a comparison needs at least one run, got none")
    records = [record(run) for run in runs]
    found = Comparison(records, list(target_accuracy or targets_of(records)))
    if out is not None:
        found.report(out)
    return found
