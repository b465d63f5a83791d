"""Work on a span of a model: by hand, as one session counts it, and as native sessions hold it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from engine.test_agrees_random import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.core import ClientTask, SubModel, Work
from fedlean.cost.flops import forward_flops, step_flops, work_flops
from fedlean.cost.price import Model, cost
from fedlean.cost.profile import load_profile
from fedlean.cost.stretch import held_bytes, stretch
from fedlean.cost.time import work_seconds
from fedlean.cost.way import peak_memory_bytes, work_memory_bytes
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.freezing.beginning import frozen_blocks, split
from fedlean.freezing.session import BeginningSession
from fedlean.layers import Linear, ReLU
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet18
from fedlean.spec import sequential
from fedlean.train.work import behind_cached, behind_frozen, sgd_work
from fedlean.tree import kept_counts

# weights: 6·5 = 30, 5·4 = 20, 4·3 = 12; twice as many operations an example and pass
MLP = sequential((6,), [("a", Linear(5)), ("relu", ReLU()), ("b", Linear(4)), ("c", Linear(3))])
A = frozenset({"a.weight", "a.bias"})
PI = load_profile("raspberry_pi_4")
RUNS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def test_a_span_by_hand():
    """b and c run forward; of b's step no gradient of its input, which is the span's."""
    assert work_flops(MLP, Work(forward_examples=3, begin="relu")) == 3 * (40 + 24)
    assert work_flops(MLP, Work(forward_examples=3, end="relu")) == 3 * 60
    assert work_flops(MLP, Work(2, 1, begin="relu")) == 2 * (2 * 40 + 3 * 24)
    assert work_flops(MLP, Work(1, 1, begin="relu", end="b")) == 2 * 40
    with_importance = Work(1, 1, 1, kept={"a.weight": 1, "b.weight": 10}, begin="relu")
    assert work_flops(MLP, with_importance) == 20 + 40 + 3 * 24  # b: half forward, all weights
    assert work_flops(MLP, Work(2, 1, begin="relu"), frozen=frozenset({"b.weight"})) == 2 * (
        40 + 3 * 24  # b's bias trains
    )


def test_what_is_held_outside_the_engine_by_hand():
    work = Work(1, 8, begin="relu", held_examples=10)
    assert held_bytes(MLP, work) == 4 * 10 * 5
    assert held_bytes(MLP, Work(held_examples=10, end="b")) == 4 * 10 * 4
    assert held_bytes(MLP, Work(held_examples=10)) == 4 * 10 * 3  # the output
    assert held_bytes(MLP, Work(held_floats=7)) == 28
    assert held_bytes(MLP, replace(work, held_floats=7)) == 4 * 10 * 5 + 28
    without = replace(work, held_examples=0)
    assert work_memory_bytes(MLP, work) == work_memory_bytes(MLP, without) + 200


def test_the_terms_of_a_span():
    kept = {"a.weight": 3, "b.weight": 4}
    part, work, frozen = stretch(MLP, Work(1, kept=kept, begin="relu"), A | {"c.bias"})
    assert [node.name for node in part.nodes] == ["b", "c"]
    assert work.kept == {"b.weight": 4} and frozen == {"c.bias"}
    whole = Work(1, kept=kept)
    assert stretch(MLP, whole, A) == (MLP, whole, A)


def test_stretches_beside_each_other_add_up():
    works = [Work(0, 4, forward_examples=8, end="relu"), Work(1, 4, begin="relu"), Work(1, 2)]
    alone = [work_memory_bytes(MLP, work) for work in works]
    assert peak_memory_bytes(MLP, works) == max(alone)
    beside = [works[0], replace(works[1], beside=1), works[2]]
    assert peak_memory_bytes(MLP, beside) == max(alone[0] + alone[1], alone[2])
    three = [works[0], works[1], replace(works[2], beside=2)]
    assert peak_memory_bytes(MLP, three) == sum(alone)
    too_many = [replace(works[0], beside=9)]  # there is none before it
    assert peak_memory_bytes(MLP, too_many) == alone[0]
    assert peak_memory_bytes(MLP, []) == 0
    assert cost(Model(MLP, SubModel()), beside, PI).peak_memory_bytes == max(
        alone[0] + alone[1], alone[2]
    )


def test_a_span_that_the_model_lacks():
    with pytest.raises(ValueError, match="no layer 'z'"):
        cost(Model(MLP, SubModel()), [Work(1, begin="z")], PI)


def test_a_slice_by_hand():
    """Half of 5 and 4 units, rounded up: weights 6·3, 3·2 and 2·3; the output keeps its 3."""
    half = Work(2, 4, width=0.5)
    assert work_flops(MLP, half) == 2 * 4 * (2 * 36 + 3 * 12 + 3 * 12)
    assert work_flops(MLP, Work(forward_examples=3, width=0.5)) == 3 * (36 + 12 + 12)
    narrow = sequential(
        (6,), [("a", Linear(3)), ("relu", ReLU()), ("b", Linear(2)), ("c", Linear(3))]
    )
    assert stretch(MLP, half) == (narrow, half, frozenset())
    assert work_flops(MLP, replace(half, begin="relu")) == work_flops(
        narrow, Work(2, 4, begin="relu")
    )
    assert work_memory_bytes(MLP, half) == work_memory_bytes(narrow, Work(2, 4))
    for profile in (PI, load_profile("generic")):
        one, other = (
            cost(Model(spec, SubModel()), [work], profile)
            for spec, work in ((MLP, half), (narrow, Work(2, 4)))
        )
        assert one.seconds == other.seconds and one.flops == other.flops
    held = replace(half, begin="relu", held_examples=10, held_floats=7)
    assert held_bytes(MLP, held) == 4 * (10 * 3 + 7)


def test_what_a_slice_cannot_be():
    with pytest.raises(ValueError, match=r"work on 0\.5 of the channels is dense, got masks"):
        stretch(MLP, Work(1, kept={"a.weight": 3}, width=0.5))
    with pytest.raises(ValueError, match=r"the rate of a width must be in \(0, 1\], got 2"):
        stretch(MLP, Work(1, width=2.0))


def task_of(spec, frozen, *, batch_size=8, momentum=0.9, masks=None):
    hparams = {"local_steps": 5, "batch_size": batch_size, "momentum": momentum}
    return ClientTask(1, "t", 0, 0, spec, {}, SubModel(masks or {}, frozen=frozen), hparams)


def test_local_sgd_behind_a_frozen_beginning_in_words():
    task = task_of(MLP, A)
    assert behind_frozen(task, "relu", micro_batch=3) == (
        Work(0, 3, forward_examples=40, end="relu"),
        Work(5, 8, optimizer_floats=1, beside=1, held_examples=11, begin="relu"),
    )
    first, rest = behind_frozen(task, "relu", micro_batch=99, importance=True)
    assert (first.batch_size, rest.held_examples, rest.importance_steps) == (8, 16, 5)
    assert behind_cached(task, "relu", micro_batch=3, examples=70) == (
        Work(0, 3, forward_examples=70, held_examples=73, end="relu"),
        Work(5, 8, optimizer_floats=1, held_examples=78, begin="relu"),
    )
    first, rest = behind_cached(task, "relu", micro_batch=99, examples=70, on_disk=True)
    assert (first.batch_size, first.held_examples, rest.held_examples) == (70, 70, 8)


@pytest.mark.parametrize("cut", ["a", "relu", "b"])
def test_both_parts_do_the_operations_of_one_session(cut):
    layers = {"a": ("a",), "relu": ("a",), "b": ("a", "b")}[cut]
    frozen = frozenset(n for n in MLP.tensor_shapes if n.split(".")[0] in layers)
    task = task_of(MLP, frozen)
    one = cost(task, (sgd_work(task),), PI)
    two = cost(task, behind_frozen(task, cut, micro_batch=2), PI)
    assert two.flops == one.flops and two.seconds == pytest.approx(one.seconds)


@RUNS
@given(networks(), st.data())
def test_any_cut_of_any_model(spec, data):
    """Where everything before it is frozen, the parts count what the whole counts."""
    cut = data.draw(st.sampled_from([node.name for node in spec.nodes]))
    try:
        frozen = frozenset(stretch(spec, Work(end=cut)).spec.tensor_shapes)
        stretch(spec, Work(begin=cut))
    except ValueError:
        return
    task = task_of(spec, frozen)
    works = behind_frozen(task, cut, micro_batch=3)
    assert cost(task, works, PI).flops == cost(task, (sgd_work(task),), PI).flops
    part = stretch(spec, Work(end=cut)).spec
    assert work_memory_bytes(spec, works[0], frozen=frozen) == (
        forward_memory(part, {}, batch_size=3, frozen=frozen).peak_bytes
    )


@cache
def units():
    spec = resnet18((3, 32, 32), 10, blocks="unit")
    return spec, init_params(spec, 0)


@pytest.mark.usefixtures("has_native")
@pytest.mark.parametrize("micro_batch", [8, 16])
def test_the_last_of_eight_stages_of_resnet18_is_held_to_the_byte(micro_batch):
    """B = 128, momentum; the plan of both sessions, and after a step what they hold."""
    spec, params = units()
    frozen = frozen_blocks(spec, list(spec.blocks)[:8])
    task = task_of(spec, frozen, batch_size=128)
    session = BeginningSession(
        open_engine("native", 1),
        spec,
        params,
        task.sub_model,
        batch_size=128,
        micro_batch=micro_batch,
        optimizer=SGD(0.1, 0.9),
    )
    works = behind_frozen(task, session.name, micro_batch=micro_batch)
    planned = cost(task, works, PI).peak_memory_bytes
    assert planned == session.peak_memory_bytes
    x = np.zeros((micro_batch + 1, 3, 32, 32), np.float32)  # memory is that of the whole batch
    session.step(x, np.zeros(len(x), np.int64))
    held = session.beginning.held_bytes + session.rest.held_bytes
    assert planned == held + session.features_bytes


@pytest.mark.usefixtures("has_native")
@RUNS
@given(networks(), st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.integers(1, 40), st.data())
def test_native_sessions_of_any_model_hold_what_is_priced(spec, density, batch_size, data):
    cuts = [node.name for node in spec.nodes[:-1]]
    cut = data.draw(st.sampled_from(cuts)) if cuts else ""
    micro_batch = data.draw(st.integers(1, 20))
    try:
        frozen = frozenset(stretch(spec, Work(end=cut)).spec.tensor_shapes)
        split(spec, frozen, at=cut)
    except ValueError:
        return
    rng = np.random.default_rng(0)
    masks = {}
    if density < 1:
        masks = {name: rng.random(spec.param_shapes[name]) < density for name in spec.prunable}
    task = task_of(spec, frozen, batch_size=batch_size, masks=masks)
    session = BeginningSession(
        open_engine("native", 1),
        spec,
        init_params(spec, 0),
        task.sub_model,
        batch_size=batch_size,
        micro_batch=micro_batch,
        optimizer=SGD(0.1, 0.9),
        at=cut,
    )
    works = behind_frozen(task, cut, micro_batch=micro_batch)
    assert peak_memory_bytes(spec, works, frozen=frozen) == session.peak_memory_bytes


@pytest.mark.usefixtures("has_native")
@RUNS
@given(networks(), st.integers(2, 40), st.booleans(), st.data())
def test_a_loss_of_ones_own_is_priced_with_what_it_reads(spec, batch_size, behind, data):
    """A training forward with taps and `descend`, of the whole or behind a frozen beginning."""
    frozen, cut = frozenset(), ""
    if behind:
        cut = data.draw(st.sampled_from([node.name for node in spec.nodes]))
        try:
            frozen = frozenset(stretch(spec, Work(end=cut)).spec.tensor_shapes)
            split(spec, frozen, at=cut)
        except ValueError:
            return
    part = stretch(spec, Work(begin=cut)).spec
    taps = tuple(data.draw(st.sets(st.sampled_from(sorted(part.by_name)), min_size=1)))
    task = task_of(spec, frozen, batch_size=batch_size)
    work = replace(sgd_work(task, taps=taps), begin=cut)
    session = open_engine("native", 1).open(
        part,
        init_params(part, 0),
        SubModel(frozen=frozen.intersection(part.tensor_shapes)),
        batch_size=batch_size,
        optimizer=SGD(0.1, 0.9),
    )
    x = np.zeros((batch_size, *part.input_shape), np.float32)
    values = session.forward(x, taps=taps, training=True)
    session.descend({tap: np.zeros_like(values[tap]) for tap in taps})
    plain = work_memory_bytes(spec, replace(work, taps=()), frozen=frozen)
    found = work_memory_bytes(spec, work, frozen=frozen)
    assert found == max(plain, session.held_bytes)
    assert cost(Model(spec, SubModel(frozen=frozen)), [work], PI).peak_memory_bytes == found


@pytest.mark.usefixtures("has_native")
def test_a_forward_to_taps_is_priced_with_them():
    spec, params = units()
    frozen = frozenset(spec.tensor_shapes)
    taps = ("stage1_1_relu2", "stage2_1_relu2")
    session = open_engine("native", 1).open_forward(
        spec, params, SubModel(frozen=frozen), batch_size=8
    )
    work = Work(0, 8, forward_examples=8, end="fc", taps=taps)
    plain = work_memory_bytes(spec, replace(work, taps=()), frozen=frozen)
    assert plain == session.peak_memory_bytes < work_memory_bytes(spec, work, frozen=frozen)


def test_the_price_falls_with_the_frozen_share():
    """FLOPs, seconds and memory, stage by stage, with one session and with two."""
    spec, _ = units()
    blocks = list(spec.blocks)
    one, two = [], []
    for count in range(2, 9):
        frozen = frozen_blocks(spec, blocks[:count])
        task = task_of(spec, frozen, batch_size=128)
        one.append(cost(task, (sgd_work(task),), PI))
        cut = split(spec, frozen).name
        two.append(cost(task, behind_frozen(task, cut, micro_batch=8), PI))
    for prices in (one, two):
        for figure in ("flops", "seconds", "peak_memory_bytes"):
            values = [getattr(price, figure) for price in prices]
            assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    cached = cost(task, behind_cached(task, cut, micro_batch=8, examples=128), PI)
    assert cached.flops < two[-1].flops and cached.seconds < two[-1].seconds


def test_masks_and_the_dense_way_are_those_of_the_span():
    """Kept weights of the other part cost nothing; a span runs densely where that is shorter."""
    masks = {name: np.arange(m).reshape(s) % 4 == 0 for name, s, m in _weights(MLP)}
    task = task_of(MLP, A, masks=masks)
    slow = replace(PI, dense_flops_per_s=1.0)
    for device, dense in ((slow, False), (replace(PI, dense_flops_per_s=1e18), True)):
        works = behind_frozen(task, "relu", micro_batch=4)
        price = cost(task, works, device)
        part = stretch(MLP, works[1]).spec
        kept = {} if dense else {n: c for n, c in kept_counts(masks).items() if n[0] != "a"}
        first = {} if dense else {"a.weight": kept_counts(masks)["a.weight"]}
        before = stretch(MLP, works[0]).spec
        expected = 5 * step_flops(part, kept, 8) + forward_flops(before, first, 40)
        assert price.flops == expected
        plain = step_memory(part, kept, batch_size=8, optimizer_floats=1).peak_bytes
        forward = forward_memory(before, first, batch_size=4, frozen=A).peak_bytes
        assert price.peak_memory_bytes == plain + forward + 4 * 12 * 5
        assert price.seconds == pytest.approx(
            sum(work_seconds(MLP, one, device, frozen=A) for one in works)
        )


def _weights(spec):
    return [(n, spec.param_shapes[n], int(np.prod(spec.param_shapes[n]))) for n in spec.prunable]
