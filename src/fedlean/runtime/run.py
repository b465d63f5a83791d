"""A run: from its configuration to its folder (docs/run-folder.md).

`start` and `resume` meet in `_go`.  Everything that decides the result is in `config.json`; what is
lost when the process is killed is the work since the last checkpoint, which is done again with the
same outcome, bit for bit.
"""

from __future__ import annotations

import json
import math
import platform
import time
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

import fedlean
from fedlean.core import FederatedAlgorithm, Params, Server
from fedlean.cost.profile import (
    Profile,
    from_document,
    load_profile,
    other_model,
    to_document,
)
from fedlean.data.batches import ClientData, test_subset
from fedlean.data.dataset import Dataset, with_inputs
from fedlean.data.load import load_dataset
from fedlean.data.partition import partition
from fedlean.engine.open import engine_for
from fedlean.engine.protocol import Engine
from fedlean.models.catalog import build as build_model
from fedlean.models.initialise import INIT_SCHEMES, init_params
from fedlean.pruning.density import density
from fedlean.pruning.units import dead_units
from fedlean.runtime.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    state_tree,
    write_atomically,
)
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.evaluate import Evaluate, evaluator
from fedlean.runtime.local import Dispatch, LocalDispatch
from fedlean.runtime.method import Settings, complete
from fedlean.runtime.method import build as build_method
from fedlean.runtime.rounds import Progress, StepRecord, run_rounds
from fedlean.runtime.runlog import RunLog, Totals, held_masks, log_entry

FORMAT = 1  # of the run folder
CHECKPOINT_SECONDS = (5.0, 60.0)  # between two of them, at least and, where they take long, at most
CHECKPOINT_SHARE = 0.005  # of a run's time


@dataclass(frozen=True)
class RunConfig:
    """Everything needed to repeat a run."""

    method: str
    dataset: str = "digits"
    model: str = "lenet300"
    inputs: str = "standardised"
    init: str = "pytorch"
    partition: str = "iid"
    clients: int = 10
    rounds: int = 100
    seed: int = 0
    engine: str | None = None  # None: native where it can; a run folder names the one that ran
    threads: int = 1
    device: str = "raspberry_pi_4"
    target_accuracy: tuple[float, ...] = ()
    eval_every: int = 1
    eval_examples: int | None = None  # of the test set, during the run; None: all
    final_eval_examples: int | None = None  # the same after the last round
    max_update_norm: float | None = None  # of a client's change to the model; more is refused
    settings: Settings = field(default_factory=dict)


Watch = Callable[[dict[str, Any]], None]  # called with every log entry
Say = Callable[[str], None]  # called with a line that is worth knowing


@dataclass(frozen=True)
class Parts:
    """What a dispatch is made of."""

    config: RunConfig
    server: Server
    algorithm: FederatedAlgorithm
    dataset: Dataset


Connect = Callable[[Parts], Dispatch]
Load = Callable[[str], Dataset]


def in_process(parts: Parts) -> Dispatch:
    """The clients are in this process and share the data set out among them."""
    config, dataset = parts.config, parts.dataset
    shares = partition(config.partition, dataset, config.clients, config.seed)
    data = [ClientData(dataset, indices) for indices in shares]
    return LocalDispatch(parts.algorithm.client_update, parts.server.engine, data)


@dataclass(frozen=True)
class _Run:
    """A configured run, ready to go."""

    config: RunConfig
    folder: Path
    dataset: Dataset
    server: Server
    algorithm: FederatedAlgorithm
    dispatch: Dispatch
    checkpoint_seconds: float | None
    evaluate: Evaluate


