"""PruneFL from the masks of a criterion: which ones, what they cost, and that they move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from federation import (
    CLIENTS,
    ENGINE,
    ROUNDS,
    SPEC,
    client_data,
    devices,
    first_model,
    params,
    run,
    same,
    server,
)

from fedlean.core import ClientUpdate, Model, Statistic, SubModel, derive_seed
from fedlean.methods.fedavg import fedavg
from fedlean.methods.prunefl import client_update, prunefl
from fedlean.pruning.foresight import Scoring, foresight_masks
from fedlean.pruning.synaptic_flow import prune_by_flow
from fedlean.runtime.method import given_settings
from fedlean.tree import num_kept
from fedlean.wire import round_bfloat16

SMALL = {"lr": 0.05, "local_steps": 2, "batch_size": 8, "initial_density": 0.3}
FEW = 4.5 / 840  # keeps 4 of the 840 prunable weights
EVERYTHING = {"importance_multiple": 0.0, "importance_dtype": "fp32"}


def logged(algorithm):
    """The final state, and of every step its record and the state after it."""
    seen = []
    state = run(algorithm, watch=lambda progress, record: seen.append((record, progress.state)))
    return state, seen


def test_snip_keeps_the_largest_products_of_gradient_and_first_weight():
    """|Σ p_n g_n · w| with p = (1/4, 3/4), w the first weights; biases are never pruned.

    fc1 [0,0]: |(1·4 + 3·4)/4 · 1| = 4      fc1 [0,1]: |(-1·8 + 3·0)/4 · 3| = 6
    fc2 [1,2]: |(3 - 3·5)/4 · -2| = 6       conv [0,0,0,0]: |(6·9 - 3·18)/4 · 50| = 0
    fc2 [0,0]: |(1·1 + 3·1)/4 · 2.5| = 2.5  all others: 0.5 · 1 = 0.5
    """
    shapes = SPEC.param_shapes.items()
    weights = {name: np.full(shape, 1.0, np.float32) for name, shape in shapes}
    first = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes}
    second = {name: value.copy() for name, value in first.items()}
    for name, at, w, g1, g2 in [
        ("fc1.weight", (0, 0), 1, 4, 4),
        ("fc1.weight", (0, 1), 3, -8, 0),
        ("fc2.weight", (1, 2), -2, 3, -5),
        ("conv.weight", (0, 0, 0, 0), 50, 54, -18),
        ("fc2.weight", (0, 0), 2.5, 1, 1),
    ]:
        weights[name][at], first[name][at], second[name][at] = w, g1, g2
    algorithm = prunefl(server(), **{**SMALL, "initial_density": FEW}, initial="snip")
    state = algorithm.init(Model(SPEC, weights))
    assert (state.phase, state.masks) == ("score", {})
    answers = [
        ClientUpdate(
            client,
            examples,
            {},
            SubModel(),
            {"gradient": Statistic({name: g[name] for name in SPEC.prunable}, "mean")},
        )
        for client, examples, g in [(0, 25, first), (1, 75, second)]
    ]
    after = algorithm.server_update(state, answers)
    kept = {(n, *map(int, at)) for n, mask in after.masks.items() for at in np.argwhere(mask)}
    expected = {("fc1.weight", 0, 0), ("fc1.weight", 0, 1), ("fc2.weight", 1, 2)}
    assert kept == expected | {("fc2.weight", 0, 0)}
    assert (after.phase, after.round) == ("train", 0)
    assert after.params["fc2.weight"].sum() == 0.5 and after.params["fc1.weight"].sum() == 4
    assert after.params["fc1.bias"].tolist() == [1.0] * 12
    assert algorithm.server_update(state, []) is state, "nobody answered: asked again"


def test_snip_scores_in_a_round_of_its_own_that_is_charged():
    """The dense model down, the gradients up, as many passes as asked; then 252 weights."""
    algorithm = prunefl(
        server(), **SMALL, initial="snip", initial_batches=3, reconfigure_every=0, **EVERYTHING
    )
    state, seen = logged(algorithm)
    (score, after), *rounds = seen
    assert [record.tasks[0].phase for record, _ in seen] == ["score"] + ["train"] * ROUNDS
    assert (after.round, state.round) == (0, ROUNDS)
    assert all(same(dict(task.params), dict(params())) for task in score.tasks)
    assert score.cost.downlink_bytes > CLIENTS * 4 * SPEC.num_params
    assert score.cost.uplink_bytes > CLIENTS * 3 * 840, "all of 840 gradients that are not 0"
    (work,) = algorithm.work(score.tasks[0])
    assert (work.steps, work.importance_steps, work.batch_size) == (3, 3, 8)
    (dense, _), *_ = logged(fedavg(server(), lr=0.05, local_steps=2, batch_size=8))[1]
    assert score.cost.flops == dense.cost.flops * 3 / 2, "three batches for two local steps"
    assert num_kept(state.masks) == 252
    for record, _ in rounds:
        assert all(same(task.sub_model.masks, state.masks) for task in record.tasks)


def test_of_the_gradient_the_values_of_the_largest_products_go_up():
    """1.5 · 252 of them, each rounded to bfloat16; with a multiple of 0 all, as they are."""
    sent = []
    for extra in ({}, EVERYTHING):
        algorithm = prunefl(server(), **SMALL, initial="snip", **extra)
        task = algorithm.configure(algorithm.init(first_model()), devices())[1]
        update, held = client_update(task, client_data()[1], ENGINE, {})
        assert held == {} and update.params == {} and update.work == algorithm.work(task)
        assert set(update.statistics) == set(algorithm.statistics(task))
        sent.append(update.statistics["gradient"].tensors)
    some, every = (
        np.concatenate([tensors[name].ravel() for name in SPEC.prunable]) for tensors in sent
    )
    weights = np.concatenate([params()[name].ravel() for name in SPEC.prunable])
    chosen, products = some != 0, np.abs(every.astype(np.float64) * weights)
    assert np.count_nonzero(chosen) == 378
    assert products[chosen].min() >= products[~chosen].max()
    assert np.array_equal(some[chosen], round_bfloat16(every[chosen]))


@pytest.mark.parametrize("initial", ["synflow", "ntk"])
def test_the_server_alone_chooses_without_data(initial):
    """A step without a task and without a byte; the masks are the criterion's."""
    _, seen = logged(prunefl(server(), **SMALL, initial=initial, reconfigure_every=0))
    (alone, after), *rounds = seen
    assert alone.server_only and not alone.tasks
    assert alone.cost.downlink_bytes + alone.cost.uplink_bytes + alone.cost.flops == 0
    seed = derive_seed(server().seed, 0, 0, "prune")
    expected = {
        "synflow": prune_by_flow(SPEC, params(), 0.3, 100),
        "ntk": foresight_masks(ENGINE, SPEC, params(), 0.3, "ntk", Scoring(), seed)[0],
    }[initial]
    assert same(after.masks, expected) and num_kept(expected) == 252
    for name, value in params().items():
        kept = expected.get(name, np.ones(value.shape, bool))
        assert np.array_equal(after.params[name], np.where(kept, value, 0))
    assert len(rounds) == ROUNDS
    assert all(same(t.sub_model.masks, expected) for record, _ in rounds for t in record.tasks)


