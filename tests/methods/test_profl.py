"""ProFL: the order of its phases, what each may move, a map by hand, the movement by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import (
    ENGINE,
    SEED,
    client_data,
    devices,
    fresh_dispatch,
    run,
    same,
    server,
)

from fedlean.algorithm import Device
from fedlean.core import ClientUpdate, Model, SubModel
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.cost.way import peak_memory_bytes
from fedlean.freezing.output_module import output_module
from fedlean.layers import BatchNorm, Conv2d, GlobalAvgPool, Linear, ReLU
from fedlean.methods.profl import client_update, profl, rehearsals, unused
from fedlean.models.conv2 import conv2
from fedlean.models.initialise import init_params
from fedlean.planning import plan
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint, state_tree
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.method import complete
from fedlean.runtime.rounds import LoopState
from fedlean.spec import sequential
from fedlean.submodels.parts import parts
from fedlean.tree import apply_mask

SMALL = {"lr": 0.05, "local_steps": 2, "batch_size": 8, "map_steps": 2, "map_rounds": 1}
CASE = Case(
    method=profl,
    settings={**SMALL, "cohort": 3, "momentum": 0.5},
    knob={"map_lr": 0.1},
    neutral="a model has two parts or more, and each round trains one; FedAvg trains all",
    why_no_masks="stages are dense",
)
MORE_CASES = {
    "grow": replace(CASE, settings={**CASE.settings, "shrink": False}, knob={"momentum": 0.0}),
    "pieces": replace(CASE, settings={**CASE.settings, "beginning": "pieces", "micro_batch": 4}),
    "masked": replace(
        CASE,
        settings={**CASE.settings, "density": 0.5, "prune_steps": 5},
        knob={"criterion": "random"},
        why_no_masks="",
    ),
}

# ends in global average pooling and a linear layer; BatchNorm in every part
POOLED = sequential(
    (1, 8, 8),
    [
        ("conv_a", Conv2d(4, 3, padding=1, bias=False), "a"),
        ("norm_a", BatchNorm(), "a"),
        ("relu_a", ReLU(), "a"),
        ("conv_b", Conv2d(6, 3, stride=2, padding=1, bias=False), "b"),
        ("norm_b", BatchNorm(), "b"),
        ("relu_b", ReLU(), "b"),
        ("conv_c", Conv2d(8, 3, stride=2, padding=1, bias=False), "c"),
        ("norm_c", BatchNorm(), "c"),
        ("relu_c", ReLU(), "c"),
        ("mean", GlobalAvgPool(), "head"),
        ("fc", Linear(3), "head"),
    ],
)
# parts of vectors, each of another width
VECTORS = sequential(
    (16,),
    [
        ("fc1", Linear(9), "one"),
        ("relu1", ReLU(), "one"),
        ("fc2", Linear(7), "two"),
        ("relu2", ReLU(), "two"),
        ("fc3", Linear(5), "three"),
        ("relu3", ReLU(), "three"),
        ("fc4", Linear(3), "four"),
    ],
)
FC = ("fc.weight", "fc.bias")  # of POOLED


def of(spec, rounds=14, **settings):
    algorithm = profl(
        replace(server(rounds), spec=spec), **{**SMALL, "freezing": "never", **settings}
    )
    return algorithm, Model(spec, init_params(spec, SEED))


def walked(spec, rounds=14, **settings):
    """Every round: its first task, the state before it and the state after it."""
    algorithm, first = of(spec, rounds, **settings)
    states, found = [algorithm.init(first)], []

    def watch(progress, record):
        assert record.answered and not record.refused
        found.append((record.tasks[0], states[-1], progress.state))
        states.append(progress.state)

    progress = LoopState(states[0], ClientStore())
    run(algorithm, first=first, rounds=rounds, progress=progress, watch=watch)
    return found


def tensors(state):
    return {**state.params, **state.extra}


def moved(before, after):
    old, new = tensors(before), tensors(after)
    return {name for name in old if not same(old[name], new[name])}


def phases(found):
    """(phase, stage) in their order, each once."""
    return list(dict.fromkeys((task.phase, task.hparams["stage"]) for task, _, _ in found))


def part_tensors(spec, name):
    return next(part.tensors for part in parts(spec) if part.name == name)


def test_the_model_shrinks_from_its_end_and_grows_from_its_beginning():
    found = walked(POOLED)
    assert phases(found) == [
        ("shrink", "c"),
        ("map", "c"),
        ("shrink", "b"),
        ("map", "b"),
        ("grow", "a"),
        ("grow", "b"),
        ("grow", "c"),
    ]
    assert phases(walked(POOLED, rounds=4, shrink=False)) == [
        ("grow", "a"),
        ("grow", "b"),
        ("grow", "c"),
    ]


def test_each_round_moves_what_its_phase_trains_and_nothing_else():
    """Bit for bit, running statistics among them."""
    trained = {
        ("shrink", "c"): part_tensors(POOLED, "c"),
        ("map", "c"): {"surrogate_c.weight"},
        ("shrink", "b"): {*part_tensors(POOLED, "b"), "surrogate_c.weight", *FC},
        ("map", "b"): {"surrogate_b.weight"},
        ("grow", "a"): {
            *part_tensors(POOLED, "a"),
            *("surrogate_b.weight", "surrogate_c.weight"),
            *FC,
        },
        ("grow", "b"): {*part_tensors(POOLED, "b"), "surrogate_c.weight", *FC},
        ("grow", "c"): part_tensors(POOLED, "c"),
    }
    for task, before, after in walked(POOLED):
        expected = trained[task.phase, str(task.hparams["stage"])]
        assert moved(before, after) == expected, task.phase
        sent = client_update(task, client_data()[task.client], ENGINE, {})[0].params
        assert sent.keys() == expected


def test_the_vector_models_own_linear_layers_are_mapped_into():
    """Of four parts the first three end in vectors: an FC of its own after each."""
    shapes = {
        "surrogate_fc_one.weight": (3, 9),
        "surrogate_fc_two.weight": (3, 7),
    }
    algorithm, first = of(VECTORS)
    state = algorithm.init(first)
    assert [part.name for part in parts(VECTORS)] == ["one", "two", "head"]
    weights = {name: value.shape for name, value in state.extra.items() if "weight" in name}
    assert weights == shapes
    data = [_Vectors(data) for data in client_data()]
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, data)
    seen, before = {}, state

    def watch(progress, record):
        nonlocal before
        task = record.tasks[0]
        assert record.answered and not record.refused
        seen[task.phase, task.hparams["stage"]] = moved(before, progress.state)
        before = progress.state

    progress = LoopState(state, ClientStore())
    run(algorithm, first=first, rounds=14, dispatch=dispatch, progress=progress, watch=watch)

    def fc(name):
        return {f"surrogate_fc_{name}.weight", f"surrogate_fc_{name}.bias"}

    assert seen["map", "head"] == fc("two") and seen["map", "two"] == fc("one")
    assert seen["shrink", "two"] == {"fc2.weight", "fc2.bias", *fc("two")}
    assert seen["grow", "one"] == {"fc1.weight", "fc1.bias", *fc("one")}


class _Vectors:
    """The first sixteen pixels of a client's images."""

    def __init__(self, inner):
        self.inner, self.num_examples = inner, inner.num_examples

    def draw(self, **how):
        return ((x.reshape(len(x), -1)[:, :16].copy(), y) for x, y in self.inner.draw(**how))


