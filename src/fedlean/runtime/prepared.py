"""A configured run, ready to go: everything that can be wrong is found before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.cost.profile import other_model
from fedlean.data.batches import own_inputs, test_subset
from fedlean.data.dataset import Dataset, with_inputs
from fedlean.data.load import load_dataset
from fedlean.engine.open import engine_for
from fedlean.fleet.fleet import Fleet
from fedlean.models.brought import Brought
from fedlean.models.catalog import bring
from fedlean.normalisation import Normalisation
from fedlean.runtime import normalisation
from fedlean.runtime.config import CLIENTS, RunConfig, check
from fedlean.runtime.devices import Devices
from fedlean.runtime.evaluate import Evaluate, evaluator
from fedlean.runtime.how import How, Parts
from fedlean.runtime.keeper import InFolder, Keeper, Nowhere
from fedlean.runtime.local import Dispatch
from fedlean.runtime.lock import Lock
from fedlean.runtime.method import Method, complete
from fedlean.runtime.method import build as build_method
from fedlean.runtime.modelfile import About
from fedlean.runtime.notices import about_model
from fedlean.runtime.outofmemory import memory_for
from fedlean.runtime.personal import check_personalize
from fedlean.runtime.together import check_classes, check_together

UNTESTED = "the server has no test examples: the accuracy is not measured"


@dataclass(frozen=True)
class Prepared:
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


def bring_model(config: RunConfig, dataset: Dataset) -> Brought:
    check_classes(dataset)
    return bring(config.model, dataset.input_shape, dataset.classes, config.seed)


def prepare(
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
) -> Prepared:
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
    return Prepared(
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


def load(config: RunConfig, how: How, elsewhere: str = "") -> Dataset:
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
