"""What an experiment's recipe calls: run what is missing, resume what was cut, compare.

A recipe names its runs and constants; everything else is the library's ordinary way of running, so
a single run of a recipe can be repeated with `fedlean run` from its `config.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from fedlean.core import Scalar
from fedlean.cost.profile import load_profile, to_document
from fedlean.data.dataset import Dataset
from fedlean.data.declared import Declared
from fedlean.data.load import load_dataset
from fedlean.report.card import (
    card_table,
    clock_table,
    layer_table,
    reported,
    seeds_table,
    targets_table,
    times_table,
)
from fedlean.report.card_plot import write_card_plot
from fedlean.report.console import cost_table
from fedlean.report.page import comparison_page, run_page, write_page
from fedlean.report.run_folder import read_run
from fedlean.runtime import turns
from fedlean.runtime.config import RunConfig, differences, read_config
from fedlean.runtime.how import How
from fedlean.runtime.method import complete
from fedlean.runtime.progress import watch_run
from fedlean.runtime.run import resume, start
from fedlean.runtime.trust import Named

SMOKE_ROUNDS = 3
SMOKE_EXAMPLES = 200
SMOKE_AT_MOST = {  # of the settings of any method
    "cohort": 2,
    "local_steps": 2,
    "reconfigure_every": 2,
    # before the first round
    "initial_batches": 2,
    "initial_passes": 1,
    "initial_max_passes": 2,
    "warmup_steps": 2,
    "synflow_steps": 5,
    "prune_steps": 2,
}


def main(
    groups: Mapping[str, Mapping[str, RunConfig]],
    *,
    default_out: str,
    default_data: str | None = None,
    here: Sequence[str] = (),
    smoke: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Command line of a recipe: each group of runs is compared, its first run the baseline.

    Results go to OUT/<group>/seed<S>/<run>, with --smoke to OUT/smoke/...; what is there already is
    not run again.  Without --data, `default_data` is read.

    here: runs that follow the clock, which --here runs once more with this machine's, as <run>_here
    smoke: the most of further settings with --smoke, beside SMOKE_AT_MOST
    """
    names = list(dict.fromkeys(name for runs in groups.values() for name in runs))
    parser = argparse.ArgumentParser(description=f"Runs {', '.join(names)} and compares them.")
    parser.add_argument(
        "--data",
        required=default_data is None,
        default=default_data,
        help="folder of the data set",
    )
    parser.add_argument("--out", type=Path, default=Path(default_out), help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--groups", nargs="+", choices=list(groups), default=list(groups))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    if here:
        parser.add_argument(
            "--here",
            type=Path,
            metavar="PROFILE",
            help=f"of this machine (`fedlean profile`): {', '.join(here)} once more, for its time",
        )
    parser.add_argument(
        "--in-turns",
        action="store_true",
        help="a step of each run in turn, so that their measured seconds can be compared",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"{SMOKE_ROUNDS} rounds and little before them, to OUT/smoke: to see that it works",
    )
    arguments = parser.parse_args()
    try:
        _run(groups, arguments, here, smoke)
    except ValueError as error:
        parser.error(str(error))


def _run(
    groups: Mapping[str, Mapping[str, RunConfig]],
    arguments: argparse.Namespace,
    here: Sequence[str],
    smoke: Mapping[str, int],
) -> None:
    clock = unlinked(arguments.here, arguments.out) if here and arguments.here else None
    for group in arguments.groups:
        runs = {name: run for name, run in groups[group].items() if name in arguments.only}
        if not runs:  # --only names runs of other groups
            continue
        if clock:
            again = [name for name in here if name in runs]
            runs |= {f"{name}_here": replace(runs[name], device=clock) for name in again}
        out = arguments.out / "smoke" if arguments.smoke else arguments.out
        folders = [out / group / f"seed{seed}" for seed in arguments.seeds]
        for seed, folder in zip(arguments.seeds, folders, strict=True):
            configs = {}
            for name, run in runs.items():
                config = replace(beside(folder, run), seed=seed, dataset=arguments.data)
                configs[name] = short(config, smoke) if arguments.smoke else config
            run_all(configs, folder, in_turns=arguments.in_turns)
            compare([folder / name for name in runs], folder)
        compare_seeds(folders, list(runs), out / group, in_turns=arguments.in_turns)


def short(config: RunConfig, most: Mapping[str, int] = MappingProxyType({})) -> RunConfig:
    """A version of the run that takes seconds, to see that all of it works.

    most: of further settings, beside SMOKE_AT_MOST; as `rounds` those that are needed to see all
    """
    settings = complete(config.method, config.settings)
    if "cohort" in settings:
        settings["cohort"] = settings["cohort"] or config.num_clients
    capped = {
        name: count
        for name, count in {**SMOKE_AT_MOST, **most}.items()
        if _above(settings.get(name), count)
    }
    return replace(
        with_settings(config, **capped),
        rounds=most.get("rounds", SMOKE_ROUNDS),
        eval_examples=SMOKE_EXAMPLES,
        final_eval_examples=SMOKE_EXAMPLES,
    )


def _above(value: Scalar | None, most: int) -> bool:
    return isinstance(value, int) and value > most


def with_settings(config: RunConfig, **settings: Scalar) -> RunConfig:
    """`config` with some of its method's settings replaced or added."""
    return replace(config, settings={**config.settings, **settings})


def unlinked(profile: Path, out: Path) -> str:
    """A copy of `profile` whose link takes no time, as on the wall clock of a simulation."""
    fast = replace(load_profile(str(profile)), uplink_bytes_per_s=1e15, downlink_bytes_per_s=1e15)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "here.json"
    path.write_text(json.dumps(to_document(fast), indent=1) + "\n")
    return str(path.resolve())


def beside(folder: Path, config: RunConfig) -> RunConfig:
    """`start` names another run: its folder of the same group and seed."""
    if not config.start:
        return config
    return replace(config, start=str((folder / config.start).resolve()))


def run_all(configs: Mapping[str, RunConfig], folder: Path, *, in_turns: bool = False) -> None:
    """Each run in its folder of `folder`, one after the other or a step of each in turn.

    Raises ValueError when runs in turns would need each other's results.
    """
    if not in_turns:
        for name, config in configs.items():
            run_once(config, folder / name)
        return
    for name, config in configs.items():
        if config.start:
            raise ValueError(
                f"{name} starts from another run, which cannot go beside it with "
                "--in-turns: leave it out with --only"
            )

    def run(name: str) -> Callable[[turns.Pass], None]:
        return lambda hand_on: run_once(configs[name], folder / name, hand_on)

    turns.in_turns([run(name) for name in configs])


def run_once(config: RunConfig, folder: Path, hand_on: turns.Pass | None = None) -> None:
    """Starts the run, resumes it where it was cut, or leaves it when it is done.

    `hand_on` is called after every step.
    Raises ValueError when the folder holds a run of another configuration.
    """
    begun = (folder / "config.json").is_file()
    if begun and (changed := differences(config, read_config(folder))):
        raise ValueError(
            f"{folder} holds a run of another configuration than the recipe's "
            f"({', '.join(changed)}): remove it or choose another --out"
        )
    if (folder / "summary.json").is_file():
        return
    say = Console(stderr=True).print
    with watch_run(config, folder, bar=hand_on is None) as show:

        def watch(entry: dict[str, Any]) -> None:
            show(entry)
            if hand_on is not None:
                hand_on()

        how = How(watch, say, load=lambda name: _loaded(name, config.declared))
        if begun:
            resume(folder, how, named=Named(config.method, config.model))
        else:
            start(config, folder, how)
    write_page(folder / "report.html", run_page(read_run(folder)))


@lru_cache(maxsize=1)
def _loaded(name: str, declared: Declared) -> Dataset:
    """All runs of a recipe are on one data set, and some take longer to decode than to train on."""
    return load_dataset(name, declared)


def compare(folders: Sequence[Path], out: Path) -> None:
    """`compare.html`, `results.json`, the card's plot and tables in `out`; one table on screen."""
    loaded = [read_run(folder) for folder in folders]
    write_page(out / "compare.html", comparison_page(loaded))
    write_card_plot(loaded, [folder.name for folder in folders], out / "accuracy.svg")
    results = {folder.name: reported(folder) for folder in folders}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(card_table(results))
    (out / "targets.md").write_text(targets_table(results))
    (out / "layers.md").write_text("\n".join(map(layer_table, folders)))
    Console().print(cost_table(loaded))


def compare_seeds(
    folders: Sequence[Path], names: Sequence[str], out: Path, *, in_turns: bool = False
) -> None:
    """`seeds.md` and `times.md` in `out`: the runs `names`, which are in the folder of each seed.

    Of runs in turns `clock.md` has what they took on this machine.
    """
    seeds = {folder.name: {name: reported(folder / name) for name in names} for folder in folders}
    (out / "seeds.md").write_text(seeds_table(list(seeds.values())))
    (out / "times.md").write_text(times_table(list(seeds.values())))
    if in_turns:
        (out / "clock.md").write_text(clock_table(seeds))
