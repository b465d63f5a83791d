"""`train` and `resume`: a run as a function call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fedlean.api.run import Run, run_of
from fedlean.core import Model, Scalar
from fedlean.data.dataset import Dataset
from fedlean.data.declared import Declared
from fedlean.data.load import load_source
from fedlean.models.brought import Brought, Converted, brought
from fedlean.printable import printable
from fedlean.report.page import write_report
from fedlean.report.run_folder import read_run
from fedlean.runtime.configured import configured
from fedlean.runtime.how import How
from fedlean.runtime.local import ClientError
from fedlean.runtime.method import Method, name_of
from fedlean.runtime.progress import with_refusals
from fedlean.runtime.rounds import RunFailed
from fedlean.runtime.run import begin, go_on
from fedlean.runtime.trust import Named
from fedlean.spec import ModelSpec

_DECLARED = tuple(each.name for each in fields(Declared))  # what a user says of the data
OnRound = Callable[[dict[str, Any]], object]


def train(
    method: str | Method,
    *,
    model: Any = "lenet300",
    data: str | Path | Dataset = "digits",
    rounds: int = 100,
    lr: float | None = None,
    local_steps: int | None = None,
    batch_size: int | None = None,
    cohort: int | None = None,
    settings: Mapping[str, Scalar | None] | None = None,
    out: str | Path | None = None,
    on_round: OnRound | None = None,
    say: Callable[[str], object] | None = None,
    **options: Any,
) -> Run:
    """Trains one model across simulated clients.

    method: a name from `fedlean methods`, FILE.py:function, or a function of yours
    (docs/adding-a-method.md).  model: a name from `fedlean models`, FILE.py:function or a
    `ModelSpec`; or a `Model`, an `nn.Module` or what `from_torch` returns, whose weights are the
    start.  data: a `Dataset`, or what `fedlean run --dataset` takes.  lr, local_steps, batch_size,
    cohort and settings are the method's hyper-parameters.  out: a run folder to write; without one
    nothing is written.  options: whatever else `fedlean run --help` lists, as seed=1 or clients=20.

    on_round is called with the record of every server step, as it is logged; if it returns False,
    the run ends there.  Ctrl-C ends it, too, and gives the run as far as it came.  Neither changes
    what is computed.  say gets lines that are worth knowing; without it they go to standard error.

    Raises ValueError, before anything is trained or written, naming what does not fit; RunFailed
    where nothing can be learnt any more.
    """
    function = None if isinstance(method, str) else method
    declared = {key: options[key] for key in _DECLARED if options.get(key) is not None}
    own, model_name = _model(model, data, declared)
    name = method if isinstance(method, str) else name_of(method)
    config = configured(
        name,
        settings=settings or {},
        flags={"lr": lr, "local_steps": local_steps, "batch_size": batch_size, "cohort": cohort},
        options={**options, "dataset": _name(data), "model": model_name, "rounds": rounds},
        method=function,
    )
    log: list[dict[str, Any]] = []
    folder = None if out is None else Path(out).expanduser()
    how = _how(data, say, _watch(log, on_round, say))
    with _report(folder):
        finished = begin(config, folder, how, model=own, method=function)
    title = name.rpartition(":")[2] if folder is None else folder.name
    return run_of(finished, log, folder, title)


def resume(
    folder: str | Path,
    *,
    data: str | Path | Dataset | None = None,
    method: str | Method | None = None,
    model: str | None = None,
    rounds: int | None = None,
    accept_changed_data: bool = False,
    on_round: OnRound | None = None,
    say: Callable[[str], object] | None = None,
) -> Run:
    """Continues a run from its folder, bit for bit.

    data: where its data set is now, or the `Dataset` itself, which is needed where it was given as
    one.  method, model: code that the folder names runs only where you name it again.  rounds: more
    than the run was to have, to extend it.

    Raises ValueError naming what is damaged or has changed.
    """
    place = Path(folder).expanduser()
    function = None if method is None or isinstance(method, str) else method
    name = method if method is None or isinstance(method, str) else name_of(method)
    how = _how(data, say, _watch([], on_round, say))
    with _report(place):
        finished = go_on(
            place,
            how,
            dataset=None if data is None or isinstance(data, Dataset) else str(data),
            accept_changed_data=accept_changed_data,
            named=Named(name, model),
            rounds=rounds,
            method=function,
        )
    return run_of(finished, read_run(place).rounds, place, place.name)


class _Own(NamedTuple):
    brought: Brought | None  # None: found by its name
    name: str


def _model(model: Any, data: str | Path | Dataset, declared: Mapping[str, Any]) -> _Own:
    if isinstance(model, str):
        return _Own(None, model)
    known = isinstance(model, ModelSpec | Model | Converted)  # of which no shape is needed
    shape = () if known else _input_shape(data, declared)
    named = {ModelSpec: "spec", Converted: "converted"}.get(type(model), type(model).__name__)
    return _Own(brought("the model", model, shape), named)


def _input_shape(data: str | Path | Dataset, declared: Mapping[str, Any]) -> tuple[int, ...]:
    if isinstance(data, Dataset):
        return tuple(data.input_shape)
    return tuple(load_source(str(data), declared=Declared(**declared)).input_shape)


def _name(data: str | Path | Dataset) -> str:
    return data.name if isinstance(data, Dataset) else str(data)


def _how(
    data: str | Path | Dataset | None, say: Callable[[str], object] | None, watch: OnRound
) -> How:
    def tell(line: str) -> None:
        if say is None:
            Console(stderr=True).print(
                printable(line), style="yellow", highlight=False, markup=False, soft_wrap=True
            )
        else:
            say(line)

    how = How(watch, tell, interruptible=True)
    if isinstance(data, Dataset):
        return How(watch, tell, load=lambda _: data, interruptible=True)
    return how


def _watch(
    log: list[dict[str, Any]], on_round: OnRound | None, say: Callable[[str], object] | None
) -> OnRound:
    def watch(entry: dict[str, Any]) -> object:
        log.append(entry)
        return None if on_round is None else on_round(entry)

    # whoever takes the lines in hand has the entries, too
    return with_refusals(watch, Console(stderr=True)) if say is None else watch


@contextmanager
def _report(folder: Path | None) -> Iterator[None]:
    """Its page, also of a run that cannot go on."""
    try:
        yield
    except (RunFailed, ClientError):
        if folder is not None:
            write_report(folder)
        raise
    if folder is not None:
        write_report(folder)
