"""Cohort order whoever answers first, early answers on disk."""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from federation import SPEC, same
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean import wire
from fedlean.core import ClientTask, ClientUpdate, SubModel, Work
from fedlean.runtime.order import in_cohort_order
from fedlean.runtime.waiting import NoRoom

MASKS = {"fc1.weight": np.indices(SPEC.tensor_shapes["fc1.weight"]).sum(0) % 2 == 0}


def tasks(cohort: Iterable[int]) -> list[ClientTask]:
    one = ClientTask(4, "train", 0, 99, SPEC, {}, SubModel(masks=MASKS), {"lr": 0.1})
    return [replace(one, client=client) for client in cohort]


def update(client: int, mark: int = 1) -> ClientUpdate:
    return ClientUpdate(
        client,
        mark,
        {"fc2.bias": np.full(3, client, np.float32)},
        SubModel(masks=MASKS),
        metrics={"train_loss": client / 7},
        work=(Work(steps=2, batch_size=3, kept={"fc1.weight": 5}),),
    )


def test_every_permutation_of_four(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cohort = [3, 0, 7, 5]
    for arrival in itertools.permutations(cohort):
        ordered = list(in_cohort_order(map(update, arrival), tasks(cohort)))
        assert [each.client for each in ordered] == cohort
        for each in ordered:
            assert same(dict(each.params), dict(update(each.client).params))
            assert same(dict(each.sub_model.masks), MASKS)
            assert (each.metrics, each.work) == (update(each.client).metrics, update(0).work)
        assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(7)).flatmap(lambda ids: st.integers(1, 7).map(lambda n: ids[:n])),
    st.lists(st.integers(0, 9), max_size=14),
)
def test_drops_duplicates_and_strangers_and_skips_the_absent(cohort, arrival):
    """The first answer of each client counts; `mark` tells answers of one client apart."""
    sent = [update(client, mark) for mark, client in enumerate(arrival, start=1)]
    ordered = list(in_cohort_order(iter(sent), tasks(cohort)))
    first = {client: mark for mark, client in reversed(list(enumerate(arrival, start=1)))}
    expected = [(client, first[client]) for client in cohort if client in first]
    assert [(each.client, each.num_examples) for each in ordered] == expected


def test_nobody():
    assert list(in_cohort_order([], tasks([1, 2]))) == []
    assert list(in_cohort_order([update(1)], [])) == []


@pytest.mark.parametrize("size", [3, 12])
def test_early_answers_wait_on_disk(tmp_path, monkeypatch, size):
    """The last of the cohort first: no more than the update at hand is held, however many wait."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alive: list[weakref.ref] = []
    decoded: list[weakref.ref] = []
    real = wire.decode_update

    def counted(*arguments, **rest):
        made = real(*arguments, **rest)
        decoded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(wire, "decode_update", counted)
    most_waiting = 0

    def arriving() -> Iterator[ClientUpdate]:
        nonlocal most_waiting
        for client in reversed(range(size)):
            held = [ref for ref in alive if ref() is not None]
            assert len(held) <= 1
            most_waiting = max(most_waiting, len(list(tmp_path.glob("*/*"))))
            fresh = update(client)
            alive.append(weakref.ref(fresh))
            yield fresh
            del fresh

    for expected, each in enumerate(in_cohort_order(arriving(), tasks(range(size)))):
        assert each.client == expected
        assert sum(ref() is not None for ref in (*alive, *decoded)) <= 2  # at hand, and before it
        del each
    assert most_waiting >= size - 2
    assert len(decoded) == size - 1
    assert not list(tmp_path.iterdir())


def test_the_temporary_folder_goes_when_the_reader_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ordered = in_cohort_order(map(update, [2, 0, 1]), tasks([0, 1, 2]))
    assert next(ordered).client == 0
    assert list(tmp_path.iterdir())
    ordered.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_the_temporary_folder_goes_when_a_client_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def failing() -> Iterator[ClientUpdate]:
        yield update(1)
        assert len(list(tmp_path.glob("fedlean-updates-*/*"))) == 1
        raise RuntimeError("client 0 fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        list(in_cohort_order(failing(), tasks([0, 1])))
    assert not list(tmp_path.iterdir())


def full(waits: int):
    """A disk with room for so many files, and then none."""
    real, room = tempfile.mkstemp, iter(range(waits))

    def mkstemp(**where):
        descriptor, path = real(**where)
        if next(room, None) is None:
            os.close(descriptor)
            descriptor = os.open("/dev/full", os.O_WRONLY)
        return descriptor, path

    return mkstemp


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_an_update_for_which_the_disk_has_no_room_is_lost_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkstemp", full(1))
    lost: dict[int, str] = {}
    arrival = [3, 2, 0, 1]
    ordered = in_cohort_order(map(update, arrival), tasks(range(4)), lost.__setitem__)
    assert [each.client for each in ordered] == [0, 1, 3]
    assert lost == {
        2: "the server has no room for an update that came before its turn: No space left on "
        f"device: free space in {tmp_path}, or set TMPDIR to another folder"
    }
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "mkstemp", full(0))
    with pytest.raises(NoRoom, match="No space left"):  # nobody to tell it to
        list(in_cohort_order(map(update, arrival), tasks(range(4))))


def test_an_update_that_cannot_be_read_again_is_lost_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lost: dict[int, str] = {}

    def arriving() -> Iterator[ClientUpdate]:
        yield update(1)
        (path,) = tmp_path.glob("*/*")
        path.unlink()  # as by whatever tidies temporary folders
        yield update(0)

    ordered = in_cohort_order(arriving(), tasks([0, 1]), lost.__setitem__)
    assert [each.client for each in ordered] == [0]
    assert "No such file" in lost[1] and str(tmp_path) in lost[1]
