"""PruneFL: its phases, what it sends, and eq. (2) by hand.

Equations (3)-(7) and Algorithms 2 and 3 are tested in tests/pruning.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import (
    ENGINE,
    ROUNDS,
    SPEC,
    client_data,
    devices,
    first_model,
    fresh_dispatch,
    params,
    run,
    same,
    server,
)

from fedlean import wire
from fedlean.algorithm import Device
from fedlean.core import ClientUpdate, Statistic, SubModel
from fedlean.cost.way import work_memory_bytes
from fedlean.engine.pieces import sweep
from fedlean.engine.protocol import SGD
from fedlean.methods.prunefl import client_update, prunefl
from fedlean.pruning.density import density, full_masks
from fedlean.pruning.initial_model import InitialModel
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.local import LocalDispatch
from fedlean.runtime.rounds import RunFailed
from fedlean.train.sgd import local_sgd
from fedlean.tree import num_kept, pack

SMALL = {
    "lr": 0.05,
    "local_steps": 2,
    "batch_size": 8,
    "initial_examples": 24,
    "initial_batches": 3,
    "initial_max_passes": 12,
    "reconfigure_every": 2,
    "importance_rounds": 0,
}
CASE = Case(
    method=prunefl,
    settings=SMALL,
    knob={"prunable_fraction": 0.6},
    neutral={
        "lr": 0.05,
        "local_steps": 2,
        "batch_size": 8,
        "initial_pruning": False,
        "reconfigure_every": 0,
    },
    fedavg={"lr": 0.05, "local_steps": 2, "batch_size": 8},
)

FORESEEN = {
    "lr": 0.05,
    "local_steps": 2,
    "batch_size": 8,
    "initial_density": 0.3,
    "reconfigure_every": 2,
}
IN_PIECES = {**SMALL, "importance_budget_bytes": 1000}  # 4 parts in 2 rounds of 2 steps
MORE_CASES = {
    "pieces": Case(
        method=prunefl,
        settings=IN_PIECES,
        knob={"importance_budget_bytes": 2000},
        neutral="that of the case without pieces: where g² decides nothing, pieces do not either",
    ),
    **{
        initial: Case(
            method=prunefl,
            settings={**FORESEEN, "initial": initial},
            knob={"initial_density": 0.5},
            neutral={
                "lr": 0.05,
                "local_steps": 2,
                "batch_size": 8,
                "initial": initial,
                "initial_density": 1.0,
                "reconfigure_every": 0,
            },
            fedavg={"lr": 0.05, "local_steps": 2, "batch_size": 8},
        )
        for initial in ("snip", "synflow", "ntk")
    },
}


def all_kept():
    """Masks to write to."""
    return {name: mask.copy() for name, mask in full_masks(SPEC).items()}


def train_state(algorithm, masks=None):
    """A state in the middle of further pruning."""
    masks = masks or full_masks(SPEC)
    held = {
        k: np.where(masks[k], v, np.float32(0)) if k in masks else v for k, v in params().items()
    }
    return replace(algorithm.init(first_model()), phase="train", params=held, masks=masks)


def test_equation_2_by_hand():
    """w(k+1) = w - η·g ⊙ m on one step: the engine's dense gradient, masked by hand."""
    masks = all_kept()
    masks["fc1.weight"][:, ::3] = False
    algorithm = prunefl(server(), lr=0.5, local_steps=1, batch_size=4, reconfigure_every=0)
    state = train_state(algorithm, masks)
    task = algorithm.configure(state, devices())[1]
    update, _ = client_update(task, client_data()[1], ENGINE, {})
    w = state.params
    session = ENGINE.open(SPEC, w, SubModel(), batch_size=4, optimizer=SGD(1.0))
    ((x, y),) = client_data()[1].draw(steps=1, batch_size=4, seed=task.seed)
    session.step(x, y)
    gradient = {name: w[name] - value for name, value in session.params().items()}
    moved = {name: w[name] - 0.5 * gradient[name] for name in w}
    assert same(pack(w, masks), dict(task.params))
    for name, value in pack(moved, masks).items():
        assert np.allclose(update.params[name], value, atol=1e-6)


