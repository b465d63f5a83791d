"""Does a converted module compute, and train, what the original does?

Tracing cannot see everything: `x += y` on a tensor that is read again, torch.no_grad, autocast, an
autograd function with a backward of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fedlean.core import generator


def verify(
    original: nn.Module,
    converted: nn.Module,
    example: torch.Tensor,
    trained: Mapping[str, torch.Tensor],
) -> None:
    """ValueError unless both give the same outputs, and gradients of the same parameters.

    `trained` are the original's trainable tensors, by the names that they have in `converted`.
    """
    noise = _drawn(example.shape)  # examples are often zeros, which show nothing
    with _calling(original, example), torch.no_grad():
        outputs = [original(x.clone()) for x in (example, noise)]
    with torch.no_grad():
        for x, expected in zip((example, noise), outputs, strict=True):
            _compare_outputs(original, expected, converted(x))
    weights, own = _drawn(outputs[1].shape), dict(converted.named_parameters())
    with _calling(original, example):
        gradients = _gradients(original, noise.clone(), weights, list(trained.values()))
    again = _gradients(converted, noise, weights, [own[name] for name in trained])
    _compare_gradients(list(trained), gradients, again)


@contextmanager
def _calling(original: nn.Module, x: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the user's forward raises, or its backward
        kind, reason = type(original).__name__, str(error).partition("\n")[0]
        raise ValueError(f"{kind} fails on inputs of shape {tuple(x.shape)}: {reason}") from error


def _drawn(shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(generator(0, 0, 0, "verify").standard_normal(shape, np.float32))


def _gradients(
    module: nn.Module, x: torch.Tensor, weights: torch.Tensor, tensors: list[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Of (module(x) · weights).sum(); None where none flows."""
    output = module(x)
    if not tensors or not output.requires_grad:
        return [None] * len(tensors)
    return list(torch.autograd.grad(output, tensors, weights, allow_unused=True))


def _compare_outputs(original: nn.Module, expected: torch.Tensor, got: torch.Tensor) -> None:
    kind = type(original).__name__
    if expected.dtype != got.dtype:
        raise ValueError(f"{kind} computes {expected.dtype}, a spec float32: remove autocast")
    if not torch.allclose(expected, got, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            f"{kind} computes something else than its layers, by up to "
            f"{(expected - got).abs().max():.3g}: look for in-place arithmetic such as x += y on a "
            "tensor that another layer reads, and write x = x + y"
        )


def _compare_gradients(
    names: list[str], expected: list[torch.Tensor | None], got: list[torch.Tensor | None]
) -> None:
    largest = max((float(g.norm()) for g in got if g is not None), default=0.0)
    for name, first, second in zip(names, expected, got, strict=True):
        if first is None and second is not None:
            raise ValueError(
                f"{name!r} gets no gradient although it requires one: set requires_grad=False, or "
                "remove the torch.no_grad() around its layer"
            )
        if first is None or second is None:
            continue
        off = float((first.reshape(second.shape) - second).norm())
        # the second term: rounding, where a gradient is 0 (a bias before a GroupNorm)
        if off > 1e-2 * float(second.norm()) + 1e-5 * largest:
            raise ValueError(
                f"{name!r} gets another gradient than from its layers: remove autograd functions "
                "with a backward of their own"
            )
