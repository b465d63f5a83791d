"""A device's half: what it refuses, what it keeps, and that nothing makes it raise."""

from __future__ import annotations

import logging
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, devices, first_model, params, server

from fedlean import wire
from fedlean.core import ClientTask, SubModel
from fedlean.engine.memory import forward_memory, step_memory
from fedlean.engine.protocol import SGD
from fedlean.methods.fedavg import fedavg
from fedlean.models.conv2 import conv2
from fedlean.models.initialise import init_params
from fedlean.models.resnet import resnet8
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote import worker as worker_module
from fedlean.runtime.remote.dispatch import _decoded
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.held import PATTERNS, RUNS, HeldPatterns, HeldStates, forget_old_runs
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import TooLarge, resident_bytes
from fedlean.runtime.remote.worker import Worker
from fedlean.tree import pattern_hash

FIELDS = {
    "run": "a1",
    "method": "fedavg",
    "step": 1,
    "committed": None,
    "classes": list(client_data()[0].dataset.class_names),
    "mean": client_data()[0].dataset.mean.tolist(),
    "std": client_data()[0].dataset.std.tolist(),
    "deadline_seconds": 600.0,
    "memory_bytes": None,
}


def a_task(spec=SPEC, values=None) -> ClientTask:
    algorithm = fedavg(server(), lr=0.1, local_steps=1, batch_size=4)
    task = algorithm.configure(algorithm.init(first_model()), devices())[0]
    return replace(task, spec=spec, params=values or task.params)


def letter(task: ClientTask, **fields) -> bytes:
    return seal(Envelope(env.TASK, {**FIELDS, **fields}, wire.encode_task(task)))


def worker(tmp_path, **settings) -> Worker:
    return Worker(tmp_path, client_data()[0], **{"client": 0, "engine": ENGINE.name, **settings})


def reason(answer: bytes) -> str:
    return unseal(answer, expected=(env.TROUBLE,)).fields["reason"]


def test_a_sound_task_is_answered(tmp_path):
    answer = unseal(worker(tmp_path).answer(letter(a_task())), expected=(env.UPDATE,))
    update = wire.decode_update(bytes(answer.body), a_task())
    assert update.num_examples == 25 and answer.fields["lost_state"] is False


def test_the_federations_mean_and_deviation_count(tmp_path):
    answers = [
        worker(tmp_path).answer(letter(a_task(), mean=[mean])) for mean in (FIELDS["mean"][0], 0.0)
    ]
    first, second = (
        wire.decode_update(bytes(unseal(one, expected=(env.UPDATE,)).body), a_task()).params
        for one in answers
    )
    assert not np.array_equal(first["fc2.bias"], second["fc2.bias"])


