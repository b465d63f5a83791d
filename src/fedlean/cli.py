"""The command line.  Exit codes: 0 done, 2 bad usage or input (one line), 130 interrupted."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.text import Text

import fedlean
from fedlean.cost import profile as profiles
from fedlean.data import load as datasets
from fedlean.measure import responder
from fedlean.measure.device import Request, measure_device
from fedlean.measure.probe import parse_address
from fedlean.measure.result import write as write_profile
from fedlean.models import catalog
from fedlean.printable import printable
from fedlean.report import console as report_console
from fedlean.report import profile_page as report_profile
from fedlean.report.page import comparison_page, write_page, write_report
from fedlean.report.run_folder import read_run
from fedlean.runtime import config as configs
from fedlean.runtime import method as methods
from fedlean.runtime import run as runs
from fedlean.runtime.flower.project import write_project
from fedlean.runtime.how import How
from fedlean.runtime.local import ClientError
from fedlean.runtime.lock import Superseded
from fedlean.runtime.outofmemory import OutOfMemory
from fedlean.runtime.progress import watch_run
from fedlean.runtime.rounds import RunFailed
from fedlean.runtime.trust import Named, read_trusted

BAD_INPUT, INTERRUPTED = 2, 130
MAX_USAGE = 400  # characters of what is wrong with the options


def _whole(type_: Any, tokens: Sequence[Any]) -> int:
    """An integer as written: 2.5 rounds are a mistake, not 2."""
    del type_
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"expected a whole number, got {tokens[0].value!r:.40}") from None


def _place(type_: Any, tokens: Sequence[Any]) -> Path:
    """A shell leaves the ~ of --out=~/run to us."""
    del type_
    try:
        return Path(tokens[0].value).expanduser()
    except RuntimeError as error:  # of ~somebody
        raise ValueError(f"{tokens[0].value!r}: {error}") from None


def _norm(type_: Any, tokens: Sequence[Any]) -> float:
    del type_
    return configs.max_update_norm(tokens[0].value)


Norm = Annotated[float, Parameter(converter=_norm)]
Whole = Annotated[int, Parameter(converter=_whole)]
Place = Annotated[Path, Parameter(converter=_place)]
out, err = Console(), Console(stderr=True)
app = App(
    name="fedlean",
    help="Federated learning in which every device trains only what it can afford.",
    version=fedlean.__version__,
    result_action="return_value",
)


@app.command
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
        summary = runs.start(config, folder, How(watch, _say))
    _finish(folder, summary)


@app.command
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
            How(watch, _say),
            dataset=dataset,
            accept_changed_data=accept_changed_data,
            named=named,
        )
    _finish(folder, summary)


@app.command
def compare(
    folders: Annotated[list[Place], Parameter(consume_multiple=True, negative=())],
    /,
    *,
    out: Place = Path("compare.html"),
    target_accuracy: Annotated[
        list[float] | None, Parameter(consume_multiple=True, negative=())
    ] = None,
) -> None:
    """One page over several runs; the first is the baseline.

    Parameters
    ----------
    folders
        run folders
    out
        the page to write
    target_accuracy
        accuracies to compare at (default: those of the runs)
    """
    loaded = [read_run(folder) for folder in folders]
    write_page(out, comparison_page(loaded, target_accuracy or None))
    _print(report_console.cost_table(loaded, target_accuracy or None))
    _print(f"wrote {out}")


@app.command
def profile(
    *,
    model: str = "conv2",
    dataset: str | None = None,
    input_shape: Annotated[
        list[Whole] | None, Parameter(consume_multiple=True, negative=())
    ] = None,
    classes: Whole | None = None,
    batch: Whole = 20,
    local_steps: Whole = 5,
    densities: Annotated[list[float] | None, Parameter(consume_multiple=True, negative=())] = None,
    threads: Whole = 1,
    repeats: Whole = 5,
    seconds: float = 300.0,
    link: str | None = None,
    serve: str | None = None,
    out: Place = Path("profile.json"),
) -> None:
    """Measure this device's time model and link into a profile for --device.

    Parameters
    ----------
    model
        a name from 'fedlean models', or package.module:function
    dataset
        take the input shape and the classes of this data set (digits, or a folder)
    input_shape
        of the model, e.g. 1 28 28 (the default)
    classes
        of the model (default: 62)
    batch
        examples a step
    local_steps
        steps of a round
    densities
        kept fractions to time (default: 1 0.5 0.3 0.2 0.1 0.05 0.02 0.01)
    threads
        threads of the native engine
    repeats
        how often each sub-model is timed
    seconds
        time budget; what it does not allow is left out, and said
    link
        HOST:PORT of a 'fedlean profile --serve': measure the link to it, too
    serve
        HOST:PORT to answer such probes on, until interrupted; measures nothing
    out
        profile file to write; a page of plots goes beside it where matplotlib is installed
    """
    if serve is not None:
        _serve(serve)
        return
    if dataset is not None and (input_shape or classes):
        raise ValueError("--dataset gives the shape and the classes: leave out the other two")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    if out.suffix == ".html":
        raise ValueError(f"--out {out} is where the page goes: name the profile {out.stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=out.parent):  # may be written, found before minutes are spent
        pass
    request = Request(
        model=model,
        dataset=dataset,
        input_shape=tuple(input_shape or Request.input_shape),
        classes=Request.classes if classes is None else classes,
        batch_size=batch,
        local_steps=local_steps,
        densities=tuple(densities or Request.densities),
        threads=threads,
        repeats=repeats,
        seconds=seconds,
        link=link,
    )
    with err.status("measuring") as status:
        result = measure_device(
            request,
            out.stem,
            lambda what, done, planned: status.update(
                Text(printable(f"{done} of {planned}: {what}"))
            ),
        )
    write_profile(out, result)
    for table in report_profile.profile_tables(result):
        _print(table)
    for line in report_profile.notes(result):
        _print(line)
    _print(f"wrote {out}; use it with --device {out}")
    try:
        page = out.with_suffix(".html")
        write_page(page, report_profile.profile_page(result))
        _print(f"plots: {page}")
    except ValueError as error:  # matplotlib is optional: the profile is whole without its page
        _print(f"no page: {error}")


def _serve(address: str) -> None:
    host, port = parse_address(address)
    with responder.listen(host, port) as listener:
        bound = listener.getsockname()[1]
        _say(f"answering link probes on {host}, port {bound}; stop with Ctrl-C")
        responder.serve(listener, _say)


@app.command(help_flags=[])
def node(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Take part in a federation as one of its devices (see fedlean node --help)."""
    from fedlean.runtime.flower.node import main as serve  # a device's process loads nothing else

    sys.exit(serve(arguments))


