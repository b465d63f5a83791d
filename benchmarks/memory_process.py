"""One process of memory.py: does what its arguments say and prints its own peak memory as JSON.

Imports nothing of its own before it has to: whatever this file loads counts.
"""

from __future__ import annotations

import sys
from importlib import import_module

EXAMPLES, STEPS = 2000, 20
MODELS = {"conv2": (62, 20), "lenet300": (10, 32)}  # classes, batch size; images of 1x28x28


def bare() -> dict:
    return {}


def import_numpy() -> dict:
    import numpy  # noqa: F401

    return {}


def import_fedlean() -> dict:
    import fedlean  # noqa: F401

    return {}


def open_engine(engine: str, threads: str) -> dict:
    """What a device imports before it has a model."""
    from fedlean.engine.open import open_engine

    open_engine(engine, int(threads))
    return {}


def train(engine: str, threads: str, model: str, density: str) -> dict:
    """Local training as a device does it; weights come as they travel: kept values and mask."""
    import numpy as np

    from fedlean.core import SubModel, generator
    from fedlean.engine.open import open_engine
    from fedlean.engine.protocol import SGD
    from fedlean.models.initialise import init_params

    opened = open_engine(engine, int(threads))
    classes, batch_size = MODELS[model]
    # Not by the catalogue, which imports every model: a device gets the spec with its task.
    spec = getattr(import_module(f"fedlean.models.{model}"), model)((1, 28, 28), classes)
    rng = generator(0, 0, 0, "benchmark")
    images = rng.integers(0, 256, (EXAMPLES, 1, 28, 28), np.uint8)
    labels = rng.integers(0, classes, EXAMPLES)
    before = peak_bytes()
    kept = float(density)
    if kept < 1:
        params, masks = _packed(spec, kept, rng)
    else:
        params, masks = init_params(spec, 0), {}
    session = opened.open(
        spec,
        params,
        SubModel(masks=masks),
        batch_size=batch_size,
        optimizer=SGD(lr=0.01, momentum=0.9),
    )
    del params
    loss = float("nan")
    for _ in range(STEPS):
        chosen = rng.integers(0, EXAMPLES, batch_size)
        x = images[chosen].astype(np.float32) / np.float32(255)
        loss = session.step(x, labels[chosen])
    return {"before_bytes": before, "planned_bytes": session.peak_memory_bytes, "loss": loss}


def _packed(spec, density: float, rng):
    """Random masks and the values of their kept weights, made row by row: never a dense tensor."""
    import numpy as np

    params, masks = {}, {}
    for name, shape in spec.param_shapes.items():
        bound = np.float32(np.prod(shape[1:], dtype=int) ** -0.5)
        if name in spec.prunable:
            mask = np.empty((shape[0], int(np.prod(shape[1:]))), bool)
            for row in mask:
                np.less(rng.random(len(row), np.float32), np.float32(density), out=row)
            masks[name] = mask.reshape(shape)
            values = rng.random(int(np.count_nonzero(mask)), np.float32)
            values *= 2 * bound
            values -= bound
            params[name] = values
        else:
            params[name] = np.zeros(shape, np.float32)
    return params, masks


def train_pytorch(threads: str, model: str) -> dict:
    """The same training as a plain PyTorch script, without FedLean."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(int(threads))
    classes, batch_size = MODELS[model]
    images = torch.randint(0, 256, (EXAMPLES, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, classes, (EXAMPLES,))
    before = peak_bytes()
    if model == "conv2":
        network = nn.Sequential(
            *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(3136, 2048), nn.ReLU(), nn.Linear(2048, classes)),
        )
    else:
        network = nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, 300), nn.ReLU()),
            *(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes)),
        )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    loss = torch.tensor(float("nan"))
    for _ in range(STEPS):
        chosen = torch.randint(0, EXAMPLES, (batch_size,))
        loss = F.cross_entropy(network(images[chosen].float() / 255), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"before_bytes": before, "planned_bytes": None, "loss": float(loss.detach())}


def peak_bytes() -> int:
    """The most resident memory this process has had, from the kernel."""
    try:
        with open("/proc/self/status") as status:  # noqa: PTH123 - pathlib is memory too
            for line in status:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PROCESSES = {
    process.__name__: process
    for process in (bare, import_numpy, import_fedlean, open_engine, train, train_pytorch)
}

if __name__ == "__main__":
    report = PROCESSES[sys.argv[1]](*sys.argv[2:])
    report["peak_bytes"] = peak_bytes()

    import json  # after the measurement

    print(json.dumps(report))
