"""What a run was told: its configuration, and `config.json` that holds it (docs/run-folder.md)."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from sys import float_info
from typing import Any

from fedlean.data.declared import Declared
from fedlean.data.load import absolute
from fedlean.jsonfile import read_json
from fedlean.models.initialise import INIT_SCHEMES
from fedlean.runtime.checkpoint import write_atomically
from fedlean.runtime.method import Settings, complete
from fedlean.runtime.older import in_todays_words
from fedlean.usercode import absolute_code

FORMAT = 1  # of the run folder
CLIENTS = 10  # where nothing says how many
_MOST = {  # far beyond what a machine can do, so that no sum of them is beyond what it can count
    "length": 1 << 31,
    "clients": 1 << 24,
    "rounds": 1 << 31,
    "threads": 1024,
    "eval_every": 1 << 31,
    "eval_examples": 1 << 31,
    "final_eval_examples": 1 << 31,
    "personalize": 1 << 31,
}
LISTS = {"target_accuracy", "mean", "deviation"}
MAX_SEED = (1 << 63) - 1
_BESIDE = (  # the run's, not its user's
    "format",
    "environment",
    "spec",
    "profile",
    "fleet_content",
    "data",
    "notes",
    "tensor_names",
    "normalisation",
    "given_model",
    "extensions",
)


def setting(default: Any, help: str) -> Any:
    """A field that a user sets by its name, on the command line and in a Flower app.

    help: what `fedlean run --help` says.  The field's type says how text is read.
    """
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """Everything needed to repeat a run: the one table of what a run is told."""

    method: str
    dataset: str = setting("digits", "digits, or a folder (see 'fedlean datasets')")
    model: str = setting(
        "lenet300",
        "a name from 'fedlean models', with its options as resnet18,norm=batch; or your own, as "
        "FILE.py:function or package.module:function",
    )
    inputs: str = setting(
        "standardised",
        "standardised (mean 0, deviation 1 per channel) or unit (0 to 1, as stored)",
    )
    mean: tuple[float, ...] = setting(
        (), "with --deviation: what inputs are standardised by, one number or one per channel"
    )
    deviation: tuple[float, ...] = setting((), "see --mean (default: of the training examples)")
    layout: str = setting(
        "", "what the axes of its arrays are: nf, ncl, nlc, nhw, nhwc or nchw (docs/data.md)"
    )
    label: str = setting("", "the column of a table that holds the classes (default: found)")
    length: int | None = setting(None, "samples to which recordings are cut or padded")
    test_share: float = setting(
        0.0, "share of the examples held out for testing, of data that has no test examples"
    )
    init: str = setting(
        "pytorch",
        "how the first weights are drawn: pytorch (its default) or he (deep nets without norms)",
    )
    partition: str = setting("iid", "iid, dirichlet:A[:MINIMUM], natural or shards:K")
    clients: int | None = setting(
        None, "devices in the federation (default: 10; natural: one per client id of the data)"
    )
    rounds: int = setting(100, "training rounds")
    seed: int = setting(0, "everything random follows from it")
    # a run folder names the one that ran
    engine: str | None = setting(
        None, "native or torch (default: native, or torch where native is missing or lacks a layer)"
    )
    threads: int = setting(
        1, "threads of the engine; torch gives the same bits only at the same number, native at any"
    )
    device: str = setting(
        "raspberry_pi_4",
        "profile of the emulated devices, from 'fedlean devices' or a file of 'fedlean profile'",
    )
    fleet: str | None = setting(
        None, "a file that says what each device has, round by round (docs/fleets.md)"
    )
    target_accuracy: tuple[float, ...] = setting((), "accuracies in (0, 1) whose cost is reported")
    eval_every: int = setting(1, "rounds between evaluations")
    eval_examples: int | None = setting(
        None, "test examples used during the run (default: all; the last round takes all)"
    )
    final_eval_examples: int | None = None  # the same after the last round; for recipes
    personalize: int | None = setting(
        None,
        "steps that each client then trains the finished model for itself; the page says what that "
        "gains it (default: none)",
    )
    # 0: no bound; None: the clients' own (`moves`)
    max_update_norm: float | None = setting(
        None,
        "refuse an update that moves the model by more (Euclidean norm), or off (default: 50 times "
        "the clients' median)",
    )
    start: str = setting(
        "",
        "folder of a finished run or a .safetensors file, whose weights and masks to start from",
    )
    start_weights: str = setting(
        "trained",
        "with its masks: trained, its weights; original, those it began with; random, new ones",
    )
    settings: Settings = field(default_factory=dict)

    @property
    def declared(self) -> Declared:
        """What the user says about the data set.  Raises ValueError where it makes no sense."""
        return Declared(self.layout, self.label, self.length, self.test_share)

    @property
    def num_clients(self) -> int:
        """`clients`, which every run that has begun names."""
        return self.clients or CLIENTS


def write_document(folder: Path, document: dict[str, Any]) -> None:
    """Writes `config.json`."""
    write_atomically(folder / "config.json", json.dumps(document, indent=1).encode())


def read_config(folder: Path) -> RunConfig:
    """Raises ValueError when the folder holds no run of this format."""
    return read_document(folder)[0]


def read_document(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration, and the whole of `config.json`.

    Raises ValueError when the folder holds no run of this format.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: {path} does not exist")
    try:
        document = read_json(path)
        if not isinstance(document, dict):
            raise TypeError(f"expected an object, got {type(document).__name__}")
        written = document["format"]
        own = {name: value for name, value in document.items() if name not in _BESIDE}
        if written == FORMAT:
            for name in LISTS & own.keys():
                own[name] = tuple(own[name])
            for name in ("environment", "spec"):
                if not isinstance(document[name], dict):
                    raise TypeError(f"{name} is a {type(document[name]).__name__}")
            config = checked_types(RunConfig(**in_todays_words(own)))
            check(config)
            return config, document
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    raise ValueError(f"{path} has another format than {FORMAT}: use the version that wrote it")


def differences(config: RunConfig, written: RunConfig) -> list[str]:
    """Fields in which the run of a folder is another one than `config`; [] for the same.

    A configuration that names no engine takes the run of any, and a natural partition or a fleet
    without a number of clients that of any number; of a setting that is left out, the method's
    default counts.  Folders of data and fleets are compared by where they are, not by how they were
    written.
    """
    if written.method != absolute_code(config.method):
        return ["method"]  # whatever its settings mean: another's code is not asked
    written = replace(written, clients=written.num_clients)
    open_number = config.partition == "natural" or config.fleet is not None
    clients = config.clients or (written.clients if open_number else CLIENTS)
    config = replace(config, engine=config.engine or written.engine, clients=clients)
    one, other = (
        {
            **vars(each),
            "settings": complete(each.method, each.settings),
            "dataset": absolute(each.dataset),
            "model": absolute_code(each.model),
            "fleet": None if each.fleet is None else absolute_file(each.fleet),
        }
        for each in (config, written)
    )
    return [name for name in one if one[name] != other[name]]


def absolute_file(name: str) -> str:
    """`name` as an absolute path, `~` expanded."""
    return str(Path(os.path.expanduser(name)).resolve())  # noqa: PTH111 - Path's raises


def checked_types(config: RunConfig) -> RunConfig:
    """Raises TypeError naming the first value of another type than declared."""
    for name, hint in typing.get_type_hints(RunConfig).items():
        if not _is_a(getattr(config, name), hint):
            raise TypeError(f"{name} is {getattr(config, name)!r:.60}")
    for name in LISTS:
        if not all(_is_a(value, float) for value in getattr(config, name)):
            raise TypeError(f"{name} is {getattr(config, name)!r:.60}")
    for name, value in config.settings.items():
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"the setting {name!r:.60} is {value!r:.60}")
    return config


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is what a field declares; a whole number is a float, too."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds and int not in kinds:
        return abs(value) <= float_info.max
    return isinstance(value, kinds)


def user_settings() -> dict[str, Field[Any]]:
    """The fields that a user sets by name, in their order."""
    return {each.name: each for each in fields(RunConfig) if "help" in each.metadata}


def max_update_norm(text: str) -> float:
    """A user's bound: a positive number, or "off", which a configuration calls 0.

    Raises ValueError for anything else, 0 among it: it might mean either end.
    """
    if text == "off":
        return 0.0
    try:
        norm = float(text)
    except ValueError:
        norm = 0.0
    if not 0 < norm < math.inf:
        raise ValueError(f"expected a positive number, or off for no bound, got {text!r:.40}")
    return norm


def check(config: RunConfig) -> None:
    """Raises ValueError naming the first value that makes no sense; `clients` may be open."""
    for name, most in _MOST.items():
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r:.40}")
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {value!r:.40}")
    _ = config.declared  # which checks itself
    if abs(config.seed) > MAX_SEED:
        raise ValueError(f"seed must be from {-MAX_SEED} to {MAX_SEED}, got {config.seed!r:.40}")
    if config.max_update_norm is not None and not 0 <= config.max_update_norm < math.inf:
        raise ValueError(
            f"max_update_norm must be positive, or 0 for no bound, got {config.max_update_norm}"
        )
    if config.init not in INIT_SCHEMES:
        raise ValueError(f"init must be one of {', '.join(INIT_SCHEMES)}, got {config.init!r}")
    for target in config.target_accuracy:
        if not 0 < target < 1 or not math.isfinite(target):
            raise ValueError(f"target accuracy must lie in (0, 1), got {target}")