def test_importance_is_g_squared_of_all_coordinates_summed_over_steps():
    """lr -> 0 leaves w in place, so Σ g² over 3 steps is that of 3 separate gradients."""
    masks = all_kept()
    masks["fc1.weight"][:, ::2] = False
    algorithm = prunefl(
        server(),
        lr=1e-12,
        local_steps=3,
        batch_size=4,
        reconfigure_every=1,
        importance_dtype="fp32",
    )
    state = train_state(algorithm, masks)
    task = algorithm.configure(state, devices())[0]
    update, held = client_update(task, client_data()[0], ENGINE, {})
    assert held == {}
    expected = {name: np.zeros(shape) for name, shape in SPEC.param_shapes.items()}
    for x, y in client_data()[0].draw(steps=3, batch_size=4, seed=task.seed):
        session = ENGINE.open(
            SPEC, task.params, SubModel(masks=masks), batch_size=4, optimizer=SGD(1.0)
        )
        logits = session.forward(x, training=True)["fc2"].astype(np.float64)
        soft = np.exp(logits - logits.max(1, keepdims=True))
        soft /= soft.sum(1, keepdims=True)
        soft[np.arange(4), y] -= 1  # d CE / d logits
        out = {"fc2": (soft / 4).astype(np.float32)}
        for name, g in session.backward(out, dense=True).items():
            expected[name] += g.astype(np.float64) ** 2
    sent = update.statistics["importance"].tensors
    assert set(sent) == set(SPEC.param_shapes)
    assert sent["fc1.weight"][:, ::2].any(), "pruned coordinates have importance too"
    for name, value in expected.items():
        assert np.allclose(sent[name], value, rtol=1e-4, atol=1e-9)


def test_importance_goes_up_in_two_bytes_a_coordinate():
    sizes, sent = [], []
    for dtype in ("fp32", "bf16"):
        algorithm = prunefl(server(), lr=0.05, reconfigure_every=1, importance_dtype=dtype)
        task = algorithm.configure(train_state(algorithm), devices())[0]
        update, _ = client_update(task, client_data()[0], ENGINE, {})
        sizes.append(wire.update_bytes(update, task))
        sent.append(update.statistics["importance"].tensors)
    carried = sum(int(np.count_nonzero(values)) for values in sent[0].values())
    assert abs(sizes[0] - sizes[1] - 2 * carried) < 100, "0 is left out; the table differs"
    for name, exact in sent[0].items():
        assert np.allclose(sent[1][name], exact, rtol=2**-8, atol=0)


def test_the_largest_importance_of_each_layer_goes_up():
    """1.5 times the weights that the layer keeps; tensors without a mask as a whole."""
    masks = all_kept()
    masks["fc1.weight"][:] = False
    masks["fc1.weight"].flat[:40] = True
    everything, some = (
        prunefl(server(), lr=0.05, reconfigure_every=1, importance_multiple=multiple)
        for multiple in (0.0, 1.5)
    )
    sent = []
    for algorithm in (everything, some):
        task = algorithm.configure(train_state(algorithm, masks), devices())[0]
        update, _ = client_update(task, client_data()[0], ENGINE, {})
        sent.append(update.statistics["importance"].tensors)
    for name in SPEC.param_shapes.keys() - {"fc1.weight"}:
        assert np.array_equal(sent[1][name], sent[0][name]), name
    every, best = (tensors["fc1.weight"].ravel() for tensors in sent)
    chosen = best > 0
    assert np.count_nonzero(chosen) == 60
    assert np.array_equal(best[chosen], every[chosen]) and not best[~chosen].any()
    assert every[chosen].min() >= every[~chosen].max()


def test_server_weighs_importance_by_examples():
    """Σ p_n g_n² with p = (1/4, 3/4) decides: (4, 0) and (0, 2) give (1, 1.5), so the second wins.

    One weight may stay (limit), all others have importance 0.
    """
    algorithm = prunefl(
        server(),
        reconfigure_every=1,
        size_limit=1.2 / 840,  # 840 prunable weights: one may be kept
        prunable_fraction=1.0,
        initial_pruning=False,
    )
    state = algorithm.init(first_model())
    state = replace(state, masks={k: np.zeros_like(v) for k, v in state.masks.items()})
    state = replace(state, params={k: np.zeros_like(v) for k, v in params().items()})

    def answer(client, examples, at, value):
        g2 = {name: np.zeros(shape, np.float32) for name, shape in SPEC.param_shapes.items()}
        g2["fc1.weight"][0, at] = value
        return ClientUpdate(
            client,
            examples,
            dict(state.params),
            SubModel(masks=state.masks),
            {"importance": Statistic(g2, "mean")},
        )

    after = algorithm.server_update(state, [answer(0, 25, 0, 4.0), answer(1, 75, 1, 2.0)])
    assert SPEC.prunable == ("conv.weight", "fc1.weight", "fc2.weight")
    assert sum(int(mask.sum()) for mask in after.masks.values()) == 1
    assert after.masks["fc1.weight"][0, 1]