@pytest.mark.parametrize("initial", ["snip", "synflow", "ntk"])
def test_reconfigurations_move_the_masks(initial):
    """As those of any PruneFL: after rounds 2 and 4, where g² goes up, to other weights."""
    state, seen = logged(prunefl(server(), **SMALL, initial=initial, reconfigure_every=2))
    assert state.reconfigurations == 2
    (_, begun), *rounds = seen
    at = [after.masks for _, after in rounds]
    assert same(at[0], begun.masks) and not same(at[1], at[0])
    assert same(at[2], at[1]) and not same(at[3], at[2]) and same(at[5], at[3])
    back = sum(int(np.sum(at[1][name] & ~mask)) for name, mask in begun.masks.items())
    gone = sum(int(np.sum(mask & ~at[1][name])) for name, mask in begun.masks.items())
    assert back and gone, "weights come back, and others go"


def test_what_is_kept_grows_where_asked():
    """By 1/√(kept share of the layer)."""
    plain, grown = (
        logged(prunefl(server(), **SMALL, initial="synflow", initial_rescale=rescale))[1][0][1]
        for rescale in (False, True)
    )
    assert same(plain.masks, grown.masks)
    for name, mask in plain.masks.items():
        factor = np.float32(np.sqrt(mask.size / mask.sum()))
        assert np.array_equal(grown.params[name], plain.params[name] * factor)
    assert same(plain.params["fc1.bias"], grown.params["fc1.bias"])


