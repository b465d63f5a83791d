"""Same bits whatever the number of threads; on another instruction set, near."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from engine.cases import batch, masks_of, opened, start

from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.models.catalog import build

VARIABLE = "FEDLEAN_INSTRUCTION_SET"
EVERYTHING = SGD(0.02, momentum=0.9, weight_decay=0.01, clip_norm=1.0, proximal=0.1)
MODELS = {
    "lenet300": ((1, 28, 28), 10),
    "conv2": ((1, 28, 28), 62),
    "resnet8": ((3, 16, 16), 10),
    "mobilenetv3_small": ((3, 16, 16), 10),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fedlean._native") is None,
    reason="the native engine is not built: there is no fedlean._native",
)


def trained(engine, name, density, batch_size):
    """Everything that a few steps and one evaluation give."""
    spec = build(name, *MODELS[name])
    masks = masks_of(spec, density) if density < 1 else {}
    params = start(spec)
    session = opened(engine, spec, params, masks=masks, batch_size=batch_size, sgd=EVERYTHING)
    results = {}
    for i in range(2):
        x, y = batch(spec, batch_size - i, seed=i)
        results[f"loss {i}"] = np.float64(session.step(x, y, importance=i == 1))
    results |= {f"squares of {tensor}": sums for tensor, sums in session.importance().items()}
    results |= session.params()
    results["evaluated"] = np.float64(session.loss(*batch(spec, batch_size)))
    return results


def different(got, want):
    assert got.keys() == want.keys()
    return [name for name in want if got[name].tobytes() != want[name].tobytes()]


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_threads_gives_the_same_bits(name, density):
    alone = trained(open_engine("native", 1), name, density, 21)  # panels of 16 and 8, 3 idle
    for threads in (2, 5):
        assert not different(trained(open_engine("native", threads), name, density, 21), alone)


def test_a_difference_would_be_seen():
    engine = open_engine("native", 1)
    assert different(trained(engine, "lenet300", 0.3, 5), trained(engine, "lenet300", 0.3, 6))


@pytest.mark.parametrize("density", [1.0, 0.1])
@pytest.mark.parametrize("name", ["lenet300", "conv2"])
def test_instruction_sets_agree(monkeypatch, name, density):
    """Outputs and gradients of one pass; later steps would amplify what rounding began."""
    spec = build(name, *MODELS[name])
    masks = masks_of(spec, density) if density < 1 else {}
    x, _ = batch(spec, 20)
    found = {}
    for instruction_set in (None, *_others()):
        monkeypatch.delenv(VARIABLE, raising=False)
        if instruction_set:
            monkeypatch.setenv(VARIABLE, instruction_set)
        session = opened(open_engine("native", 1), spec, start(spec), masks=masks, batch_size=20)
        logits = session.forward(x, training=True)[spec.nodes[-1].name]
        entering = np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
        gradients = session.backward({spec.nodes[-1].name: entering}, dense=True)
        found[instruction_set] = {"logits": logits, **gradients}
    fastest = found.pop(None)
    assert found
    for instruction_set, got in found.items():
        for tensor, want in fastest.items():
            error = np.abs(got[tensor] - want).max() / np.abs(want).max()
            assert error <= 1e-5, (instruction_set, tensor, error)


def _others():
    """Instruction sets of this machine besides the fastest."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        fastest = open_engine("native", 1).instruction_set
        for name in ("reference", "avx2"):
            patch.setenv(VARIABLE, name)
            try:
                open_engine("native", 1)
            except ValueError:
                continue
            names.append(name)
    return [name for name in names if name != fastest]