def start(
    config: RunConfig,
    folder: Path,
    watch: Watch,
    say: Say = lambda line: None,
    *,
    connect: Connect = in_process,
    load: Load = load_dataset,
    checkpoint_seconds: float | None = None,
) -> dict[str, Any]:
    """Runs to the end; the summary.  `say` gets why the native engine does not serve.

    `connect` makes the dispatch to the clients; `load` the data set of a name (a recipe's keeps it
    for the next run); `checkpoint_seconds` pass between checkpoints (0: one after every step); by
    default 5, or what keeps them to half a percent of the time, up to 60.
    Raises ValueError before anything is written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    # a kill before config.json was whole leaves its .tmp only: nothing was done yet
    if folder.exists() and any(path.name != "config.json.tmp" for path in folder.iterdir()):
        what = "already holds a run" if (folder / "config.json").is_file() else "is not empty"
        raise ValueError(
            f"--out {folder} {what}: name another folder, or continue with "
            f"'fedlean resume {folder}'"
        )
    profile = load_profile(config.device)
    if config.settings.get("masks_from"):  # a folder, which `resume` must find from anywhere
        masks_from = str(Path(str(config.settings["masks_from"])).expanduser().resolve())
        config = replace(config, settings={**config.settings, "masks_from": masks_from})
    run = _prepare(config, folder, say, profile, connect, load, checkpoint_seconds)
    state = run.algorithm.init(_first_model(run))
    folder.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, **asdict(run.config)}
    document["environment"] = environment(run.server.engine)
    document["spec"] = json.loads(run.server.spec.to_json())
    document["profile"] = to_document(run.server.device)  # its file may change or go
    write_atomically(folder / "config.json", json.dumps(document, indent=1).encode())
    return _go(
        run, Progress(state, ClientStore()), Totals(), RunLog(folder / "rounds.jsonl"), watch
    )


def resume(
    folder: Path,
    watch: Watch,
    say: Say,
    *,
    connect: Connect = in_process,
    load: Load = load_dataset,
    checkpoint_seconds: float | None = None,
) -> dict[str, Any]:
    """Continues from the newest whole checkpoint on the run's engine, bit for bit.

    Raises ValueError when the folder holds no run or its files are damaged.
    """
    config = read_config(folder)
    document = json.loads((folder / "config.json").read_bytes())
    profile = _recorded_profile(folder, document)
    run = _prepare(config, folder, say, profile, connect, load, checkpoint_seconds)
    if document["environment"] != environment(run.server.engine):
        say("made with other versions or on another machine: the last bits may differ")
    initial = run.algorithm.init(_first_model(run))
    if not any((folder / "checkpoint").glob("*.json")):
        say("no checkpoint yet: starting from the beginning")
        progress, totals, log_bytes = Progress(initial, ClientStore()), Totals(), 0
    else:
        tree, skipped = load_checkpoint(folder / "checkpoint")
        for line in skipped:
            say(line)
        state = type(initial)(**tree["state"])
        progress = Progress(state, ClientStore(tree["store"]), tree["step"], tree["empty_steps"])
        totals, log_bytes = Totals(**tree["totals"]), tree["log_bytes"]
        run.dispatch.restore({int(k): v for k, v in tree["clients"].items()})
        say(f"continuing after step {progress.step}, round {state.round} of {config.rounds}")
    return _go(run, progress, totals, RunLog(folder / "rounds.jsonl", keep_bytes=log_bytes), watch)


def _first_model(run: _Run) -> Params:
    return init_params(run.server.spec, run.config.seed, run.config.init)


def read_config(folder: Path) -> RunConfig:
    """Raises ValueError when the folder holds no run of this format."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: {path} does not exist")
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict):
            raise TypeError(f"expected an object, got {type(document).__name__}")
        if document.pop("format") != FORMAT:
            raise ValueError(
                f"{path} has another format than {FORMAT}: use the version that wrote it"
            )
        del document["environment"], document["spec"]
        document.pop("profile", None)  # `resume` reads it; early runs have none
        document["target_accuracy"] = tuple(document["target_accuracy"])
        return _typed(RunConfig(**document))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def differences(config: RunConfig, written: RunConfig) -> list[str]:
    """Fields in which the run of a folder is another one than `config`; [] for the same.

    A configuration that names no engine takes the run of any; of a setting that is left out, the
    method's default counts.
    """
    config = replace(config, engine=config.engine or written.engine)
    one, other = (
        {**vars(each), "settings": complete(each.method, each.settings)}
        for each in (config, written)
    )
    return [name for name in one if one[name] != other[name]]


def _recorded_profile(folder: Path, document: dict[str, Any]) -> Profile:
    """The device profile that the run began with; of an early run, the one of that name."""
    if "profile" not in document:
        return load_profile(document["device"])
    try:
        return from_document(document["profile"])
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: profile: {error}") from None


