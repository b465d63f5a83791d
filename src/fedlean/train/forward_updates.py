"""From the scalars of a round to the next model: what server and clients compute alike.

Everything here is float32 additions, products, quotients and square roots of arrays, each rounded
on its own and in a fixed order, so a model replayed from the scalars is that of the server, bit for
bit on every machine.
"""

# K directions, R rounds

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from fedlean.core import Masks, Params, derive_seed
from fedlean.engine.directions import Kind, direction
from fedlean.layers import Shape
from fedlean.train.hyperparameters import in_range, one_of

Optimizer = Literal["adam", "momentum", "normalised"]
ADAM = (0.9, 0.99, 1e-8)  # β1, β2, ε


@dataclass(frozen=True)
class Rule:
    """How an estimate moves the model.

    adam        Kingma and Ba, ICLR 2015, Algorithm 1, with β = 0.9, 0.99 and ε = 1e-8
    momentum    v <- momentum·v + ĝ,  w <- w - lr·v
    normalised  w <- w - lr·ĝ / s, s the standard deviation of the round's K scalars.  For Gaussian
                and ±1 directions s estimates ‖g‖, so the length of a step does not depend on that
                of the gradient.

    Raises ValueError naming the field that is out of range.
    """

    optimizer: Optimizer = "adam"
    momentum: float = 0.9

    def __post_init__(self) -> None:
        one_of("optimizer", self.optimizer, get_args(Optimizer))
        in_range("momentum", self.momentum, 0.0, 0.9999)


@dataclass(frozen=True)
class Held:
    """A model in training; of masked tensors the kept values alone (K,)."""

    params: Params
    moments: Mapping[str, Params] = field(default_factory=dict)  # the optimiser's, by group
    steps: int = 0  # taken by the optimiser


@dataclass(frozen=True)
class Entry:
    """One round of the scalar log."""

    round: int
    lr: float  # 0: nobody answered, and nothing moves
    scalars: np.ndarray  # float32 (K,): Σ_n p_n c_n


@dataclass(frozen=True)
class Space:
    """The coordinates that the directions span: tensors' shapes, masks, and how z is drawn."""

    shapes: Mapping[str, Shape]
    masks: Masks
    kind: Kind


def round_seed(seed: int, round: int, client: int = 0) -> int:
    """Of a round's directions; they are the same for all clients unless a client is named."""
    return derive_seed(seed, round, client, "directions")


def estimate(seed: int, scalars: np.ndarray, space: Space) -> dict[str, np.ndarray]:
    """ĝ = (1/K) Σ_k c_k z_k: float32 (kept,) of each masked tensor, the others in their shapes.

    scalars: c, (K,)
    """

    def drawn(k: int, name: str) -> np.ndarray:
        shape, mask = space.shapes[name], space.masks.get(name)
        return direction(seed, k, name, shape, mask, space.kind)

    flat = combine(scalars, space.shapes, drawn)
    return {
        name: value if name in space.masks else value.reshape(space.shapes[name])
        for name, value in flat.items()
    }


def combine(
    scalars: np.ndarray, names: Iterable[str], drawn: Callable[[int, str], np.ndarray]
) -> dict[str, np.ndarray]:
    """(1/K) Σ_k c_k z_k for z_k = drawn(k, name), float32 (n,), summed in the order of k."""
    c = np.asarray(scalars, np.float32)
    total = {}
    for name in names:
        z = drawn(0, name)
        sums = c[0] * z
        for k in range(1, len(c)):
            sums += c[k] * drawn(k, name)
        total[name] = sums / np.float32(len(c))
    return total


