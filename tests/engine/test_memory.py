"""The memory model against live bytes of the torch engine, and against hand-computed storage."""

from __future__ import annotations

import numpy as np
import pytest
from live_memory import peak_bytes

from fedlean.core import SubModel
from fedlean.engine.memory import step_memory
from fedlean.engine.protocol import SGD
from fedlean.engine.torch import TorchEngine
from fedlean.layers import Flatten, Linear
from fedlean.models import catalog
from fedlean.models.initialise import init_params
from fedlean.spec import sequential

SHAPES = {"lenet300": (1, 28, 28), "conv2": (1, 28, 28), "vgg11": (3, 32, 32)}
SHAPES |= {"resnet8": (3, 32, 32), "resnet20": (3, 32, 32)}


@pytest.mark.parametrize("model", sorted(SHAPES))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_claim_is_within_15_percent_of_live_bytes(model, momentum, masked):
    spec = catalog.build(model, SHAPES[model], 10)
    params = init_params(spec, 0)
    masks = {}
    if masked:
        masks = {name: np.ones(spec.param_shapes[name], bool) for name in spec.prunable}
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, *SHAPES[model])).astype(np.float32)
    y = rng.integers(0, 10, 8)

    def train() -> None:
        session = TorchEngine(1).open(
            spec, params, SubModel(masks=masks), batch_size=8, optimizer=SGD(0.01, momentum)
        )
        session.step(x, y, importance=masked)
        session.step(x, y, importance=masked)

    claim = step_memory(
        spec,
        dict.fromkeys(masks, 0),
        batch_size=8,
        optimizer_floats=1 if momentum else 0,
        importance=masked,
        sparse=False,
    ).peak_bytes
    measured = peak_bytes(train)
    assert abs(claim - measured) <= 0.15 * measured, (claim, measured)


def test_sparse_storage_by_hand():
    """Linear 100x10, no bias, 50 kept: value 4 + momentum 4 + row 2 = 10 bytes each, 500 in all.

    Batch 3: the input, 300 floats, is saved; the output's gradient is 30 floats.
    Importance: 1000 sums and a dense gradient of 1000: 8000 bytes.
    """
    spec = sequential((100,), [("flat", Flatten()), ("fc", Linear(10, bias=False))])
    memory = step_memory(spec, {"fc.weight": 50}, batch_size=3, optimizer_floats=1, importance=True)
    assert memory.parameter_bytes == 500
    assert memory.importance_bytes == 8000
    assert memory.activation_bytes == 300 * 4
    assert memory.peak_bytes == 500 + 8000 + 300 * 4 + 30 * 4


def test_sparse_storage_is_never_worse_than_dense():
    spec = sequential((100,), [("flat", Flatten()), ("fc", Linear(10, bias=False))])
    dense = step_memory(spec, {}, batch_size=1).parameter_bytes
    assert dense == 4000, "a Linear layer is updated in place"
    assert step_memory(spec, {"fc.weight": 1000}, batch_size=1).parameter_bytes <= dense
