"""A run: from its configuration to its folder (docs/run-folder.md), or to a record in memory.

`begin` and `go_on` meet in `_go`; `start` and `resume` are these with a summary as their result.
Everything that decides the result is in `config.json`; what is lost when the process is killed is
the work since the last checkpoint, which is done again with the same outcome, bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.core import Masks, Model, Params
from fedlean.cost.profile import other_model
from fedlean.data.batches import ClientData, own_inputs, test_subset
from fedlean.data.dataset import Dataset, with_inputs
from fedlean.data.load import absolute, load_dataset
from fedlean.engine.open import engine_for
from fedlean.fleet.fleet import Fleet
from fedlean.models.brought import Brought
from fedlean.models.catalog import bring
from fedlean.normalisation import Normalisation
from fedlean.runtime import normalisation
from fedlean.runtime.checkpoint import load_checkpoint, state_tree
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.config import CLIENTS, FORMAT, RunConfig, absolute_file, check
from fedlean.runtime.devices import Devices, load_devices, recorded_devices
from fedlean.runtime.environment import environment
from fedlean.runtime.evaluate import Evaluate, Score, evaluator
from fedlean.runtime.how import How, Parts
from fedlean.runtime.keeper import InFolder, Keeper, Nowhere, read_best
from fedlean.runtime.local import Dispatch, ToDevices
from fedlean.runtime.lock import NAME as LOCK
from fedlean.runtime.lock import Lock, hold
from fedlean.runtime.method import Method, complete, model_of
from fedlean.runtime.method import build as build_method
from fedlean.runtime.modelfile import About, about_from, read_stored
from fedlean.runtime.notices import about_masks, about_model
from fedlean.runtime.outofmemory import memory_for
from fedlean.runtime.personal import check_personalize, personalised
from fedlean.runtime.record import StepRecord
from fedlean.runtime.restored import recorded_round, restored
from fedlean.runtime.rounds import LoopState, run_rounds
from fedlean.runtime.runlog import Totals, log_entry
from fedlean.runtime.samedata import about_data, held_against
from fedlean.runtime.served import class_counts, served
from fedlean.runtime.start import (
    NAME,
    about_start,
    first_model,
    given_model,
    kept,
    was_given,
)
from fedlean.runtime.summary import summary_of
from fedlean.runtime.together import check_classes, check_together
from fedlean.runtime.trust import Named, read_trusted
from fedlean.spec import ModelSpec
from fedlean.tree import read_only
from fedlean.usercode import absolute_code

CHECKPOINT_SECONDS = (5.0, 60.0)  # between two of them, at least and, where they take long, at most
CHECKPOINT_SHARE = 0.005  # of a run's time
UNTESTED = "the server has no test examples: the accuracy is not measured"
_NOTHING = Named()


@dataclass(frozen=True)
class Finished:
    """What a run comes to."""

    summary: dict[str, Any]
    document: dict[str, Any]  # of `config.json`
    model: Model
    best: Model  # of the evaluation with the highest accuracy
    about: About
    interrupted: bool  # by Ctrl-C, where `how` says that it may be


@dataclass(frozen=True)
class _Run:
    """A configured run, ready to go."""

    config: RunConfig
    dataset: Dataset
    server: Server
    algorithm: FederatedAlgorithm
    dispatch: Dispatch
    how: How
    keeper: Keeper
    evaluate: Evaluate
    brought: Brought
    about: About
    notes: list[str]  # what was said at the start
    data_changes: list[dict[str, Any]] = field(default_factory=list)  # that were accepted


def start(
    config: RunConfig, folder: Path, how: How, *, first: Model | None = None
) -> dict[str, Any]:
    """`begin` in a folder; the summary."""
    return begin(config, folder, how, first=first).summary


def begin(
    config: RunConfig,
    folder: Path | None,
    how: How,
    *,
    first: Model | None = None,
    model: Brought | None = None,
    method: Method | None = None,
) -> Finished:
    """Runs to the end; without a folder nothing is written.

    `first` is a model to start from, instead of the config's.  model, method: what the config only
    has a word for, where the caller has it.  Checkpoints are at least 5 s apart, or what keeps them
    to half a percent of the time, up to 60, where `how` does not say.  Raises ValueError, and
    leaves nothing behind, when something is wrong with the configuration, the data, the model or
    the folder.
    """
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    with _held(folder, how) as lock:
        if folder is not None:
            _refuse_used(folder)
        devices, about_devices = load_devices(config)
        config = _anywhere(config)
        check(config)
        dataset = _load(config, how)
        given = model or _bring(config, dataset)
        begun_with = first is not None or bool(config.start) or given.start is not None
        run = _prepare(
            config,
            folder,
            dataset,
            devices,
            how,
            lock,
            given,
            method,
            given=begun_with,
            known=normalisation.is_known(dataset, config),
        )
        spec, source = run.server.spec, ""
        if first is not None:
            begun, source = given_model(first, spec), "a given model"
        else:
            own = None if given.start is None else given_model(given.start, spec)
            begun = first_model(run.config, spec, own)
            if own is not None and not config.start:
                source = f"the weights of {config.model}"
        begun = _fixed(begun)
        state = run.algorithm.init(begun)
        if line := about_start(run.config, begun, source):
            how.say(line)
            run.notes.append(line)
        document = {"format": FORMAT, **asdict(run.config)}
        document["environment"] = environment(run.server.engine)
        document["spec"] = json.loads(run.server.spec.to_json())
        document |= about_devices
        document["data"] = about_data(run.dataset)
        told = run.about.to_json()
        document |= {key: told[key] for key in ("tensor_names", "normalisation")}
        document["given_model"] = model is not None
        document["notes"] = run.notes
        rest = {} if given.names is None else given.names.rest
        run.keeper.begin(document, begun if source or config.start else None, rest)
        return _go(run, document, LoopState(state, ClientStore()), Totals(), None)


@contextmanager
def _held(folder: Path | None, how: How) -> Iterator[Lock | None]:
    if folder is None:
        yield None
    else:
        with hold(folder, how.say, shared=how.shared) as lock:
            yield lock


def _bring(config: RunConfig, dataset: Dataset) -> Brought:
    check_classes(dataset)
    return bring(config.model, dataset.input_shape, dataset.classes, config.seed)


def _fixed(model: Model) -> Model:
    """With tensors that nobody can change, so that frozen ones are hashed once."""
    return replace(model, params=read_only(model.params))


def _anywhere(config: RunConfig) -> RunConfig:
    """With absolute paths, so that `resume` finds them from any folder."""
    return replace(
        config,
        method=absolute_code(config.method),
        model=absolute_code(config.model),
        dataset=absolute(config.dataset),
        fleet=None if config.fleet is None else absolute_file(config.fleet),
        start=absolute_file(config.start) if config.start else "",
    )


def _refuse_used(folder: Path) -> None:
    """A kill before config.json was whole leaves a lock and a part of it: nothing was done yet."""
    names = {path.name for path in folder.iterdir()} - {LOCK}
    if any(not (name.startswith("config.json.") and name.endswith(".tmp")) for name in names):
        if not (folder / "config.json").is_file():
            raise ValueError(f"--out {folder} is not empty and holds no run: name another folder")
        raise ValueError(
            f"--out {folder} already holds a run: name another folder, or continue with "
            f"'fedlean resume {folder}'"
        )


def resume(
    folder: Path,
    how: How,
    *,
    dataset: str | None = None,
    accept_changed_data: bool = False,
    named: Named = _NOTHING,
    rounds: int | None = None,
) -> dict[str, Any]:
    """`go_on`; the summary."""
    return go_on(
        folder,
        how,
        dataset=dataset,
        accept_changed_data=accept_changed_data,
        named=named,
        rounds=rounds,
    ).summary


def go_on(
    folder: Path,
    how: How,
    *,
    dataset: str | None = None,
    accept_changed_data: bool = False,
    named: Named = _NOTHING,
    rounds: int | None = None,
    method: Method | None = None,
) -> Finished:
    """Continues from the newest whole checkpoint on the run's engine, bit for bit.

    dataset: where its data set is now, if that has moved.  rounds: more than it was to have, to
    extend it.  method: the function of the folder's method, where the caller has it.  Raises
    ValueError when the folder holds no run or its files are damaged, when it names code that is not
    in `named`, or when the data is not what the run began with, unless `accept_changed_data`: then
    the run is marked.
    """
    read_trusted(folder, named)  # before a lock is made in a folder that holds no run
    with hold(folder, how.say, shared=how.shared) as lock:
        config, document = read_trusted(folder, named)
        config = replace(config, dataset=absolute(dataset or config.dataset))
        config, extension = _extended(config, rounds)
        tree, lines = _newest_checkpoint(folder)
        elsewhere, accept = f"fedlean resume {folder} --dataset FOLDER", "--accept-changed-data"
        if how.shared:
            elsewhere, accept = "dataset='FOLDER' of the app", "accept-changed-data=true of the app"
        loaded = _load(config, how, elsewhere)
        known = normalisation.is_known(loaded, config)
        if not known and (agreed := normalisation.before(loaded, document)):
            loaded, known = agreed, True
        data = held_against(
            document.get("data"),
            loaded,
            round=recorded_round(tree),
            accept_changed=accept_changed_data,
            advice=f"bring it back (if it has moved: {elsewhere}), or go on with what there is and "
            f"have the run marked: {accept}",
        )
        devices, given = recorded_devices(folder, document), was_given(folder, config)
        model = _recorded(folder, document) or _bring(config, loaded)
        run = _prepare(
            config, folder, loaded, devices, how, lock, model, method, given=given, known=known
        )
        run = replace(run, data_changes=data.get("changes", []))
        _refuse_other_model(document, run.server.spec)
        if document["environment"] != environment(run.server.engine):
            lines.append("made with other versions or on another machine: the last bits may differ")
        initial = run.algorithm.init(_fixed(kept(folder, config, run.server.spec)))
        if tree is None:
            progress, totals, log_bytes = LoopState(initial, ClientStore()), Totals(), 0
        else:
            progress, totals, log_bytes, clients = restored(
                folder, tree, initial, run.algorithm, run.server
            )
            run.dispatch.restore(clients)
            round = progress.state.round
            lines.append(f"continuing after step {progress.step}, round {round} of {config.rounds}")
        if extension and run.algorithm.done(progress.state):
            raise ValueError(
                f"{config.method} has ended by its own rule after round {progress.state.round}: "
                "more rounds do not continue it; start a new run with --start"
            )
        for line in lines:
            how.say(line)
        new = {**document, "dataset": config.dataset, "data": data, "rounds": config.rounds}
        if data is not document.get("data"):
            new["normalisation"] = run.about.to_json()["normalisation"]
        new |= {"extensions": [*document.get("extensions", []), extension]} if extension else {}
        run.keeper.go_on(new if new != document else None, log_bytes)
        return _go(run, new, progress, totals, read_best(folder, run.server.spec))


def _extended(config: RunConfig, rounds: int | None) -> tuple[RunConfig, dict[str, int] | None]:
    """The configuration with so many rounds, and what there is to note about it."""
    if rounds is None or rounds == config.rounds:
        return config, None
    if rounds < config.rounds:
        raise ValueError(
            f"--rounds {rounds} is fewer than the {config.rounds} that the run was to have: give "
            "more of them, to extend it"
        )
    longer = replace(config, rounds=rounds)
    check(longer)
    return longer, {"from": config.rounds, "to": rounds}


def _recorded(folder: Path, document: dict[str, Any]) -> Brought | None:
    """The model of a run whose caller had it: of its folder, and no code runs.  None: by name."""
    if not document.get("given_model"):
        return None
    spec = ModelSpec.from_json(json.dumps(document["spec"]))
    begun = folder / NAME
    rest = read_stored(begun, spec).rest if begun.is_file() else {}
    return Brought(spec, names=about_from(document, spec, rest).names)


def _newest_checkpoint(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """What it holds, None where the run had none yet; and what there is to say about it."""
    if not any((folder / "checkpoint").glob("*.json")):
        return None, ["no checkpoint yet: starting from the beginning"]
    return load_checkpoint(folder / "checkpoint")


def _refuse_other_model(document: dict[str, Any], spec: ModelSpec) -> None:
    """The user's code, or a data set of another shape that was accepted, may give another one."""
    if ModelSpec.from_json(json.dumps(document["spec"])).hash != spec.hash:
        raise ValueError(
            f"model {document['model']!r} is not the one that the run began with (see 'spec' in "
            "its config.json): bring that one and its data back, or start a new run"
        )