def advance(held: Held, gradient: Params, rule: Rule, lr: float, scalars: np.ndarray) -> Held:
    """One step of the optimiser along `gradient`, in the form that `held` has.

    lr: taken in float32, as the log has it; scalars: those of the round, for "normalised".
    Tensors without a gradient stay.
    """
    steps = held.steps + 1
    moments = {group: dict(held.moments.get(group, {})) for group in groups(rule)}
    params = dict(held.params)
    length = np.float32(lr)
    if rule.optimizer == "normalised":
        length = np.float32(float(length) / (_deviation(scalars) or 1.0))
    for name, g in gradient.items():
        before = [moments[group].get(name, np.zeros_like(g)) for group in moments]
        if rule.optimizer == "adam":
            after, step = _adam(before[0], before[1], g, steps)
        elif rule.optimizer == "momentum":
            after = [np.float32(rule.momentum) * before[0] + g]
            step = after[0]
        else:
            after, step = [], g
        params[name] = params[name] - length * step
        for group, value in zip(moments, after, strict=True):
            moments[group][name] = value
    return Held(params, moments, steps)


def only_where(before: Held, after: Held, moved: Masks) -> Held:
    """`after` at the coordinates that are True in `moved`, and `before` bit for bit elsewhere.

    So with the moments, which are 0 where `before` has none.  Both are dense; a tensor without an
    entry in `moved` is that of `after`.
    """

    def mixed(old: Params, new: Params) -> dict[str, np.ndarray]:
        return {
            name: np.where(moved[name], value, old.get(name, np.float32(0)))
            if name in moved and not moved[name].all()
            else value
            for name, value in new.items()
        }

    moments = {
        group: mixed(before.moments.get(group, {}), tensors)
        for group, tensors in after.moments.items()
    }
    return Held(mixed(before.params, after.params), moments, after.steps)


def groups(rule: Rule) -> tuple[str, ...]:
    """What the optimiser holds of each trained tensor, besides its value."""
    return {"adam": ("first", "second"), "momentum": ("velocity",)}.get(rule.optimizer, ())


def replay(held: Held, entries: Sequence[Entry], *, seed: int, space: Space, rule: Rule) -> Held:
    """The model after the rounds of `entries`, of one that took part in all rounds before them.

    seed: the run's, from which each round's follows (`round_seed`)
    """
    for entry in entries:
        if entry.lr:
            gradient = estimate(round_seed(seed, entry.round), entry.scalars, space)
            held = advance(held, gradient, rule, entry.lr, entry.scalars)
    return held


def averaged(average: Params, params: Params, decay: float) -> dict[str, np.ndarray]:
    """decay·average + (1 - decay)·params, the moving average of the models."""
    a, b = np.float32(decay), np.float32(1 - decay)
    return {name: a * average[name] + b * value for name, value in params.items()}


def log_arrays(entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Entries of rounds in a row as they travel: the first round, lr (R,), scalars (R, K)."""
    return {
        "first": np.array([entries[0].round], np.int64),
        "lr": np.array([entry.lr for entry in entries], np.float32),
        "scalars": np.stack([entry.scalars for entry in entries]).astype(np.float32),
    }


def read_log(arrays: Params) -> list[Entry]:
    """The inverse of `log_arrays`; of no arrays, no entries."""
    if not arrays:
        return []
    first = int(arrays["first"][0])
    pairs = zip(arrays["lr"], arrays["scalars"], strict=True)
    return [Entry(first + i, float(lr), scalars) for i, (lr, scalars) in enumerate(pairs)]


def _adam(
    first: np.ndarray, second: np.ndarray, g: np.ndarray, steps: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Moments after the step, and m̂ / (√v̂ + ε)."""
    beta1, beta2, epsilon = ADAM
    m = np.float32(beta1) * first + np.float32(1 - beta1) * g
    v = np.float32(beta2) * second + np.float32(1 - beta2) * (g * g)
    m_hat = m / np.float32(1 - _power(beta1, steps))
    v_hat = v / np.float32(1 - _power(beta2, steps))
    return [m, v], m_hat / (np.sqrt(v_hat) + np.float32(epsilon))


def _power(base: float, exponent: int) -> float:
    """By products alone: the C library's pow may differ in the last bit between machines."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _deviation(scalars: np.ndarray) -> float:
    """Of the K scalars, with K as the divisor; the same on every machine."""
    values = [float(value) for value in scalars]
    mean = math.fsum(values) / len(values)
    squares = ((value - mean) * (value - mean) for value in values)
    return math.sqrt(math.fsum(squares) / len(values))
