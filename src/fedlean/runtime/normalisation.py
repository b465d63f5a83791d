"""What a run's inputs are normalised by: found once, and kept in `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedlean.data.dataset import Dataset
from fedlean.normalisation import Normalisation
from fedlean.runtime.config import RunConfig
from fedlean.runtime.local import Dispatch, ToDevices
from fedlean.runtime.notices import some


def is_known(dataset: Dataset, config: RunConfig) -> bool:
    """Whether the run's own data or its user say by what inputs are normalised."""
    return bool(len(dataset.y_train) or config.mean or config.inputs != "standardised")


def before(dataset: Dataset, document: Mapping[str, Any]) -> Dataset | None:
    """The data set with what the run's clients agreed on when it began; None where they did not.

    Raises ValueError when `config.json` is damaged.
    """
    if document.get("normalisation") is None:
        return None
    try:
        found = Normalisation.from_json(document["normalisation"], len(dataset.mean))
        return replace(dataset, mean=found.mean, std=found.std)
    except ValueError as error:
        raise ValueError(f"config.json is damaged: {error}") from None


class Normalised:
    """A data set whose clients may have to agree by what it is normalised."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def agree(self, dispatch: Dispatch) -> list[str]:
        """Asks the clients; lines about it.  Raises ValueError where they cannot be asked."""
        if not isinstance(dispatch, ToDevices):
            raise ValueError(
                f"data set {self.dataset.name!r} has no training examples to standardise by: give "
                "--mean and --deviation"
            )
        found = dispatch.agree()
        self.dataset = replace(self.dataset, mean=found.mean, std=found.std)
        clients = [str(client) for client in found.clients]
        return [
            f"inputs are standardised by the examples of {len(clients)} clients: {some(clients)}"
        ]