def _prepare(
    config: RunConfig,
    folder: Path | None,
    dataset: Dataset,
    devices: Devices,
    how: How,
    lock: Lock | None,
    model: Brought,
    method: Method | None,
    *,
    given: bool,
    known: bool,
) -> _Run:
    """Everything that can be wrong is found here, before anything is written or trained.

    known: what inputs are normalised by; else the clients are asked.
    """
    profile, fleet = devices
    config = replace(config, clients=config.clients or _clients(config, dataset, fleet))
    check(config)
    devices.check(config.num_clients)
    check_classes(dataset)
    spec = model.spec
    check_together(spec, dataset, config.model)
    data, tested = normalisation.Normalised(dataset), len(dataset.y_test) > 0
    with memory_for(f"the model {config.model!r}", lambda: 4 * spec.num_params):
        engine, why_not_native = engine_for(spec, config.engine, config.threads)
    server = Server(
        spec,
        engine,
        config.seed,
        config.rounds,
        profile,
        config.init,
        config.num_clients,
        given,
        # as the data set is once the clients have agreed
        (lambda: own_inputs(data.dataset)) if tested else None,
    )
    algorithm = build_method(config.method, server, config.settings, method)
    # defaults may change, and with them what the same settings mean: the folder names all
    settings = complete(config.method, config.settings, method)
    config = replace(config, engine=engine.name, settings=settings)
    check_personalize(config.method, config.settings, config.personalize or 0)
    during, final = (
        test_subset(dataset, examples) if examples and tested else None
        for examples in (config.eval_examples, config.final_eval_examples)
    )
    rest = {} if model.names is None else model.names.rest
    keeper = Nowhere() if folder is None or lock is None else InFolder(folder, lock, spec, rest)
    parts = Parts(config, server, algorithm, dataset, keeper.check, how.say, fleet)
    dispatch, about_clients = how.connect(parts)
    if not known:
        about_clients = [*about_clients, *data.agree(dispatch)]
        dataset = data.dataset
    notes = [why_not_native, other_model(profile, spec), *about_model(spec, dataset)]
    notes += dataset.notes if tested else [*dataset.notes, UNTESTED]
    said = [line for line in [*notes, *about_clients] if line]
    for line in said:
        how.say(line)
    return _Run(
        config,
        dataset,
        server,
        algorithm,
        dispatch,
        how,
        keeper,
        evaluator(engine, dataset, during, final),
        model,
        About(
            model.names,
            Normalisation(dataset.mean, dataset.std, dataset.scale),
            tuple(dataset.class_names),
        ),
        said,
    )


