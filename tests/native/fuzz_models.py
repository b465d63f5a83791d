"""Random models through the public classes, and everything that their sessions do."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from native.fuzz_draw import EDGES, FLOATS, MOST_BYTES, Draw, attempt

from fedlean import layers as L
from fedlean.core import SubModel
from fedlean.engine.protocol import SGD
from fedlean.spec import INPUT, ModelSpec, Node


def layer(draw: Draw, rank: int) -> Any:

    kernel, stride = sides(draw, 4, rank), sides(draw, 3, rank)
    padding = draw.one([0, 0, 1, 2, sides(draw, 3, rank)])
    dilation = draw.one([1, 1, 1, sides(draw, 3, rank)])
    if draw.chance(0.05):  # what is too large may fit what else is too large
        stride = padding = draw.one(EDGES)
        kernel = draw.one([kernel, padding, 2 * padding])
    eps = draw.one([*FLOATS, 1e-5, 1e-5, 1e-5]) if draw.chance(0.2) else 1e-5
    dropout = L.Dropout(draw.one([0.1, 0.5, *FLOATS]), draw.chance(0.5))
    scaler = L.Scaler(draw.one([0.5, 2.0, *FLOATS]))
    anywhere = [
        L.GroupNorm(eps, groups=draw.one([1, 1, 2, draw.side(4)])),
        L.BatchNorm(eps, draw.one([0.1, 0.1, *FLOATS])),
        draw.one([L.ReLU(), L.Hardswish(), L.Hardsigmoid(), scaler, dropout, curve(draw)]),
        L.Flatten(),
    ]
    if rank == 1:
        return draw.one([L.Linear(draw.side(40), draw.chance(0.5)), *anywhere])
    groups = draw.one([1, 1, 1, 2, draw.side(4)])
    channels, bias = groups * draw.side(6), draw.chance(0.5)
    signal = rank == 2 or draw.chance(0.02)
    conv = (L.Conv1d if signal else L.Conv2d)(
        channels, kernel, stride, padding, groups, bias, dilation
    )
    pools = [L.MaxPool1d, L.AvgPool1d] if signal else [L.MaxPool2d, L.AvgPool2d]
    pool = draw.one(pools)(kernel, draw.one([None, stride]), padding)
    return draw.one([conv, conv, conv, pool, L.GlobalAvgPool(), *anywhere])


def sides(draw: Draw, most: int, rank: int) -> Any:
    """One number, or one for rows and one for columns."""
    pair = rank == 3 and draw.chance(0.3)
    return (draw.side(most), draw.side(most)) if pair else draw.side(most)


def curve(draw: Draw) -> Any:
    low, high = draw.one([-1.0, 0.0, *FLOATS]), draw.one([1.0, 6.0, *FLOATS])
    layers = [L.SiLU(), L.Sigmoid(), L.Tanh(), L.GELU(draw.chance(0.5)), L.Hardtanh(low, high)]
    return draw.one([*layers, L.LeakyReLU(draw.one([0.01, 0.2, *FLOATS]))])


def model(draw: Draw) -> Any:
    """A chain with branches that are added or that gate it; ValueError where it does not fit."""

    image = draw.chance(0.8)
    spread = [draw.side(6), draw.side(9), draw.side(9)]
    shape = tuple(spread) if image else draw.one([(draw.side(60),), (draw.side(6), draw.side(40))])
    nodes: list[Any] = []
    for i in range(draw.between(1, 8)):
        shapes = ModelSpec(shape, tuple(nodes)).shapes if nodes else {INPUT: shape}
        source = nodes[-1].name if nodes and draw.chance(0.8) else draw.one(list(shapes))
        alike = [name for name in shapes if shapes[name] == shapes[source]]
        gates = [name for name in shapes if shapes[name] == shapes[source][:1]]
        beside = [name for name in shapes if shapes[name][1:] == shapes[source][1:]]
        if draw.chance(0.1):
            of, inputs = L.Concat(), (source, *draw.some(beside, draw.between(1, 3)))
        elif draw.chance(0.15):
            of, inputs = L.Add(), (source, draw.one(alike))
        elif gates and len(shapes[source]) > 1 and draw.chance(0.5):
            of, inputs = L.Scale(), (source, draw.one(gates))
        else:
            of, inputs = layer(draw, len(shapes[source])), (source,)
        nodes.append(Node(f"n{i}", of, inputs))
    if draw.chance(0.7) and len(ModelSpec(shape, tuple(nodes)).output_shape) > 1:
        nodes.append(Node("flat", L.Flatten(), (nodes[-1].name,)))
    return ModelSpec(shape, tuple(nodes))


def small(spec: Any) -> bool:
    sizes = [prod(s) for s in (*spec.shapes.values(), *spec.tensor_shapes.values())]
    return sum(sizes) < 300_000


def engine_case(draw: Draw, engine: Any) -> None:

    spec = attempt("spec", lambda: model(draw))
    if spec is None or not small(spec):
        return
    arrays = draw.arrays
    params = {n: arrays.random(s, np.float32) for n, s in spec.tensor_shapes.items()}
    density = draw.one([0.0, 0.02, 0.3, 0.6, 1.0])
    masks = {n: arrays.random(spec.param_shapes[n]) < density for n in spec.prunable}
    names = sorted(spec.tensor_shapes)
    frozen = frozenset(draw.some(names, draw.between(0, len(names)))) if draw.chance(0.4) else ()
    sub_model = SubModel(masks=masks if draw.chance(0.7) else {}, frozen=frozenset(frozen))
    size = draw.one([1, 3, 16, 17, 33])
    how = {"batch_size": draw.one([size, size, size, *EDGES]), "loss": draw.one(["ce", "bce"])}
    sgd = SGD(0.1, *draw.one([(), (0.9,), (0.9, 0.1, 1.0, 0.1), (0.0, 0.0, 0.5)]))
    x = arrays.standard_normal((size, *spec.input_shape)).astype(np.float32)
    y = arrays.integers(0, spec.output_shape[0], size)
    session = attempt("open", lambda: engine.open(spec, params, sub_model, optimizer=sgd, **how))
    if session is not None and session.peak_memory_bytes < MOST_BYTES:
        train(draw, spec, session, x, y)
    at_once = draw.one([1, 2, *EDGES])
    forward = attempt(
        "open forward",
        lambda: engine.open_forward(spec, params, sub_model, directions_at_once=at_once, **how),
    )
    if forward is not None and forward.peak_memory_bytes < MOST_BYTES:
        evaluate(draw, spec, forward, x, y)


def train(draw: Draw, spec: Any, session: Any, x: np.ndarray, y: np.ndarray) -> None:
    taps = draw.some(sorted(spec.by_name), draw.between(0, len(spec.by_name)))
    for importance in (False, True, pieces_of(draw, spec), pieces_of(draw, spec)):
        attempt("step", lambda i=importance: session.step(x, y, importance=i))
        attempt("importance", session.importance)
    attempt("loss", lambda: session.loss(x[:1], y[:1]))
    values = attempt("forward", lambda: session.forward(x, taps=taps, training=True))
    if values:
        ones = {name: np.ones_like(value) for name, value in values.items()}
        dense = draw.chance(0.5)
        gradients = attempt("backward", lambda: session.backward(ones, dense=dense))
        attempt("apply", lambda: session.apply(gradients or {}))
        attempt("forward", lambda: session.forward(x, taps=taps, training=True))
        importance = dense or pieces_of(draw, spec)
        attempt("descend", lambda: session.descend(ones, importance=importance))
    attempt("params", lambda: session.params(packed=True))
    attempt("importance", session.importance)


def pieces_of(draw: Draw, spec: Any) -> tuple[tuple[str, int, int], ...]:
    """Rows of some tensors, now and then of more than there are."""
    pieces = []
    for name in draw.some(sorted(spec.param_shapes), draw.between(1, 4)):
        rows = spec.param_shapes[name][0]
        first = draw.between(0, rows - 1)
        pieces.append((name, first, draw.between(1, rows - first + draw.chance(0.02))))
    return tuple(pieces)


def evaluate(draw: Draw, spec: Any, session: Any, x: np.ndarray, y: np.ndarray) -> None:
    taps = draw.some(sorted(spec.by_name), draw.between(0, len(spec.by_name)))
    attempt("forward loss", lambda: session.loss(x, y))
    attempt("forward taps", lambda: session.forward(x, taps=taps))
    for kind in ("gaussian", "sign", "rank1"):
        ks = range(draw.one([0, 1, 3]))
        attempt(
            kind,
            lambda: session.losses_perturbed(x, y, seed=1, ks=ks, sigma=0.1, kind=kind),  # noqa: B023
        )
