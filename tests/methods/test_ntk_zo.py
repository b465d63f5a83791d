"""NTK pruning and zeroth-order training: who sends what, and that replayed models are the server's.

Scores and budgets are tested in tests/pruning; slopes, their folds, optimisers and replay in
tests/train.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conformance import Case
from federation import (
    CLIENTS,
    ENGINE,
    ROUNDS,
    SEED,
    SPEC,
    Around,
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
from fedlean.core import SubModel, derive_seed
from fedlean.cost.price import cost
from fedlean.data.batches import ClientData
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.methods.ntk_zo import State, client_update, ntk_zo, statistics, work
from fedlean.models.catalog import build as build_model
from fedlean.pruning.density import density, full_masks
from fedlean.pruning.foresight import Scoring, foresight_masks
from fedlean.pruning.ntk import ntk_scores
from fedlean.pruning.rescale import rescale_kept
from fedlean.runtime.checks import Expected, refusal
from fedlean.runtime.clientstore import ClientStore
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.modelfile import read_model
from fedlean.runtime.remote.limit import LimitedEngine
from fedlean.runtime.remote.room import TooLarge
from fedlean.runtime.run import start
from fedlean.train.forward_updates import Held, Rule, Space, advance, estimate, round_seed
from fedlean.train.zeroth_order import Probe, directional_derivatives
from fedlean.tree import apply_mask, num_kept, pack

# a large σ and momentum instead of Adam, so that rounding in the engines stays rounding
TRAIN = {"directions": 6, "sigma": 0.02, "optimizer": "momentum", "lr": 0.01, "batch_size": 8}
PRUNE = {"density": 0.5, "prune_steps": 2, "prune_examples": 8}
CASE = Case(
    method=ntk_zo,
    settings={**TRAIN, **PRUNE, "scores": "clients", "download": "scalars"},
    knob={"sigma": 0.05},
    neutral="every step is along slopes in random directions: no setting takes FedAvg's gradient",
)
RUN_SEED = derive_seed(SEED, 0, 0, "zeroth order")


def trained(**settings) -> State:
    return run(ntk_zo(server(), **{**TRAIN, "density": 1.0, **settings}))


# --- pruning ---


def test_the_server_prunes_alone_by_default():
    algorithm = ntk_zo(server(), **TRAIN, **PRUNE)
    state = algorithm.init(first_model())
    assert state.phase == "prune" and algorithm.configure(state, devices()) == []

    pruned = algorithm.server_update(state, ())

    scoring, seed = Scoring(2, examples=8), derive_seed(SEED, 0, 0, "prune")
    masks, _ = foresight_masks(ENGINE, SPEC, params(), 0.5, "ntk", scoring, seed)
    assert same(pruned.masks, masks) and num_kept(masks) == 420
    assert same(dict(pruned.params), rescale_kept(params(), masks))
    assert (pruned.phase, pruned.round) == ("train", 0)


def test_without_rescaling_the_kept_weights_stay():
    algorithm = ntk_zo(server(), **TRAIN, **PRUNE, rescale=False)
    pruned = algorithm.server_update(algorithm.init(first_model()), ())
    assert same(dict(pruned.params), apply_mask(params(), pruned.masks))


@pytest.mark.parametrize("criterion", ["ntk", "ntk_shuffled", "node"])
def test_clients_prune_in_steps(criterion):
    """Density 0.5^(1/2), then 0.5; neither model nor slopes travel meanwhile."""
    seen = []

    def watch(progress, record):
        if record.tasks[0].phase == "score":
            masks = progress.state.choosing or progress.state.masks
            seen.append((density(masks), progress.state.round))
            assert all(not task.params for task in record.tasks)

    state = run(
        ntk_zo(server(), **TRAIN, **PRUNE, scores="clients", criterion=criterion), watch=watch
    )

    assert [round(share, 3) for share, _ in seen] == [round(int(840 * 0.5**0.5) / 840, 3), 0.5]
    assert [at for _, at in seen] == [0, 0] and state.round == ROUNDS


def test_scores_of_clients_add_up_to_those_of_their_pooled_data():
    """With all of its data once, each client's mean weighs as much as it has examples."""
    algorithm = ntk_zo(
        server(),
        **TRAIN,
        density=0.5,
        prune_steps=1,
        scores="clients",
        inputs="local",
        prune_examples=25,
    )
    state = algorithm.init(first_model())
    data = [ClientData(one.dataset, one.indices[:25]) for one in client_data()]
    tasks = algorithm.configure(state, devices())
    updates = [client_update(task, data[task.client], ENGINE, {})[0] for task in tasks]
    found = algorithm.server_update(state, updates)

    drawn = [next(iter(data[t.client].draw(steps=1, batch_size=25, seed=t.seed)))[0] for t in tasks]
    seed = derive_seed(derive_seed(SEED, 0, 0, "prune"), 0, 1, "weights")
    pooled = ntk_scores(ENGINE, SPEC, full_masks(SPEC), [np.concatenate(drawn)], seed)
    summed = sum(update.statistics["scores"].tensors["fc1.weight"] for update in updates) / CLIENTS
    expected = pooled.mean()["fc1.weight"].ravel()
    np.testing.assert_allclose(summed, expected, rtol=0, atol=1e-5 * abs(expected).max())
    assert num_kept(found.masks) == 420