def _load(config: RunConfig, how: How, elsewhere: str = "") -> Dataset:
    """elsewhere: the command for a data set that is not where it was."""
    try:
        with memory_for(f"the data set {config.dataset!r}"):
            if how.load is not None:
                dataset = how.load(config.dataset)
            else:
                dataset = load_dataset(config.dataset, config.declared)
            return with_inputs(dataset, config.inputs, config.mean, config.deviation)
    except ValueError as error:
        if not elsewhere:
            raise
        raise ValueError(f"{error}; if it has moved, say where it is: {elsewhere}") from None


def _clients(config: RunConfig, dataset: Dataset, fleet: Fleet | None) -> int:
    if config.partition == "natural" and dataset.clients is not None:
        return len(np.unique(dataset.clients))
    return CLIENTS if fleet is None or fleet.size is None else fleet.size


def _go(
    run: _Run,
    document: dict[str, Any],
    progress: LoopState,
    totals: Totals,
    best: Model | None,
) -> Finished:
    config, keeper, tested = run.config, run.keeper, len(run.dataset.y_test) > 0
    book = _Book(totals, progress, progress.state.params, _pause_seconds(run.how, 0.0), best)

    def after_step(progress: LoopState, record: StepRecord, last: bool) -> bool:
        """Whether to go on."""
        keeper.check()
        state = progress.state
        book.totals = book.totals.after(record, config.num_clients)
        due = state.round % config.eval_every == 0 or last
        model = model_of(run.algorithm, run.server, state)
        moved = state.params is not book.params or last  # initial pruning leaves them for long
        with memory_for("the evaluation of the model"):
            score = run.evaluate(model, last) if due and moved and tested else None
        book.score = score if last else None
        book.params = state.params
        if score is not None:
            if book.best is None or score.accuracy > book.totals.best_accuracy:
                book.best = model
            book.totals = book.totals.scored(state.round, score.accuracy, config.target_accuracy)
        _note_empty_layers(run, book, record, model.masks)
        entry = log_entry(
            round=state.round,
            phase=record.tasks[0].phase if record.tasks else state.phase,
            record=record,
            totals=book.totals,
            clients=config.num_clients,
            score=score,
            model=model,
            whole=run.server.spec,
            reported=run.algorithm.report(state) if run.algorithm.report else {},
        )
        keeper.append(entry)
        book.last_entry, book.progress = entry, progress
        began = time.monotonic()
        saved = last or began - book.saved_at >= book.pause_seconds
        if saved:
            _checkpoint(run, progress, book)
            book.saved_at = time.monotonic()
            book.pause_seconds = _pause_seconds(run.how, book.saved_at - began)
        if run.how.watch(entry) is not False:
            return True
        book.stopped = not last
        if not saved:
            _checkpoint(run, progress, book)
        return False

    interrupted = False
    try:
        progress = run_rounds(
            run.algorithm,
            progress,
            server=run.server,
            dispatch=run.dispatch,
            after_step=after_step,
            max_update_norm=config.max_update_norm,
        )
    except KeyboardInterrupt:
        if not run.how.interruptible:
            raise
        interrupted, progress = True, book.progress
        _checkpoint(run, progress, book)
    finally:
        keeper.close()
    keeper.check()
    return _finish(run, document, progress, book, interrupted=interrupted)


