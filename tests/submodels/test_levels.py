"""Which sub-model a device gets, to the byte, and how sub-models are merged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from engine.cases import NET, start

from fedlean import wire
from fedlean.algorithm import Device
from fedlean.core import ClientTask, ClientUpdate, SubModel, Work
from fedlean.cost.profile import load_profile
from fedlean.cost.way import peak_memory_bytes
from fedlean.submodels.cut import whole
from fedlean.submodels.cut_round import fold_cuts
from fedlean.submodels.levels import fitting, levels, rates_from
from fedlean.submodels.width import width

WORK = Work(1, 4)
HALF, QUARTER = width(NET, 0.5), width(NET, 0.25, multiple=2)
PI = load_profile("raspberry_pi_4")
THREE = levels([("1", whole(NET), [WORK]), ("0.5", HALF, [WORK]), ("0.25", QUARTER, [WORK])], PI)
NEEDS = [each.memory_bytes for each in THREE.needs]


def device(memory_bytes: int | None) -> Device:
    return Device(0, memory_bytes=memory_bytes)


def test_a_level_needs_what_a_step_on_it_takes():
    cuts = (whole(NET), HALF, QUARTER)
    assert [peak_memory_bytes(cut.spec, [WORK]) for cut in cuts] == NEEDS
    assert sorted(NEEDS, reverse=True) == NEEDS
    more = levels([("1", whole(NET), [Work(1, 8, optimizer_floats=1)])], PI)
    assert more.needs[0].memory_bytes > NEEDS[0]


def test_a_device_gets_the_first_that_it_can_hold():
    large, middle, small = NEEDS
    for memory, at in [
        (large, 0),
        (large - 1, 1),
        (middle, 1),
        (middle - 1, 2),
        (small, 2),
        (small - 1, 2),  # nothing fits: found out before the task is sent
        (0, 2),
        (10**12, 0),
        (None, 0),
    ]:
        assert THREE.fitting(device(memory)) == at
        assert THREE.common([device(None), device(memory)]) == at
    assert THREE.common([device(large), device(middle), device(large - 1)]) == 1
    assert THREE.common([]) == 0


def test_budgets_of_a_round_decide_as_memory_does():
    """Each alone, at the last byte and the last second; the smallest counts."""
    traffic = [each.downlink_bytes + each.uplink_bytes for each in THREE.needs]
    seconds = [each.seconds(PI) for each in THREE.needs]
    assert traffic == sorted(traffic, reverse=True) and seconds == sorted(seconds, reverse=True)
    for at, (size, time) in enumerate(zip(traffic, seconds, strict=True)):
        for budget in ({"budget_bytes": size}, {"budget_seconds": time}):
            assert THREE.fitting(Device(0, **budget)) == at
        for budget in ({"budget_bytes": size - 1}, {"budget_seconds": 0.999 * time}):
            assert THREE.fitting(Device(0, **budget)) == min(at + 1, 2)
    both = Device(0, memory_bytes=NEEDS[0], budget_bytes=traffic[1])
    assert THREE.fitting(both) == 1
    slow = replace(PI, dense_flops_per_s=PI.dense_flops_per_s / 1000)
    assert THREE.fitting(Device(0, profile=slow, budget_seconds=seconds[0])) == 2


def test_what_a_level_sends_is_no_less_than_its_messages():
    """All that is over is room for what a task and an answer say beside their tensors."""
    for cut, needs in zip(THREE.cuts, THREE.needs, strict=True):
        hparams = {"lr": 0.1, "local_steps": 1, "batch_size": 4, "loss": "ce", "width": "0.25"}
        params = cut.take(start(NET))
        task = ClientTask(3, "train", 7, 99, cut.spec, params, SubModel(), hparams)
        down = len(wire.encode_task(task))
        answer = ClientUpdate(
            7, 40, params, SubModel(), metrics={"train_loss": 1 / 3}, work=(WORK,)
        )
        up = len(wire.encode_update(answer, task))
        assert down < needs.downlink_bytes <= down + 512
        assert up < needs.uplink_bytes <= up + wire.METRICS_BYTES


def test_levels_may_be_given_out_by_number_or_drawn():
    def given(assign, client: int, round: int) -> int:
        return THREE.given(assign, Device(client, memory_bytes=NEEDS[1]), seed=0, round=round)

    assert [given("memory", client, 5) for client in range(4)] == [1, 1, 1, 1]
    assert [given("fixed", client, 5) for client in range(4)] == [0, 1, 2, 0]
    seen = [[given("drawn", client, round) for client in range(3)] for round in range(50)]
    assert {level for levels in seen for level in levels} == {0, 1, 2}
    assert len({tuple(levels) for levels in seen}) > 10
    assert seen[7] == [given("drawn", client, 7) for client in range(3)]


def test_where_nothing_fits_it_is_what_needs_the_least():
    """A pruned layer may take more than a whole one, by its indices."""
    more, less = THREE.needs[:2]
    for needs, at in (((more, less), 1), ((less, more), 0), ((less, less), 1)):
        assert fitting(needs, Device(0, memory_bytes=1), PI) == at


def test_levels_have_names():
    assert THREE.cut("0.5") is HALF and THREE.cut("1").spec is NET
    with pytest.raises(ValueError, match="not in tuple"):
        THREE.cut("0.75")


def test_an_order_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"largest to the smallest, but 1 needs \d+ .* 0.5 before"):
        levels([("0.5", HALF, [WORK]), ("1", whole(NET), [WORK])], PI)


@pytest.mark.parametrize(
    ("text", "rates"),
    [("1 0.5 0.25", (1, 0.5, 0.25)), ("0.5", (0.5,)), (" 1,0.5 ,.1", (1, 0.5, 0.1))],
)
def test_widths_as_text(text, rates):
    assert rates_from(text) == rates


@pytest.mark.parametrize("text", ["", "a", "0.5 1", "1 1", "1 0", "2 1", "1 -1", "nan", "1 nan"])
def test_text_that_is_no_widths_is_refused(text):
    with pytest.raises(ValueError, match=r"widths must be numbers in \(0, 1\] from the largest"):
        rates_from(text)
    with pytest.raises(ValueError, match="densities must be numbers"):
        rates_from(text, "densities")


def test_the_merge_of_slices_is_that_of_a_loop_over_elements():
    """Σ n·w / Σ n over the clients that have the element; else the value that it had."""
    rng = np.random.default_rng(0)
    base = start(NET)
    clients = [(5, QUARTER), (11, HALF), (3, QUARTER)]
    updates, sums = [], {n: np.zeros((2, *v.shape)) for n, v in base.items()}
    for client, (examples, cut) in enumerate(clients):
        task = ClientTask(1, "train", client, 0, cut.spec, {}, SubModel(), {"at": client})
        params = {
            name: rng.random(shape, np.float32) for name, shape in cut.spec.tensor_shapes.items()
        }
        updates.append(ClientUpdate(client, examples, params, SubModel(), task=task))
        for name, value in params.items():
            ids = [np.r_[axis] for axis in cut.index[name]]
            for at in np.ndindex(value.shape):
                there = tuple(i[a] for i, a in zip(ids, at, strict=True))
                sums[name][0][there] += examples * float(value[at])
                sums[name][1][there] += examples
    merged = fold_cuts(NET, base, updates, lambda task: clients[task.client][1])
    assert merged.count == 3
    for name, value in merged.params().items():
        if name in NET.variances:
            continue  # pooled: tests/test_tree.py
        total, weight = sums[name]
        has = weight > 0
        expected = (total / np.where(has, weight, 1)).astype(np.float32)
        np.testing.assert_array_equal(value[has], expected[has])
        assert value[~has].tobytes() == base[name][~has].tobytes()
    assert any((sums[name][1] == 0).any() for name in sums)


def test_an_update_without_its_task_is_refused():
    update = ClientUpdate(0, 1, start(NET), SubModel())
    with pytest.raises(ValueError, match="without its task cannot be merged"):
        fold_cuts(NET, start(NET), [update], lambda task: whole(NET))
