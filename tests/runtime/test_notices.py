"""Lines about data, clients and masks that a user should read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from federation import dataset

from fedlean.layers import Flatten, Linear
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.notices import about_masks, about_model, about_shares, some
from fedlean.runtime.run import start
from fedlean.spec import sequential


def test_shares_with_everything_give_no_line():
    data = dataset()
    assert about_shares(data, np.array_split(np.arange(160), 4), "iid") == []


def test_clients_that_lack_classes_are_counted_and_the_first_named():
    data = dataset()
    shares = [np.flatnonzero(data.y_train == c) for c in (0, 1, 2)] * 2
    (line,) = about_shares(data, shares, "dirichlet:0.1")
    assert line == (
        "6 of 6 clients have no example of some of the 3 classes: client 0 lacks 2, client 1 lacks "
        "2, client 2 lacks 2 and 3 more"
    )


def test_a_class_that_nobody_trains_is_named_once_and_not_counted_against_clients():
    data = dataset()
    data = replace(data, y_train=np.where(data.y_train == 2, 1, data.y_train))
    (line,) = about_shares(data, [np.arange(160)], "iid")
    assert line == "no training example has the class 2: it cannot be learnt"


def test_empty_layers_are_named():
    full, empty = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    assert about_masks({"a": full}) == [] == about_masks({})
    (line,) = about_masks({"a": full, "b.weight": empty, "c.weight": empty})
    assert line.startswith("no weight of b.weight, c.weight is kept")


def test_outputs_beyond_the_classes():
    spec = sequential((1, 8, 8), [("flat", Flatten()), ("fc", Linear(5))])
    assert about_model(spec, dataset()) == [
        "the model has 5 outputs for 3 classes: the others stay idle"
    ]


def test_some():
    assert some(["a"]) == "a" and some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d"]) == "a, b, c and 1 more"


# Natural clients


@pytest.fixture
def by_writer(tmp_path) -> str:
    """Six writers of ten examples each, in no order."""
    rng = np.random.Generator(np.random.Philox(1))
    client = rng.permutation(np.repeat([3, 5, 8, 13, 21, 34], 10))
    client = np.concatenate([client, np.zeros(10, int)])
    x = rng.integers(0, 255, (70, 4, 4), np.uint8)
    (tmp_path / "data").mkdir()
    split = np.repeat([0, 1], [60, 10])
    np.savez(tmp_path / "data" / "w.npz", x=x, y=np.arange(70) % 2, split=split, client=client)
    return str(tmp_path / "data")


def begun(folder: Path, data: str, clients: int | None) -> tuple[dict, list[str]]:
    said: list[str] = []
    config = RunConfig(
        "fedavg",
        data,
        "mlp_13_7",
        partition="natural",
        clients=clients,
        rounds=1,
        settings={"local_steps": 1, "batch_size": 2},
    )
    return start(config, folder, How(say=said.append)), said


def test_natural_is_one_client_per_id_unless_a_number_is_asked_for(tmp_path, by_writer):
    summary, said = begun(tmp_path / "all", by_writer, None)
    assert summary["clients"] == 6 and not any("merged" in line for line in said)
    summary, said = begun(tmp_path / "four", by_writer, 4)
    assert summary["clients"] == 4
    assert any(
        line.startswith("6 client ids of the data are merged into 4 clients") for line in said
    )
    with pytest.raises(ValueError, match=r"got 7 clients, expected 1\.\.6"):
        begun(tmp_path / "more", by_writer, 7)
    with pytest.raises(ValueError, match="a cohort of 7 cannot be drawn from 6 clients"):
        config = RunConfig("fedavg", by_writer, partition="natural", settings={"cohort": 7})
        start(config, tmp_path / "cohort", How())
