"""What `from_torch` does before it traces: it reads the example, checks the module and copies it.

torch.fx passes hooks, parametrizations and the state of tensors by in silence.  What a spec cannot
hold of them is refused here, in the whole module tree, with the layer's name and the remedy.  Masks
of torch.nn.utils.prune are read, and taken off the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

from fedlean.core import Masks
from fedlean.layers import Shape
from fedlean.tree import read_only

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # of torch.compile
}
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_REMOVERS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}


def read_example(example_input: object) -> torch.Tensor:
    """float32 (B, ...) on the CPU with B >= 2, from real numbers of any type.

    Integers and booleans become floats, since engines read float32; one example is repeated, since
    code that ignores the batch axis looks right on one.  ValueError if it holds no finite numbers.
    """
    if isinstance(example_input, torch.Tensor):
        _refuse_tensor("example_input", example_input)
        example = example_input.detach().to("cpu", torch.float32)
    else:
        example = torch.from_numpy(_float_array(example_input))
    if example.ndim < 2 or example.numel() == 0:
        raise ValueError(f"example_input must be (B, ...), got shape {tuple(example.shape)}")
    if bad := int((~example.isfinite()).sum()):
        raise ValueError(
            f"example_input holds {bad} of {example.numel()} values that are NaN or infinite in "
            "float32: give finite numbers"
        )
    return example if len(example) > 1 else torch.cat([example, example])


def _float_array(numbers: object) -> np.ndarray:
    wanted = "example_input must be one tensor, an array or nested lists of real numbers"
    try:
        array = np.asarray(numbers)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors with gradients
        got = f"got a {type(numbers).__name__}: {_reason(error)}"
        raise ValueError(f"{wanted}, {got}") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{wanted}, got a {type(numbers).__name__} of {array.dtype}")
    with np.errstate(over="ignore"):  # what overflows is refused
        return array.astype(np.float32)


class Copied(NamedTuple):
    module: nn.Module  # float32, on the CPU, not pruned
    masks: Masks  # of the tensors that were, by dotted path: bool, True = kept


def checked_copy(module: nn.Module) -> Copied:
    """The user's module stays as it is.  Raises ValueError as the module's docstring says."""
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise ValueError(f"module must be an instance of nn.Module, got {got}")
    for path, layer in module.named_modules():
        with _named(path, layer):
            _refuse_kind(layer)
            for own in (layer._parameters, layer._buffers):  # before hooks, which lazy layers have
                for name, tensor in own.items():
                    if tensor is not None:
                        _refuse_tensor(name, tensor)
            _refuse_what_is_added(layer)
    _refuse_shared_memory(module)
    own_copy = _deep_copy(module).to("cpu", torch.float32)
    return Copied(own_copy, _take_masks(own_copy))


@contextmanager
def _named(path: str, layer: nn.Module) -> Iterator[None]:
    """Puts the layer's name in front of a ValueError's message."""
    try:
        yield
    except ValueError as error:
        kind = type(layer).__name__
        name = f"layer {path!r} ({kind})" if path else kind
        raise ValueError(f"{name}: {error}") from None


def _refuse_kind(layer: nn.Module) -> None:
    kind = type(layer).__name__
    if isinstance(layer, torch.jit.ScriptModule):
        raise ValueError("is compiled by torch.jit: pass the nn.Module from which it was made")
    if kind in _WRAPPERS:
        raise ValueError(f"only wraps the layers: use what it wraps, its .{_WRAPPERS[kind]}")
    if type(layer).__module__.startswith(("torch.ao.nn.", "torch.ao.quantization.")):
        raise ValueError("belongs to a quantised model: pass the float model it was made from")
    if "_parameters" not in vars(layer):
        raise ValueError("its __init__ does not call super().__init__()")


def _refuse_what_is_added(layer: nn.Module) -> None:
    """Parametrizations, a forward of the object's own, hooks: the layer's class knows none."""
    if parametrize.is_parametrized(layer):
        name = next(iter(dict(layer.get_submodule("parametrizations").named_children())))
        raise ValueError(
            f"{name!r} is parametrized, which a spec cannot train: call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
        )
    if "forward" in vars(layer):
        raise ValueError(
            "has a forward that was set on the object, which torch.fx does not see: define it in a "
            "class"
        )
    for attribute, what in _HOOKS.items():
        for hook in getattr(layer, attribute).values():
            _refuse_hook(hook, what)


def _refuse_hook(hook: object, what: str) -> None:
    kind = type(hook).__name__
    if kind in _REMOVERS:
        name = getattr(hook, "name", "weight")
        call = f"torch.nn.utils.{_REMOVERS[kind]}(layer{'' if name == 'weight' else f', {name!r}'})"
        raise ValueError(
            f"{name!r} is rewritten by {kind}, which a spec cannot train: call {call} first"
        )
    if not isinstance(hook, prune.BasePruningMethod):
        raise ValueError(f"has a {what}, which a spec cannot hold: remove it")


def _refuse_tensor(name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(f"{name!r} has no shape yet: run one forward, module(example_input)")
    if tensor.is_meta:
        raise ValueError(f"{name!r} is on the meta device, without values: load them first")
    if tensor.is_quantized:
        raise ValueError(f"{name!r} is quantised, expected floats: call its .dequantize()")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name!r} is {kind}, expected a dense tensor: call its .to_dense()")
    if tensor.is_complex():
        raise ValueError(f"{name!r} is {tensor.dtype}, expected real numbers: take its .real")
    if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        raise ValueError(f"{name!r} is {tensor.dtype}, expected floats: convert it")
    if isinstance(tensor, nn.Parameter) and (
        tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)
    ):
        raise ValueError(f"{name!r} has a gradient hook, which a spec cannot hold: remove it")


def _refuse_shared_memory(module: nn.Module) -> None:
    """Of different parameters.  One parameter in several places is refused where it is used."""
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters():
        address = parameter.data_ptr()
        if address and owners.setdefault(address, name) != name:
            path, _, suffix = name.rpartition(".")
            with _named(path, module.get_submodule(path)):
                raise ValueError(
                    f"{suffix!r} shares its memory with {owners[address]!r}, which a spec cannot "
                    f"hold: give it its own, layer.{suffix}.data = layer.{suffix}.data.clone()"
                )


def _deep_copy(module: nn.Module) -> nn.Module:
    # copy.deepcopy refuses tensors with a grad_fn: a pruned weight, an activation kept by forward
    tensors = {
        id(value): value.detach().clone().requires_grad_(value.requires_grad)
        for layer in module.modules()
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    }
    try:
        return copy.deepcopy(module, {**tensors})
    except Exception as error:  # whatever the user's attributes raise
        reason = _reason(error)
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            if name not in vars(nn.Module()):
                with _named(path, layer):
                    _refuse_uncopied(name, value, {**tensors})
    raise ValueError(f"{type(module).__name__} cannot be copied: {reason}")


def _refuse_uncopied(name: str, value: object, tensors: dict[int, torch.Tensor]) -> None:
    try:
        copy.deepcopy(value, tensors)
    except Exception as error:
        raise ValueError(
            f"the attribute {name!r} cannot be copied ({_reason(error)}): set it to None first"
        ) from None


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(".  ")[0]


def _take_masks(module: nn.Module) -> Masks:
    """Makes all pruning of `module` permanent; its masks by the dotted paths of their tensors."""
    masks = {}
    for path, layer in module.named_modules():
        for hook in list(layer._forward_pre_hooks.values()):
            assert isinstance(hook, prune.BasePruningMethod)  # `_refuse_hook`
            name = hook._tensor_name
            mask = layer.get_buffer(f"{name}_mask")
            if not bool(((mask == 0) | (mask == 1)).all()):
                with _named(path, layer):
                    raise ValueError(
                        f"the mask of {name!r} has values other than 0 and 1: call "
                        f"torch.nn.utils.prune.remove(layer, {name!r}) to multiply it in"
                    )
            masks[f"{path}.{name}"] = np.array(mask.numpy() != 0, order="C")
            prune.remove(layer, name)
    return read_only(masks)


def read_tensor(name: str, tensor: torch.Tensor | None, shape: Shape) -> np.ndarray:
    """A C-contiguous float32 copy of what PyTorch trains or freezes, in `shape`.

    ValueError naming the tensor if it is none of these, or has values that no model can have: NaN,
    infinity, a variance below 0.
    """
    if tensor is None or tensor.numel() != prod(shape):
        got = None if tensor is None else tuple(tensor.shape)
        raise ValueError(f"{name!r} is of shape {got}, expected {shape}: build the layer anew")
    if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
        raise ValueError(
            f"{name!r} is computed by the module or not registered, so that no optimiser trains "
            "it: make it an nn.Parameter"
        )
    values = np.array(tensor.detach().reshape(shape).numpy(), np.float32, order="C")
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise ValueError(
            f"{name!r} holds {bad} of {values.size} values that are NaN or infinite in float32: "
            "load finite ones"
        )
    if name.endswith("running_var") and (bad := np.count_nonzero(values < 0)):
        raise ValueError(
            f"{name!r} holds {bad} of {values.size} values below 0, and a variance has none: load "
            "it again"
        )
    return values
