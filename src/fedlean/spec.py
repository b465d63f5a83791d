"""A model as data: named nodes in topological order, validated when built.

`ModelSpec` owns the structure (shapes, parameter names, what may be pruned, JSON, a hash).  It
holds no parameters and computes nothing: engines run it, `fedlean.cost` prices it, `fedlean.wire`
sends it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from math import prod
from typing import Any, get_args

from fedlean.layers import (
    MAX_ACTIVATION_ELEMENTS,
    BatchNorm,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    Shape,
    check_settings,
    settings_of,
)

INPUT = "input"  # the name by which nodes refer to the model's input
# Larger models are a mistake or an attack.
MAX_TENSOR_ELEMENTS = 1 << 31  # of one parameter
MAX_NODES, MAX_INPUTS, MAX_AXES = 4096, 256, 8  # of a spec, of a node, of its input
LAYERS: dict[str, type] = {layer.__name__: layer for layer in get_args(Layer)}


@dataclass(frozen=True)
class Node:
    """One layer with its name, what feeds it, its block, and whether its weight may be pruned."""

    name: str
    layer: Layer
    inputs: tuple[str, ...]
    block: str = "main"
    prunable: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """A network from `input_shape` (without batch) through `nodes`; the last node is the output.

    Raises ValueError naming the layer when names clash, an input is unknown, shapes do not fit or
    a setting is beyond its limit (see `fedlean.layers`): at most 4096 layers of at most 256 inputs,
    2^31 elements per parameter and fewer than 2^27 per activation of one example.

    >>> from fedlean.layers import Flatten, Linear
    >>> spec = sequential((1, 8, 8), [("flat", Flatten()), ("fc", Linear(10))])
    >>> spec.output_shape, spec.param_shapes["fc.weight"], spec.num_params
    ((10,), (10, 64), 650)
    """

    input_shape: Shape
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError("a ModelSpec needs at least one layer, got none")
        if len(self.nodes) > MAX_NODES:
            raise ValueError(f"a ModelSpec has at most {MAX_NODES} layers, got {len(self.nodes)}")
        if not self.input_shape or any(
            not isinstance(side, int) or isinstance(side, bool) or side < 1
            for side in self.input_shape
        ):
            raise ValueError(f"input_shape must be positive integers, got {self.input_shape}")
        if len(self.input_shape) > MAX_AXES or prod(self.input_shape) > MAX_ACTIVATION_ELEMENTS:
            raise ValueError(
                f"input_shape {self.input_shape!s:.80} is too large: at most {MAX_AXES} axes and "
                f"{MAX_ACTIVATION_ELEMENTS} elements"
            )
        _ = self._inferred  # validates

    @cached_property
    def _inferred(self) -> tuple[dict[str, Shape], dict[str, Shape], dict[str, Shape]]:
        """Shapes of activations, of trainable parameters and of buffers, in node order."""
        shapes: dict[str, Shape] = {INPUT: tuple(self.input_shape)}
        params: dict[str, Shape] = {}
        buffers: dict[str, Shape] = {}
        for node in self.nodes:
            if not node.name or "." in node.name or node.name in shapes:
                raise ValueError(
                    f"layer name {node.name!r} must be non-empty, unique and without '.'"
                )
            if len(node.inputs) > MAX_INPUTS:
                raise ValueError(
                    f"layer {node.name!r} reads {len(node.inputs)} inputs, at most {MAX_INPUTS}"
                )
            for source in node.inputs:
                if source not in shapes:
                    raise ValueError(
                        f"layer {node.name!r} reads {source!r}, which is not '{INPUT}' or an "
                        "earlier layer"
                    )
            inputs = [shapes[source] for source in node.inputs]
            try:
                check_settings(node.layer)
                shapes[node.name] = node.layer.output_shape(inputs)
                own = getattr(node.layer, "param_shapes", lambda _: {})(inputs)
                held = getattr(node.layer, "buffer_shapes", lambda _: {})(inputs)
                for suffix, shape in {"output": shapes[node.name], **own, **held}.items():
                    most = MAX_ACTIVATION_ELEMENTS if suffix == "output" else MAX_TENSOR_ELEMENTS
                    if prod(shape) > most:
                        raise ValueError(
                            f"{suffix} of shape {shape} is too large: at most {most} elements"
                        )
            except ValueError as error:
                kind = type(node.layer).__name__
                raise ValueError(f"layer {node.name!r} ({kind}): {error}") from None
            params |= {f"{node.name}.{suffix}": shape for suffix, shape in own.items()}
            buffers |= {f"{node.name}.{suffix}": shape for suffix, shape in held.items()}
        return shapes, params, buffers

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Activation shape of the input and of every node, without the batch axis."""
        return self._inferred[0]

    @property
    def param_shapes(self) -> Mapping[str, Shape]:
        """Trainable tensors, in the order in which they travel."""
        return self._inferred[1]

    @property
    def buffer_shapes(self) -> Mapping[str, Shape]:
        """Tensors that training sets but no gradient moves (BatchNorm's running statistics)."""
        return self._inferred[2]

    @cached_property
    def tensor_shapes(self) -> Mapping[str, Shape]:
        """All tensors of the model: parameters, then buffers."""
        return {**self.param_shapes, **self.buffer_shapes}

    @property
    def output_shape(self) -> Shape:
        return self.shapes[self.nodes[-1].name]

    @cached_property
    def num_params(self) -> int:
        return sum(prod(shape) for shape in self.param_shapes.values())

    @cached_property
    def weighted(self) -> tuple[Node, ...]:
        """The Linear and Conv2d nodes: those whose `<name>.weight` a sparse kernel can save on."""
        return tuple(node for node in self.nodes if isinstance(node.layer, Linear | Conv2d))

    @cached_property
    def prunable(self) -> tuple[str, ...]:
        """Names of the weights that may be pruned.  Biases and norms never are."""
        return tuple(f"{node.name}.weight" for node in self.weighted if node.prunable)

    @cached_property
    def variances(self) -> Mapping[str, str]:
        """Each running variance with its running mean: a merge needs both moments."""
        norms = [node.name for node in self.nodes if isinstance(node.layer, BatchNorm)]
        return {f"{name}.running_var": f"{name}.running_mean" for name in norms}

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    def input_shapes(self, node: Node) -> list[Shape]:
        return [self.shapes[source] for source in node.inputs]

    def viewed(self, name: str) -> str:
        """The activation whose memory `name` is: Flatten is a view of what it reads."""
        while name != INPUT and isinstance(self.by_name[name].layer, Flatten):
            (name,) = self.by_name[name].inputs
        return name

    def reads_input(self, node: Node) -> bool:
        """Whether the node's input is the model's, so that no gradient flows there."""
        return all(self.viewed(source) == INPUT for source in node.inputs)

    @cached_property
    def blocks(self) -> Mapping[str, tuple[Node, ...]]:
        """Nodes by block, blocks in order of first appearance."""
        out: dict[str, tuple[Node, ...]] = {}
        for node in self.nodes:
            out[node.block] = (*out.get(node.block, ()), node)
        return out

    def to_json(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        nodes = [
            {
                "name": node.name,
                "layer": type(node.layer).__name__,
                **settings_of(node.layer),
                "inputs": list(node.inputs),
                "block": node.block,
                "prunable": node.prunable,
            }
            for node in self.nodes
        ]
        document = {"input_shape": list(self.input_shape), "nodes": nodes}
        return json.dumps(document, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> ModelSpec:
        """The inverse of `to_json`.  Raises ValueError naming what is wrong, and where."""
        try:
            document = json.loads(text)
            nodes = tuple(_node_from(entry) for entry in document["nodes"])
            return ModelSpec(tuple(document["input_shape"]), nodes)
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a ModelSpec: {type(error).__name__}: {error}") from None

    @cached_property
    def hash(self) -> str:
        """32 hex digits of the canonical JSON."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def __hash__(self) -> int:
        """Of `hash`, which is computed once: caches by spec are asked often."""
        return hash(self.hash)

    def __eq__(self, other: object) -> bool:
        """By `hash`, too: a spec that was decoded again is found in a cache without a walk."""
        if not isinstance(other, ModelSpec):
            return NotImplemented
        return self is other or self.hash == other.hash


_ENTRIES = {"name": str, "layer": str, "inputs": list, "block": str, "prunable": bool}


def _node_from(entry: Any) -> Node:
    if not isinstance(entry, dict):
        raise ValueError(f"a layer must be an object, got {entry!r:.40}")
    name, kind = entry.get("name"), entry.get("layer")
    for key, wanted in _ENTRIES.items():
        if not isinstance(entry.get(key), wanted):
            got = f"{entry[key]!r:.40}" if key in entry else "nothing"
            raise ValueError(f"layer {name!r:.40}: {key} must be a {wanted.__name__}, got {got}")
    if not all(isinstance(source, str) for source in entry["inputs"]):
        raise ValueError(f"layer {name!r:.40}: inputs must be names of layers")
    if kind not in LAYERS:
        raise ValueError(f"layer {name!r}: unknown kind {kind!r}, expected one of {list(LAYERS)}")
    attributes = {}
    for spec_field in fields(LAYERS[kind]):
        if spec_field.name in entry:
            attributes[spec_field.name] = entry[spec_field.name]  # the spec checks it
        elif spec_field.default is MISSING:
            raise ValueError(f"layer {name!r} ({kind}): {spec_field.name} is missing")
    layer = LAYERS[kind](**attributes)
    return Node(entry["name"], layer, tuple(entry["inputs"]), entry["block"], entry["prunable"])


def sequential(
    input_shape: Shape, layers: Iterable[tuple[str, Layer] | tuple[str, Layer, str]]
) -> ModelSpec:
    """A chain of (name, layer) or (name, layer, block), each reading the one before."""
    nodes: list[Node] = []
    for name, layer, *block in layers:
        source = nodes[-1].name if nodes else INPUT
        nodes.append(Node(name, layer, (source,), block[0] if block else "main"))
    return ModelSpec(tuple(input_shape), tuple(nodes))