def test_masks_of_a_finished_run(tmp_path):
    """Their weights grow as after any pruning, or go on as trained."""
    config = RunConfig(
        "synflow",
        model="lenet300",
        rounds=1,
        clients=2,
        settings={"density": 0.1, "synflow_steps": 2},
    )
    start(config, tmp_path / "pruned", How())
    config = RunConfig(
        "ntk_zo",
        model="lenet300",
        rounds=1,
        clients=2,
        settings={"directions": 2, "lr": 1e-9},
        start=str(tmp_path / "pruned"),
    )
    grown = replace(
        config, start_weights="original", settings={**config.settings, "rescale_given": True}
    )
    summary = start(grown, tmp_path / "zo", How())
    assert summary["density"] == pytest.approx(0.1, abs=1e-3)
    spec = build_model("lenet300", (1, 8, 8), 10)
    kept = read_model(tmp_path / "zo" / "model.safetensors", spec).params["fc1.weight"]
    mask = read_model(tmp_path / "pruned" / "model.safetensors", spec).masks["fc1.weight"]
    bound = 1 / np.sqrt(64 * mask.mean())  # 1/sqrt(fan_in) over the root of the layer's density
    assert 0.99 * bound < np.abs(kept).max() <= bound + 1e-6
    after = start(config, tmp_path / "on", How())
    before = (tmp_path / "pruned" / "summary.json").read_text()
    assert f'"final_accuracy": {after["final_accuracy"]}' in before


# --- a round by hand ---


def test_a_round_by_hand():
    """Slopes of each client on one batch, their weighted mean, ĝ and momentum's first step."""
    algorithm = ntk_zo(server(), **TRAIN, density=1.0, shared_directions=True)
    state = algorithm.init(first_model())
    tasks = algorithm.configure(state, devices())
    updates = [client_update(task, client_data()[task.client], ENGINE, {})[0] for task in tasks]
    after = algorithm.server_update(state, updates)

    total, weights = np.zeros(6), 0
    for client, data in enumerate(client_data()):
        ((x, y),) = data.draw(steps=1, batch_size=8, seed=derive_seed(SEED, 1, client, "train"))
        session = ENGINE.open_forward(SPEC, params(), SubModel(), batch_size=8)
        slopes = directional_derivatives(
            session, x, y, Probe(6, 0.02), seed=round_seed(RUN_SEED, 1), at_once=8
        )
        assert np.array_equal(updates[client].statistics["c"].tensors["c"], slopes.astype("f4"))
        total += data.num_examples * slopes.astype(np.float32)
        weights += data.num_examples
    mean = (total / weights).astype(np.float32)
    space = Space(SPEC.param_shapes, {}, "gaussian")
    gradient = estimate(round_seed(RUN_SEED, 1), mean, space)
    for name, value in after.params.items():
        expected = params()[name] - np.float32(0.01) * gradient[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-7)