def test_full_gradients_travel_at_reconfigurations_only():
    algorithm = prunefl(server(), **{**SMALL, "importance_rounds": 1})
    uploads, importance = [], []

    def watch(progress, record):
        task = record.tasks[0]
        if task.phase == "train":
            uploads.append(task.hparams["upload_importance"])
            importance.append(task.hparams["importance"])

    run(algorithm, watch=watch)
    assert uploads == [False, True, False, True, False, False]  # none after the last round
    assert importance == uploads


def test_importance_rounds_counts_back_from_the_reconfiguration():
    algorithm = prunefl(server(9), **{**SMALL, "reconfigure_every": 4, "importance_rounds": 2})
    state = train_state(algorithm)
    flags = []
    for round in range(9):
        task = algorithm.configure(replace(state, round=round), devices())[0]
        flags.append(task.hparams["importance"])
    # reconfigurations after rounds 4 and 8
    assert flags == [False, False, True, True, False, False, True, True, False]


def test_importance_of_several_rounds_is_summed_and_stale_sums_are_dropped():
    algorithm = prunefl(server(), **{**SMALL, "lr": 1e-12, "importance_dtype": "fp32"})
    state = train_state(algorithm)
    first = algorithm.configure(state, devices())[0]
    update, held = client_update(first, client_data()[0], ENGINE, {})
    assert "importance" not in update.statistics and held
    second = algorithm.configure(replace(state, round=1), devices())[0]
    both, after = client_update(second, client_data()[0], ENGINE, held)
    alone, _ = client_update(second, client_data()[0], ENGINE, {})
    assert after == {}
    for name, total in both.statistics["importance"].tensors.items():
        expected = alone.statistics["importance"].tensors[name] + held[f"importance/{name}"]
        assert np.array_equal(total, expected)
    stale = {**held, "reconfigurations": np.array(7)}
    fresh, _ = client_update(second, client_data()[0], ENGINE, stale)
    assert same(fresh, alone)


# Importance in pieces


def pieces_algorithm(**extra):
    settings = {"reconfigure_every": 2, "importance_budget_bytes": 1000, "local_steps": 2}
    return prunefl(server(), **{**settings, "lr": 1e-12, "batch_size": 8, **extra})


def taken(algorithm, state, client=0):
    """(statistics, work) of one client's round."""
    task = next(t for t in algorithm.configure(state, devices()) if t.client == client)
    update, held = client_update(task, client_data()[client], ENGINE, {})
    assert held == {}, "nothing is kept between rounds"
    assert update.work == algorithm.work(task)
    return update, task


def test_each_round_takes_its_parts_of_a_sweep():
    """4 parts at one a step: two rounds of two; with 3 steps, one of three and one that is left."""
    assert len(sweep(SPEC, 1000)) == 4
    for steps, expected in ((2, [0, 2]), (3, [0, 3])):
        algorithm = pieces_algorithm(local_steps=steps)
        state = train_state(algorithm)
        firsts, names = [], []
        for round in (0, 1):
            update, task = taken(algorithm, replace(state, round=round))
            (work,) = update.work
            assert (work.piece_bytes, work.importance_steps) == (1000, steps)
            firsts.append(work.first_piece)
            (statistic,) = update.statistics.values()
            assert set(update.statistics) == set(algorithm.statistics(task))
            names += statistic.tensors
        assert firsts == expected
        assert names == [f"{p.tensor}/{p.first_row}" for part in sweep(SPEC, 1000) for p in part]


