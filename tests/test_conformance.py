"""Every method, every property, on every engine (tests/conformance.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conformance import case_names, case_of, shuffled
from federation import (
    ROUNDS,
    Around,
    client_data,
    devices,
    first_model,
    fresh_dispatch,
    over_the_wire,
    params,
    run,
    same,
    server,
    snapshot,
)
from live_memory import peak_bytes

from fedlean.algorithm import FederatedAlgorithm
from fedlean.core import Model
from fedlean.cost.way import peak_memory_bytes, work_memory_bytes
from fedlean.engine.open import NAMES, open_engine
from fedlean.engine.protocol import Engine
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint, state_tree
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.record import StepRecord
from fedlean.runtime.rounds import LoopState
from fedlean.tree import pattern_hash, unpack

pytestmark = pytest.mark.parametrize("name", case_names())


@pytest.fixture(scope="module", params=NAMES)
def engine(request) -> Engine:
    return opened(request.param)


def opened(name: str) -> Engine:
    """Skips where the extension is not built; one that is built and broken must fail."""
    if name == "native" and importlib.util.find_spec("fedlean._native") is None:
        pytest.skip("the native engine is not built: there is no fedlean._native")
    return open_engine(name, 1)


def build(name: str, **extra) -> FederatedAlgorithm:
    case = case_of(name)
    return case.method(server(), **{**case.settings, **extra})


def first(name: str) -> Model:
    return case_of(name).start or first_model()


def train(name: str, *, engine: Engine, algorithm: FederatedAlgorithm | None = None, **how) -> Any:
    """The final state of the case's run, or of that of `algorithm`."""
    return run(algorithm or build(name), engine=engine, first=first(name), **how)


def test_declares_a_case(name):
    assert case_of(name).method.__name__ == name.partition(":")[0]


def test_pure(name, engine):
    """No function changes its arguments; equal arguments give equal results."""
    algorithm = build(name)
    state = algorithm.init(first(name))
    tasks = algorithm.configure(state, devices())
    before = snapshot((state, tasks))
    answers = [
        algorithm.client_update(task, client_data()[task.client], engine, {}) for task in tasks
    ]
    again = [
        algorithm.client_update(task, client_data()[task.client], engine, {}) for task in tasks
    ]
    assert same(answers, again)
    # as the runtime hands them on
    updates = [replace(update, task=task) for (update, _), task in zip(answers, tasks, strict=True)]
    sent = snapshot(updates)
    once, twice = (algorithm.server_update(state, iter(updates)) for _ in range(2))
    assert same(once, twice)
    assert same(before, (state, tasks)) and same(sent, updates)


def test_deterministic_and_learns(name, engine):
    one, two = train(name, engine=engine), train(name, engine=engine)
    assert same(one, two)
    assert one.round == ROUNDS
    assert not same(dict(one.params), dict(params()))


def test_order_of_updates_is_irrelevant(name, engine):
    algorithm = build(name)
    dispatch = Around(fresh_dispatch(algorithm, engine), shuffled([2, 0, 3, 1]))
    assert same(
        train(name, engine=engine, algorithm=algorithm, dispatch=dispatch),
        train(name, engine=engine),
    )


def test_survives_drop_outs(name, engine):
    """A third of the answers never come; every tensor stays finite and every round is run."""
    algorithm = build(name)
    rng = np.random.default_rng(5)

    def drop(tasks, updates):
        del tasks
        return (update for update in updates if rng.random() < 0.67)

    state = train(
        name,
        engine=engine,
        algorithm=algorithm,
        dispatch=Around(fresh_dispatch(algorithm, engine), drop),
    )
    assert state.round == ROUNDS
    assert all(np.isfinite(value).all() for value in state.params.values())


