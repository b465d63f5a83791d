"""What is sent arrives, and its size is known beforehand."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlean.core import ClientTask, ClientUpdate, Statistic, StatisticForm, SubModel, Work
from fedlean.layers import BatchNorm, Conv2d, Flatten, Layer, Linear
from fedlean.spec import ModelSpec, sequential
from fedlean.tree import apply_mask, kept_counts, pack, unpack
from fedlean.wire import (
    HEADER_BYTES,
    METRICS_BYTES,
    Known,
    UnknownPattern,
    UnknownSpec,
    WireError,
    answer_bytes,
    decode_task,
    decode_update,
    encode_task,
    encode_update,
    frozen_hashes,
    frozen_params,
    params_payload_bytes,
    pattern_hash,
    pattern_payload_bytes,
    round_int8,
    task_bytes,
    update_bytes,
)

DTYPES = ("fp32", "fp16", "int8")


def same_arrays(got: Mapping[str, np.ndarray], sent: Mapping[str, np.ndarray]) -> bool:
    """Names, dtypes, shapes and every bit."""
    return got.keys() == sent.keys() and all(
        got[name].dtype == sent[name].dtype
        and got[name].shape == sent[name].shape
        and got[name].tobytes() == np.ascontiguousarray(sent[name]).tobytes()
        for name in sent
    )


def same_sub_model(got: SubModel, sent: SubModel) -> bool:
    return same_arrays(got.masks, sent.masks) and got.frozen == sent.frozen


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    layers: list[tuple[str, Layer]] = []
    for i in range(draw(st.integers(0, 2))):
        layers.append((f"conv{i}", Conv2d(draw(st.integers(1, 4)), 2, bias=draw(st.booleans()))))
        if draw(st.booleans()):
            layers.append((f"norm{i}", BatchNorm()))
    layers.append(("flat", Flatten()))
    layers += [(f"fc{i}", Linear(draw(st.integers(1, 9)))) for i in range(draw(st.integers(0, 2)))]
    return sequential((draw(st.integers(1, 3)), 5, 5), layers)


@st.composite
def sub_models(draw: st.DrawFn, spec: ModelSpec) -> SubModel:
    names = sorted(spec.tensor_shapes)
    some = st.sets(st.sampled_from(names)) if names else st.just(set[str]())
    density = draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    rng = np.random.Generator(np.random.Philox(draw(st.integers(0, 99))))
    masks = {name: rng.random(spec.tensor_shapes[name]) < density for name in draw(some)}
    return SubModel(masks, frozenset(draw(some)))


@st.composite
def some_params(draw: st.DrawFn, spec: ModelSpec, sub_model: SubModel) -> dict[str, np.ndarray]:
    """Of some tensors, masked; -0.0 and subnormals among the values that are kept."""
    rng = np.random.Generator(np.random.Philox(draw(st.integers(0, 99))))
    pool = np.array([-0.0, 1e-42, 1.5, -3.25, 1e30, 1 / 3], np.float32)
    params: dict[str, np.ndarray] = {}
    for name, shape in spec.tensor_shapes.items():
        if draw(st.booleans()):
            value = rng.choice(pool, shape)
            mask = sub_model.masks.get(name, np.ones(shape, bool))
            params[name] = np.where(mask, value, np.float32(0))
    return params


scalars = (
    st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
u64 = st.integers(0, 2**64 - 1)


@st.composite
def tasks(draw: st.DrawFn) -> ClientTask:
    spec = draw(specs())
    sub_model = draw(sub_models(spec))
    return ClientTask(
        round=draw(st.integers(0, 2**32 - 1)),
        phase=draw(st.text(max_size=5)),
        client=draw(u64),
        seed=draw(u64),
        spec=spec,
        params=draw(some_params(spec, sub_model)),
        sub_model=sub_model,
        hparams=draw(st.dictionaries(st.text(max_size=4), scalars, max_size=3)),
    )


@given(tasks(), st.booleans(), st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_task_round_trip(
    task: ClientTask, knows_spec: bool, knows_pattern: bool, knows_frozen: bool, packed: bool
) -> None:
    key = pattern_hash(task.sub_model.masks)
    held_specs = {task.spec.hash: task.spec} if knows_spec else {}
    held = {key: task.sub_model.masks} if knows_pattern else {}
    frozen = frozen_params(task)
    held_frozen = frozen if knows_frozen else {}
    hashes = frozen_hashes(held_frozen, task.sub_model.masks)
    known = Known(frozenset(held_specs), frozenset(held), frozenset(hashes.values()))
    data = encode_task(task, known)
    got = decode_task(data, held_specs, held, held_frozen, packed=packed)
    if packed:
        masks = task.sub_model.masks
        got = replace(got, params={n: unpack(v, masks.get(n, v)) for n, v in got.params.items()})
    assert len(data) == task_bytes(task, known)
    assert got.spec.hash == task.spec.hash
    assert same_arrays(got.params, task.params)
    assert same_sub_model(got.sub_model, task.sub_model)
    assert dict(got.hparams) == dict(task.hparams)
    assert {k: type(v) for k, v in got.hparams.items()} == {
        k: type(v) for k, v in task.hparams.items()
    }
    for name in ("round", "phase", "client", "seed"):
        assert getattr(got, name) == getattr(task, name)
    assert encode_task(got, known) == data


@st.composite
def statistics(draw: st.DrawFn) -> Statistic:
    forms = st.sampled_from(["f4", "f8", "i4", "i8", "?"])
    shapes = st.lists(st.integers(0, 4), max_size=3)
    first = draw(st.sampled_from([0, -40, 1000]))  # many zeros or none; 1001 is no bfloat16
    steps = draw(st.sampled_from([0, 1]))
    tensors = {
        name: np.maximum(first + steps * np.arange(prod(shape)), 0)
        .reshape(shape)
        .astype(draw(forms))
        for name, shape in draw(st.dictionaries(st.text(max_size=3), shapes, max_size=3)).items()
    }
    return Statistic(tensors, draw(st.sampled_from(["mean", "sum"])))


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_update_round_trip(data: st.DataObject) -> None:
    task = data.draw(tasks())
    others = sub_models(task.spec).map(lambda sub: replace(sub, frozen=task.sub_model.frozen))
    sub_model = data.draw(st.just(task.sub_model) | others)
    finite = st.floats(allow_nan=False, allow_infinity=False)
    counts = st.integers(0, 2**40)
    update = ClientUpdate(
        client=task.client,
        num_examples=data.draw(u64),
        params=data.draw(some_params(task.spec, sub_model)),
        sub_model=sub_model,
        statistics=data.draw(st.dictionaries(st.text(max_size=3), statistics(), max_size=2)),
        metrics=data.draw(st.dictionaries(st.text(max_size=3), finite, max_size=3)),
        work=tuple(data.draw(st.lists(st.builds(Work, counts, counts, counts, counts)))),
    )
    sent = encode_update(update, task)
    got = decode_update(sent, task)
    assert len(sent) == update_bytes(update, task)
    trained = {n: v for n, v in update.params.items() if n not in sub_model.frozen}
    assert same_arrays(got.params, trained)
    assert same_sub_model(got.sub_model, sub_model)
    assert (got.sub_model is task.sub_model) == same_sub_model(sub_model, task.sub_model)
    assert got.statistics.keys() == update.statistics.keys()
    for key, one in update.statistics.items():
        assert got.statistics[key].reduction == one.reduction
        assert same_arrays(got.statistics[key].tensors, one.tensors)
    assert (got.client, got.num_examples) == (update.client, update.num_examples)
    assert (got.metrics, got.work) == (update.metrics, update.work)


@pytest.mark.parametrize("value_dtype", DTYPES)
def test_full_messages_have_the_size_foretold(
    task: ClientTask, update: ClientUpdate, value_dtype: Any
) -> None:
    sent = encode_task(task, value_dtype=value_dtype)
    assert len(sent) == task_bytes(task, value_dtype=value_dtype)
    assert same_sub_model(decode_task(sent, {}, {}).sub_model, task.sub_model)
    sent = encode_update(update, task, value_dtype=value_dtype)
    assert len(sent) == update_bytes(update, task, value_dtype=value_dtype)
    assert decode_update(sent, task).work == update.work


def test_values_by_hand(spec: ModelSpec, task: ClientTask) -> None:
    """Kept: 18 of conv.weight and 30 of fc.weight.  Dense: 4 + 10 biases, 4 * 4 of the norm.

    18 + 30 + 14 + 16 = 78 values: 312 bytes in fp32, 156 in fp16, 78 + 8 scales of 4 in int8.
    Dense: 36 + 1440 + 30 = 1506 values, 6024 bytes.
    """
    masks = task.sub_model.masks
    assert [params_payload_bytes(spec, masks, value_dtype=d) for d in DTYPES] == [312, 156, 110]
    assert params_payload_bytes(spec, {}) == 6024


def test_task_bytes_by_hand(spec: ModelSpec, task: ClientTask) -> None:
    """All known: header 80, JSON, names of the frozen 1 (8 tensors) and of those with values 1,
    a hash 16, names 1, values 312 - 16; the frozen ones' are 4 * 4 and a byte of names.


    The pattern adds 1 for its names, 1 + ceil(36 / 8) = 6 for conv.weight, and for fc.weight 30
    gaps of one byte: 1 + 4 + 30 = 35.
    """
    text = '{"hparams":{"lr":0.1,"steps":5},"phase":"train"}'
    assert HEADER_BYTES == 80
    held = frozen_hashes(frozen_params(task), task.sub_model.masks).values()
    patterns = frozenset({pattern_hash(task.sub_model.masks)})
    known = Known(frozenset({spec.hash}), patterns, frozenset(held))
    assert task_bytes(task, known) == 80 + len(text) + 18 + 1 + 296
    known = Known(frozenset({spec.hash}), patterns)
    assert task_bytes(task, known) == 80 + len(text) + 18 + 1 + 312 + 1
    assert pattern_payload_bytes(task.sub_model.masks) == 6 + 35
    without_pattern = replace(known, patterns=frozenset())
    assert task_bytes(task, without_pattern) == task_bytes(task, known) + 1 + 41
    spec_bytes = 4 + len(spec.to_json())
    assert task_bytes(task) == task_bytes(task, without_pattern) + spec_bytes


@pytest.mark.parametrize(
    ("value", "kept", "payload"),
    [
        (0.1, 80, 320),  # float32
        (1.0, 80, 160),  # bfloat16
        (0.1, 8, 1 + 10 + 32),  # ten bytes of bitmap (its code before it), eight values
        (1.0, 8, 1 + 10 + 16),
        (1.0, 0, 1),  # nothing kept: the code alone
        (-0.0, 80, 160),  # not 0 by its bits
    ],
)
def test_statistics_take_as_little_as_they_need(
    task: ClientTask, value: float, kept: int, payload: int
) -> None:
    array = np.zeros((8, 10), np.float32)
    array.flat[:kept] = value
    update = ClientUpdate(5, 20, {}, task.sub_model, {"c": Statistic({"c": array}, "mean")})
    sent = encode_update(update, task)
    assert len(sent) == update_bytes(update, task)
    got = decode_update(sent, task).statistics["c"].tensors["c"]
    assert got.dtype == array.dtype and got.tobytes() == array.tobytes()
    payload_bytes = int.from_bytes(sent[HEADER_BYTES - 8 : HEADER_BYTES], "little")
    assert payload_bytes == payload


@pytest.mark.parametrize(("value", "item"), [(0.1, 4), (1.0, 2)])
@pytest.mark.parametrize("kept", [0, 8, 80])
def test_packed_statistics_travel_as_they_are_and_arrive_dense(
    task: ClientTask, value: float, item: int, kept: int
) -> None:
    """A bitmap of ten bytes with its code, or the code alone, and the values."""
    mask = np.arange(80).reshape(8, 10) < kept
    packed = Statistic({"c": np.full(kept, value, np.float32)}, "mean", {"c": mask})
    update = ClientUpdate(5, 20, {}, task.sub_model, {"c": packed})
    sent = encode_update(update, task)
    assert len(sent) == update_bytes(update, task)
    got = decode_update(sent, task).statistics["c"]
    assert not got.masks and got.reduction == "mean"
    assert np.array_equal(got.tensors["c"], np.where(mask, np.float32(value), np.float32(0)))
    payload_bytes = int.from_bytes(sent[HEADER_BYTES - 8 : HEADER_BYTES], "little")
    assert payload_bytes == (1 if kept in (0, 80) else 11) + (2 if not kept else item) * kept


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (np.zeros(3, np.float32), np.arange(4) < 2),
        (np.zeros(2), np.arange(4) < 2),
        (np.zeros(2, np.float32), np.array([1, 1, 0, 0])),
    ],
)
def test_a_packed_statistic_that_does_not_fit_its_mask_cannot_travel(
    task: ClientTask, values: np.ndarray, mask: np.ndarray
) -> None:
    update = ClientUpdate(
        5, 20, {}, task.sub_model, {"c": Statistic({"c": values}, "mean", {"c": mask})}
    )
    with pytest.raises(WireError, match=r"c\.c"):
        encode_update(update, task)


def test_a_few_scalars_are_a_small_message(task: ClientTask) -> None:
    """80 + 93 of JSON + 4 * 4 = 189 bytes; "mean" and the masks' weights go without saying."""
    work = Work(5, 20, kept={"conv.weight": 18, "fc.weight": 30})
    update = ClientUpdate(
        5,
        20,
        {},
        task.sub_model,
        {
            "c": Statistic({"c": np.array([0.1, 0.3, 0.5, 1.1], np.float32)}, "mean"),
            "n": Statistic({}, "sum"),
        },
        {"loss": 0.5},
        (work, replace(work, kept={"fc.weight": 30})),
    )
    text = (
        '{"metrics":{"loss":0.5},"statistics":{"c":{"c":["f4",[4]]},"n":["sum",{}]},'
        '"work":[[5,20,{}],[5,20,{"fc.weight":30}]]}'
    )
    sent = encode_update(update, task)
    assert len(sent) == update_bytes(update, task) == 80 + len(text) + 16
    assert text.encode() in sent
    got = decode_update(sent, task)
    assert got.work == update.work and got.statistics["c"].reduction == "mean"


