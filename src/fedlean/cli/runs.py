"""`fedlean run` and `fedlean resume`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from fedlean.cli.options import Place, Whole
from fedlean.cli.run_options import RunOptions, told
from fedlean.cli.screen import say, show
from fedlean.report.page import write_report
from fedlean.report.tensorboard import tensorboard
from fedlean.runtime import config as configs
from fedlean.runtime import run as runs
from fedlean.runtime.configured import configured
from fedlean.runtime.how import How, Watch
from fedlean.runtime.local import ClientError
from fedlean.runtime.progress import watch_run
from fedlean.runtime.rounds import RunFailed
from fedlean.runtime.trust import Named, read_trusted

_DEFAULTS = RunOptions()


def run(
    method: str,
    /,
    *,
    cohort: Whole | None = None,
    local_steps: Whole | None = None,
    batch: Whole | None = None,
    lr: float | None = None,
    set: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    out: Place | None = None,
    log: Literal["tensorboard"] | None = None,
    options: Annotated[RunOptions, Parameter(name="*")] = _DEFAULTS,  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    """Train one model across simulated clients and write a run folder with a report.

    Parameters
    ----------
    method
        a name from 'fedlean methods', or your own: FILE.py:function or package.module:function
    cohort
        clients a round, drawn anew each round (default: all)
    local_steps
        local steps a round (default: the method's)
    batch
        examples a step (default: the method's)
    lr
        learning rate (default: the method's)
    set
        further hyper-parameters of the method, key=value
    out
        run folder (default: runs/METHOD-DATASET-MODEL-sSEED)
    log
        tensorboard: curves while the run goes on, in the folder tensorboard beside the run folder
    """
    flags = {"cohort": cohort, "local_steps": local_steps, "batch_size": batch, "lr": lr}
    config = configured(method, settings=set or [], flags=flags, options=told(options))
    folder = out or Path("runs") / _folder_name(config)
    with ExitStack() as stack:
        watches: list[Watch] = [stack.enter_context(watch_run(config, folder))]
        if log is not None:
            watches.append(stack.enter_context(tensorboard(_events(folder))))
        stack.enter_context(_report_of_a_failure(folder))
        summary = runs.start(config, folder, How(partial(_to_all, watches), say))
    _finish(folder, summary)


def _events(folder: Path) -> Path:
    """Beside the run folder, which must be empty as the run begins: all runs in one place."""
    return folder.parent / "tensorboard" / folder.name


def _to_all(watches: list[Watch], entry: dict[str, Any]) -> None:
    for watch in watches:
        watch(entry)


def resume(
    folder: Place,
    /,
    *,
    dataset: str | None = None,
    accept_changed_data: Annotated[bool, Parameter(negative=())] = False,
    method: str | None = None,
    model: str | None = None,
    trust: Annotated[bool, Parameter(negative=())] = False,
    rounds: Whole | None = None,
) -> None:
    """Continue an interrupted run, bit for bit; or extend a finished one.

    Parameters
    ----------
    folder
        a run folder
    dataset
        where its data set is now, if it has moved
    accept_changed_data
        go on although the data is not what the run began with; the run is marked
    method
        the run's method, needed where that is code of your own (package.module:function)
    model
        the run's model, needed where that is code of your own
    trust
        run whatever code the folder names, without naming it
    rounds
        more rounds than the run was to have, to extend it
    """
    named = Named(method, model, trust)
    config, _ = read_trusted(folder, named)
    config = replace(config, rounds=rounds or config.rounds)  # for the bar
    with watch_run(config, folder) as watch, _report_of_a_failure(folder):
        summary = runs.resume(
            folder,
            How(watch, say),
            dataset=dataset,
            accept_changed_data=accept_changed_data,
            named=named,
            rounds=rounds,
        )
    _finish(folder, summary)


def _folder_name(config: configs.RunConfig) -> str:
    method, model = (
        Path(place).name + colon + own  # of FILE.py:function the file's name
        for place, colon, own in map(_divided, (config.method, config.model))
    )
    parts = (method, Path(config.dataset).name, model, f"s{config.seed}")
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)


def _divided(name: str) -> tuple[str, str, str]:
    place, colon, own = name.rpartition(":")
    return (place, colon, own) if colon else (own, "", "")


@contextmanager
def _report_of_a_failure(folder: Path) -> Iterator[None]:
    """Of a run that cannot go on, too, the page shows how far it came and why."""
    try:
        yield
    except (RunFailed, ClientError):
        write_report(folder)
        raise


def _finish(folder: Path, summary: dict[str, Any]) -> None:
    report = write_report(folder)
    sent = summary["downlink_bytes"] + summary["uplink_bytes"]
    whose = "the fleet" if summary["fleet"] else summary["device"]
    show(
        f"{summary['method']}: accuracy {summary['final_accuracy']:.2%} "
        f"(best {summary['best_accuracy']:.2%}), density {summary['density']:.1%}, "
        f"{sent / 1e6:.1f} MB sent, {summary['simulated_seconds']:.0f} simulated seconds on "
        f"{whose}, {summary['wall_seconds']:.1f} s here"
    )
    show(report)
