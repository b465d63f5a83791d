"""One step against bad clients: its result is that of the same step without them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from federation import (
    CLIENTS,
    ENGINE,
    SPEC,
    Around,
    client_data,
    first_model,
    fresh_dispatch,
    params,
    run,
    same,
    server,
)

from fedlean.algorithm import Device, FederatedAlgorithm
from fedlean.core import (
    ClientUpdate,
    Masks,
    Params,
    SubModel,
    Work,
)
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.methods.fedavg import fedavg
from fedlean.methods.heterofl import heterofl
from fedlean.methods.ntk_zo import ntk_zo
from fedlean.methods.prunefl import prunefl
from fedlean.runtime.checks import beyond_order
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.merged import GROWTH, fault, suspects
from fedlean.runtime.moves import BUFFERS, MODEL, Move, Moved
from fedlean.runtime.record import StepRecord
from fedlean.runtime.remote.room import TooLarge
from fedlean.runtime.rounds import REFUSED_STEPS, LoopState, RunFailed
from fedlean.runtime.step import ATTEMPTS, CHOICES
from fedlean.tree import apply_mask

ROGUE = 1
Change = Callable[[ClientUpdate], ClientUpdate]


def times(factor: float) -> Change:
    """Its values, so that it moves the model by (factor - 1) times its norm."""
    return lambda update: replace(
        update, params={name: value * np.float32(factor) for name, value in update.params.items()}
    )


def quick(rounds: int = 3, **settings: Any) -> FederatedAlgorithm:
    return fedavg(server(rounds), local_steps=2, batch_size=4, **settings)


def attacked(
    algorithm: FederatedAlgorithm, change: Change | None, rounds: int = 3, **rest: Any
) -> tuple[Any, list[StepRecord]]:
    """A run whose client ROGUE sends something else; None: nothing."""
    records: list[StepRecord] = []

    def spoil(tasks, updates):
        for update in updates:
            if update.client != ROGUE:
                yield update
            elif change is not None:
                yield change(update)

    state = run(
        algorithm,
        dispatch=Around(fresh_dispatch(algorithm), spoil),
        rounds=rounds,
        watch=lambda progress, record: records.append(record),
        **rest,
    )
    return state, records


def test_server_update_gets_the_task_beside_the_answer_and_nothing_frozen():
    """In cohort order, whoever answered first: what waited on disk as well."""
    algorithm, frozen = quick(1), frozenset({"conv.weight", "conv.bias"})
    seen: list[ClientUpdate] = []

    def configure(state, devices):
        tasks = algorithm.configure(state, devices)
        return [
            replace(task, sub_model=SubModel(frozen=frozen), hparams={**task.hparams, "own": i})
            for i, task in enumerate(tasks)
        ]

    def server_update(state, updates):
        held = list(updates)
        seen.extend(held)
        return algorithm.server_update(state, held)

    turned = Around(fresh_dispatch(algorithm), lambda tasks, updates: reversed(list(updates)))
    changed = algorithm._replace(configure=configure, server_update=server_update)
    run(changed, dispatch=turned, rounds=1)
    assert [update.client for update in seen] == list(range(CLIENTS))
    assert [update.task and update.task.hparams["own"] for update in seen] == list(range(CLIENTS))
    assert [update.task and update.task.client for update in seen] == list(range(CLIENTS))
    for update in seen:
        assert update.params.keys() == SPEC.tensor_shapes.keys() - frozen
        assert "task=" not in repr(update) and replace(update, task=None) == update


@pytest.mark.parametrize("factor", [1e3, 1e9, 1e17], ids=str)
def test_a_huge_move_is_refused_from_the_first_round_on(factor):
    expected, _ = attacked(quick(), None)
    state, records = attacked(quick(), times(factor))
    assert same(state, expected)
    assert [record.answered for record in records] == [[0, 2, 3]] * 3
    for record in records:
        assert "times the median of the clients" in record.rejected[ROGUE]
        assert record.attempts == 1


def test_without_a_bound_a_merge_that_explodes_is_taken_back():
    """The round is asked again without the client that moved the model most, and is as without."""
    expected, _ = attacked(quick(), None, max_update_norm=0)
    state, records = attacked(quick(), times(1e9), max_update_norm=0)
    assert same(state, expected)
    assert [record.attempts for record in records] == [2, 2, 2]
    first = records[0]
    assert first.answered == [0, 2, 3] and [task.client for task in first.tasks] == [1, 0, 2, 3]
    assert "is suspected, since the merged model grew" in first.rejected[ROGUE]
    assert list(first.refused) == [ROGUE]
    (note,) = first.notes
    assert note.startswith("lost, and asked again: the merged model grew from a norm of")
    assert note.endswith("suspected: client 1")


def test_a_rogue_that_is_drawn_alone_costs_the_draw():
    """With one client a round another is drawn in its place."""
    algorithm = quick(8, cohort=1)
    state, records = attacked(algorithm, times(float("nan")), rounds=8)
    assert state.round == 8 and [record.answered != [] for record in records] == [True] * 8
    drawn = [record for record in records if ROGUE in record.rejected]
    assert drawn and all(record.attempts == 2 for record in drawn)
    assert all(ROGUE not in record.answered for record in records)


def test_it_ends_when_everybody_is_refused_again_and_again():
    algorithm, steps = quick(), []

    def spoil(tasks, updates):
        return [times(float("nan"))(update) for update in updates]

    with pytest.raises(RunFailed, match="try a lower --lr"):
        run(
            algorithm,
            dispatch=Around(fresh_dispatch(algorithm), spoil),
            watch=lambda progress, record: steps.append(progress),
        )
    assert [progress.refused_steps for progress in steps] == [*range(1, REFUSED_STEPS + 1)]
    assert all(progress.state.round == 0 for progress in steps)


def test_refused_ones_beside_silent_ones_are_silence():
    """Who is away may be back: the run waits for them as long as for others."""
    algorithm, steps = quick(), []

    def spoil(tasks, updates):
        return [times(float("nan"))(update) for update in updates if update.client == ROGUE]

    with pytest.raises(RunFailed, match="in 10 steps"):
        run(
            algorithm,
            dispatch=Around(fresh_dispatch(algorithm), spoil),
            watch=lambda progress, record: steps.append((progress, record.attempts)),
        )
    assert all(progress.refused_steps == 0 for progress, _ in steps)
    assert [attempts for _, attempts in steps] == [ATTEMPTS] * 10


# Claims


def claiming(*works: Work, **metrics: float) -> Change:
    return lambda update: replace(update, work=works, metrics=metrics)


CLAIMS = {
    "steps": (claiming(Work(2**62, 4)), "work of 4611686018427387904 steps, the task takes at"),
    "one step more": (claiming(Work(3, 4)), "work of 3 steps, the task takes at most 2"),
    "in pieces": (claiming(Work(1, 4), Work(2, 4)), "work of 3 steps"),
    "batch": (claiming(Work(2, 5)), "work of 10 examples"),
    "a larger batch": (claiming(Work(1, 8)), "work of 8 examples a step"),
    "importance": (claiming(Work(2, 4, importance_steps=1)), "work of 1 importance steps"),
    "pieces": (
        claiming(Work(2, 4, importance_steps=1, piece_bytes=4, first_piece=0)),
        "g² of no pieces",
    ),
    "more importance": (claiming(Work(1, 4, importance_steps=2)), "g² of 2 steps, of 1 that it"),
    "forward": (claiming(Work(2, 4, forward_examples=1)), "work of 9 examples"),
    "momentum": (claiming(Work(2, 4, optimizer_floats=1)), "work of 1 optimiser values"),
    "kept": (claiming(Work(2, 4, kept={"fc1.weight": 10**9})), "work on 1000000000 weights of"),
    "no tensor": (claiming(Work(2, 4, kept={"fc9": 1})), "work on 'fc9', which the model lacks"),
    "a part": (claiming(Work(2, 4, end="conv")), "from the input to conv of the model, which the"),
    "a slice": (claiming(Work(2, 4, width=0.5)), "claims work on 0.5 of the channels, which the"),
    "beside": (claiming(Work(2, 4, beside=1)), "work of 1 stretches beside it, the task takes"),
    "held": (claiming(Work(2, 4, held_examples=1)), "work of 1 activations held, the task takes"),
    "floats": (claiming(Work(2, 4, held_floats=1)), "work of 1 floats held, the task takes"),
    "a loss of its own": (claiming(Work(2, 4, taps=("conv",))), "claims a loss at 'conv', which"),
    "less held than none": (claiming(Work(2, 4, held_examples=-1)), "less work than none"),
    "less than none": (claiming(Work(-1, 4)), "less work than none"),
    "many": (claiming(*[Work()] * 257), "257 stretches of work"),
    "metrics": (claiming(**{f"m{at}": 0.0 for at in range(65)}), "65 metrics, expected at most 64"),
    "a long name": (claiming(**{"m" * 65: 0.0}), "too long or not text"),
    "an escape": (claiming(**{"m\x1b[2J": 0.0}), "too long or not text"),
    "a metric": (claiming(loss=1e300), "which is not finite or beyond reason"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_beyond_the_order(name):
    change, reason = CLAIMS[name]
    expected, honest = attacked(quick(1), None, rounds=1)
    state, (record,) = attacked(quick(1), change, rounds=1)
    assert same(state, expected)
    assert reason in record.rejected[ROGUE]
    assert record.cost.flops <= honest[0].cost.flops * CLIENTS / (CLIENTS - 1)
    assert set(record.metrics) <= {"train_loss"}


def test_work_on_pruned_weights():
    """The task keeps some weights; a claim of all would be charged a dense step."""
    algorithm = prunefl(
        server(1), local_steps=2, batch_size=4, initial_pruning=False, reconfigure_every=0
    )
    first = algorithm.init(first_model())
    masks = {name: np.arange(m.size).reshape(m.shape) % 3 > 0 for name, m in first.masks.items()}
    state = replace(first, params=apply_mask(params(), masks), masks=masks)
    (task,) = algorithm.configure(state, [Device(0)])
    (honest,) = algorithm.work(task)
    assert beyond_order([honest], task, [honest]) is None
    assert beyond_order([replace(honest, steps=1)] * 2, task, [honest]) is None
    assert beyond_order([Work()], task, [honest]) is None
    for kept in ({}, {**honest.kept, "fc1.weight": honest.kept["fc1.weight"] + 1}):
        reason = beyond_order([replace(honest, kept=kept)], task, [honest]) or ""
        assert "work on all weights of" in reason


def test_each_part_is_held_against_the_order_for_it():
    """What is left of one part's order is no room for another's."""
    algorithm = quick(1)
    (task, *_) = algorithm.configure(algorithm.init(first_model()), [Device(0)])
    first = Work(0, 4, forward_examples=8, end="pool")
    rest = Work(2, 4, beside=1, held_examples=8, begin="pool", taps=("fc1", "fc2"))
    order = [first, rest]

    def reason(*work: Work) -> str:
        return beyond_order(work, task, order) or ""

    assert not reason(*order) and not reason(first)
    assert not reason(replace(rest, steps=1), replace(rest, steps=1, taps=("fc2",)))
    assert "9 examples from the input to pool of the model, the" in reason(
        replace(first, forward_examples=9), rest
    )
    assert "1 steps from the input to pool" in reason(replace(first, steps=1, forward_examples=4))
    assert "2 stretches beside it from pool to the output" in reason(first, replace(rest, beside=2))
    assert "from the input to the output of the model, which the task does not" in reason(
        Work(1, 4)
    )
    assert "from pool to fc1 of the model, which" in reason(replace(rest, end="fc1"))


def test_each_slice_is_held_against_the_order_for_it():
    """Steps on a narrow model are no room for as many on a wide one."""
    algorithm = quick(1)
    (task, *_) = algorithm.configure(algorithm.init(first_model()), [Device(0)])
    order = [Work(1, 4), Work(2, 4, width=0.5)]

    def reason(*work: Work) -> str:
        return beyond_order(work, task, order) or ""

    assert not reason(*order) and not reason(Work(1, 4)) and not reason(order[1])
    assert reason(Work(2, 4)) == "claims work of 2 steps, the task takes at most 1"
    assert reason(Work(3, 4, width=0.5)) == (
        "claims work of 3 steps on 0.5 of the channels, the task takes at most 2"
    )
    assert reason(Work(1, 4, width=0.25)) == (
        "claims work on 0.25 of the channels, which the task does not order"
    )
    masks = Work(1, 4, kept={"fc1.weight": 5}, width=0.5)
    assert reason(masks) == "claims masks on 0.5 of the channels"


def test_a_part_that_the_model_lacks():
    """Where a method does not say what a task takes, the model says which parts there are."""
    algorithm = quick(1)._replace(work=None)
    for work, why in (
        (Work(1, 4, begin="nothing"), "a span of the model that it lacks: .*no layer 'nothing'"),
        (Work(1, 4, begin="fc1", end="conv"), "'conv' does not need 'fc1'"),
        (Work(1, 4, width=2.0), "on a slice that the model lacks: the rate of a width must be in"),
        (Work(1, 4, taps=("nothing",)), "a loss at 'nothing', which the task does not order"),
        (Work(1, 4, held_examples=10**13), "10000000000000 activations held, expected at most"),
    ):
        _, (record,) = attacked(algorithm, claiming(work), rounds=1)
        assert re.search(why, record.rejected[ROGUE])
    _, (record,) = attacked(algorithm, claiming(Work(1, 4, begin="fc1")), rounds=1)
    assert not record.rejected


def test_as_much_work_as_ordered_is_taken_and_less_too():
    for work in (Work(2, 4), Work(1, 4), Work(1, 2), Work()):
        _, (record,) = attacked(quick(1), claiming(work), rounds=1)
        assert not record.rejected


def test_a_method_that_does_not_say_what_a_task_takes():
    algorithm = quick(1)._replace(work=None)
    _, (record,) = attacked(algorithm, claiming(Work(10**6, 1000)), rounds=1)
    assert not record.rejected
    _, (record,) = attacked(algorithm, claiming(Work(10**6, 10**9)), rounds=1)
    assert "expected at most 1000000000000" in record.rejected[ROGUE]


def test_more_examples_than_it_said_when_it_joined():
    algorithm = quick(1)
    inner = fresh_dispatch(algorithm)
    dispatch = Around(inner, lambda tasks, updates: updates)
    dispatch.begin = lambda store, step: [
        replace(device, num_examples=held)
        for device, held in zip(inner.begin(store, step), (25, 34, 50, None), strict=True)
    ]
    records: list[StepRecord] = []
    run(algorithm, dispatch=dispatch, rounds=1, watch=lambda _, record: records.append(record))
    assert records[0].rejected == {1: "claims 35 examples, it had 34 when it joined"}
    assert records[0].answered == [0, 2, 3]


# What a merge may not give


@dataclass(frozen=True)
class State:
    round: int = 0
    phase: str = "train"
    params: Params = field(default_factory=params)
    masks: Masks = field(default_factory=dict)
    sums: Any = ()
    extra: Params = field(default_factory=dict)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_any_array_of_the_state_that_is_not_finite(value):
    bad = np.array([1.0, value])
    before, whole = State(), {"a": np.ones(2), "b": np.arange(3)}
    assert fault(before, replace(before, sums=(whole, {"c": np.ones(1)}))) is None
    for sums, name in (
        (bad, "sums"),
        ({**whole, "c": bad}, "sums.c"),
        ((whole, ({"x": bad},)), "sums[1][0].x"),
        ({"slope": float(value)}, "sums.slope"),
    ):
        reason = fault(before, replace(before, sums=sums))
        assert reason == f"{name} of the merged state is not finite"


def test_a_model_that_grows_beyond_reason():
    norm = sum(float(np.sum(np.square(value))) for value in params().values()) ** 0.5
    most = GROWTH * (norm + 1) / norm
    for factor, grown in ((most * 0.9, False), (most * 1.01, True), (1e30, True)):
        after = replace(State(), params={n: v * np.float32(factor) for n, v in params().items()})
        assert bool(fault(State(), after)) == grown
        module = {"surrogate.weight": np.array([norm * factor * 1.01], np.float32)}
        before = replace(State(), extra={"surrogate.weight": np.zeros(1, np.float32)})
        assert bool(fault(before, replace(before, extra=module))) == grown, "of a stage alone"


def test_running_statistics_that_grow_beyond_reason():
    """They are on another scale than the model, in which they would not be seen, or hide it."""
    for name in ("bn.running_mean", "bn.running_var"):
        before = State(params={**params(), name: np.ones(4, np.float32)})
        for value, grown in ((1e4, False), (2e4, True), (1e18, True)):
            after = replace(before, params={**params(), name: np.full(4, value, np.float32)})
            reason = fault(before, after) or ""
            assert reason.startswith("the merged running statistics grew from a norm of 2") == grown


def test_suspects_stand_out_or_are_everybody():
    def of(*far: float, statistic: float = 0.0, asked: float = 1.0) -> dict[int, Moved]:
        return {
            client: {MODEL: Move(one, asked), BUFFERS: Move(0), "c": Move(statistic)}
            for client, one in enumerate(far)
        }

    assert suspects(of(1, 1e9, 1, 50)) == [1]  # more than a hundred times what a model of 1 may
    assert suspects(of(1e9, 2e9, 1)) == [0, 1]  # however many
    assert suspects(of(1, 99, 1, 51)) == [1, 3]  # none is, and two stand out
    assert suspects(of(1, 1.5, 1)) == [0, 1, 2]  # nobody stands out
    slopes = of(0, 0, 0, statistic=1)
    slopes[2] = {**slopes[2], "c": Move(1e9)}
    assert suspects(slopes) == [2]
    moving = of(
        1, 1.2, 0.8, statistic=1
    )  # as the others do, with a statistic that they do not send
    moving[2] = {**moving[2], "c": Move(1e9)}
    assert suspects(moving) == [2]


def scaled_statistics(factor: float) -> Change:
    return lambda update: replace(
        update,
        statistics={
            key: replace(one, tensors={n: v * np.float32(factor) for n, v in one.tensors.items()})
            for key, one in update.statistics.items()
        },
    )


@pytest.mark.parametrize("factor", [1e4, 1e8], ids=str)
def test_statistics_that_would_undo_the_model(factor):
    """ntk_zo's clients send slopes and no values; the model is made of them by the server."""
    algorithm = ntk_zo(server(2), density=1.0, directions=4, lr=0.1)
    expected, _ = attacked(algorithm, None, rounds=2)
    state, records = attacked(algorithm, scaled_statistics(factor), rounds=2)
    assert same(state, expected)
    trained = [record for record in records if record.tasks]
    assert len(trained) == 2
    for record in trained:
        assert "sent the statistic c of norm" in record.rejected[ROGUE]


