"""Which sub-model a device gets, to the byte, and how sub-models are merged."""

from __future__ import annotations

import numpy as np
import pytest
from engine.cases import NET, start

from fedlean.algorithm import Device
from fedlean.core import ClientTask, ClientUpdate, SubModel, Work
from fedlean.cost.profile import load_profile
from fedlean.cost.way import peak_memory_bytes
from fedlean.submodels.cut import whole
from fedlean.submodels.cut_round import fold_cuts
from fedlean.submodels.levels import levels, rates_from
from fedlean.submodels.width import width

WORK = Work(1, 4)
HALF, QUARTER = width(NET, 0.5), width(NET, 0.25, multiple=2)
PI = load_profile("raspberry_pi_4")
THREE = levels([("1", whole(NET), WORK), ("0.5", HALF, WORK), ("0.25", QUARTER, WORK)], PI)

NEEDS = [need.memory_bytes for need in THREE.needs]


def device(memory_bytes: int | None) -> Device:
    return Device(0, memory_bytes=memory_bytes)


def test_a_level_needs_what_a_step_on_it_takes():
    cuts = (whole(NET), HALF, QUARTER)
    assert [peak_memory_bytes(cut.spec, [WORK]) for cut in cuts] == NEEDS
    assert sorted(NEEDS, reverse=True) == NEEDS
    more = levels([("1", whole(NET), Work(1, 8, optimizer_floats=1))], PI)
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


def test_bytes_and_seconds_of_the_round_are_limits_as_well():
    _, middle, _ = THREE.needs
    for limits in (
        {"budget_bytes": 2 * middle.message_bytes},
        {"budget_seconds": middle.seconds(PI)},
    ):
        assert THREE.fitting(Device(0, memory_bytes=10**12, **limits)) == 1
        less = {name: 0.99 * value for name, value in limits.items()}
        assert THREE.fitting(Device(0, memory_bytes=10**12, **less)) == 2


def test_levels_have_names():
    assert THREE.cut("0.5") is HALF and THREE.cut("1").spec is NET
    with pytest.raises(ValueError, match="not in tuple"):
        THREE.cut("0.75")


def test_an_order_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"largest to the smallest, but 1 needs \d+ .* 0.5 before"):
        levels([("0.5", HALF, WORK), ("1", whole(NET), WORK)], PI)


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