def _typed(config: RunConfig) -> RunConfig:
    """Raises TypeError naming the first value of another type than declared."""
    for name, hint in typing.get_type_hints(RunConfig).items():
        value = getattr(config, name)
        wanted = typing.get_origin(hint) or hint
        if isinstance(value, bool) or not isinstance(
            value, wanted if wanted is not types.UnionType else hint
        ):
            raise TypeError(f"{name} is {value!r}")
    if not all(type(target) in (int, float) for target in config.target_accuracy):
        raise TypeError(f"target_accuracy is {config.target_accuracy!r}")
    return config


def environment(engine: Engine) -> dict[str, Any]:
    """Where the run was made, and by what: results are bit-equal only on the same of all these.

    Of threads, too, with the torch engine; the native engine gives the same bits at any number.
    """
    versions = {"fedlean": fedlean.__version__, "python": platform.python_version()}
    for package in ("numpy", "torch") if engine.name == "torch" else ("numpy",):
        versions[package] = metadata.version(package)
    where = {"machine": platform.machine(), "system": platform.system()}
    return {
        **versions,
        **where,
        "engine": engine.name,
        "instruction_set": engine.instruction_set,
    }


def _check(config: RunConfig) -> None:
    for name in ("clients", "rounds", "threads", "eval_every"):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in ("eval_examples", "final_eval_examples"):
        examples = getattr(config, name)
        if examples is not None and examples < 1:
            raise ValueError(f"{name} must be at least 1, got {examples}")
    if config.max_update_norm is not None and not 0 < config.max_update_norm < math.inf:
        raise ValueError(f"max_update_norm must be positive, got {config.max_update_norm}")
    if config.init not in INIT_SCHEMES:
        raise ValueError(f"init must be one of {', '.join(INIT_SCHEMES)}, got {config.init!r}")
    for target in config.target_accuracy:
        if not 0 < target < 1 or not math.isfinite(target):
            raise ValueError(f"target accuracy must lie in (0, 1), got {target}")
    cohort = config.settings.get("cohort")
    if isinstance(cohort, int) and not 1 <= cohort <= config.clients:
        raise ValueError(
            f"a cohort of {cohort} cannot be drawn from {config.clients} clients: "
            f"choose --cohort from 1 to {config.clients}"
        )
    for name in ("initial_client", "warmup_client"):
        client = config.settings.get(name)
        if isinstance(client, int) and not 0 <= client < config.clients:
            raise ValueError(f"{name} must be from 0 to {config.clients - 1}, got {client}")


def _prepare(
    config: RunConfig,
    folder: Path,
    say: Say,
    profile: Profile,
    connect: Connect,
    load: Load,
    checkpoint_seconds: float | None,
) -> _Run:
    """Everything that can be wrong is found here, before anything is written or trained."""
    _check(config)
    dataset = with_inputs(load(config.dataset), config.inputs)
    spec = build_model(config.model, dataset.input_shape, dataset.classes)
    engine, why_not_native = engine_for(spec, config.engine, config.threads)
    if why_not_native:
        say(why_not_native)
    if line := other_model(profile, spec):
        say(line)
    server = Server(spec, engine, config.seed, config.rounds, profile, config.init)
    algorithm = build_method(config.method, server, config.settings)
    # defaults may change, and with them what the same settings mean: the folder names all
    config = replace(config, engine=engine.name, settings=complete(config.method, config.settings))
    during, final = (
        test_subset(dataset, examples) if examples else None
        for examples in (config.eval_examples, config.final_eval_examples)
    )
    return _Run(
        config,
        folder,
        dataset,
        server,
        algorithm,
        connect(Parts(config, server, algorithm, dataset)),
        checkpoint_seconds,
        evaluator(spec, engine, dataset, during, final),
    )