def test_a_part_is_scaled_from_its_steps_to_those_of_its_round():
    """One part left for 3 steps: its sum as it is; three parts: three times one step's."""
    masks = all_kept()
    masks["fc1.weight"][:, ::2] = False
    algorithm = pieces_algorithm(local_steps=3, importance_multiple=0.0, importance_dtype="fp32")
    state = train_state(algorithm, masks)
    for round, per_part in ((0, 1), (1, 3)):
        update, task = taken(algorithm, replace(state, round=round))
        (statistic,) = update.statistics.values()
        assert not statistic.masks, "all of it"
        drawn = list(client_data()[0].draw(steps=3, batch_size=8, seed=task.seed))
        first = int(task.hparams["first_piece"])
        for i, pieces in enumerate(sweep(SPEC, 1000)[first : first + 3]):
            session = ENGINE.open(
                SPEC, task.params, task.sub_model, batch_size=8, optimizer=SGD(1e-12)
            )
            for x, y in drawn[i * per_part : (i + 1) * per_part]:
                session.step(x, y, importance=True)
            sums = session.importance()
            for name, at, rows in pieces:
                expected = sums[name][at : at + rows] * (3 / per_part)
                assert np.allclose(statistic.tensors[f"{name}/{at}"], expected, rtol=1e-5)


def test_of_each_part_the_largest_go_up_and_no_more_is_held():
    masks = all_kept()
    masks["fc1.weight"][:] = False
    masks["fc1.weight"][:4, :10] = True
    state = train_state(pieces_algorithm(), masks)
    every, some = (
        taken(pieces_algorithm(importance_multiple=multiple), state)[0] for multiple in (0.0, 1.5)
    )
    (whole,), (sent,) = every.statistics.values(), some.statistics.values()
    for name, values in whole.tensors.items():
        if not name.startswith("fc1.weight"):
            continue
        chosen, packed = sent.masks[name], sent.tensors[name]
        kept = int(masks["fc1.weight"][int(name.split("/")[1]) :][: len(values)].sum())
        count = int(np.ceil(1.5 * max(kept, 40 * len(values) / 12)))
        assert packed.shape == (count,) and chosen.sum() == count
        assert np.array_equal(packed, values[chosen])
        assert packed.min() >= values[~chosen].max()
        assert packed.nbytes + chosen.nbytes < values.nbytes


def test_packed_and_dense_sums_merge_alike():
    """What a client packs arrives dense over the wire: the same state either way."""
    algorithm, data = pieces_algorithm(), client_data()
    state = train_state(algorithm)
    state = replace(
        state,
        masks={
            n: m & (np.arange(m.size).reshape(m.shape) % 3 == 0) for n, m in state.masks.items()
        },
    )
    state = replace(
        state,
        params={
            n: np.where(state.masks[n], v, np.float32(0)) if n in state.masks else v
            for n, v in state.params.items()
        },
    )
    tasks = algorithm.configure(state, devices())
    sent = [client_update(task, data[task.client], ENGINE, {})[0] for task in tasks]
    arrived = [
        wire.decode_update(wire.encode_update(update, task), task)
        for update, task in zip(sent, tasks, strict=True)
    ]
    assert any(one.masks for one in sent[0].statistics.values())
    assert not any(one.masks for one in arrived[0].statistics.values())
    first, second = algorithm.server_update(state, sent), algorithm.server_update(state, arrived)
    assert first.importance and same(first, second)


def test_a_budget_for_everything_decides_as_without_one():
    """One part, in the last round, all steps: the same masks and weights bit for bit."""
    settings = {**SMALL, "importance_rounds": 1}
    plain = run(prunefl(server(), **settings))
    pieces = run(prunefl(server(), **settings, importance_budget_bytes=10**6))
    assert plain.reconfigurations == pieces.reconfigurations == 2
    assert same(plain.masks, pieces.masks) and same(plain.params, pieces.params)


def test_two_sweeps_are_summed_and_the_sums_restart():
    algorithm = prunefl(
        server(8), **{**IN_PIECES, "initial_pruning": False, "reconfigure_every": 4}
    )
    seen = []

    def watch(progress, record):
        first = record.tasks[0].hparams.get("first_piece")
        seen.append((first, len(progress.state.importance), progress.state.reconfigurations))

    run(algorithm, watch=watch, rounds=8)
    parts = sweep(SPEC, 1000)
    half, whole = sum(map(len, parts[:2])), sum(map(len, parts))
    assert [one[0] for one in seen] == [0, 2, 0, 2, None, None, None, None]
    assert [one[1] for one in seen] == [half, whole, whole, 0, 0, 0, 0, 0]
    assert seen[3][2] == 1


