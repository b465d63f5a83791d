"""The first example of docs/adding-a-method.md: FedAvg with a server-side step size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from conformance import Case
from docs_examples import method_of
from federation import server

from fedlean.core import ClientUpdate, Model, SubModel
from fedlean.layers import BatchNorm, Conv2d, Flatten, Linear
from fedlean.models.initialise import init_params
from fedlean.spec import sequential

half_step = method_of("half_step")
CASE = Case(
    method=half_step,
    settings={"lr": 0.05},
    knob={"share": 0.25},
    neutral="half a step is never FedAvg's whole one to the bit",
    why_no_masks="it is dense",
)


def test_it_folds_running_variances_rightly():
    """Two clients of equal weight, means 0 and 2, variances 1 and 3: pooled 2 + 1; half of the way
    from 1 is 2.
    """
    layers = [("conv", Conv2d(1, 1)), ("norm", BatchNorm()), ("flat", Flatten()), ("fc", Linear(3))]
    spec = sequential((1, 2, 2), layers)
    algorithm = half_step(replace(server(), spec=spec))
    first = init_params(spec, 0)
    state = algorithm.init(Model(spec, first))
    updates = [
        ClientUpdate(
            client,
            5,
            {
                **first,
                "norm.running_mean": np.array([mean], np.float32),
                "norm.running_var": np.array([variance], np.float32),
            },
            SubModel(),
        )
        for client, mean, variance in ((0, 0, 1), (1, 2, 3))
    ]
    after = algorithm.server_update(state, updates).params
    assert after["norm.running_var"].tolist() == [2.0]
    assert after["norm.running_mean"].tolist() == [0.5]