def test_clients_of_their_own_directions():
    """A control: ĝ is the weighted mean of the clients' own estimates."""
    algorithm = ntk_zo(server(), **TRAIN, density=1.0, shared_directions=False)
    state = algorithm.init(first_model())
    tasks = algorithm.configure(state, devices())
    assert len({task.hparams["direction_seed"] for task in tasks}) == CLIENTS
    updates = [client_update(task, client_data()[task.client], ENGINE, {})[0] for task in tasks]
    after = algorithm.server_update(state, updates)

    space, gradient = Space(SPEC.param_shapes, {}, "gaussian"), 0.0
    for update in updates:
        seed = round_seed(RUN_SEED, 1, update.client + 1)
        own = estimate(seed, update.statistics["c"].tensors["c"], space)["fc1.weight"]
        gradient += update.num_examples / 160 * own
    expected = params()["fc1.weight"] - 0.01 * gradient
    np.testing.assert_allclose(after.params["fc1.weight"], expected, rtol=0, atol=1e-6)


def test_rate_grows_as_density_falls():
    """lr / √d, once per round."""
    dense, sparse = (
        ntk_zo(server(), **TRAIN, **PRUNE, rescale=False, lr_by_density=by) for by in (False, True)
    )
    moved = []
    for algorithm in (dense, sparse):
        state = algorithm.server_update(algorithm.init(first_model()), ())
        tasks = algorithm.configure(state, devices())
        updates = [client_update(task, client_data()[task.client], ENGINE, {})[0] for task in tasks]
        after = algorithm.server_update(state, updates)
        moved.append(after.params["fc1.bias"] - state.params["fc1.bias"])
    np.testing.assert_allclose(moved[1], moved[0] * 2**0.5, rtol=1e-3)


def test_moving_average_is_shown_and_the_model_trained():
    plain, shown = trained(), trained(ema=0.9)
    assert not plain.iterate
    assert same(dict(shown.iterate), dict(plain.params))
    assert not same(dict(shown.params), dict(plain.params))


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_fewer_bytes_change_little(form):
    exact, rounded = trained(), trained(scalars=form)
    for name, value in exact.params.items():
        moved = abs(value - params()[name]).max()
        assert 0 < abs(rounded.params[name] - value).max() < 0.05 * moved


@pytest.mark.parametrize("extra", [{"kind": "sign"}, {"kind": "rank1"}, {"differences": "central"}])
def test_other_directions_and_differences_train(extra):
    state = trained(**extra)
    assert state.round == ROUNDS and not same(dict(state.params), dict(trained().params))


def test_micro_batches_are_the_same_round():
    whole, parts = trained(), trained(micro_batch=3)
    for name, value in whole.params.items():
        np.testing.assert_allclose(parts.params[name], value, rtol=0, atol=1e-5)


# --- what travels ---


def sizes(**settings) -> list[tuple[int, int]]:
    """Bytes of the largest task and update of each training round."""
    found, store = [], ClientStore()
    algorithm = ntk_zo(server(), **{**TRAIN, **PRUNE, **settings})

    def change(tasks, updates):
        answers = list(updates)
        down = [wire.task_bytes(task, store.known(task.client)) for task in tasks]
        up = [wire.update_bytes(u, t) for u, t in zip(answers, tasks, strict=True)]
        for task, update in zip(tasks, answers, strict=True):
            store.acknowledge(task, update)
        found.append((max(down), max(up)))
        return answers

    run(algorithm, dispatch=Around(fresh_dispatch(algorithm), change))
    return found


def test_upload_is_200_bytes_at_most_with_fifty_scalars_as_int8():
    assert all(up <= 200 for _, up in sizes(directions=50, scalars="int8", batch_size=32))


