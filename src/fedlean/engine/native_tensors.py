"""A model as the native engine is given it: its network, and where its tensors are.

What training (`native`) and evaluation (`native_forward`) share.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from fedlean import _native
from fedlean import layers as L
from fedlean.core import Masks, Params, SubModel
from fedlean.engine import checks
from fedlean.spec import INPUT, ModelSpec, Node

_SLOTS = ("weight", "bias", "running_mean", "running_var")
_MAX_POOL_AREA = 256  # the winning pixel of a window is kept in one byte


class Place(NamedTuple):
    """Where a tensor is in a native session."""

    node: int
    slot: int


class NativeTensors:
    """A sub-model's tensors and their places, in whichever native session holds them.

    Raises ValueError where `params` are not those of the sub-model.
    """

    def __init__(self, spec: ModelSpec, params: Params, sub_model: SubModel):
        checks.check_params(spec, params, sub_model.masks)
        self.spec = spec
        self.frozen = sub_model.frozen
        self.trainable = [name for name in spec.param_shapes if name not in sub_model.frozen]
        self.kept = {name: int(np.count_nonzero(m)) for name, m in sub_model.masks.items()}
        self.nodes = {node.name: i for i, node in enumerate(spec.nodes)}
        self.places = {
            name: Place(self.nodes[name.rsplit(".", 1)[0]], _SLOTS.index(name.rsplit(".", 1)[1]))
            for name in spec.tensor_shapes
        }

    def options(self) -> dict[str, Any]:
        """What a native session is told about them when it is made."""
        return {
            "trainable": self._per_slot(lambda name: name not in self.frozen, False),
            "kept": self._per_slot(self._pruned_to, -1),
        }

    def build(self, session: _native.Session | _native.ForwardSession, masks: Masks) -> None:
        by_node: dict[int, list[np.ndarray | None]] = {}
        for name, place in self.places.items():
            of_node = by_node.setdefault(place.node, [None] * len(_SLOTS))
            if self._pruned_to(name) >= 0:
                of_node[place.slot] = masks[name]
        for node, of_node in by_node.items():
            session.build(node, of_node)

    def masks(self, session: _native.Session | _native.ForwardSession) -> dict[str, np.ndarray]:
        """Read from the session, since the caller's may have changed."""
        return {name: self._mask(session, name) for name in self.kept}

    def is_packed(self, name: str, value: np.ndarray) -> bool:
        return name in self.kept and value.shape != self.spec.tensor_shapes[name]

    def read(
        self, session: _native.Session | _native.ForwardSession, *, packed: bool
    ) -> dict[str, np.ndarray]:
        values = {}
        for name, shape in self.spec.tensor_shapes.items():
            as_kept = packed and name in self.kept
            values[name] = np.empty((self.kept[name],) if as_kept else shape, np.float32)
            session.read(*self.places[name], values[name], as_kept)
        return values

    def _pruned_to(self, name: str) -> int:
        """Kept coordinates; -1 where nothing is pruned."""
        kept = self.kept.get(name, -1)
        return -1 if kept == prod(self.spec.tensor_shapes[name]) else kept

    def _per_slot(self, value: Any, default: Any) -> list[list[Any]]:
        table = [[default] * len(_SLOTS) for _ in self.spec.nodes]
        for name, place in self.places.items():
            table[place.node][place.slot] = value(name)
        return table

    def _mask(self, session: _native.Session | _native.ForwardSession, name: str) -> np.ndarray:
        mask = np.ones(self.spec.tensor_shapes[name], np.bool_)
        if self._pruned_to(name) >= 0:
            session.read_mask(*self.places[name], mask)
        return mask


def network_of(spec: ModelSpec, slower: frozenset[str] = frozenset()) -> _native.Network:
    """Layers in `slower` take the slower of their two forms.

    Raises ValueError naming a layer that the engine lacks.
    """
    network = _native.Network(list(spec.input_shape))
    index = {INPUT: -1} | {node.name: i for i, node in enumerate(spec.nodes)}
    for node in spec.nodes:
        shapes = [*spec.input_shapes(node), spec.shapes[node.name]]
        if any(len(shape) > 3 for shape in shapes):
            raise ValueError(
                f"layer {node.name!r}: the native engine takes images (C, H, W), signals (C, L) "
                f"and vectors (F,), got shapes {shapes}; --engine torch may run it"
            )
        inputs = [index[source] for source in node.inputs]
        kind = _kind(node.layer)
        form = node.name in slower
        network.add(node.name, kind, inputs, list(shapes[-1]), slower=form, **_settings(node))
    return network


def _settings(node: Node) -> dict[str, Any]:
    match node.layer:
        case L.Linear(bias=bias):
            return {"bias": bias}
        case L.Conv2d(window=window, groups=groups, bias=bias):
            return {**window._asdict(), "groups": groups, "bias": bias}
        case L.MaxPool2d(window=window) | L.AvgPool2d(window=window):
            if isinstance(node.layer, L.MaxPool2d) and window.area > _MAX_POOL_AREA:
                raise ValueError(
                    f"layer {node.name!r} ({type(node.layer).__name__}): a window of "
                    f"{window.area} pixels is not supported by the native engine, at most "
                    f"{_MAX_POOL_AREA}; pool twice, or --engine torch runs it"
                )
            return window._asdict()
        case L.GroupNorm(eps=eps, groups=g):
            return {"eps": eps, "groups": g}
        case L.BatchNorm(eps=eps, momentum=momentum):
            return {"eps": eps, "momentum": momentum}
        case L.Scaler(factor=factor):
            return {"factor": factor}
        case L.Dropout(p=p, channels=channels):
            return {"p": p, "whole_channels": channels}
        case L.LeakyReLU(slope=slope):
            return {"low": slope}
        case L.Hardtanh(low=low, high=high):
            return {"low": low, "high": high}
    return {}


def _kind(layer: L.Layer) -> str:
    """The engine's name of it: a signal is an image of one row."""
    if layer == L.GELU(tanh=True):
        return "GELUTanh"
    return type(layer).__name__.replace("1d", "2d")
