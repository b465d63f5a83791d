"""A run: from its configuration to its folder (docs/run-folder.md), or to a record in memory.

`begin` and `go_on` meet in `going.go`; `start` and `resume` are these with a summary as a result.
Everything that decides the result is in `config.json`; what is lost when the process is killed is
the work since the last checkpoint, which is done again with the same outcome, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedlean.core import Model
from fedlean.data.load import absolute
from fedlean.models.brought import Brought
from fedlean.runtime import normalisation
from fedlean.runtime.checkpoint import load_checkpoint
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.config import FORMAT, RunConfig, absolute_file, check
from fedlean.runtime.devices import load_devices, recorded_devices
from fedlean.runtime.environment import environment
from fedlean.runtime.going import Finished, go
from fedlean.runtime.how import How
from fedlean.runtime.keeper import read_best
from fedlean.runtime.lock import NAME as LOCK
from fedlean.runtime.lock import Lock, hold
from fedlean.runtime.method import Method
from fedlean.runtime.modelfile import about_from, read_stored
from fedlean.runtime.prepared import bring_model, load, prepare
from fedlean.runtime.restored import recorded_round, restored
from fedlean.runtime.rounds import LoopState
from fedlean.runtime.runlog import Totals
from fedlean.runtime.samedata import about_data, held_against
from fedlean.runtime.start import (
    NAME,
    about_start,
    first_model,
    given_model,
    kept,
    was_given,
)
from fedlean.runtime.trust import Named, read_trusted
from fedlean.spec import ModelSpec
from fedlean.tree import read_only
from fedlean.usercode import absolute_code

_NOTHING = Named()


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
        dataset = load(config, how)
        given = model or bring_model(config, dataset)
        begun_with = first is not None or bool(config.start) or given.start is not None
        run = prepare(
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
        return go(run, document, LoopState(state, ClientStore()), Totals(), None)


@contextmanager
def _held(folder: Path | None, how: How) -> Iterator[Lock | None]:
    if folder is None:
        yield None
    else:
        with hold(folder, how.say, shared=how.shared) as lock:
            yield lock


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
        loaded = load(config, how, elsewhere)
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
        model = _recorded(folder, document) or bring_model(config, loaded)
        run = prepare(
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
        return go(run, new, progress, totals, read_best(folder, run.server.spec))


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
