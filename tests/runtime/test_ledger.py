"""The costs of a step against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlean import wire
from fedlean.algorithm import Device
from fedlean.core import ClientTask, ClientUpdate, SubModel, Work
from fedlean.cost.profile import Profile
from fedlean.engine.memory import step_memory
from fedlean.layers import Linear
from fedlean.runtime import prices
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.ledger import Ledger, StepCost
from fedlean.runtime.prices import Lack, Prices
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
        answer = replace(update(0, SLOW), sub_model=frozen.sub_model)
        ledger.answer(frozen, answer)
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


# Devices of their own


def fleet(*devices: Device) -> Prices:
    return Prices(DEVICE, devices)


def settled(prices: Prices, *answers: ClientUpdate) -> StepCost:
    ledger = Ledger([task(0), task(1)], ClientStore(), prices)
    for answer in answers:
        ledger.answer(task(answer.client), answer)
    return ledger.cost


def test_each_client_is_priced_by_its_own_profile_and_link():
    """Client 0 computes at 1000/s; client 1 at a quarter of it, over a link ten times as fast."""
    other = replace(
        DEVICE, dense_flops_per_s=250.0, uplink_bytes_per_s=500.0, downlink_bytes_per_s=2000.0
    )
    (down0, up0), (down1, up1) = sizes(0, QUICK), sizes(1, SLOW)
    seconds = (0.048 + down0 / 200 + up0 / 50, 480 / 250 + down1 / 2000 + up1 / 500)
    cost = settled(fleet(Device(1, profile=other)), update(0, QUICK), update(1, SLOW))
    assert seconds[0] > seconds[1]
    assert cost.simulated_seconds == pytest.approx(seconds[0])
    assert (cost.compute_seconds, cost.link_seconds) == (
        pytest.approx(0.048),
        pytest.approx(down0 / 200 + up0 / 50),
    )
    cost = settled(fleet(Device(1, profile=other)), update(1, SLOW))  # client 0 is silent
    assert cost.simulated_seconds == pytest.approx(max(seconds[1], down0 / 200))
    assert cost.flops == 480  # whoever does them


def test_a_round_that_nobody_answers_lasts_as_long_as_the_slowest_download():
    slow = replace(DEVICE, downlink_bytes_per_s=20.0)
    down, _ = sizes(0, QUICK)
    assert settled(fleet(Device(0, profile=slow))).simulated_seconds == pytest.approx(down / 20)


def test_utilisation_of_memory_is_the_mean_over_answers_of_devices_with_a_limit():
    peak = step_memory(SPEC, {}, batch_size=5).peak_bytes
    limited = fleet(Device(0, memory_bytes=2 * peak), Device(1, memory_bytes=4 * peak))
    both = settled(limited, update(0, SLOW), update(1, SLOW))
    assert both.memory_utilisation == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert settled(limited, update(1, SLOW)).memory_utilisation == pytest.approx(1 / 4)
    one = fleet(Device(0), Device(1, memory_bytes=4 * peak))
    assert settled(one, update(0, SLOW), update(1, SLOW)).memory_utilisation == 1 / 4
    assert settled(limited).memory_utilisation is None
    assert charge(update(0, SLOW)).memory_utilisation is None


def test_utilisation_of_links_is_the_mean_share_of_the_step_in_which_they_are_busy():
    fast = replace(DEVICE, uplink_bytes_per_s=500.0, downlink_bytes_per_s=2000.0)
    (down0, up0), (down1, up1) = sizes(0, QUICK), sizes(1, SLOW)
    links = (down0 / 200 + up0 / 50, down1 / 2000 + up1 / 500)
    lasts = 0.048 + links[0]
    prices = fleet(Device(0, profile=DEVICE), Device(1, profile=fast))
    cost = settled(prices, update(0, QUICK), update(1, SLOW))
    assert cost.simulated_seconds == pytest.approx(lasts)
    assert cost.link_utilisation == pytest.approx((links[0] + links[1]) / 2 / lasts)
    assert charge(update(0, SLOW)).link_utilisation is None  # no link of its own is known


def test_utilisation_of_byte_budgets_is_the_mean_over_answers_of_devices_with_one():
    down, up = sizes(0, QUICK)
    prices = fleet(Device(0, budget_bytes=4 * (down + up)), Device(1, budget_bytes=2 * (down + up)))
    both = settled(prices, update(0, QUICK), update(1, QUICK))
    assert both.budget_utilisation == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert charge(update(0, QUICK)).budget_utilisation is None
    again = StepCost(budget_utilisation=0.5)
    assert again.plus(StepCost()).budget_utilisation == 0.5


def test_of_two_attempts_the_later_answers_say_what_was_used():
    first, second = StepCost(memory_utilisation=0.5), StepCost(link_utilisation=0.25)
    both = first.plus(second)
    assert (both.memory_utilisation, both.link_utilisation) == (0.5, 0.25)
    assert second.plus(replace(second, link_utilisation=0.75)).link_utilisation == 0.75


def test_equal_work_on_equal_devices_is_priced_once(monkeypatch):
    priced = []
    price = prices.cost
    monkeypatch.setattr(prices, "cost", lambda *args: priced.append(args) or price(*args))
    other = replace(DEVICE, dense_flops_per_s=250.0)
    for devices, count in (
        ([Device(0, memory_bytes=10**6), Device(1, memory_bytes=10**7)], 1),  # dense: no choice
        ([Device(0, profile=replace(DEVICE)), Device(1)], 1),
        ([Device(0, profile=other), Device(1)], 2),
    ):
        priced.clear()
        settled(fleet(*devices), update(0, SLOW), update(1, SLOW))
        assert len(priced) == count
    priced.clear()
    masked = replace(SLOW, kept={"fc.weight": 6})
    devices = [Device(0, memory_bytes=10**6), Device(1, memory_bytes=10**7)]
    settled(fleet(*devices), update(0, masked), update(1, masked))
    assert len(priced) == 2  # memory decides between two ways


def test_what_a_device_lacks():
    peak = step_memory(SPEC, {}, batch_size=5).peak_bytes
    short = fleet(Device(0, memory_bytes=peak - 1), Device(1, memory_bytes=peak))
    assert short.lack(task(0), [SLOW]) == Lack(peak, peak - 1)
    assert short.lack(task(1), [SLOW]) is None
    assert fleet(Device(0)).lack(task(0), [SLOW]) is None
    assert str(Lack(52_340_000, 40_000_000)) == "needs 52.3 MB, has 40.0 MB"