def test_work_on_spans_of_the_model(task: ClientTask) -> None:
    """A span is two names behind the numbers; the whole model has none."""
    works = (
        Work(0, 8, forward_examples=100, kept={"fc.weight": 30}, end="conv"),
        Work(5, 20, optimizer_floats=1, beside=1, held_examples=28, begin="conv"),
        Work(1, begin="conv", end="fc"),
        Work(1, 2, beside=2),
        Work(1, taps=("conv", "fc")),
        Work(1, begin="conv", taps=("fc",)),
        Work(1, 2, width=0.5),
        Work(1, 2, begin="conv", taps=("fc",), width=1 / 3),
    )
    update = ClientUpdate(5, 20, {}, task.sub_model, work=works)
    sent = encode_update(update, task)
    text = (
        '[[0,8,0,100,["","conv"],{"fc.weight":30}],[5,20,0,0,1,1,28,["conv",""]],'
        '[1,["conv","fc"]],[1,2,0,0,0,2],[1,["","","conv","fc"]],[1,["conv","","fc"]],'
        '[1,2,0.5],[1,2,0.3333333333333333,["conv","","fc"]]]'
    )
    assert text.encode() in sent and len(sent) == update_bytes(update, task)
    assert decode_update(sent, task).work == works


def test_fifty_scalars_of_a_byte_each_are_below_200_bytes(task: ClientTask) -> None:
    """Whatever the model: neither the tensors nor the masked ones are named."""
    scalars = round_int8(np.linspace(-3, 3, 50, dtype=np.float32))
    kept = {name: int(mask.sum()) for name, mask in task.sub_model.masks.items()}
    update = ClientUpdate(
        5,
        40,
        {},
        task.sub_model,
        {"c": Statistic({"c": scalars}, "mean")},
        work=(Work(0, 32, forward_examples=32 * 51, kept=kept),),
    )
    sent = encode_update(update, task)
    assert len(sent) == update_bytes(update, task) <= 200
    got = decode_update(sent, task)
    assert same_arrays(got.statistics["c"].tensors, {"c": scalars}) and got.work == update.work


