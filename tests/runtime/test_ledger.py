"""The costs of a step against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, SubModel, Work
from fedlean.cost.profile import Profile
from fedlean.layers import Linear
from fedlean.runtime import prices
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.ledger import Ledger, StepCost
from fedlean.runtime.prices import Prices
from fedlean.spec import sequential

SPEC = sequential((4,), [("fc", Linear(3))])
PARAMS = {"fc.weight": np.ones((3, 4), np.float32), "fc.bias": np.zeros(3, np.float32)}
DEVICE = Profile("board", "", "", 1000.0, 0.0, 0.01, 0.0, 50.0, 200.0, 10**6)

# By hand: 12 weights; an example costs 24 operations forward, and as many for the weight gradient
# (the layer reads the input: no input gradient).  2 steps of 5 examples: 2 * 5 * 48 = 480.
SLOW = Work(steps=2, batch_size=5)
# 1 step of 5: 240, and 10 examples forward: 240.
MIXED = (Work(steps=1, batch_size=5), Work(forward_examples=10))
QUICK = Work(steps=1, batch_size=1)  # 48


def task(client: int) -> ClientTask:
    return ClientTask(1, "train", client, 7, SPEC, PARAMS, SubModel(), {"lr": 0.1})


def update(client: int, *work: Work) -> ClientUpdate:
    return ClientUpdate(client, 10, PARAMS, SubModel(), work=work)


def sizes(client: int, *work: Work) -> tuple[int, int]:
    down = len(wire.encode_task(task(client)))
    return down, len(wire.encode_update(update(client, *work), task(client)))


def charge(*answers: ClientUpdate, store: ClientStore | None = None) -> StepCost:
    ledger = Ledger([task(0), task(1)], store or ClientStore(), Prices(DEVICE))
    for answer in answers:
        ledger.answer(task(answer.client), answer)
    return ledger.cost


@pytest.mark.parametrize("turned", [False, True])
def test_the_slowest_client_decides_the_time_and_all_pay(turned):
    answers = [update(0, QUICK), update(1, SLOW)]
    cost = charge(*(reversed(answers) if turned else answers))
    (down0, up0), (down1, up1) = sizes(0, QUICK), sizes(1, SLOW)
    assert cost.flops == 48 + 480
    assert (cost.downlink_bytes, cost.uplink_bytes) == (down0 + down1, up0 + up1)
    assert cost.compute_seconds == pytest.approx(0.480)
    assert cost.link_seconds == pytest.approx(down1 / 200 + up1 / 50)
    assert cost.simulated_seconds == pytest.approx(0.480 + down1 / 200 + up1 / 50)


def test_equal_work_is_priced_once(monkeypatch):
    priced = []
    price = prices.cost
    monkeypatch.setattr(prices, "cost", lambda *args: priced.append(args) or price(*args))
    cost = charge(update(0, SLOW), update(1, replace(SLOW, kept={})))
    assert cost.flops == 2 * 480 and len(priced) == 1
    cost = charge(update(0, SLOW), update(1, replace(SLOW, batch_size=1)))
    assert cost.flops == 480 + 96 and len(priced) == 3


def test_stretches_of_work_add_up():
    cost = charge(update(0, *MIXED))
    assert cost.flops == 240 + 240
    assert cost.compute_seconds == pytest.approx(0.480)


def test_frozen_layers_cost_no_backward():
    """The weight's gradient is half of a step; frozen with its bias, a step is a forward pass."""
    costs = []
    for names in ((), ("fc.bias",), ("fc.weight",), ("fc.weight", "fc.bias")):
        frozen = replace(task(0), sub_model=SubModel(frozen=frozenset(names)))
        ledger = Ledger([frozen], ClientStore(), Prices(DEVICE))
        ledger.answer(frozen, update(0, SLOW))
        costs.append(ledger.cost)
    assert [cost.flops for cost in costs] == [480, 480, 240, 240]
    assert [cost.flops_dense_gradient for cost in costs] == [480, 480, 240, 240]
    assert [cost.compute_seconds for cost in costs] == pytest.approx([0.48, 0.48, 0.24, 0.24])
    memory = [cost.peak_memory_bytes for cost in costs]
    assert memory == sorted(memory, reverse=True) and memory[-1] < memory[0]


def test_link_and_computation_decide_together():
    """The client that computes less takes longer, for it must be sent the spec."""
    store = ClientStore()
    store.acknowledge(task(1), update(1, SLOW))
    known = len(wire.encode_task(task(1), store.known(1)))
    (down0, up0), (_, up1) = sizes(0, QUICK), sizes(1, SLOW)
    assert down0 / 200 + up0 / 50 + 0.048 > known / 200 + up1 / 50 + 0.480  # else no test
    cost = charge(update(1, SLOW), update(0, QUICK), store=store)
    assert cost.downlink_bytes == down0 + known
    assert cost.compute_seconds == pytest.approx(0.048)
    assert cost.link_seconds == pytest.approx(down0 / 200 + up0 / 50)


def test_masked_work():
    """4 of 12 weights kept, but the dense way is faster: 48 operations an example, not 16."""
    sparse = Work(steps=3, batch_size=1, kept={"fc.weight": 4})
    cost = charge(update(0, sparse))
    assert cost.flops == 3 * 48
    assert cost.compute_seconds == pytest.approx(3 * 0.048)  # densely: 48 operations, not 0.16 s


def test_nobody_answers():
    down, _ = sizes(0)
    cost = charge()
    assert cost == StepCost(
        downlink_bytes=2 * down, simulated_seconds=down / 200, link_seconds=down / 200
    )


def test_an_absent_client_is_charged_its_downlink():
    down, up = sizes(0, SLOW)
    cost = charge(update(0, SLOW))
    assert (cost.downlink_bytes, cost.uplink_bytes, cost.flops) == (2 * down, up, 480)


def test_no_tasks():
    assert Ledger([], ClientStore(), Prices(DEVICE)).cost == StepCost()


def test_memory_is_that_of_the_neediest():
    small, large = charge(update(0, QUICK)), charge(update(1, SLOW))
    both = charge(update(0, QUICK), update(1, SLOW))
    assert 0 < small.peak_memory_bytes < large.peak_memory_bytes == both.peak_memory_bytes


def test_attempts_add_up_but_memory_does_not():
    first = StepCost(1, 2, 3, 5, 4.0, 3.0, 1.0, 50)
    second = StepCost(10, 20, 30, 50, 40.0, 30.0, 10.0, 7)
    assert first.plus(second) == StepCost(11, 22, 33, 55, 44.0, 33.0, 11.0, 50)
    assert StepCost().plus(first) == first