def test_a_part_that_nobody_answered_to_means_no_reconfiguration():
    algorithm, data = pieces_algorithm(), client_data()
    state = algorithm.server_update(train_state(algorithm), [])
    tasks = algorithm.configure(state, devices())
    updates = [client_update(task, data[task.client], ENGINE, {})[0] for task in tasks]
    after = algorithm.server_update(state, updates)
    assert (after.round, after.reconfigurations, after.importance) == (2, 0, {})
    assert same(after.masks, state.masks)


def test_a_round_in_pieces_takes_less_memory_than_one_without():
    masks = {
        name: mask & (np.arange(mask.size).reshape(mask.shape) % 10 == 0)
        for name, mask in full_masks(SPEC).items()
    }
    peaks = []
    for budget in (1000, 0):
        algorithm = pieces_algorithm(importance_budget_bytes=budget, reconfigure_every=2)
        task = algorithm.configure(replace(train_state(algorithm, masks), round=1), devices())[0]
        (work,) = algorithm.work(task)
        peaks.append(work_memory_bytes(SPEC, work))
    assert peaks[0] + 2000 < peaks[1]


def test_a_sweep_that_does_not_fit_between_two_reconfigurations_is_refused():
    with pytest.raises(ValueError, match=r"importance_budget_bytes.*14 parts.*7 rounds of 2.*is 6"):
        prunefl(server(), local_steps=2, reconfigure_every=6, importance_budget_bytes=256)
    with pytest.raises(ValueError, match=r"importance_budget_bytes.*255.*fc1.weight"):
        prunefl(server(), importance_budget_bytes=255)


# The initial client


def test_the_initial_client_is_the_first_that_has_the_memory():
    algorithm = prunefl(server(), **SMALL)
    state = algorithm.init(first_model())
    (task,) = algorithm.configure(state, devices())
    assert task.client == 0, "nothing is known of any"
    needed = max(work_memory_bytes(SPEC, work) for work in algorithm.work(task))
    fleet = [Device(3), Device(0, memory_bytes=needed - 1), Device(2, memory_bytes=needed)]
    assert algorithm.configure(state, fleet)[0].client == 2
    assert algorithm.configure(state, fleet[:2])[0].client == 3
    small = [Device(4, memory_bytes=10), Device(0, memory_bytes=20), Device(1, memory_bytes=20)]
    assert algorithm.configure(state, small)[0].client == 0, "none has it: the largest"
    by_hand = prunefl(server(), **SMALL, initial_client=0)
    assert by_hand.configure(state, fleet)[0].client == 0


def test_the_client_that_holds_the_model_goes_on():
    """Though another would be the first now; where it has lost the model, it is asked again."""
    algorithm = prunefl(server(), **SMALL)
    state = algorithm.init(first_model())
    state = algorithm.server_update(state, [ClientUpdate(2, 5, {}, SubModel())])
    (task,) = algorithm.configure(state, devices())
    assert task.client == 2 and not task.params
    lost = ClientUpdate(2, 5, {}, SubModel(), metrics={"lost_state": 1.0})
    (task,) = algorithm.configure(algorithm.server_update(state, [lost]), devices())
    assert task.client == 2 and task.params


def fleet_run(algorithm, present):
    """On devices `present(step)`: the state and the records of the steps."""
    records = []
    dispatch = LocalDispatch(algorithm.client_update, ENGINE, client_data(), present)
    state = run(algorithm, dispatch=dispatch, watch=lambda _, record: records.append(record))
    return state, records


def test_a_run_waits_for_a_device_with_the_memory():
    def present(step):
        return [Device(0, memory_bytes=1000), *([Device(1)] if step >= 3 else [])]

    state, records = fleet_run(prunefl(server(), **SMALL), present)
    assert (state.round, state.phase) == (ROUNDS, "train")
    for record in records[:2]:
        assert record.left_out[0].endswith("has 0.001 MB") and not record.tasks
        assert any("no task fits its device" in note for note in record.notes)
    assert records[2].answered == [1]