def test_float16_values_take_two_bytes_each(task: ClientTask) -> None:
    values = np.array([0.1, -70.25, 3e-7, 0.5], np.float32).astype(np.float16).astype(np.float32)
    update = ClientUpdate(5, 40, {}, task.sub_model, {"c": Statistic({"c": values}, "mean")})
    longer = Statistic({"c": np.array([0.1, -70.25, 3e-7, 0.5], np.float32)}, "mean")
    sent = encode_update(update, task)
    assert same_arrays(decode_update(sent, task).statistics["c"].tensors, {"c": values})
    assert update_bytes(replace(update, statistics={"c": longer}), task) - len(sent) == 8


def test_a_task_carries_arrays_bit_for_bit(task: ClientTask) -> None:
    arrays = {
        "first": {"fc.weight": np.linspace(0, 1, 30, dtype=np.float32)},
        "log": {"rounds": np.array([3, 4]), "c": np.full((2, 5), 0.1, np.float32)},
    }
    sent = encode_task(replace(task, params={}, arrays=arrays))
    assert len(sent) == task_bytes(replace(task, params={}, arrays=arrays))
    got = decode_task(sent, {}, {})
    assert not got.params and got.arrays.keys() == arrays.keys()
    assert all(same_arrays(got.arrays[key], arrays[key]) for key in arrays)


