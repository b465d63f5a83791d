"""What the native engine alone has: equal bits for any number of threads, and instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine.cases import BLOCK, CONV, FULL_SGD, NET, batch, masks_of, opened, start
from federation import same

from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedlean.spec import ModelSpec, sequential

pytestmark = pytest.mark.usefixtures("has_native")
PATHS = ["reference", "avx2", "avx512", "neon"]  # instruction sets that there are kernels for
CPU_FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"}}


# layers large enough to be cut between threads
LARGE = sequential(
    (8, 14, 14),
    [
        ("conv1", Conv2d(40, 3, padding=1)),
        ("relu1", ReLU()),
        ("conv2", Conv2d(48, 5, padding=2)),
        ("pool", MaxPool2d(2)),
        ("flat", Flatten()),
        ("fc1", Linear(200)),
        ("relu2", ReLU()),
        ("fc2", Linear(10)),
    ],
)


def trained(spec: ModelSpec, threads: int, masks, size: int) -> tuple:
    """All that a session computes, through every kind of call."""
    engine = open_engine("native", threads)
    session = opened(engine, spec, masks=masks, sgd=FULL_SGD, batch_size=size)
    losses = []
    for step in range(3):
        x, y = batch(spec, size, step)
        losses.append(session.step(x, y, importance=step != 1))
        losses.append(session.loss(x, y))
    out = session.forward(x, taps=list(spec.by_name), training=True)
    output = spec.nodes[-1].name
    gradients = session.backward({output: np.ones_like(out[output])}, dense=True)
    session.apply(gradients)
    session.forward(x, training=True)
    session.descend({output: np.ones_like(out[output])}, importance=True)
    return losses, out, gradients, session.importance(), session.params()


def test_a_session_leaves_nothing_to_the_next():
    """Its patterns and memory serve again; momentum, sums and the enlarged arena do not."""
    masks = masks_of(NET, 0.3)
    used = open_engine("native", 1)
    for _ in range(2):
        session = opened(used, NET, start(NET, 3), masks=masks, sgd=FULL_SGD)
        first = opened(open_engine("native", 1), NET, start(NET, 3), masks=masks, sgd=FULL_SGD)
        assert session.held_bytes == first.held_bytes
        assert session.peak_memory_bytes == first.peak_memory_bytes
        x, y = batch(NET, 5, 0)
        assert session.step(x, y) == first.step(x, y)
        assert session.step(x, y, importance=True) == first.step(x, y, importance=True)
        assert same(session.importance(), first.importance())
        assert same(session.params(), first.params())
        native = session.native
        del session
    assert opened(used, NET, start(NET), masks=masks, sgd=FULL_SGD).native is native


@pytest.mark.parametrize(
    "change",
    [{"sgd": SGD(0.2)}, {"batch_size": 6}, {"loss": "bce"}, {"frozen": ["fc.bias"]}],
    ids=str,
)
def test_another_session_is_built_anew(change):
    """Also one with as many kept weights elsewhere, and one beside a session in use."""
    masks = masks_of(CONV, 0.3)
    flipped = {name: mask[::-1].copy() for name, mask in masks.items()}
    engine, x, y = open_engine("native", 1), *batch(CONV, 5, 0)
    for settings in ({"masks": flipped}, {"masks": masks, **change}):
        opened(engine, CONV, start(CONV), masks=masks).step(x, y)
        got = opened(engine, CONV, start(CONV), **settings)
        want = opened(open_engine("native", 1), CONV, start(CONV), **settings)
        assert got.step(x, y) == want.step(x, y)
        assert same(got.params(), want.params())
    one, other = (opened(engine, CONV, start(CONV), masks=masks) for _ in range(2))
    one.step(x, y)
    assert not same(one.params(), other.params())


@pytest.mark.parametrize("size", [1, 5, 33, 64])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_equal_bits_for_any_number_of_threads(density, size):
    masks = masks_of(NET, density)
    expected = trained(NET, 1, masks, size)
    for threads in (1, 2, 3, 7):
        assert same(trained(NET, threads, masks, size), expected), threads


@pytest.mark.parametrize(("density", "size"), [(0.03, 20), (0.2, 17), (0.7, 5)])
def test_equal_bits_of_large_layers(density, size):
    masks = masks_of(LARGE, density)
    expected = trained(LARGE, 1, masks, size)
    for threads in (1, 2, 3):
        assert same(trained(LARGE, threads, masks, size), expected), threads


def test_equal_bits_without_masks():
    for spec in (NET, BLOCK):
        assert same(trained(spec, 1, {}, 20), trained(spec, 2, {}, 20))


def test_sessions_of_several_threads_side_by_side():
    """Sessions share the engine's threads; each computes as if it were alone."""
    engine, masks = open_engine("native", 2), masks_of(NET, 0.3)
    sessions = [opened(engine, NET, masks=masks, sgd=FULL_SGD) for _ in range(3)]
    for step in range(3):
        losses = {session.step(*batch(NET, 5, step)) for session in sessions}
        assert len(losses) == 1
    assert all(same(session.params(), sessions[0].params()) for session in sessions)


