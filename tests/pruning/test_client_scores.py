"""Scores that clients send in a step of pruning: whose they are, what they take, what they weigh.

The scores themselves are tested in test_ntk.py and test_node_perturbation.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data

from fedlean.core import ClientTask, SubModel
from fedlean.pruning.client_scores import FROM_CLIENTS, ScoreRequest, answer, forms, request, work
from fedlean.pruning.density import full_masks
from fedlean.pruning.foresight import Scoring
from fedlean.pruning.node_perturbation import node_gradient, node_scores
from fedlean.pruning.ntk import gaussian_inputs, ntk_scores
from fedlean.tree import kept_counts

SCORING = Scoring(2, draws=2, examples=8)
MASKS = {**full_masks(SPEC), "fc2.weight": np.arange(36).reshape(3, 12) % 3 == 0}
UNITS = sum(SPEC.param_shapes[name][0] for name in SPEC.prunable)


def task(criterion="ntk", inputs="gaussian", micro_batch=0, masks=MASKS) -> ClientTask:
    hparams = request(SCORING, criterion, inputs, micro_batch, 21).to_hparams()
    return ClientTask(1, "score", 0, 33, SPEC, {}, SubModel(masks=masks), hparams)


def test_hparams_bring_all_of_it():
    asked = request(SCORING, "node", "local", 3, 21)
    assert ScoreRequest.from_hparams(asked.to_hparams()) == asked
    assert (asked.draws, asked.examples, asked.epsilon, asked.init) == (2, 8, 0.01, "pytorch")


def test_clients_know_no_shuffling():
    found = [request(SCORING, criterion, "local", 0, 1).criterion for criterion in FROM_CLIENTS]
    assert found == ["ntk", "ntk", "node_ntk", "node"]


def test_an_unknown_init_is_named():
    hparams = {**task().hparams, "init": "zeros"}
    with pytest.raises(ValueError, match="init must be one of pytorch, he, got 'zeros'"):
        ScoreRequest.from_hparams(hparams)


def test_pruned_coordinates_have_no_form():
    """Forms of the statistics: kept weights only."""
    counts = kept_counts(MASKS)
    assert counts["fc2.weight"] == 12
    assert forms(task())["scores"].shapes == {name: (kept,) for name, kept in counts.items()}


def test_work_by_hand():
    """Two draws of 8.  NTK: forward and backward at two points, and a forward before them.

    Bumps: a forward of every unit and one per layer; twice that, and the outputs, for node_ntk.
    """
    (ntk,) = work(task(micro_batch=3))
    assert (ntk.steps, ntk.batch_size, ntk.forward_examples) == (2 * 2 * 3, 3, 16)
    bumps = UNITS + len(SPEC.prunable)
    (node,) = work(task("node"))
    assert (node.steps, node.batch_size, node.forward_examples) == (0, 8, 16 * bumps)
    (both,) = work(task("node_ntk"))
    assert (both.steps, both.forward_examples) == (0, 2 * 16 * (bumps + 1))
    assert ntk.kept == node.kept == both.kept == kept_counts(MASKS)


@pytest.mark.parametrize("criterion", ["ntk", "node_ntk", "node"])
@pytest.mark.parametrize("inputs", ["gaussian", "local"])
def test_scores_are_means_over_the_client_s_own_inputs(criterion, inputs):
    """The weights' seed is all clients', the inputs' its own; of kept weights alone."""
    update = answer(task(criterion, inputs), client_data()[0], ENGINE)
    if inputs == "local":
        xs = [x for x, _ in client_data()[0].draw(steps=2, batch_size=8, seed=33)]
    else:
        xs = list(gaussian_inputs(SPEC, 8, 2, 33))
    if criterion == "node":
        sums = node_scores(ENGINE, SPEC, MASKS, xs, 21, bump=0.01, batch_size=8)
    else:
        how = node_gradient if criterion == "node_ntk" else None
        sums = ntk_scores(ENGINE, SPEC, MASKS, xs, 21, batch_size=8, difference=how).scores
    sent = update.statistics["scores"]
    assert sent.reduction == "mean" and sent.tensors.keys() == set(SPEC.prunable)
    for name, values in sent.tensors.items():
        assert np.array_equal(values, (sums[name] / 16).astype(np.float32)[MASKS[name]])
    assert update.num_examples == 25 and update.work == work(task(criterion, inputs))


@pytest.mark.parametrize("criterion", ["ntk", "node_ntk", "node"])
def test_a_micro_batch_is_held_at_once(criterion):
    """Other memory, and what is charged for it, but the same scores."""
    found = []
    for micro_batch in (0, 3):
        sizes = []

        def opened(spec, *rest, batch_size, sizes=sizes, **settings):
            sizes.append(batch_size)
            of = ENGINE.open if criterion == "ntk" else ENGINE.open_forward
            return of(spec, *rest, batch_size=batch_size, **settings)

        engine = SimpleNamespace(open=opened, open_forward=opened)
        update = answer(task(criterion, micro_batch=micro_batch), client_data()[0], engine)
        assert {*sizes, *(each.batch_size for each in update.work)} == {micro_batch or 8}
        found.append(update.statistics["scores"].tensors["fc1.weight"])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-4 * abs(found[0]).max())
