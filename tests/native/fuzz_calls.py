"""Random calls of the extension itself, which must defend itself whatever its callers checked."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from native.fuzz_draw import FLOATS, MOST_BYTES, REFUSALS, Draw, attempt

MOST_SIDE = 1 << 20  # of a tensor of which the plan is made
WINDOWS = ("Conv2d", "MaxPool2d", "AvgPool2d")
KINDS = ["Linear", "Conv2d", "Conv2d", "Conv2d", "MaxPool2d", "AvgPool2d", "GlobalAvgPool"]
KINDS += ["GroupNorm", "BatchNorm", "ReLU", "Hardswish", "Flatten", "Add", "Scale"]
KINDS += ["Scaler", "Nothing", "Concat", "Dropout", "LeakyReLU", "Hardtanh", "GELU"]
SIDES = ("kernel", "stride", "padding", "dilation")


def shape_after(kind: str, shape: list[int], k: dict[str, Any], out: int) -> list[int]:
    """What the kind makes of it, with no check."""
    if kind in WINDOWS and len(shape) > 1 and all(k["stride"]):
        of = zip(shape[1:], *(k[name][3 - len(shape) :] for name in SIDES), strict=True)
        sides = [(s + 2 * p - ((n - 1) * d + 1)) // t + 1 for s, n, t, p, d in of]
        return [out if kind == "Conv2d" else shape[0], *sides]
    if kind in ("Linear", "GlobalAvgPool"):
        return [out if kind == "Linear" else shape[0]]
    if kind == "Concat":
        return [2 * shape[0], *shape[1:]]
    return [prod(shape)] if kind == "Flatten" else shape


def pair(draw: Draw, low: int, high: int) -> tuple[int, int]:
    """Of rows and of columns, alike most often."""
    side = draw.wild(draw.between(low, high))
    return side, draw.between(low, high) if draw.chance(0.3) else side


def network(draw: Draw, native: Any) -> tuple[Any, list[list[int]]]:
    """And the shapes of its tensors, the input first."""
    first = [draw.wild(draw.between(1, 6)) for _ in range(draw.one([1, 2, 3, 3, 3]))]
    net: Any = attempt("input", lambda: native.Network(first))
    shapes = [first]
    for i in range(draw.between(1, 6) if net is not None else 0):
        kind = draw.one(KINDS)
        count = 2 if kind in ("Add", "Concat", "Scale") else 1
        inputs = [draw.wild(draw.between(-1, len(shapes) - 2)) for _ in range(count)]
        given = shapes[inputs[0] + 1] if -1 <= inputs[0] < len(shapes) - 1 else first
        window = 3 if kind in WINDOWS else 1
        most = {"kernel": window, "stride": window, "padding": window // 2}
        numbers: dict[str, Any] = {
            name: pair(draw, name != "padding", top) for name, top in most.items()
        }
        dilated = kind == "Conv2d" and draw.chance(0.3)
        numbers |= {"dilation": pair(draw, 1, 2) if dilated else (1, 1)}
        if len(given) == 2:  # a signal is an image of one row
            numbers |= {name: (1 - (name == "padding"), numbers[name][1]) for name in SIDES}
        numbers |= {"groups": draw.wild(1)}
        made = shape_after(kind, given, numbers, draw.wild(draw.between(1, 8)))
        shape = [draw.wild(side) if draw.chance(0.1) else side for side in made]
        floats = {"eps": draw.one([1e-5, *FLOATS]), "momentum": draw.one([0.1, *FLOATS])}
        floats = floats if draw.chance(0.1) else {}
        if draw.chance(0.9 if kind == "Scaler" else 0.05):
            floats |= {"factor": draw.one([2.0, 0.5, *FLOATS])}
        for name, of in (("p", "Dropout"), ("low", "LeakyReLU"), ("high", "Hardtanh")):
            if draw.chance(0.9 if kind == of else 0.02):
                floats |= {name: draw.one([0.5, 1.0, *FLOATS])}
        bias = draw.chance(0.5)

        def add(n=f"n{i}", k=kind, j=inputs, s=shape, v=numbers | floats, b=bias):
            assert net is not None
            net.add(n, k, j, s, bias=b, **v)
            shapes.append(s)

        attempt("add", add)
    return net, shapes


def array(draw: Draw, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Of that shape and type most often."""
    chance = draw.arrays.random()
    if chance < 0.05:
        shape = (*shape[:-1], shape[-1] + draw.one([-1, 1, 5])) if shape else (1,)
    if chance > 0.95:
        dtype = draw.one([np.float64, np.int8, np.uint64, np.bool_, np.float32])
    shape = tuple(max(0, side) for side in shape)
    if dtype is np.bool_ and draw.chance(0.5):
        raw = draw.arrays.integers(0, 256, shape, np.uint8)
        return raw.view(np.bool_)
    if 0.05 < chance < 0.08:
        raw = np.zeros(prod(shape) * np.dtype(dtype).itemsize + 1, np.uint8)
        return raw[1:].view(dtype).reshape(shape)  # at odd addresses
    if 0.08 < chance < 0.1:
        return np.zeros((*shape, 2), dtype)[..., 0]  # with gaps
    made = np.full(shape, draw.one([0, 1, 1, 0.5, 2]), np.float64).astype(dtype)
    made.flags.writeable = draw.chance(0.98)
    return made