def test_zero_replies_are_asked_again(name, engine):
    """Nobody answers the first time a step is asked: the result is that of an undisturbed run."""
    algorithm = build(name)
    calls = {"n": 0}

    def silent_every_other(tasks, updates):
        del tasks
        calls["n"] += 1
        answers = list(updates)
        return [] if calls["n"] % 2 else answers

    state = train(
        name,
        engine=engine,
        algorithm=algorithm,
        dispatch=Around(fresh_dispatch(algorithm, engine), silent_every_other),
    )
    assert same(state, train(name, engine=engine))


def test_resume_equals_uninterrupted(name, engine, tmp_path):
    """From a checkpoint at every step, in a new process's objects: the same final bytes."""
    algorithm = build(name)
    dispatch = fresh_dispatch(algorithm, engine)
    steps = []

    def save(progress: LoopState, record: StepRecord) -> None:
        del record
        folder = tmp_path / str(progress.step)
        clients = {str(client): dict(s) for client, s in dispatch.client_states().items()}
        tree = {"state": state_tree(progress.state), "clients": clients}
        tree |= {"store": progress.store.to_tree(), "step": progress.step}
        save_checkpoint(folder, progress.step, tree)
        steps.append(folder)

    expected = train(name, engine=engine, algorithm=algorithm, dispatch=dispatch, watch=save)
    for folder in steps[:: max(1, len(steps) // 4)]:
        tree, skipped = load_checkpoint(folder)
        assert not skipped
        fresh = build(name)
        state = type(fresh.init(first(name)))(**tree["state"])
        resumed = fresh_dispatch(fresh, engine)
        resumed.restore({int(k): v for k, v in tree["clients"].items()})
        progress = LoopState(state, ClientStore(tree["store"]), tree["step"])
        assert same(
            train(name, engine=engine, algorithm=fresh, dispatch=resumed, progress=progress),
            expected,
        )


def test_wire_round_trip_and_bytes_as_claimed(name, engine):
    """Everything through bytes: same final state, and every message as long as charged."""
    algorithm = build(name)
    store = ClientStore()
    dispatch = over_the_wire(fresh_dispatch(algorithm, engine), store)
    progress = LoopState(algorithm.init(first(name)), store)
    assert same(
        train(name, engine=engine, algorithm=algorithm, dispatch=dispatch, progress=progress),
        train(name, engine=engine),
    )


def test_neutral_setting_is_fedavg(name, engine):
    case = case_of(name)
    if isinstance(case.neutral, str):
        assert case.neutral, f"{name} says neither a neutral setting nor why there is none"
        return
    neutral = run(case.method(server(), **case.neutral), engine=engine)
    plain = run(fedavg(server(), **case.fedavg), engine=engine)
    assert same(dict(neutral.params), dict(plain.params))


def test_knob_changes_the_result(name, engine):
    case = case_of(name)
    changed = train(name, engine=engine, algorithm=build(name, **case.knob))
    assert not same(dict(changed.params), dict(train(name, engine=engine).params))


def test_masked_coordinates_are_exactly_zero(name, engine):
    """params == params · mask after every step, on the server and in every task."""
    case, pruned = case_of(name), []

    def check(progress: LoopState, record: StepRecord) -> None:
        for task in record.tasks:
            for key, mask in task.sub_model.masks.items():
                if key in task.params:
                    assert not unpack(task.params[key], mask)[~mask].any()
        for key, mask in progress.state.masks.items():
            assert not progress.state.params[key][~mask].any()
            pruned.append(not mask.all())

    train(name, engine=engine, watch=check)
    assert any(pruned) or case.why_no_masks


def test_masks_are_hashed_once(name, engine, tmp_path, monkeypatch):
    """Those of the state, of tasks and of a checkpoint are read-only as they are made."""
    seen = []

    def check(progress: LoopState, record: StepRecord) -> None:
        save_checkpoint(tmp_path, progress.step, {"state": state_tree(progress.state)})
        restored = load_checkpoint(tmp_path)[0]["state"]["masks"]
        tasks = [task.sub_model.masks for task in record.tasks]
        for masks in (progress.state.masks, restored, *tasks):
            found = pattern_hash(masks)
            with monkeypatch.context() as patch:
                patch.setattr(np, "packbits", lambda mask: pytest.fail("hashed again"))
                assert pattern_hash(dict(masks)) == found
            seen.append(bool(masks))

    train(name, engine=engine, watch=check)
    assert any(seen) or case_of(name).why_no_masks


def test_memory_claimed_against_measured(name, engine):
    """The model of the engine's memory is within 15% of what a task really holds at its peak.

    The dense model may say more where something is frozen: it has activations that torch lets go.
    """
    algorithm = build(name)
    measure = live_bytes if engine.arithmetic == "masked" else held_bytes
    checked = []

    def measured(task, batches, engine, held):
        out = []
        peak = measure(
            lambda used: out.append(algorithm.client_update(task, batches, used, held)), engine
        )
        update, state = out[0]
        checked.append((peak, claimed_bytes(task, update.work, engine), task.sub_model.frozen))
        return update, state

    train(
        name,
        engine=engine,
        algorithm=algorithm,
        dispatch=LocalDispatch(measured, engine, client_data()),
    )
    assert checked
    for peak, claim, frozen in checked:
        assert peak - claim <= 0.15 * peak, (peak, claim)
        if not (frozen and engine.arithmetic == "masked"):
            assert claim - peak <= 0.15 * peak, (peak, claim)


def claimed_bytes(task, works, engine: Engine) -> int:
    """Of the largest session; for torch, whose tensors are seen all together, of all at once."""
    sparse, frozen = engine.arithmetic == "sparse", task.sub_model.frozen
    # what lies outside the engine is not measured
    own = [replace(work, held_floats=0, held_examples=0) for work in works]
    if not sparse:
        return peak_memory_bytes(task.spec, own, frozen=frozen, sparse=False)
    return max(work_memory_bytes(task.spec, work, frozen=frozen) for work in own)


def live_bytes(task: Callable[[Engine], None], engine: Engine) -> int:
    """Of torch's tensors."""
    return peak_bytes(lambda: task(engine))


def held_bytes(task: Callable[[Engine], None], engine: Engine) -> int:
    """Of the largest native session that the task opens."""
    remembering = Remembering(engine)
    task(remembering)
    return max(session.held_bytes for session in remembering.sessions)


class Remembering:
    """An engine that remembers its sessions."""

    def __init__(self, engine):
        self.name, self.arithmetic = engine.name, engine.arithmetic
        self.instruction_set = engine.instruction_set
        self.engine, self.sessions = engine, []

    def open(self, *arguments, **settings):
        self.sessions.append(Watched(self.engine.open(*arguments, **settings)))
        return self.sessions[-1]

    def open_forward(self, *arguments, **settings):
        self.sessions.append(self.engine.open_forward(*arguments, **settings))
        return self.sessions[-1]


class Watched:
    """A session with the gradients that it held while it ran backward, and has dropped since."""

    def __init__(self, session):
        self._session, self._gradient_bytes = session, 0

    @property
    def held_bytes(self):
        return self._session.held_bytes + self._gradient_bytes

    def backward(self, output_gradients, *, dense=False):
        gradients = self._session.backward(output_gradients, dense=dense)
        if dense:  # as they were in the session, all coordinates
            self._gradient_bytes = sum(values.nbytes for values in gradients.values())
        return gradients

    def __getattr__(self, name):
        return getattr(self._session, name)


def test_engines_agree(name):
    """The same masks, and values within float32 rounding, after six rounds."""
    native, torch = (train(name, engine=opened(engine)) for engine in NAMES)
    assert same(dict(native.masks), dict(torch.masks))
    for key, value in torch.params.items():
        atol = 1e-5 * float(abs(value).max())
        np.testing.assert_allclose(native.params[key], value, rtol=0, atol=atol)