def test_statistics_without_a_bound_are_taken_back_with_the_merge():
    algorithm = ntk_zo(server(2), density=1.0, directions=4, lr=0.1, optimizer="momentum")
    expected, _ = attacked(algorithm, None, rounds=2)
    rogue = scaled_statistics(1e8)
    state, records = attacked(algorithm, rogue, rounds=2, max_update_norm=0)
    assert same(state, expected)
    assert all(record.attempts == 2 for record in records if record.tasks)


def test_a_server_step_that_gives_no_model_ends_the_run():
    algorithm = quick(1)

    def server_update(state, updates):
        return replace(state, params={n: v * np.float32(np.inf) for n, v in state.params.items()})

    broken = algorithm._replace(configure=lambda state, devices: [], server_update=server_update)
    seen: list[LoopState] = []
    with pytest.raises(RunFailed, match=r"own went wrong: params.*is not finite"):
        run(broken, dispatch=fresh_dispatch(broken), watch=lambda p, record: seen.append(p))
    assert all(np.isfinite(value).all() for value in seen[0].state.params.values())


# Devices with too little memory


def test_one_able_device_of_a_large_fleet_is_found_at_once():
    """Cohorts of one, of 1200 devices: whoever could hold the task comes next."""
    able, clients, draws = 777, 1200, list[int]()

    def present(step: int) -> list[Device]:
        draws.append(step)
        return [Device(c, memory_bytes=10**9 if c == able else 100) for c in range(clients)]

    algorithm = quick(2, cohort=1)
    data = client_data()[:1] * clients
    records: list[StepRecord] = []
    began = time.perf_counter()
    run(
        algorithm,
        dispatch=LocalDispatch(algorithm.client_update, ENGINE, data, present),
        rounds=2,
        watch=lambda _, record: records.append(record),
    )
    assert time.perf_counter() - began < 2
    assert [record.answered for record in records] == [[able]] * 2
    assert len(draws) <= 4 and all(len(record.left_out) <= 1 for record in records)


