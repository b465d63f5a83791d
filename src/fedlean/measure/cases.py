"""Which densities are measured, and in which order.

As the PruneFL authors did, one layer's density varies while the others keep a middle one; beside
that all layers at the same density, and the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from fedlean.core import Masks, Params, generator
from fedlean.spec import ModelSpec

FIT_UP_TO = 0.5  # the native engine computes a Linear layer densely from 0.55, a Conv2d from 0.7
_BLOCK = 1 << 16  # coordinates drawn at once: a device has no room for a float per weight
UNIFORM, DENSE = "all layers", "dense"


@dataclass(frozen=True)
class Case:
    """One sub-model to time: what varies, and the density of every masked tensor."""

    varied: str  # a prunable tensor, UNIFORM or DENSE
    density: float  # of what varies
    densities: Mapping[str, float]  # by prunable tensor; empty: the dense model, without masks

    def __str__(self) -> str:
        return "the dense model" if self.varied == DENSE else f"{self.varied} at {self.density:g}"


@dataclass(frozen=True)
class Plan:
    """What to measure, the most useful first; without the `needed` first ones there is no fit."""

    cases: tuple[Case, ...]
    needed: int
    dense: Case
    base: Case  # all layers at the middle density, which those that do not vary keep


def plan(spec: ModelSpec, densities: Sequence[float]) -> Plan:
    """Raises ValueError when a density is no fraction, or fewer than three can be fitted."""
    if not spec.prunable:
        raise ValueError("the model has no layer that can be pruned: there is nothing to fit")
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"densities must lie in (0, 1], got {density:g}")
    ordered = sorted(set(densities))
    fitted = [density for density in ordered if density <= FIT_UP_TO]
    if len(fitted) < 3:
        raise ValueError(
            f"densities must hold at least three of at most {FIT_UP_TO:g}, where time is linear, "
            f"got {', '.join(f'{density:g}' for density in fitted) or 'none'}"
        )
    middle = fitted[(len(fitted) - 1) // 2]

    def uniform(density: float) -> Case:
        return Case(UNIFORM, density, dict.fromkeys(spec.prunable, density))

    def varying(*chosen: float) -> list[Case]:
        others = dict.fromkeys(spec.prunable, middle)
        return [Case(n, d, {**others, n: d}) for d in chosen for n in spec.prunable]

    dense, base = Case(DENSE, 1.0, {}), uniform(middle)
    first = [dense, base, *varying(fitted[-1], fitted[0])]
    inner = [d for d in ordered if d < 1 and d not in (middle, fitted[0], fitted[-1])]
    later = varying(1.0) if 1.0 in ordered else []
    later += [uniform(d) for d in ordered if d < 1 and d != middle] + varying(*inner)
    return Plan((*first, *later), len(first), dense, base)


def draw(spec: ModelSpec, case: Case) -> tuple[Params, Masks]:
    """Random masks, the same for the same tensor and density, and parameters in packed form.

    The kept values are as large as training would leave them, (K,) float32; no dense array of a
    masked tensor exists.
    """
    masks = {
        name: _mask(spec.param_shapes[name], density, _generator(f"mask/{name}/{density!r}"))
        for name, density in case.densities.items()
    }
    weights = {f"{node.name}.weight" for node in spec.weighted}
    params: dict[str, np.ndarray] = {}
    for name, shape in spec.tensor_shapes.items():
        if name in weights:
            mask = masks.get(name)
            kept = shape if mask is None else (int(np.count_nonzero(mask)),)
            inputs = max(1.0, prod(shape[1:]) * case.densities.get(name, 1.0))
            params[name] = _generator(name).random(kept, dtype=np.float32)
            params[name] -= np.float32(0.5)
            params[name] *= np.float32(2 / np.sqrt(inputs))
        else:  # biases and centres 0, scales and variances of norms 1
            one = name.endswith((".weight", ".running_var"))
            params[name] = np.full(shape, float(one), np.float32)
    return params, masks


def _mask(shape: tuple[int, ...], density: float, rng: np.random.Generator) -> np.ndarray:
    mask = np.empty(shape, np.bool_)
    flat = mask.reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        part = flat[at : at + _BLOCK]
        np.less(rng.random(part.size, dtype=np.float32), density, out=part)
    mask.setflags(write=False)  # as those that a client holds between rounds
    return mask


def _generator(purpose: str) -> np.random.Generator:
    return generator(0, 0, 0, f"profile/{purpose}")