def _go(run: _Run, progress: Progress, totals: Totals, log: RunLog, watch: Watch) -> dict[str, Any]:
    config = run.config
    book = _Book(totals, progress.state.params, _pause_seconds(run, 0.0))

    def after_step(progress: Progress, record: StepRecord, last: bool) -> None:
        state = progress.state
        book.totals = book.totals.after(record, config.clients)
        due = state.round % config.eval_every == 0 or last
        moved = state.params is not book.params or last  # initial pruning leaves them for long
        score = run.evaluate(state.params, state.masks, last) if due and moved else None
        book.params = state.params
        if score is not None:
            book.totals = book.totals.scored(state.round, score.accuracy, config.target_accuracy)
        entry = log_entry(
            round=state.round,
            phase=record.tasks[0].phase if record.tasks else state.phase,
            record=record,
            totals=book.totals,
            clients=config.clients,
            score=score,
            spec=run.server.spec,
            masks=state.masks,
        )
        log.append(entry)
        book.last_entry = entry
        began = time.monotonic()
        if last or began - book.saved_at >= book.pause_seconds:
            _checkpoint(run, progress, book.totals, log.sync())
            book.saved_at = time.monotonic()
            book.pause_seconds = _pause_seconds(run, book.saved_at - began)
        watch(entry)

    try:
        progress = run_rounds(
            run.algorithm,
            progress,
            server=run.server,
            dispatch=run.dispatch,
            after_step=after_step,
            max_update_norm=config.max_update_norm,
        )
    finally:
        log.close()
    return _finish(run, progress, book)


@dataclass
class _Book:
    """What `after_step` keeps between steps."""

    totals: Totals
    params: Params  # of the step before
    pause_seconds: float  # between the last checkpoint and the next
    last_entry: dict[str, Any] | None = None
    saved_at: float = field(default_factory=time.monotonic)


def _pause_seconds(run: _Run, took_seconds: float) -> float:
    if run.checkpoint_seconds is not None:
        return run.checkpoint_seconds
    least, most = CHECKPOINT_SECONDS
    return min(max(least, took_seconds / CHECKPOINT_SHARE), most)


def _checkpoint(run: _Run, progress: Progress, totals: Totals, log_bytes: int) -> None:
    clients = {str(client): dict(s) for client, s in run.dispatch.client_states().items()}
    tree = {
        "step": progress.step,
        "empty_steps": progress.empty_steps,
        "state": state_tree(progress.state),
        "store": progress.store.to_tree(),
        "clients": clients,
        "totals": asdict(totals),
        "log_bytes": log_bytes,
    }
    save_checkpoint(run.folder / "checkpoint", progress.step, tree)


def _finish(run: _Run, progress: Progress, book: _Book) -> dict[str, Any]:
    state, config, totals = progress.state, run.config, book.totals
    tensors = {name: np.ascontiguousarray(value) for name, value in state.params.items()}
    masks = {f"{name}.mask": mask.astype(np.uint8) for name, mask in state.masks.items()}
    write_atomically(run.folder / "model.safetensors", save({**tensors, **masks}))
    final = book.last_entry["accuracy"] if book.last_entry else None
    if final is None:  # resumed after the last step
        final = run.evaluate(state.params, state.masks, True).accuracy
    targets = {f"{t:g}": totals.targets.get(f"{t:g}") for t in config.target_accuracy}
    summary = {
        "method": config.method,
        "dataset": config.dataset,
        "model": config.model,
        "partition": config.partition,
        "clients": config.clients,
        "cohort": config.settings.get("cohort") or config.clients,
        "rounds": state.round,
        "seed": config.seed,
        "engine": config.engine,
        "device": config.device,
        "arithmetic": run.server.engine.arithmetic,
        "final_accuracy": final,
        "best_accuracy": max(totals.best_accuracy, final),
        "density": density(held_masks(run.server.spec, state.masks)),
        "dead_units": {
            name: {"outputs": rows, "inputs": columns}
            for name, (rows, columns) in dead_units(state.masks).items()
        },
        "downlink_bytes": totals.downlink_bytes,
        "uplink_bytes": totals.uplink_bytes,
        "flops_per_client": totals.flops_per_client,
        "flops_dense_gradient_per_client": totals.flops_dense_gradient_per_client,
        "simulated_seconds": totals.simulated_seconds,
        "measured_seconds": totals.measured_seconds,
        "wall_seconds": totals.wall_seconds,
        "peak_memory_bytes": totals.peak_memory_bytes,
        "time_to_accuracy": targets,
    }
    write_atomically(run.folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary
