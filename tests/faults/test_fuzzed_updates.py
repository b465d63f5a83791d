"""Whatever updates come, a step returns, and nothing that is not finite is kept or stored."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import SEED, fresh_dispatch
from fuzzed_updates import fuzzed, travelled

from fedlean.algorithm import FederatedAlgorithm, Server
from fedlean.core import ClientTask, ClientUpdate, Model
from fedlean.cost.profile import load_profile
from fedlean.engine.open import engine_for
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU
from fedlean.methods.fedavg import fedavg
from fedlean.methods.ntk_zo import ntk_zo
from fedlean.methods.prunefl import prunefl
from fedlean.models.initialise import init_params
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint, state_tree
from fedlean.runtime.checks import Expected, refusal
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch, Refuse
from fedlean.runtime.moves import MaxNorm, Moves
from fedlean.runtime.step import Step
from fedlean.slices import Index
from fedlean.spec import sequential
from fedlean.tree import Fold, apply_mask

UPDATES = int(os.environ.get("FEDLEAN_FUZZED_UPDATES", "500"))  # of every case
SPEC = sequential(
    (1, 8, 8),
    [
        ("conv", Conv2d(4, 3, stride=2)),
        ("bn", BatchNorm()),
        ("relu", ReLU()),
        ("flat", Flatten()),
        ("fc1", Linear(12)),
        ("fc2", Linear(3)),
    ],
)
SERVER = Server(SPEC, engine_for(SPEC, None, threads=1)[0], SEED, 9, load_profile("generic"))


def dense() -> tuple[FederatedAlgorithm, Any]:
    algorithm = fedavg(SERVER, local_steps=2, batch_size=4)
    return algorithm, algorithm.init(Model(SPEC, init_params(SPEC, SEED)))


def masked() -> tuple[FederatedAlgorithm, Any]:
    """The second round, in which importance goes up and the server prunes."""
    algorithm = prunefl(
        SERVER, local_steps=2, batch_size=4, initial_pruning=False, reconfigure_every=2
    )
    state = algorithm.init(Model(SPEC, init_params(SPEC, SEED)))
    masks = {
        name: np.arange(mask.size).reshape(mask.shape) % 3 > 0 for name, mask in state.masks.items()
    }
    params = apply_mask(state.params, masks)
    return algorithm, replace(state, round=1, params=params, masks=masks)


def slopes() -> tuple[FederatedAlgorithm, Any]:
    algorithm = ntk_zo(SERVER, density=1.0, directions=4, batch_size=4)
    state = algorithm.init(Model(SPEC, init_params(SPEC, SEED)))
    return algorithm, algorithm.server_update(state, ())


CASES = {"dense": dense, "masked": masked, "slopes": slopes}


class Fuzz:
    """A dispatch whose clients are honest, from the third on now and then."""

    def __init__(self, inner: LocalDispatch, honest: dict[int, ClientUpdate], seed: int):
        self._inner, self._honest = inner, honest
        self._rng = np.random.default_rng(seed)
        self.sent = 0
        for name in ("begin", "acknowledge", "troubles", "notes", "repeated_bytes"):
            setattr(self, name, getattr(inner, name))
        self.measured_seconds = inner.measured_seconds
        self.too_large, self.cannot_hold = inner.too_large, inner.cannot_hold

    def __call__(self, tasks: Sequence[ClientTask], refuse: Refuse) -> Iterator[ClientUpdate]:
        for task in tasks:
            update = self._honest[task.client]
            if task.client > 1:
                self.sent += 1
                changed = travelled(self._rng, fuzzed(self._rng, update, task), task)
                if changed is None:
                    continue
                update = changed
            refuse(update, task)  # as a dispatch counts usable answers
            yield update


def arrays(value: Any) -> Iterable[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict | tuple | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from arrays(each)


def finite(tree: Any) -> bool:
    return all(np.isfinite(a).all() for a in arrays(tree) if a.dtype.kind == "f")


@pytest.mark.parametrize("max_norm", [None, 0.0, 5.0], ids=["cohort", "off", "given"])
@pytest.mark.parametrize("case", CASES)
def test_every_step_returns_and_keeps_what_is_finite(case, max_norm: MaxNorm, tmp_path: Path):
    algorithm, first = CASES[case]()
    inner = fresh_dispatch(algorithm, SERVER.engine)
    tasks = algorithm.configure(first, inner.begin(ClientStore(), 1))
    honest = {update.client: update for update in inner(tasks, lambda update, task: None)}
    fuzz = Fuzz(inner, honest, seed=len(case))
    store, moves, steps, merged = ClientStore(), Moves(), 0, 0
    while fuzz.sent < UPDATES:
        steps += 1
        step = Step(algorithm, SERVER, fuzz, store, steps, max_norm)
        after, moves = step.take(first, moves)
        tree = state_tree(after)
        assert finite(tree)
        assert step.record.answered[:2] == [0, 1] and step.failure is None
        assert set(step.record.answered).isdisjoint(step.record.rejected)
        assert 0 < step.record.cost.flops < 1e12
        merged += len(step.record.answered) - 2
        if steps % 100 == 1:
            save_checkpoint(tmp_path, steps, {"state": tree, "moves": vars(moves)})
            kept, skipped = load_checkpoint(tmp_path)
            assert not skipped and finite(kept)
    assert merged > UPDATES / 100  # some changes are harmless: not everything is refused


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "slices"])
def test_what_the_checks_let_pass_can_be_merged(case, sliced):
    """Whole, or as the slice of a model a few channels wider, at places drawn anew each time."""
    algorithm, first = CASES[case]()
    inner = fresh_dispatch(algorithm, SERVER.engine)
    tasks = algorithm.configure(first, inner.begin(ClientStore(), 1))
    honest = {update.client: update for update in inner(tasks, lambda update, task: None)}
    rng, passed, asked = np.random.default_rng(len(case)), 0, tasks[0]
    expected = Expected(algorithm.statistics(asked))
    wider = {name: tuple(side + 3 for side in s) for name, s in SPEC.tensor_shapes.items()}
    shapes = wider if sliced else SPEC.tensor_shapes
    base = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    result = Fold(base, variances=SPEC.variances)
    for _ in range(UPDATES):
        update = travelled(rng, fuzzed(rng, honest[asked.client], asked), asked)
        if update is None or refusal(update, asked, expected) is not None:
            continue
        result.add(update, slice_at(rng, shapes) if sliced else None)
        passed += 1
    assert passed == result.count > UPDATES / 100
    merged = result.params()
    assert finite(merged) and {n: v.shape for n, v in merged.items()} == shapes


def slice_at(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Index]:
    """Of three coordinates less on each axis: a row of them, or any; a norm's tensors alike."""
    cut = {
        name: tuple(
            slice(start, start + side - 3)
            if (start := int(rng.integers(4))) % 2
            else rng.permutation(side)[: side - 3]
            for side in shape
        )
        for name, shape in shapes.items()
    }
    return {name: cut["bn.bias"] if name.startswith("bn.") else axes for name, axes in cut.items()}
