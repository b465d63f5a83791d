"""The participant selector: sketches, communities, places, utilities, draws."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from fedlean.algorithm import Device
from fedlean.core import derive_seed
from fedlean.freezing.selection import (
    LEAST,
    NEIGHBOURS,
    SKETCH,
    Heard,
    check_louvain,
    choose,
    communities,
    draw,
    nobody,
    places,
    remember,
    sketch,
    system_term,
    utility,
)
from fedlean.train.cohort import sample_cohort

DRAWS = 3000


def these(*ids: int) -> list[Device]:
    return [Device(client) for client in ids]


def axis(at: int, length: float = 1.0) -> np.ndarray:
    made = np.zeros(SKETCH, np.float32)
    made[at] = length
    return made


def heard(sketches, examples=1, squared_loss=1.0):
    return {client: Heard(one, examples, squared_loss) for client, one in sketches.items()}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_sketch_keeps_cosines_but_for_its_error():
    """Over many pairs the error has mean 0 and a deviation of about 1/√k."""
    rng, errors = np.random.default_rng(0), []
    for seed in range(60):
        first, noise = rng.normal(size=(2, 700)).astype(np.float32)
        second = (0.6 * first + 0.8 * noise).astype(np.float32)
        made = [
            sketch({"w": one[:400].reshape(20, 20), "b": one[400:]}, seed)
            for one in (first, second)
        ]
        errors.append(cosine(*made) - cosine(first, second))
    assert abs(np.mean(errors)) < 3 / np.sqrt(SKETCH * 60)
    assert 0.3 / np.sqrt(SKETCH) < np.std(errors) < 1.5 / np.sqrt(SKETCH)


def test_a_sketch_is_linear_small_and_of_its_seed():
    moves = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float32)}
    made = sketch(moves, 5)
    assert made.shape == (SKETCH,) and made.dtype == np.float32
    # each coordinate is in one sum, with a sign
    assert np.abs(made).sum() <= 66 + 3 and (made.sum() - 69) % 2 == 0
    np.testing.assert_array_equal(sketch({k: 2 * v for k, v in moves.items()}, 5), 2 * made)
    np.testing.assert_array_equal(sketch(dict(reversed(moves.items())), 5), made)
    assert not np.array_equal(sketch(moves, 6), made)
    assert not sketch({"w": np.zeros((3, 4), np.float32)}, 5).any()


def two_groups(count: int, seed: int = 0) -> np.ndarray:
    """Sketches (2·count, k) around two directions with a cosine of 0.3, in turn."""
    rng = np.random.default_rng(seed)
    centres = np.stack([axis(0), 0.3 * axis(0) + np.sqrt(1 - 0.09) * axis(1)])
    noise = 0.01 * rng.normal(size=(2 * count, SKETCH))
    lengths = rng.uniform(0.1, 10, (2 * count, 1))  # a cosine does not see them
    return (lengths * (np.tile(centres, (count, 1)) + noise)).astype(np.float32)


@pytest.mark.parametrize("count", [2, 5, 4 * NEIGHBOURS])  # the last: some edges only
def test_two_clear_groups_are_two_communities(count):
    found = communities(two_groups(count), seed=3)
    assert found.tolist() == [0, 1] * count


def test_clients_without_anything_in_common_are_alone():
    lone = np.stack([axis(0), axis(1), -axis(0), np.zeros(SKETCH, np.float32), axis(1, 7.0)])
    assert communities(lone, seed=0).tolist() == [0, 1, 2, 3, 1]
    assert communities(axis(0)[None], seed=0).tolist() == [0]


def test_what_is_remembered_is_the_last_answer_of_each_in_any_order():
    sketches = {0: axis(0), 1: axis(1), 2: axis(0, 5.0), 3: axis(1) + axis(2)}
    known = remember(nobody(), heard({3: sketches[3], 0: sketches[0]}, 7, 4.0), 1)
    known = remember(known, heard({0: sketches[2], 1: sketches[1]}, 9, 1.0), 1)
    assert known["clients"].tolist() == [0, 1, 3]
    np.testing.assert_array_equal(known["sketches"], [sketches[2], sketches[1], sketches[3]])
    assert known["examples"].tolist() == [9, 9, 7]
    assert known["squared_losses"].tolist() == [1.0, 1.0, 4.0]
    assert known["communities"].tolist() == [0, 1, 1]
    other = remember(nobody(), heard(dict(reversed(sketches.items()))), 1)
    again = remember(nobody(), heard(sketches), 1)
    assert all(np.array_equal(other[key], again[key]) for key in again)
    assert remember(known, {}, 1) is known


def test_utility_by_hand():
    """|B| sqrt(mean loss²): 20 examples with losses 3 and 4 in equal parts."""
    assert utility(20, (9 + 16) / 2) == pytest.approx(20 * 3.5355339, rel=1e-7)
    assert utility(20, 0.0) == 0.0


def test_system_term_by_hand():
    """T is the median, 4 s; who takes 8 s is worth (4/8)² of it, who is quick no more than 1."""
    seconds = np.array([1.0, 4.0, 4.0, 8.0, 16.0])
    assert system_term(seconds, 2.0).tolist() == [1, 1, 1, 1 / 4, 1 / 16]
    assert system_term(seconds, 0.0).tolist() == [1] * 5
    assert system_term(np.zeros(3), 2.0).tolist() == [1] * 3


@pytest.mark.parametrize("sizes", [[5], [4, 4, 2], [1, 9], [1, 1, 1, 1, 3]])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_places_are_shared_exactly_over_all_draws(sizes, share):
    total = sum(sizes)
    count = max(1, int(share * total))
    each = np.array([places(sizes, count, at) for at in range(total)])
    assert (each.sum(1) == count).all()
    assert (each <= sizes).all() and (each >= 0).all()
    assert each.sum(0).tolist() == [count * size for size in sizes]
    exact = np.array(sizes) * count / total
    assert (np.abs(each - exact) < 1).all()


def test_equal_utilities_are_the_uniform_draw_itself():
    devices = these(2, 3, 5, 7, 11, 13)
    known = remember(nobody(), heard({one.id: axis(0) for one in devices}, 8, 0.25), 1)
    assert set(known["communities"]) == {0}
    for round in range(50):
        uniform = sample_cohort(devices, 3, seed=9, round=round)
        assert draw(devices, 3, [0.7] * 6, seed=9, round=round) == uniform
        for before in (nobody(), known):
            chosen = choose(devices, 3, before, [2.0] * 6, penalty=2.0, seed=9, round=round)
            assert chosen == uniform


def frequencies(devices, size, known, seconds, seed=4):
    """Of the devices over many rounds, in their order."""
    counts = Counter[int]()
    for round in range(DRAWS):
        chosen = choose(devices, size, known, seconds, penalty=1.0, seed=seed, round=round)
        assert len(set(chosen)) == size and chosen == sorted(chosen)
        counts.update(chosen)
    return np.array([counts[device.id] / DRAWS for device in devices])


def test_equal_utilities_draw_everyone_alike_whatever_the_communities():
    """Communities of 4, 2 and 1, and two not heard from: 4 of 9 each time."""
    devices = these(*range(9))
    sketches = {client: axis(0) for client in range(4)}
    sketches |= {4: axis(1), 5: axis(1), 6: axis(2)}
    known = remember(nobody(), heard(sketches), 0)
    assert known["communities"].tolist() == [0, 0, 0, 0, 1, 1, 2]
    found = frequencies(devices, 4, known, [1.0] * 9)
    # four deviations of a share over so many draws
    assert (np.abs(found - 4 / 9) < 4 * np.sqrt(4 / 9 * 5 / 9 / DRAWS)).all()


def test_draws_go_by_utility_within_a_community_and_by_size_between_them():
    """One place each for {0, 1} and {2, 3}; client 1 has thrice the examples, client 3 half the
    speed of the median."""
    devices = these(0, 1, 2, 3)
    known = remember(
        nobody(),
        {
            0: Heard(axis(0), 10, 4.0),
            1: Heard(axis(0), 30, 4.0),
            2: Heard(axis(1), 99, 9.0),
            3: Heard(axis(1), 99, 9.0),
        },
        0,
    )
    found = frequencies(devices, 2, known, [1.0, 1.0, 1.0, 2.0])
    expected = [1 / 4, 3 / 4, 2 / 3, 1 / 3]
    assert (np.abs(found - expected) < 4 * np.sqrt(0.25 / DRAWS)).all()


def test_who_was_not_heard_from_gets_its_share_and_slow_ones_less_of_it():
    """Clients 0 to 2 are known and very useful; 3 to 5 are not known, of whom 5 is slow."""
    devices = these(*range(6))
    known = remember(nobody(), heard({client: axis(0) for client in range(3)}, 1000, 100.0), 0)
    found = frequencies(devices, 2, known, [1.0] * 5 + [4.0])
    assert abs(found[:3].sum() - 1) < 1e-9 and abs(found[3:].sum() - 1) < 1e-9
    expected = np.array([1 / 3, 1 / 3, 1 / 3, 4 / 9, 4 / 9, 1 / 9])
    assert (np.abs(found - expected) < 4 * np.sqrt(0.25 / DRAWS)).all()


def test_nobody_is_ruled_out_by_a_loss_of_nothing():
    devices = these(0, 1, 2)
    assert draw(devices, 3, [0.0, 1.0, 0.0], seed=0, round=1) == [0, 1, 2]
    for round in range(20):
        assert 1 in draw(devices, 2, [0.0, 1.0, 0.0], seed=0, round=round)
        uniform = sample_cohort(devices, 2, seed=0, round=round)
        assert draw(devices, 2, [0.0] * 3, seed=0, round=round) == uniform
    assert 0 < LEAST < 1e-3


def test_several_communities_do_not_draw_alike():
    """Each has a stream of its own; the same one would draw the same places in each."""
    devices = these(*range(8))
    sketches = {client: axis(client // 4) for client in range(8)}
    known = remember(nobody(), heard(sketches), 0)
    pairs = {
        tuple(choose(devices, 2, known, [1.0] * 8, penalty=1.0, seed=2, round=round))
        for round in range(100)
    }
    assert {(a, b - 4) for a, b in pairs if b >= 4 > a} > {(a, a) for a in range(4)}
    assert derive_seed(2, 1, 0, "community") != derive_seed(2, 1, 1, "community")


def test_all_are_taken_where_there_are_no_more():
    def never():
        raise AssertionError("nobody needs to know how fast they are")
        yield

    assert choose(these(4, 1), 2, nobody(), never(), penalty=1.0, seed=0, round=1) == [1, 4]


def test_without_networkx_the_remedy_is_named(monkeypatch):
    check_louvain()
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ValueError, match=r"pip install 'fedlean\[sim\]', or set select=false"):
        check_louvain()