def _note_empty_layers(run: _Run, book: _Book, record: StepRecord, masks: Masks) -> None:
    """Once for the same layers, however often the masks are drawn anew."""
    if masks is book.masks:
        return
    lines = about_masks(masks)
    for line in lines:
        if line not in about_masks(book.masks):
            run.how.say(line)
            record.notes.append(line)
    book.masks = masks


@dataclass
class _Book:
    """What `after_step` keeps between steps."""

    totals: Totals
    progress: LoopState  # after the last whole step
    params: Params  # of the step before
    pause_seconds: float  # between the last checkpoint and the next
    best: Model | None  # of the evaluation with the highest accuracy so far
    masks: Masks = field(default_factory=dict)  # of the step before
    last_entry: dict[str, Any] | None = None
    score: Score | None = None  # of the last step, where it was evaluated
    saved_at: float = field(default_factory=time.monotonic)
    stopped: bool = False  # before its last round


def _pause_seconds(how: How, took_seconds: float) -> float:
    if how.checkpoint_seconds is not None:
        return how.checkpoint_seconds
    least, most = CHECKPOINT_SECONDS
    return min(max(least, took_seconds / CHECKPOINT_SHARE), most)


def _checkpoint(run: _Run, progress: LoopState, book: _Book) -> None:
    clients = {str(client): dict(s) for client, s in run.dispatch.client_states().items()}
    tree = {
        "step": progress.step,
        "empty_steps": progress.empty_steps,
        "refused_steps": progress.refused_steps,
        "moves": asdict(progress.moves),
        "state": state_tree(progress.state),
        "store": progress.store.to_tree(),
        "clients": clients,
        "totals": asdict(book.totals),
    }
    run.keeper.checkpoint(progress.step, tree, book.best)


