"""What a training step takes where layers take the slower and smaller of their two forms.

For each model and density: the plan of a step with the faster forms, in bytes, and with all the
slower forms that the least memory asks for (`fedlean.engine.forms`), as a share of it; with
--repeats also the CPU time of such steps as a multiple, both in turn, the median of the repeats.

    python benchmarks/forms.py --repeats 9 --json forms.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from machine import describe

from fedlean.core import Masks, SubModel, generator
from fedlean.engine.forms import step_forms
from fedlean.engine.memory import step_memory
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD, Session
from fedlean.models import catalog
from fedlean.models.initialise import init_params
from fedlean.spec import ModelSpec
from fedlean.tree import apply_mask

SHAPES = {"conv2": (3, 32, 32), "mlp": (1, 28, 28), "resnet18": (3, 32, 32)}
DENSITIES = (0.3, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
BATCH, SEED = 32, 0


def row(name: str, density: float, momentum: float, repeats: int) -> dict[str, Any]:
    spec = catalog.build(name, SHAPES[name], 10)
    kept = {tensor: int(density * prod(spec.param_shapes[tensor])) for tensor in spec.prunable}
    floats = int(momentum > 0)
    slower = step_forms(spec, kept, 1, batch_size=BATCH, optimizer_floats=floats)
    faster_bytes, smaller_bytes = (
        step_memory(spec, kept, batch_size=BATCH, optimizer_floats=floats, slower=forms).peak_bytes
        for forms in (frozenset[str](), slower)
    )
    found = {
        "model": name,
        "density": density,
        "momentum": momentum,
        "faster_bytes": faster_bytes,
        "share": smaller_bytes / faster_bytes,
        "layers": len(slower),
    }
    if repeats and slower:
        found["times_as_long"] = times_as_long(spec, kept, momentum, slower, repeats)
    return found


def times_as_long(
    spec: ModelSpec,
    kept: Mapping[str, int],
    momentum: float,
    slower: frozenset[str],
    repeats: int,
) -> float:
    rng = generator(SEED, 0, 0, "benchmark")
    masks: Masks = {
        name: (rng.permutation(prod(shape)) < kept[name]).reshape(shape)
        for name, shape in spec.param_shapes.items()
        if name in kept
    }
    params = apply_mask(init_params(spec, SEED), masks)
    x = rng.random((BATCH, *spec.input_shape), dtype=np.float32)
    y = rng.integers(0, spec.output_shape[0], BATCH)
    sessions = [
        open_engine("native", 1).open(
            spec,
            params,
            SubModel(masks=masks),
            batch_size=BATCH,
            optimizer=SGD(1e-4, momentum),
            slower=forms,
        )
        for forms in (frozenset[str](), slower)
    ]
    turns = [[_seconds(session, x, y) for session in sessions] for _ in range(repeats)]
    faster, longer = (median(each) for each in zip(*turns, strict=True))
    return longer / faster


def _seconds(session: Session, x: np.ndarray, y: np.ndarray) -> float:
    session.step(x, y)  # brings its data back into the caches
    began = time.process_time()
    session.step(x, y)
    return time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows = []
    for name in given.models:
        for momentum in (0.0, 0.9):
            for density in given.densities:
                rows.append(found := row(name, density, momentum, given.repeats))
                took = f"{found['times_as_long']:6.2f}x" if "times_as_long" in found else ""
                print(
                    f"{name:9} momentum {momentum:3} density {density:4.2f} "
                    f"{found['faster_bytes'] / 1e6:8.3f} MB {100 * found['share']:6.1f}% {took}",
                    flush=True,
                )
    if given.json:
        document = {"machine": describe(), "batch": BATCH, "threads": 1, "seed": SEED, "rows": rows}
        given.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
