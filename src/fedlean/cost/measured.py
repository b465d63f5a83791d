"""Times that a device was measured to need for one model (`fedlean profile` measures them).

PruneFL (arXiv 1909.12326) fits the time of a round linearly, T(M) = c + Σ_j t_j with t_j equal
within a layer.  Here the same per operation, computation only.  Ours: a layer takes no longer than
it was measured to take in full, since the native engine computes densely from a density upwards;
the fit is of the range below.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from sys import float_info
from typing import Any, TypeGuard

from fedlean.cost.backward import BackwardLeft
from fedlean.spec import ModelSpec

MOST_SECONDS = 1e12  # of anything measured, so that no sum of them is beyond a float
OPERATIONS = ("session", "step", "forward")


@dataclass(frozen=True)
class LayerTime:
    """One prunable tensor: what each kept weight adds, and what all of them add at most."""

    seconds_per_weight: float  # t_l
    full_seconds: float | None  # None: not measured
    r_squared: float  # of the line through this layer's own measurements

    def times(self, factor: float) -> LayerTime:
        full = None if self.full_seconds is None else self.full_seconds * factor
        return LayerTime(self.seconds_per_weight * factor, full, self.r_squared)


@dataclass(frozen=True)
class OperationTime:
    """c + Σ_l min(t_l · kept_l, full_l) of a masked model."""

    constant_seconds: float  # c
    dense_seconds: float | None  # of the model without masks; None: not measured
    layers: Mapping[str, LayerTime]

    def seconds(
        self, kept: Mapping[str, int], sizes: Mapping[str, int], slower: Collection[str] = ()
    ) -> float:
        """`kept` maps masked tensors to kept weights, empty: the dense model; `sizes`: to all.

        Of tensors in `slower` it is the longer of the two.
        """
        if not kept and self.dense_seconds is not None:
            return self.dense_seconds
        total = self.constant_seconds
        for name in self.layers:
            total += self.layer_seconds(name, kept.get(name, sizes[name]), name in slower)
        return total

    def layer_seconds(self, name: str, kept: int, slower: bool = False) -> float:
        layer = self.layers[name]
        linear = layer.seconds_per_weight * kept
        if layer.full_seconds is None:
            return linear
        return (max if slower else min)(linear, layer.full_seconds)

    def times(self, factor: float) -> OperationTime:
        dense = None if self.dense_seconds is None else self.dense_seconds * factor
        layers = {name: layer.times(factor) for name, layer in self.layers.items()}
        return OperationTime(self.constant_seconds * factor, dense, layers)


@dataclass(frozen=True)
class MeasuredTime:
    """The operations of one model at one batch size.  A device may take the dense way instead.

    `session` is once per stretch of work: opening the engine's session with packed values and
    masks, what its first step takes longer than the others, and reading the values back; `step` is
    one training step; `forward` one forward pass over a batch.  The importance seconds are what a
    step that also sums g² of all coordinates takes longer, of a pruned model and of the dense one.
    """

    model: str
    spec_hash: str
    batch_size: int
    session: OperationTime
    step: OperationTime
    forward: OperationTime
    importance_seconds: float
    dense_importance_seconds: float
    conditions: Mapping[str, str | int | float]  # machine, threads, instruction set, date, ...

    def of(self, spec: ModelSpec) -> bool:
        """Whether it is of this model.

        Raises ValueError naming the layers when it says so and lists the layers of another.
        """
        if self.spec_hash != spec.hash:
            return False
        for operation in (self.session, self.step, self.forward):
            if odd := sorted(operation.layers.keys() ^ set(spec.prunable)):
                raise ValueError(
                    "the measured times say that they are of this model, but they and its "
                    f"prunable layers differ in {', '.join(odd)}: measure it with 'fedlean profile'"
                )
        return True

    def step_seconds(
        self,
        kept: Mapping[str, int],
        sizes: Mapping[str, int],
        batch_size: int,
        importance: float,
        *,
        left: BackwardLeft | None = None,
        dense_too: bool = True,
        slower: Collection[str] = (),
    ) -> float:
        """One training step.  Ours: time grows with the batch, as what was measured does.

        importance: share of the dense gradients that it takes, 0: none.
        `left` is what frozen tensors leave of its backward pass.  Without `dense_too`, the sparse
        way is taken even where the dense one is shorter.  Tensors in `slower` take the longer of
        what they take by the line and in full.
        """
        share = (left.importance if left else 1.0) * importance
        extra = self.importance_seconds if kept else self.dense_importance_seconds
        least = self._step(kept, sizes, left, slower) + share * extra
        if kept and dense_too:
            dense = self._step({}, sizes, left)
            dense += share * self.dense_importance_seconds
            least = min(least, dense)
        return least * batch_size / self.batch_size

    def _step(
        self,
        kept: Mapping[str, int],
        sizes: Mapping[str, int],
        left: BackwardLeft | None,
        slower: Collection[str] = (),
    ) -> float:
        if left is None:
            return self.step.seconds(kept, sizes, slower)
        step, forward = self.step, self.forward
        if not kept and step.dense_seconds is not None:
            return with_backward(left.operations, forward.seconds({}, sizes), step.dense_seconds)
        total = with_backward(left.activations, forward.constant_seconds, step.constant_seconds)
        for name in step.layers:
            counts = name, kept.get(name, sizes[name]), name in slower
            part = step.layer_seconds(*counts)
            total += with_backward(left.layers[name], forward.layer_seconds(*counts), part)
        return total

    def seconds_per_weight(self, name: str, left: BackwardLeft | None) -> float:
        """What each kept weight of a tensor adds to a step."""
        step = self.step.layers[name].seconds_per_weight
        if left is None:
            return step
        return with_backward(left.layers[name], self.forward.layers[name].seconds_per_weight, step)

    def constant_seconds(self, left: BackwardLeft | None) -> float:
        """What a step takes whatever is kept."""
        step = self.step.constant_seconds
        if left is None:
            return step
        return with_backward(left.activations, self.forward.constant_seconds, step)

    def forward_seconds(
        self,
        kept: Mapping[str, int],
        sizes: Mapping[str, int],
        examples: int,
        *,
        dense_too: bool = True,
        slower: Collection[str] = (),
    ) -> float:
        """Of `examples` examples; as a step, in proportion to the batch."""
        least = self.forward.seconds(kept, sizes, slower)
        if dense_too:
            least = min(least, self.forward.seconds({}, sizes))
        return least * examples / self.batch_size

    def times(self, factor: float) -> MeasuredTime:
        """Of a device on which everything takes `factor` times as long."""
        return replace(
            self,
            session=self.session.times(factor),
            step=self.step.times(factor),
            forward=self.forward.times(factor),
            importance_seconds=self.importance_seconds * factor,
            dense_importance_seconds=self.dense_importance_seconds * factor,
        )


def with_backward(share: float, forward: float, step: float) -> float:
    """A step with that share of its backward pass; forward may have been measured longer."""
    forward = min(forward, step)
    return forward + share * (step - forward)


def measured_from(document: Any) -> MeasuredTime:
    """What `dataclasses.asdict` made of one.  Raises ValueError naming the field that is wrong."""
    values = _object(document, "measured", MeasuredTime)
    for name in OPERATIONS:
        values[name] = _operation(values[name], f"measured.{name}")
    for name in ("model", "spec_hash"):
        if not isinstance(values[name], str):
            raise ValueError(f"measured.{name} must be text, got {values[name]!r:.40}")
    batch = values["batch_size"]
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= 1 << 31:
        raise ValueError(f"measured.batch_size must be a positive integer, got {batch!r:.40}")
    for name in ("importance_seconds", "dense_importance_seconds"):
        _seconds(values[name], f"measured.{name}")
    conditions = values["conditions"]
    if not isinstance(conditions, dict) or not all(
        isinstance(value, str) or _is_number(value) for value in conditions.values()
    ):
        raise ValueError("measured.conditions must map names to texts and numbers")
    return MeasuredTime(**values)


def _operation(document: Any, what: str) -> OperationTime:
    values = _object(document, what, OperationTime)
    _seconds(values["constant_seconds"], f"{what}.constant_seconds")
    _seconds(values["dense_seconds"], f"{what}.dense_seconds", may_lack=True)
    if not isinstance(values["layers"], dict):
        raise ValueError(f"{what}.layers must map layers to their times")
    layers = {name: _layer(entry, f"{what}.{name}") for name, entry in values["layers"].items()}
    return OperationTime(values["constant_seconds"], values["dense_seconds"], layers)


def _layer(document: Any, what: str) -> LayerTime:
    values = _object(document, what, LayerTime)
    _seconds(values["seconds_per_weight"], f"{what}.seconds_per_weight")
    _seconds(values["full_seconds"], f"{what}.full_seconds", may_lack=True)
    if not _is_number(values["r_squared"]) or values["r_squared"] > 1:
        raise ValueError(
            f"{what}.r_squared must be a number up to 1, got {values['r_squared']!r:.40}"
        )
    return LayerTime(**values)


def _object(document: Any, what: str, wanted: type) -> dict[str, Any]:
    """A copy with exactly the fields of `wanted`."""
    if not isinstance(document, dict):
        raise ValueError(f"{what} must be an object, got {type(document).__name__}")
    names = {field.name for field in fields(wanted)}
    if set(document) != names:
        missing, unknown = sorted(names - set(document)), sorted(set(document) - names)
        raise ValueError(f"{what}: missing {missing}, unknown {unknown}")
    return dict(document)


def _is_number(value: Any) -> TypeGuard[float]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= float_info.max  # a NaN fails, too


def _seconds(value: Any, what: str, *, may_lack: bool = False) -> None:
    if value is None and may_lack:
        return
    if not (_is_number(value) and 0 <= value <= MOST_SECONDS):
        raise ValueError(f"{what} must be a number from 0 to {MOST_SECONDS:g}, got {value!r:.40}")
