"""How long single layers take: an engine beside dense PyTorch, torch CSR and SparseProp.

A layer's share of a training step: forward, gradient of its input, gradient of its weight, update
with momentum 0.9.  Dense PyTorch is the best of NCHW and channels_last, SGD fused and not; torch
CSR keeps the transpose, samples the weight gradient and runs convolutions as im2col; SparseProp is
timed if it can be imported and the batch suits it (multiples of 8).  Masks are uniform at random.
Seed 0.

An engine trains whole models, so its layer is timed as a difference: a model with the layer minus
the model without it.  Around the layer stand a trainable 1x1 convolution on one channel, which
makes the engine compute the gradient of the layer's input, and a pooling with a two-class Linear.

    python benchmarks/layers.py --densities 0.1 0.05 --threads 1 --batch 24 --json layers.json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Child, Comparison, Contenders, Timing, compare, fastest, serve
from machine import describe

from fedlean.core import SubModel, generator
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.layers import Conv2d, Flatten, GlobalAvgPool, Layer, Linear, Shape
from fedlean.models.initialise import init_params
from fedlean.spec import ModelSpec, sequential

LAYERS: dict[str, tuple[Shape, Linear | Conv2d]] = {  # input shape, layer
    "FC 3136x2048": ((3136,), Linear(2048)),
    "32->64 5x5 14²": ((32, 14, 14), Conv2d(64, 5, padding=2)),
    "64->128 3x3 16²": ((64, 16, 16), Conv2d(128, 3, padding=1)),
    "256->256 3x3 8²": ((256, 8, 8), Conv2d(256, 3, padding=1)),
    "512->512 3x3 4²": ((512, 4, 4), Conv2d(512, 3, padding=1)),
    "512->512 3x3 2²": ((512, 2, 2), Conv2d(512, 3, padding=1)),
    "256->256 1x1 8²": ((256, 8, 8), Conv2d(256, 1)),
    "64->128 3x3/2 16²": ((64, 16, 16), Conv2d(128, 3, stride=2, padding=1)),
    "240 depthwise 3x3 8²": ((240, 8, 8), Conv2d(240, 3, padding=1, groups=240)),
}
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
# What the project set itself to reach, as ratios over dense PyTorch; convolutions of 3x3 and 5x5.
CONV_FLOORS = {0.5: 1.0, 0.3: 1.4, 0.2: 2.0, 0.1: 3.5, 0.05: 5.5, 0.02: 10.0, 0.01: 18.0}
LINEAR_FLOOR = 1.0  # at every density up to a half
SPARSEPROP_FLOORS = {0.1: 3.0, 0.05: 3.0}  # over SparseProp, convolutions
OPTIMIZER = SGD(lr=1e-6, momentum=0.9)  # weights stay where they are, see steps.py
WITH, WITHOUT = "engine, with the layer", "engine, without it"


def surrounded(shape: Shape, layer: Layer | None) -> ModelSpec:
    """One channel -> `shape` -> layer -> two classes, or the same without the layer."""
    image = len(shape) == 3
    front = Conv2d(shape[0] if image else 1, 1)
    nodes: list[tuple[str, Layer]] = [("front", front)]
    if not image:
        nodes.append(("flatten", Flatten()))
    if layer is not None:
        nodes.append(("layer", layer))
    if image:
        nodes.append(("pool", GlobalAvgPool()))
    return sequential((1, *shape[1:]) if image else (1, 1, *shape), [*nodes, ("head", Linear(2))])


def kept_mask(name: str, shape: Shape, density: float) -> np.ndarray:
    return generator(0, 0, 0, f"mask/{name}").random(shape, np.float32) < density


# --- in the child process -------------------------------------------------------------------------


def child() -> None:
    contenders: Contenders = {}

    def open_engine_pair(
        engine: str, threads: int, layer: str, batch_size: int, density: float
    ) -> str:
        opened = open_engine(engine, threads)
        shape, settings = LAYERS[layer]
        rng = generator(0, 0, 0, "benchmark")
        y = rng.integers(0, 2, batch_size)
        for name, spec in (
            (WITH, surrounded(shape, settings)),
            (WITHOUT, surrounded(shape, None)),
        ):
            params, masks = dict(init_params(spec, 0)), {}
            if name == WITH:
                mask = kept_mask(layer, spec.param_shapes["layer.weight"], density)
                params["layer.weight"] = params["layer.weight"] * mask
                masks["layer.weight"] = mask
            x = rng.random((batch_size, *spec.input_shape), np.float32)
            session = opened.open(
                spec, params, SubModel(masks=masks), batch_size=batch_size, optimizer=OPTIMIZER
            )
            contenders[name] = lambda session=session, x=x: session.step(x, y)
        return opened.instruction_set

    def open_torch(threads: int, layer: str, batch_size: int, density: float) -> list[list[str]]:
        import torch
        from torch_layers import dense_layers, dense_output, sparse_layers

        torch.set_num_threads(threads)
        case = _case(layer, batch_size, density)
        dense, sparse = dense_layers(case), sparse_layers(case)
        expected = dense_output(case)
        for name, step in sparse.items():
            if not np.allclose(np.asarray(step()), expected, rtol=1e-3, atol=1e-4):
                raise SystemExit(f"{name} computes something else for {layer} at {density}")
        contenders.update(dense | sparse)
        return [list(dense), list(sparse)]

    serve({"open_engine_pair": open_engine_pair, "open_torch": open_torch}, contenders)


def _case(name: str, batch_size: int, density: float) -> Any:
    from torch_layers import LayerCase

    shape, layer = LAYERS[name]
    shapes = layer.param_shapes([shape])
    rng = generator(0, 0, 0, "benchmark")
    bound = np.float32(1 / np.sqrt(np.prod(shapes["weight"][1:])))
    mask = kept_mask(name, shapes["weight"], density)
    return LayerCase(
        layer,
        x=rng.random((batch_size, *shape), np.float32),
        grad=rng.standard_normal((batch_size, *layer.output_shape([shape])), np.float32),
        weight=rng.uniform(-bound, bound, shapes["weight"]).astype(np.float32) * mask,
        bias=rng.random(shapes["bias"], np.float32),
        optimizer=OPTIMIZER,
    )


# --- in the process that asks ---------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Times in ms; ratios are the other's time over the engine's, of wall and of CPU time."""

    layer: str
    threads: int
    batch_size: int
    density: float
    instruction_set: str
    engine_ms: float
    engine_cpu_ms: float
    around_ms: float  # of the model without the layer, already subtracted
    dense: str  # which dense candidate was best
    dense_ms: float
    dense_cpu_ms: float
    csr_ms: float | None
    sparseprop_ms: float | None
    ratio: float
    cpu_ratio: float
    floor: float | None
    met: bool | None
    sparseprop_met: bool | None
    rounds: int
    quiet: bool
    others_cores: float


