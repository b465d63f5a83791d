"""`fedlean run` and `fedlean resume`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from fedlean.cli.options import Norm, Place, Whole
from fedlean.cli.screen import say, show
from fedlean.report.page import write_report
from fedlean.runtime import config as configs
from fedlean.runtime import method as methods
from fedlean.runtime import run as runs
from fedlean.runtime.how import How
from fedlean.runtime.local import ClientError
from fedlean.runtime.progress import watch_run
from fedlean.runtime.rounds import RunFailed
from fedlean.runtime.trust import Named, read_trusted


def run(
    method: str,
    /,
    *,
    dataset: str = "digits",
    model: str = "lenet300",
    inputs: str = "standardised",
    init: str = "pytorch",
    partition: str = "iid",
    clients: Whole | None = None,
    cohort: Whole | None = None,
    rounds: Whole = 100,
    local_steps: Whole | None = None,
    batch: Whole | None = None,
    lr: float | None = None,
    seed: Whole = 0,
    engine: str | None = None,
    threads: Whole = 1,
    device: str = "raspberry_pi_4",
    fleet: str | None = None,
    target_accuracy: Annotated[
        list[float] | None, Parameter(consume_multiple=True, negative=())
    ] = None,
    eval_every: Whole = 1,
    eval_examples: Whole | None = None,
    max_update_norm: Norm | None = None,
    start: Place | None = None,
    start_weights: Literal["trained", "original", "random"] = "trained",
    set: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    out: Place | None = None,
) -> None:
    """Train one model across simulated clients and write a run folder with a report.

    Parameters
    ----------
    method
        a name from 'fedlean methods', or package.module:function
    dataset
        digits, or a folder (see 'fedlean datasets')
    model
        a name from 'fedlean models', or package.module:function
    inputs
        standardised (mean 0, deviation 1 per channel) or unit (0 to 1, as stored)
    init
        how the first weights are drawn: pytorch (its default) or he (deep nets without norms)
    partition
        iid, dirichlet:A, natural or shards:K
    clients
        devices in the federation (default: 10; natural: one per client id of the data)
    cohort
        clients a round, drawn anew each round (default: all)
    rounds
        training rounds
    local_steps
        local steps a round (default: the method's)
    batch
        examples a step (default: the method's)
    lr
        learning rate (default: the method's)
    seed
        everything random follows from it
    engine
        native or torch (default: native, or torch where native is missing or lacks a layer)
    threads
        threads of the engine; torch gives the same bits only at the same number, native at any
    device
        profile of the emulated devices, from 'fedlean devices' or a file of 'fedlean profile'
    fleet
        a file that says what each device has, round by round (docs/fleets.md)
    target_accuracy
        accuracies in (0, 1) whose cost is reported
    eval_every
        rounds between evaluations
    eval_examples
        test examples used during the run (default: all; the last round takes all)
    max_update_norm
        refuse an update that moves the model by more (Euclidean norm), or off (default: 20 times
        the clients' median)
    start
        folder of a finished run, or a .safetensors file, whose weights and masks to start from
    start_weights
        with its masks: trained, its weights; original, those it began with; random, new ones
    set
        further hyper-parameters of the method, key=value
    out
        run folder (default: runs/METHOD-DATASET-MODEL-sSEED)
    """
    flags = {"cohort": cohort, "local_steps": local_steps, "batch_size": batch, "lr": lr}
    given = {key: value for key, value in flags.items() if value is not None}
    settings = methods.given_settings(method, set or [], given)
    config = configs.RunConfig(
        method=method,
        dataset=dataset,
        model=model,
        inputs=inputs,
        init=init,
        partition=partition,
        clients=clients,
        rounds=rounds,
        seed=seed,
        engine=engine,
        threads=threads,
        device=device,
        fleet=fleet,
        target_accuracy=tuple(target_accuracy or ()),
        eval_every=eval_every,
        eval_examples=eval_examples,
        max_update_norm=max_update_norm,
        start=str(start or ""),
        start_weights=start_weights,
        settings=settings,
    )
    folder = out or Path("runs") / _folder_name(config)
    with watch_run(config, folder) as watch, _report_of_a_failure(folder):
        summary = runs.start(config, folder, How(watch, say))
    _finish(folder, summary)


def resume(
    folder: Place,
    /,
    *,
    dataset: str | None = None,
    accept_changed_data: Annotated[bool, Parameter(negative=())] = False,
    method: str | None = None,
    model: str | None = None,
    trust: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Continue an interrupted run, bit for bit.

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
    """
    named = Named(method, model, trust)
    config, _ = read_trusted(folder, named)
    with watch_run(config, folder) as watch, _report_of_a_failure(folder):
        summary = runs.resume(
            folder,
            How(watch, say),
            dataset=dataset,
            accept_changed_data=accept_changed_data,
            named=named,
        )
    _finish(folder, summary)


def _folder_name(config: configs.RunConfig) -> str:
    parts = (config.method, Path(config.dataset).name, config.model, f"s{config.seed}")
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part) for part in parts)


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
    show(
        f"{summary['method']}: accuracy {summary['final_accuracy']:.2%} "
        f"(best {summary['best_accuracy']:.2%}), density {summary['density']:.1%}, "
        f"{sent / 1e6:.1f} MB sent, {summary['simulated_seconds']:.0f} simulated seconds on "
        f"{summary['device']}, {summary['wall_seconds']:.1f} s here"
    )
    show(report)
