"""The second example of docs/adding-a-method.md, with both halves of its own."""

from __future__ import annotations

import numpy as np
from conformance import Case
from docs_examples import method_of
from federation import params, run, server

SGD_SETTINGS = {"lr": 0.05, "local_steps": 3, "batch_size": 8}
fedprox = method_of("fedprox")
CASE = Case(
    method=fedprox,
    settings={**SGD_SETTINGS, "mu": 2.0},
    knob={"mu": 0.5},
    neutral={**SGD_SETTINGS, "mu": 0.0},
    fedavg=SGD_SETTINGS,
    why_no_masks="it is dense",
)


def test_the_pull_keeps_clients_near_what_they_were_sent():
    far = [
        sum(float(np.square(state.params[name] - value).sum()) for name, value in params().items())
        for state in (run(fedprox(server(1), **SGD_SETTINGS, mu=mu)) for mu in (0.0, 10.0))
    ]
    assert far[1] < 0.8 * far[0]
