"""PruneFL's masks on slices by width: one pattern a width, one mask that moves as PruneFL's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import (
    ENGINE,
    ROUNDS,
    SPEC,
    client_data,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)

from fedlean.algorithm import Device
from fedlean.core import ClientUpdate, Model, Statistic, Work
from fedlean.cost.way import peak_memory_bytes
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear
from fedlean.methods.heterofl import heterofl
from fedlean.methods.prunefl import prunefl
from fedlean.methods.prunefl_widths import client_update, prunefl_widths
from fedlean.pruning.density import full_masks
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.method import given_settings
from fedlean.spec import sequential
from fedlean.submodels.width import width
from fedlean.tree import apply_mask, kept_counts, num_kept, pattern_hash, unpack

SGD_SETTINGS = {"lr": 0.05, "local_steps": 2, "batch_size": 8}
SMALL = {**SGD_SETTINGS, "reconfigure_every": 2, "initial_density": 0.5}
CASE = Case(
    method=prunefl_widths,
    settings={**SMALL, "assign": "fixed", "cohort": 3},
    knob={"initial_density": 0.3},
    neutral={**SGD_SETTINGS, "widths": "1", "initial": "all", "reconfigure_every": 0},
    fedavg=SGD_SETTINGS,
)
MORE_CASES = {
    "drawn": Case(
        method=prunefl_widths,
        settings={**SMALL, "assign": "drawn", "importance_rounds": 2, "initial": "all"},
        knob={"assign": "fixed"},
        neutral="that of the case with fixed widths: with one width nothing is drawn",
    )
}
CUTS = {str(rate): width(SPEC, rate, scaler=True) for rate in (1.0, 0.5, 0.25)}


def restricted(masks, name):
    """`masks` of the whole model on a width: the beginning of every axis."""
    shapes = CUTS[name].spec.param_shapes
    return {n: m[tuple(slice(0, side) for side in shapes[n])] for n, m in masks.items()}


def pruned_state(algorithm, density=0.3):
    masks = prune_by_flow(SPEC, params(), density, 10)
    return algorithm.init(Model(SPEC, apply_mask(params(), masks), masks))


@pytest.mark.parametrize(
    ("first", "plain"),
    [
        ({"initial": "all"}, {"initial_pruning": False}),
        (
            {"initial": "synflow", "initial_density": 0.4, "importance_rounds": 2},
            {"initial": "synflow", "initial_density": 0.4, "importance_rounds": 2},
        ),
        (
            {"initial": "ntk", "initial_density": 0.3, "size_limit": 0.4, "size_target": 0.3},
            {"initial": "ntk", "initial_density": 0.3, "size_limit": 0.4, "size_target": 0.3},
        ),
    ],
)
def test_with_the_whole_width_alone_it_is_prunefl_bit_for_bit(first, plain):
    shared = {**SGD_SETTINGS, "reconfigure_every": 2, "cohort": 3, "momentum": 0.5}
    ours = run(prunefl_widths(server(), widths="1", **shared, **first))
    theirs = run(prunefl(server(), **shared, **plain))
    assert ours.reconfigurations == theirs.reconfigurations == 2
    assert same(dict(ours.params), dict(theirs.params))
    assert same(dict(ours.masks), dict(theirs.masks)) and num_kept(ours.masks) < 840


def test_with_all_weights_that_never_move_it_is_heterofl():
    ours = run(
        prunefl_widths(server(), initial="all", assign="fixed", reconfigure_every=0, **SGD_SETTINGS)
    )
    theirs = run(heterofl(server(), assign="fixed", **SGD_SETTINGS))
    assert same(dict(ours.params), dict(theirs.params))


def test_one_pattern_a_width_the_restriction_of_one_mask():
    algorithm = prunefl_widths(server(), assign="drawn", **SMALL)
    seen = []

    def watch(progress, record):
        if record.tasks:
            seen.append(record.tasks)
            before = masks[-1]
            for task in record.tasks:
                name = str(task.hparams["width"])
                assert same(dict(task.sub_model.masks), restricted(before, name))
                assert task.spec == CUTS[name].spec
        masks.append(progress.state.masks)

    masks = [{}]
    run(algorithm, watch=watch)
    assert len(seen) == ROUNDS
    for tasks in seen:
        by_width = {}
        for task in tasks:
            by_width.setdefault(task.hparams["width"], set()).add(
                pattern_hash(task.sub_model.masks)
            )
        assert all(len(patterns) == 1 for patterns in by_width.values())
    assert {task.hparams["width"] for tasks in seen for task in tasks} == {"1.0", "0.5", "0.25"}
    assert not same(masks[1], masks[-1]), "reconfigurations move the one mask"


def test_clients_of_a_width_are_given_the_same_arrays_packed():
    algorithm = prunefl_widths(server(), assign="fixed", **SMALL)
    tasks = algorithm.configure(pruned_state(algorithm), devices())
    assert [task.hparams["width"] for task in tasks] == ["1.0", "0.5", "0.25", "1.0"]
    for name in SPEC.prunable:
        assert tasks[0].sub_model.masks[name] is tasks[3].sub_model.masks[name]
        assert tasks[0].params[name] is tasks[3].params[name]
        assert tasks[1].params[name].shape == (np.count_nonzero(tasks[1].sub_model.masks[name]),)


def test_what_no_slice_holds_keeps_value_and_mask():
    """Through three reconfigurations; inside of the widest slice both move."""
    algorithm = prunefl_widths(server(8), widths="0.5 0.25", assign="fixed", **SMALL)
    states = []
    run(algorithm, rounds=8, watch=lambda progress, record: states.append(progress.state))
    first, last = states[0], states[-1]
    assert (first.phase, first.round, last.reconfigurations) == ("train", 0, 3)
    moved = 0
    for name, value in first.params.items():
        outside = np.ones(value.shape, bool)
        outside[tuple(slice(0, side) for side in CUTS["0.5"].spec.tensor_shapes[name])] = False
        assert last.params[name][outside].tobytes() == value[outside].tobytes()
        assert not np.array_equal(last.params[name][~outside], value[~outside])
        if name in SPEC.prunable:
            mask = first.masks[name]
            assert np.array_equal(last.masks[name][outside], mask[outside])
            moved += int(np.sum(last.masks[name] != mask))
    outer = sum(
        int(first.masks[name].sum()) - int(kept.sum())
        for name, kept in restricted(first.masks, "0.5").items()
    )
    assert moved and outer, "weights inside went or came back, and some outside are kept"


def answer(task, examples, at):
    """The model as it was sent, and Σ g² that is 0 but `at` some coordinates."""
    sums = {name: np.zeros(shape, np.float32) for name, shape in task.spec.param_shapes.items()}
    for (name, *index), value in at.items():
        sums[name][tuple(index)] = value
    statistics = {"importance": Statistic(sums, "mean")}
    return ClientUpdate(task.client, examples, task.params, task.sub_model, statistics, task=task)


def test_importance_is_the_mean_over_those_who_hold_a_coordinate():
    """One weight may stay.  Width 1 has 25 examples, width 0.5 has 75.

    fc1 [0, 0], which both hold: (25·4 + 75·0)/100 = 1.  fc1 [11, 0], which one of them holds: 2.
    Over all examples that would be 0.5, and fc1 [0, 0] would stay.
    """
    algorithm = prunefl_widths(
        server(),
        widths="1 0.5",
        assign="fixed",
        initial="all",
        reconfigure_every=1,
        size_limit=1.2 / 840,
        prunable_fraction=1.0,
    )
    state = algorithm.init(first_model())
    none = {name: np.zeros_like(mask) for name, mask in state.masks.items()}
    state = replace(state, masks=none, params={k: np.zeros_like(v) for k, v in params().items()})
    wide, half = algorithm.configure(state, devices())[:2]
    updates = [
        answer(wide, 25, {("fc1.weight", 0, 0): 4.0, ("fc1.weight", 11, 0): 2.0}),
        answer(half, 75, {}),
    ]
    after = algorithm.server_update(state, updates)
    assert num_kept(after.masks) == 1 and after.masks["fc1.weight"][11, 0]
    assert after.reconfigurations == 1


def test_what_was_not_held_before_a_reconfiguration_is_left_as_it_is():
    """Width 0.5 alone answers: inside of it the smallest go and the important come back."""
    algorithm = prunefl_widths(
        server(), widths="1 0.5", assign="fixed", initial="all", reconfigure_every=1
    )
    state = pruned_state(algorithm)
    half = algorithm.configure(state, devices())[1]
    pruned = np.argwhere(~half.sub_model.masks["fc1.weight"])[0]
    after = algorithm.server_update(state, [answer(half, 5, {("fc1.weight", *pruned): 50.0})])
    assert after.masks["fc1.weight"][tuple(pruned)] and after.params["fc1.weight"][tuple(pruned)]
    for name in SPEC.prunable:
        outside = np.ones(SPEC.param_shapes[name], bool)
        outside[tuple(slice(0, side) for side in half.spec.param_shapes[name])] = False
        assert np.array_equal(after.masks[name][outside], state.masks[name][outside])
        assert np.array_equal(after.params[name][outside], state.params[name][outside])
    assert num_kept(after.masks) < num_kept(state.masks)


def test_nobody_answers_and_nothing_changes():
    algorithm = prunefl_widths(server(), assign="fixed", **{**SMALL, "reconfigure_every": 1})
    state = pruned_state(algorithm)
    after = algorithm.server_update(state, [])
    assert after.round == 1 and after.reconfigurations == 0
    assert same(after.masks, state.masks) and same(dict(after.params), dict(state.params))


def test_a_sparser_model_is_held_in_wider_slices():
    """And in the round that takes g² in narrower ones: each by what its task is planned to take."""
    sparse = pruned_state(prunefl_widths(server(), **SMALL), density=0.05)
    dense = replace(sparse, masks=full_masks(SPEC), params=params())

    def need(state, name, steps):
        cut = CUTS[name]
        kept = kept_counts(restricted(state.masks, name))
        return peak_memory_bytes(cut.spec, [Work(2, 8, importance_steps=steps, kept=kept)])

    memory = need(sparse, "1.0", 0)
    assert need(dense, "1.0", 0) > memory < need(sparse, "1.0", 2)
    algorithm = prunefl_widths(server(), **SMALL)
    present = [Device(0, memory_bytes=memory), Device(1)]

    def widths(state):
        return [task.hparams["width"] for task in algorithm.configure(state, present)]

    assert widths(sparse) == ["1.0", "1.0"]
    for state in (dense, replace(sparse, round=1)):  # g² is taken in round 2
        steps = 2 if state.round else 0
        fitting = next((n for n in CUTS if need(state, n, steps) <= memory), "0.25")
        assert widths(state) == [fitting, "1.0"] and fitting != "1.0"


def test_no_device_holds_more_than_it_has_in_a_run():
    memory = {0: 30_000, 1: 14_000, 2: 9_000, 3: None}

    def present(step):
        del step
        return [Device(client, memory_bytes=each) for client, each in memory.items()]

    algorithm = prunefl_widths(server(), **SMALL)
    held = []

    def watched(task, batches, engine, state):
        opened = []

        class Noting:
            name, arithmetic = engine.name, engine.arithmetic
            instruction_set = engine.instruction_set

            def open(self, *arguments, **settings):
                opened.append(engine.open(*arguments, **settings))
                return opened[-1]

        out = client_update(task, batches, Noting(), state)
        peak = max(session.peak_memory_bytes for session in opened)
        held.append((task.client, task.hparams["width"], peak))
        return out

    dispatch = LocalDispatch(watched, ENGINE, client_data(), present)
    state = run(algorithm, dispatch=dispatch)
    assert state.round == ROUNDS and len({name for _, name, _ in held}) > 1
    assert all(memory[client] is None or peak <= memory[client] for client, _, peak in held)


def test_sums_of_another_slice_are_dropped():
    """Clients keep g² for two rounds; who is given another width starts anew."""
    settings = {**SMALL, "importance_rounds": 2, "lr": 1e-12, "importance_dtype": "fp32"}
    algorithm = prunefl_widths(server(), assign="fixed", **settings, importance_multiple=0.0)
    state = pruned_state(algorithm)
    wide, half = algorithm.configure(state, devices())[:2]
    data = client_data()[0]
    _, held = client_update(wide, data, ENGINE, {})
    assert held["importance/fc1.weight"].shape == (12, 64)
    again = algorithm.configure(replace(state, round=1), devices())
    alone = client_update(again[1], data, ENGINE, {})[0].statistics["importance"].tensors
    other = client_update(again[1], data, ENGINE, held)[0].statistics["importance"].tensors
    both = client_update(again[0], data, ENGINE, held)[0].statistics["importance"].tensors
    fresh = client_update(again[0], data, ENGINE, {})[0].statistics["importance"].tensors
    assert half.spec == again[1].spec and same(dict(other), dict(alone))
    for name, values in fresh.items():
        assert np.array_equal(both[name], values + held[f"importance/{name}"])


def test_values_travel_at_the_density_of_the_slice():
    algorithm = prunefl_widths(server(), assign="fixed", **{**SMALL, "reconfigure_every": 0})
    state = pruned_state(algorithm)
    for task in algorithm.configure(state, devices())[:3]:
        update, _ = client_update(task, client_data()[task.client], ENGINE, {})
        masks = task.sub_model.masks
        for name, mask in masks.items():
            assert update.params[name].shape == (np.count_nonzero(mask),)
            assert not unpack(update.params[name], mask)[~mask].any()
        assert update.work == algorithm.work(task)
        assert sum(update.work[0].kept.values()) == num_kept(masks)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"initial": "snip"}, "initial='snip' needs devices that hold the whole model"),
        ({"initial": "client"}, "initial='client' needs devices that hold the whole model"),
        ({"initial": "random"}, "initial must be one of all, synflow, ntk"),
        ({"assign": "luck"}, "assign must be one of memory, fixed, drawn"),
        ({"widths": "0.5 1"}, "widths must be numbers"),
        ({"initial_density": 1e-4}, "initial_density: .* choose at least"),
        (
            {"size_limit": 0.1, "initial_density": 0.2},
            "initial_density=0.2 is above what the size limit .* 0.1",
        ),
        ({"reconfigure_every": -1}, "reconfigure_every"),
        ({"size_target": 0.1, "initial": "all"}, "size_target needs a size_limit"),
    ],
)
def test_bad_settings_are_named(setting, named):
    with pytest.raises(ValueError, match=named):
        prunefl_widths(server(), **setting)


def test_batch_norm_is_refused():
    layers = [("conv", Conv2d(4, 3)), ("bn", BatchNorm()), ("flat", Flatten()), ("fc", Linear(3))]
    with pytest.raises(ValueError, match="'bn' is a BatchNorm"):
        prunefl_widths(replace(server(), spec=sequential((1, 8, 8), layers)))


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["initial=all", "initial_density=0.3"], "initial is 'all'"),
        (["widths=0.5", "assign=fixed"], "widths names one width"),
        (["widths=1", "scaler=false"], "widths is 1 alone"),
        (["reconfigure_every=0", "importance_rounds=2"], "reconfigure_every is 0"),
        (["reconfigure_every=0", "size_limit=0.2"], "no mask moves"),
        (["initial=all", "reconfigure_every=0", "readd_scale=0.2"], "nothing is pruned"),
    ],
)
def test_a_setting_without_effect_is_refused_with_the_reason(texts, reason):
    with pytest.raises(ValueError, match=reason):
        given_settings("prunefl_widths", texts)
