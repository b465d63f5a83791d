"""An engine by name."""

from __future__ import annotations

from fedlean.engine.protocol import Engine

NAMES = ("native", "torch")


def open_engine(name: str, threads: int) -> Engine:
    """Raises ValueError when there is no such engine or it is not installed."""
    if name == "native":
        return _native(threads)
    if name == "torch":
        return _torch(threads)
    raise ValueError(f"no engine named {name!r}; there are: {', '.join(NAMES)}")


def _native(threads: int) -> Engine:
    try:
        from fedlean.engine.native import NativeEngine
    except ImportError as error:
        raise ValueError(
            f"the native engine is not installed ({error}): install FedLean where there is a C++17 "
            "compiler, or take --engine torch"
        ) from None
    return NativeEngine(threads)


def _torch(threads: int) -> Engine:
    try:
        from fedlean.engine.torch import TorchEngine
    except ImportError:
        raise ValueError(
            "the torch engine needs PyTorch: install it with pip install 'fedlean[torch]'"
        ) from None
    return TorchEngine(threads)
