"""Random small networks agree with masked-dense float64 to 1e-5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from engine.agreement import SIZES, IllPosed, check_gradients, check_training
from engine.cases import (
    FULL_SGD,
    LOSSES,
    masks_of,
    start,
    start_with_fresh_norms,
    with_dead_outputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlean.engine.protocol import SGD
from fedlean.layers import (
    GELU,
    Add,
    AvgPool1d,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv1d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    Layer,
    LeakyReLU,
    Linear,
    MaxPool1d,
    MaxPool2d,
    ReLU,
    Scale,
    Scaler,
    Shape,
    Sigmoid,
    SiLU,
    Tanh,
)
from fedlean.spec import INPUT, ModelSpec, Node

MAX_NODES = 7
Draw = Callable
RUNS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def networks(draw: Draw) -> ModelSpec:
    """Up to MAX_NODES layers, each on any of the activations before it, and a head.

    On half of the weighted layers there are a norm and a ReLU.
    """
    sides = st.integers(1, 9)
    shape: Shape = (draw(st.integers(1, 6)),)
    if rank := draw(st.sampled_from([0, 1, 2, 2, 2])):
        shape = (*shape, *(draw(sides) for _ in range(rank)))
    shapes = {INPUT: shape}
    nodes: list[Node] = []
    for i in range(draw(st.integers(1, MAX_NODES))):
        names = list(shapes)
        # mostly a chain, or else most layers would not reach the output
        source = names[-1] if draw(st.integers(0, 3)) else draw(st.sampled_from(names))
        layer, inputs = draw(st.sampled_from(list(_layers(draw, source, shapes))))
        nodes.append(Node(f"n{i}", layer, inputs))
        shapes[f"n{i}"] = layer.output_shape([shapes[name] for name in inputs])
        if isinstance(layer, Conv2d | Linear) and draw(st.booleans()):
            for suffix, above in (("norm", _norm(draw, shapes[f"n{i}"][0])), ("relu", ReLU())):
                nodes.append(Node(f"n{i}_{suffix}", above, (nodes[-1].name,)))
                shapes[nodes[-1].name] = shapes[f"n{i}"]
    if len(shapes[nodes[-1].name]) > 1:
        nodes.append(Node("flat", Flatten(), (nodes[-1].name,)))
    nodes.append(Node("head", Linear(draw(st.integers(1, 5))), (nodes[-1].name,)))
    return ModelSpec(shape, tuple(nodes))


def _norm(draw: Draw, channels: int) -> Layer:
    return draw(st.sampled_from([BatchNorm(), GroupNorm(groups=_divisor(draw, channels))]))


def _divisor(draw: Draw, channels: int) -> int:
    return draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))


def _sides(draw: Draw, shape: Shape, low: int, high: int):
    """A setting of a window: alike on both sides of an image, or not."""
    one = st.integers(low, high)
    return draw(one if len(shape) == 2 else one | st.tuples(one, one))


CURVES = st.sampled_from(
    [
        *(Hardswish(), Hardsigmoid(), LeakyReLU(0.2), Hardtanh(-0.5, 1.0), Sigmoid(), Tanh()),
        *(SiLU(), GELU(), GELU(tanh=True)),
    ]
)


def _layers(
    draw: Draw, source: str, shapes: dict[str, Shape]
) -> Iterator[tuple[Layer, tuple[str, ...]]]:
    """What may follow `source`, and what it reads."""
    shape = shapes[source]
    channels, bias = shape[0], draw(st.booleans())
    groups = _divisor(draw, channels)
    alike = [name for name in shapes if shapes[name] == shape]
    more = draw(st.lists(st.sampled_from(alike), min_size=1, max_size=3))
    for layer in (ReLU(), draw(CURVES), BatchNorm(), GroupNorm(groups=groups)):
        yield layer, (source,)
    yield Scaler(draw(st.sampled_from([0.5, 1.25, 4.0]))), (source,)
    yield Dropout(draw(st.sampled_from([0.1, 0.5])), draw(st.booleans())), (source,)
    yield Add(), (source, *more)
    beside = [name for name in shapes if shapes[name][1:] == shape[1:]]
    yield Concat(), (source, *draw(st.lists(st.sampled_from(beside), min_size=1, max_size=2)))
    if len(shape) == 1:
        yield Linear(draw(st.integers(1, 20)), bias), (source,)
        return
    conv, max_pool, avg_pool = (
        (Conv2d, MaxPool2d, AvgPool2d) if len(shape) == 3 else (Conv1d, MaxPool1d, AvgPool1d)
    )
    kernel, stride = _sides(draw, shape, 1, 5), _sides(draw, shape, 1, 3)
    padding, dilation = _sides(draw, shape, 0, 2), _sides(draw, shape, 1, 2)
    out = groups * draw(st.integers(1, 3))
    wide = draw(st.integers(1, 20))
    fitting = (
        conv(out, kernel, stride, padding, groups, bias, dilation),
        conv(wide, kernel, 1, padding, 1, bias, dilation),
        conv(wide, kernel, 1, padding, 1, bias),
        conv(channels, kernel, stride, padding, channels, bias),
        max_pool(kernel, stride, padding),
        avg_pool(kernel, stride, padding),
    )
    for layer in fitting:
        with suppress(ValueError):  # its window does not fit
            layer.output_shape([shape])
            yield layer, (source,)
    yield GlobalAvgPool(), (source,)
    yield Flatten(), (source,)
    for name in shapes:
        if shapes[name] == (channels,):
            yield Scale(), (source, name)


DENSITIES = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
AT_LEAST_THREE = st.sampled_from(SIZES[1:8])  # BatchNorm of two values amplifies roundings


DEAD_SHARES = st.sampled_from([0.0, 0.3, 1.0])  # of each layer's outputs
STARTS = st.sampled_from([start, start_with_fresh_norms])


@RUNS
@given(
    spec=networks(),
    density=DENSITIES,
    dead=DEAD_SHARES,
    size=AT_LEAST_THREE,
    params_of=STARTS,
    data=st.data(),
)
def test_gradients(engine, spec, density, dead, size, params_of, data):
    frozen = data.draw(st.sets(st.sampled_from(sorted(spec.param_shapes)), max_size=2))
    masks = with_dead_outputs(masks_of(spec, density), dead)
    with suppress(IllPosed):
        check_gradients(engine, spec, size=size, masks=masks, frozen=frozen, params_of=params_of)


@RUNS
@given(
    spec=networks(),
    density=DENSITIES,
    dead=DEAD_SHARES,
    size=AT_LEAST_THREE,
    params_of=STARTS,
    loss=st.sampled_from(LOSSES),
    sgd=st.sampled_from([SGD(0.3), FULL_SGD]),
)
def test_training(engine, spec, density, dead, size, params_of, loss, sgd):
    masks = with_dead_outputs(masks_of(spec, density), dead)
    with suppress(IllPosed):
        check_training(
            engine, spec, size=size, masks=masks, loss=loss, sgd=sgd, params_of=params_of
        )