REFUSED = {
    "another method's module": ({"method": "os:system"}, "--allow-method os:system"),
    "no such method": ({"method": "fedavgg"}, "cannot be used on this device"),
    "a path": ({"method": "..core"}, "no method is named"),
    "channels": ({"mean": [0.0, 0.0]}, "must have 1 numbers"),
    "deviation 0": ({"std": [0.0]}, "std must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    fields, text = REFUSED[name]
    assert text in reason(worker(tmp_path).answer(letter(a_task(), **fields)))


def test_a_method_that_the_operator_allows_may_run(tmp_path):
    name = "fedlean.methods.fedavg:fedavg"
    allowed = worker(tmp_path, methods=[name])
    assert unseal(allowed.answer(letter(a_task(), method=name)), expected=(env.UPDATE,))


def test_a_model_for_other_examples_is_refused(tmp_path):
    spec = conv2((1, 28, 28), 10)
    answer = worker(tmp_path).answer(letter(a_task(spec, init_params(spec, 0))))
    assert "examples of shape (1, 28, 28), this device holds (1, 8, 8)" in reason(answer)


def test_a_task_for_another_client_is_refused(tmp_path):
    other = worker(tmp_path, client=1)
    assert "for client 0, this is client 1" in reason(other.answer(letter(a_task())))


def test_an_oversized_message_is_refused_by_its_length(tmp_path):
    """What is free under the limit, and 64 KiB at least."""
    small = worker(tmp_path, memory_limit_bytes=2000)
    spec = conv2((1, 8, 8), 3)
    answer = small.answer(letter(a_task(spec, init_params(spec, 0))))
    assert "the limit is 65536" in reason(answer)


def test_a_message_is_measured_against_what_is_free(tmp_path, monkeypatch):
    """It is in memory itself, as is the last task's session: one that fits beside them is taken."""
    whole = letter(a_task())
    limit = 4 * resident_bytes()
    device = worker(tmp_path, memory_limit_bytes=limit)
    monkeypatch.setattr(worker_module, "LIMIT_FLOOR_BYTES", 0)
    monkeypatch.setattr(worker_module, "resident_bytes", lambda: limit - len(whole))
    assert unseal(device.answer(whole), expected=(env.UPDATE,))
    monkeypatch.setattr(worker_module, "resident_bytes", lambda: limit - len(whole) // 2)
    assert f"the limit is {len(whole) // 2}" in reason(device.answer(whole))


def test_what_is_not_held_is_said(tmp_path):
    task = a_task()
    known = wire.Known(specs=frozenset({SPEC.hash}))
    short = seal(Envelope(env.TASK, FIELDS, wire.encode_task(task, known)))
    fields = unseal(worker(tmp_path).answer(short), expected=(env.TROUBLE,)).fields
    assert fields["missing"] == "spec"


# A limit on memory


def opened(engine, spec, values):
    return engine.open(spec, values, SubModel(), batch_size=20, optimizer=SGD(0.1))


def test_a_session_that_does_not_fit_is_refused_before_it_allocates():
    """Conv-2 takes some 27 MB for its weights alone."""
    spec = conv2((1, 28, 28), 10)
    values = init_params(spec, 0)
    engine = LimitedEngine(ENGINE, resident_bytes() + 20_000_000)
    before = resident_bytes()
    with pytest.raises(TooLarge, match=r"a training step needs .* MB, .* are free"):
        engine.open(spec, values, SubModel(), batch_size=20, optimizer=SGD(0.1))
    assert resident_bytes() - before < 2_000_000


def test_a_forward_pass_that_does_not_fit_is_refused_before_it_is_opened():
    """Evaluation may fit where training does not."""
    spec = resnet8((3, 32, 32), 10)
    values = init_params(spec, 0)
    x, y = np.zeros((32, 3, 32, 32), np.float32), np.zeros(32, np.int64)
    little = LimitedEngine(ENGINE, resident_bytes() + 1_000_000)
    before = resident_bytes()
    with pytest.raises(TooLarge, match=r"a forward pass needs .* MB, .* are free"):
        little.open_forward(spec, values, SubModel(), batch_size=32)
    assert resident_bytes() - before < 1_000_000
    sparse = ENGINE.arithmetic == "sparse"
    enough = forward_memory(spec, {}, batch_size=32, sparse=sparse).peak_bytes
    engine = LimitedEngine(ENGINE, resident_bytes() + 2 * enough)
    with pytest.raises(TooLarge, match="a training step needs"):
        engine.open(spec, values, SubModel(), batch_size=32, optimizer=SGD(0.1))
    session = engine.open_forward(spec, values, SubModel(), batch_size=32, directions_at_once=1)
    assert np.isfinite(session.losses_perturbed(x, y, seed=0, ks=[0], sigma=0.1)).all()


def test_sums_of_squares_that_do_not_fit_are_refused():
    """Of a model so small they fit; of Conv-2 only the plain step does."""
    plain = LimitedEngine(ENGINE, resident_bytes() + 10_000_000)
    session = opened(plain, SPEC, params())
    x, y = next(client_data()[0].draw(steps=1, batch_size=20, seed=0))
    session.step(x, y, importance=True)
    spec = conv2((1, 28, 28), 10)
    values = init_params(spec, 0)
    step, important = (
        step_memory(spec, {}, batch_size=20, importance=each, sparse=ENGINE.arithmetic == "sparse")
        for each in (False, True)
    )
    between = (step.peak_bytes + important.peak_bytes) // 2
    tight = LimitedEngine(ENGINE, resident_bytes() + between)
    session = opened(tight, spec, values)
    x = np.zeros((20, 1, 28, 28), np.float32)
    with pytest.raises(TooLarge, match="Σ g² of all coordinates"):
        session.step(x, np.zeros(20, np.int64), importance=True)
    session.step(x, np.zeros(20, np.int64))


def test_a_round_under_a_limit_is_the_same(tmp_path):
    free, limited = (
        Worker(tmp_path / name, client_data()[0], engine=ENGINE.name, memory_limit_bytes=limit)
        for name, limit in (("a", None), ("b", 4 * resident_bytes()))
    )
    a, b = (
        bytes(unseal(one.answer(letter(a_task())), expected=(env.UPDATE,)).body)
        for one in (free, limited)
    )
    assert a == b


# What is on disk


def test_of_patterns_the_newest_stay_and_torn_files_are_not_believed(tmp_path):
    held = HeldPatterns(tmp_path)
    masks = [{"fc1.weight": np.arange(768).reshape(12, 64) % n == 0} for n in range(2, 9)]
    for one in masks:
        held.keep(one)
    assert len(list(tmp_path.glob("pattern-*"))) == PATTERNS
    fresh, key = HeldPatterns(tmp_path), pattern_hash(masks[-1])
    assert key in fresh and np.array_equal(fresh[key]["fc1.weight"], masks[-1]["fc1.weight"])
    path = tmp_path / f"pattern-{key}.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert key not in HeldPatterns(tmp_path)
    other = tmp_path / f"pattern-{pattern_hash(masks[-2])}.safetensors"
    other.rename(path)  # whole, but of another name
    assert key not in HeldPatterns(tmp_path)


def test_of_states_the_one_that_counts_and_the_new_one_stay(tmp_path):
    held = HeldStates(tmp_path)
    for step in (1, 2, 3):
        held.write(step, {"step": np.array(step)}, committed=1 if step > 1 else None)
    assert int(held.read(1)[0]["step"]) == 1 and int(held.read(3)[0]["step"]) == 3
    assert held.read(2) == ({}, True)
    assert held.read(None) == ({}, False)


def test_old_runs_are_forgotten(tmp_path):
    for number in range(RUNS + 3):
        (tmp_path / f"run{number}").mkdir()
    forget_old_runs(tmp_path, "run0")
    left = {path.name for path in tmp_path.iterdir()}
    assert "run0" in left and len(left) <= RUNS + 1


# Hostile messages


def mutations(whole: bytes, count: int):
    """Inside a sound envelope: flipped, cut, doubled, overwritten bodies and fields."""
    rng = np.random.default_rng(0)
    envelope = unseal(whole, expected=tuple(env.KINDS))
    for _ in range(count):
        body = bytearray(envelope.body)
        fields = dict(envelope.fields)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(max(1, len(body))))
            what = int(rng.integers(6))
            if what == 0 and body:
                body[at] ^= 1 << int(rng.integers(8))
            elif what == 1:
                del body[at:]
            elif what == 2:
                body[at:at] = body[at : at + 64]
            elif what == 3:
                body[at : at + 8] = b"\xff" * 8
            elif what == 4:
                body[at : at + 4] = int(rng.integers(1 << 32)).to_bytes(4, "little")
            else:
                name = list(fields)[int(rng.integers(len(fields)))]
                values = [None, -1, 1 << 61, "x" * 100, [1e29], {}, 0.5, True]
                fields[name] = values[int(rng.integers(len(values)))]
        yield seal(replace(envelope, fields=fields, body=bytes(body)))


def test_a_thousand_mutated_tasks(tmp_path, caplog):
    """Each is answered, most with a reason; memory stays flat."""
    caplog.set_level(logging.CRITICAL, "fedlean")  # a thousand lines are memory, too
    device = worker(tmp_path, memory_limit_bytes=4 * resident_bytes())
    masks = {"fc1.weight": np.arange(768).reshape(12, 64) % 3 == 0}
    task = a_task()
    whole = letter(replace(task, sub_model=SubModel(masks=masks)))
    refused = 0
    tracemalloc.start()
    for mutated in mutations(whole, 1000):
        answer = unseal(device.answer(mutated), expected=(env.UPDATE, env.TROUBLE))
        refused += answer.kind == env.TROUBLE
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 600
    assert peak < 8_000_000, "nothing is allocated by a length that a message claims"


def test_two_thousand_mutated_answers(tmp_path):
    """Each is refused with a reason, or is an update that the runtime's checks see next."""
    device = worker(tmp_path)
    task = a_task()
    whole = device.answer(letter(task))
    path = tmp_path / "reply"
    refused = 0
    tracemalloc.start()
    for mutated in mutations(whole, 2000):
        try:
            envelope = unseal(mutated, expected=(env.UPDATE,))
        except env.EnvelopeError:
            refused += 1
            continue
        path.write_bytes(envelope.body)
        refused += isinstance(_decoded(path, task), str)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 1200
    assert peak < 8_000_000
