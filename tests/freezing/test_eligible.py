"""Who can hold a stage, by the peak of what it would ask of each device."""

from __future__ import annotations

from federation import SPEC, server

from fedlean.algorithm import Device
from fedlean.core import Model
from fedlean.cost.way import peak_memory_bytes
from fedlean.freezing.client import stage_work
from fedlean.freezing.eligible import Eligibility, without_values
from fedlean.freezing.stages import stage_model
from fedlean.freezing.staging import Staging, stage_tasks
from fedlean.models.initialise import init_params

TOLD = {"lr": 0.1, "local_steps": 2, "batch_size": 8, "momentum": 0.9, "loss": "ce"}
STAGING = Staging(beginning="memory")
FIRST, LAST = STAGING.stages(SPEC)


def needed(one, examples: int) -> int:
    """Bytes of the task that a device with so many examples is given."""
    params = init_params(SPEC, 0)
    model = stage_model(one, params, init_params(one.spec, 0, only=one.module))
    assert isinstance(model, Model)
    (task,) = stage_tasks(
        server(),
        STAGING,
        [Device(0, examples)],
        round=1,
        phase="train",
        one=one,
        model=model,
        hparams=TOLD,
    )
    blank = without_values(STAGING, Device(0, examples), "train", one, TOLD)
    assert stage_work(blank) == stage_work(task) and blank.hparams == task.hparams
    return peak_memory_bytes(one.spec, stage_work(task), frozen=one.frozen)


def test_to_the_byte_by_the_stage_and_by_what_a_device_is_told():
    """Who holds all activations of more examples needs more, but not where nothing is frozen."""
    eligible = Eligibility(stage_work, server().profile)
    few, many = needed(LAST, 8), needed(LAST, 80)
    assert few < many and needed(FIRST, 8) == needed(FIRST, 80)
    limits = [(8, few), (8, few - 1), (80, many), (80, many - 1), (80, few), (80, None)]
    there = [Device(at, examples, None, most) for at, (examples, most) in enumerate(limits)]
    for _ in range(2):  # the second time from what was priced before
        assert [one.id for one in eligible(STAGING, there, "train", LAST, TOLD)] == [0, 2, 5]
    enough = [Device(at, 8, None, needed(FIRST, 8) - at) for at in range(2)]
    assert eligible(STAGING, enough, "train", FIRST, TOLD) == enough[:1]


def test_all_are_asked_where_nobody_can():
    weak = [Device(client, 8, None, 1) for client in range(3)]
    assert Eligibility(stage_work, server().profile)(STAGING, weak, "train", LAST, TOLD) == weak
    assert Eligibility(stage_work, server().profile)(STAGING, [], "train", LAST, TOLD) == []


def test_what_is_alike_is_priced_once():
    asked = []

    def work(task):
        asked.append((task.phase, task.hparams["stage"], task.hparams["held"]))
        return stage_work(task)

    eligible = Eligibility(work, server().profile)
    there = [Device(client, 8 + client % 2, None, 10**9) for client in range(6)]
    phases = ("train", "map")  # what a method asks for may depend on it
    for phase in (*phases, *phases):
        for one in (FIRST, LAST):
            assert eligible(STAGING, there, phase, one, TOLD) == there
    stages = [(phase, one.name) for phase in phases for one in (FIRST, LAST)]
    assert asked == [(*stage, held) for stage in stages for held in (8, 9)]
