"""The memory plan: known when a session opens, before the arena is allocated, and kept exactly."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from engine.cases import batch, masks_of, opened, start

from fedlean.core import SubModel
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Linear
from fedlean.models.catalog import build
from fedlean.spec import sequential

MB = 10**6
IMAGES = {"conv2": ((1, 28, 28), 62), "lenet300": ((1, 28, 28), 10)}
MODELS = ["conv2", "lenet300", "vgg11", "resnet8", "resnet18", "mobilenetv3_small"]
MOMENTUM = SGD(0.01, momentum=0.9)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fedlean._native") is None,
    reason="the native engine is not built: there is no fedlean._native",
)


@pytest.fixture(scope="module")
def native():
    return open_engine("native", 2)


@cache
def model(name):
    spec = build(name, *IMAGES.get(name, ((3, 32, 32), 10)))
    return spec, start(spec)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("name", MODELS)
def test_plan_is_what_is_held(native, name, density):
    spec, params = model(name)
    masks = masks_of(spec, density) if density < 1 else {}
    for batch_size in (1, 20, 33):
        session = opened(native, spec, params, masks=masks, batch_size=batch_size, sgd=MOMENTUM)
        planned = session.peak_memory_bytes
        assert session.held_bytes < planned  # weights alone, no arena yet
        x, y = batch(spec, min(batch_size, 2))  # memory is for batch_size whatever comes
        session.step(x, y)
        assert session.held_bytes == planned == session.peak_memory_bytes
        session.step(x, y, importance=True)
        assert session.held_bytes == session.peak_memory_bytes > planned


@pytest.mark.parametrize(
    "sgd",
    [SGD(0.1), SGD(0.1, 0.9), SGD(0.1, proximal=0.1), SGD(0.1, 0.9, 0.1, 1.0, 0.1)],
    ids=["plain", "momentum", "proximal", "everything"],
)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_plan_counts_what_the_optimizer_keeps(native, sgd, density):
    spec, params = model("resnet8")
    masks = masks_of(spec, density) if density < 1 else {}
    session = opened(native, spec, params, masks=masks, sgd=sgd)
    planned = session.peak_memory_bytes
    for _ in range(3):
        session.step(*batch(spec))
    assert session.held_bytes == planned


def test_plan_of_a_frozen_prefix(native):
    spec, params = model("conv2")
    frozen = [name for name in spec.param_shapes if name.startswith("conv")]
    session = opened(native, spec, params, frozen=frozen, batch_size=20, sgd=MOMENTUM)
    whole = opened(native, spec, params, batch_size=20, sgd=MOMENTUM)
    planned = session.peak_memory_bytes
    assert planned < whole.peak_memory_bytes
    session.step(*batch(spec, 20))
    assert session.held_bytes == planned


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_forward_only_plan_is_what_is_held(native, name, density):
    spec, params = model(name)
    sub_model = SubModel(masks=masks_of(spec, density) if density < 1 else {})
    for batch_size, at_once in ((1, 1), (20, 2), (33, 1)):
        session = native.open_forward(
            spec, params, sub_model, batch_size=batch_size, directions_at_once=at_once
        )
        planned = session.peak_memory_bytes
        assert session.held_bytes < planned
        x, y = batch(spec, min(batch_size, 2))
        session.losses_perturbed(x, y, seed=0, ks=[0, 1, 2], sigma=0.1)
        session.loss(x, y)
        assert session.held_bytes == planned == session.peak_memory_bytes


def test_plan_by_hand(native):
    """fc 2 -> 3 without anything else, dense, B=1: weights, velocity and the arena are all."""
    spec = sequential((2,), [("fc", Linear(3))])
    plain = opened(native, spec, batch_size=1, sgd=SGD(0.1))
    momentum = opened(native, spec, batch_size=1, sgd=SGD(0.1, momentum=0.9))
    weights = 4 * (2 * 3 + 3)
    assert plain.held_bytes == weights
    assert momentum.held_bytes == 2 * weights
    assert momentum.peak_memory_bytes - plain.peak_memory_bytes == weights


# glibc keeps freed memory to use it again; what the program frees before it measures must go back.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
GROWTH = """
import json
from engine.cases import batch, masks_of, packed, start
from fedlean.core import SubModel
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.models.catalog import build

def resident(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

engine = open_engine("native", 2)
spec = build("resnet18", (3, 32, 32), 10)
masks = masks_of(spec, 0.3)
params = packed(start(spec), masks)
x, y = batch(spec, 20)
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # sets VmHWM to what is resident now
before = resident("VmRSS")
sub_model = SubModel(masks=masks)
session = engine.open(spec, params, sub_model, batch_size=20, optimizer=SGD(0.01, momentum=0.9))
for _ in range(2):
    session.step(x, y, importance=True)
grown = resident("VmHWM") - before
print(json.dumps({"planned": session.peak_memory_bytes, "grown": grown}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM, which is Linux's")
def test_process_grows_by_the_plan():
    """Opening and training: the peak, with whatever opening takes for a moment, in 10 MB."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH],
        cwd=Path(__file__).parents[1],  # where `engine` is
        env=os.environ | GIVE_BACK,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    took = json.loads(done.stdout)
    assert took["planned"] > 100 * MB  # otherwise 10 MB would say little
    assert abs(took["grown"] - took["planned"]) < 10 * MB