def test_a_model_that_ends_in_a_wide_head_has_an_fc_in_its_module():
    """conv2: the head is mapped into pooling and an FC, conv2 into a convolution before that."""
    spec = conv2((1, 8, 8), 3)
    algorithm, first = of(spec)
    state = algorithm.init(first)
    assert {name: value.shape for name, value in state.extra.items()} == {
        "surrogate_conv2.weight": (64, 32, 3, 3),
        "surrogate_fc.weight": (3, 64),
        "surrogate_fc.bias": (3,),
    }
    tasks = {}
    for _ in range(14):
        task = algorithm.configure(state, devices())[0]
        tasks[task.phase, task.hparams["stage"]] = task
        state = algorithm.server_update(state, ())
    free = {
        key: set(task.spec.tensor_shapes) - task.sub_model.frozen for key, task in tasks.items()
    }
    assert free["map", "head"] == {"surrogate_fc.weight", "surrogate_fc.bias"}
    assert free["map", "conv2"] == {"surrogate_conv2.weight"}
    assert tasks["map", "head"].hparams["student"] == "surrogate_fc"
    copy = tasks["map", "conv2"]
    assert copy.hparams["student"] == "student_surrogate_fc"
    assert same(copy.params["student_surrogate_fc.bias"], copy.params["surrogate_fc.bias"])