def measure(layer: str, threads: int, density: float, settings: argparse.Namespace) -> Row:
    where = {
        **{"threads": threads, "layer": layer},
        **{"batch_size": settings.batch, "density": density},
    }
    process = Child(__file__)
    instruction_set = process.ask("open_engine_pair", engine=settings.engine, **where)
    dense, sparse = process.ask("open_torch", **where)
    dense = fastest(dense, process)
    comparison = compare(
        dict.fromkeys([WITH, WITHOUT, *dense, *sparse], process),
        repeats=settings.repeats,
        budget_seconds=settings.budget,
    )
    process.close()
    return _row(comparison, dense, sparse, layer, threads, density, settings.batch, instruction_set)


def _row(
    comparison: Comparison,
    dense: list[str],
    sparse: list[str],
    layer: str,
    threads: int,
    density: float,
    batch_size: int,
    instruction_set: str,
) -> Row:
    timings = comparison.timings
    engine = Timing(
        timings[WITH].wall_seconds - timings[WITHOUT].wall_seconds,
        timings[WITH].cpu_seconds - timings[WITHOUT].cpu_seconds,
    )
    best = min(dense, key=lambda name: timings[name].wall_seconds)
    dense_cpu = min(timings[name].cpu_seconds for name in dense)
    others = {
        prefix: min(
            (timings[name] for name in sparse if name.startswith(prefix)),
            key=lambda timing: timing.wall_seconds,
            default=None,
        )
        for prefix in ("torch CSR", "SparseProp")
    }
    csr, sparseprop = others["torch CSR"], others["SparseProp"]
    ratio = timings[best].wall_seconds / engine.wall_seconds
    cpu_ratio = dense_cpu / engine.cpu_seconds

    def met(floor: float | None, reference: Timing | None) -> bool | None:
        if floor is None or reference is None or not (comparison.quiet or threads == 1):
            return None
        if comparison.quiet:
            return reference.wall_seconds / engine.wall_seconds >= floor
        return reference.cpu_seconds / engine.cpu_seconds >= floor

    floor = _floor(layer, density)
    conv = isinstance(LAYERS[layer][1], Conv2d)
    return Row(
        layer=layer,
        threads=threads,
        batch_size=batch_size,
        density=density,
        instruction_set=instruction_set,
        engine_ms=1e3 * engine.wall_seconds,
        engine_cpu_ms=1e3 * engine.cpu_seconds,
        around_ms=1e3 * timings[WITHOUT].wall_seconds,
        dense=best,
        dense_ms=1e3 * timings[best].wall_seconds,
        dense_cpu_ms=1e3 * dense_cpu,
        csr_ms=1e3 * csr.wall_seconds if csr else None,
        sparseprop_ms=1e3 * sparseprop.wall_seconds if sparseprop else None,
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        floor=floor,
        met=met(floor, Timing(timings[best].wall_seconds, dense_cpu)),
        sparseprop_met=met(SPARSEPROP_FLOORS.get(density) if conv else None, sparseprop),
        rounds=comparison.rounds,
        quiet=comparison.quiet,
        others_cores=comparison.others_cores,
    )


