"""Forward passes on a stage: the frozen beginning runs once, and slopes and memory are exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine.cases import start
from federation import client_data, same, server

from fedlean.algorithm import Device
from fedlean.core import SubModel
from fedlean.cost.way import peak_memory_bytes, work_memory_bytes
from fedlean.engine.open import open_engine
from fedlean.freezing.forward import forward_answer, forward_work
from fedlean.freezing.stages import stage_model
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.models.resnet import resnet8
from fedlean.runtime.checks import Expected, refusal
from fedlean.train.forward_round import ForwardRound, forms
from fedlean.train.zeroth_order import Probe, directional_derivatives

WHOLE = resnet8((1, 8, 8), 3, norm="batch")
STAGES = Staging().stages(WHOLE)
ASKED = ForwardRound(10, 4, "ce", 5, 0.01, "gaussian", "central", "fp32", "zeroth")
DATA = client_data()[1]


def task_of(one):
    values = start(one.spec)
    (task,) = stage_tasks(
        server(),
        Staging(beginning="pieces", micro_batch=ASKED.at_once),
        [Device(1)],
        round=1,
        phase="train",
        one=one,
        model=stage_model(one, values, values),
        hparams={**ASKED.to_hparams(), "direction_seed": 5},
    )
    return task


class Watched:
    """An engine that remembers its sessions, and of how many examples they ran what."""

    def __init__(self, name: str):
        self._inner = open_engine(name, threads=1)
        self.examples, self.sessions = [], []

    def open_forward(self, *given, **named):
        session, examples = self._inner.open_forward(*given, **named), self.examples
        self.sessions.append(session)

        class Counted:
            def forward(self, x, **how):
                examples.append(("forward", len(x)))
                return session.forward(x, **how)

            def losses_perturbed(self, x, y, **how):
                examples.append(("losses", len(x) * len(how["ks"])))
                return session.losses_perturbed(x, y, **how)

        return Counted()


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("one", STAGES, ids=lambda one: one.name)
def test_slopes_are_those_of_the_whole_stage(one, engine):
    """BatchNorm in what is frozen, as in what trains, has its running statistics."""
    if engine == "native":
        pytest.importorskip("fedlean._native")
    task, watched = task_of(one), Watched(engine)
    update = forward_answer(task, DATA, watched)
    ((x, y),) = DATA.draw(steps=1, batch_size=10, seed=task.seed)
    session = open_engine(engine, 1).open_forward(
        task.spec, task.params, SubModel(frozen=one.frozen), batch_size=4
    )
    whole = directional_derivatives(
        session, x, y, Probe(5, 0.01, differences="central"), seed=5, at_once=4
    ).astype(np.float32)
    found = update.statistics["c"].tensors["c"]
    if engine == "native":
        assert same(found, whole)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-3 * abs(whole).max())
    assert not update.params
    assert refusal(update, task, Expected(forms(task), forward_work(task))) is None


@pytest.mark.parametrize("one", STAGES, ids=lambda one: one.name)
def test_what_is_frozen_runs_once_over_the_batch(one):
    pytest.importorskip("fedlean._native")
    task, watched = task_of(one), Watched("native")
    forward_answer(task, DATA, watched)
    passes = [("losses", count) for count in 2 * [5 * 4, 5 * 4, 5 * 2]]
    once = [("forward", 4), ("forward", 4), ("forward", 2)]
    assert watched.examples == (once if one.frozen else []) + passes
    works = forward_work(task)
    assert [work.forward_examples for work in works] == ([10, 100] if one.frozen else [100])
    planned = [
        work_memory_bytes(task.spec, replace(work, held_examples=0), frozen=one.frozen)
        for work in works
    ]
    assert [session.held_bytes for session in watched.sessions] == planned


def test_what_came_out_of_the_beginning_is_charged():
    """10 examples of stage 1's 16x8x8 stay, four more arrive; the sessions come one by one."""
    task = task_of(STAGES[1])
    before, rest = forward_work(task)
    assert (before.held_examples, rest.held_examples, rest.beside) == (14, 10, 0)
    assert task.spec.shapes[before.end] == (16, 8, 8) and before.end == rest.begin
    peaks = [work_memory_bytes(task.spec, work, frozen=STAGES[1].frozen) for work in (before, rest)]
    assert peak_memory_bytes(task.spec, [before, rest], frozen=STAGES[1].frozen) == max(peaks)