def test_download_of_scalars_is_below_a_kilobyte_per_missed_round():
    """The first round brings the model; the second brings what the first decided."""
    found = sizes(directions=50, download="scalars")
    assert found[0][0] > 1024
    assert all(down <= 1024 for down, _ in found[1:])


def test_no_parameters_go_up():
    algorithm = ntk_zo(server(), **TRAIN, **PRUNE)
    state = algorithm.server_update(algorithm.init(first_model()), ())
    for task in algorithm.configure(state, devices()):
        update, held = client_update(task, client_data()[task.client], ENGINE, {})
        assert not update.params and not held
        assert refusal(update, task, Expected(statistics(task))) is None
        assert update.work[0].forward_examples == 8 * 7 and update.work[0].steps == 0


@pytest.mark.usefixtures("has_native")
def test_a_client_scores_where_there_is_as_much_memory_as_is_priced():
    """Less than a tenth of it is not used."""
    scoring = {"scores": "clients", "criterion": "ntk", "prune_examples": 8}
    algorithm = ntk_zo(server(), **{**TRAIN, **PRUNE, **scoring})
    native = open_engine("native", 1)
    (task, *_) = algorithm.configure(algorithm.init(first_model()), devices())
    said = cost(task, work(task), server().profile).peak_memory_bytes
    data = client_data()[task.client]
    client_update(task, data, LimitedEngine(native, said, emulated=True), {})
    with pytest.raises(TooLarge):
        client_update(task, data, LimitedEngine(native, said * 9 // 10, emulated=True), {})


# --- the scalar log ---


LOGGED = {**TRAIN, "density": 0.5, "prune_steps": 1, "prune_examples": 8, "download": "scalars"}


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "normalised"])
@pytest.mark.parametrize("cohort", [None, 2])
def test_replaying_clients_train_the_server_s_model(optimizer, cohort):
    """Whatever they missed: the run is that of clients who get the model, bit for bit."""
    settings = {**LOGGED, "optimizer": optimizer, "cohort": cohort}
    given = run(ntk_zo(server(), **{**settings, "download": "model"}))
    replayed = run(ntk_zo(server(), **settings))
    assert same(dict(given.params), dict(replayed.params))
    assert same(dict(given.moments), dict(replayed.moments))


def test_log_brings_what_was_missed_and_no_more():
    """Two of four clients a round: a task has a row for each round since the client's last."""
    rows = []

    def watch(progress, record):
        for task in record.tasks:
            log = task.arrays.get("log")
            if not task.params:
                missed = task.hparams["round"] - task.hparams["from"]
                assert (0 if log is None else len(log["lr"])) == missed
                rows.append(missed)

    run(ntk_zo(server(), **LOGGED, cohort=2), watch=watch)
    assert rows and max(rows) > 1


def test_a_client_that_lost_its_model_gets_it_again():
    algorithm = ntk_zo(server(), **LOGGED)
    dispatch = fresh_dispatch(algorithm)
    seen = []

    def change(tasks, updates):
        answers = list(updates)
        seen.append([bool(task.params) for task in tasks])
        if len(seen) == 2:
            dispatch.restore({})  # every client's disk is gone
        return answers

    around = Around(dispatch, change)
    acknowledge = dispatch.acknowledge

    def forget(clients, refused):
        acknowledge(clients, refused)
        if len(seen) == 2:
            dispatch.restore({})

    around.acknowledge = forget
    state = run(algorithm, dispatch=around)

    assert seen[0] == [True] * 4 and seen[1] == [False] * 4
    assert seen[2] == [False] * 4  # asked in vain
    assert seen[3] == [True] * 4
    assert same(dict(state.params), dict(run(ntk_zo(server(), **LOGGED)).params))


