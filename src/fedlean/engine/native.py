"""The native engine: sparse training in C++, without PyTorch.

Of the engine, only the native* modules here import `fedlean._native`.  A pruned layer stores and
computes its kept weights only (`native/include/fedlean/pattern.h`), a whole step is one native
call, and what it needs of memory is known before it is allocated.  Results are bit-equal for any
number of threads on one `instruction_set`.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fedlean import _native
from fedlean.core import Params, SubModel
from fedlean.engine import checks
from fedlean.engine.dropout import dropout_key, dropouts
from fedlean.engine.native_forward import NativeForwardSession
from fedlean.engine.native_tensors import NativeTensors, network_of
from fedlean.engine.pieces import Importance, Pieces, piece_shape, pieces_of, whole
from fedlean.engine.protocol import SGD, Loss
from fedlean.spec import ModelSpec
from fedlean.tree import pattern_hash

_MAX_THREADS = 1024


class _Last(NamedTuple):
    """The native half of the last session; once nobody holds that one, it may serve again."""

    key: Hashable  # of everything but the values; that of training has its optimiser in it
    session: Any
    owner: weakref.ref[NativeSession] | weakref.ref[NativeForwardSession]


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
        self.threads = count
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
        slower: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> NativeSession:
        """Raises ValueError naming the argument or the layer that cannot be trained."""
        checks.check_settings(batch_size, loss)
        checks.check_sub_model(spec, sub_model)
        pattern = pattern_hash(sub_model.masks)
        key = (spec.hash, pattern, sub_model.frozen, batch_size, optimizer, loss, slower)
        network = network_of(spec, slower)
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
            seed=seed,
        )
        self._last = [_Last(key, session.native, weakref.ref(session))]
        return session

    def open_forward(
        self,
        spec: ModelSpec,
        params: Params,
        sub_model: SubModel,
        *,
        batch_size: int,
        loss: Loss = "ce",
        directions_at_once: int = 1,
        slower: frozenset[str] = frozenset(),
    ) -> NativeForwardSession:
        """Raises ValueError naming the argument or the layer that cannot be evaluated.

        At most as many directions are evaluated at once as the engine has threads.
        """
        checks.check_settings(batch_size, loss)
        checks.check_directions_at_once(directions_at_once)
        checks.check_sub_model(spec, sub_model)
        pattern = pattern_hash(sub_model.masks)
        key = (spec.hash, pattern, sub_model.frozen, batch_size, loss, directions_at_once, slower)
        network = network_of(spec, slower)
        session = NativeForwardSession(
            self._native,
            network,
            spec,
            params,
            sub_model,
            batch_size,
            loss,
            directions_at_once,
            self._take_last(key),
        )
        self._last = [_Last(key, session.native, weakref.ref(session))]
        return session

    @property
    def idle_bytes(self) -> int:
        """Held of the last session where nobody holds that: the next one takes or frees it."""
        return sum(one.session.held_bytes() for one in self._last if one.owner() is None)

    def _take_last(self, key: Hashable) -> Any:
        """Frees it where it does not fit: two plans are never held for one session."""
        try:
            last = self._last.pop()  # at once: no two threads get the same one
        except IndexError:
            return None
        return last.session if last.key == key and last.owner() is None else None


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
        *,
        seed: int = 0,
    ):
        """`again`: the native half of an earlier session that differed in its values only."""
        self._spec = spec
        self._seed, self._passes, self._dropouts = seed, 0, dropouts(spec)
        self._batch_size = batch_size
        self._tensors = tensors = NativeTensors(spec, params, sub_model)
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
                **tensors.options(),
            )
            tensors.build(self._session, sub_model.masks)
        self._examples = 0  # of the forward that a backward may follow
        self._returned: frozenset[str] = frozenset()
        self._summed = whole(spec, sub_model.frozen)
        self._load(params)

    @property
    def native(self) -> _native.Session:
        return self._session

    @property
    def peak_memory_bytes(self) -> int:
        """The plan: all that a step holds, with the most sums of g² that were asked for."""
        return self._session.planned_bytes()

    @property
    def held_bytes(self) -> int:
        """Allocated now: `peak_memory_bytes` after a step, unless an earlier one summed more."""
        return self._session.held_bytes()

    def load(self, params: Params) -> None:
        checks.check_params(self._spec, params, self._tensors.masks(self._session))
        self._returned = frozenset()
        self._load(params)

    def params(self, *, packed: bool = False) -> dict[str, np.ndarray]:
        return self._tensors.read(self._session, packed=packed)

    def step(self, x: np.ndarray, y: np.ndarray, *, importance: Importance = False) -> float:
        pieces = pieces_of(self._spec, self._tensors.frozen, importance)
        try:
            if len(x) == 1:
                checks.check_moments(self._spec, 1, self._tensors.frozen)
            mean = self._session.step(x, y, self._rows(pieces), self._next_keys())
        except (TypeError, ValueError):
            self._explain(x, y)
            raise
        self._returned = frozenset()
        self._summed = pieces or self._summed
        return mean

    def _next_keys(self) -> list[int]:
        """Of a pass of training, for each Dropout."""
        passes, self._passes = self._passes, self._passes + 1
        return [dropout_key(self._seed, passes, node.name) for node in self._dropouts]

    def importance(self) -> dict[str, np.ndarray]:
        sums = {}
        for piece in self._summed:
            sums[piece.tensor] = np.empty(piece_shape(self._spec, piece), np.float32)
            self._session.squares(*self._tensors.places[piece.tensor], sums[piece.tensor])
        return sums

    def loss(self, x: np.ndarray, y: np.ndarray) -> float:
        try:
            mean = self._session.loss(x, y)
        except (TypeError, ValueError):
            self._explain(x, y)
            raise
        self._returned = frozenset()
        return mean

    def forward(
        self, x: np.ndarray, *, taps: Sequence[str] = (), training: bool = False
    ) -> dict[str, np.ndarray]:
        checks.check_input(self._spec, x, self._batch_size)
        checks.check_taps(self._spec, taps)
        if training:
            checks.check_moments(self._spec, len(x), self._tensors.frozen)
        wanted = dict.fromkeys([*taps, self._spec.nodes[-1].name])
        self._returned = frozenset()
        keys = self._next_keys() if training else []
        self._session.forward(x, [self._tensors.nodes[name] for name in wanted], training, keys)
        if training:
            self._returned, self._examples = frozenset(wanted), len(x)
        values = {}
        for name in wanted:
            values[name] = np.empty((len(x), *self._spec.shapes[name]), np.float32)
            self._session.activation(self._tensors.nodes[name], values[name])
        return values

    def backward(
        self, output_gradients: Mapping[str, np.ndarray], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        checks.check_output_gradients(self._spec, output_gradients, self._returned, self._examples)
        self._returned = frozenset()
        nodes = [self._tensors.nodes[name] for name in output_gradients]
        self._session.backward(nodes, list(output_gradients.values()), dense)
        gradients = {}
        for name in self._tensors.trainable:
            gradients[name] = np.empty(self._spec.param_shapes[name], np.float32)
            self._session.gradient(*self._tensors.places[name], gradients[name], dense)
        self._session.drop_gradients()
        return gradients

    def descend(
        self, output_gradients: Mapping[str, np.ndarray], *, importance: Importance = False
    ) -> None:
        pieces = pieces_of(self._spec, self._tensors.frozen, importance)
        checks.check_output_gradients(self._spec, output_gradients, self._returned, self._examples)
        self._returned = frozenset()
        nodes = [self._tensors.nodes[name] for name in output_gradients]
        self._session.descend(nodes, list(output_gradients.values()), self._rows(pieces))
        self._summed = pieces or self._summed

    def apply(self, gradients: Params) -> None:
        checks.check_gradients(self._spec, gradients)
        self._returned = frozenset()
        names = [name for name in self._tensors.trainable if name in gradients]
        for name in names:
            self._session.set_gradient(*self._tensors.places[name], gradients[name])
        places = [self._tensors.places[name] for name in names]
        self._session.apply([p.node for p in places], [p.slot for p in places])

    def _rows(self, pieces: Pieces) -> list[tuple[int, int, int, int]]:
        """(node, slot, first row, rows) of each."""
        rows = []
        for name, first, count in pieces:
            place = self._tensors.places[name]
            rows.append((place.node, place.slot, first, count))
        return rows

    def _explain(self, x: np.ndarray, y: np.ndarray) -> None:
        """Raises the ValueError that says what the native checks, which are fast, refused."""
        checks.check_batch(self._spec, x, y, self._batch_size, self._spec.output_shape[0])

    def _load(self, params: Params) -> None:
        for name, place in self._tensors.places.items():
            packed = self._tensors.is_packed(name, params[name])
            self._session.load(*place, params[name], packed, True)