def test_another_client_takes_over_from_one_that_is_away():
    """It starts from the first model; the first client's half-pruned one is gone with it."""
    algorithm = prunefl(server(), **SMALL)
    state, records = fleet_run(
        algorithm, lambda step: [Device(client) for client in ((0, 1, 2) if step < 3 else (2, 3))]
    )
    tasks = [record.tasks[0] for record in records if record.tasks[0].phase == "initial"]
    assert [task.client for task in tasks[:4]] == [0, 0, 2, 2]
    assert [bool(task.params) for task in tasks[:4]] == [True, False, True, False]
    assert (state.round, state.initial_client, state.initial_moved) == (ROUNDS, 2, 1)
    assert density(state.masks) < 1


def test_after_three_moves_the_client_that_holds_the_model_is_waited_for():
    algorithm = prunefl(server(), **SMALL)
    state = algorithm.init(first_model())
    for client in (0, 1, 2, 3):
        (task,) = algorithm.configure(state, [Device(client)])
        assert task.client == client and task.params
        state = algorithm.server_update(state, [ClientUpdate(client, 5, {}, SubModel())])
        state = algorithm.server_update(state, [ClientUpdate(client, 5, {}, SubModel())])
    assert state.initial_moved == 3
    (task,) = algorithm.configure(state, [Device(0)])
    assert task.client == 3 and not task.params


def test_a_named_initial_client_is_waited_for_and_the_run_says_so():
    algorithm = prunefl(server(), **SMALL, initial_client=0)
    with pytest.raises(RunFailed, match=r"asked in 10 steps.*client 0: is away"):
        fleet_run(algorithm, lambda step: [Device(0 if step < 3 else 1)])


def test_initial_pruning_shrinks_and_the_model_stays_at_its_client():
    """One client works; no parameters travel between its tasks, the pruned model at the end."""
    algorithm = prunefl(server(), **SMALL)
    seen = []

    def watch(progress, record):
        if record.tasks[0].phase == "initial":
            seen.append((record.tasks[0], progress.state, record.metrics))

    final = run(algorithm, watch=watch)
    assert {task.client for task, _, _ in seen} == {0}
    assert seen[0][0].params and not any(task.params for task, _, _ in seen[1:])
    densities = [metrics["density"] for _, _, metrics in seen]
    assert densities[-1] < densities[0] <= 1
    assert seen[-1][1].phase == "train" and seen[-1][1].round == 0
    assert density(final.masks) < 1


@pytest.mark.parametrize(("last", "expected"), [(1, "001"), (2, "011"), (5, "111"), (0, "111")])
def test_initial_importance_passes_count_back_from_a_reconfiguration(monkeypatch, last, expected):
    """By the flag of each pass between two of them, and by what is charged for it."""
    taken = []

    def spy(*args, importance, **kwargs):
        taken.append(str(int(importance)))
        return local_sgd(*args, importance=importance, **kwargs)

    monkeypatch.setattr("fedlean.pruning.initial_pruning.local_sgd", spy)
    settings = {**SMALL, "initial_passes": 3, "initial_importance_passes": last}
    algorithm = prunefl(server(), **settings)
    (first,) = algorithm.configure(algorithm.init(first_model()), devices())
    update, _ = client_update(first, client_data()[0], ENGINE, {})
    before, between = "".join(taken[:-3]), "".join(taken[-3:])
    assert "1" not in before and between == expected
    assert update.metrics["reconfigurations"] == 1
    steps = update.work[0]
    assert steps.importance_steps == expected.count("1") * SMALL["initial_batches"]
    assert steps.steps == len(taken) * SMALL["initial_batches"]


def test_further_pruning_can_grow_back():
    """A weight pruned at one reconfiguration and important at the next comes back, perturbed."""
    masks = all_kept()
    masks["fc1.weight"][3, 5] = False
    algorithm = prunefl(server(), lr=0.05, reconfigure_every=1, local_steps=2, batch_size=8)
    state = train_state(algorithm, masks)
    g2 = {name: np.full(shape, 1e-3, np.float32) for name, shape in SPEC.param_shapes.items()}
    g2["fc1.weight"][3, 5] = 10.0
    update = ClientUpdate(
        0, 5, dict(state.params), SubModel(masks=masks), {"importance": Statistic(g2, "mean")}
    )
    after = algorithm.server_update(state, [update])
    assert after.masks["fc1.weight"][3, 5]
    assert after.params["fc1.weight"][3, 5] != 0
    assert after.params["fc1.weight"][3, 5] != params()["fc1.weight"][3, 5], "no stale value"


