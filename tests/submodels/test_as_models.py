"""A slice is a model like any other: it travels, is checked, priced and limited by what all are.

Nothing here but `width` and the merge knows that the models are slices.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from fedlean import wire
from fedlean.algorithm import Device
from fedlean.core import ClientTask, ClientUpdate, Params, SubModel
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.engine.open import engine_for, open_engine
from fedlean.models.conv2 import conv2
from fedlean.models.initialise import init_params
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet18
from fedlean.runtime.checks import Expected, refusal
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.ledger import Ledger
from fedlean.runtime.prices import Prices
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import TooLarge
from fedlean.submodels.cut import Cut, ids_of
from fedlean.submodels.cut_round import fold_cuts
from fedlean.submodels.width import width
from fedlean.train.local_sgd import LocalSGD, train_kept_weights
from fedlean.train.work import only_sgd

MODELS = {
    "resnet18": resnet18((3, 8, 8), 10),
    "mobilenetv3_small": mobilenetv3_small((3, 16, 16), 10),
    "conv2": conv2((3, 8, 8), 10),
}
RATES = (0.5, 0.75, 0.5)  # by client
EXAMPLES = (9, 4, 6)
PROFILE = load_profile("raspberry_pi_4")
SGD = LocalSGD(lr=0.01, local_steps=1, batch_size=4, momentum=0.9)
pytestmark = pytest.mark.parametrize("name", MODELS)


class Round(NamedTuple):
    base: Params
    cuts: list[Cut]
    tasks: list[ClientTask]
    updates: list[ClientUpdate]


@cache
def trained(name: str) -> Round:
    """One round of three clients on slices of half and of three quarters."""
    spec = MODELS[name]
    base = init_params(spec, 0)
    engine, _ = engine_for(spec, None, threads=1)
    cuts = [width(spec, rate, scaler=True) for rate in RATES]
    hparams = SGD.hparams(0)
    tasks = [
        ClientTask(1, "train", client, client, cut.spec, cut.take(base), SubModel(), hparams)
        for client, cut in enumerate(cuts)
    ]
    updates = [train_kept_weights(task, data(spec, task.client), engine) for task in tasks]
    return Round(base, cuts, tasks, updates)


def data(spec, client: int) -> ClientData:
    rng = np.random.default_rng(client)
    x = rng.integers(0, 256, (EXAMPLES[client], *spec.input_shape)).astype(np.uint8)
    y = np.arange(EXAMPLES[client]) % 10
    dataset = Dataset.from_images("noise", (x, y), (x, y), classes=10, scale=255.0)
    return ClientData(dataset, np.arange(EXAMPLES[client]))


def alike(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[key].tobytes() == other[key].tobytes() and one[key].shape == other[key].shape
        for key in one
    )


def test_tasks_and_updates_travel(name: str):
    """To the byte as long as claimed; a slice that the client holds is not described again."""
    store, round = ClientStore(), trained(name)
    for task, update in zip(round.tasks, round.updates, strict=True):
        sent = wire.encode_task(task, store.known(task.client))
        assert len(sent) == wire.task_bytes(task, store.known(task.client))
        arrived = wire.decode_task(sent, {}, {})
        assert arrived.spec == task.spec and arrived.hparams == task.hparams
        assert alike(arrived.params, task.params)
        answer = wire.encode_update(update, task)
        assert len(answer) == wire.update_bytes(update, task)
        back = wire.decode_update(answer, task)
        assert alike(back.params, update.params) and back.work == update.work
        store.acknowledge(task, update)
        again = wire.encode_task(task, store.known(task.client))
        assert len(again) < len(sent)
        assert wire.decode_task(again, {task.spec.hash: task.spec}, {}).spec == task.spec


def test_the_checks_take_the_answer_and_no_other(name: str):
    """Not the full model's, nor that of a slice of another width."""
    round = trained(name)
    for task, update in zip(round.tasks, round.updates, strict=True):
        expected = Expected(work=only_sgd(task))
        assert refusal(update, task, expected) is None
        for params in (round.base, round.updates[1 - task.client % 2].params):
            why = refusal(replace(update, params=params), task, expected)
            assert why is not None and "with shape" in why