flower_app = App(name="app", help="FedLean as a Flower app.")
app.command(flower_app)


@flower_app.command(name="new")
def new_app(folder: Place, /) -> None:
    """Write a Flower project, ready for 'flwr run'.

    Parameters
    ----------
    folder
        a new or empty folder
    """
    for path in write_project(folder):
        _print(f"wrote {path}")
    _print("README.md there says how to run it; pyproject.toml says what runs")


@app.command(name="methods")
def list_methods() -> None:
    """What can be run, one line each."""
    _list([*methods.available().items()])


@app.command(name="models")
def list_models() -> None:
    """Built-in models, one line each."""
    _list([*catalog.available().items()])


@app.command(name="datasets")
def list_datasets() -> None:
    """Data sets and the folder layouts that are recognised."""
    _list(datasets.available())


@app.command(name="devices")
def list_devices() -> None:
    """Device profiles for the emulated clock."""
    _list([*profiles.available().items()])


def _list(entries: Iterable[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        _print(f"{name:{width}}  {text}")


def _print(what: Any) -> None:
    """A line, or a table, whose cells are printable already."""
    what = printable(what) if isinstance(what, str) else what
    out.print(what, highlight=False, markup=False, emoji=False, soft_wrap=isinstance(what, str))


def _say(line: str) -> None:
    line = printable(line)
    err.print(line, style="yellow", highlight=False, markup=False, emoji=False, soft_wrap=True)


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
    _print(
        f"{summary['method']}: accuracy {summary['final_accuracy']:.2%} "
        f"(best {summary['best_accuracy']:.2%}), density {summary['density']:.1%}, "
        f"{sent / 1e6:.1f} MB sent, {summary['simulated_seconds']:.0f} simulated seconds on "
        f"{summary['device']}, {summary['wall_seconds']:.1f} s here"
    )
    _print(report)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; never shows a traceback for bad input."""
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        said = " ".join(str(error).split())  # it may repeat all of a value of any length
        _fail(f"{said[:MAX_USAGE]} (see fedlean --help)")
    except (ValueError, RunFailed, ClientError, Superseded, OutOfMemory, OSError) as error:
        _fail(" ".join(str(error).split()))
    except MemoryError as error:
        _fail(f"out of memory: {error or 'a small piece more did not fit'}")
    except KeyboardInterrupt:
        err.print("interrupted", highlight=False)
        sys.exit(INTERRUPTED)


def _fail(line: str) -> None:
    line = printable(f"fedlean: {line}")
    err.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
