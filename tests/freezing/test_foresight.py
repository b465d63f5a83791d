"""Stages under masks: where the masks come from, what they save, and that nothing pruned moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from federation import ENGINE, SEED, client_data, same, server
from freezing.test_methods import METHODS, SGD

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm
from fedlean.core import Model
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.engine.open import open_engine
from fedlean.freezing.foresight import unused
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.planning.rehearse import Stage as Rehearsed
from fedlean.pruning.density import density
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.submodels.parts import parts
from fedlean.tree import apply_mask, is_packed, kept_counts

WHOLE = resnet8((1, 8, 8), 3)
PARAMS = init_params(WHOLE, SEED)
DATA = client_data()[:2]
DEVICES = [Device(client, num_examples=data.num_examples) for client, data in enumerate(DATA)]
NATIVE = replace(load_profile("generic"), dense_way=False, memory_bytes=10**12)
HALF = {"density": 0.5, "prune_steps": 10}


def made(method: str, model: Model | None = None, **settings) -> tuple[FederatedAlgorithm, object]:
    """With the state before the first round."""
    module, rounds, own = METHODS[method]
    make: Callable[..., FederatedAlgorithm] = getattr(module, method)
    algorithm = make(replace(server(rounds), spec=WHOLE), **{**SGD, **own, **settings})
    state = algorithm.init(model or Model(WHOLE, PARAMS))
    while not (algorithm.configure(state, DEVICES) or algorithm.done(state)):
        state = algorithm.server_update(state, ())
    return algorithm, state


def stages_of(method: str, **settings):
    """A task of each stage, and the algorithm; nobody answers."""
    algorithm, state = made(method, **settings)
    found = {}
    while not algorithm.done(state):
        task = algorithm.configure(state, DEVICES)[0]
        found.setdefault((task.phase, task.hparams["stage"]), task)
        state = algorithm.server_update(state, ())
    return algorithm, found


@pytest.mark.parametrize("method", METHODS)
def test_the_server_prunes_alone_before_the_first_round(method):
    module, rounds, own = METHODS[method]
    begun = replace(server(rounds), spec=WHOLE)
    algorithm = getattr(module, method)(begun, **SGD, **own, **HALF)
    state = algorithm.init(Model(WHOLE, PARAMS))
    assert (state.phase, dict(state.masks)) == ("prune", {}) and not algorithm.done(state)
    assert algorithm.configure(state, DEVICES) == []

    after = algorithm.server_update(state, ())
    masks = prune_by_flow(WHOLE, PARAMS, 0.5, 10)
    assert same(dict(after.masks), dict(masks)) and density(after.masks) == pytest.approx(0.5, 0.01)
    assert same(dict(after.params), apply_mask(PARAMS, masks))
    assert after.round == 0 and after.phase in ("train", "shrink")
    # a model that has these masks to begin with is trained alike
    _, given = made(method, Model(WHOLE, apply_mask(PARAMS, masks), masks))
    assert same(given, after)


@pytest.mark.parametrize("method", METHODS)
def test_a_density_of_one_changes_nothing(method):
    _, plain = made(method)
    algorithm, state = made(method, density=1.0, criterion="magnitude")
    assert same(state, plain) and not state.masks
    assert not algorithm.configure(state, DEVICES)[0].sub_model.masks


@pytest.mark.parametrize("beginning", ["together", "pieces", "memory"])
@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_stay_zero_and_frozen_ones_stay(method, beginning):
    """In what is sent, in the answers, which are packed, and in the merge; modules are dense."""
    settings = {"momentum": 0.9, "beginning": beginning, "micro_batch": 3}
    algorithm, state = made(method, **HALF, **settings)
    client_update = METHODS[method][0].client_update
    trained = set()
    while not algorithm.done(state):
        tasks = algorithm.configure(state, DEVICES)
        updates = [
            replace(client_update(task, DATA[task.client], ENGINE, {})[0], task=task)
            for task in tasks
        ]
        task, update = tasks[0], updates[0]
        own = {n for n in task.spec.prunable if n.removeprefix("student_") in WHOLE.prunable}
        assert task.sub_model.masks.keys() == own  # of frozen tensors, too
        for name, mask in task.sub_model.masks.items():
            assert not task.params[name][~mask].any()
            if name in update.params:
                assert is_packed(update.params[name], mask)
                trained.add(name)
        after = algorithm.server_update(state, updates)
        for name, mask in after.masks.items():
            assert not after.params[name][~mask].any()
            assert (after.params[name] is state.params[name]) == (name not in update.params)
        assert same(dict(after.masks), dict(state.masks))
        shown = algorithm.model(after) if algorithm.model else Model(WHOLE, after.params)
        if algorithm.model:  # what is evaluated and saved has its masks
            assert shown.masks.keys() == set(shown.spec.prunable) & set(WHOLE.prunable)
        state = after
    assert trained == set(WHOLE.prunable)


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_takes_less_memory_bytes_and_operations(method):
    """At a tenth of the weights; its native session holds what the plan says, to the byte."""
    pytest.importorskip("fedlean._native")
    tenth = {"density": 0.1, "criterion": "random"}  # of each layer
    dense, thin = (stages_of(method, **how) for how in ({}, tenth))
    assert dense[1].keys() == thin[1].keys()
    for key, task in thin[1].items():
        prices = [
            cost(one, algorithm.work(one), NATIVE)
            for algorithm, one in ((dense[0], dense[1][key]), (thin[0], task))
        ]
        assert prices[1].peak_memory_bytes < prices[0].peak_memory_bytes, key
        assert prices[1].flops < prices[0].flops, key
        down = [wire.task_bytes(one, wire.Known()) for one in (dense[1][key], task)]
        assert down[1] < down[0], key
        engine, held = open_engine("native", 1), []
        opening = Watched(engine, held)
        METHODS[method][0].client_update(task, DATA[task.client], opening, {})
        assert max(held) == prices[1].peak_memory_bytes - outside(thin[0].work(task)), key


def outside(works) -> int:
    return 4 * max(work.held_floats for work in works)


class Watched:
    """An engine that notes what its sessions of training hold at once."""

    def __init__(self, engine, held: list[int]):
        self._engine, self._held = engine, held

    def open(self, *given, **named):
        session = self._engine.open(*given, **named)
        step, descend, held = session.step, session.descend, self._held

        def noted(call):
            def called(*given, **named):
                found = call(*given, **named)
                held.append(session.held_bytes)
                return found

            return called

        session.step, session.descend = noted(step), noted(descend)
        return session

    def __getattr__(self, name: str):
        return getattr(self._engine, name)


def test_frozen_weights_are_sparse_too():
    """The last stage without the masks of what it freezes would take more."""
    algorithm, stages = stages_of("smartfreeze", **{**HALF, "density": 0.1})
    task = stages["train", "stage3"]
    masks = task.sub_model.masks
    assert task.sub_model.frozen & masks.keys()
    trained = {name: mask for name, mask in masks.items() if name not in task.sub_model.frozen}
    other = replace(task, sub_model=replace(task.sub_model, masks=trained))
    needs = [cost(one, algorithm.work(one), NATIVE).peak_memory_bytes for one in (task, other)]
    assert needs[0] < needs[1]


def test_a_device_is_able_that_can_hold_a_stage_in_its_smaller_forms():
    """At 0.7 some layers are faster densely, with a byte of mask for each weight."""
    algorithm, state = made("smartfreeze", density=0.7, prune_steps=10)
    while state.stage < 2:
        state = algorithm.server_update(state, ())
    (task,) = algorithm.configure(state, [Device(0, 25, NATIVE)])

    def needs(limit: int) -> int:
        return cost(
            task, algorithm.work(task), replace(NATIVE, memory_bytes=limit)
        ).peak_memory_bytes

    fastest = needs(10**12)
    least = needs(1)
    assert needs(fastest - 1) <= fastest - 1 and least < fastest
    limits = [fastest, fastest - 1, least, least - 1, None]
    present = [Device(at, 25, NATIVE, limit) for at, limit in enumerate(limits)]
    assert [task.client for task in algorithm.configure(state, present)] == [0, 1, 2, 4]


def test_masks_of_another_criterion():
    _, state = made("smartfreeze", density=0.5, criterion="magnitude")
    weights = np.concatenate([abs(PARAMS[name]).ravel() for name in WHOLE.prunable])
    least = np.sort(weights)[len(weights) - int(0.5 * len(weights))]
    for name, mask in state.masks.items():
        assert np.array_equal(mask, abs(PARAMS[name]) >= least)


def test_a_part_without_weights_is_refused():
    """The first part's weights are the smallest of all, and half of all are pruned."""
    first = {name for name in parts(WHOLE)[0].tensors if name in WHOLE.prunable}
    small = {name: v * np.float32(1e-6) if name in first else v for name, v in PARAMS.items()}
    share = 1 - sum(PARAMS[name].size for name in first) / sum(
        PARAMS[name].size for name in WHOLE.prunable
    )
    with pytest.raises(ValueError, match=r"density=0\.\d+ leaves no weight of part 'stage1'"):
        made("smartfreeze", Model(WHOLE, small), density=share - 0.01, criterion="magnitude")