def test_full_gradient_by_hand(task: ClientTask) -> None:
    """Dense fp32 of 36 + 4 + 4 + 4 + 1440 + 10 = 1498 coordinates beside no parameters."""
    gradient = {name: np.full(s, 0.1, np.float32) for name, s in task.spec.param_shapes.items()}
    bare = ClientUpdate(5, 1, {}, task.sub_model)
    full = replace(bare, statistics={"g": Statistic(gradient, "mean")})
    table = '{"statistics":{"g":{' + ",".join(f'"{n}":null' for n in gradient) + "}}}"
    # a byte of names goes with the parameters
    assert (
        update_bytes(full, task) - update_bytes(bare, task) == 4 * 1498 + len(table) - len("{}") - 1
    )


@pytest.mark.parametrize("value_dtype", DTYPES)
def test_packed_values_are_the_same_message(
    task: ClientTask, update: ClientUpdate, value_dtype: Any
) -> None:
    packed = replace(task, params=pack(task.params, task.sub_model.masks))
    assert packed.params["fc.weight"].shape == (30,)
    want = encode_task(task, value_dtype=value_dtype)
    assert encode_task(packed, value_dtype=value_dtype) == want
    assert task_bytes(packed, value_dtype=value_dtype) == len(want)
    answer = replace(update, params=pack(update.params, update.sub_model.masks))
    want = encode_update(update, task, value_dtype=value_dtype)
    assert encode_update(answer, task, value_dtype=value_dtype) == want
    short = replace(packed, params={**packed.params, "fc.weight": np.zeros(29, np.float32)})
    with pytest.raises(WireError, match=r"'fc.weight' must be float32 of shape \(10, 144\)"):
        task_bytes(short)