def test_the_ledger_prices_what_a_slice_takes(name: str):
    round = trained(name)
    devices = [Device(task.client, memory_bytes=10**9) for task in round.tasks]
    ledger = Ledger(round.tasks, ClientStore(), Prices(PROFILE, devices))
    for task, update in zip(round.tasks, round.updates, strict=True):
        ledger.answer(task, update)
    prices = [cost(task, only_sgd(task), PROFILE) for task in round.tasks]
    assert ledger.cost.flops == sum(price.flops for price in prices)
    peaks = [price.peak_memory_bytes for price in prices]
    assert ledger.cost.peak_memory_bytes == peaks[1] == max(peaks)
    assert ledger.cost.compute_seconds == pytest.approx(prices[1].seconds)
    whole = replace(round.tasks[0], spec=MODELS[name])
    full = cost(whole, only_sgd(whole), PROFILE)
    assert peaks[0] < 0.6 * full.peak_memory_bytes and prices[0].flops < 0.4 * full.flops


@pytest.mark.usefixtures("has_native")
def test_a_memory_limit_counts_what_a_slice_takes(name: str):
    """To the byte what is priced."""
    round = trained(name)
    native = open_engine("native", 1)
    for task in round.tasks[:2]:
        needed = cost(task, only_sgd(task), PROFILE).peak_memory_bytes
        limited = LimitedEngine(native, needed, emulated=True)
        train_kept_weights(task, data(MODELS[name], task.client), limited)
        tight = LimitedEngine(native, needed - 1, emulated=True)
        with pytest.raises(TooLarge, match="a training step needs"):
            train_kept_weights(task, data(MODELS[name], task.client), tight)


def test_the_merge_is_that_of_a_naive_sum(name: str):
    """Over all that nobody has as well, which stays bit for bit."""
    round, spec = trained(name), MODELS[name]
    updates = [
        replace(update, task=task) for update, task in zip(round.updates, round.tasks, strict=True)
    ]
    merged = fold_cuts(spec, round.base, updates, lambda task: round.cuts[task.client]).params()
    untouched = 0
    for key, before in round.base.items():
        if key in spec.variances:
            continue  # pooled with their means: tests/test_tree.py
        total, weight = np.zeros(before.shape), np.zeros(before.shape)
        for update, cut in zip(updates, round.cuts, strict=True):
            place = np.ix_(*map(ids_of, cut.index[key]))
            total[place] += update.num_examples * update.params[key].astype(np.float64)
            weight[place] += update.num_examples
        has = weight > 0
        expected = (total[has] / weight[has]).astype(np.float32)
        assert np.array_equal(merged[key][has], expected)
        assert merged[key][~has].tobytes() == before[~has].tobytes()
        untouched += int((~has).sum())
    assert untouched > 0.3 * spec.num_params


def test_who_lacks_an_element_leaves_it_alone(name: str):
    """Merging a half more or less changes what halves have, and nothing beyond, bit for bit."""
    round, spec = trained(name), MODELS[name]
    wide, half = (replace(round.updates[client], task=round.tasks[client]) for client in (1, 0))

    def merge(*updates):
        return fold_cuts(spec, round.base, updates, lambda task: round.cuts[task.client]).params()

    alone, both = merge(wide), merge(wide, half)
    moved = 0
    for key, value in both.items():
        beyond = np.ones(value.shape, bool)
        beyond[np.ix_(*map(ids_of, round.cuts[0].index[key]))] = False
        assert value[beyond].tobytes() == alone[key][beyond].tobytes()
        moved += int((value[~beyond] != alone[key][~beyond]).sum())
    assert moved > 0.1 * round.cuts[0].spec.num_params
