"""A round's step from its clients' slopes, by hand: shared directions, own ones, an exact part."""

from __future__ import annotations

import numpy as np
import pytest
from federation import same
from numpy.testing import assert_allclose

from fedlean.core import ClientUpdate, Statistic, SubModel
from fedlean.engine.directions import direction
from fedlean.train.forward_updates import Entry, Held, Rule, Space, replay, round_seed
from fedlean.train.slope_fold import SlopeFold, own_seed

F = np.float32
SPACE = Space({"w": (3,)}, {}, "gaussian")
HELD = Held({"w": np.array([1.0, 2.0, 3.0], F), "b": np.array([0.5], F)})
SGD = Rule("momentum", 0.0)


def update(client: int, examples: int, slopes: list[float], **gradient: list[float]):
    sent = {"c": Statistic({"c": np.array(slopes, F)}, "mean")}
    if gradient:
        tensors = {name: np.array(value, F) for name, value in gradient.items()}
        sent["gradient"] = Statistic(tensors, "mean")
    return ClientUpdate(client, examples, {}, SubModel(), sent)


def folded(updates, *, shared: bool) -> SlopeFold:
    fold = SlopeFold(HELD.params, 4, 2, SPACE, shared=shared)
    for each in updates:
        fold.add(each)
    return fold


def z(seed: int, k: int) -> np.ndarray:
    return direction(seed, k, "w", (3,), None, "gaussian")


def test_nobody_answered():
    assert folded([], shared=True).slopes() is None


def test_shared_directions_by_hand():
    """c = (1·[2, 0] + 3·[-2, 4]) / 4 = [-1, 3], and w <- w - 0.1·(-z_0 + 3·z_1) / 2."""
    fold = folded([update(0, 1, [2, 0]), update(5, 3, [-2, 4])], shared=True)
    slopes = fold.slopes()
    assert slopes is not None and slopes.tolist() == [-1, 3]
    after = fold.step(HELD, Entry(2, 0.1, slopes), SGD)
    seed = round_seed(4, 2)
    expected = HELD.params["w"] - 0.1 * (-z(seed, 0) + 3 * z(seed, 1)) / 2
    assert_allclose(after.params["w"], expected, rtol=1e-6)
    assert after.params["b"].tolist() == [0.5] and after.steps == 1


def test_a_step_is_what_a_client_replays():
    """Bit for bit, also where the rate has vanished and nothing moves."""
    fold = folded([update(0, 1, [0.3, 0.7])], shared=True)
    for rate in (0.1, 0.0):
        entry = Entry(2, rate, np.array([0.3, 0.7], F))
        replayed = replay(HELD, [entry], seed=4, space=SPACE, rule=Rule())
        step = fold.step(HELD, entry, Rule())
        assert same(dict(step.params), dict(replayed.params)) and step.steps == replayed.steps


def test_own_directions_by_hand():
    """ĝ = (1·ĝ_0 + 3·ĝ_5) / 4, each client's of its own z."""
    fold = folded([update(0, 1, [2, 0]), update(5, 3, [-2, 4])], shared=False)
    slopes = fold.slopes()
    assert slopes is not None and slopes.tolist() == [-1, 3]  # what the log would have
    after = fold.step(HELD, Entry(2, 0.1, slopes), SGD)
    first, second = own_seed(4, 2, 0), own_seed(4, 2, 5)
    assert len({first, second, round_seed(4, 2)}) == 3
    estimates = z(first, 0), (-2 * z(second, 0) + 4 * z(second, 1)) / 2
    expected = HELD.params["w"] - 0.1 * (estimates[0] + 3 * estimates[1]) / 4
    assert_allclose(after.params["w"], expected, rtol=1e-5)


def test_own_directions_are_normalised_by_all_slopes():
    """[2, 0, -2, 4]: mean 1, variance 5, so the step is lr / √5."""
    updates = [update(0, 1, [2, 0]), update(5, 3, [-2, 4])]
    entry = Entry(2, 0.1, np.array([-1, 3], F))
    plain = folded(updates, shared=False).step(HELD, entry, SGD).params["w"] - HELD.params["w"]
    fold = folded(updates, shared=False)
    moved = fold.step(HELD, entry, Rule("normalised")).params["w"] - HELD.params["w"]
    assert_allclose(moved, plain / 5**0.5, rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_an_exact_gradient_moves_its_tensor(shared):
    """b <- 0.5 - 0.1·(1·4 + 3·8) / 4 = -0.2, beside the slopes' step."""
    updates = [update(0, 1, [2, 0], b=[4]), update(5, 3, [-2, 4], b=[8])]
    fold = folded(updates, shared=shared)
    slopes = fold.slopes()
    assert slopes is not None
    after = fold.step(HELD, Entry(2, 0.1, slopes), SGD)
    assert_allclose(after.params["b"], [-0.2], rtol=1e-6)
    plain = folded([update(0, 1, [2, 0]), update(5, 3, [-2, 4])], shared=shared)
    assert same(after.params["w"], plain.step(HELD, Entry(2, 0.1, slopes), SGD).params["w"])