def test_initial_pruning_can_grow_back():
    """A unit of fc1 that has lost all its inputs: some of them come back, perturbed."""
    algorithm = prunefl(server(), **{**SMALL, "prunable_fraction": 0.0})
    (task,) = algorithm.configure(algorithm.init(first_model()), devices())
    masks = all_kept()
    masks["fc1.weight"][3] = False
    held = InitialModel(train_state(algorithm, masks).params, masks, {}, started=True)
    update, after = client_update(
        replace(task, params={}), client_data()[0], ENGINE, held.to_state()
    )
    assert update.metrics["reconfigurations"] == 1
    back = after["masks/fc1.weight"][3]
    assert back.any(), "P holds every pruned weight"
    assert np.all(after["params/fc1.weight"][3][back] != 0)
    kept = np.delete(after["masks/fc1.weight"], 3, axis=0)
    assert kept.all(), "with φ = 0 nothing goes"


class Labelled:
    """Batches whose labels are what the first model answers, or `shift` classes beside it."""

    num_examples = 24

    def __init__(self, shift: int):
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((8, 1, 8, 8)).astype(np.float32)
        session = ENGINE.open(SPEC, params(), SubModel(), batch_size=8, optimizer=SGD(0.0))
        (logits,) = session.forward(self.x).values()
        self.y = (logits.argmax(1) + shift) % 3

    def draw(self, *, steps: int, batch_size: int, seed: int, examples: int | None = None):
        assert batch_size == 8
        return ((self.x, self.y) for _ in range(steps))


@pytest.mark.parametrize(("shift", "reconfigurations"), [(1, 0), (0, 1)])
def test_initial_pruning_starts_at_accuracy_only(shift, reconfigurations):
    """lr too small to learn: always wrong, it stops at the last pass, dense; else it prunes."""
    algorithm = prunefl(server(), **{**SMALL, "lr": 1e-9, "initial_max_passes": 3})
    (task,) = algorithm.configure(algorithm.init(first_model()), devices())
    update, _ = client_update(task, Labelled(shift), ENGINE, {})
    assert update.metrics["reconfigurations"] == reconfigurations
    assert update.metrics["passes"] == (3 if shift else 2)  # none is pruned before its start
    assert (update.metrics["density"] == 1.0) == bool(shift)


def test_a_client_that_lost_its_model_gets_it_again():
    algorithm = prunefl(server(), **SMALL)
    dispatch = fresh_dispatch(algorithm)
    forgot = []

    def forget(progress, record):
        if progress.step == 1:
            dispatch.restore({})
            forgot.append(progress.state.phase)

    state = run(algorithm, dispatch=dispatch, watch=forget)
    assert forgot == ["initial"] and state.initial_lost == 1
    undisturbed = run(prunefl(server(), **SMALL))
    assert same(state.params, undisturbed.params) and same(state.masks, undisturbed.masks)


def test_a_client_that_always_loses_its_model_ends_the_run():
    algorithm = prunefl(server(), **SMALL)
    dispatch = fresh_dispatch(algorithm)
    with pytest.raises(ValueError, match="client 0 lost its model 4 times"):
        run(algorithm, dispatch=dispatch, watch=lambda *_: dispatch.restore({}))


def test_importance_that_was_not_asked_for_changes_nothing():
    algorithm = prunefl(server(), reconfigure_every=0, initial_pruning=False)
    state = algorithm.init(first_model())
    g2 = {name: np.ones(shape, np.float32) for name, shape in SPEC.param_shapes.items()}
    update = ClientUpdate(
        0, 5, dict(params()), SubModel(masks=state.masks), {"importance": Statistic(g2, "mean")}
    )
    assert same(algorithm.server_update(state, [update]).masks, state.masks)