def test_a_lost_model_counts_for_nothing():
    algorithm = ntk_zo(server(), **LOGGED)
    state = algorithm.server_update(algorithm.init(first_model()), ())
    tasks = algorithm.configure(state, devices())
    answers = [client_update(task, client_data()[task.client], ENGINE, {})[0] for task in tasks]
    state = algorithm.server_update(state, answers)
    tasks = algorithm.configure(state, devices())

    lost, held = client_update(tasks[0], client_data()[0], ENGINE, {})
    assert lost.metrics == {"lost_state": 1.0} and not held
    assert refusal(lost, tasks[0], Expected(statistics(tasks[0]))) is None
    after = algorithm.server_update(state, [lost])
    assert after.round == state.round and same(dict(after.params), dict(state.params))
    assert "0" not in after.held
    again = algorithm.configure(after, devices())[0]
    assert again.params and again.arrays.keys() == {"velocity"}


def test_what_the_server_remembers_is_bounded():
    """Of a model of 915 floats and as many moments: at most so many rounds of 1 + 40 scalars."""
    algorithm = ntk_zo(server(100), **{**LOGGED, "directions": 40}, cohort=1)
    state = algorithm.server_update(algorithm.init(first_model()), ())
    update = None
    for round in range(1, 41):
        task = algorithm.configure(state, devices())[0]
        if update is None:
            update, _ = client_update(task, client_data()[0], ENGINE, {})
        state = algorithm.server_update(state, [replace(update, client=round)])
    size = sum(v.size for v in pack(state.params, state.masks).values())
    rounds = (size + sum(v.size for v in state.moments["velocity"].values())) // 41
    assert 1 < rounds < 40 and len(state.log) == rounds
    assert len(state.held) <= rounds + 1


# --- the last block by backpropagation ---


def test_hybrid_sends_the_last_block_s_exact_gradient():
    """fc2 of a model in two blocks, masked and in micro-batches."""
    spec = replace(
        SPEC,
        nodes=tuple(replace(n, block="head" if n.name == "fc2" else "body") for n in SPEC.nodes),
    )
    here = replace(server(), spec=spec)
    algorithm = ntk_zo(here, **TRAIN, **PRUNE, last_block="backprop", micro_batch=3)
    state = algorithm.server_update(algorithm.init(first_model()), ())
    task = algorithm.configure(state, devices())[0]
    update, _ = client_update(task, client_data()[0], ENGINE, {})
    assert refusal(update, task, Expected(statistics(task))) is None

    ((x, y),) = client_data()[0].draw(steps=1, batch_size=8, seed=task.seed)
    session = ENGINE.open(
        spec, state.params, SubModel(masks=state.masks), batch_size=8, optimizer=SGD(1.0)
    )
    before = session.params(packed=True)
    session.step(x, y)
    after = session.params(packed=True)
    sent = update.statistics["gradient"].tensors
    assert sent.keys() == {"fc2.weight", "fc2.bias"}
    for name, value in sent.items():
        np.testing.assert_allclose(value, before[name] - after[name], rtol=0, atol=1e-6)

    moved = algorithm.server_update(state, [update])
    slopes = update.statistics["c"].tensors["c"]
    names = [name for name in SPEC.param_shapes if name not in sent]
    space = Space({name: SPEC.param_shapes[name] for name in names}, state.masks, "gaussian")
    gradient = {**estimate(round_seed(RUN_SEED, 1), slopes, space), **sent}
    rate = float(np.float32(0.01 / 0.5**0.5))
    packed = pack(state.params, state.masks)
    expected = advance(Held(packed), gradient, Rule("momentum"), rate, slopes)
    assert same(pack(moved.params, moved.masks), dict(expected.params))


def test_hybrid_needs_another_block():
    with pytest.raises(ValueError, match="one block"):
        ntk_zo(server(), last_block="backprop")


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma"),
        ({"directions": 0}, "directions"),
        ({"density": 0.0}, "density"),
        ({"ema": 1.0}, "ema"),
        ({"kind": "cauchy"}, "kind"),
        ({"criterion": "snip"}, "criterion"),
        ({"scores": "clients", "criterion": "random"}, "criterion='random'"),
        ({"inputs": "local"}, "scores='clients'"),
        ({"optimizer": "normalised", "directions": 1}, "directions=2"),
        ({"download": "scalars", "shared_directions": False}, "shared_directions"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ntk_zo(server(), **settings)
