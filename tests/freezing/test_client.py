"""A client's half of a stage: the ways in which its frozen beginning runs, bit for bit alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine.cases import start
from federation import client_data, same, server

from fedlean.algorithm import Device
from fedlean.core import ClientTask
from fedlean.engine.open import open_engine
from fedlean.freezing.client import open_stage, stage_work, train_stage
from fedlean.freezing.stages import Stage, stage_model
from fedlean.freezing.staging import Staging, Way, stage_tasks
from fedlean.models.resnet import resnet8
from fedlean.runtime.checks import Expected, refusal

pytestmark = pytest.mark.usefixtures("has_native")

WHOLE = resnet8((1, 8, 8), 3, norm="batch")
STAGES = Staging().stages(WHOLE)
WAYS: list[Way] = ["together", "pieces", "memory", "disk"]
DATA = client_data()[1]  # 35 examples
HPARAMS = {
    "lr": 0.05,
    "local_steps": 7,
    "batch_size": 6,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "loss": "ce",
}


def task_of(one: Stage, beginning: Way = "together", *, examples: int | None = 35, **changed):
    values = start(one.spec)
    (task,) = stage_tasks(
        server(),
        Staging(beginning=beginning, micro_batch=4),
        [Device(1, examples)],
        round=1,
        phase="train",
        one=one,
        model=stage_model(one, values, values),
        hparams={**HPARAMS, **changed},
    )
    return task


def trained(task: ClientTask):
    return train_stage(task, DATA, open_engine("native", threads=1))


@pytest.mark.parametrize("one", STAGES, ids=lambda one: one.name)
def test_the_ways_give_equal_updates_of_what_is_not_frozen(one):
    first = trained(task_of(one))
    assert first.params.keys() == one.own | one.module
    assert first.num_examples == 35 and np.isfinite(first.metrics["train_loss"])
    for beginning in WAYS[1:]:
        update = trained(task_of(one, beginning))
        assert same(dict(update.params), dict(first.params))
        assert update.metrics == first.metrics
    before = start(one.spec)
    moved = [name for name in first.params if not same(first.params[name], before[name])]
    assert len(moved) == len(first.params)


@pytest.mark.parametrize("one", STAGES, ids=lambda one: one.name)
@pytest.mark.parametrize("beginning", WAYS)
def test_what_is_claimed_is_what_was_ordered(one, beginning):
    task = task_of(one, beginning)
    update = trained(task)
    ordered = stage_work(task)
    assert update.work == ordered
    assert len(ordered) == (1 if beginning == "together" or not one.frozen else 2)
    assert refusal(update, task, Expected(work=ordered, num_examples=35)) is None
    more = replace(update.work[-1], steps=update.work[-1].steps + 1)
    rogue = replace(update, work=(*update.work[:-1], more))
    assert refusal(rogue, task, Expected(work=ordered, num_examples=35)) is not None


def test_work_by_hand():
    """7 steps of 6 examples behind the first stage; 35 examples once where they are cached."""
    end = "stage1_1_relu2"
    before, rest = stage_work(task_of(STAGES[1], "pieces"))
    assert (before.end, before.batch_size, before.forward_examples) == (end, 4, 42)
    assert (rest.begin, rest.steps, rest.batch_size, rest.beside) == (end, 7, 6, 1)
    assert rest.held_examples == 6 + 4 and rest.optimizer_floats == 1
    before, rest = stage_work(task_of(STAGES[1], "memory"))
    assert (before.forward_examples, before.held_examples) == (35, 35 + 4)
    assert (rest.begin, rest.held_examples, rest.beside) == (end, 35 + 6, 0)
    before, rest = stage_work(task_of(STAGES[1], "disk"))
    assert (before.held_examples, rest.held_examples) == (4, 6)
    (whole,) = stage_work(task_of(STAGES[1], "together"))
    assert (whole.begin, whole.end, whole.steps) == ("", "", 7)


@pytest.mark.parametrize("beginning", ["memory", "disk"])
def test_a_client_with_other_examples_than_it_joined_with(beginning):
    with pytest.raises(ValueError, match="has 35 examples, and joined with 34: let it join anew"):
        trained(task_of(STAGES[1], beginning, examples=34))


def test_a_client_of_unknown_size_runs_pieces():
    task = task_of(STAGES[1], "disk", examples=None)
    assert stage_work(task) == stage_work(task_of(STAGES[1], "pieces"))
    assert same(dict(trained(task).params), dict(trained(task_of(STAGES[1])).params))


@pytest.mark.parametrize("beginning", WAYS)
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_nothing_frozen_moves(engine, beginning):
    """Under momentum and decay, running statistics of norms among it."""
    one = STAGES[1]
    task = task_of(one, beginning)
    session, drawn = open_stage(task, DATA, open_engine(engine, threads=1))
    for x, y in drawn.draw(steps=3, batch_size=6, seed=0):
        session.step(x, y)
    before = start(one.spec)
    held = session.params()
    frozen = one.frozen & held.keys()  # a session of the rest holds none of them
    assert bool(frozen) == (beginning in ("together", "pieces"))
    assert beginning not in ("together", "pieces") or "stem_norm.running_var" in frozen
    assert all(same(held[name], before[name]) for name in frozen)
    assert not same(held["stage2_1_norm1.running_var"], before["stage2_1_norm1.running_var"])


@pytest.mark.parametrize("one", STAGES, ids=lambda one: one.name)
@pytest.mark.parametrize("beginning", WAYS)
def test_frozen_tensors_have_no_state_of_an_optimiser(one, beginning):
    """Momentum takes four bytes for each weight that trains, in the plan of the memory."""
    peaks = [
        open_stage(
            task_of(one, beginning, momentum=momentum), DATA, open_engine("native", threads=1)
        )[0].peak_memory_bytes
        for momentum in (0.0, 0.9)
    ]
    trains = (one.own | one.module) & one.spec.param_shapes.keys()
    floats = sum(int(np.prod(one.spec.param_shapes[name])) for name in trains)
    aligned = 64 * len(trains)  # a buffer may begin so many bytes later
    assert 4 * floats <= peaks[1] - peaks[0] <= 4 * floats + aligned
    frozen = one.frozen & one.spec.param_shapes.keys()
    held = sum(int(np.prod(one.spec.param_shapes[name])) for name in frozen)
    assert not held or 4 * held > aligned  # so that the state of the frozen would show


def test_the_proximal_term_pulls():
    """Of the engine, towards what the client was sent."""
    distances = []
    for proximal in (0.0, 5.0):
        session, drawn = open_stage(
            task_of(STAGES[1]), DATA, open_engine("native", threads=1), proximal=proximal
        )
        for x, y in drawn.draw(steps=5, batch_size=6, seed=0):
            session.step(x, y)
        off = (
            session.params()["stage2_1_conv2.weight"]
            - start(STAGES[1].spec)["stage2_1_conv2.weight"]
        )
        distances.append(float(np.linalg.norm(off)))
    assert distances[1] < distances[0]
