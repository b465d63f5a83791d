"""Estimates, optimiser steps and replay: by hand, masked, and the same bits in another process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fedlean.engine.directions import direction, normals
from fedlean.train.forward_updates import (
    Entry,
    Held,
    Rule,
    Space,
    advance,
    averaged,
    estimate,
    log_arrays,
    only_where,
    read_log,
    replay,
    round_seed,
)

F = np.float32
SHAPES = {"fc.weight": (4, 6), "fc.bias": (4,)}
MASK = np.arange(24).reshape(4, 6) % 3 == 0


def test_estimate_by_hand():
    """(2 z_0 - z_1) / 2, on kept coordinates of the weight and on all of the bias."""
    found = estimate(7, np.array([2.0, -1.0]), Space(SHAPES, {"fc.weight": MASK}, "gaussian"))

    for name, shape in SHAPES.items():
        mask = MASK if name == "fc.weight" else None
        z = [direction(7, k, name, shape, mask, "gaussian") for k in range(2)]
        assert_array_equal(found[name], (F(2) * z[0] + F(-1) * z[1]) / F(2))
    assert found["fc.weight"].shape == (8,) and found["fc.bias"].shape == (4,)
    assert found["fc.weight"].dtype == np.float32


def step(rule: Rule, held: Held, g: list[float], scalars: list[float] | None = None) -> Held:
    given = np.array(scalars or [1.0, 3.0], F)
    return advance(held, {"w": np.array(g, F)}, rule, 0.5, given)


def test_adam_by_hand():
    """First step: m̂ = g, v̂ = g², so w moves by lr·sign(g).  Second with the opposite gradient:

    m = 0.9·0.1·2 - 0.1·2 = -0.02, m̂ = -0.02 / 0.19; v = 4·0.0199, v̂ = 4.
    """
    held = step(Rule("adam"), Held({"w": np.array([1.0, 1.0], F)}), [2.0, -2.0])
    assert_allclose(held.params["w"], [0.5, 1.5], rtol=1e-6)

    held = step(Rule("adam"), held, [-2.0, 2.0])
    moved = 0.5 * (0.02 / 0.19) / 2
    assert_allclose(held.params["w"], [0.5 + moved, 1.5 - moved], rtol=1e-5)
    assert held.steps == 2
    assert_allclose(held.moments["first"]["w"], [-0.02, 0.02], rtol=1e-5)
    assert_allclose(held.moments["second"]["w"], [0.0796, 0.0796], rtol=1e-5)


def test_momentum_by_hand():
    """v = 2, then 0.5·2 + 2 = 3; w = 1 - 0.5·2 - 0.5·3."""
    rule = Rule("momentum", 0.5)
    held = step(rule, step(rule, Held({"w": np.array([1.0], F)}), [2.0]), [2.0])

    assert held.params["w"] == F(-1.5) and held.moments["velocity"]["w"] == F(3)


def test_normalised_by_hand():
    """Scalars 1, 3 have the deviation 1; ten times as steep, the step is as long."""
    rule = Rule("normalised")
    gentle = step(rule, Held({"w": np.array([1.0], F)}), [2.0], [1.0, 3.0])
    steep = step(rule, Held({"w": np.array([1.0], F)}), [20.0], [10.0, 30.0])

    assert gentle.params["w"] == steep.params["w"] == F(0)
    assert not gentle.moments
    assert step(rule, Held({"w": np.array([1.0], F)}), [2.0], [3.0, 3.0]).params["w"] == F(0)


def test_tensors_without_a_gradient_stay():
    held = Held({"w": np.ones(2, F), "buffer": np.ones(3, F)})
    after = step(Rule("adam"), held, [1.0, 1.0])
    assert after.params["buffer"] is held.params["buffer"]
    assert_array_equal(held.params["w"], 1)  # and the argument is as it was


def test_average_by_hand():
    found = averaged({"w": np.array([1.0], F)}, {"w": np.array([3.0], F)}, 0.75)
    assert_array_equal(found["w"], [1.5])


SPACE = Space(SHAPES, {"fc.weight": MASK}, "gaussian")


def start() -> Held:
    return Held({"fc.weight": np.linspace(-1, 1, 8, dtype=F), "fc.bias": np.zeros(4, F)})


def entries(rounds: int) -> list[Entry]:
    return [Entry(r, 0.01, normals(r, 5)) for r in range(1, rounds + 1)]


def digest(held: Held) -> str:
    tensors: list[Mapping[str, np.ndarray]] = [held.params, *held.moments.values()]
    data = b"".join(group[name].tobytes() for group in tensors for name in sorted(group))
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "normalised"])
def test_replay_is_the_rounds_one_by_one(optimizer):
    rule, log = Rule(optimizer), entries(8)
    at_once = replay(start(), log, seed=11, space=SPACE, rule=rule)

    held = start()
    for entry in log:
        gradient = estimate(round_seed(11, entry.round), entry.scalars, SPACE)
        held = advance(held, gradient, rule, entry.lr, entry.scalars)
    assert digest(held) == digest(at_once)

    first = replay(start(), log[:3], seed=11, space=SPACE, rule=rule)
    sent = read_log(log_arrays(log[3:]))
    assert digest(replay(first, sent, seed=11, space=SPACE, rule=rule)) == digest(at_once)
    assert at_once.steps == 8


def test_a_round_without_answers_moves_nothing():
    log = [Entry(1, 0.0, np.zeros(5, F))]
    assert replay(start(), log, seed=11, space=SPACE, rule=Rule()).steps == 0


def test_log_travels_whole():
    log = [*entries(2), Entry(3, 0.0, np.zeros(5, F))]
    for sent, got in zip(log, read_log(log_arrays(log)), strict=True):
        assert (got.round, got.lr) == (sent.round, float(F(sent.lr)))
        assert_array_equal(got.scalars, sent.scalars)
    assert read_log({}) == []


REPLAY = """
import sys
sys.path[:0] = {paths!r}
from test_forward_updates import *
rule = Rule({optimizer!r})
print(digest(replay(start(), entries(8), seed=11, space=SPACE, rule=rule)))
"""


@pytest.mark.parametrize("optimizer", ["adam", "normalised"])
def test_another_process_replays_the_same_bits(optimizer):
    here = replay(start(), entries(8), seed=11, space=SPACE, rule=Rule(optimizer))
    script = REPLAY.format(paths=[str(Path(__file__).parent), *sys.path], optimizer=optimizer)

    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert found.stdout.strip() == digest(here), found.stderr


def test_the_bits_of_a_replay_never_change():
    """By Adam, with masks: what every machine must come to."""
    held = replay(start(), entries(8), seed=11, space=SPACE, rule=Rule("adam"))
    assert digest(held)[:16] == "d0de38f7fbdbbcc6"


def test_a_rule_names_what_is_wrong():
    with pytest.raises(ValueError, match="optimizer must be one of adam, momentum, normalised"):
        Rule("sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 0.9999\]"):
        Rule("momentum", 1.0)


def test_what_did_not_move_keeps_value_and_moments():
    """The second of three coordinates; a tensor without an entry is the later one."""
    before = Held({"w": np.float32([1, 2, 3]), "b": np.float32([4])}, {}, 6)
    moments = {"velocity": {"w": np.float32([7, 8, 9]), "b": np.float32([5])}}
    after = Held({"w": np.float32([-1, -2, -3]), "b": np.float32([-4])}, moments, 7)
    moved = {"w": np.array([True, False, True])}
    mixed = only_where(before, after, moved)
    assert mixed.params["w"].tolist() == [-1, 2, -3] and mixed.params["b"].tolist() == [-4]
    assert mixed.moments["velocity"]["w"].tolist() == [7, 0, 9] and mixed.steps == 7
    again = only_where(mixed, after, moved)
    assert again.moments["velocity"]["w"].tolist() == [7, 0, 9]
    assert only_where(before, after, {"w": np.ones(3, bool)}).params["w"] is after.params["w"]
    assert all(values.dtype == np.float32 for values in mixed.moments["velocity"].values())
