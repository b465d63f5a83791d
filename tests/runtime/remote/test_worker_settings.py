"""A server's layer settings that would overflow the engine: a device says no, and lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from runtime.remote.test_worker import a_task, letter, reason, worker

from fedlean import spec as spec_module
from fedlean.core import SubModel
from fedlean.layers import Conv2d, Flatten, Layer, Linear, MaxPool2d
from fedlean.runtime.remote import envelope as env
from fedlean.runtime.remote.envelope import unseal
from fedlean.spec import sequential

HUGE = 1 << 30
HOSTILE: dict[str, Layer] = {
    "stride and padding": Conv2d(2, 3, stride=HUGE, padding=HUGE),
    "padding": Conv2d(2, 3, stride=1 << 20, padding=1 << 28),
    "stride": Conv2d(2, 3, stride=(1 << 31) - 1, padding=1),
    "pool": MaxPool2d(2, stride=(1 << 31) - 1),
}


@contextmanager
def no_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Specs are built as a server builds them that checks nothing but shapes."""

    def output_shape(layer: Conv2d, inputs: list[tuple[int, ...]]) -> tuple[int, ...]:
        sides = inputs[0][1:]
        k, s, p = layer.kernel_size, layer.stride, layer.padding
        return (layer.out_channels, *((side + 2 * p - k) // s + 1 for side in sides))

    with monkeypatch.context() as patched:
        patched.setattr(spec_module, "check_settings", lambda _: None)
        patched.setattr(Conv2d, "output_shape", output_shape)
        yield


def hostile_letter(layer: Layer) -> bytes:
    """A task with a mask, which makes the convolution a sparse one."""
    spec = sequential((1, 8, 8), [("odd", layer), ("flat", Flatten()), ("fc", Linear(3))])
    values = {name: np.zeros(shape, np.float32) for name, shape in spec.param_shapes.items()}
    masks = {name: np.zeros(spec.param_shapes[name], np.bool_) for name in spec.prunable}
    for mask in masks.values():
        mask.reshape(-1)[0] = True
    return letter(replace(a_task(spec, values), sub_model=SubModel(masks=masks)))


@pytest.mark.parametrize("name", HOSTILE)
def test_settings_that_overflow_are_refused(name, tmp_path, monkeypatch):
    with no_limits(monkeypatch):
        data = hostile_letter(HOSTILE[name])
    assert len(data) < 1500
    device = worker(tmp_path)
    assert "stride must be a positive integer of at most 1024" in reason(device.answer(data))
    assert unseal(device.answer(letter(a_task())), expected=(env.UPDATE,))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_engine_refuses_them_by_itself(name, tmp_path, monkeypatch):
    pytest.importorskip("fedlean._native")
    with no_limits(monkeypatch):
        device = worker(tmp_path, engine="native")
        why = reason(device.answer(hostile_letter(HOSTILE[name])))
    assert "layer 'odd'" in why or "incompatible function arguments" in why
    assert unseal(device.answer(letter(a_task())), expected=(env.UPDATE,))