@pytest.mark.parametrize("method", METHODS)
def test_two_sources_of_masks_are_refused(method):
    masks = prune_by_flow(WHOLE, PARAMS, 0.5, 2)
    with pytest.raises(ValueError, match="has masks, and density asks for others"):
        made(method, Model(WHOLE, apply_mask(PARAMS, masks), masks), **HALF)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"density": 1e-9}, "density"),
        ({"criterion": "snip"}, "criterion must be one of"),
        ({"prune_steps": 0}, "prune_steps must be an integer of at least 1"),
    ],
)
def test_settings_that_are_refused(setting, said):
    with pytest.raises(ValueError, match=said):
        made("smartfreeze", **setting)


def test_settings_without_effect_are_named():
    assert set(unused({"density": 1.0, "criterion": "synflow"})) == {"criterion", "prune_steps"}
    assert unused({"density": 0.5, "criterion": "synflow"}) == {}
    assert set(unused({"density": 0.5, "criterion": "random"})) == {"prune_steps"}


@pytest.mark.parametrize("criterion", ["synflow", "ntk", "node", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_a_plan_walks_through_pruned_stages(method, criterion):
    """Each stage with masks of its tensors, as many weights together as in a run."""
    device, settings = Device(0, memory_bytes=10**9), {"density": 0.3, "criterion": criterion}
    walk = Rehearsed(WHOLE).walked(method, settings, device, NATIVE).walk
    stages = {(kind.phase, kind.task.hparams["stage"]) for kind in walk.kinds}
    assert stages == set(stages_of(method)[1]) and walk.complete
    whole = [kind for kind in walk.kinds if set(WHOLE.prunable) <= set(kind.task.spec.prunable)]
    kept = kept_counts(whole[-1].task.sub_model.masks)
    total = sum(kept[name] for name in WHOLE.prunable)
    assert total == pytest.approx(0.3 * sum(PARAMS[n].size for n in WHOLE.prunable), rel=0.01)
