"""An engine by name, or the one that suits a model."""

from __future__ import annotations

import numpy as np

from fedlean.core import SubModel
from fedlean.engine.protocol import SGD, Engine
from fedlean.spec import ModelSpec

NAMES = ("native", "torch")


class NotInstalled(ValueError):
    """The engine cannot be imported here; the message says what to install."""


def engine_for(spec: ModelSpec, name: str | None, threads: int) -> tuple[Engine, str | None]:
    """The engine `name`; for None native, or torch and a line that says why not native.

    Raises ValueError when there is no such engine, it is not installed, or it lacks a layer.
    """
    if name is not None:
        engine = open_engine(name, threads)
        if why := _refusal(engine, spec):
            raise ValueError(why)
        return engine, None
    try:
        engine = open_engine("native", threads)
        why = _refusal(engine, spec)
    except NotInstalled as error:
        why = str(error)
    else:
        if why is None:
            return engine, None
    try:
        return open_engine("torch", threads), f"computing with the torch engine: {why}"
    except NotInstalled as error:
        raise ValueError(f"{why}; {error}") from None


def open_engine(name: str, threads: int) -> Engine:
    """Raises ValueError when there is no such engine, NotInstalled when it cannot be imported."""
    if name == "native":
        return _native(threads)
    if name == "torch":
        return _torch(threads)
    raise ValueError(f"no engine named {name!r}; there are: {', '.join(NAMES)}")


def _refusal(engine: Engine, spec: ModelSpec) -> str | None:
    """Why the engine cannot train the model, naming the layer: it is asked, not told."""
    nothing = {name: np.zeros(shape, np.float32) for name, shape in spec.tensor_shapes.items()}
    try:
        engine.open(spec, nothing, SubModel(), batch_size=1, optimizer=SGD(0.0))
    except ValueError as error:
        return str(error)
    return None


def _native(threads: int) -> Engine:
    try:
        from fedlean.engine.native import NativeEngine
    except ImportError as error:
        raise NotInstalled(
            f"the native engine is not installed ({error}): install FedLean where there is a C++17 "
            "compiler, or take --engine torch"
        ) from None
    return NativeEngine(threads)


def _torch(threads: int) -> Engine:
    try:
        from fedlean.engine.torch import TorchEngine
    except ImportError:
        raise NotInstalled(
            "the torch engine needs PyTorch: install it with pip install 'fedlean[torch]'"
        ) from None
    return TorchEngine(threads)