def test_fp32_is_bit_exact(task: ClientTask) -> None:
    bits = np.array([0, 1 << 31, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x00800000, 0x3F800001, 7, 8, 9], "u4")
    params = {"fc.bias": bits.view(np.float32)}
    got = decode_task(encode_task(replace(task, params=params)), {}, {})
    assert got.params["fc.bias"].view("u4").tolist() == bits.tolist()


def test_fp16_rounds_to_nearest(task: ClientTask) -> None:
    """1 + 2^-11 lies halfway between 1 and 1 + 2^-10: to even, 1."""
    params = {"norm.bias": np.array([1 + 2**-11, 0.1, -65504, 0], np.float32)}
    got = decode_task(encode_task(replace(task, params=params), value_dtype="fp16"), {}, {})
    expected = np.array([1, np.float16(0.1), -65504, 0], np.float32)
    assert np.array_equal(got.params["norm.bias"], expected)
    params = {"norm.bias": np.full(4, 65536, np.float32)}
    with pytest.raises(WireError, match="beyond float16"):
        encode_task(replace(task, params=params), value_dtype="fp16")


def test_int8_by_hand(task: ClientTask) -> None:
    """max |x| = 254, scale 2: 254, -3, 1, 0 -> 127, rint(-1.5) = -2, rint(0.5) = 0, 0."""
    params = {"norm.bias": np.array([254, -3, 1, 0], np.float32)}
    got = decode_task(encode_task(replace(task, params=params), value_dtype="int8"), {}, {})
    assert got.params["norm.bias"].tolist() == [254, -4, 0, 0]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=9))