# Instruction sets, each in a process of its own, since one process has one

PROGRAM = """
import sys
sys.path[:0] = {path!r}
import numpy as np
from engine.cases import BLOCK, FULL_SGD, NET, batch, masks_of, opened
from fedlean.engine.open import open_engine

engine = open_engine("native", 1)
results = {{}}
for spec, size, density in (
    (NET, 5, 0.1), (NET, 16, 0.3), (NET, 33, 0.05), (NET, 20, 1.0),
    (BLOCK, 6, 0.3), (BLOCK, 17, 1.0),
):
    masks = masks_of(spec, density)
    session = opened(engine, spec, masks=masks, sgd=FULL_SGD, batch_size=size)
    losses = [session.step(*batch(spec, size, s), importance=True) for s in range(2)]
    named = {{"loss": np.array(losses), **session.params()}}
    named |= {{f"importance {{n}}": v for n, v in session.importance().items()}}
    results |= {{f"{{size}} {{name}}": value for name, value in named.items()}}
np.savez(sys.argv[1], **results)
print(engine.instruction_set)
"""


def run_on(instruction_set: str, file: Path) -> subprocess.CompletedProcess:
    program = PROGRAM.format(path=sys.path)
    environment = os.environ | {"FEDLEAN_INSTRUCTION_SET": instruction_set}
    command = [sys.executable, "-c", program, str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    file = tmp_path_factory.mktemp("paths") / "reference.npz"
    done = run_on("reference", file)
    assert (done.returncode, done.stdout.strip()) == (0, "reference"), done.stderr
    return dict(np.load(file))


def cpu_flags() -> set[str]:
    """Of the first core; none where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = [line for line in lines if line.startswith(("flags", "Features"))]
    return set(found[0].partition(":")[2].split()) if found else set()


@pytest.mark.parametrize("path", PATHS[1:])
def test_paths_agree_with_the_reference(reference, path, tmp_path):
    done = run_on(path, tmp_path / "results.npz")
    if done.returncode and path in done.stderr:  # refused by name: not of this machine
        assert not CPU_FLAGS.get(path, {"asimd"}) <= cpu_flags(), done.stderr
        pytest.skip(f"{path} is not of this machine")
    assert (done.returncode, done.stdout.strip()) == (0, path), done.stderr
    results = dict(np.load(tmp_path / "results.npz"))
    assert set(results) == set(reference)
    for name, expected in reference.items():
        doubled = 2 if "importance" in name else 1  # a square's relative error is
        near = doubled * 1e-5 * np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(results[name], expected, rtol=0, atol=near, err_msg=name)


def test_an_unknown_path_is_refused(tmp_path):
    done = run_on("abacus", tmp_path / "results.npz")
    assert done.returncode == 1
    assert "ValueError" in done.stderr and "abacus" in done.stderr
