"""An engine by name."""

from __future__ import annotations

from fedlean.engine.protocol import Engine


def open_engine(name: str, threads: int) -> Engine:
    """Raises ValueError when there is no such engine or it is not installed."""
    if name != "torch":
        raise ValueError(f"no engine named {name!r}; there is: torch")
    try:
        from fedlean.engine.torch import TorchEngine
    except ImportError:
        raise ValueError(
            "the torch engine needs PyTorch: install it with pip install 'fedlean[torch]'"
        ) from None
    return TorchEngine(threads)
