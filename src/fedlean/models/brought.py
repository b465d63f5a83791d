"""A model that a user brings: a spec, a model with weights, or a PyTorch module.

Torch-free: a module is told by its class, and only then is `fedlean.models.torch` loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fedlean.core import Model, Params, SubModel
from fedlean.layers import Shape
from fedlean.spec import ModelSpec


class TensorName(NamedTuple):
    """A tensor as the user's module has it."""

    name: str  # in its state dict
    shape: Shape


@dataclass(frozen=True)
class Names:
    """By which names a module knows the tensors of its spec, and what else it holds."""

    of: Mapping[str, TensorName]  # tensor of the spec -> of the module
    rest: Params = field(default_factory=dict)  # in no layer of the spec, by the module's names

    def state(self, params: Params) -> dict[str, np.ndarray]:
        """`params` of the spec as the module's state dict: its names, its shapes, copies.

        `num_batches_tracked` of BatchNorm is left out: PyTorch fills it in.
        """
        own = {
            self.of[name].name: np.array(value).reshape(self.of[name].shape)
            for name, value in params.items()
        }
        return own | {name: np.array(value) for name, value in self.rest.items()}

    def to_json(self) -> dict[str, Any]:
        """JSON values without `rest`, which are arrays."""
        return {name: {"name": own.name, "shape": list(own.shape)} for name, own in self.of.items()}

    @staticmethod
    def from_json(document: Any, spec: ModelSpec, rest: Params) -> Names:
        """Raises ValueError where it names other tensors than those of `spec`."""
        try:
            of = {
                str(name): TensorName(str(own["name"]), tuple(int(n) for n in own["shape"]))
                for name, own in document.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"tensor_names: {type(error).__name__}: {error!s:.100}") from None
        for name, shape in spec.tensor_shapes.items():
            if name not in of or np.prod(of[name].shape, dtype=int) != np.prod(shape, dtype=int):
                raise ValueError(f"tensor_names: nothing that fits {name!r:.60} of shape {shape}")
        return Names({name: of[name] for name in spec.tensor_shapes}, rest)


@dataclass(frozen=True, eq=False)
class Converted:
    """`engine.open(*converted, ...)` trains what the module would: masked weights stay 0."""

    spec: ModelSpec
    params: Params  # exactly 0 where masked
    sub_model: SubModel  # the masks of pruned weights, and the frozen parameters
    names: Names

    def __iter__(self) -> Iterator[Any]:
        return iter((self.spec, self.params, self.sub_model))


@dataclass(frozen=True)
class Brought:
    """What a run is given of its model."""

    spec: ModelSpec
    start: Model | None = None  # its own weights, where it has some: the run begins with them
    names: Names | None = None  # of a PyTorch module


def brought(what: str, value: Any, input_shape: Shape) -> Brought:
    """Of a ModelSpec, a Model, an nn.Module or what `from_torch` returns.

    input_shape: of an example, by which a module is followed.  Raises ValueError with `what` for
    anything else, and with the layer's name where a module cannot be converted.
    """
    if isinstance(value, ModelSpec):
        return Brought(value)
    if isinstance(value, Model):
        return Brought(value.spec, value, getattr(value, "names", None))
    if is_module(value):
        from fedlean.models import torch as conversion

        try:
            value = conversion.from_torch(value, np.zeros((2, *input_shape), np.float32))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    if isinstance(value, Converted):
        _refuse_frozen(what, value)
        model = Model(value.spec, value.params, value.sub_model.masks)
        return Brought(value.spec, model, value.names)
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise ValueError(
        f"{what} must be a ModelSpec, a Model, a torch.nn.Module or what from_torch returns, got "
        f"{got}{': call it, to make one' if isinstance(value, type) else ''}"
    )


def drawn_by(seed: int, make: Callable[[], Any]) -> Any:
    """What `make` returns, what PyTorch draws in it by `seed`; its own generator stays as it was.

    Where PyTorch is not loaded before, `make` is called again if it has loaded it.
    """
    if "torch" not in sys.modules:
        made = make()
        if "torch" not in sys.modules:
            return made
    torch = sys.modules["torch"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def is_module(value: Any) -> bool:
    """Whether it is an `nn.Module`; if it is, torch has been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _refuse_frozen(what: str, converted: Converted) -> None:
    frozen = sorted(converted.names.of[name].name for name in converted.sub_model.frozen)
    if frozen:
        raise ValueError(
            f"{what}: {frozen[0]!r}{f' and {len(frozen) - 1} more' if frozen[1:] else ''} does not "
            "require gradients, but a method trains all of a model: call requires_grad_(True) on "
            "it, or convert only what is to be trained and give its inputs as the data"
        )
