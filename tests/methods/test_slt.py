"""SLT: widths of heads by memory, shares of the rounds by hand, what is frozen, and the merge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import ENGINE, SPEC, client_data, devices, first_model, params, run, same, server

from fedlean.core import Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.methods import slt as module
from fedlean.methods.fedavg import fedavg
from fedlean.methods.slt import slt
from fedlean.models.lenet300 import lenet300
from fedlean.models.resnet import resnet8
from fedlean.submodels.narrow import narrow, narrow_after
from fedlean.submodels.parts import parts
from fedlean.tree import fold

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
CASE = Case(
    method=slt,
    settings={**SGD_SETTINGS, "cohort": 3, "momentum": 0.5, "shares": "equal"},
    knob={"constraint": 1.0},
    neutral={**SGD_SETTINGS, "constraint": 1.0},
    fedavg=SGD_SETTINGS,
    why_no_masks="slices by width are dense",
)
WORK = Work(5, 20)
IMAGES = resnet8((1, 8, 8), 10, norm="batch")


def steps_of(spec, constraint=0.0, ends=""):
    return module._steps(spec, parts(spec, ends), WORK, constraint)


@pytest.mark.parametrize("constraint", [0.6, 0.7, 0.9])
def test_each_step_has_the_widest_head_in_the_memory_of_the_narrow_model(constraint):
    """Not wider than that of the step after it, and a thousandth more would not fit."""
    own = parts(IMAGES)
    room = peak_memory_bytes(narrow(IMAGES, constraint).spec, [WORK])
    first, *steps = steps_of(IMAGES, constraint)
    assert (first.name, first.rate, first.frozen) == ("all", steps[0].rate, frozenset())
    rates = [step.rate for step in steps] + [1.0]
    assert rates == sorted(rates) and rates[-2] == 1.0 and 1.0 not in rates[:-2]
    for number, step in enumerate(steps):
        assert step.name == own[number].name
        assert peak_memory_bytes(step.cut.spec, [WORK], frozen=step.frozen) <= room
        full = [layer for part in own[: number + 1] for layer in part.layers]
        for wider in np.arange(round(step.rate * 1000) + 1, round(rates[number + 1] * 1000) + 1):
            cut = narrow_after(IMAGES, full, float(wider) / 1000)
            assert peak_memory_bytes(cut.spec, [WORK], frozen=step.frozen) > room
    assert steps[-1].cut.spec == IMAGES


def test_without_a_constraint_the_smallest_in_which_all_steps_have_room():
    """ResNet-8 has it at one of the widths that are tried; three linear layers at none."""
    feasible = [constraint for constraint in module.CONSTRAINTS if _feasible(IMAGES, constraint)]
    found, smallest = steps_of(IMAGES), steps_of(IMAGES, feasible[0])
    assert [one.rate for one in found] == [one.rate for one in smallest] and found[0].rate < 1
    assert len(feasible) < len(module.CONSTRAINTS)
    spec = lenet300((1, 8, 8), 10)
    assert not any(_feasible(spec, constraint) for constraint in module.CONSTRAINTS)
    _, filled, last = steps_of(spec)
    needs = [peak_memory_bytes(one.cut.spec, [WORK], frozen=one.frozen) for one in (filled, last)]
    assert needs[0] <= needs[1] and filled.rate < 1
    assert needs[1] < peak_memory_bytes(spec, [WORK])


def _feasible(spec, constraint) -> bool:
    try:
        return bool(steps_of(spec, constraint))
    except ValueError:
        return False


def test_shares_of_the_rounds_by_hand():
    """s_1 = 0.67 of 100 rounds, and of the other 33 the shares of two steps by parameters.

    Those of lenet300 with fc1 whole, 67% of fc2's 100 outputs and 300 inputs; then without fc1.
    """
    steps = steps_of(lenet300((1, 8, 8), 10))
    assert [step.rate for step in steps] == [0.67, 0.67, 1.0]
    first = 64 * 300 + 300 + 300 * 67 + 67 + 67 * 10 + 10
    second = 300 * 100 + 100 + 100 * 10 + 10
    assert [step.num_trained for step in steps[1:]] == [first, second]
    ends = [67, 67 + 33 * first // (first + second), 100]
    assert module._endings(steps, 100, "parameters") == ends == [67, 85, 100]
    assert module._endings(steps, 10, "equal") == [3, 6, 10]
    assert module._endings(steps, 2, "parameters")[-1] == 2


def test_a_step_without_a_round_is_refused():
    """lenet300 has three steps: one round of two is the first's, the other the last's."""
    spec = lenet300((1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"3 steps share 2 rounds, and '\w+' has none.*with ends"):
        slt(replace(server(2), spec=spec))
    with pytest.raises(ValueError, match="shares=equal with 3 rounds or more"):
        slt(replace(server(2), spec=spec), shares="equal")
    assert slt(replace(server(3), spec=spec), shares="equal")
    assert slt(replace(server(1), spec=spec), constraint=1.0)  # FedAvg


def told(algorithm, round):
    state = replace(algorithm.init(first_model()), round=round - 1)
    return algorithm.configure(state, devices())[0]


def test_what_clients_hold_and_freeze_round_after_round():
    algorithm = slt(server(), shares="equal", **SGD_SETTINGS)
    _, first, last = module._steps(SPEC, parts(SPEC), Work(2, 8), 0.0)
    tasks = [told(algorithm, round) for round in range(1, 7)]
    assert [task.hparams["stage"] for task in tasks] == ["all"] * 2 + ["conv"] * 2 + ["head"] * 2
    assert [task.hparams["width"] for task in tasks[::2]] == [first.rate, first.rate, 1.0]
    assert [task.sub_model.frozen for task in tasks[:4]] == [frozenset()] * 4
    assert tasks[4].sub_model.frozen == {"conv.weight", "conv.bias"} == last.frozen
    assert tasks[2].spec.param_shapes["conv.weight"] == SPEC.param_shapes["conv.weight"]
    assert tasks[2].spec.param_shapes["fc2.weight"][1] < 12 and tasks[4].spec == SPEC
    outputs = tasks[2].params["fc1.weight"]
    assert same(outputs, params()["fc1.weight"][: len(outputs)])


def test_a_merge_moves_what_is_trained_and_no_bit_of_the_others():
    algorithm = slt(server(), shares="equal", **SGD_SETTINGS)
    states = []
    run(algorithm, watch=lambda progress, record: states.append(progress.state))
    kept = states[1].params["fc2.weight"][:, -1]  # the head's last channel waits for the last step
    assert same(kept, params()["fc2.weight"][:, -1])
    assert not same(states[1].params["fc2.weight"][:, 0], params()["fc2.weight"][:, 0])
    assert not same(states[3].params["conv.weight"], states[1].params["conv.weight"])
    assert states[5].params["conv.weight"] is states[3].params["conv.weight"]
    assert not states[3].params["conv.weight"].flags.writeable  # and so is hashed once
    assert not same(states[5].params["fc2.weight"][:, -1], kept)


def test_what_is_evaluated_is_the_step_of_the_round_that_was_done():
    algorithm = slt(server(), shares="equal", **SGD_SETTINGS)
    state = algorithm.init(first_model())
    at = [algorithm.model(replace(state, round=round)) for round in range(7)]
    assert [model.spec == told(algorithm, max(1, r)).spec for r, model in enumerate(at)] == [
        True
    ] * 7
    assert at[6].spec == SPEC and same(dict(at[6].params), dict(params()))
    assert algorithm.report(replace(state, round=6)) == {"head_width": 1.0}


def test_the_constraint_of_the_whole_model_is_fedavg():
    full = run(slt(server(), constraint=1.0, **SGD_SETTINGS))
    assert same(dict(full.params), dict(run(fedavg(server(), **SGD_SETTINGS)).params))


def test_a_mean_over_clients_weighs_their_examples():
    """Whole tensors of the first step, as of `fold`."""
    algorithm = slt(server(), constraint=1.0, **SGD_SETTINGS)
    state = algorithm.init(first_model())
    updates = [
        replace(algorithm.client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, devices())
    ]
    expected = fold(state.params, updates).params()
    assert same(dict(algorithm.server_update(state, updates).params), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraint": -0.1}, "constraint must lie in"),
        ({"constraint": 1.1}, "constraint must lie in"),
        ({"shares": "none"}, "shares must be"),
        ({"ends": "fc2"}, "cannot be divided after 'fc2'"),
        (
            {"constraint": 0.25},
            r"part 'head' takes 0\.\d+ MB with the narrowest head.* larger constraint, 0 for",
        ),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        slt(server(), **SGD_SETTINGS, **settings)
