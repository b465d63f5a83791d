"""`fedlean run ... --log tensorboard`: the curves of a run while it goes on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlean.report.run_folder import number

# As TensorBoard groups them -> the key of a log entry
CURVES = {
    "model/accuracy": "accuracy",
    "model/loss": "loss",
    "model/train_loss": "train_loss",
    "model/density": "density",
    "device/peak_memory_bytes": "peak_memory_bytes",
    "device/simulated_seconds": "simulated_seconds",
    "device/flops_per_client": "flops_per_client",
}
SUMS = ("downlink_bytes", "uplink_bytes", "simulated_seconds")  # so far


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callable that takes every log entry and adds it to the event file in `folder`.

    Raises ValueError where tensorboardX is not installed.
    """
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder))
    except ModuleNotFoundError as error:
        if error.name != "tensorboardX":
            raise
        raise ValueError(
            "--log tensorboard needs tensorboardX: pip install 'fedlean[tensorboard]'"
        ) from None
    try:
        yield lambda entry: _add(writer, entry)
    finally:
        writer.close()


def _add(writer: Any, entry: dict[str, Any]) -> None:
    step = int(entry["round"])
    curves = {name: number(entry.get(key)) for name, key in CURVES.items()}
    curves |= {f"total/{key}": number(entry["total"][key]) for key in SUMS}
    curves["clients/refused"] = float(len(entry["rejected"]))
    curves["clients/left_out"] = float(len(entry["left_out"]))
    curves |= {f"method/{key}": number(value) for key, value in entry["method"].items()}
    for name, value in curves.items():
        if value is not None:
            writer.add_scalar(name, value, step)
    writer.flush()
