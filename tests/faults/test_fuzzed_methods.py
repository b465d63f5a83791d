"""Whatever one client sends at any step of any method's run, the step returns and the next begins.

Tasks are of all kinds: stages with what they freeze, slices, exits, pieces, arrays of an optimiser.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from conformance import case_names, case_of
from faults.test_fuzzed_updates import finite
from federation import first_model, fresh_dispatch, server
from fuzzed_updates import fuzzed, travelled

from fedlean.algorithm import FederatedAlgorithm
from fedlean.core import ClientTask, ClientUpdate
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint, state_tree
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch, Refuse
from fedlean.runtime.method import model_of
from fedlean.runtime.moves import MaxNorm, Moves
from fedlean.runtime.step import Step

UPDATES = int(os.environ.get("FEDLEAN_FUZZED_UPDATES", "60"))  # of every case
ROGUE = 3


class OneRogue:
    """Around a dispatch whose clients stay as they are: what they send is theirs but for ROGUE."""

    def __init__(self, inner: LocalDispatch, rng: np.random.Generator):
        self._inner, self._rng = inner, rng
        self._honest: dict[int, ClientUpdate] = {}  # of the step; they send the same each time
        self.sent = 0
        for name in ("begin", "troubles", "notes", "repeated_bytes", "measured_seconds"):
            setattr(self, name, getattr(inner, name))
        self.too_large, self.cannot_hold = inner.too_large, inner.cannot_hold

    def new_step(self) -> None:
        self._honest = {}

    def acknowledge(self, taken, refused) -> None:
        """The run goes on from an honest step, not from this one."""

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterator[ClientUpdate]:
        for task in tasks:
            if task.client not in self._honest:
                (self._honest[task.client],) = self._inner([task], refuse)
            update = self._honest[task.client]
            if task.client == ROGUE:
                self.sent += 1
                changed = travelled(self._rng, fuzzed(self._rng, update, task), task)
                if changed is None:
                    continue
                update = changed
            yield update


def still_sound(algorithm: FederatedAlgorithm, after, tmp_path) -> None:
    """The state can be stored, evaluated, reported and gone on from."""
    tree = state_tree(after)
    assert finite(tree)
    model = model_of(algorithm, server(), after)
    assert model.params.keys() >= model.spec.tensor_shapes.keys()
    if algorithm.report is not None:
        json.dumps(dict(algorithm.report(after)), allow_nan=False)
    save_checkpoint(tmp_path, 1, {"state": tree})
    kept, skipped = load_checkpoint(tmp_path)
    assert not skipped and finite(kept)


@pytest.mark.parametrize("max_norm", [None, 0.0], ids=["cohort", "off"])
@pytest.mark.parametrize("name", case_names())
def test_no_step_of_any_method_is_ended_or_spoilt(name, max_norm: MaxNorm, tmp_path):
    case = case_of(name)
    algorithm = case.method(server(), **case.settings)
    rng = np.random.default_rng(len(name))
    inner = fresh_dispatch(algorithm)
    rogue, store, moves = OneRogue(inner, rng), ClientStore(), Moves()
    state, number = algorithm.init(case.start or first_model()), 0
    while not algorithm.done(state):
        number += 1
        rogue.new_step()
        enough = rogue.sent + UPDATES // 6
        while rogue.sent < enough:
            step = Step(algorithm, server(), rogue, ClientStore(store.to_tree()), number, max_norm)
            before = rogue.sent
            after, _ = step.take(state, moves)
            assert step.failure is None
            if rogue.sent == before:
                break  # it is not of the cohort
            honest = [t.client for t in step.record.tasks if t.client != ROGUE]
            assert [c for c in step.record.answered if c != ROGUE] == honest
            assert (ROGUE in step.record.answered) <= (ROGUE not in step.record.rejected)
            still_sound(algorithm, after, tmp_path)
            if not algorithm.done(after):
                algorithm.configure(after, inner.begin(store, number + 1))
        step = Step(algorithm, server(), inner, store, number, max_norm)
        state, moves = step.take(state, moves)
        assert not step.record.rejected
    assert rogue.sent