def raw_case(draw: Draw, native: Any, raw_engine: Any) -> None:
    net, shapes = network(draw, native)
    if net is None or len(shapes) < 2 or max(max(s) for s in shapes) > MOST_SIDE:
        return
    nodes = len(shapes) - 1
    some = lambda: draw.wild(draw.between(-1, 9)) if draw.chance(0.4) else -1  # noqa: E731
    trained = draw.chance(0.5)
    trainable = [[trained and draw.chance(0.7) for _ in range(4)] for _ in range(nodes)]
    kept = [[some() if slot == 0 else -1 for slot in range(4)] for _ in range(nodes)]
    if draw.chance(0.03):
        kept = kept[:-1]
    examples = draw.one([1, 2, 5, 17])
    tables = {"trainable": trainable, "kept": kept, "loss": "ce"}
    tables |= {"batch_size": draw.wild(examples)}
    sgd = {name: draw.one([0.0, 0.1]) for name in ("momentum", "weight_decay", "proximal")}
    sgd |= {"lr": 0.1, "clip_norm": draw.one([0.0, 1.0])}

    def of_trained(table: list[list[bool]]) -> Any:
        return native.Session(raw_engine, net, **tables | {"trainable": table}, **sgd)

    def evaluated(at_once: int) -> Any:
        return native.ForwardSession(raw_engine, net, directions_at_once=at_once, **tables)

    only_weights = only_where_there_is_one(draw, native, raw_engine, net, nodes, tables, sgd)
    opened = attempt("raw session", lambda: of_trained(trainable))
    opened = opened or attempt("raw session", lambda: of_trained(only_weights))
    for session in (opened, attempt("raw forward", lambda: evaluated(draw.wild(1)))):
        if session is not None and session.planned_bytes() < MOST_BYTES:
            call_all(draw, session, shapes, kept, examples)


def only_where_there_is_one(draw, native, raw_engine, net, nodes, tables, sgd) -> list[list[bool]]:
    """A table of tensors to train that the network has, found by asking."""
    table = [[False] * 4 for _ in range(nodes)]
    for node, slot in ((n, s) for n in range(nodes) for s in range(2)):
        table[node][slot] = True
        try:
            native.Session(raw_engine, net, **tables | {"trainable": table}, **sgd)
        except REFUSALS:
            table[node][slot] = False
    return table


def call_all(draw: Draw, session: Any, shapes: Any, kept: Any, examples: int) -> None:
    """Builds the session, mostly as it must be, and then calls whatever there is in any order."""
    nodes = len(shapes) - 1
    sizes = [[size_of(session, node, slot) for slot in range(4)] for node in range(nodes)]
    for node in draw.some(range(nodes), nodes):
        masks: list[Any] = [None] * 4
        if kept[node][0] >= 0:
            masks[0] = mask_of(draw, sizes[node][0], kept[node][0])
        attempt("build", lambda n=node, m=masks: session.build(n, m))
    names = sorted(name for name in dir(session) if not name.startswith("_") and name != "build")
    for _ in range(25):
        name = draw.one(names)
        node, slot = draw.wild(draw.between(0, nodes - 1)), draw.wild(draw.between(0, 2 - 1))
        known = 0 <= node < nodes and 0 <= slot < 4
        weight = (sizes[node][slot],) if known else (3,)
        out = (examples, *shapes[node + 1]) if known else (examples, 3)
        arguments = arguments_of(draw, name, node, slot, weight, (examples, *shapes[0]), out, nodes)
        attempt(f"raw {name}", lambda n=name, a=arguments: getattr(session, n)(*a))