def naive_conv_gradient(x, out_gradient, stride=2):
    """∂/∂W of a 3x3 convolution with padding 1, by its definition: x (B, C, H, W)."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = np.zeros((out_gradient.shape[1], x.shape[1], 3, 3))
    for i, j in np.ndindex(*out_gradient.shape[2:]):
        patch = padded[:, :, stride * i : stride * i + 3, stride * j : stride * j + 3]
        found += np.einsum("bo,bcuv->ocuv", out_gradient[:, :, i, j], patch)
    return found


def naive_conv(x, weight, stride=2):
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    side = -(-x.shape[2] // stride)
    out = np.zeros((len(x), len(weight), side, side))
    for i, j in np.ndindex(side, side):
        patch = padded[:, :, stride * i : stride * i + 3, stride * j : stride * j + 3]
        out[:, :, i, j] = np.einsum("bcuv,ocuv->bo", patch, weight.astype(np.float64))
    return out


def test_a_map_by_hand():
    """W <- W - lr·v, v <- m·v + g + wd·W, with g of the mean over B·C of (student - teacher)²."""
    lr, momentum, decay = 0.2, 0.5, 0.01
    task = next(
        task
        for task, _, _ in walked(
            POOLED, map_lr=lr, map_momentum=momentum, map_weight_decay=decay, map_steps=3
        )
        if task.phase == "map" and task.hparams["stage"] == "c"
    )
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    weight = task.params["surrogate_c.weight"].astype(np.float64)
    fc, bias = (task.params[name].astype(np.float64) for name in FC)
    frozen = ENGINE.open_forward(
        POOLED, {n: task.params[n] for n in POOLED.tensor_shapes}, SubModel(), batch_size=8
    )
    velocity, losses = np.zeros_like(weight), []
    for x, _ in client_data()[0].draw(steps=3, batch_size=8, seed=task.seed):
        seen = frozen.forward(x, taps=["relu_b"])
        features, teacher = np.array(seen["relu_b"]), seen["fc"].astype(np.float64)
        out = naive_conv(features, weight)
        off = out.mean((2, 3)) @ fc.T + bias - teacher
        losses.append((off**2).mean())
        pooled = (2 * off / off.size) @ fc
        pixels = out.shape[2] * out.shape[3]
        spread = np.broadcast_to(pooled[:, :, None, None] / pixels, out.shape)
        velocity = momentum * velocity + naive_conv_gradient(features, spread) + decay * weight
        weight = weight - lr * velocity
    assert update.params.keys() == {"surrogate_c.weight"}
    np.testing.assert_allclose(update.params["surrogate_c.weight"], weight, rtol=1e-4, atol=1e-6)
    assert update.metrics["train_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert not same(update.params["surrogate_c.weight"], task.params["surrogate_c.weight"])


def test_a_map_is_merged_by_examples():
    algorithm, first = of(POOLED)
    state = algorithm.init(first)
    while state.phase != "map":
        state = algorithm.server_update(state, ())
    updates = [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in algorithm.configure(state, devices())
    ]
    merged = algorithm.server_update(state, iter(updates))
    name = "surrogate_c.weight"
    total = sum(each.num_examples * each.params[name].astype(np.float64) for each in updates)
    mean = total / sum(each.num_examples for each in updates)
    np.testing.assert_array_equal(merged.extra[name], mean.astype(np.float32))


def test_growing_begins_with_what_shrinking_left():
    """Stand-ins and weights of parts, bit for bit; each stage goes on from the one before."""
    found = walked(POOLED)
    first = next(i for i, (task, _, _) in enumerate(found) if task.phase == "grow")
    for task, before, _ in found[first:]:
        held = tensors(before)
        assert all(same(value, held[name]) for name, value in task.params.items())
    task = found[first][0]
    assert {"surrogate_b.weight", "surrogate_c.weight", *FC} <= task.params.keys()
    drawn = init_params(POOLED, SEED)
    left = tensors(found[first - 1][2])
    for name in ("surrogate_b.weight", "surrogate_c.weight"):
        assert same(task.params[name], left[name])
    assert not same(left["conv_b.weight"], drawn["conv_b.weight"])
    assert not same(left["conv_c.weight"], drawn["conv_c.weight"])
    assert same(left["conv_a.weight"], drawn["conv_a.weight"]), "shrinking ends with part 2"


def test_without_shrinking_the_stand_ins_are_as_drawn():
    algorithm, first = of(POOLED, shrink=False)
    state = algorithm.init(first)
    task = algorithm.configure(state, devices())[0]
    expected = init_params(task.spec, SEED)
    for name in ("surrogate_b.weight", "surrogate_c.weight"):
        assert same(task.params[name], expected[name])
    assert same(task.params["fc.weight"], first.params["fc.weight"])


def shifted(state, task, amount):
    """An answer that moves every trained value of the state by `amount`."""
    held = tensors(state)
    names = [name for name in task.spec.tensor_shapes if name not in task.sub_model.frozen]
    params = {name: held[name] + np.float32(amount) for name in names}
    return ClientUpdate(task.client, 1, params, task.sub_model)


def driven(algorithm, state, amounts):
    """The states after rounds in which one client moves everything by so much."""
    found = []
    for amount in amounts:
        task = algorithm.configure(state, devices())[0]
        state = algorithm.server_update(state, [shifted(state, task, amount)])
        found.append(state)
    return found


def test_effective_movement_by_hand():
    """Over H = 4: |Σ moves| / Σ |moves| of moves 1, 1, -1, 1, 1, 0."""
    algorithm, first = of(
        POOLED, 40, freezing="movement", window=4, values=9, shrink_share=0.9, below=9.0
    )
    zero = {name: np.zeros_like(value) for name, value in first.params.items()}
    states = driven(algorithm, algorithm.init(Model(POOLED, zero)), [1, 1, -1, 1, 1, 0])
    found = [algorithm.report(state)["movement"] for state in states]
    assert found == pytest.approx([1, 1, 1 / 3, 2 / 4, 2 / 4, 1 / 3], abs=1e-6)
    assert algorithm.report(states[-1])["floor"] == pytest.approx(0.5)


def test_movement_decides_when_a_part_ends():
    """A straight line stands still at 1, so W values of a window of 2 are there after 3 rounds; an
    oscillation has movement 0, which is below every limit."""
    quick = {"freezing": "movement", "window": 2, "values": 2, "patience": 1}
    algorithm, first = of(POOLED, 40, **quick, below=9.0)
    states = driven(algorithm, algorithm.init(first), [1] * 3)
    assert [state.phase for state in states] == ["shrink", "shrink", "map"]
    assert [algorithm.report(state)["frozen"] for state in states] == [0, 0, 1]
    algorithm, first = of(POOLED, 40, **quick, below=1.25)
    states = driven(algorithm, algorithm.init(first), [1] * 5)
    assert {state.phase for state in states} == {"shrink"}
    states = driven(algorithm, algorithm.init(first), [1, -1, 1])
    assert states[-1].phase == "map"


def test_the_last_stage_goes_on_until_the_rounds_are_over():
    quick = {"freezing": "movement", "window": 2, "values": 2, "patience": 1, "below": 9.0}
    found = walked(POOLED, 30, **quick, threshold=900.0)
    ends = {(task.phase, task.hparams["stage"]): after.round for task, _, after in found}
    assert list(ends.values()) == [3, 4, 7, 8, 11, 14, 30]
    frozen = [after.round for _, _, after in found if after.measured.get("frozen")]
    assert frozen == [3, 7, 11, 14]  # the last part never is


@pytest.mark.parametrize(
    ("rounds", "share", "maps", "ends"),
    [
        (20, 0.5, 1, [4, 5, 9, 10, 13, 16, 20]),
        (20, 0.5, 3, [2, 5, 7, 10, 13, 16, 20]),
        (7, 0.0, 1, [1, 2, 3, 4, 5, 6, 7]),  # each phase has a round
        (12, 1.0, 1, [3, 4, 8, 9, 10, 11, 12]),
    ],
)
def test_shares_of_the_rounds(rounds, share, maps, ends):
    algorithm, first = of(POOLED, rounds, shrink_share=share, map_rounds=maps)
    state, last = algorithm.init(first), {}
    while not algorithm.done(state):
        at = state.at
        state = algorithm.server_update(state, ())
        last[at] = state.round
    assert list(last.values()) == ends


def test_too_few_rounds_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"3 parts need at least 7 rounds, got 6: .*shrink=false"):
        of(POOLED, 6)
    with pytest.raises(ValueError, match="3 parts need at least 3 rounds, got 2"):
        of(POOLED, 2, shrink=False)


def test_a_part_that_is_its_own_stand_in_is_not_mapped():
    """Divided after the pooling, the last part is the FC that the module has, too."""
    found = walked(POOLED, ends="b mean")
    assert ("map", "head") not in phases(found) and ("shrink", "head") in phases(found)
    assert ("map", "mean") in phases(found)


def test_what_is_evaluated_is_what_was_trained_last():
    for task, _, after in walked(POOLED):
        algorithm, _ = of(POOLED)
        model = algorithm.model(after)
        if task.phase != "map":
            assert model.spec == task.spec
        held = tensors(after)
        assert all(same(value, held[name]) for name, value in model.params.items())
        assert model.params.keys() == model.spec.tensor_shapes.keys()
    assert model.spec == POOLED


def test_a_run_goes_on_in_the_middle_of_a_map(tmp_path):
    algorithm, first = of(POOLED, map_rounds=2)
    dispatch = fresh_dispatch(algorithm)
    saved = []

    def save(progress, record):
        if progress.state.phase == "map" and progress.state.round == progress.state.began + 1:
            tree = {"state": state_tree(progress.state), "store": progress.store.to_tree()}
            save_checkpoint(tmp_path / str(progress.step), progress.step, tree)
            saved.append(progress.step)

    def finished(algorithm, dispatch, progress, watch=None):
        return run(
            algorithm, first=first, rounds=14, dispatch=dispatch, progress=progress, watch=watch
        )

    whole = finished(algorithm, dispatch, LoopState(algorithm.init(first), ClientStore()), save)
    assert len(saved) == 2
    for step in saved:
        tree, _ = load_checkpoint(tmp_path / str(step))
        again, _ = of(POOLED, map_rounds=2)
        state = type(whole)(**tree["state"])
        progress = LoopState(state, ClientStore(tree["store"]), step)
        assert same(finished(again, fresh_dispatch(again), progress), whole)


@pytest.mark.parametrize("beginning", ["together", "pieces", "memory", "disk"])
def test_every_way_of_the_frozen_beginning_gives_the_same_bits(beginning):
    algorithm, first = of(POOLED)
    other, _ = of(POOLED, beginning=beginning, micro_batch=3)
    present = [
        Device(client, num_examples=data.num_examples) for client, data in enumerate(client_data())
    ]
    state = algorithm.init(first)
    while not algorithm.done(state):
        one, two = (each.configure(state, present)[0] for each in (algorithm, other))
        ways = [client_update(task, client_data()[0], ENGINE, {})[0] for task in (one, two)]
        assert same(dict(ways[0].params), dict(ways[1].params))
        state = algorithm.server_update(state, [replace(ways[0], task=one)])


def test_devices_that_cannot_hold_the_phase_are_not_drawn():
    algorithm, first = of(POOLED, cohort=2)
    state = algorithm.init(first)
    needs = {}
    while not algorithm.done(state):
        task = algorithm.configure(state, devices())[0]
        price = cost(task, algorithm.work(task), load_profile("generic"))
        needs[state.at] = needed = price.peak_memory_bytes
        works = algorithm.work(task)
        assert needed == peak_memory_bytes(task.spec, works, frozen=task.sub_model.frozen)
        limits = (needed - 1, needed, needed - 1, None)
        having = [Device(client, memory_bytes=each) for client, each in enumerate(limits)]
        assert [task.client for task in algorithm.configure(state, having)] == [1, 3]
        nobody = [Device(client, memory_bytes=1) for client in range(4)]
        assert len(algorithm.configure(state, nobody)) == 2
        state = algorithm.server_update(state, ())
    assert len(needs) == 7 and len(set(needs.values())) > 3


def test_a_plan_lists_every_phase():
    one = plan(POOLED, [Device(0)], profile=load_profile("generic"), methods=["profl"])
    listed = [(phase.name, phase.about) for phase in one.devices[0].methods[0].phases]
    assert [name for name, _ in listed] == [
        "shrink",
        "map",
        "shrink",
        "map",
        "grow",
        "grow",
        "grow",
    ]
    assert ["stage " + part for part in "ccbbabc"] == [about for _, about in listed]
    assert all(phase.recurring for phase in one.devices[0].methods[0].phases)


def test_a_rehearsal_has_a_round_for_every_phase_of_33_parts():
    (short,) = rehearsals(complete("profl", {}))
    layers = [(f"fc{i}", Linear(4), f"block{i}") for i in range(33)]
    deep = sequential((4,), [*layers, ("head", Linear(3), "head")])
    assert len(parts(deep)) == 33
    algorithm = profl(replace(server(short.rounds), spec=deep), **short.settings)
    state, seen = algorithm.init(Model(deep, init_params(deep, 0))), set()
    while not algorithm.done(state):
        seen.add(state.at)
        state = algorithm.server_update(state, ())
    assert seen == set(range(32 + 32 + 33))


def test_the_modules_are_those_of_the_released_code():
    """As `output_module` with the model's own FC."""
    algorithm, first = of(POOLED, shrink=False)
    task = algorithm.configure(algorithm.init(first), devices())[0]
    released = output_module(POOLED, parts(POOLED), 0, fc="fc")
    assert task.spec.nodes[-len(released) :] == released


