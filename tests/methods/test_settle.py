"""The method of docs/stages.md: parts with a freezing rule of one's own."""

from __future__ import annotations

import numpy as np
import pytest
from conformance import Case
from docs_examples import method_of
from federation import SPEC, devices, first_model, server

from fedlean.core import ClientUpdate, SubModel

settle = method_of("settle", "stages.md")
CASE = Case(
    method=settle,
    settings={"lr": 0.05, "cohort": 3},
    knob={"threshold": 100.0},
    neutral="the first part always trains behind an output module, which FedAvg has not",
    why_no_masks="parts are dense",
)


def test_a_part_is_done_once_a_round_hardly_moves_it():
    """Each value of the part is doubled, a step of half of what it then is, then grows by 1%."""
    algorithm = settle(server(rounds=30), threshold=0.5)
    state = algorithm.init(first_model())
    seen = []
    for factor in (2.0, 1.01):
        task = algorithm.configure(state, devices())[0]
        params = {name: np.float32(factor) * value for name, value in task.params.items()}
        update = ClientUpdate(task.client, 1, params, SubModel(frozen=task.sub_model.frozen))
        state = algorithm.server_update(state, [update])
        seen.append((state.over, algorithm.report(state)))
    assert [over for over, _ in seen] == [False, True]
    assert [said["frozen"] for _, said in seen] == [0, 1]
    assert [said["step"] for _, said in seen] == pytest.approx([1 / 2, 0.01 / 1.01], abs=1e-6)
    first, second = task, algorithm.configure(state, devices())[0]
    assert first.hparams["stage"] != second.hparams["stage"]
    assert second.sub_model.frozen and second.sub_model.frozen <= SPEC.tensor_shapes.keys()
