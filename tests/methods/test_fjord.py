"""FjORD: its steps by hand on a linear model, what they cost, and what a device holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from weakref import ref

import numpy as np
import pytest
from conformance import Case
from federation import (
    CLIENTS,
    ENGINE,
    SPEC,
    client_data,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)
from methods.test_heterofl import having

from fedlean.core import Model, SubModel, Work
from fedlean.cost.price import Model as Priced
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.cost.way import peak_memory_bytes
from fedlean.layers import Flatten, Linear
from fedlean.methods.fedavg import fedavg
from fedlean.methods.fjord import client_update, fjord, work
from fedlean.methods.heterofl import heterofl
from fedlean.models.initialise import init_params
from fedlean.runtime.local import LocalDispatch
from fedlean.spec import ModelSpec, sequential
from fedlean.submodels.width import width

SGD_SETTINGS = {"lr": 0.05, "local_steps": 3, "batch_size": 8}
CASE = Case(
    method=fjord,
    settings={**SGD_SETTINGS, "cohort": 3, "assign": "fixed"},
    knob={"self_distillation": True},
    neutral={**SGD_SETTINGS, "widths": "1"},
    fedavg=SGD_SETTINGS,
    why_no_masks="slices are dense",
)
MORE_CASES = {
    "distilled": replace(
        CASE,
        settings={**CASE.settings, "self_distillation": True, "weight_decay": 1e-3},
        knob={"self_distillation": False},
        neutral={**SGD_SETTINGS, "widths": "1", "self_distillation": True},
    )
}
WIDTHS = (1.0, 0.5, 0.25)
LR, EXAMPLES = 0.05, 25  # client 0 has so many, which are one batch: whatever is drawn, all of them

# A map of 64 inputs to 4 units to 3 classes: z = V(Wx + w) + v, of which width p has 4p units.
LINEAR: ModelSpec = sequential((1, 8, 8), [("flat", Flatten()), ("w", Linear(4)), ("v", Linear(3))])


def gradients(held, x, units, target):
    """By hand, of the mean of -Σ target · log softmax(z) with the first units; 0 elsewhere.

    And softmax(z).
    """
    x = x.reshape(len(x), -1).astype(np.float64)
    w, v = held["w.weight"][:units].astype(np.float64), held["v.weight"][:, :units]
    hidden = x @ w.T + held["w.bias"][:units]
    z = hidden @ v.T + held["v.bias"]
    exp = np.exp(z - z.max(1, keepdims=True))
    p = exp / exp.sum(1, keepdims=True)
    dz = (p - target) / len(x)
    out = {name: np.zeros(value.shape) for name, value in held.items()}
    out["v.weight"][:, :units], out["v.bias"] = dz.T @ hidden, dz.sum(0)
    out["w.weight"][:units], out["w.bias"][:units] = (dz @ v).T @ x, (dz @ v).sum(0)
    return out, p


def task_of(steps: int, seed: int, **settings):
    """For a client that holds the whole linear model; from `seed` follow its draws."""
    own = replace(server(), spec=LINEAR)
    algorithm = fjord(own, lr=LR, batch_size=EXAMPLES, local_steps=steps, **settings)
    state = algorithm.init(Model(LINEAR, init_params(LINEAR, 3)))
    (task,) = algorithm.configure(state, devices()[:1])
    return replace(task, seed=seed)


def all_examples():
    ((x, y),) = client_data()[0].draw(steps=1, batch_size=EXAMPLES, seed=0)
    return x, np.eye(3)[y]


def trained(task, engine=ENGINE):
    update, kept = client_update(task, client_data()[0], engine, {})
    assert kept == {} and update.work == work(task)
    return update.params


def first_width(task) -> float:
    """Of a task of one step, by which units it moves."""
    moved = (trained(task)["w.weight"] != task.params["w.weight"]).any(1)
    assert moved.tolist() == sorted(moved.tolist(), reverse=True)
    return float(moved.sum() / 4)


def test_the_expected_step_on_a_linear_model_by_hand():
    """E[Δw] = -η/3 Σ_p ∇_p over p in {1, 1/2, 1/4}: a unit learns from each width that has it."""
    x, target = all_examples()
    steps: dict[float, dict] = {}
    for seed in range(30):
        task = task_of(1, seed)
        after = trained(task)
        found = first_width(task)
        assert [one.width for one in work(task)] == [found]
        steps.setdefault(found, {n: after[n] - value for n, value in task.params.items()})
    assert set(steps) == set(WIDTHS)
    full, half, quarter = (gradients(task.params, x, units, target)[0] for units in (4, 2, 1))
    for row, having_it in (
        (0, (full, half, quarter)),
        (1, (full, half)),
        (2, (full,)),
        (3, (full,)),
    ):
        for name, at in (("w.weight", row), ("w.bias", row), ("v.weight", (slice(None), row))):
            mean = sum(step[name][at] for step in steps.values()) / 3
            by_hand = -LR / 3 * sum(one[name][at] for one in having_it)
            np.testing.assert_allclose(mean, by_hand, rtol=0, atol=1e-7)
    mean = sum(step["v.bias"] for step in steps.values()) / 3
    by_hand = -LR / 3 * (full["v.bias"] + half["v.bias"] + quarter["v.bias"])
    np.testing.assert_allclose(mean, by_hand, rtol=0, atol=1e-7)


def test_widths_are_drawn_uniformly_and_anew_for_each_step():
    counts, orders = Counter[float](), set()
    for seed in range(100):
        ordered = work(task_of(6, seed))
        counts.update({one.width: one.steps for one in ordered})
        orders.add(tuple(one.steps for one in ordered))
    assert sum(counts.values()) == 600 and set(counts) == set(WIDTHS)
    assert all(abs(count - 200) < 58 for count in counts.values())  # 5 standard deviations
    assert len(orders) > 10


def drawn_order(task) -> list[float]:
    """By where the weights of each further step differ from those without it."""
    steps = int(task.hparams["local_steps"])
    held, order = [task.params], []
    for count in range(1, steps + 1):
        held.append(trained(replace(task, hparams={**task.hparams, "local_steps": count})))
        moved = (held[-1]["w.weight"] != held[-2]["w.weight"]).any(1)
        order.append(float(moved.sum() / 4))
    return order


def test_several_steps_by_hand_share_one_set_of_weights():
    x, target = all_examples()
    seen = set()
    for seed in range(6):
        task = task_of(5, seed)
        order = drawn_order(task)
        seen.update(order)
        held = {name: value.astype(np.float64) for name, value in task.params.items()}
        for share in order:
            found, _ = gradients(held, x, int(4 * share), target)
            held = {name: value - LR * found[name] for name, value in held.items()}
        for name, value in trained(task).items():
            np.testing.assert_allclose(value, held[name], rtol=0, atol=1e-6)
        steps = {one.width: one.steps for one in work(task)}
        assert steps == Counter(order)
    assert seen == set(WIDTHS)


def test_self_distillation_by_hand():
    """w - η (∇ CE(F_pmax) + ∇ KL(F_pmax || F_p)), both at the same w; decay once."""
    x, target = all_examples()
    decay, seen = 0.1, set()
    for seed in range(16):
        task = task_of(1, seed, self_distillation=True, weight_decay=decay)
        share = work(task)[-1].width
        seen.add(share)
        own, teacher = gradients(task.params, x, 4, target)
        taught, _ = gradients(task.params, x, int(4 * share), teacher)
        after = trained(task)
        for name, value in task.params.items():
            by_hand = value - LR * (own[name] + taught[name] + decay * value)
            np.testing.assert_allclose(after[name], by_hand, rtol=0, atol=1e-7)
    assert seen == set(WIDTHS)


def test_the_largest_teaches_itself_nothing():
    """A step that draws it is one of FedAvg; what it is charged is that alone."""
    seed = next(seed for seed in range(30) if first_width(task_of(1, seed)) == 1)
    task, plain = task_of(1, seed, self_distillation=True), task_of(1, seed)
    assert [one.width for one in work(task)] == [1.0]
    for name, value in trained(task).items():
        np.testing.assert_allclose(value, trained(plain)[name], rtol=0, atol=1e-8)


class Counting:
    """An engine that knows what it opened, and how many of these are still held by somebody."""

    def __init__(self, inner):
        self.inner, self.opened, self.sessions, self.most_at_once = inner, [], [], 0
        self.name, self.arithmetic = inner.name, inner.arithmetic
        self.instruction_set = inner.instruction_set

    def open(self, spec, *arguments, **settings):
        session = self.inner.open(spec, *arguments, **settings)
        self.opened.append(spec.num_params)
        self.sessions.append(ref(session))
        alive = sum(each() is not None for each in self.sessions)
        self.most_at_once = max(self.most_at_once, alive)
        return session


def test_each_width_is_a_model_of_its_own_and_steps_of_one_in_a_row_share_it():
    sizes = {width(LINEAR, share).spec.num_params: share for share in WIDTHS}
    for seed in range(6):
        task, engine = task_of(6, seed), Counting(ENGINE)
        trained(task, engine)
        order = drawn_order(task)
        changes = [b for a, b in zip([None, *order], order, strict=False) if a != b]
        assert [sizes[size] for size in engine.opened] == changes


# What it costs


def tasks_of(algorithm, present=None):
    return algorithm.configure(algorithm.init(first_model()), present or devices())


def test_a_step_costs_what_its_width_does():
    """Its operations are those of the same steps on slices that are models of their own."""
    algorithm = fjord(server(), assign="fixed", local_steps=9, batch_size=8)
    profile = load_profile("raspberry_pi_4")
    saved = 0
    for task in tasks_of(algorithm):
        works = work(task)
        assert sum(one.steps for one in works) == 9
        priced = cost(task, works, profile)
        parts = [
            cost(
                Priced(width(task.spec, one.width).spec, SubModel()), [Work(one.steps, 8)], profile
            )
            for one in works
        ]
        assert priced.flops == sum(part.flops for part in parts)
        assert priced.seconds == pytest.approx(sum(part.seconds for part in parts))
        whole = cost(task, [Work(9, 8)], profile)
        assert priced.seconds <= whole.seconds
        saved += priced.flops < 0.8 * whole.flops
    assert saved >= 2


def test_the_log_charges_the_widths_that_were_drawn():
    records = []
    algorithm = fjord(server(), **SGD_SETTINGS)
    run(algorithm, watch=lambda progress, record: records.append(record))
    for record in records:
        expected = sum(cost(task, work(task), server().profile).flops for task in record.tasks)
        assert record.cost.flops == expected
        dense = [cost(task, [Work(3, 8)], server().profile).flops for task in record.tasks]
        assert record.cost.flops < sum(dense)


def floats(spec: ModelSpec) -> int:
    return sum(map(prod, spec.tensor_shapes.values()))


def test_memory_is_that_of_the_largest_and_of_its_weights_outside():
    """As they are read out of a session; the answer itself counts for no method."""
    (task,) = tasks_of(fjord(server(), **SGD_SETTINGS), having(None))
    own = work(replace(task, hparams={**task.hparams, "local_steps": 64}))
    plain = peak_memory_bytes(SPEC, [Work(64, 8)])
    assert peak_memory_bytes(SPEC, own) == plain + 4 * floats(SPEC)


@pytest.mark.parametrize("distilled", [False, True])
def test_one_session_is_open_at_a_time(distilled):
    for seed in range(4):
        engine = Counting(ENGINE)
        trained(task_of(6, seed, self_distillation=distilled), engine)
        assert engine.most_at_once == 1 and len(engine.opened) > 1


@pytest.mark.parametrize("distilled", [False, True])
def test_a_device_gets_the_largest_width_whose_dearest_round_it_can_hold(distilled):
    """To the byte, and no device has to refuse what it was sent, whatever it draws."""
    settings = {**SGD_SETTINGS, "self_distillation": distilled}
    algorithm = fjord(server(20), **settings)

    def widths(*memory):
        return [task.hparams["width"] for task in tasks_of(algorithm, having(*memory))]

    many = {"local_steps": 64}
    dearest = [
        max(
            peak_memory_bytes(
                task.spec, work(replace(task, seed=seed, hparams={**task.hparams, **many}))
            )
            for seed in range(3)
        )
        for task in tasks_of(fjord(server(), assign="fixed", **settings))[:3]
    ]
    assert widths(dearest[0], dearest[0] - 1, dearest[1], dearest[1] - 1) == [
        "1.0", "0.5", "0.5", "0.25"
    ]  # fmt: skip
    records = []
    memory = having(dearest[0], dearest[1], dearest[2], None)
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), lambda step: memory)
    run(algorithm, rounds=20, dispatch=dispatch, watch=lambda p, record: records.append(record))
    assert all(not record.refused and not record.left_out for record in records)
    assert all(record.answered == list(range(CLIENTS)) for record in records)


def test_a_device_trains_no_width_above_its_own():
    algorithm = fjord(server(), assign="fixed", widths="1 0.75 0.5", **SGD_SETTINGS)
    tasks = tasks_of(algorithm)
    assert [task.hparams["shares"] for task in tasks] == [
        "1.0 0.75 0.5", f"1.0 {0.5 / 0.75}", "1.0", "1.0 0.75 0.5"
    ]  # fmt: skip
    assert tasks[2].spec == width(SPEC, 0.5).spec and len(work(tasks[2])) == 1


def test_the_merge_is_heterofls():
    """Given the same answers; the slices have no scaler."""
    settings = {"assign": "fixed", **SGD_SETTINGS}
    one, other = fjord(server(), **settings), heterofl(server(), scaler=False, **settings)
    state, plain = (each.init(first_model()) for each in (one, other))
    tasks = one.configure(state, devices())
    assert [task.spec for task in tasks] == [
        task.spec for task in other.configure(plain, devices())
    ]
    updates = [
        replace(client_update(task, client_data()[task.client], ENGINE, {})[0], task=task)
        for task in tasks
    ]
    merged = one.server_update(state, updates).params
    assert same(dict(merged), dict(other.server_update(plain, updates).params))


def test_what_nobody_holds_keeps_its_value():
    algorithm = fjord(server(), widths="0.5 0.25", assign="fixed", **SGD_SETTINGS)
    after = run(algorithm).params
    for name, where in (
        ("conv.bias", np.s_[2:]),
        ("fc1.weight", np.s_[6:]),
        ("fc2.weight", np.s_[:, 6:]),
    ):
        assert after[name][where].tobytes() == params()[name][where].tobytes()
    assert not np.array_equal(after["conv.bias"][:2], params()["conv.bias"][:2])


def test_one_width_is_fedavg_with_momentum_too():
    settings = {**SGD_SETTINGS, "momentum": 0.5}
    plain = run(fedavg(server(), **settings))
    assert same(dict(run(fjord(server(), widths="1", **settings)).params), dict(plain.params))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"momentum": 0.9}, "momentum must be 0, got 0.9: a step trains one of several widths"),
        ({"loss": "bce", "self_distillation": True}, "loss must be 'ce' with self_distillation"),
        ({"assign": "best"}, "assign must be one of memory, fixed, drawn"),
        ({"widths": "0.25 1"}, r"widths must be numbers in \(0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(setting, said):
    with pytest.raises(ValueError, match=said):
        fjord(server(), **setting)
