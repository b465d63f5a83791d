"""Which tensors the last block has, and their gradient against PyTorch-style SGD's first step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from federation import ENGINE, SPEC, client_data, params

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.layers import Linear, ReLU
from fedlean.spec import sequential
from fedlean.train.last_block import exact_gradient, last_block


def in_blocks(**last: str):
    """SPEC with nodes in blocks of these names, the others in "body"."""
    return replace(
        SPEC, nodes=tuple(replace(n, block=last.get(n.name, "body")) for n in SPEC.nodes)
    )


def test_the_last_block_with_anything_to_train():
    assert last_block(in_blocks(fc2="head")) == ("fc2.weight", "fc2.bias")
    assert last_block(in_blocks(relu2="quiet")) == last_block(SPEC)  # a block with no weights
    both = last_block(in_blocks(fc1="head", relu2="head", fc2="head"))
    assert both == ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    unbiased = sequential((2,), [("a", Linear(2)), ("r", ReLU()), ("b", Linear(1, bias=False))])
    assert set(last_block(unbiased)) <= set(unbiased.param_shapes)


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("at_once", [8, 3])
def test_gradient_is_that_of_a_step(loss, at_once):
    """w - (w after SGD with lr 1), of kept weights alone; in parts of 3, 3 and 2, too."""
    spec = in_blocks(fc2="head")
    masks = {"fc2.weight": np.arange(36).reshape(3, 12) % 2 == 0}
    names = last_block(spec)
    ((x, y),) = client_data()[0].draw(steps=1, batch_size=8, seed=3)
    frozen = frozenset(spec.tensor_shapes.keys() - names)
    found = exact_gradient(
        ENGINE,
        spec,
        params(),
        SubModel(masks=masks, frozen=frozen),
        names,
        x,
        y,
        loss=loss,
        at_once=at_once,
    )

    session = ENGINE.open(
        spec, params(), SubModel(masks=masks), batch_size=8, optimizer=SGD(1.0), loss=loss
    )
    before = session.params(packed=True)
    session.step(x, y)
    after = session.params(packed=True)
    assert found.keys() == {"fc2.weight", "fc2.bias"} and found["fc2.weight"].shape == (18,)
    for name, value in found.items():
        np.testing.assert_allclose(value, before[name] - after[name], rtol=0, atol=1e-6)
