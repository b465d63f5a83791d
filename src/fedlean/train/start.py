"""What a method makes of the model that its run starts from."""

from __future__ import annotations

from fedlean.core import Model, Params


def dense_params(model: Model) -> Params:
    """The parameters, for a method that begins with all weights.

    Raises ValueError where the model has masks: they would be lost without a word.
    """
    if model.masks:
        raise ValueError(
            "this method begins with all weights, but the model it is to start from has masks: "
            "start from a dense one, or take a method that trains under given masks (fixed_mask, "
            "prunefl, ntk_zo, smartfreeze, profl, neulite)"
        )
    return model.params