def _finish(
    run: _Run, document: dict[str, Any], progress: LoopState, book: _Book, *, interrupted: bool
) -> Finished:
    state, config = progress.state, run.config
    model = model_of(run.algorithm, run.server, state)
    early = book.stopped or interrupted  # so that the last evaluation was one during the run
    final = book.last_entry["accuracy"] if book.last_entry else run.keeper.last_accuracy()
    if len(run.dataset.y_test):
        if book.score is None:
            book.score = run.evaluate(model, True)
        if final is None or (early and config.eval_examples):
            final = book.score.accuracy
    held = run.dispatch.held() if isinstance(run.dispatch, ToDevices) else {}
    summary = summary_of(
        config, run.server, state, model, book.totals, final, run.data_changes, held
    )
    if book.score is not None:
        summary |= _whom_it_serves(run, model, book.score)
    best = model if book.best is None else book.best
    run.keeper.finish(model, best, None if interrupted else summary)
    return Finished(summary, document, model, best, run.about, interrupted)


def _whom_it_serves(run: _Run, model: Model, score: Score) -> dict[str, Any]:
    """Errors by class; of clients in this process also what each may expect, and what it gains."""
    here = run.dispatch.clients()
    clients = {client: one for client, one in here.items() if isinstance(one, ClientData)}
    names = run.dataset.class_names
    held = {client: class_counts(one.labels, len(names)) for client, one in clients.items()}
    found: dict[str, Any] = {"served": served(score.confusion, held, names)}
    if run.config.personalize:
        found["personal"] = personalised(
            model,
            clients,
            run.server.engine,
            run.evaluate,
            run.config.settings,
            steps=run.config.personalize,
            seed=run.config.seed,
        )
    return found