def test_int8_error_is_at_most_half_a_step(values: list[float]) -> None:
    spec = sequential((1,), [("fc", Linear(max(len(values), 1), bias=False))])
    array = np.array(values or [0.0], np.float32).reshape(-1, 1)
    task = ClientTask(0, "", 0, 0, spec, {"fc.weight": array}, SubModel(), {})
    got = decode_task(encode_task(task, value_dtype="int8"), {}, {}).params["fc.weight"]
    step = float(np.abs(array).max()) / 127
    error = np.abs(got.astype(float) - array.astype(float)).max()
    # Below float32's normal range the scale itself is coarse: 127 of its smallest steps.
    assert error <= step * 0.5001 + 127 * 2.0**-149


def test_unchanged_sub_model_is_the_tasks_own_object(task: ClientTask) -> None:
    """By identity, and by content: an equal copy needs no pattern either."""
    copy = SubModel(
        {name: mask.copy() for name, mask in task.sub_model.masks.items()},
        frozen=task.sub_model.frozen,
    )
    sent = [encode_update(ClientUpdate(5, 1, task.params, s), task) for s in (task.sub_model, copy)]
    assert sent[0] == sent[1]
    assert decode_update(sent[0], task).sub_model is task.sub_model


def test_dropped_masks(task: ClientTask) -> None:
    dense = replace(task.sub_model, masks={})
    got = decode_update(encode_update(ClientUpdate(5, 1, {}, dense), task), task)
    assert got.sub_model == dense


def test_no_answer_thaws(task: ClientTask) -> None:
    thawed = replace(task.sub_model, frozen=frozenset())
    with pytest.raises(WireError, match="frozen tensors of an answer are those of its task"):
        encode_update(ClientUpdate(5, 1, {}, thawed), task)


def test_unknown_hashes_can_be_asked_for(spec: ModelSpec, task: ClientTask) -> None:
    key = pattern_hash(task.sub_model.masks)
    data = encode_task(task, Known(frozenset({spec.hash}), frozenset({key})))
    with pytest.raises(UnknownSpec) as caught:
        decode_task(data, {}, {})
    assert caught.value.hash == spec.hash
    with pytest.raises(UnknownPattern) as caught:
        decode_task(data, {spec.hash: spec}, {})
    assert caught.value.hash == key
    got = decode_task(data, {spec.hash: spec}, {key: task.sub_model.masks})
    assert got.spec is spec and got.sub_model.masks is task.sub_model.masks


def test_decoded_arrays_are_aligned_and_masks_and_frozen_values_read_only(task: ClientTask) -> None:
    """All the way down: they are hashed and counted once."""
    got = decode_task(encode_task(task), {}, {})
    masks = got.sub_model.masks.values()
    for array in (*got.params.values(), *masks):
        assert array.flags.aligned and array.flags.c_contiguous
    frozen = got.sub_model.frozen
    assert frozen & got.params.keys()
    assert {name for name, v in got.params.items() if not v.flags.writeable} == frozen
    assert masks and not any(map(writable, masks))


def writable(array: np.ndarray | None) -> bool:
    return array is not None and (array.flags.writeable or writable(array.base))


def test_an_answer_is_no_larger_than_foretold(task: ClientTask) -> None:
    """Values, a statistic that no code shortens, and what it says of its losses and its work."""
    rng = np.random.default_rng(0)
    shapes = task.spec.param_shapes
    works = (Work(3, 5, kept=kept_counts(task.sub_model.masks)),)
    drawn = {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    update = ClientUpdate(
        task.client,
        10**9,
        apply_mask(
            {n: rng.random(s, dtype=np.float32) for n, s in task.spec.tensor_shapes.items()},
            task.sub_model.masks,
        ),
        task.sub_model,
        {"score": Statistic(drawn, "mean")},
        {"train_loss": 0.1234567890123456, "distance": 1.234567890123456},
        works,
    )
    forms = {"score": StatisticForm(shapes)}
    for one, holds in ((update, True), (replace(update, params={}), False)):
        exact = len(encode_update(one, task))
        most = answer_bytes(task, forms, works, params=holds)
        assert exact <= most <= exact + METRICS_BYTES + 64 * len(shapes) + 64