def test_masks_that_a_run_starts_from_are_kept():
    algorithm = prunefl(server(), **SMALL, initial="synflow", initial_rescale=True)
    masks = prune_by_flow(SPEC, params(), 0.4, 5)
    state = algorithm.init(Model(SPEC, params(), masks))
    assert state.phase == "train" and same(state.masks, masks)
    assert same(dict(state.params), dict(params()))


def test_without_a_density_the_limit_says_it():
    for more, kept in (({}, 84), ({"size_limit": 0.3}, 252)):
        algorithm = prunefl(server(), initial="synflow", reconfigure_every=2, **more)
        after = algorithm.server_update(algorithm.init(first_model()), [])
        assert num_kept(after.masks) == kept


def test_a_limit_holds_from_the_first_round_on():
    """D(r) = 0.3 -> 0.2 over 6 rounds: until the reconfiguration after round 2 D(2) = 0.267."""
    limits = {"size_limit": 0.3, "size_target": 0.2, "reconfigure_every": 2}
    with pytest.raises(
        ValueError, match=r"initial_density=0.3 is above what the size limit .* 0.26"
    ):
        prunefl(server(), **SMALL, initial="snip", **limits)
    settings = {**SMALL, "initial_density": 0.26}
    state, seen = logged(prunefl(server(), **settings, initial="snip", **limits))
    for _, after in seen:
        assert num_kept(after.masks) <= 840 * (0.3 - 0.1 * after.round / ROUNDS) + 1e-6
    assert state.reconfigurations == 2 and num_kept(state.masks) < 840 * 0.26


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"initial": "grasp"}, "initial must be one of client, snip, synflow, ntk"),
        ({"initial": "snip", "initial_density": 0.0}, "initial_density must lie in"),
        ({"initial": "synflow", "initial_density": 1e-4}, "initial_density: .* choose at least"),
        ({"initial": "ntk", "initial_density": 1.2}, "initial_density must lie in"),
    ],
)
def test_bad_settings_are_named(setting, named):
    with pytest.raises(ValueError, match=named):
        prunefl(server(), **setting)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["initial_density=0.1"], "the client finds its own size"),
        (["initial_rescale=true"], "the client finds its own size"),
        (["initial=snip", "initial_client=2"], "no client prunes alone"),
        (["initial=snip", "initial_passes=2"], "no client prunes alone"),
        (["initial=ntk", "initial_batches=2"], "no client prunes alone"),
        (["initial_pruning=false", "initial=snip"], "initial_pruning is false"),
        (["initial=synflow", "reconfigure_every=0", "size_limit=0.2"], "no mask moves"),
        (["initial=synflow", "reconfigure_every=0", "importance_dtype=fp32"], "every is 0"),
    ],
)
def test_a_setting_without_effect_is_refused_with_the_reason(texts, reason):
    with pytest.raises(ValueError, match=reason):
        given_settings("prunefl", texts)


def test_settings_with_an_effect_are_taken():
    for texts in (
        ["initial=snip", "initial_batches=2", "initial_density=0.1", "initial_rescale=true"],
        ["initial=snip", "reconfigure_every=0", "importance_dtype=fp32"],
        ["initial=ntk", "size_limit=0.2"],
    ):
        assert given_settings("prunefl", texts)


def test_an_initial_client_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="initial_client must be from 0 to 2"):
        prunefl(replace(server(), clients=3), initial_client=3)
