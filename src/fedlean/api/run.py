"""What `train` and `resume` give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlean.api.model import Model, of
from fedlean.report import run_folder
from fedlean.runtime.going import Finished


@dataclass(frozen=True)
class Run:
    """One run, as far as it came.

    log: one record per server step; summary: the figures of the whole run; config: all that was
    told (docs/run-folder.md has the keys of all three).  model: after the last round; best: of the
    evaluation with the highest accuracy.  folder: where it was written, or None.  interrupted: by
    Ctrl-C.
    """

    name: str
    model: Model
    best: Model
    log: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    folder: Path | None = None
    interrupted: bool = False

    @property
    def accuracy(self) -> float | None:
        """Of `model` on the test set, in [0, 1]; None where the data has no test examples."""
        found = self.summary["final_accuracy"]
        return None if found is None else float(found)

    @property
    def rounds(self) -> int:
        """Training rounds completed."""
        return int(self.summary["rounds"])

    def report(self, path: str | Path) -> Path:
        """Writes the page of the run, one HTML file; needs matplotlib."""
        from fedlean.report.page import run_page, write_page

        path = Path(path).expanduser()
        write_page(path, run_page(record(self)))
        return path

    def __str__(self) -> str:
        measured = "without test examples"
        if self.accuracy is not None:
            measured = f"accuracy {self.accuracy:.2%}"
        sent = self.summary["downlink_bytes"] + self.summary["uplink_bytes"]
        return (
            f"{self.name}: {self.rounds} rounds, {measured}, density {self.model.density:.1%}, "
            f"{sent / 1e6:.1f} MB sent"
            f"{', interrupted' if self.interrupted else ''}"
        )

    __repr__ = __str__


def run_of(
    finished: Finished, log: Sequence[Mapping[str, Any]], folder: Path | None, name: str
) -> Run:
    """Of what the runtime gives back."""
    return Run(
        name,
        of(finished.model, finished.about),
        of(finished.best, finished.about),
        log,
        finished.summary,
        finished.document,
        folder,
        finished.interrupted,
    )


def record(run: Run | str | Path) -> run_folder.Run:
    """As the reports read it; a path is that of a run folder."""
    if not isinstance(run, Run):
        return run_folder.read_run(Path(run).expanduser())
    summary = None if run.interrupted else dict(run.summary)
    log = [dict(entry) for entry in run.log]
    return run_folder.Run(run.name, run.folder or Path(run.name), dict(run.config), log, summary)