def test_what_has_no_effect_is_said():
    defaults = complete("profl", {"density": 0.5})
    assert unused(defaults) == {}
    assert unused({**defaults, "shrink": False}).keys() >= {"map_lr", "shrink_share"}
    assert unused({**defaults, "freezing": "never"}).keys() >= {"window", "below"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"shrink_share": 1.5}, "shrink_share"),
        ({"map_rounds": 0}, "map_rounds"),
        ({"map_steps": 0}, "map_steps"),
        ({"map_lr": 0.0}, "map_lr"),
        ({"map_momentum": 1.0}, "map_momentum"),
        ({"map_weight_decay": -1.0}, "map_weight_decay"),
        ({"freezing": "soon"}, "freezing must be one of movement, never, got 'soon'"),
        ({"window": 1}, "window"),
        ({"below": 0.0}, "below"),
        ({"ends": "nowhere"}, "nowhere"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_hyperparameters_are_named(setting, said):
    with pytest.raises(ValueError, match=said):
        profl(server(), **setting)


def test_a_student_copy_of_a_masked_layer_has_its_mask():
    """The FC is the model's own, which the student of a map has frozen under another name."""
    spec = POOLED
    masks = {"fc.weight": np.arange(24).reshape(3, 8) % 2 == 0}
    params = apply_mask(init_params(spec, SEED), masks)
    algorithm, _ = of(spec)
    state = algorithm.init(Model(spec, params, masks))
    while state.phase != "map":
        state = algorithm.server_update(state, ())
    task = algorithm.configure(state, devices())[0]
    copy = "student_fc.weight"
    assert set(task.sub_model.masks) == {"fc.weight", copy} and copy in task.sub_model.frozen
    assert task.sub_model.masks[copy] is masks["fc.weight"]
    assert same(task.params[copy], params["fc.weight"])
