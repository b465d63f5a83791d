"""What TensorBoard would show."""

from __future__ import annotations

import struct
import sys

import pytest

from fedlean.report.tensorboard import tensorboard
from fedlean.runtime.config import RunConfig
from fedlean.runtime.how import How
from fedlean.runtime.run import start

pytest.importorskip("tensorboardX")


def scalars(path) -> dict[str, dict[int, float]]:
    """Of an event file: name -> step -> value; records are length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
        at += 16 + length
    return found


def test_the_curves_of_a_run(tmp_path):
    entries = []
    config = RunConfig("fedavg", rounds=3, clients=4, eval_every=2)
    with tensorboard(tmp_path / "events") as write:

        def watch(entry):
            entries.append(entry)
            write(entry)

        start(config, tmp_path / "run", How(watch))
    (file,) = (tmp_path / "events").iterdir()
    shown = scalars(file)
    evaluated = {e["round"]: e["accuracy"] for e in entries if e["accuracy"] is not None}
    assert shown["model/accuracy"] == pytest.approx(evaluated) and len(evaluated) == 2
    assert shown["total/uplink_bytes"][3] == entries[-1]["total"]["uplink_bytes"]
    assert shown["clients/refused"] == {1: 0.0, 2: 0.0, 3: 0.0}


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with (
        pytest.raises(ValueError, match=r"pip install 'fedlean\[tensorboard\]'"),
        tensorboard(tmp_path),
    ):
        pass
