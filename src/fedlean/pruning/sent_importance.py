"""What of PruneFL's Σ g² goes up, and what a client keeps of it between rounds.

OURS: the paper (arXiv 1909.12326) sends all of it.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from fedlean.core import ClientState, Masks, Params
from fedlean.patterns.largest import largest
from fedlean.wire import round_bfloat16

_PREFIX, _SPAN = "importance/", "reconfigurations"  # in the client state


def largest_sums(sums: Params, masks: Masks, multiple: float, dtype: str) -> dict[str, np.ndarray]:
    """Per masked tensor the `multiple` · kept largest; 0 stands for the others.

    multiple: 0 for all of them; dtype: "bf16" rounds what is sent to bfloat16
    """
    sent = dict(sums)
    for name, mask in masks.items():
        count = ceil(multiple * np.count_nonzero(mask))
        if multiple and count < mask.size:
            chosen = largest(sums[name].ravel(), count).reshape(mask.shape)
            sent[name] = sums[name] * chosen
    if dtype == "bf16":
        return {name: round_bfloat16(values) for name, values in sent.items()}
    return sent


def accumulated(importance: Params, state: ClientState, span: int) -> dict[str, np.ndarray]:
    """This round's sums on top of those in `state`; sums of another span or slice are dropped.

    span: number of reconfigurations so far
    """
    known = state.get(_SPAN)
    held = {name: state.get(_PREFIX + name) for name in importance}
    alike = all(
        one is not None and one.shape == importance[name].shape for name, one in held.items()
    )
    if known is None or int(known) != span or not alike:
        return dict(importance)
    return {name: values + state[_PREFIX + name] for name, values in importance.items()}


def kept_sums(sums: Params, span: int) -> dict[str, np.ndarray]:
    """As client state, which `accumulated` reads."""
    return {**{_PREFIX + name: values for name, values in sums.items()}, _SPAN: np.array(span)}
