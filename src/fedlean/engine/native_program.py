"""The memory of one pass of the native engine, to the byte, from the model alone.

A model of `Program` in `native/src/program.cpp`, which it follows function by function: activations
lie in panels of 16 examples, a ReLU works in place and after max-pooling, what keeps nothing for
backward runs a few panels at a time, and arrays whose lifetimes do not meet share memory
(`native_plan`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fedlean import layers as L
from fedlean.engine.gradient_flow import moves_statistics, needed
from fedlean.engine.native_plan import Array, Arrays, lines, placed_floats
from fedlean.engine.native_storage import NO_HALO, PANEL_LANES, Geometry, Situation, scratch
from fedlean.engine.native_structure import Structure, structure
from fedlean.layers import Pair, Shape, as_image
from fedlean.spec import INPUT, ModelSpec, Node

LANE_STEP = 4
_IN_PLACE = L.ReLU | L.Add | L.Flatten | L.Scaler | L.Dropout


@dataclass(frozen=True)
class Mode:
    """How a network is run."""

    examples: int
    threads: int = 1
    training: bool = False  # backward follows
    taps: frozenset[str] = frozenset()  # nodes whose outputs are wanted, where gradients may enter
    group_panels: int = 2  # that run at once where nothing is kept for backward


@dataclass
class _Tensor:
    shape: Shape
    value_halo: Pair
    grad_halo: Pair
    needs_grad: bool
    readers: int
    tapped: bool = False
    local: bool = False  # only the panels of the running group
    value_array: int = -1
    grad_array: int = -1
    values_of: str | None = None  # whose memory it takes
    gradient_of: str | None = None

    @property
    def seed(self) -> bool:
        """Whether a gradient enters here."""
        return self.tapped and self.needs_grad


@dataclass
class _Step:
    node: Node
    inputs: list[str]
    output: str
    training: bool
    backward: bool
    at: Situation | None = None  # in which it wants scratch, but for dense rows

    @property
    def layer(self) -> L.Layer:
        return self.node.layer


@lru_cache(maxsize=32)
def program(spec: ModelSpec, frozen: frozenset[str], mode: Mode) -> Program:
    """Once for all masks: a plan asks for hundreds."""
    return Program(spec, frozen, structure(spec, frozen), mode)


@dataclass
class Program:
    """A pass, of which nothing depends on masks but the scratch of layers and its layout."""

    spec: ModelSpec
    frozen: Collection[str]
    structure: Structure
    mode: Mode
    _tensors: dict[str, _Tensor] = field(init=False)
    _steps: list[_Step] = field(init=False)
    _maker: dict[str, _Step] = field(init=False)  # of every tensor but the input
    _region: int = field(init=False, default=0)  # the first so many steps run group by group
    _arrays: Arrays = field(init=False, default_factory=Arrays)  # but for scratch

    def __post_init__(self) -> None:
        self._wire()
        for name in (*self.mode.taps, self.spec.nodes[-1].name):
            self._tensors[name].tapped = True
        self._swap_relu_and_pool()
        self._maker = {step.output: step for step in self._steps}
        self._find_region()
        self._share_values()
        if self.mode.training:
            self._share_gradients()
        self._add_values()
        if self.mode.training:
            self._add_gradients()
        for i, step in enumerate(self._steps):
            step.at = self._situation(step, i < self._region)

    def floats(
        self,
        kept: Mapping[str, int],
        where: Mapping[str, Geometry],
        dense_rows: Mapping[str, int] | None = None,
        moved: Callable[[Node], int] | None = None,
        least: int = 0,
    ) -> int:
        """Beside the tensors of the model and their gradients; `least` where that is more.

        kept: masked tensor -> kept coordinates
        where: `geometries` of the structure
        dense_rows: of weights, whose g² is summed
        moved: floats for a layer's perturbed weights
        """
        arrays = [*self._arrays.all(), *self._scratch(kept, where, dense_rows or {}, moved)]
        if sum(floats for floats, _, _ in arrays) <= least:  # even side by side
            return least
        return max(least, placed_floats(arrays))

    def _wire(self) -> None:
        s, training = self.structure, self.mode.training
        used = needed(self.spec, self.mode.taps, training=training, frozen=self.frozen)
        nodes = [node for node in self.spec.nodes if node.name in used]
        readers = Counter(source for node in nodes for source in node.inputs)
        self._tensors = {
            name: _Tensor(
                tuple(shape),
                s.value_halo[name],
                s.grad_halo[name],
                training and s.needs_grad[name],
                readers[name],
            )
            for name, shape in self.spec.shapes.items()
        }
        self._steps = [
            _Step(node, list(node.inputs), node.name, training, self._tensors[node.name].needs_grad)
            for node in nodes
        ]

    def _swap_relu_and_pool(self) -> None:
        """max(relu(x)) = relu(max(x)): the ReLU then works on the pooled image."""
        steps, i = self._steps, 0
        while i < len(steps):
            relu, i = steps[i], i + 1
            made = self._tensors[relu.output]
            if not isinstance(relu.layer, L.ReLU) or made.tapped or made.readers != 1:
                continue
            j = next(j for j in range(i, len(steps)) if relu.output in steps[j].inputs)
            pool = steps[j]
            if not isinstance(pool.layer, L.MaxPool2d):
                continue
            between = relu.output
            pool.inputs[0], relu.inputs[0] = relu.inputs[0], between
            relu.output, pool.output = pool.output, between
            last = self._tensors[relu.output]
            made.shape, made.value_halo = last.shape, last.value_halo
            made.grad_halo = last.grad_halo = NO_HALO
            i -= 1  # another step is here now
            steps[i : j + 1] = [*steps[i + 1 : j + 1], relu]

    def _find_region(self) -> None:
        """The longest beginning that keeps nothing for backward and treats examples apart."""
        for step in self._steps:
            mixes = self.mode.training and moves_statistics(step.node, self.frozen)
            if step.backward or mixes:
                break
            self._region += 1
        leaves = {source for step in self._steps[self._region :] for source in step.inputs}
        inside = {step.output for step in self._steps[: self._region]}
        if self._region:
            inside.add(INPUT)
        for name, tensor in self._tensors.items():
            tensor.local = name in inside and name not in leaves and not tensor.tapped
        for step in self._steps[: self._region]:
            step.training = False

    def _share_values(self) -> None:
        for step in self._steps:
            source = step.inputs[0]
            into, out = self._tensors[source], self._tensors[step.output]
            elementwise = isinstance(step.layer, _IN_PLACE) or (
                not step.training and isinstance(step.layer, L.Curve)
            )
            fits = _alike(step, into.value_halo, out.value_halo)
            if (
                elementwise
                and fits
                and into.local == out.local
                and source != INPUT
                and self._overwritable(step)
            ):
                out.values_of = source

    def _overwritable(self, step: _Step) -> bool:
        """Whether nobody else needs the first input's value again."""
        source = step.inputs[0]
        if self._tensors[source].readers != 1 or self._tensors[source].tapped:
            return False
        if isinstance(step.layer, L.Flatten) or not step.training:
            return True
        while source != INPUT:
            maker = self._maker[source]
            if isinstance(maker.layer, L.ReLU):
                return False
            if not isinstance(maker.layer, L.Flatten):
                break
            source = maker.inputs[0]  # the same memory, if it was shared
            if self._tensors[source].readers != 1 or self._tensors[source].tapped:
                return False
        return True

    def _share_gradients(self) -> None:
        written = {name for name, tensor in self._tensors.items() if tensor.seed}
        for step in reversed(self._steps):
            step.backward = step.backward and step.output in written
            if not step.backward:
                continue
            out, shared = self._tensors[step.output], False
            in_place = isinstance(step.layer, _IN_PLACE)
            for source in step.inputs:
                into = self._tensors[source]
                if not into.needs_grad:
                    continue
                fits = _alike(step, into.grad_halo, out.grad_halo)
                free = source not in written and into.readers == 1
                if in_place and free and fits and not shared:
                    into.gradient_of, shared = step.output, True
                written.add(source)

    def _scratch(
        self,
        kept: Mapping[str, int],
        where: Mapping[str, Geometry],
        dense_rows: Mapping[str, int],
        moved: Callable[[Node], int] | None,
    ) -> Iterator[Array]:
        for i, step in enumerate(self._steps):
            at, node = step.at, step.node
            assert at is not None
            if rows := dense_rows.get(f"{node.name}.weight", 0):
                at = replace(at, dense_rows=rows)
            need = scratch(self.spec, node, self._tensors[step.output].shape, kept, where, at)
            back = self._back(i)
            yield lines(need.forward), i, i
            if moved is not None:
                yield lines(moved(node)), i, i
            if step.backward:
                yield lines(need.saved), i, back
                yield lines(need.backward), back, back

    def _back(self, i: int) -> int:
        """When step i runs backward."""
        return 2 * len(self._steps) - i

    def _add_values(self) -> None:
        """In the order in which they are made."""
        extend, loss = self._arrays.extend, len(self._steps)
        self._add_value(INPUT, 0)
        for i, step in enumerate(self._steps):
            self._add_value(step.output, i)
            arrays = [self._tensors[source].value_array for source in step.inputs]
            for array in arrays:
                extend(array, i, i)
            if i < self._region:  # every group reads them again
                for source in step.inputs:
                    if not self._tensors[source].local:
                        extend(self._tensors[source].value_array, 0, self._region - 1)
            if not step.backward:
                continue
            back = self._back(i)
            if self._reads_input(step.node):
                for array in arrays:
                    extend(array, back, back)
            if isinstance(step.layer, L.ReLU):  # the sign of its output
                extend(self._tensors[step.output].value_array, back, back)
        for tensor in self._tensors.values():
            if tensor.tapped:
                extend(tensor.value_array, loss, self._back(0) if self.mode.training else loss)

    def _add_value(self, name: str, time: int) -> None:
        tensor = self._tensors[name]
        first = 0 if time < self._region and not tensor.local else time
        if tensor.values_of is not None:
            tensor.value_array = self._tensors[tensor.values_of].value_array
            self._arrays.extend(tensor.value_array, first, time)
            return
        lanes = padded(self.mode.examples)
        if tensor.local:
            lanes = min(lanes, self.mode.group_panels * PANEL_LANES)
        floats = lanes * _pixels(tensor.shape, tensor.value_halo)
        tensor.value_array = self._arrays.add(floats, first, time)

    def _reads_input(self, node: Node) -> bool:
        """In backward."""
        match node.layer:
            case L.Linear() | L.Conv2d():
                return f"{node.name}.weight" not in self.frozen
            case L.BatchNorm():
                names = (f"{node.name}.weight", f"{node.name}.running_mean")
                return any(name not in self.frozen for name in names)
            case L.GroupNorm() | L.Curve() | L.Scale():
                return True
        return False

    def _add_gradients(self) -> None:
        """In the order in which backward comes to them."""
        lanes, loss = padded(self.mode.examples), len(self._steps)
        for i, step in reversed(list(enumerate(self._steps))):
            if not step.backward:
                continue
            back, out = self._back(i), self._tensors[step.output]
            for name in (step.output, *step.inputs):
                tensor = self._tensors[name]
                if not tensor.needs_grad:
                    continue
                if tensor.gradient_of is not None and tensor is not out:
                    tensor.grad_array = out.grad_array
                first = loss if tensor.seed else back
                if tensor.grad_array == -1:
                    floats = lanes * _pixels(tensor.shape, tensor.grad_halo)
                    tensor.grad_array = self._arrays.add(floats, back, back)
                self._arrays.extend(tensor.grad_array, first, back)

    def _situation(self, step: _Step, in_region: bool) -> Situation:
        examples, panels = self.mode.examples, -(-self.mode.examples // PANEL_LANES)
        if in_region:
            panels = min(panels, self.mode.group_panels)
        most = panels * PANEL_LANES
        return Situation(
            examples=min(examples, most),
            lanes=min(padded(examples), most),
            panels=panels,
            training=step.training and step.backward,
            dense_rows=0,
            needs_grad_in=any(self._tensors[source].needs_grad for source in step.inputs),
            threads=self.mode.threads,
        )


def padded(examples: int) -> int:
    """Lanes that hold a batch."""
    return -(-examples // LANE_STEP) * LANE_STEP


def _pixels(shape: Shape, halo: Pair) -> int:
    """Of all channels, with the zeros around each."""
    channels, height, width = as_image(shape)
    return channels * (height + 2 * halo[0]) * (width + 2 * halo[1])


def _alike(step: _Step, halo: Pair, out_halo: Pair) -> bool:
    """Whether an input and the output lie in memory alike."""
    return halo == out_halo == NO_HALO if isinstance(step.layer, L.Flatten) else halo == out_halo
