"""What the torch engine alone has: masks as multiplications, and what it claims of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine.cases import CONV, masks_of, opened

from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.engine.torch import TorchEngine
from fedlean.layers import GroupNorm
from fedlean.spec import sequential


def test_memory_claim():
    """A mask costs memory here, and so does what a step needs beside the weights."""

    def claim(**settings) -> int:
        return opened(TorchEngine(1), CONV, **settings).peak_memory_bytes

    plain, weights = claim(), 4 * CONV.num_params
    assert claim(masks=masks_of(CONV)) > plain > 0
    assert claim(batch_size=50) > plain
    assert claim(sgd=SGD(0.1, momentum=0.9)) == plain + weights
    assert claim(sgd=SGD(0.1, proximal=0.1)) == plain + weights
    assert claim(sgd=SGD(0.1, momentum=0.9, proximal=0.1)) == plain + 2 * weights


def test_engines_by_name():
    engine = open_engine("torch", 1)
    assert (engine.name, engine.arithmetic) == ("torch", "masked")
    assert torch.get_num_threads() == 1
    with pytest.raises(ValueError, match="no engine named 'jax'"):
        open_engine("jax", 1)


def test_group_norm_of_single_values_is_its_bias():
    """torch.nn refuses it for a batch of one; no other engine has reason to."""
    spec = sequential((4,), [("gn", GroupNorm(groups=4))])
    params = {"gn.weight": np.ones(4, np.float32), "gn.bias": np.arange(4, dtype=np.float32)}
    session = opened(TorchEngine(1), spec, params)
    np.testing.assert_allclose(session.forward(np.ones((1, 4), np.float32))["gn"], [[0, 1, 2, 3]])
