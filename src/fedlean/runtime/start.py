"""The model that a run starts from: drawn by its seed, or one that there is already.

One that was given is copied into the run folder, so that the run can be resumed wherever the
original has gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from fedlean.core import Model, Params, derive_seed
from fedlean.jsonfile import read_json
from fedlean.models.initialise import INIT_SCHEMES, check_params, init_params
from fedlean.pruning.density import density
from fedlean.runtime.config import RunConfig
from fedlean.runtime.modelfile import check_values, read_model, write_model
from fedlean.spec import ModelSpec
from fedlean.tree import apply_mask

NAME = "start.safetensors"  # of the copy in the run folder

Weights = Literal["trained", "original", "random"]


def first_model(config: RunConfig, spec: ModelSpec, own: Model | None = None) -> Model:
    """As `config` says: its own draw, or the model of `config.start` with `config.start_weights`.

    own: the weights that the run's model has by itself, in the place of a draw.

    Raises ValueError saying what is missing in the folder or the file, or does not fit.
    """
    check_weights(config)
    if not config.start:
        return own or Model(spec, init_params(spec, config.seed, config.init))
    path = Path(config.start)
    if path.is_file():
        if config.start_weights == "original":
            raise ValueError(
                f"--start {path} is a file, which does not say what its training began with: "
                "give the folder of the run for --start-weights original"
            )
        model = read_model(path, spec)
        seed, init = config.seed, config.init
    else:
        model, seed, init = _finished(path, spec)
    if config.start_weights == "trained":
        return model
    if config.start_weights == "random":
        seed, init = derive_seed(config.seed, 0, 0, "initialise anew"), config.init
    return replace(model, params=apply_mask(init_params(spec, seed, init), model.masks))


def check_weights(config: RunConfig) -> None:
    """Raises ValueError for `start_weights` that there are not, or without a start."""
    if config.start_weights not in get_args(Weights):
        raise ValueError(
            f"start_weights must be one of {', '.join(get_args(Weights))}, got "
            f"{config.start_weights!r:.40}"
        )
    if not config.start and config.start_weights != "trained":
        raise ValueError(
            f"--start-weights {config.start_weights} needs --start, the folder of a finished run"
        )


def given_model(model: Model, spec: ModelSpec) -> Model:
    """One from the caller's memory, checked.  Raises ValueError where it is none of `spec`."""
    if model.spec.hash != spec.hash:
        raise ValueError(
            "the model to start from is another one than the run's: it must be of the same spec"
        )
    check_params(spec, model.params)
    check_values(model.params)
    return replace(model, params=apply_mask(model.params, model.masks))


def about_start(config: RunConfig, model: Model, source: str) -> str:
    """Where the run starts from, in a line; "" where its seed says it all.

    source: what its first model is, where `config` does not say it.
    """
    if not source and not config.start:
        return ""
    source = source or f"{config.start}, {config.start_weights} weights"
    held = f"{density(model.masks):.1%} of the prunable weights" if model.masks else "all weights"
    return f"starts from {source}: {held}"


def keep(folder: Path, model: Model, rest: Params) -> None:
    """Copies a given model into the run folder; rest: what a user's module has beside it."""
    write_model(folder / NAME, model, rest=rest)


def was_given(folder: Path, config: RunConfig) -> bool:
    """Whether a run that has begun started from a model that there was."""
    return bool(config.start) or (folder / NAME).is_file()


def kept(folder: Path, config: RunConfig, spec: ModelSpec) -> Model:
    """The first model of a run that has begun."""
    path = folder / NAME
    return read_model(path, spec) if path.is_file() else first_model(config, spec)


class _Finished(NamedTuple):
    model: Model
    seed: int
    init: str


def _finished(folder: Path, spec: ModelSpec) -> _Finished:
    """What the finished run in `folder` left, whose model must be `spec`."""
    for name, remedy in (
        ("config.json", "give the folder that its --out named, or a .safetensors file"),
        ("model.safetensors", f"finish it with 'fedlean resume {folder}'"),
    ):
        if not (folder / name).is_file():
            raise ValueError(
                f"--start {folder} is not the folder of a finished run, it has no {name}: {remedy}"
            )
    seed, init, trained = _read_config(folder / "config.json")
    if trained.hash != spec.hash:
        raise ValueError(
            f"--start: the run in {folder} trained another model than this run's: take the same "
            "--model and a data set of the same shape and classes"
        )
    return _Finished(read_model(folder / "model.safetensors", spec), seed, init)


def _read_config(path: Path) -> tuple[int, str, ModelSpec]:
    """Seed, way of drawing the first weights, and model of a run."""
    try:
        document: Mapping[str, Any] = read_json(path)
        spec = ModelSpec.from_json(json.dumps(document["spec"]))
        init = document.get("init", "pytorch")  # early runs do not name it
        if init not in INIT_SCHEMES:
            raise ValueError(f"init is {init!r:.40}")
        if not isinstance(document["seed"], int):
            raise TypeError(f"seed is {document['seed']!r:.40}")
        return document["seed"], init, spec
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
