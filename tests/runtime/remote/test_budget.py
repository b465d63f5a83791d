"""A task has its time and its steps, and a device gives up what is beyond them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, devices, first_model, params, server

from fedlean import wire
from fedlean.core import ClientTask, SubModel
from fedlean.engine.protocol import SGD
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.remote import budget as module
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.budget import (
    MAX_STEPS,
    Budget,
    GaveUp,
    TimedBatches,
    TimedEngine,
    TooMuch,
)
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.worker import Worker

HELD = client_data()[0]
FIELDS = {
    "run": "a1",
    "method": "fedavg",
    "step": 1,
    "committed": None,
    "classes": list(HELD.dataset.class_names),
    "mean": HELD.dataset.mean.tolist(),
    "std": HELD.dataset.std.tolist(),
    "deadline_seconds": 600.0,
    "memory_bytes": None,
}


class Watch:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(module, "time", watch)
    return watch


def letter(local_steps: int, deadline_seconds: float = 600.0) -> bytes:
    algorithm = fedavg(server(), lr=0.1, local_steps=1, batch_size=4)
    task: ClientTask = algorithm.configure(algorithm.init(first_model()), devices())[0]
    task = replace(task, hparams={**task.hparams, "local_steps": local_steps})
    fields = {**FIELDS, "deadline_seconds": deadline_seconds}
    return seal(Envelope(env.TASK, fields, wire.encode_task(task)))


def worker(tmp_path, **settings) -> Worker:
    return Worker(tmp_path, HELD, **{"client": 0, "engine": ENGINE.name, **settings})


def said(answer: bytes) -> dict:
    return dict(unseal(answer, expected=(env.TROUBLE,)).fields)


# The device's half


def test_a_task_of_a_trillion_steps_is_refused_at_once(tmp_path):
    began = time.monotonic()
    fields = said(worker(tmp_path).answer(letter(10**12)))
    assert time.monotonic() - began < 5
    assert fields["final"] and not fields["gave_up"]
    assert f"orders {10**12} steps, a device does at most {MAX_STEPS}" in fields["reason"]


def test_a_task_is_given_up_at_the_servers_deadline(tmp_path):
    """Ten million steps would take minutes."""
    began = time.monotonic()
    fields = said(worker(tmp_path).answer(letter(MAX_STEPS, deadline_seconds=0.5)))
    assert 0.4 < time.monotonic() - began < 5
    assert fields["gave_up"] and not fields["final"], "it may be asked again"
    assert fields["reason"].startswith("gave up: the server's deadline is over")


def test_the_time_that_it_took_to_come_counts(tmp_path):
    device = worker(tmp_path)
    assert said(device.answer(letter(1, 8.0), age_seconds=8.0))["gave_up"]
    assert unseal(device.answer(letter(1, 8.0), age_seconds=1.0), expected=(env.UPDATE,))


def test_the_operators_bound_is_named(tmp_path):
    fields = said(worker(tmp_path, max_task_seconds=0.25).answer(letter(MAX_STEPS)))
    assert fields["reason"] == "gave up: the 0.25 s of --max-task-seconds are over"


def test_what_nobody_waits_for_any_more_is_given_up(tmp_path):
    looks = []

    def withdrawn() -> bool:
        looks.append(1)
        return len(looks) > 20

    fields = said(worker(tmp_path).answer(letter(MAX_STEPS), withdrawn=withdrawn))
    assert fields["gave_up"] and "the run is over" in fields["reason"]


def test_it_is_whole_after_it_gave_up(tmp_path):
    """What it answers next is what it would have answered."""
    device = worker(tmp_path / "a")
    assert said(device.answer(letter(MAX_STEPS, deadline_seconds=0.3)))["gave_up"]
    after, fresh = device.answer(letter(3)), worker(tmp_path / "b").answer(letter(3))
    body = [bytes(unseal(one, expected=(env.UPDATE,)).body) for one in (after, fresh)]
    assert body[0] == body[1]


# Every way to compute looks at the clock


def opened(budget: Budget):
    engine = TimedEngine(ENGINE, budget)
    return engine.open(SPEC, params(), SubModel(), batch_size=4, optimizer=SGD(0.1))


def example():
    return next(HELD.draw(steps=1, batch_size=4, seed=0))


COMPUTES = {
    "step": lambda session, x, y: session.step(x, y),
    "forward": lambda session, x, y: session.forward(x, training=True),
    "loss": lambda session, x, y: session.loss(x, y),
}


@pytest.mark.parametrize("name", COMPUTES)
def test_a_session_computes_until_the_time_is_over(name, watch):
    session, (x, y) = opened(Budget(10.0, 60.0, lambda: False)), example()
    COMPUTES[name](session, x, y)
    watch.now = 9.9
    COMPUTES[name](session, x, y)
    watch.now = 10.0
    with pytest.raises(GaveUp, match="deadline"):
        COMPUTES[name](session, x, y)
    assert session.params().keys() == params().keys(), "what costs nothing is the session's own"


@pytest.mark.parametrize("name", ["backward", "descend"])
def test_a_backward_pass_is_not_begun_when_the_time_is_over(name, watch):
    session, (x, _) = opened(Budget(10.0, 60.0, lambda: False)), example()
    gradients = session.forward(x, training=True)
    getattr(session, name)(gradients)
    before, gradients = session.params(), session.forward(x, training=True)
    watch.now = 10.0
    with pytest.raises(GaveUp, match="deadline"):
        getattr(session, name)(gradients)
    assert all(np.array_equal(value, before[name]) for name, value in session.params().items())


def test_sessions_are_not_opened_when_the_time_is_over(watch):
    budget = Budget(10.0, 60.0, lambda: False)
    watch.now = 10.0
    with pytest.raises(GaveUp):
        opened(budget)
    with pytest.raises(GaveUp):
        TimedEngine(ENGINE, budget).open_forward(SPEC, params(), SubModel(), batch_size=4)


def test_batches_end_with_the_time(watch):
    batches = TimedBatches(HELD, Budget(10.0, 60.0, lambda: False))
    assert batches.num_examples == HELD.num_examples
    drawn = batches.draw(steps=5, batch_size=4, seed=3)
    plain = HELD.draw(steps=5, batch_size=4, seed=3)
    for _ in range(2):
        assert np.array_equal(next(drawn)[0], next(plain)[0])
    watch.now = 11.0
    with pytest.raises(GaveUp):
        next(drawn)
    with pytest.raises(TooMuch):
        batches.draw(steps=MAX_STEPS + 1, batch_size=4, seed=3)


def test_directions_are_evaluated_in_pieces_with_the_same_losses(watch):
    """150 of them in 3 calls of the session; the clock is looked at before each."""
    looks = []
    budget = Budget(10.0, 60.0, lambda: bool(looks.append(1)))
    plain = ENGINE.open_forward(SPEC, params(), SubModel(), batch_size=4)
    timed = TimedEngine(ENGINE, budget).open_forward(SPEC, params(), SubModel(), batch_size=4)
    (x, y), looks[:] = example(), []
    asked = {"seed": 5, "sigma": 0.01}
    got = timed.losses_perturbed(x, y, ks=range(150), **asked)
    assert len(looks) == 3
    assert np.array_equal(got, plain.losses_perturbed(x, y, ks=range(150), **asked))
    assert timed.losses_perturbed(x, y, ks=[], **asked).shape == (0,)
    with pytest.raises(TooMuch, match="directions"):
        timed.losses_perturbed(x, y, ks=range(MAX_STEPS + 1), **asked)
    watch.now = 10.0
    with pytest.raises(GaveUp):
        timed.losses_perturbed(x, y, ks=range(2), **asked)
