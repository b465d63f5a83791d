"""What a run shows while it goes on: accuracy, density, bytes, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedlean.printable import printable
from fedlean.runtime.checks import remedy
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import Watch
from fedlean.runtime.trust import resume_command

Show = Callable[[dict[str, Any]], None]  # takes a log entry
MAX_REASON = 200  # characters of a refusal
MAX_STAGE = 26  # and of a stage
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
PLAIN_LINES = 10  # a run whose output is not a terminal prints about so many lines


@contextmanager
def watch_run(config: RunConfig, folder: Path, *, bar: bool = True) -> Iterator[Watch]:
    """A callable that takes every log entry and shows it on standard error.

    Without `bar` by lines even on a terminal, where several runs share it.
    """
    console = Console(stderr=True)
    try:
        if bar and console.is_terminal:
            with _bar(config, console) as show:
                yield with_refusals(show, console)
        else:
            yield with_refusals(_plain(config, console), console)
    except KeyboardInterrupt:
        if (folder / "config.json").is_file():
            console.print(
                printable(f"interrupted; continue with: {resume_command(folder, config)}"),
                **_PLAIN,
            )
        raise


def with_refusals(show: Callable[[dict[str, Any]], object], console: Console) -> Watch:
    """Also shows at once whose updates were refused in a step, and what to do about it.

    The same, once, of whom is left out for what a device lacks, and of steps that asked nobody, for
    as long as they do for one reason.
    """
    said: list[str] = []
    unasked = [""]  # what was last said of a step that asked nobody

    def shown(entry: dict[str, Any]) -> object:
        answer = show(entry)
        if entry["rejected"]:
            console.print(printable(_refusals(entry)), style="bold red", **_PLAIN)
        if entry["left_out"] and not said:
            said.append(_left_out(entry))
            console.print(printable(said[0]), style="bold yellow", **_PLAIN)
        if not (entry["cohort"] or entry["server_only"]):
            line = f"round {entry['asked_round']}: {entry['notes'][0]}"
            if line != unasked[0]:
                console.print(printable(line), style="bold red", **_PLAIN)
            unasked[0] = line
        return answer

    return shown


def _left_out(entry: dict[str, Any]) -> str:
    client, reason = next(iter(entry["left_out"].items()))
    return (
        f"round {entry['asked_round']}: {len(entry['left_out'])} left out, their tasks are "
        f"beyond their devices; client {client} {reason} "
        "(said once: rounds.jsonl has all, as left_out)"
    )


def _refusals(entry: dict[str, Any]) -> str:
    first = entry["rejected"][0]
    reason = entry["refused"][str(first)]
    return (
        f"round {entry['asked_round']}: {len(entry['rejected'])} of {len(entry['cohort'])} updates "
        f"refused; client {first} {reason[:MAX_REASON]}: {remedy(reason)}"
    )


def _state(entry: dict[str, Any], accuracy: float | None) -> str:
    total = entry["total"]["downlink_bytes"] + entry["total"]["uplink_bytes"]
    shown = "accuracy    –" if accuracy is None else f"accuracy {accuracy:6.2%}"
    density = entry["metrics"].get("density", entry["density"])
    return f"{shown}  density {density:6.1%}  {total / 1e6:9.1f} MB"


def _stage(entry: dict[str, Any]) -> str:
    """What trains, in progressive training: the stage, with its phase where that says more."""
    if entry["stage"] is None:
        return ""
    phase = "" if entry["phase"] == "train" else f"{entry['phase']} "
    return f"  {phase}{entry['stage']}"[:MAX_STAGE]


@contextmanager
def _bar(config: RunConfig, console: Console) -> Iterator[Show]:
    last: list[float | None] = [None]
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task(printable(config.method), total=config.rounds, state="")

        def show(entry: dict[str, Any]) -> None:
            last[0] = last[0] if entry["accuracy"] is None else entry["accuracy"]
            name = config.method if entry["round"] else f"{config.method}: {entry['phase']}"
            name += _stage(entry)
            progress.update(
                bar,
                completed=entry["round"],
                description=printable(name),
                state=_state(entry, last[0]),
            )

        yield show


def _plain(config: RunConfig, console: Console) -> Show:
    every = max(1, config.rounds // PLAIN_LINES)

    def show(entry: dict[str, Any]) -> None:
        if entry["round"] % every == 0 and entry["accuracy"] is not None:
            rounds = f"{entry['round']}/{config.rounds}"
            line = printable(f"{config.method} round {rounds}{_stage(entry)}")
            console.print(
                f"{line}  {_state(entry, entry['accuracy'])}  "
                f"{entry['total']['simulated_seconds']:.0f} simulated s",
                **_PLAIN,
            )

    return show