@pytest.mark.parametrize(
    "initial",
    [
        {"initial_max_passes": 60},
        {"initial_max_passes": 2},  # too few passes to come down by 30% at a time
        {"initial_max_passes": 3, "lr": 1e-9},  # the start accuracy is never reached
        {"initial_max_passes": 2, "reconfigure_every": 0},
    ],
)
def test_size_limit_binds_initial_pruning_and_every_round(initial):
    """D(r) = 0.3 + (0.27 - 0.3)·r/6, held until the next reconfiguration; never exceeded."""
    algorithm = prunefl(server(), **{**SMALL, **initial}, size_limit=0.3, size_target=0.27)
    densities = {}

    def watch(progress, record):
        if record.tasks[0].phase == "train":
            densities[record.tasks[0].round] = density(record.tasks[0].sub_model.masks)

    run(algorithm, watch=watch)
    assert len(densities) == ROUNDS
    for round, kept in densities.items():
        assert kept <= 0.3 - 0.03 * round / 6 + 1e-9, (round, kept)


def test_a_limit_far_below_is_reached_at_the_next_reconfiguration():
    """From all 840 weights to 30% at once: φ = 0.3 of each layer alone would leave 70%."""
    algorithm = prunefl(
        server(), lr=0.05, initial_pruning=False, reconfigure_every=2, size_limit=0.3
    )
    densities = []

    def watch(progress, record):
        densities.append(density(record.tasks[0].sub_model.masks))

    run(algorithm, watch=watch)
    assert densities[:2] == [1.0, 1.0] and max(densities[2:]) <= 0.3


def test_a_falling_limit_is_kept_where_nobody_answers_at_a_reconfiguration():
    """Largest weights stay; where the limit has room nothing is reconfigured."""
    masks = {k: np.abs(params()[k]) > np.quantile(np.abs(params()[k]), 0.7) for k in SPEC.prunable}
    held = num_kept(masks)
    for target, dropped in ((0.2, True), (0.4, False)):
        algorithm = prunefl(server(), **SMALL, size_limit=0.4, size_target=target)
        state = replace(train_state(algorithm, masks), round=1)
        after = algorithm.server_update(state, [])
        assert after.round == 2
        kept = num_kept(after.masks)
        limit = 840 * (0.4 + (target - 0.4) * 4 / ROUNDS)  # D(4), held until round 4
        assert (kept < held, after.reconfigurations) == (dropped, int(dropped))
        assert kept <= limit + 1e-6
        for name, mask in after.masks.items():
            assert not np.any(mask & ~masks[name]), "nothing grows back without importance"
            assert not np.any(after.params[name][~mask])
            sizes = np.abs(state.params[name])
            assert sizes[mask].mean() >= sizes[masks[name]].mean()


def test_general_time_function_runs_algorithm_3():
    state = run(prunefl(server(), **SMALL, time_model="device"))
    assert 0 < density(state.masks) < 1


def test_values_only_rounds_are_as_small_as_their_density():
    """Between reconfigurations a round is 4 bytes per kept weight and never-pruned parameter."""
    algorithm = prunefl(server(), **SMALL)
    sizes = []

    def watch(progress, record):
        for task in record.tasks:
            if task.phase == "train" and not task.hparams["upload_importance"]:
                known = ClientStore()
                known.acknowledge(task, ClientUpdate(task.client, 1, {}, task.sub_model))
                kept = sum(int(mask.sum()) for mask in task.sub_model.masks.values())
                rest = sum(
                    int(np.prod(s)) for n, s in SPEC.tensor_shapes.items() if n not in SPEC.prunable
                )
                sizes.append(wire.task_bytes(task, known.known(task.client)) - 4 * (kept + rest))

    run(algorithm, watch=watch)
    assert sizes and all(0 < size < 400 for size in sizes), "header and hyper-parameters only"


@pytest.mark.parametrize(
    "setting",
    [
        {"prunable_fraction": 1.5},
        {"size_limit": 0.0},
        {"size_limit": 1.01},
        {"size_target": 0.1},
        {"reconfigure_every": -1},
        {"importance_rounds": -2},
        {"initial_passes": 0},
        {"initial_importance_passes": -1},
        {"initial_examples": -1},
        {"initial_batches": 0},
        {"readd_scale": -0.1},
        {"time_model": "quadratic"},
        {"lr": -1.0},
        {"cohort": 0},
        {"initial_client": -1},
        {"importance_budget_bytes": -1},
        {"importance_dtype": "fp16"},
        {"initial_passes": 1001},
    ],
)
def test_bad_hyperparameters_are_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        prunefl(server(), **setting)
