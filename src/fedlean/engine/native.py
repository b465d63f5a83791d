"""The native engine: sparse training in C++, without PyTorch.

The only importer of `fedlean._native`.  A pruned layer stores and computes its kept weights only
(`native/include/fedlean/pattern.h`), a whole step is one native call, and what it needs of memory
is known before it is allocated.  Results are bit-equal for any number of threads on one
`instruction_set`.  Not covered: slices (`SubModel.index`) and output modules, refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from fedlean import _native
from fedlean import layers as L
from fedlean.core import Masks, Params, SubModel, generator
from fedlean.engine import checks
from fedlean.engine.protocol import SGD, Loss
from fedlean.spec import INPUT, ModelSpec, Node
from fedlean.tree import pattern_hash

_SLOTS = ("weight", "bias", "running_mean", "running_var")
_MAX_THREADS = 1024
_MAX_POOL_KERNEL = 16  # the winning pixel of a window is kept in one byte


class _Last(NamedTuple):
    """The native half of the last session; once nobody holds that one, it may serve again."""

    key: Hashable  # of everything but the values
    session: _native.Session
    owner: weakref.ref[NativeSession]


class NativeEngine:
    """Opens native sessions, which share `threads` threads (default: 1).

    A session like the last one, which is no longer held, takes over its patterns and its memory:
    building them takes longer than a step, and the clients of a round train the same sub-model.
    """

    name = "native"
    arithmetic: Literal["masked", "sparse"] = "sparse"

    def __init__(self, threads: int | None = None):
        """Raises ValueError when `threads` or FEDLEAN_INSTRUCTION_SET is not possible here."""
        count = 1 if threads is None else threads
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MAX_THREADS:
            raise ValueError(
                f"threads must be an integer from 1 to {_MAX_THREADS}, got {threads!r}"
            )
        try:
            self._native = _native.Engine(count)
        except RuntimeError as error:
            raise ValueError(f"no native engine with {count} threads: {error}") from None
        self.instruction_set: str = self._native.instruction_set
        self._last: list[_Last] = []  # one at most

    def open(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        optimizer: SGD,
        loss: Loss = "ce",
    ) -> NativeSession:
        """Raises ValueError naming the argument or the layer that cannot be trained."""
        checks.check_settings(batch_size, loss)
        checks.check_sub_model(spec, sub_model, self.name)
        pattern = pattern_hash(sub_model.masks)
        key = (spec.hash, pattern, sub_model.frozen, batch_size, optimizer, loss)
        network = _network(spec)
        session = NativeSession(
            self._native,
            network,
            spec,
            params,
            sub_model,
            batch_size,
            optimizer,
            loss,
            self._take_last(key),
        )
        self._last = [_Last(key, session.native, weakref.ref(session))]
        return session

    def _take_last(self, key: Hashable) -> _native.Session | None:
        """Frees it where it does not fit: two plans are never held for one session."""
        try:
            last = self._last.pop()  # at once: no two threads get the same one
        except IndexError:
            return None
        return last.session if last.key == key and last.owner() is None else None


class _Place(NamedTuple):
    """Where a tensor is in the native session."""

    node: int
    slot: int


def _network(spec: ModelSpec) -> _native.Network:
    """Raises ValueError naming a layer that the engine lacks."""
    network = _native.Network(list(spec.input_shape))
    index = {INPUT: -1} | {node.name: i for i, node in enumerate(spec.nodes)}
    for node in spec.nodes:
        shapes = [*spec.input_shapes(node), spec.shapes[node.name]]
        if any(len(shape) not in (1, 3) for shape in shapes):
            raise ValueError(
                f"layer {node.name!r}: the native engine takes images (C, H, W) and vectors (F,), "
                f"got shapes {shapes}; --engine torch may run it"
            )
        inputs = [index[source] for source in node.inputs]
        kind = type(node.layer).__name__
        network.add(node.name, kind, inputs, list(shapes[-1]), **_settings(node))
    return network


def _settings(node: Node) -> dict[str, Any]:
    match node.layer:
        case L.Linear(bias=bias):
            return {"bias": bias}
        case L.Conv2d(kernel_size=k, stride=s, padding=p, groups=g, bias=bias):
            return {"kernel": k, "stride": s, "padding": p, "groups": g, "bias": bias}
        case (
            L.MaxPool2d(kernel_size=k, stride=s, padding=p)
            | L.AvgPool2d(kernel_size=k, stride=s, padding=p)
        ):
            if isinstance(node.layer, L.MaxPool2d) and k > _MAX_POOL_KERNEL:
                raise ValueError(
                    f"layer {node.name!r} (MaxPool2d): kernel_size {k} is not supported by the "
                    f"native engine, at most {_MAX_POOL_KERNEL}; --engine torch runs it"
                )
            return {"kernel": k, "stride": s or k, "padding": p}
        case L.GroupNorm(eps=eps, groups=g):
            return {"eps": eps, "groups": g}
        case L.BatchNorm(eps=eps, momentum=momentum):
            return {"eps": eps, "momentum": momentum}
    return {}


class NativeSession:
    """See `fedlean.engine.protocol.Session`."""

    def __init__(
        self,
        engine: _native.Engine,
        network: _native.Network,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        batch_size: int,
        optimizer: SGD,
        loss: Loss,
        again: _native.Session | None = None,
    ):
        """`again`: the native half of an earlier session that differed in its values only."""
        self._spec = spec
        self._batch_size = batch_size
        self._frozen = sub_model.frozen
        self._trainable = [name for name in spec.param_shapes if name not in sub_model.frozen]
        self._kept = {name: int(np.count_nonzero(m)) for name, m in sub_model.masks.items()}
        nodes = {node.name: i for i, node in enumerate(spec.nodes)}
        self._nodes = nodes
        self._places = {
            name: _Place(nodes[name.rsplit(".", 1)[0]], _SLOTS.index(name.rsplit(".", 1)[1]))
            for name in spec.tensor_shapes
        }
        checks.check_params(spec, params, sub_model.masks)
        if again is not None:
            again.reset()
            self._session = again
        else:
            self._session = _native.Session(
                engine,
                network,
                batch_size=batch_size,
                loss=loss,
                lr=optimizer.lr,
                momentum=optimizer.momentum,
                weight_decay=optimizer.weight_decay,
                proximal=optimizer.proximal,
                clip_norm=optimizer.clip_norm or 0.0,
                input_rank=len(spec.input_shape),
                trainable=self._per_slot(lambda name: name not in self._frozen, False),
                kept=self._per_slot(self._pruned_to, -1),
            )
            self._build(sub_model.masks)
        self._examples = 0  # of the forward that a backward may follow
        self._returned: frozenset[str] = frozenset()
        self._importance = False
        self._load(params)

    @property
    def native(self) -> _native.Session:
        return self._session

    @property
    def peak_memory_bytes(self) -> int:
        """The plan: everything that a step holds, with importance once that was asked for."""
        return self._session.planned_bytes(importance=self._importance)

    @property
    def held_bytes(self) -> int:
        """What is allocated now; after a step, exactly `peak_memory_bytes`."""
        return self._session.held_bytes()

    def load(self, params: Params) -> None:
        masks = {name: self._mask(name) for name in self._kept}
        checks.check_params(self._spec, params, masks)
        self._returned = frozenset()
        self._load(params)

    def params(self, *, packed: bool = False) -> dict[str, np.ndarray]:
        return {name: self._read(name, packed) for name in self._spec.tensor_shapes}

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: bool = False) -> float:
        try:
            if len(x) == 1:
                checks.check_moments(self._spec, 1, self._frozen)
            mean = self._session.step(x, y, importance)
        except (TypeError, ValueError):
            self._explain(x, y)
            raise
        self._returned = frozenset()
        self._importance = self._importance or importance
        return mean

    def importance(self) -> dict[str, np.ndarray]:
        sums = {}
        for name in self._trainable:
            sums[name] = np.empty(self._spec.param_shapes[name], np.float32)
            self._session.squares(*self._places[name], sums[name])
        return sums

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        try:
            mean = self._session.loss(x, y)
        except (TypeError, ValueError):
            self._explain(x, y)
            raise
        self._returned = frozenset()
        return mean

    def loss_perturbed(
        self, x: np.ndarray, y: np.ndarray, *, seed: int, k: int, sigma: float
    ) -> float:
        self._explain(x, y)
        checks.check_sigma(sigma)
        before = {name: self._read(name, packed=True) for name in self._trainable}
        try:
            for name, values in before.items():
                shape = self._spec.param_shapes[name]
                rng = generator(seed, 0, k, f"direction/{name}")
                z = rng.standard_normal(shape, dtype=np.float32)
                z = z[self._mask(name)] if name in self._kept else z
                self._write(name, values + np.float32(sigma) * z, packed=True)
            return self.loss(x, y)
        finally:
            for name, values in before.items():
                self._write(name, values, packed=True)

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> dict[str, np.ndarray]:
        checks.check_input(self._spec, x, self._batch_size)
        checks.check_taps(self._spec, taps)
        if training:
            checks.check_moments(self._spec, len(x), self._frozen)
        wanted = dict.fromkeys([*taps, self._spec.nodes[-1].name])
        self._returned = frozenset()
        self._session.forward(x, [self._nodes[name] for name in wanted], training)
        if training:
            self._returned, self._examples = frozenset(wanted), len(x)
        values = {}
        for name in wanted:
            values[name] = np.empty((len(x), *self._spec.shapes[name]), np.float32)
            self._session.activation(self._nodes[name], values[name])
        return values

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        checks.check_output_gradients(self._spec, output_gradients, self._returned, self._examples)
        self._returned = frozenset()
        nodes = [self._nodes[name] for name in output_gradients]
        self._session.backward(nodes, list(output_gradients.values()), dense)
        gradients = {}
        for name in self._trainable:
            gradients[name] = np.empty(self._spec.param_shapes[name], np.float32)
            self._session.gradient(*self._places[name], gradients[name], dense)
        self._session.drop_gradients()
        return gradients

    def apply(self, gradients: Params) -> None:
        checks.check_gradients(self._spec, gradients)
        self._returned = frozenset()
        names = [name for name in self._trainable if name in gradients]
        for name in names:
            self._session.set_gradient(*self._places[name], gradients[name])
        places = [self._places[name] for name in names]
        self._session.apply([p.node for p in places], [p.slot for p in places])

    def _explain(self, x: np.ndarray, y: np.ndarray) -> None:
        """Raises the ValueError that says what the native checks, which are fast, refused."""
        checks.check_batch(self._spec, x, y, self._batch_size, self._spec.output_shape[0])

    def _pruned_to(self, name: str) -> int:
        """Kept coordinates; -1 where nothing is pruned."""
        kept = self._kept.get(name, -1)
        return -1 if kept == prod(self._spec.tensor_shapes[name]) else kept

    def _per_slot(self, value: Any, default: Any) -> list[list[Any]]:
        table = [[default] * len(_SLOTS) for _ in self._spec.nodes]
        for name, place in self._places.items():
            table[place.node][place.slot] = value(name)
        return table

    def _mask(self, name: str) -> np.ndarray:
        mask = np.ones(self._spec.tensor_shapes[name], np.bool_)
        if self._pruned_to(name) >= 0:
            self._session.read_mask(*self._places[name], mask)
        return mask

    def _build(self, masks_by_name: Masks) -> None:
        by_node: dict[int, list[np.ndarray | None]] = {}
        for name, place in self._places.items():
            masks = by_node.setdefault(place.node, [None] * len(_SLOTS))
            if self._pruned_to(name) >= 0:
                masks[place.slot] = masks_by_name[name]
        for node, masks in by_node.items():
            self._session.build(node, masks)

    def _load(self, params: Params) -> None:
        for name in self._spec.tensor_shapes:
            value = params[name]
            packed = name in self._kept and value.shape != self._spec.tensor_shapes[name]
            self._write(name, value, packed, reference=True)

    def _write(
        self, name: str, values: np.ndarray, packed: bool, *, reference: bool = False
    ) -> None:
        self._session.load(*self._places[name], values, packed, reference)

    def _read(self, name: str, packed: bool) -> np.ndarray:
        packed = packed and name in self._kept
        shape = (self._kept[name],) if packed else self._spec.tensor_shapes[name]
        values = np.empty(shape, np.float32)
        self._session.read(*self._places[name], values, packed)
        return values
