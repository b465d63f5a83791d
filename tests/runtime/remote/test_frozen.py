"""Frozen tensors over devices: they travel once, and what a device has lost it gets again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import (
    CLIENTS,
    ENGINE,
    ROUNDS,
    SPEC,
    client_data,
    dataset,
    first_model,
    fresh_dispatch,
    params,
    run,
    same,
    server,
)
from loopback import remote

from fedlean import wire
from fedlean.algorithm import Device, FederatedAlgorithm
from fedlean.core import ClientTask, ClientUpdate, SubModel
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.checkpoint import load_checkpoint, save_checkpoint, state_tree
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.record import StepRecord
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote import frozen, worker
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.frozen import HeldFrozen
from fedlean.runtime.remote.room import resident_bytes
from fedlean.runtime.remote.worker import Worker
from fedlean.runtime.rounds import LoopState

pytestmark = pytest.mark.usefixtures("clock")
FIRST = frozenset({"conv.weight", "conv.bias"})
MORE = FIRST | {"fc1.weight", "fc1.bias"}
FIRST_BYTES = 4 * (4 * 9 + 4)


def freezing(frozen: Callable[[int], frozenset[str]] = lambda number: FIRST) -> FederatedAlgorithm:
    """FedAvg over all four that trains the rest of the model, by the number of the round."""
    algorithm = fedavg(server(), lr=0.05, local_steps=2, batch_size=8)

    def configure(state, devices):
        held = SubModel(frozen=frozen(state.round))
        return [replace(task, sub_model=held) for task in algorithm.configure(state, devices)]

    return algorithm._replace(configure=configure)


def records_of(algorithm: FederatedAlgorithm, **settings) -> tuple[Any, list[StepRecord]]:
    records: list[StepRecord] = []
    state = run(algorithm, watch=lambda progress, record: records.append(record), **settings)
    return state, records


def down(records: list[StepRecord]) -> list[int]:
    return [record.cost.downlink_bytes for record in records]


def test_from_the_second_round_on_their_bytes_are_gone_here_and_there(post):
    dispatch, lines = remote(post)
    state, over_devices = records_of(freezing(), dispatch=dispatch)
    alone, local = records_of(freezing())
    assert same(state, alone) and len(lines) == CLIENTS
    assert same({name: state.params[name] for name in FIRST}, {n: params()[n] for n in FIRST})
    assert not same(state.params["fc2.bias"], params()["fc2.bias"])
    assert down(over_devices) == down(local)
    once = CLIENTS * (FIRST_BYTES + 1 + 4 + len(SPEC.to_json()))  # with names, and the spec
    assert [local[0].cost.downlink_bytes - bytes for bytes in down(local)] == [0] + [once] * 5
    up = [record.cost.uplink_bytes for record in local]
    assert max(up) - min(up) < FIRST_BYTES / 4  # digits of metrics
    plain, frozen = (wire.update_bytes(*answer_to(names)) for names in (frozenset[str](), FIRST))
    assert plain - frozen == FIRST_BYTES


def answer_to(frozen: frozenset[str]) -> tuple[ClientUpdate, ClientTask]:
    algorithm = freezing(lambda number: frozen)
    dispatch = fresh_dispatch(algorithm)
    state = algorithm.init(first_model())
    (task, *_) = algorithm.configure(state, dispatch.begin(ClientStore(), 1))
    (update,) = dispatch([task], lambda update, task: None)
    return replace(update, metrics={}), task


def test_others_travel_when_they_are_frozen(post):
    """Two stages: the values of the second are new, and those of the first do not come again."""
    dispatch, lines = remote(post)
    stages = freezing(lambda number: FIRST if number < 3 else MORE)
    state, over_devices = records_of(stages, dispatch=dispatch)
    alone, local = records_of(stages)
    assert same(state, alone) and down(over_devices) == down(local)
    assert not any("lacks" in line for line in lines)
    sizes = down(local)
    assert sizes[1] == sizes[2] < sizes[3] > sizes[4] == sizes[5]
    more = 4 * sum(int(np.prod(SPEC.tensor_shapes[name])) for name in MORE - FIRST)
    assert sizes[3] - sizes[4] == CLIENTS * (more + 1)


@pytest.mark.parametrize("how", ["gone", "torn"])
def test_a_device_that_lost_them_gets_them_again_once(how, post):
    dispatch, lines = remote(post)

    def watch(progress: LoopState, record: StepRecord) -> None:
        records.append(record)
        if progress.state.round == 3:
            for path in post.folder.glob("2/*/frozen-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                if how == "torn":
                    path.write_bytes(b"torn")

    records: list[StepRecord] = []
    state = run(freezing(), dispatch=dispatch, watch=watch)
    alone, local = records_of(freezing())
    assert same(state, alone)
    assert lines.count("client 2 lacks the frozen tensors: they are sent again") == 1
    differ = [got - want for got, want in zip(down(records), down(local), strict=True)]
    (task,) = (task for task in records[3].tasks if task.client == 2)
    assert differ == [0, 0, 0, wire.task_bytes(task), 0, 0]


def test_devices_that_restart_hold_them_on_their_disks(post):
    dispatch, lines = remote(post)

    def watch(progress: LoopState, record: StepRecord) -> None:
        for client in range(CLIENTS):
            post.restart(client)

    assert same(run(freezing(), dispatch=dispatch, watch=watch), run(freezing()))
    assert not any("lacks" in line for line in lines)


def test_a_server_that_resumes_knows_what_devices_hold(post, tmp_path):
    def watch(progress: LoopState, record: StepRecord) -> None:
        if progress.step == 3:
            clients = {str(c): dict(s) for c, s in first.client_states().items()}
            parts = {"state": state_tree(progress.state), "store": progress.store.to_tree()}
            save_checkpoint(tmp_path / "c", 3, {"step": 3, "clients": clients, **parts})
            raise KeyboardInterrupt

    first, _ = remote(post)
    with pytest.raises(KeyboardInterrupt):
        run(freezing(), dispatch=first, watch=watch)
    tree, _ = load_checkpoint(tmp_path / "c")
    algorithm = freezing()
    state = type(algorithm.init(first_model()))(**tree["state"])
    again, lines = remote(post)
    again.restore({int(key): value for key, value in tree["clients"].items()})
    progress = LoopState(state, ClientStore(tree["store"]), tree["step"])
    resumed, records = records_of(algorithm, dispatch=again, progress=progress)
    alone, local = records_of(freezing())
    assert same(resumed, alone) and not any("lacks" in line for line in lines)
    assert down(records) == down(local)[3:] and len(local) == ROUNDS


# What a device keeps


def values(number: int) -> dict[str, np.ndarray]:
    return {
        "fc1.weight": np.full((3, 4), number, np.float32),
        "fc1.bias": np.array([number], np.float32),
    }


MASKS = {"fc1.weight": np.arange(12).reshape(3, 4) % 5 == 0}


def test_the_newest_values_stay_and_are_read_as_they_were(tmp_path):
    held = HeldFrozen(tmp_path / "run")
    for number in range(5):
        held.keep(values(number), MASKS)
    assert sorted(held) == ["fc1.bias", "fc1.weight"]
    assert len(list((tmp_path / "run").iterdir())) == 1  # those before it have newer ones
    got = HeldFrozen(tmp_path / "run")
    assert got["fc1.weight"].tolist() == [4, 4, 4] and got["fc1.bias"].tolist() == [4]
    assert wire.frozen_hash(dict(got), MASKS) == wire.frozen_hash(values(4), MASKS)
    assert not got["fc1.bias"].flags.writeable
    held.keep({}, {})
    assert len(held) == 2


@pytest.mark.parametrize("ahead_seconds", [0, 86400])
def test_what_came_last_is_the_newest_whatever_the_clock_says(ahead_seconds, tmp_path):
    """A board that restarts without a network begins in the past; a coarse clock stands still."""
    held = HeldFrozen(tmp_path)
    for number in range(8):
        held.keep(values(number), MASKS)
        assert held["fc1.bias"].tolist() == HeldFrozen(tmp_path)["fc1.bias"].tolist() == [number]
        (path,) = tmp_path.iterdir()
        later = path.stat().st_mtime_ns + ahead_seconds * 10**9
        os.utime(path, ns=(later, later))


def test_what_changed_or_is_new_is_written_alone(tmp_path):
    held = HeldFrozen(tmp_path)
    held.keep(values(1), MASKS)
    first = {path.name for path in tmp_path.iterdir()}
    held.keep({**values(1), "fc2.bias": np.array([7, 8], np.float32)}, MASKS)
    (second,) = {path.name for path in tmp_path.iterdir()} - first
    assert (tmp_path / second).stat().st_size < 200
    held.keep({"fc1.bias": np.array([9], np.float32)}, MASKS)
    assert len(list(tmp_path.iterdir())) == 3  # the first still has the newest of fc1.weight
    again = HeldFrozen(tmp_path)
    assert again["fc1.bias"].tolist() == [9] and again["fc1.weight"].tolist() == [1, 1, 1]
    assert again["fc2.bias"].tolist() == [7, 8]
    with pytest.raises(KeyError):
        again["fc2.weight"]


def test_of_very_many_files_the_newest_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "FILES", 3)
    held = HeldFrozen(tmp_path)
    for number in range(6):
        held.keep({f"fc{number}.bias": np.array([number], np.float32)}, {})
        (newest,) = (path for path in tmp_path.iterdir() if path not in seen(tmp_path, number))
        os.utime(newest, ns=(number, number))
    assert sorted(HeldFrozen(tmp_path)) == ["fc3.bias", "fc4.bias", "fc5.bias"]


def seen(folder, number):
    """The files of earlier numbers, which have their times."""
    return {path for path in folder.iterdir() if path.stat().st_mtime_ns < number}


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_file_is_not_believed_and_makes_room_for_a_sound_one(seed, tmp_path):
    HeldFrozen(tmp_path).keep(values(1), MASKS)
    held, rng = HeldFrozen(tmp_path), np.random.default_rng(seed)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if seed % 4 == 0:
        del data[int(rng.integers(len(data))) :]
    else:
        data[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
    path.write_bytes(data)
    with pytest.raises(KeyError):
        [held[name] for name in ("fc1.weight", "fc1.bias")]
    assert not path.exists()
    held.keep(values(1), MASKS)
    assert held["fc1.bias"].tolist() == [1]


def test_a_full_disk_costs_a_message_and_no_round(tmp_path, monkeypatch, caplog):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen, "write_atomically", full)
    held = HeldFrozen(tmp_path)
    held.keep(values(1), MASKS)
    assert "the frozen tensors are not kept: [Errno 28] No space left" in caplog.text
    assert len(held) == 0


def test_held_values_count_under_the_memory_limit(tmp_path, monkeypatch):
    """They are read only if what is free has room for them beside everything else."""
    algorithm = freezing(lambda number: MORE)
    (task, *_) = algorithm.configure(algorithm.init(first_model()), [Device(0)])
    limit = 4 * resident_bytes()
    device = Worker(tmp_path, client_data()[0], engine=ENGINE.name, memory_limit_bytes=limit)
    fields = {
        "run": "a1",
        "method": "fedavg",
        "step": 1,
        "committed": None,
        "classes": list(dataset().class_names),
        "mean": dataset().mean.tolist(),
        "std": dataset().std.tolist(),
        "deadline_seconds": 600.0,
        "memory_bytes": None,
    }
    held = frozenset(wire.frozen_hashes(wire.frozen_params(task), {}).values())
    for known in (wire.Known(), wire.Known(frozen=held)):
        body = wire.encode_task(task, known)
        answer = device.answer(seal(Envelope(env.TASK, fields, body)))
        assert unseal(answer, expected=(env.UPDATE,))
    monkeypatch.setattr(worker, "LIMIT_FLOOR_BYTES", 0)
    size = 4 * sum(int(np.prod(SPEC.tensor_shapes[name])) for name in MORE)
    assert len(body) < size
    monkeypatch.setattr(worker, "resident_bytes", lambda: limit - size + 1)
    fields = unseal(
        device.answer(seal(Envelope(env.TASK, fields, body))), expected=(env.TROUBLE,)
    ).fields
    assert f"the frozen tensors held here would decode into {size} bytes" in fields["reason"]


def test_task_values_are_those_of_frozen_tensors_alone():
    task = ClientTask(1, "train", 0, 0, SPEC, params(), SubModel(frozen=FIRST), {})
    assert wire.frozen_params(task).keys() == FIRST