def test_where_nobody_is_able_it_stops_looking():
    clients = 1200
    fleet = [Device(client, memory_bytes=100) for client in range(clients)]
    algorithm = quick(1, cohort=1)
    records: list[StepRecord] = []
    data = client_data()[:1] * clients
    with pytest.raises(RunFailed, match="no task fits its device"):
        run(
            algorithm,
            dispatch=LocalDispatch(algorithm.client_update, ENGINE, data, lambda step: fleet),
            rounds=1,
            watch=lambda _, record: records.append(record),
        )
    for record in records:
        assert len(record.left_out) == CHOICES and not record.tasks
        assert record.notes[0].endswith(f"; {clients - CHOICES} others were not chosen")
        assert (record.present, record.able) == (clients, 0)


def test_where_nobody_could_hold_what_others_were_asked_for_smaller_tasks_are_found():
    """A method that chooses by client: the small tasks are for devices that have less."""
    algorithm = heterofl(
        server(1), local_steps=2, batch_size=4, cohort=1, assign="fixed", widths="1 0.25"
    )
    for first in range(8):  # cohorts are drawn from what is there: large tasks come first in some
        fleet = [Device(client, memory_bytes=0) for client in range(CLIENTS)]
        fleet[ROGUE] = Device(ROGUE, memory_bytes=small_bytes(algorithm))
        shown = fleet[first % CLIENTS :] + fleet[: first % CLIENTS]
        records: list[StepRecord] = []
        run(
            algorithm,
            dispatch=LocalDispatch(
                algorithm.client_update, ENGINE, client_data(), lambda step, shown=shown: shown
            ),
            rounds=1,
            watch=lambda _, record, records=records: records.append(record),
        )
        assert records[0].answered == [ROGUE]


def small_bytes(algorithm: FederatedAlgorithm) -> int:
    """What the task of ROGUE takes."""
    (task,) = algorithm.configure(algorithm.init(first_model()), [Device(ROGUE)])
    assert algorithm.work is not None
    return cost(task, algorithm.work(task), load_profile("generic")).peak_memory_bytes


def test_a_device_in_this_process_that_refuses_gets_less_from_then_on():
    """The engine needs more than the method said: the next attempt orders a smaller width."""
    algorithm = heterofl(server(1), local_steps=2, batch_size=4, widths="1 0.25")
    refusals: list[float] = []

    def client_update(task, batches, engine, state):
        if task.hparams["width"] == "1.0":
            refusals.append(task.client)
            raise TooLarge("a training step needs more")
        return algorithm.client_update(task, batches, engine, state)

    fleet = [Device(client, memory_bytes=10**9) for client in range(CLIENTS)]
    records: list[StepRecord] = []
    run(
        algorithm,
        dispatch=LocalDispatch(client_update, ENGINE, client_data(), lambda step: fleet),
        rounds=1,
        watch=lambda _, record: records.append(record),
    )
    (record,) = records
    assert refusals == record.answered == list(range(CLIENTS)) and record.attempts == 2
