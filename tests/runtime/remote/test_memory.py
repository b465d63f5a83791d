"""What devices say of their memory, what is not sent to them for it, and fleets over a post."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from federation import CLIENTS, ENGINE, SPEC, client_data, dataset, first_model, run, same, server
from loopback import Loopback, kind_of, remote

from fedlean.algorithm import Device, FederatedAlgorithm
from fedlean.core import ClientTask, SubModel
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.engine.memory import step_memory
from fedlean.fleet.fleet import Fleet, Member, always
from fedlean.fleet.quantity import Quantity
from fedlean.methods.fedavg import fedavg
from fedlean.methods.heterofl import heterofl
from fedlean.runtime.ceilings import Ceilings
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.record import StepRecord
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote import limit, room, worker
from fedlean.runtime.remote.attendance import _standing_for
from fedlean.runtime.remote.dispatch import RemoteDispatch, Terms
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.holding import expected_by
from fedlean.runtime.remote.worker import Worker
from fedlean.tree import kept_counts

pytestmark = pytest.mark.usefixtures("clock")

PROCESS = 50_000_000
LARGE = 1 << 30
PROFILE = load_profile("generic")


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """The process is of one size, whatever else the tests hold."""
    monkeypatch.setattr(worker, "resident_bytes", lambda: PROCESS)
    holds = room.Room._process_bytes
    monkeypatch.setattr(
        room.Room, "_process_bytes", lambda self: holds(self) if self._emulated else PROCESS
    )


def everybody(rounds: int = 3) -> FederatedAlgorithm:
    return fedavg(server(rounds), lr=0.05, local_steps=2, batch_size=8)


def limited(post: Loopback, client: int, limit_bytes: int) -> None:
    post.workers[100 + client] = Worker(
        post.folder / str(client),
        client_data()[client],
        client=client,
        engine=ENGINE.name,
        memory_limit_bytes=limit_bytes,
    )


def welcome(answering: Worker) -> dict:
    hello = {"run": "a1", **expected_by(dataset()).to_fields(), "refused": None}
    answer = answering.answer(seal(Envelope(env.HELLO, hello)))
    return dict(unseal(answer, expected=(env.WELCOME,)).fields)


def asked(post: Loopback) -> list[int]:
    return [node for node, content in post.sent if kind_of(content) == env.TASK]


@pytest.mark.parametrize(
    ("limit_bytes", "left"), [(None, None), (LARGE, LARGE - PROCESS), (PROCESS // 2, 0)]
)
def test_a_node_says_how_much_a_task_may_take(tmp_path, limit_bytes, left):
    settings = {"engine": ENGINE.name, "memory_limit_bytes": limit_bytes}
    assert welcome(Worker(tmp_path, client_data()[0], **settings))["memory_bytes"] == left


def test_after_a_task_it_says_what_its_engine_would_grant(post):
    limited(post, 1, LARGE)
    dispatch, _ = remote(post)
    run(everybody(1), rounds=1, dispatch=dispatch)
    (engine,) = post.workers[101]._engines.values()
    assert isinstance(engine, limit.LimitedEngine)
    assert welcome(post.workers[101])["memory_bytes"] == engine.free_bytes() == LARGE - PROCESS


def test_the_server_knows_it_of_each_client_and_asks_none_for_more(post):
    limited(post, 1, PROCESS + 1000)
    limited(post, 2, LARGE)
    dispatch, _ = remote(post)
    present = {device.id: device.memory_bytes for device in dispatch.begin(ClientStore(), 1)}
    assert present == {0: None, 1: 1000, 2: LARGE - PROCESS, 3: None}
    records: list[StepRecord] = []
    run(everybody(), rounds=3, dispatch=dispatch, watch=lambda p, record: records.append(record))
    for record in records:
        assert record.answered == [0, 2, 3] and not record.refused
        assert record.left_out[1].endswith("MB, has 0.001 MB")
    assert asked(post).count(101) == 0 and asked(post).count(102) == 3


def test_a_node_without_room_for_anything_takes_no_part_and_costs_nothing(post):
    limited(post, 1, PROCESS // 2)
    dispatch, _ = remote(post)
    records: list[StepRecord] = []
    run(everybody(1), rounds=1, dispatch=dispatch, watch=lambda p, record: records.append(record))
    assert records[0].answered == [0, 2, 3] and list(records[0].left_out) == [1]


def test_a_node_that_refuses_what_it_said_it_had_room_for_is_asked_for_less(post, monkeypatch):
    """Its message takes some of what it said: less from then on, until it says that it has more."""
    algorithm = heterofl(server(3), local_steps=2, batch_size=8, widths="1 0.5 0.25")
    (task,) = algorithm.configure(algorithm.init(first_model()), [Device(1)])
    assert algorithm.work is not None
    needed = cost(task, algorithm.work(task), PROFILE).peak_memory_bytes
    limited(post, 1, PROCESS + needed)
    held = room.Room._process_bytes  # as `steady` has it, and the message
    monkeypatch.setattr(
        room.Room, "_process_bytes", lambda self: held(self) + (0 if self._emulated else 10)
    )
    monkeypatch.setattr(Worker, "_memory_bytes", lambda self: self._limit and self._limit - PROCESS)
    dispatch, _ = remote(post, method="heterofl")
    records: list[StepRecord] = []
    run(algorithm, rounds=3, dispatch=dispatch, watch=lambda p, record: records.append(record))
    assert [record.answered for record in records] == [[0, 2, 3], *[[0, 1, 2, 3]] * 2]
    assert "MB are free" in records[0].refused[1] and asked(post).count(101) == 3
    widths = [{one.client: one.hparams["width"] for one in record.tasks}[1] for record in records]
    assert widths == ["1.0", "0.5", "0.5"]


def test_a_ceiling_holds_until_a_device_says_that_it_has_more():
    ceilings = Ceilings()

    def left(memory_bytes: int | None) -> int | None:
        (device,) = ceilings.under([Device(1, memory_bytes=memory_bytes)])
        return device.memory_bytes

    assert left(100) == 100
    ceilings.lower(1, 80)
    assert [left(100), left(90), left(50)] == [79, 79, 50]
    ceilings.lower(1, 40)
    assert [left(50), left(51), left(50)] == [39, 51, 50], "it is forgotten"
    assert left(None) is None
    ceilings.lower(1, 80)
    assert [left(None), left(60), left(10**9)] == [79, 60, 79], "it never said a limit"


def drawn_fleet(step: int) -> Sequence[Device]:
    """Here about a third of the devices has too little, and one in five is away."""
    own = {
        "memory_bytes": Quantity((10e3, 40e3), "uniform"),
        "present": Quantity((0.8,)),
        "compute_factor": Quantity((0.5, 2.0), "loguniform"),
    }
    return Fleet((always(Member(PROFILE, own)),), None).present(7, step, CLIENTS)


def over(post: Loopback, present: Callable[[int], Sequence[Device]]) -> RemoteDispatch:
    terms = Terms(deadline_seconds=0.3, join_seconds=0.3, poll_seconds=0.005, min_clients=CLIENTS)
    return RemoteDispatch(
        post,
        method="fedavg",
        dataset=dataset(),
        clients=CLIENTS,
        terms=terms,
        say=lambda line: None,
        present=present,
    )


def test_a_fleet_over_a_post_ends_as_in_one_process(post):
    logs: tuple[list[StepRecord], list[StepRecord]] = ([], [])
    algorithm = everybody(6)
    here = LocalDispatch(algorithm.client_update, ENGINE, client_data(), drawn_fleet)
    there = over(post, drawn_fleet)
    states = [
        run(algorithm, rounds=6, dispatch=each, watch=lambda p, record, log=log: log.append(record))
        for each, log in ((here, logs[0]), (there, logs[1]))
    ]
    assert same(states[0], states[1])
    assert any(record.left_out for record in logs[0])
    assert any(len(record.answered) + len(record.left_out) < CLIENTS for record in logs[0])
    for one, other in zip(*logs, strict=True):
        assert (one.answered, one.left_out, one.notes) == (
            other.answered,
            other.left_out,
            other.notes,
        )
        assert one.cost == other.cost


def masked_tasks() -> list[ClientTask]:
    """For each client one of 60% of the weights of both Linear layers."""
    algorithm, rng = everybody(1), np.random.default_rng(0)
    shapes = {name: SPEC.param_shapes[name] for name in ("fc1.weight", "fc2.weight")}
    masks = {}
    for name, shape in shapes.items():
        size = shape[0] * shape[1]
        masks[name] = (rng.permutation(size) < 0.6 * size).reshape(shape)
    here = [Device(client) for client in range(CLIENTS)]
    tasks = algorithm.configure(algorithm.init(first_model()), here)
    pruned = {n: v * masks[n] if n in masks else v for n, v in tasks[0].params.items()}
    return [replace(task, params=pruned, sub_model=SubModel(masks=masks)) for task in tasks]


def test_devices_of_little_memory_take_the_same_forms_over_a_post_as_in_one_process(post):
    """A byte decides, and a node without a limit of its own takes them for a device of a fleet."""
    tasks = masked_tasks()
    kept = kept_counts(tasks[0].sub_model.masks)
    faster, smaller = (
        step_memory(SPEC, kept, batch_size=8, slower=slower).peak_bytes
        for slower in (frozenset(), frozenset({"fc1"}))
    )
    assert smaller < faster
    profile = replace(PROFILE, dense_way=False)
    devices = [
        Device(client, profile=profile, memory_bytes=memory_bytes)
        for client, memory_bytes in enumerate([faster, faster - 1, smaller, smaller - 1])
    ]
    there = over(post, lambda step: devices)
    client_update = everybody(1).client_update
    here = LocalDispatch(client_update, ENGINE, client_data(), lambda step: devices)
    ample = LocalDispatch(client_update, ENGINE, client_data())
    answers = []
    for dispatch in (here, there, ample):
        dispatch.begin(ClientStore(), 1)
        answers.append({u.client: u for u in dispatch(tasks, lambda update, task: None)})
    assert list(answers[0]) == [0, 1, 2] and "free under its" in here.troubles()[3]
    for client, update in answers[0].items():
        assert same(update.params, answers[1][client].params)
        moved = ENGINE.arithmetic == "sparse" and client > 0
        assert same(update.params, answers[2][client].params) != moved


def test_of_two_limits_the_smaller_counts_and_the_emulated_profile():
    emulated = Device(3, profile=PROFILE, memory_bytes=100)
    for said, counts in ((None, 100), (99, 99), (101, 100)):
        connected = Device(3, num_examples=7, memory_bytes=said)
        assert _standing_for(emulated, connected) == Device(3, 7, PROFILE, counts)
    assert _standing_for(Device(3), Device(3, 7, memory_bytes=5)) == Device(3, 7, None, 5)
    budgets = {"budget_bytes": 9, "budget_seconds": 2.0}
    assert _standing_for(Device(3, **budgets), Device(3, 7)) == Device(3, 7, **budgets)