def merge_case(draw: Draw, native: Any) -> None:
    """Sums and means of a small tensor, mostly as they must be."""
    rows, side = draw.between(1, 9), draw.between(1, 40)
    total = array(draw, (rows, side), np.float64)
    chosen = draw.some(range(rows), draw.between(0, rows))
    cuts = sorted(draw.some(range(side + 1), 2 * draw.between(0, (side + 1) // 2)))
    firsts, ends = cuts[::2], cuts[1::2]
    sizes = [end - first for first, end in zip(firsts, ends, strict=True)]
    values = array(draw, (len(chosen), sum(sizes)))
    numbers = [[draw.wild(n, 0.01) for n in these] for these in (chosen, firsts, sizes)]
    chosen, firsts, sizes = (np.array(these, np.int64) for these in numbers)
    row_size = draw.wild(side, 0.02)
    arguments = (total, values, 2.0, chosen, row_size, firsts, sizes)
    attempt("raw add_scaled", lambda: native.add_scaled(*arguments))
    base, merged = array(draw, total.shape), array(draw, total.shape)
    weights = array(draw, (draw.one([1, rows, rows * side]),), np.float64)
    attempt("raw mean", lambda: native.mean(total, base, weights, merged))


def size_of(session: Any, node: int, slot: int) -> int:
    """Of a tensor, from the error that a wrong size gets."""
    try:
        session.read(node, slot, np.zeros(1_234_567, np.float32), False)
    except ValueError as error:
        words = str(error).split()
        return int(words[-1]) if words[-1].isdigit() and int(words[-1]) < 10**6 else 1
    return 1


def mask_of(draw: Draw, size: int, count: int) -> np.ndarray:
    """Bytes of a mask, mostly of 0 and 1 and with as many as planned."""
    mask = np.zeros(size, np.uint8)
    mask[draw.some(range(size), min(count, size))] = 1
    ones = np.flatnonzero(mask)
    if draw.chance(0.2) and len(ones) > 2:
        mask[ones[0]], mask[ones[1:3]] = 3, 0  # the same sum, fewer and fuller bytes
    return array(draw, (size,), np.bool_) if draw.chance(0.1) else mask.view(np.bool_)


def arguments_of(
    draw: Draw,
    name: str,
    node: int,
    slot: int,
    weight: tuple[int, ...],
    inputs: tuple[int, ...],
    out: tuple[int, ...],
    nodes: int,
) -> list[Any]:
    flag, x = draw.chance(0.5), array(draw, inputs)
    labels = array(draw, inputs[:1], np.int64)
    if labels.dtype == np.int64 and labels.flags.writeable and labels.size:
        labels[...] = draw.wild(0)
    pieces = [(node, slot, draw.wild(0), draw.wild(1)) for _ in range(draw.one([0, 0, 0, 1]))]
    keys = draw.one([[], [], [], [], [], [], [1], [1, 2]])
    match name:
        case "load" | "read":
            return [node, slot, array(draw, weight), flag, *([flag] if draw.chance(0.5) else [])]
        case "read_mask":
            return [node, slot, array(draw, weight, np.bool_)]
        case "step":
            return [x, labels, pieces, keys]
        case "loss":
            return [x, labels]
        case "losses":
            count = draw.one([0, 1, 2])
            keys = array(draw, (count, nodes, 3), np.uint64)
            kind = draw.one(["gaussian", "sign", "rank1", "other"])
            normals = array(draw, (65536,))
            return [x, labels, kind, 0.1, normals, keys, array(draw, (count,), np.float64)]
        case "forward":
            return [x, [node], *([[array(draw, out)]] if flag else [draw.chance(0.8), keys])]
        case "activation":
            return [node, array(draw, out)]
        case "descend":
            return [[node], [array(draw, out)], pieces]
        case "backward":
            return [[node], [array(draw, out)], flag]
        case "gradient":
            return [node, slot, array(draw, weight), flag]
        case "squares" | "set_gradient":
            return [node, slot, array(draw, weight)]
        case "apply":
            return [[node], [slot]]
    return []
