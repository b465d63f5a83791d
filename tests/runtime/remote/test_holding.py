"""What a run expects and a device holds: compared at the greeting, said on both sides."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from federation import (
    CLIENTS,
    client_data,
    dataset,
    devices,
    first_model,
    fresh_dispatch,
    run,
    server,
)
from loopback import Loopback, remote

from fedlean.algorithm import FederatedAlgorithm
from fedlean.data.batches import ClientData
from fedlean.data.dataset import Dataset
from fedlean.methods.fedavg import fedavg
from fedlean.runtime.record import StepRecord
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.dispatch import NobodyThere
from fedlean.runtime.remote.envelope import Envelope, seal, unseal
from fedlean.runtime.remote.holding import Holding, expected_by, held_by, mismatch
from fedlean.runtime.remote.worker import Worker

PIXELS = Holding((1, 8, 8), ("0", "1", "2"), (0.0, 1.0))
SIGNAL = replace(PIXELS, value_range=(-3.0, 2.0))


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (PIXELS, PIXELS),
        (replace(PIXELS, classes=("2",)), PIXELS),
        (replace(PIXELS, classes=("2", "0")), PIXELS),
        (replace(PIXELS, value_range=(0.2, 0.8)), PIXELS),
        (SIGNAL, SIGNAL),
        (replace(SIGNAL, value_range=(-0.5, 20.0)), SIGNAL),
        (replace(SIGNAL, value_range=(0.0, 0.4)), SIGNAL),
        (replace(PIXELS, value_range=(0.0, 0.0)), replace(PIXELS, value_range=(0.0, 0.0))),
    ],
)
def test_what_fits(held, expected):
    assert mismatch(held, expected) is None


@pytest.mark.parametrize(
    ("held", "expected", "said"),
    [
        (replace(PIXELS, input_shape=(3, 8, 8)), PIXELS, ["(3, 8, 8)", "(1, 8, 8)"]),
        (replace(PIXELS, classes=("1", "7")), PIXELS, ["'1', '7'", "'0', '1', '2'", "renamed"]),
        (replace(PIXELS, value_range=(0.0, 240.0)), PIXELS, ["0..240", "0..1", "divided by"]),
        (replace(PIXELS, value_range=(-1.0, 1.0)), PIXELS, ["-1..1", "0..1"]),
        (replace(PIXELS, value_range=(0.0, 1 / 255)), PIXELS, ["0..0.0039", "0..1"]),
        (replace(SIGNAL, value_range=(-3000.0, 2000.0)), SIGNAL, ["-3000..2000", "-3..2"]),
        (replace(SIGNAL, value_range=(0.0, 0.002)), SIGNAL, ["0..0.002", "-3..2"]),
    ],
)
def test_what_does_not_fit_names_both_sides(held, expected, said):
    reason = mismatch(held, expected)
    assert reason is not None and all(part in reason for part in said), reason


def test_a_share_holds_the_classes_of_its_own_examples():
    whole = dataset()
    only = np.flatnonzero(whole.y_train == 2)[:5]
    assert held_by(ClientData(whole, only)).classes == (whole.class_names[2],)
    assert expected_by(whole).classes == whole.class_names


# Over a network


def everybody() -> FederatedAlgorithm:
    return fedavg(server(2), lr=0.05, local_steps=1, batch_size=4)


class Odd(Loopback):
    """Client 2 is another device than the others."""

    def __init__(self, folder, data: ClientData | None = None, **settings):
        super().__init__(folder)
        self.workers[102] = Worker(
            folder / "odd",
            data or client_data()[2],
            **{"client": 2, "engine": "native", **settings},
        )


def with_float_pixels(data: Dataset) -> Dataset:
    """From 0 to 255 where the others have bytes."""
    train, test = (x.astype(np.float32) for x in (data.x_train, data.x_test))
    return replace(data, x_train=train, x_test=test, scale=1.0)


def test_a_device_with_other_values_is_told_before_the_first_round(tmp_path, caplog):
    held = client_data()[2]
    raw = ClientData(with_float_pixels(held.dataset), held.indices)
    dispatch, lines = remote(Odd(tmp_path, raw))
    with caplog.at_level(logging.ERROR, "fedlean"), pytest.raises(NobodyThere) as gone:
        run(everybody(), dispatch=dispatch)
    assert f"{CLIENTS - 1} of {CLIENTS} clients are connected" in str(gone.value)
    assert "refused: node 102: its values lie in 0..2" in str(gone.value)
    (line,) = [line for line in lines if "cannot take part" in line]
    assert line.startswith("node 102") and "the run expects 0..1" in line
    told = [record.message for record in caplog.records]
    assert told and all("cannot take part" in each and "expects 0..1" in each for each in told)


def test_the_note_of_a_refusal_is_in_the_log(tmp_path):
    held = client_data()[2]
    names = ("0", "1", "nine")
    other = replace(held.dataset, class_names=names)
    dispatch, _ = remote(Odd(tmp_path, ClientData(other, held.indices)), min_clients=1)
    records: list[StepRecord] = []
    run(everybody(), dispatch=dispatch, watch=lambda p, r: records.append(r))
    notes = [line for record in records for line in record.notes]
    assert any("node 102 cannot take part" in line and "'nine'" in line for line in notes), notes


def test_classes_in_another_order_are_mapped(tmp_path):
    """The device counts its classes otherwise; the names are the same, and so is every bit."""
    held = client_data()[2]
    turned = held.dataset.with_classes(held.dataset.class_names[::-1])
    assert not np.array_equal(turned.y_train, held.dataset.y_train)
    dispatch, _ = remote(Odd(tmp_path, ClientData(turned, held.indices)))
    state = run(everybody(), dispatch=dispatch)
    plain = run(everybody(), dispatch=fresh_dispatch(everybody()))
    assert all(np.array_equal(state.params[name], plain.params[name]) for name in plain.params)


def test_a_task_names_the_classes_so_that_a_fresh_process_maps_them_too(tmp_path):
    """A stock node starts one for every message; and other names are refused in it, for good."""
    held = client_data()[0]
    worker = Worker(tmp_path, held, client=0, engine="native")
    dispatch, _ = remote(Loopback(tmp_path / "others"))
    task = everybody().configure(everybody().init(first_model()), devices())[0]
    letter = unseal(dispatch._letter(task, 0.0), expected=(env.TASK,))
    good = worker.answer(seal(Envelope(env.TASK, {**letter.fields, "run": "a1"}, letter.body)))
    assert unseal(good, expected=(env.UPDATE,))
    other = {**letter.fields, "run": "a1", "classes": ["a", "b", "c"]}
    trouble = unseal(
        worker.answer(seal(Envelope(env.TASK, other, letter.body))), expected=(env.TROUBLE,)
    )
    assert trouble.fields["final"] and "'a', 'b', 'c'" in trouble.fields["reason"]


def test_class_names_that_cannot_be_sent_are_found_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "MAX_JSON_BYTES", 60)
    with pytest.raises(ValueError, match=r"fields take .* bytes, the limit is 60"):
        remote(Loopback(tmp_path))


# Who a device is


def test_who_a_device_is_stays_the_same_in_its_folder(tmp_path):
    def identity(folder, **settings) -> str:
        hello = {"run": "a1", **PIXELS.to_fields(), "refused": None}
        worker = Worker(folder, client_data()[0], client=0, engine="native", **settings)
        answer = worker.answer(seal(Envelope(env.HELLO, hello)))
        return unseal(answer, expected=(env.WELCOME,)).fields["device"]

    first = identity(tmp_path / "a")
    assert identity(tmp_path / "a") == first != identity(tmp_path / "b")
    assert (tmp_path / "a" / "identity").stat().st_mode & 0o077 == 0
    (tmp_path / "a" / "identity").write_bytes(b"\xff torn")
    assert identity(tmp_path / "a") != first
    assert identity(tmp_path / "a", identity="SHA256:x") == "SHA256:x"
