"""How long one PruneFL reconfiguration takes on Conv-2's 6.6 M prunable weights.

Prints medians of 9 runs of each part on one thread, for importance drawn from three distributions,
from a dense model and at density 0.13.  Seed 0.  Writes JSON with --json FILE.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from fedlean.cost.profile import load_profile
from fedlean.cost.time import linear_round_time
from fedlean.models.conv2 import conv2
from fedlean.models.initialise import init_params
from fedlean.pruning.empirical_risk import maximise_linear
from fedlean.pruning.prunable_set import removable
from fedlean.pruning.units import protect_units

REPEATS = 9
SPEC = conv2((1, 28, 28), 62)
DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "chi-squared": lambda rng, shape: rng.standard_normal(shape, np.float32) ** 2,
    "lognormal": lambda rng, shape: rng.lognormal(-12, 3, shape).astype(np.float32),
    "80% zeros": lambda rng, shape: (
        rng.random(shape, np.float32) * (rng.random(shape, np.float32) < 0.2)
    ),
}


def seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def measure(draw: str, density: float) -> dict[str, float | str]:
    rng = np.random.Generator(np.random.Philox(0))
    shapes = {name: SPEC.param_shapes[name] for name in SPEC.prunable}
    params = init_params(SPEC, 0)
    masks = {name: rng.random(shape) < density for name, shape in shapes.items()}
    importance = {name: DRAWS[draw](rng, shape) for name, shape in shapes.items()}
    profile = load_profile("raspberry_pi_4")
    clock = linear_round_time(SPEC, profile, batch_size=20, local_steps=5)
    candidates = removable(params, masks, 0.3, SPEC.prunable)
    return {
        "importance": draw,
        "density": density,
        "set_p_seconds": seconds(lambda: removable(params, masks, 0.3, SPEC.prunable)),
        "algorithm_2_seconds": seconds(lambda: maximise_linear(importance, candidates, clock)),
        "algorithm_2_limited_seconds": seconds(
            lambda: maximise_linear(importance, candidates, clock, max_kept=500_000)
        ),
        "protect_units_seconds": seconds(lambda: protect_units(importance, masks, candidates)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(draw, density) for draw in DRAWS for density in (1.0, 0.13)]
    print(f"{platform.machine()}, numpy {np.__version__}, one thread, median of {REPEATS}, ms")
    print(f"{'importance':12} {'density':>8} {'P':>8} {'Alg. 2':>8} {'limited':>8} {'units':>8}")
    for row in rows:
        figures = " ".join(f"{1e3 * value:8.1f}" for value in list(row.values())[2:])
        print(f"{row['importance']:12} {row['density']:8.2f} {figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