def _floor(name: str, density: float) -> float | None:
    layer = LAYERS[name][1]
    if isinstance(layer, Linear):
        return LINEAR_FLOOR if density <= 0.5 else None
    return CONV_FLOORS.get(density) if layer.kernel_size > 1 and layer.groups == 1 else None


_HEADER = (
    f"{'layer':21} {'density':>7} {'engine ms':>10} {'dense ms':>9} {'CSR ms':>8} "
    f"{'SparseProp':>10} {'ratio':>7} {'CPU ratio':>9} {'floor':>6} {'met':>4} {'others':>6}"
    "  best dense PyTorch"
)


def _line(row: Row) -> str:
    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    met = {True: "yes", False: "NO", None: ""}
    floor = "" if row.floor is None else f"{row.floor:g}"
    mark = {True: " 3x", False: " <3x", None: ""}[row.sparseprop_met]
    return (
        f"{row.layer:21} {row.density:7.3f} {row.engine_ms:10.3f} {row.dense_ms:9.3f} "
        f"{figure(row.csr_ms):>8} {figure(row.sparseprop_ms):>10} "
        f"{row.ratio:6.2f}{' ' if row.quiet else '~'} {row.cpu_ratio:9.2f} {floor:>6} "
        f"{met[row.met]:>4} {row.others_cores:6.2f}  {row.dense}{mark}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="or parts of their names")
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15, help="quiet rounds per row")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per row at most")
    parser.add_argument("--engine", default="native")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    chosen = [name for name in LAYERS if any(part in name for part in settings.layers)]
    if not chosen:
        parser.error(f"no layer's name contains {settings.layers}, there are {list(LAYERS)}")
    try:
        open_engine(settings.engine, 1)
    except ValueError as error:
        parser.error(str(error))
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows = []
    for threads in settings.threads:
        print(f"\nB={settings.batch}, {threads} thread{'s' * (threads > 1)}\n{_HEADER}", flush=True)
        for name in chosen:
            for density in settings.densities:
                rows.append(measure(name, threads, density, settings))
                print(_line(rows[-1]), flush=True)
    print(f"\ninstruction set {rows[0].instruction_set}; ~ disturbed by other processes")
    if settings.json:
        document = {"machine": machine, "rows": [asdict(row) for row in rows]}
        settings.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        child()
    else:
        main()
