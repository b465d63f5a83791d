"""The extension defends itself: calls that its callers would never make get a ValueError.

`tests/native/fuzz.py` makes many more, under address checks; here are those that have reasons.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

_native = pytest.importorskip("fedlean._native")

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "proximal": 0.0, "clip_norm": 0.0}
NONE = [None] * 4
UNTRAINED, DENSE = [False] * 4, [-1] * 4


def linear(outputs: int = 3, inputs: int = 4) -> Any:
    network = _native.Network([inputs])
    network.add("fc", "Linear", [-1], [outputs], bias=True)
    return network


def image(sides: list[int] | None = None) -> Any:
    return _native.Network(sides or [2, 6, 6])


def session(network: Any, trainable: Any, kept: Any, batch_size: int = 2) -> Any:
    tables = {"trainable": trainable, "kept": kept, "loss": "ce", "batch_size": batch_size}
    return _native.Session(_native.Engine(1), network, **tables, **SGD)


def forward_session(network: Any, trainable: Any, kept: Any, batch_size: int = 2) -> Any:
    tables = {"trainable": trainable, "kept": kept, "loss": "ce", "batch_size": batch_size}
    return _native.ForwardSession(_native.Engine(1), network, directions_at_once=1, **tables)


def trained(kept: int = -1) -> Any:
    """A Linear 4 -> 3, not built yet."""
    return session(linear(), [[True, True, False, False]], [[kept, -1, -1, -1]])


HUGE = 1 << 30
BAD_LAYERS = {
    "overflow": (
        "Conv2d",
        [2, 2, 2],
        {"kernel": (3, 3), "stride": (HUGE, HUGE), "padding": (HUGE, HUGE)},
    ),
    "stride": ("Conv2d", [2, 1, 1], {"kernel": (3, 3), "stride": (1025, 1025)}),
    "padding": ("Conv2d", [2, 2054, 2054], {"kernel": (3, 3), "padding": (1025, 1025)}),
    "window": ("Conv2d", [2, 1, 1], {"kernel": (7, 7)}),
    "groups": ("Conv2d", [2, 6, 6], {"groups": 3}),
    "shape of a convolution": ("Conv2d", [2, 5, 6], {}),
    "shape of a pool": ("MaxPool2d", [2, 4, 4], {"kernel": (2, 2), "stride": (2, 2)}),
    "kernel of a max pool": (
        "MaxPool2d",
        [2, 1, 1],
        {"kernel": (2, 129), "padding": (1, 64), "stride": (9, 9)},
    ),
    "padding of a pool": ("AvgPool2d", [2, 7, 7], {"kernel": (2, 2), "padding": (2, 2)}),
    "groups of a norm": ("GroupNorm", [2, 6, 6], {"groups": 3}),
    "eps": ("BatchNorm", [2, 6, 6], {"eps": 0.0}),
    "momentum": ("BatchNorm", [2, 6, 6], {"momentum": float("nan")}),
    "a window that is not its": ("ReLU", [2, 6, 6], {"kernel": (2, 2)}),
    "groups that are not its": ("Linear", [3], {"groups": 5}),
    "a vector wanted": ("Linear", [3], {}),
    "flat": ("Flatten", [71], {}),
    "empty": ("ReLU", [0, 6, 6], {}),
    "negative": ("ReLU", [-2, -6, 6], {}),
    "two axes": ("ReLU", [2, 36], {}),
    "a rectangle": ("Conv2d", [2, 5, 4], {"kernel": (3, 2)}),
    "dilation": ("Conv2d", [2, 2, 2], {"kernel": (3, 3), "dilation": (1, 2)}),
    "dilation of a pool": ("AvgPool2d", [2, 3, 3], {"kernel": (2, 2), "dilation": (2, 2)}),
    "too much dilation": ("Conv2d", [2, 6, 6], {"dilation": (1, 1025)}),
    "bounds": ("Hardtanh", [2, 6, 6], {"low": 1.0, "high": 1.0}),
    "a bound beyond": ("Hardtanh", [2, 6, 6], {"low": 0.0, "high": 1e30}),
    "slope": ("LeakyReLU", [2, 6, 6], {"low": float("nan")}),
    "p": ("Dropout", [2, 6, 6], {"p": 1.0}),
    "p that is not its": ("ReLU", [2, 6, 6], {"p": 0.5}),
    "one joined": ("Concat", [2, 6, 6], {}),
    "one input": ("Add", [2, 6, 6], {}),
}


def test_a_key_for_each_layer_that_draws():
    network = linear()
    network.add("drop", "Dropout", [0], [3], p=0.5)
    held = session(network, [[False] * 4] * 2, [[-1] * 4] * 2)
    held.build(0, [None] * 4)
    x, y = np.ones((2, 4), np.float32), np.zeros(2, np.int64)
    for keys in ([], [1, 2]):
        with pytest.raises(ValueError, match="a key is needed for each of the 1 layers"):
            held.step(x, y, [], keys)
    assert np.isfinite(held.step(x, y, [], [1]))


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_a_layer_that_is_not_possible_is_refused(name):
    kind, shape, settings = BAD_LAYERS[name]
    with pytest.raises(ValueError, match=r"layer 'odd'|shapes are"):
        image().add("odd", kind, [-1], shape, **settings)


def test_a_layer_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="'odd': its weight is too large"):
        linear(1 << 15, 1 << 15).add("odd", "Linear", [0], [(1 << 15) + 1])
    with pytest.raises(ValueError, match="'odd': its shape is empty or too large"):
        image().add("odd", "Conv2d", [-1], [1 << 22, 6, 6])
    for sides in ([1 << 27], [1 << 14, 1 << 14, 1], [0], [-1, -1, 1]):
        with pytest.raises(ValueError, match="the input's shape is empty or too large"):
            image(sides)


def test_a_network_and_a_sum_have_limits():
    network = image()
    with pytest.raises(ValueError, match="'odd': takes 1 to 256 inputs"):
        network.add("odd", "Add", [-1] * 257, [2, 6, 6])
    for i in range(4096):
        network.add(f"n{i}", "ReLU", [-1], [2, 6, 6])
    with pytest.raises(ValueError, match="'odd': a network has at most 4096 layers"):
        network.add("odd", "ReLU", [-1], [2, 6, 6])


def test_zeros_around_images_count():
    """120 images of 100 x 100 fit; with 1012 zeros on each side they do not."""
    network = image([120, 100, 100])
    network.add("wide", "Conv2d", [-1], [1, 1101, 1101], kernel=(1024, 1024), padding=(1012, 1012))
    with pytest.raises(ValueError, match="'wide': images with the zeros around them"):
        session(network, [UNTRAINED], [DENSE])


BAD_TABLES = {
    "kept of more": ([UNTRAINED], [[13, -1, -1, -1]]),
    "kept of huge": ([UNTRAINED], [[1 << 62, -1, -1, -1]]),
    "kept of negative": ([UNTRAINED], [[-2, -1, -1, -1]]),
    "kept of no tensor": ([UNTRAINED], [[-1, -1, 0, -1]]),
    "trained without a tensor": ([[False, False, True, False]], [DENSE]),
    "short": ([UNTRAINED], []),
    "narrow": ([[False]], [DENSE]),
}


@pytest.mark.parametrize("make", [session, forward_session])
@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_do_not_fit_are_refused(name, make):
    with pytest.raises(ValueError):
        make(linear(), *BAD_TABLES[name])


@pytest.mark.parametrize("make", [session, forward_session])
@pytest.mark.parametrize("batch_size", [0, -1, (1 << 20) + 1, (1 << 31) - 1])
def test_a_batch_size_that_overflows_is_refused(batch_size, make):
    with pytest.raises(ValueError, match="batch_size must be from 1 to 1048576"):
        make(linear(), [UNTRAINED], [DENSE], batch_size)


@pytest.mark.parametrize("threads", [-5, 0, 1025, 2**31 - 1])
def test_impossible_threads_are_refused(threads):
    with pytest.raises(ValueError, match="threads must be from 1 to 1024"):
        _native.Engine(threads)


def test_an_array_beyond_the_machine_is_no_plan():
    """2^20 examples of 2^26 elements."""
    network = image([1 << 20, 8, 8])
    network.add("relu", "ReLU", [-1], [1 << 20, 8, 8])
    with pytest.raises(MemoryError):
        session(network, [UNTRAINED], [DENSE], 1 << 20)


def test_nothing_runs_before_it_is_built():
    held, values = trained(kept=3), np.ones(12, np.float32)
    for call in (
        lambda: held.gradient(0, 0, values, False),
        lambda: held.set_gradient(0, 0, values),
        lambda: held.apply([0], [0]),
        lambda: held.read(0, 0, values, False),
        lambda: held.read_mask(0, 0, np.ones(12, np.bool_)),
    ):
        with pytest.raises(ValueError, match="not built yet"):
            call()


def test_a_mask_of_other_bytes_is_a_mask():
    """A byte of 3 is one kept weight, whatever NumPy says that it is."""
    held = trained(kept=3)
    bytes_ = np.zeros(12, np.uint8)
    bytes_[[1, 5]] = 3, 1  # sum 4, two kept
    with pytest.raises(ValueError, match="mask keeps another number"):
        held.build(0, [bytes_.view(np.bool_), None, None, None])
    bytes_[7] = 255
    held.build(0, [bytes_.view(np.bool_), None, None, None])
    mask = np.zeros(12, np.bool_)
    held.read_mask(0, 0, mask)
    assert np.flatnonzero(mask).tolist() == [1, 5, 7]


@pytest.mark.parametrize(
    "mask", [np.ones(12, np.float32), np.ones((12, 2), np.bool_)[:, 0], "mask", 1], ids=repr
)
def test_a_mask_of_another_kind_is_refused(mask):
    with pytest.raises(ValueError, match="C-contiguous array of bool"):
        trained(kept=12).build(0, [mask, None, None, None])


def misaligned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 1, np.uint8)
    return raw[1:].view(dtype).reshape(shape)


def test_arrays_at_odd_addresses_are_refused():
    held, x, y = trained(), np.ones((2, 4), np.float32), np.array([0, 1])
    held.build(0, NONE)
    odd = misaligned((3, 4))
    held.forward(x, [0], True, [])
    for call in (
        lambda: held.load(0, 0, odd, False, True),
        lambda: held.read(0, 0, odd, False),
        lambda: held.squares(0, 0, odd),
        lambda: held.set_gradient(0, 0, odd),
        lambda: held.activation(0, misaligned((2, 3))),
        lambda: held.backward([0], [misaligned((2, 3))], False),
        lambda: held.descend([0], [misaligned((2, 3))], []),
        lambda: held.step(misaligned((2, 4)), y, [], []),
        lambda: held.step(x, misaligned((2,), np.int64), [], []),
    ):
        with pytest.raises(ValueError, match="not aligned in memory"):
            call()


def test_a_running_mean_is_no_weight_to_step():
    """Momentum has no room for it."""
    network = image()
    network.add("bn", "BatchNorm", [-1], [2, 6, 6])
    held = session(network, [[True, True, True, True]], [DENSE])
    held.build(0, NONE)
    for call in (
        lambda: held.set_gradient(0, 2, np.ones(2, np.float32)),
        lambda: held.apply([0], [2]),
    ):
        with pytest.raises(ValueError, match="the tensor is not trained"):
            call()


@pytest.mark.parametrize(("name", "plain"), [("backward", False), ("descend", [])])
def test_backward_follows_a_training_forward(name, plain):
    held, x = trained(), np.ones((2, 4), np.float32)
    call, gradient = getattr(held, name), np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="not for training"):
        call([], [], plain)
    held.build(0, NONE)
    held.forward(x, [0], False, [])
    with pytest.raises(ValueError, match="not for training"):
        call([0], [gradient], plain)
    held.forward(x, [0], True, [])
    for nodes, gradients, match in (
        ([0], [], "gradients has 0 elements, expected 1"),
        ([1], [gradient], "not tapped by the last forward"),
        ([-1], [gradient], "not tapped by the last forward"),
        ([0], [gradient[:1]], "gradient has 3 elements, expected 6"),
    ):
        with pytest.raises(ValueError, match=match):
            call(nodes, gradients, plain)
    call([0], [gradient], plain)
    with pytest.raises(ValueError, match="there was no forward"):
        call([], [], plain)
    with pytest.raises(ValueError, match="not tapped by the last forward"):
        call([0], [gradient], plain)


def test_an_image_of_one_pixel_gives_no_logits():
    network = image([2, 1, 1])
    network.add("conv", "Conv2d", [-1], [3, 1, 1])
    held = session(network, [[True, False, False, False]], [DENSE])
    held.build(0, NONE)
    with pytest.raises(ValueError, match="one logit per class"):
        held.step(np.ones((2, 2, 1, 1), np.float32), np.array([0, 1]), [], [])


def test_labels_are_copied_before_they_are_checked():
    """Another thread writes one out of range while a step runs."""
    held = session(linear(8, 256), [[True, True, False, False]], [DENSE], 512)
    held.build(0, NONE)
    x, y, stop = np.ones((512, 256), np.float32), np.zeros(512, np.int64), threading.Event()

    def write() -> None:
        while not stop.is_set():
            y[-1] = -(1 << 29)
            y[-1] = 0

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    refused = 0
    for _ in range(300):
        try:
            assert np.isfinite(held.step(x, y, [], []))
        except ValueError:
            refused += 1
    stop.set()
    writer.join()
    assert refused < 300
